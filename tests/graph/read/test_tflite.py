"""`.tflite` files: what each operator becomes, and that it computes what it says."""

from pathlib import Path

import numpy as np
import pytest

from netsuke.data.catalogue import data_root
from netsuke.graph import Interpreter
from netsuke.graph.read.tflite import read_tflite
from tests.graph.tflite_cases import DEPTH, IMAGE, RNG, SINGLE, S, codes, ints, real
from tests.graph.tflite_writer import Step, T, small, write

ROOT = data_root() or Path("absent")
BUNDLED = sorted(
    [*ROOT.glob("mlperf-tiny/*/*.tflite"), *ROOT.glob("tflm/*.tflite"), *ROOT.glob("mobilenetv2*/*.tflite")]
)
NO_DATA = pytest.mark.skipif(not BUNDLED, reason="NETSUKE_DATA lacks mlperf-tiny, tflm, mobilenetv2-imagenet-int8")


def load(tmp_path, tensors, ops, inputs=(0,), outputs=None, **kw):
    path = tmp_path / "model.tflite"
    path.write_bytes(write(tensors, ops, inputs, (ops[-1].outputs[0],) if outputs is None else outputs, **kw))
    return read_tflite(path)


@pytest.mark.parametrize("name", SINGLE)
def test_one_operator_is_within_a_step_of_the_real_function(tmp_path, name):
    tensors, op, function = SINGLE[name]
    graph, x, y = load(tmp_path, tensors, [op]), codes(*tensors[0].shape), tensors[-1]
    ours = Interpreter(graph).run(x)[0].astype(int)
    want = np.clip(np.rint(function(real(tensors[0], x)) / np.float32(y.scale)) + y.zero, -128, 127)
    assert ours.shape == y.shape and np.abs(ours - want).max() <= 1


def floats(*shape):
    return RNG.normal(0, 1, shape).astype(np.float32)


def test_float_layers_and_activations(tmp_path):
    w, b = floats(5, 8), floats(5)
    tensors = [T((1, 8), "float32"), T((5, 8), "float32", data=w), T((5,), "float32", data=b), T((1, 5), "float32"),
               T((1, 5), "float32"), T((1, 5), "float32"), T((5,), "float32", data=b), T((1, 5), "float32")]  # fmt: skip
    ops = [Step("FULLY_CONNECTED", (0, 1, 2), (3,)), Step("LEAKY_RELU", (3,), (4,), {0: ("f", 0.3)}), Step("SUB", (4, 6), (5,)),
           Step("DIV", (5, 4), (7,))]  # fmt: skip
    x = floats(1, 8)
    z = x @ w.T + b
    a = np.maximum(z, np.float32(0.3) * z)
    assert np.allclose(Interpreter(load(tmp_path, tensors, ops)).run(x)[0], (a - b) / a, rtol=1e-5, atol=1e-6)


def test_half_precision_and_int8_weights_behind_dequantize(tmp_path):
    w, q = floats(5, 8).astype(np.float16), codes(3, 5)
    tensors = [T((1, 8), "float32"), T((5, 8), "float16", data=w), T((5, 8), "float32"), T((1, 5), "float32"),
               T((3, 5), "int8", 0.1, data=q), T((3, 5), "float32"), T((1, 3), "float32")]  # fmt: skip
    ops = [Step("DEQUANTIZE", (1,), (2,)), Step("FULLY_CONNECTED", (0, 2, -1), (3,)), Step("DEQUANTIZE", (4,), (5,)),
           Step("FULLY_CONNECTED", (3, 5, -1), (6,))]  # fmt: skip
    graph, x = load(tmp_path, tensors, ops), floats(1, 8)
    assert [graph.tensors[o.inputs[1]].dtype for o in graph.ops] == ["float32", "int8"]
    assert np.allclose(Interpreter(graph).run(x)[0], x @ w.astype(np.float32).T @ (0.1 * q.T), rtol=1e-4, atol=1e-4)


