"""The native engine against the PyTorch reference, its plan, its promises about batches, its sampler and its refusals."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from netsuke.errors import NetsukeError
from netsuke.measure.peak import peak_of
from netsuke.models.llama import BlockShape, Llama, half_precision
from netsuke.models.load import load
from netsuke.models.places import MANIFEST, WEIGHTS
from netsuke.models.save import save_artifact
from netsuke.runtime import generate as torch_runtime
from netsuke.runtime.engine import Engine, Sampler, engine_plan, generate
from tests.runtime.engine_cases import CASES, FLOATS, VOCAB, quantize, reference, shaped, swap

pytest.importorskip("netsuke._native", reason="this installation has no native engine")

IDS = torch.randint(0, VOCAB, (80,), generator=torch.Generator().manual_seed(0)).tolist()
PROMPT, MADE = IDS[:64], IDS[64:]
SPREAD = ("tied", "cut", "window", "float16", "4-bits-64", "8-bits-48", "unlike", "lowrank-cut", "sparse-lowrank")
SPREAD = (*SPREAD, "sparse-8-bits-lowrank")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (model, artifact folder), built once."""
    folder, made = tmp_path_factory.mktemp("cases"), {}

    def get(name: str) -> tuple[Llama, Path]:
        if name not in made:
            model = CASES[name]()
            made[name] = model, save_artifact(folder / name, model, None, {}, {})
        return made[name]

    return get


def opened(folder: Path, **settings) -> Engine:
    return Engine(folder, **{"threads": 1, "logit_rows": 64, "slots": 3} | settings)


def run(engine: Engine, prompt: list[int], made: list[int], slot: int = 0) -> np.ndarray:
    """Logits of all rows: a prompt at once, then tokens one by one."""
    rows = [engine.forward(prompt, [slot] * len(prompt), [True] * len(prompt), [False] * len(prompt))]
    return np.concatenate(rows + [engine.forward([token], [slot]) for token in made])


@pytest.fixture(scope="module")
def sets(saved) -> list[str]:
    """Instruction sets of this machine."""
    out = []
    for isa in ("avx512", "avx2", "neon", "scalar"):
        with contextlib.suppress(NetsukeError), opened(saved("tied")[1], isa=isa) as engine:
            assert engine.facts["isa"] == isa
            out.append(isa)
    assert out[-1] == "scalar"
    with opened(saved("tied")[1]) as engine:
        assert engine.facts["isa"] == out[0]  # the best is the default
    return out


@pytest.mark.parametrize("kv", ["float16", "int8"])
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_reference(saved, name, kv):
    """Rows differ by the order of sums; where a number lay on the edge of a rounding (int8 inputs, 16-bit keys) by one step
    of it, in that row and in those that attend to it. A fault in a map, a mask or a position is of the order of 1."""
    model, folder = saved(name)
    expected = reference(model, PROMPT, MADE, kv).numpy()
    with opened(folder, kv=kv) as engine:
        got = run(engine, PROMPT, MADE)
    rows = np.sqrt(((got - expected) ** 2).mean(1)) / expected.std()
    exact = name in FLOATS and kv == "float16"
    assert rows.min() < 5e-6
    assert np.median(rows) < (2e-3 if exact else 0.05)
    assert rows.max() < (2e-3 if exact else 0.25)


@pytest.mark.parametrize("name", CASES)
def test_instruction_sets_agree(saved, sets, name):
    """AVX-512 and AVX2 give the same bits: integers are exact, and floats add in the same 16 lanes with the same fused
    products. The scalar kernels fuse nothing."""
    folder, results = saved(name)[1], {}
    for isa in sets:
        with opened(folder, isa=isa) as engine:
            results[isa] = run(engine, PROMPT, MADE[:4])
    if {"avx512", "avx2"} <= results.keys():
        assert np.array_equal(results["avx512"], results["avx2"])
    scalar = results.pop("scalar")
    for other in results.values():
        rows = np.abs(other - scalar).max(1) / scalar.std()
        assert rows.min() < 2e-5
        assert np.median(rows) < (5e-3 if name in FLOATS else 0.1)


