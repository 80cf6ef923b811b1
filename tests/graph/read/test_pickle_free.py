"""MCUNetV3's pickles: the same graph as from the `.npz` form, and nothing that a pickle asks for is done."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from netsuke.errors import NetsukeError
from netsuke.graph import Interpreter
from netsuke.graph.read.npz import read_npz
from netsuke.graph.read.pickle_free import load_plain, read_pickle

DATA = Path(os.environ.get("NETSUKE_DATA", "../shared/data")) / "tiny-training"


def archive(path, data: bytes, name="archive/data.pkl"):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(name, data)
    return path


@pytest.mark.skipif(not DATA.is_dir(), reason="tiny-training is not in NETSUKE_DATA")
def test_the_original_pickle_is_the_same_network():
    a, b = read_pickle(DATA / "mcunet-5fps.pkl"), read_npz(DATA / "mcunet-5fps.npz")
    assert len(a.ops) == len(b.ops)
    for s, t in zip(a.tensors, b.tensors):
        assert (s.name, s.shape, s.dtype, s.zero) == (t.name, t.shape, t.dtype, t.zero)
        assert s.data is None or np.array_equal(s.data, t.data)
        assert s.scale is None or np.allclose(s.scale, t.scale, rtol=1e-12)
    x = np.random.default_rng(0).integers(-128, 128, a.tensors[a.inputs[0]].shape).astype(np.int8)
    assert np.array_equal(Interpreter(a).run(x)[0], Interpreter(b).run(x)[0])


def test_plain_values_and_arrays_come_back(tmp_path):
    value = {"a": [1, 2.5, None, True, "x"], "w": np.arange(6, dtype=np.int32).reshape(2, 3)}
    for w in (value["w"], np.asfortranarray(value["w"])):
        back = load_plain(pickle.dumps(value | {"w": w}, protocol=2))
        assert back["a"] == value["a"] and np.array_equal(back["w"], w)


class Calls:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


def deep():
    value: list = []
    for _ in range(40):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "data, says",
    [
        (pickle.dumps({"first_conv": Calls()}, protocol=2), "mkdir"),
        (pickle.dumps({"x": np.array([{}], object)}, protocol=2), "type 'O8'"),
        (pickle.dumps({"x": np.zeros(3, ">i4")}, protocol=2), "little-endian"),
        (pickle.dumps({"x": np.zeros(3)}, protocol=2)[:60], "plain values"),
        (pickle.dumps(deep(), protocol=2), "more than"),
        (pickle.dumps([1, 2], protocol=2), "a list"),
        (pickle.dumps({"first_conv": {"params": {}}}, protocol=2), "lacks"),
        (b"cnumpy\ndtype\n(S'i4'\ntR(K\x01K\x02K\x03tb.", "plain values"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n}X\x01\x00\x00\x00aK\x01sb.", "plain values"),
    ],
)
def test_hostile_pickles_end_in_a_sentence(tmp_path, monkeypatch, data, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NetsukeError, match=says):
        read_pickle(archive(tmp_path / "x.pkl", data))
    assert not (tmp_path / "made-by-a-pickle").exists()


def test_an_array_that_claims_more_than_its_bytes(tmp_path):
    data = pickle.dumps({"x": np.zeros(3, np.int8)}, protocol=2).replace(b"K\x03\x85", b"K\x07\x85")
    with pytest.raises(NetsukeError, match="shape"):
        read_pickle(archive(tmp_path / "x.pkl", data))


def test_files_that_are_no_such_archive(tmp_path):
    plain = tmp_path / "plain.pkl"
    plain.write_bytes(pickle.dumps({}))
    for path in (plain, archive(tmp_path / "other.pkl", b"", "readme"), tmp_path / "absent.pkl"):
        with pytest.raises(NetsukeError):
            read_pickle(path)
