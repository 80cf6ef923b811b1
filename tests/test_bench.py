"""`netsuke bench lm`: all sides compute the same, rows have their shape and direction, mistakes are one sentence."""

import importlib
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from netsuke.bench import bench, lm, peers, shapes
from netsuke.bench.command import figure, show
from netsuke.bench.plots import picture
from netsuke.cli import app
from netsuke.errors import NetsukeError
from netsuke.export.gguf import exact_blocks
from netsuke.layers.linear import Dense
from netsuke.measure.peak import Peak, peak_of
from netsuke.models.llama import LlamaConfig
from netsuke.models.save import save_artifact
from tests.tiny import tiny_llama

ROW = {"model", "bits", "what", "batch", "netsuke", "peer", "peer_name", "ratio", "share_of_limit"}
SHAPE = {"width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 96, "vocab": 96, "context": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "small.netsuke"
    return str(save_artifact(folder, tiny_llama(**SHAPE), None, {}, {}))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def opened(names, subject, sequences):
    return {n: peers.open_side(n, subject.folder, subject.gguf, 64, sequences, 1) for n in names}


@pytest.mark.parametrize("sequences", [1, 2])
def test_all_sides_compute_the_same(model, cache, sequences):
    subject = shapes.prepare(model, 16, cache)
    names = [peers.OURS, *(n for p in peers.PEERS if not peers.absent(p) for n in peers.names_of(p))]
    sides = opened(names, subject, sequences)
    rows = [list(map(int, r)) for r in np.random.default_rng(1).integers(0, 96, (sequences, 20))]
    answers = {}
    for name, side in sides.items():
        side.feed(rows)
        side.cut(7)
        side.feed([r[7:] for r in rows])
        side.cut(19)
        side.feed([r[19:] for r in rows])
        whole = side.logits().copy()
        side.cut(0)
        side.feed(rows)
        answers[name] = side.logits().copy()
        assert whole.shape == (sequences, 96)
        assert np.abs(whole - answers[name]).max() < 0.05 * np.abs(whole).max(), name
        side.close()
    for name, answer in answers.items():
        close = 0.03 if name == "transformers bf16" else 0.01
        mine = answers[peers.OURS]
        assert np.linalg.norm(answer - mine) < close * np.linalg.norm(mine), name


@pytest.mark.parametrize("bits", [4, 8])
def test_both_programs_get_the_same_weights(bits):
    rng = torch.Generator().manual_seed(0)
    dense = Dense(torch.randn(24, 160, generator=rng))
    made = shapes.random_map(dense, bits, rng)
    assert made.to_dense().std() == pytest.approx(160**-0.5, rel=0.05)
    rounded = shapes.symmetric(dense.weight, bits)
    assert (rounded.to_dense() - dense.weight).abs().max() < {4: 0.3, 8: 0.02}[bits]
    for layer in (made, rounded):
        name, codes, scales = exact_blocks(layer, bits)
        zero = {"Q4_0": 8, "Q8_0": 128}[name]
        blocks = (codes.float() - zero).view(24, -1, 32) * scales.float()[..., None]
        assert torch.equal(blocks.view(24, -1), layer.to_dense())


def test_the_weights_of_a_subject_are_counted_once(model, cache):
    subject = shapes.prepare(model, 16, cache)
    block = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 96
    assert (subject.macs, subject.head_macs, subject.parameters) == (2 * block, 96 * 64, 2 * block + 96 * 64)
    assert subject.weight_bytes == 2 * subject.parameters
    before = subject.folder.stat().st_mtime_ns, subject.gguf.stat().st_mtime_ns
    again = shapes.prepare(model, 16, cache)
    assert (again.folder.stat().st_mtime_ns, again.gguf.stat().st_mtime_ns) == before


def test_the_largest_shape_is_tinyllama():
    cfg: LlamaConfig = shapes.SHAPES["1.1B"]
    maps = sum(o * i for layer in range(22) for o, i, _ in cfg.linear_shapes(layer).values())
    assert maps + 2 * cfg.vocab * cfg.width + 45 * cfg.width == 1_100_048_384  # the published count


def in_this_process(target, *args, threads=None):
    module, _, name = target.partition(":")
    return Peak(100, 1100, 0, 0.1, "VmHWM", getattr(importlib.import_module(module), name)(*args))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(lm, "READ_BYTES", 8 << 20)
    monkeypatch.setattr(lm, "peak_of", in_this_process)


def test_a_quick_run_has_the_promised_shape(model, cache, small, tmp_path):
    steps = []
    got = bench(
        "lm", [model], bits=[4], prompts=[16], batches=[1, 2], peers=["torch"], threads=1, quick=True, cache=cache,
        on_progress=lambda text, done, total: steps.append((done, total)),
    )  # fmt: skip
    assert {"read_gbps", "vnni_gops"} <= got["limits"].keys() and got["limits"]["read_gbps"] > 0
    found = [(r["what"], r["batch"]) for r in got["rows"]]
    assert found == [("decode", 1), ("prompt-16", 1), ("first-token", 1), ("decode", 2), ("load", 1), ("peak", 1)]
    for r in got["rows"]:
        assert r.keys() >= ROW and r["peer_name"] == "torch" and r["bits"] == 4
        quotient = r["netsuke"] / r["peer"]
        better = quotient if r["what"] in ("decode", "prompt-16") else 1 / quotient
        assert r["ratio"] == pytest.approx(better)
        assert (r["share_of_limit"] is not None) == (r["what"] in ("decode", "prompt-16"))
        assert r["netsuke_quartiles"][0] <= r["netsuke"] <= r["netsuke_quartiles"][1]
    assert got["rows"][-1]["netsuke"] == 1000 and got["rows"][-1]["planned"] > 0
    assert got["agreement"][0]["distance"] < 0.05
    assert got["run"]["cpu"] and got["versions"]["torch"] and got["llama_cpp"] is None
    assert len(got["limits"]["readings"]["read_gbps"]) == 2
    assert steps == sorted(steps) and steps[-1][0] < steps[-1][1]
    json.dumps(got)
    picture(got, tmp_path / "lm.svg", "torch")
    assert "prompt-16" in (tmp_path / "lm.svg").read_text()
    show(got)


def test_shares_are_of_the_named_limits(model, cache):
    subject = shapes.prepare(model, 16, cache)
    limits = {"read_gbps": 2.0, "vnni_gops": 3.0}
    decode, prompt, first = lm.works([1] * 32, 4, [])[0], *lm.works([1] * 32, 1, [32])[1:]
    assert lm.share(subject, decode, 0.5, limits) == pytest.approx(subject.weight_bytes * 16 / 0.5 / 2e9)
    assert decode.value(0.5) == 4 * 16 / 0.5
    macs = 32 * subject.macs + subject.head_macs
    assert lm.share(subject, prompt, 0.5, limits) == pytest.approx(macs / 0.5 / 3e9)
    assert lm.share(subject, first, 0.5, limits) is None


def test_a_fresh_process_loads_and_runs(model, cache):
    subject = shapes.prepare(model, 16, cache)
    job = (peers.OURS, str(subject.folder), None, 64, 1, 96, 40)
    got = peak_of("netsuke.bench.fresh:start", *job, threads=1)
    assert 0 < got.result["load"] < got.seconds and 0 < got.above < 50e6


def test_a_busy_thread_is_waited_for():
    end = time.perf_counter() + 0.15

    def spin():
        while time.perf_counter() < end:
            pass

    threading.Thread(target=spin).start()
    assert lm.settle(longest=2) < 2 and time.perf_counter() >= end


def test_an_absent_peer_is_skipped_with_a_sentence(monkeypatch, model, cache, small):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    got = bench(
        "lm", [model], bits=[4], prompts=[8], batches=[1], peers=["llama.cpp"], threads=1, quick=True, cache=cache
    )
    assert got["skipped"] == ["llama.cpp is skipped: it is not installed (pip install llama-cpp-python)"]
    assert got["rows"] == [] and got["llama_cpp"] is None


def test_a_build_that_lacks_instructions_is_called_unfair(monkeypatch):
    class Old:
        def llama_print_system_info(self):
            return b"CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 0 | "

    text = "flags\t\t: fpu avx2 avx512f avx512_vnni\n"
    monkeypatch.setattr(peers, "llama_cpp_quietly", Old)
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert peers.system_info()["missing"] == ["AVX512", "AVX512_VNNI"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--bits", "3"], "3 bits"), (["--bits", "four"], "'four'"), (["--peers", "onnx"], "'onnx'"),
        (["--prompt", "100000"], "context"), (["--batch", "0"], "batches [0]"), (["-o", "no/such/folder.json"], "folder"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(model, cache, small, monkeypatch, words, found):
    monkeypatch.setattr(shapes, "bench_cache", lambda: cache)
    result = CliRunner().invoke(app, ["bench", "lm", model, "--quick", "--peers", "torch", *words])
    assert isinstance(result.exception, NetsukeError) and found in str(result.exception)


def test_an_unknown_subject_is_refused():
    with pytest.raises(NetsukeError, match="no such benchmark"):
        bench("weather")


def test_figures_carry_their_units():
    assert figure("decode", 4562.3) == "4,562 t/s" and figure("load", 0.0123) == "12.3 ms"
    assert figure("peak", 18e6) == "18.0 MB"
