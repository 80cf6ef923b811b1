"""The task of a small network: parts without a common sample, and unusable .npz files refused in one sentence."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from netsuke.errors import NetsukeError
from netsuke.tasks import network
from netsuke.tasks.network import SMALLEST, network_task
from tests.graph.small import images, residual_network


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def test_parts_share_no_sample_and_hold_all(tmp_path):
    x = images(90, seed=1)
    x = np.concatenate([x, x[:30]])  # the last thirty are copies of the first
    task = network_task(saved(tmp_path / "a.npz", x=x, y=np.arange(120) % 4), residual_network())
    rows = np.concatenate(list(task.parts.values()))
    assert sorted(rows) == list(range(120))
    part = {int(k): split for split, part in task.parts.items() for k in part}
    assert all(part[k] == part[k + 90] for k in range(30))
    assert all(task.codes(s).shape[1:] == (12, 12, 3) and len(task.labels(s)) for s in task.parts)


def test_copies_of_one_sample_leave_a_part_empty(tmp_path):
    x = np.repeat(images(1), SMALLEST, 0)
    with pytest.raises(NetsukeError, match=r"different samples is 1 of 40: the (train|validation|test) part is empty"):
        network_task(saved(tmp_path / "a.npz", x=x, y=np.zeros(SMALLEST, int)), residual_network())


def header(shape: tuple[int, ...]) -> bytes:
    """An .npy file that declares int8 of `shape` and holds ten bytes."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|i1", "fortran_order": False, "shape": shape})
    return out.getvalue() + bytes(10)


def spoiled(kind: str, path: Path) -> Path:
    """An .npz file that is wrong in one way."""
    x = images(60)
    if kind in ("spoiled stream", "cut"):
        data = bytearray(saved(path, x=x).read_bytes())
        if kind == "cut":
            del data[len(data) // 2 :]
        else:
            data[60:80] = b"\xff" * 20
        path.write_bytes(data)
    elif kind == "an .npy":
        with path.open("wb") as f:
            np.save(f, x)
    elif kind in ("shape without data", "shape beyond memory"):
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("x.npy", header((100, 12, 12, 3) if kind == "shape without data" else (1 << 50, 12, 12, 3)))
    elif kind == "pickled":
        np.savez(path, x=np.array([{}, {}], object))
    elif kind == "a number":
        saved(path, x=np.int8(3))
    elif kind == "not finite":
        saved(path, x=np.full((60, 12, 12, 3), np.nan, np.float32))
    elif kind == "no x":
        saved(path, pictures=x)
    elif kind == "answers short":
        saved(path, x=x, y=np.zeros(59, int))
    elif kind == "answers beyond":
        saved(path, x=x, y=np.full(60, 4))
    else:
        saved(path, x=x[:39])
    return path


@pytest.mark.parametrize(
    "kind, sentence",
    [
        ("spoiled stream", "not a readable .npz archive"),
        ("cut", "not a readable .npz archive"),
        ("an .npy", "not a readable .npz archive"),
        ("shape without data", "not a readable .npz archive"),
        ("shape beyond memory", "not a readable .npz archive"),
        ("pickled", "not a readable .npz archive"),
        ("a number", "x is a single number"),
        ("not finite", "NaN or infinity"),
        ("no x", "it holds pictures"),
        ("answers short", r"y is int64 \(59,\) for 60 samples"),
        ("answers beyond", "y goes from 4 to 4"),
        ("few", "there are 39 samples"),
    ],
)
def test_unusable_samples_are_one_sentence(tmp_path, kind, sentence):
    with pytest.raises(NetsukeError, match=sentence) as e:
        network_task(spoiled(kind, tmp_path / "a.npz"), residual_network())
    assert "a.npz" in str(e.value)


def test_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.npz", x=np.zeros((20_000, 12, 12, 3), np.int8))
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(network, "LARGEST_ARRAYS", 8_000_000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(NetsukeError, match="it unpacks to 8 MiB; allowed: at most 7 MiB"):
        network_task(path, residual_network())