@pytest.mark.parametrize("kv", ["float16", "int8"])
@pytest.mark.parametrize("name", SPREAD)
def test_a_row_does_not_depend_on_the_rows_beside_it(saved, sets, name, kv):
    """Token by token, in pieces, beside other sequences, after truncation and in a copy: the same bits."""
    folder, ids = saved(name)[1], IDS[:70]

    def feed(engine: Engine, ids: list[int], step: int, slot: int = 0, generated: bool = False) -> np.ndarray:
        out = []
        for at in range(0, len(ids), step):
            part = ids[at : at + step]
            out.append(
                engine.forward(part, [slot] * len(part), [True] * len(part), [generated] * len(part)),
            )
        return np.concatenate(out)

    for isa, generated in itertools.product(sets, (False, True)):
        with opened(folder, kv=kv, isa=isa) as engine:
            alone = feed(engine, ids, 1, generated=generated)
            for step in (5, 9, 64):
                engine.truncate(0, 0)
                assert np.array_equal(feed(engine, ids, step, generated=generated), alone), (isa, step)
            # three sequences side by side in stretches of 5, 4 and 1; the middle one is ours
            engine.truncate(0, 0)
            rows = []
            for at in range(0, 68, 4):
                if engine.length(0) > 80:
                    engine.truncate(0, 13)
                other = [IDS[(3 * at + i) % 80] for i in range(5)]
                flags = [False] * 5 + [True] * 4 + [False]
                tokens, slots = other + ids[at : at + 4] + other[:1], [0] * 5 + [1] * 4 + [2]
                rows.append(engine.forward(tokens, slots, flags, [generated] * 10))
            assert np.array_equal(np.concatenate(rows), alone[:68]), isa
            engine.truncate(1, 33)
            assert np.array_equal(feed(engine, ids[33:], 7, 1, generated), alone[33:]), isa
            engine.copy(2, 1, 47)
            engine.truncate(1, 0)
            assert engine.length(2) == 47
            assert np.array_equal(feed(engine, ids[47:], 1, 2, generated), alone[47:]), isa


@pytest.mark.parametrize("name", ["cut", "unlike", "sparse-8-bits-lowrank"])
def test_threads_change_nothing(saved, name):
    results = []
    for threads in (1, 2, 3):
        with opened(saved(name)[1], threads=threads) as engine:
            assert engine.facts["threads"] == threads
            results.append(run(engine, PROMPT, MADE[:3]))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_only_generated_rows_leave_channels_out(saved):
    """One row of a slot is taken for a generated token unless the caller says that it belongs to a prompt."""
    with opened(saved("sparse")[1]) as engine:
        prompt = run(engine, IDS[:9], [])
        engine.truncate(0, 8)
        assert np.array_equal(engine.forward(IDS[8:9], [0], generated=[False])[0], prompt[8])
        engine.truncate(0, 8)
        left_out = engine.forward(IDS[8:9], [0])[0]
        assert np.abs(left_out - prompt[8]).max() > 0.01 * prompt.std()


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_is_taken(saved, name):
    folder = saved(name)[1]
    for context, slots, chunk, logits, threads, kv in (
        (None, 1, 256, 0, 1, "float16"), (17, 3, 5, 2, 2, "int8"), (64, 9, 1, 0, 3, "float16"), (96, 2, 9, 9, 1, "int8"),
    ):  # fmt: skip
        settings = {
            "context": context, "slots": slots, "chunk": chunk, "logit_rows": logits, "threads": threads, "kv": kv
        }  # fmt: skip
        with Engine(folder, **settings) as engine:
            memory = engine.memory()
            assert engine_plan(engine.manifest, **settings) == memory
        parts = ("kv_cache", "activations", "scratch", "tables")
        assert memory["allocated"] == sum(memory[part] for part in parts)
        assert memory["weights"] == saved(name)[0].bytes()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_the_peak_of_a_process_is_the_plan(tmp_path):
    """60 MB of weights and as much of everything else, with the context filled: within 3 %."""
    wide = shaped(
        vocab=4000, width=1024, heads=16, kv_heads=16, head_dim=64, context=1536, blocks=(BlockShape(1536, 64),) * 3
    )
    folder = save_artifact(tmp_path / "wide", half_precision(wide), None, {}, {})
    root = Path(__file__).resolve().parents[2]
    peak = peak_of("tests.runtime.engine_peak:fill", str(folder), threads=1, folders=(str(root),))
    planned = peak.result["weights"] + peak.result["allocated"]
    assert planned > 80e6
    assert peak.above == pytest.approx(planned, rel=0.03)


@pytest.mark.parametrize("prompt", ["def fibonacci(n):\n    ", "import os\nimport sys\n\n\nclass Reader:\n"])
def test_greedy_text_equals_the_torch_runtime(prompt):
    """256 tokens of the shipped model, stored in 16 bits; the other runtime keeps keys in float32."""
    loaded = load("pycode")
    ids = loaded.tokenizer.encode(prompt, bos=True)
    with Engine.open("pycode", verify=True, threads=1) as engine:
        got = list(generate(engine, ids, 256, stop=()))
    assert got == list(torch_runtime.generate(loaded.model, ids, 256, stop=()))
    assert len(got) == 256


# The sampler


LOGITS = np.array([1.5, -2.0, 0.3, 2.5, 2.4, -1.0, 0.0, 1.0], np.float32)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    e = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return e / e.sum()


