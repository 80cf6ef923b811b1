"""Damaged, hostile and unsupported `.tflite` files end in one sentence that names the place and the remedy."""

import struct

import numpy as np
import pytest

from netsuke.errors import NetsukeError
from netsuke.graph.read.flatbuffer import Flatbuffer
from netsuke.graph.read.tflite import read_tflite
from tests.graph.tflite_cases import S, ints
from tests.graph.tflite_writer import Step, T, small, write


def changed(index, **kw):
    """The small network with a tensor changed."""
    tensors, ops = small()
    for key, value in kw.items():
        setattr(tensors[index], key, value)
    return write(tensors, ops, (0,), (6,))


def with_op(kind, inputs, outputs, options=None, tensors=(), starts=(0,)):
    """The small network and one operator more."""
    base, ops = small()
    return write([*base, *tensors], [*ops, Step(kind, inputs, outputs, options or {})], starts, outputs)


def patched(form, find, value):
    """The small network with the first bytes `find` overwritten."""
    data = bytearray(changed(0))
    struct.pack_into(form, data, data.index(find), value)
    return bytes(data)


def vector_of(n, width):
    """A table whose first field is a vector of n elements, all zero: a list of tables, integers or letters."""
    return b"\x10\0\0\0TFL3" + struct.pack("<HHHHiII", 6, 8, 4, 0, 8, 4, n) + bytes(n * width)


NAN = np.full(3, np.nan, np.float32)
HOSTILE = {
    "empty": (b"", "TFL3"),
    "wrong letters": (b"\x18\0\0\0TFL2" + bytes(64), "TFL3"),
    "root outside": (b"\xff\xff\xff\x7fTFL3" + bytes(64), "damaged"),
    "root to itself": (b"\0\0\0\0TFL3" + bytes(64), "damaged|no subgraph"),
    "zeros": (bytes(4) + b"TFL3", "damaged"),
    "a vector longer than the file": (patched("<I", struct.pack("<I4i", 4, 1, 6, 6, 2), 1 << 30), "longer than the file"),
    "a shape below zero": (changed(3, shape=(1, 6, -6, 4)), "conv|fixed"),
    "a dynamic axis": (changed(0, signature=(-1, -1, 6, 2)), "'image' has no fixed size along axis 1"),
    "an axis that only the graph has open": (changed(3, signature=(-1, 6, -1, 4)), "'conv' has no fixed size"),
    "a tensor of a million millions": (changed(3, shape=(1, 1 << 20, 1 << 20, 4)), "conv"),
    "weights that lack bytes": (changed(1, data=np.zeros(7, np.int8)), "'conv.weight' has 7 bytes"),
    "a type that is not known": (patched("<i", struct.pack("<i", 0), 0)[:-40], "damaged"),
    "zero points that differ": (changed(1, scale=[0.1, 0.1, 0.1, 0.1], zero=4), "zero point 4"),
    "a scale of nothing": (changed(0, scale=0.0), "scale"),
    "a scale that is no number": (changed(1, scale=[np.nan, 1, 1, 1]), "scale"),
    "a quantized axis that is not there": (changed(1, axis=9), "along axis 9"),
    "too few scales": (changed(1, scale=[0.1, 0.1]), "'conv.weight' has 2 scales along axis 0"),
    "an operator that is not supported": (with_op("RESIZE_BILINEAR", (3, 8), (9,), tensors=[T((1, 9, 9, 4), **S)]),
                                          "RESIZE_BILINEAR.*operator 3.*'t9'.*not supported.*CONV_2D.*split"),
    "a loop": (with_op("WHILE", (6,), (9,), tensors=[T((1, 3), **S)]), "WHILE"),
    "a custom operator": (with_op("custom Frobnicate", (6,), (9,), tensors=[T((1, 3), **S)]), "custom Frobnicate"),
    "a signal operator without options": (with_op("custom SignalRfft", (6,), (9,), tensors=[T((1, 3), **S)]), "options"),
    "a tensor that nothing writes": (with_op("RELU", (9,), (10,), tensors=[T((1, 3), **S)] * 2), "'t9' is read before"),
    "a tensor that does not exist": (with_op("RELU", (77,), (6,)), "does not exist"),
    "a missing input": (with_op("ADD", (6,), (9,), tensors=[T((1, 3), **S)]), "no input 1"),
    "a pad that is computed": (with_op("PAD", (3, 6), (9,), tensors=[T((1, 9, 9, 4), **S)]), "computed|numbers"),
    "16-bit activations": (with_op("FULLY_CONNECTED", (9, 4, -1), (10,), 
                                   tensors=[T((1, 4), "int16", 0.1), T((1, 3), "int16", 0.1)], starts=(9,)),
                           "16 bits.*int8 activations"),
    "a fused tanh": (with_op("FULLY_CONNECTED", (7, 4, 5), (9,), {0: ("b", 4)}, [T((1, 3), **S)]), "activation number 4"),
    "shuffled weights": (with_op("FULLY_CONNECTED", (7, 4, 5), (9,), {1: ("b", 1)}, [T((1, 3), **S)]), "shuffled"),
    "a backward slice": (with_op("STRIDED_SLICE", (6, 9, 10, 11), (12,), 
                                 tensors=[ints(0, 2), ints(1, 0), ints(1, -1), T((1, 2), **S)]),
                         "steps by -1"),
    "an axis that is not there": (with_op("CONCATENATION", (3, 3), (9,), {0: ("i", 9)}, [T((1, 6, 6, 8), **S)]),
                                  "CONCATENATION.*the axis 9 of 4"),
    "weights of NaN": (with_op("ADD", (9, 10), (11,), starts=(9,),
                               tensors=[T((3,), "float32"), T((3,), "float32", data=NAN), T((3,), "float32")]), "'t10' hold NaN"),
    "a stride of 0": (with_op("MAX_POOL_2D", (3,), (9,), {3: ("i", 2), 4: ("i", 2)}, [T((1, 3, 3, 4), **S)]), "stride"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_sentence(tmp_path, name):
    data, words = HOSTILE[name]
    path = tmp_path / "model.tflite"
    path.write_bytes(data)
    with pytest.raises(NetsukeError, match=words) as e:
        read_tflite(path)
    assert "\n" not in str(e.value) and str(e.value).startswith("cannot ") and "model" in str(e.value)


def test_any_byte_may_be_wrong(tmp_path):
    """Truncated and overwritten files are read, or refused in one sentence; nothing else happens."""
    whole, path = changed(0), tmp_path / "model.tflite"
    rng = np.random.default_rng(0)
    refused = 0
    for k in range(1200):
        data = bytearray(whole)
        if k % 4 == 0:
            data = data[: rng.integers(len(data))]
        for at in rng.integers(0, max(len(data), 1), 3) if data else ():
            data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))])
        path.write_bytes(bytes(data))
        try:
            read_tflite(path)
        except NetsukeError:
            refused += 1
    assert 300 < refused < 1200


@pytest.mark.parametrize(
    ("read", "most", "width"), [("tables", 1 << 16, 4), ("integers", 1 << 16, 4), ("text", 1 << 16, 1)]
)
def test_vectors_of_objects_are_measured_first(read, most, width):
    def table(n):
        return Flatbuffer(vector_of(n, width), "model.tflite", "TFL3").root()

    with pytest.raises(NetsukeError, match=f"{most + 1} elements stands where at most {most}"):
        getattr(table(most + 1), read)(0)
    if read != "tables":
        assert len(getattr(table(most), read)(0)) == most
