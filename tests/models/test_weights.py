"""Safetensors: read and written as others do, equal bytes for equal input, and memory that stays small."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from netsuke.errors import NetsukeError
from netsuke.models.weights import DTYPES, WeightFile, check_finite, read_header, write_safetensors


def samples() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(3, 5, generator=rng) * 3
    out = {code.lower(): (base.abs() if code[0] in "UB" else base).to(d) for code, d in DTYPES.items()}
    return out | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "turned": base.T}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def test_both_ways_with_the_safetensors_library(tmp_path):
    tensors = samples()
    write_safetensors(tmp_path / "ours", tensors, {"format": "pt"})
    theirs = load_file(tmp_path / "ours")
    assert theirs.keys() == tensors.keys()
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs")
    read = WeightFile(tmp_path / "theirs")
    assert read.names() == sorted(tensors)
    for name, tensor in tensors.items():
        assert same(theirs[name], tensor), name
        assert same(read.get(name), tensor), name
    assert read_header(tmp_path / "ours").metadata == {"format": "pt"}


def test_equal_tensors_give_equal_bytes_in_any_order(tmp_path):
    tensors = samples()
    write_safetensors(tmp_path / "a", tensors)
    write_safetensors(tmp_path / "b", dict(reversed(tensors.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for info in read_header(tmp_path / "a").tensors.values():
        assert info.start % info.dtype.itemsize == 0  # aligned, so that others may map the file


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "w"
    write_safetensors(path, {"a": torch.zeros(3)})
    before = path.read_bytes()

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NetsukeError, match="No space left"):
        write_safetensors(path, {"a": torch.ones(3)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["w"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_named(value):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        bad = torch.zeros(5000, dtype=dtype)
        bad[4321] = value
        with pytest.raises(NetsukeError, match=r"head\.weight"):
            check_finite("head.weight", bad)
    check_finite("codes", torch.full((3,), 255, dtype=torch.uint8))


PEAK = """
import pathlib, re, sys
from netsuke.models.load import load
def kb(key):
    return int(re.search(key + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
load(sys.argv[1])  # what importing and a first use cost, on a tiny model
kept = []
for path in sys.argv[2:]:
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = kb("VmRSS")
    kept.append(load(path))  # freed memory would be used again, and the second figure would say too little
    print(kb("VmHWM") - before, kept[-1].model.bytes() // 1024)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory counter")
def test_loading_holds_the_model_once(tmp_path):
    from netsuke.models.llama import Llama
    from tests.models import hostile

    big = Llama(hostile.tiny_config(width=1024, vocab=4000, heads=8, kv_heads=8, head_dim=128))
    for p in big.parameters():
        p.zero_()
    small = hostile.artifact(tmp_path / "small")
    paths = [str(p) for p in (small, hostile.artifact(tmp_path / "a", big), hostile.hf_folder(tmp_path / "hf", big))]
    run = subprocess.run([sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, check=True)
    assert len(run.stdout.splitlines()) == 2
    for line in run.stdout.splitlines():
        peak, size = map(int, line.split())
        assert size > 45_000
        assert size * 0.9 < peak < size * 1.4  # the largest tensor is a third of this model