def drawn(count: int, logits: np.ndarray = LOGITS, **settings) -> Counter:
    sampler = Sampler(**settings)
    return Counter(sampler.pick(logits) for _ in range(count))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax(temperature):
    expected, seen = softmax(LOGITS, temperature), drawn(20_000, temperature=temperature, seed=3)
    assert chisquare([seen[i] for i in range(8)], 20_000 * expected).pvalue > 1e-3


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 3}, {3, 4, 0}),
        ({"top_k": 99}, set(range(8))),
        ({"top_p": 0.5}, {3, 4}),  # the first two have 0.37 + 0.33
        ({"top_p": 0.36}, {3}),
        ({"top_p": 0.0}, {3}),
        ({"min_p": 0.3}, {3, 4, 0}),  # e^(1.5 - 2.5) = 0.37, e^(1 - 2.5) = 0.22 of the best
        ({"min_p": 1.0}, {3}),
        ({"top_k": 2, "min_p": 0.3, "top_p": 1.0}, {3, 4}),
    ],
)
def test_truncated_draws_keep_their_tokens_and_their_shares(settings, kept):
    seen = drawn(4000, temperature=1.0, seed=5, **settings)
    assert set(seen) == kept
    if 1 < len(kept) < 8:
        share = softmax(LOGITS)[sorted(kept)]
        assert chisquare([seen[i] for i in sorted(kept)], 4000 * share / share.sum()).pvalue > 1e-3


def test_seeds_and_greedy_choices():
    sampler, again, other = (Sampler(1.0, seed=s) for s in (7, 7, 8))
    first = [sampler.pick(LOGITS) for _ in range(50)]
    assert first == [again.pick(LOGITS) for _ in range(50)]
    assert first != [other.pick(LOGITS) for _ in range(50)]
    assert set(drawn(10)) == {3}
    assert Sampler().pick(np.array([1, 5, 5, 2], np.float32)) == 1  # the first of equals
    assert Sampler(1e-30).pick(LOGITS) == 3
    holes = np.array([np.nan, -np.inf, 0.5, np.nan], np.float32)
    assert Sampler().pick(holes) == 2
    assert set(drawn(50, holes, temperature=2.0)) == {2}
    assert Sampler(1.0).pick(np.full(4, np.nan, np.float32)) == -1


# Refusals


def test_a_refused_forward_leaves_every_sequence_as_it_was(saved):
    folder = saved("tied")[1]
    with opened(folder, context=20, chunk=16, logit_rows=4) as engine, opened(folder, context=20) as other:
        for e in (engine, other):
            e.forward(IDS[:12], [0] * 12)
            e.forward(IDS[:3], [1] * 3)
        refused = [
            (IDS[:9], [0] * 9, None, "20 tokens"),  # the context is full
            ([VOCAB], [0], None, "token 101"),
            ([-1], [0], None, "token -1"),
            ([1], [3], None, "slot 3"),
            ([1], [-1], None, "slot -1"),
            ([1, 2, 3], [0, 1, 0], None, "slot 0 comes twice"),
            (IDS[:17], [2] * 17, None, "17 tokens at once"),
            (IDS[:6], [2] * 6, [True] * 6, "more than 4 rows"),
            ([], [], None, "0 tokens"),
            ([1, 2], [0], None, "2 tokens for 1 slots"),
        ]
        for tokens, slots, want, found in refused:
            with pytest.raises(NetsukeError, match=found):
                engine.forward(tokens, slots, want)
            assert [engine.length(slot) for slot in range(3)] == [12, 3, 0]
        for slot, length in ((0, 13), (0, -1), (3, 0), (-1, 0)):
            with pytest.raises(NetsukeError, match="cut to"):
                engine.truncate(slot, length)
        for target, source, length in ((1, 0, 13), (0, 3, 1), (-1, 0, 1), (1, 0, -1)):
            with pytest.raises(NetsukeError, match="tokens from slot"):
                engine.copy(target, source, length)
        for slot in (0, 1):
            assert np.array_equal(engine.forward([5], [slot]), other.forward([5], [slot]))


@pytest.mark.parametrize(
    "settings",
    [
        {"context": 97}, {"context": -1}, {"slots": -1}, {"slots": 5000}, {"chunk": 1 << 20}, {"threads": 65},
        {"threads": -2}, {"kv": "float32"}, {"isa": "sse"},
    ],
)  # fmt: skip
def test_settings_that_no_engine_has(saved, settings):
    with pytest.raises(NetsukeError):
        opened(saved("tied")[1], **settings)


def spoiled(tmp_path: Path, source: Path, change) -> Path:
    """A copy of an artifact, changed by `change(manifest, header of the weights, tensors' bytes)`."""
    folder = Path(shutil.copytree(source, tmp_path / "spoiled.netsuke"))
    manifest, raw = json.loads((folder / MANIFEST).read_bytes()), (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :])
    body = change(manifest, header, body) or body
    (folder / MANIFEST).write_text(json.dumps(manifest))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + 56)
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + body)
    return folder