def test_uint8_activations_become_int8(tmp_path):
    tensors = [T((1, 8), "uint8", 0.05, 131), T((1, 8), "int8", 0.05, 3), T((1, 8), "int8", 0.03, -128)]
    graph = load(tmp_path, tensors, [Step("QUANTIZE", (0,), (1,)), Step("RELU", (1,), (2,))])
    assert graph.meta["uint8"] == ["t0"] and [o.kind for o in graph.ops] == ["lut"]
    assert graph.tensors[graph.inputs[0]].zero == 3


def test_int4_weights(tmp_path):
    packed = np.array([[0x2F, 0x81], [0x70, 0x3C]], np.uint8)  # rows -1 2 1 -8 and 0 7 -4 3, low nibble first
    tensors = [T((1, 4), **S), T((2, 4), "int4", 0.1, data=packed), T((1, 2), scale=0.1)]
    graph = load(tmp_path, tensors, [Step("FULLY_CONNECTED", (0, 1, -1), (2,))])
    w = graph.tensors[graph.ops[0].inputs[1]]
    assert w.dtype == "int4" and w.data.tolist() == [[-1, 2, 1, -8], [0, 7, -4, 3]]


@pytest.mark.parametrize(("after", "folded"), [(1, True), (3, False)])
def test_a_pad_becomes_that_of_the_convolution(tmp_path, after, folded):
    pads = T((4, 2), "int32", data=np.array([[0, 0], [1, after], [1, 1], [0, 0]], np.int32))
    rows = 5 + 1 + after
    tensors = [IMAGE, pads, T((1, rows, 8, 4), **S), T((1, 3, 3, 4), scale=0.01, data=DEPTH[..., :4]),
               T((1, rows - 2, 6, 4), scale=0.2)]  # fmt: skip
    ops = [
        Step("PAD", (0, 1), (2,)),
        Step("DEPTHWISE_CONV_2D", (2, 3, -1), (4,), {0: ("b", 1), 1: ("i", 1), 2: ("i", 1), 3: ("i", 1)}),
    ]
    graph = load(tmp_path, tensors, ops)
    assert [o.kind for o in graph.ops] == (["depthwise2d"] if folded else ["pad", "depthwise2d"])
    apart = load(tmp_path, tensors, ops, outputs=(4, 2))  # the padded image is asked for: nothing may be folded
    x = codes(*IMAGE.shape)
    assert np.array_equal(Interpreter(graph).run(x)[0], Interpreter(apart).run(x)[0])


def test_split_unpack_and_shapes_that_are_computed(tmp_path):
    tensors = [T((1, 4, 6), **S), ints(2), T((1, 4, 3), **S), T((1, 4, 3), **S), T((4, 3), **S), T((3,), "int32"),
               T((12,), **S)]  # fmt: skip
    ops = [Step("SPLIT", (1, 0), (2, 3), {0: ("i", 2)}), Step("UNPACK", (3,), (4,), {0: ("i", 1), 1: ("i", 0)}),
           Step("SHAPE", (3,), (5,)), Step("RESHAPE", (4, 5), (6,))]  # fmt: skip
    x = codes(1, 4, 6)
    graph = load(tmp_path, tensors, ops)
    assert np.array_equal(Interpreter(graph).run(x)[0], x[0, :, 3:].reshape(12))


@pytest.mark.parametrize("old", [True, False])
def test_the_small_network(tmp_path, old):
    tensors, ops = small()
    graph = load(tmp_path, tensors, ops, old_codes=old)
    assert [o.kind for o in graph.ops] == ["conv2d", "avgpool2d", "reshape", "dense"]
    assert graph.tensors[graph.inputs[0]].shape == (1, 6, 6, 2) and graph.ops[0].attrs["pad"] == (1, 1, 1, 1)


@NO_DATA
@pytest.mark.parametrize("path", BUNDLED, ids=lambda p: p.stem)
def test_bundled_networks_are_read(path):
    graph = read_tflite(path)
    assert graph.macs() > 0 and graph.weight_bytes() > 0
    kinds = {o.kind for o in graph.ops}
    assert "pad" not in kinds  # MobileNetV2 has 18 of them, all taken over by convolutions