def put(name: str, value: bytes):
    """Writes a number over the first of a tensor."""

    def change(_, header, body):
        at = header[name]["data_offsets"][0]
        body[at : at + len(value)] = value

    return change


def config(**entries):
    return lambda manifest, *_: manifest["config"].update(entries)


def nested(manifest, *_):
    dense = {"kind": "dense", "dtype": "float32"}
    pair = {"kind": "lowrank", "rank": 2, "first": dense, "second": dense}
    manifest["layers"]["blocks.0.q"] = {"kind": "lowrank", "rank": 3, "first": pair, "second": dense}


SPOILED = {
    "truncated": (lambda m, h, body: body[: len(body) // 2], "outside the file"),
    "missing": (lambda m, h, b: h.pop("blocks.1.down.codes") and None, "blocks.1.down.codes.* is missing"),
    "bits": (lambda m, h, b: m["layers"]["blocks.0.q"].update(bits=5), "blocks.0.q"),
    "group": (lambda m, h, b: m["layers"]["blocks.0.q"].update(group=32), "another shape"),
    "kind": (lambda m, h, b: m["layers"]["blocks.0.q"].update(kind="dense"), "another dtype"),
    "unknown kind": (lambda m, h, b: m["layers"]["blocks.0.q"].update(kind="magic"), "unknown kind"),
    "nested": (nested, "blocks.0.q.first' is of an unknown kind"),
    "no layer": (lambda m, h, b: m["layers"].pop("blocks.0.q") and None, "blocks.0.q"),
    "version": (lambda m, h, b: m.update(version=2), "says something else"),
    "family": (lambda m, h, b: m.update(family="mamba"), "says something else"),
    "width": (config(width=73), "another shape"),
    "vocab": (config(vocab=1 << 40), "vocab"),
    "heads": (config(heads=3), "3 heads, 2 key heads"),
    "no blocks": (config(blocks=[]), "number of blocks"),
    "offsets": (lambda m, h, b: h["norm.weight"].update(data_offsets=[8, 4]), "outside the file"),
    "stored type": (lambda m, h, b: h["norm.weight"].update(dtype="I32"), "another type"),
    "norm NaN": (put("norm.weight", b"\x00\x00\xc0\x7f"), "norm.weight.* NaN"),
    "scale infinite": (put("blocks.1.up.scales", b"\x00\x7c"), "blocks.1.up.scales.* NaN"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_artifacts(saved, tmp_path, case):
    change, found = SPOILED[case]
    folder = spoiled(tmp_path, saved("4-bits-64")[1], change)
    with pytest.raises(NetsukeError, match=found):
        opened(folder)


def test_groups_of_more_sizes_than_the_engine_keeps_copies_of(tmp_path):
    sizes = iter((64, 32, 48, 7, 5, 3, 9, 11, 13, 10))
    leaves = ("q", "k", "v", "gate", "up")
    model = swap(shaped(), lambda leaf, layer: quantize(layer, 4, next(sizes)) if leaf in leaves else layer)
    folder = save_artifact(tmp_path / "sizes", model, None, {}, {})
    with pytest.raises(NetsukeError, match="groups of too many sizes"):
        opened(folder)


def test_sizes_beyond_all_machines_are_refused_by_the_plan(saved):
    manifest = json.loads((saved("tied")[1] / MANIFEST).read_bytes())
    manifest["config"].update(context=1 << 28, head_dim=4096, heads=4096, kv_heads=4096)
    with pytest.raises(NetsukeError, match="cache of more than"):
        engine_plan(manifest, slots=4096)
    with pytest.raises(NetsukeError, match="65536 rows of 4096 key heads"):
        engine_plan(manifest, chunk=65536)


def test_a_file_that_was_cut_is_named_before_it_is_mapped(saved, tmp_path):
    folder = Path(shutil.copytree(saved("tied")[1], tmp_path / "cut.netsuke"))
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:-100])
    with pytest.raises(NetsukeError, match=r"weights\.safetensors' has"):
        Engine.open(folder)
    (folder / WEIGHTS).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(NetsukeError, match="sha256"):
        Engine.open(folder, verify=True)


def test_weights_that_are_not_finite(saved, tmp_path):
    """Dense weights are not read before they are used: the first answer that they spoil is refused."""
    folder = spoiled(tmp_path, saved("tied")[1], put("blocks.1.down.weight", b"\x00\x00\xc0\x7f"))
    with opened(folder) as engine:
        engine.forward([1, 2], [0, 0], [False, False])
        with pytest.raises(NetsukeError, match="NaN"):
            engine.forward([3], [0])
        assert engine.length(0) == 2
