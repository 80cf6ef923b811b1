"""The integer-only decoder behind the engine's contract, and the verbs that reach it: the reference's codes, bit for bit."""

import json
import sys

import numpy as np
import pytest

from netsuke.cli import main
from netsuke.errors import NetsukeError
from netsuke.models.load import load
from netsuke.runtime.engine import Engine, Sampler, generate
from netsuke.runtime.executors import executor_of, has_static_grids, open_executor
from netsuke.runtime.integer import IntegerModel
from netsuke.runtime.integer_engine import IntegerEngine
from tests.models import hostile
from tests.runtime.static_models import dynamic_artifact, static_artifact
from tests.runtime.test_integer_native import LEVELS

pytestmark = pytest.mark.skipif(not LEVELS, reason="this installation lacks the integer decoder's library")
IDS = np.random.default_rng(0).integers(1, 250, 30).tolist()


@pytest.fixture(scope="module", params=["w8a8", "w4a8"])
def folder(request, tmp_path_factory):
    return static_artifact(tmp_path_factory.mktemp(request.param), scheme=request.param)


@pytest.fixture(scope="module")
def reference(folder):
    return IntegerModel.of_model(load(folder).model)


def exact(engine, tokens, slots, want=None) -> np.ndarray:
    """Logits as whole steps of 2^-16 below the largest."""
    return (engine.forward(tokens, slots, want).astype(np.float64) * 65536).astype(np.int64)


def below(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max(-1, keepdims=True)


def netsuke(monkeypatch, capsys, *args) -> tuple[int, str, str]:
    """Exit code, output and errors of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["netsuke", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, *capsys.readouterr()


def refused(result: tuple[int, str, str], *words: str) -> None:
    code, _, err = result
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    assert all(word in err for word in words), err


# --- the engine's contract ---


@pytest.mark.parametrize("vectors", LEVELS)
def test_token_by_token_with_kept_keys_is_the_reference(folder, reference, vectors):
    want = below(reference.forward(IDS))
    with IntegerEngine.load(folder, vectors=vectors) as engine:
        got = [exact(engine, [token], [0])[0] for token in IDS]
        assert np.array_equal(got, want)
        engine.truncate(0, 11)
        assert np.array_equal(exact(engine, IDS[11:], [0] * 19, [True] * 19), want[11:])


def test_sequences_side_by_side_do_not_see_one_another(folder, reference):
    """Rows of three sequences at unlike places in one pass, prompts beside single tokens."""
    texts = [IDS[:20], IDS[5:25], IDS[9:29]]
    want = [below(reference.forward(text)) for text in texts]
    with IntegerEngine.load(folder, slots=3) as engine:
        at = [0, 0, 0]
        for counts in ((3, 0, 7), (1, 5, 1), (1, 1, 1), (0, 9, 4), (6, 1, 1)):
            rows = [(text[at[s] + n], s) for s, (text, count) in enumerate(zip(texts, counts)) for n in range(count)]
            got = exact(engine, *zip(*rows), [True] * len(rows))
            assert np.array_equal(got, np.concatenate([w[a : a + c] for w, a, c in zip(want, at, counts)]))
            at = [a + c for a, c in zip(at, counts)]
        engine.copy(1, 0, 8)
        assert (engine.length(0), engine.length(1)) == (at[0], 8)
        assert np.array_equal(exact(engine, texts[0][8:12], [1] * 4, [True] * 4), want[0][8:12])


def test_a_shorter_context_changes_nothing_but_its_end(folder, reference):
    with IntegerEngine.load(folder, context=16) as engine:
        got = exact(engine, IDS[:16], [0] * 16, [True] * 16)
        assert np.array_equal(got, below(reference.forward(IDS[:16])))
        with pytest.raises(NetsukeError, match="a context of 16"):
            engine.forward([1], [0])
        assert engine.length(0) == 16


def test_text_is_the_reference_s_and_its_memory_what_it_says(folder, reference):
    with open_executor(folder) as engine:
        assert isinstance(engine, IntegerEngine)
        assert list(generate(engine, IDS[:4], 20, stop=())) == list(reference.generate(IDS[:4], 20))
        memory = engine.memory()
        assert memory["kv_cache"] == engine.context * 2 * 2 * (4 + 4), "int8, 2 blocks, 2 key heads"
        assert memory["allocated"] == sum(memory[k] for k in ("kv_cache", "activations", "scratch", "tables"))


def test_the_most_likely_token_is_the_integers_own():
    """Far from 0, float32 would merge neighbouring steps of 2^-16."""
    far = np.array([[1 << 30, (1 << 30) + 1]])
    assert Sampler().pick((far[0] / 65536).astype(np.float32)) == 0
    engine = object.__new__(IntegerEngine)
    engine.source, engine.chunk = "far", 8
    engine._native = type("Rows", (), {"rows": lambda *_: far.copy()})()
    assert Sampler().pick(engine.forward([1], [0])[0]) == 1


@pytest.mark.parametrize(
    "tokens, slots, words",
    [([300], [0], "token 300"), ([-1], [0], "from -1"), ([1], [2], "slot 2"), ([1, 2], [0], "2 tokens for 1 slots"),
     ([1] * 33, [0] * 33, "33 rows at a time"), ([1.5e30], [0], "no integers"), ([], [], "0 tokens")],
)  # fmt: skip
def test_wrong_rows_are_refused_and_nothing_grows(folder, tokens, slots, words):
    with IntegerEngine.load(folder, slots=2, chunk=32) as engine:
        engine.forward([3, 4], [0, 0])
        with pytest.raises(NetsukeError, match=words):
            engine.forward(tokens, slots)
        assert [engine.length(s) for s in (0, 1)] == [2, 0]
        for call in (lambda: engine.truncate(0, 3), lambda: engine.copy(1, 0, 3)):
            with pytest.raises(NetsukeError, match="0 to 2"):
                call()


# --- which executor ---


def test_static_grids_are_at_home_in_integers(folder, tmp_path):
    dense = hostile.artifact(tmp_path / "dense")
    assert [executor_of(folder, b) for b in ("native", "integer", "torch")] == ["integer", "integer", "torch"]
    assert executor_of(dense) == "native" and has_static_grids(folder) and not has_static_grids(dense)
    with pytest.raises(NetsukeError, match="netsuke run or serve, which run static grids in integers"):
        Engine.load(folder)


def test_run_is_the_reference_s_text(folder, reference, monkeypatch, capsys):
    ids = hostile.tiny_tokenizer().encode("if", bos=True)
    want = hostile.tiny_tokenizer().decode([t for t in reference.generate(ids, 12) if t != 0])
    for backend in ("native", "integer"):
        code, out, _ = netsuke(
            monkeypatch, capsys, "run", folder, "--prompt", "if", "--tokens", 12, "--backend", backend, "--json"
        )
        got = json.loads(out)
        assert code == 0 and got["backend"] == "integer" and got["prompt_tokens"] == len(ids)
        assert want.startswith(got["text"]) and (got["text"] == want or got["new_tokens"] < 12)
    code, out, err = netsuke(monkeypatch, capsys, "run", folder, "--prompt", "if", "--tokens", 12)
    assert code == 0 and out.startswith("if" + got["text"]) and "tokens/s" in err


def test_sampling_repeats_under_a_seed(folder, monkeypatch, capsys):
    def text(seed: int, *more) -> str:
        options = ("--temperature", 1, "--seed", seed, "--tokens", 20, "--json", *more)
        return json.loads(netsuke(monkeypatch, capsys, "run", folder, *options)[1])["text"]

    assert text(1) == text(1) != text(2)
    assert text(1, "--top-p", 1e-9) == text(2, "--top-p", 1e-9), "a nucleus of one token is greedy"


def test_an_end_token_ends_the_text(tmp_path, monkeypatch, capsys):
    model = load(static_artifact(tmp_path / "free", eos=()))
    first = next(IntegerModel.of_model(model.model).generate(model.tokenizer.encode("x", bos=True), 1))
    stops = static_artifact(tmp_path / "stops", eos=(first,))
    _, out, _ = netsuke(monkeypatch, capsys, "run", stops, "--prompt", "x", "--json")
    assert json.loads(out)["text"] == "" and json.loads(out)["new_tokens"] == 1


def test_what_no_executor_runs_is_one_sentence(folder, tmp_path, monkeypatch, capsys):
    def run(*args):
        return netsuke(monkeypatch, capsys, "run", *args, "--json")[0], *netsuke(monkeypatch, capsys, "run", *args)[1:]

    dense, dynamic = hostile.artifact(tmp_path / "dense"), dynamic_artifact(tmp_path / "dynamic")
    wide = static_artifact(tmp_path / "wide", wide=["hidden"])
    refused(run(dense, "--backend", "integer"), "no static grids", f"netsuke compress {dense} --method mobilequant")
    refused(run(tmp_path / "none", "--backend", "integer"), "no such file")
    refused(run(folder, "--backend", "numpy"), "native, integer, torch")
    refused(run(dynamic), "grids", "--backend torch")
    refused(run(dynamic, "--backend", "integer"), "no static grids")
    refused(run(wide), "blocks.0.hidden has 16 bits", "--backend torch")
    refused(run(folder, "--context", 33), "a context of 33 tokens", "1 to the model's 32")
    refused(run(folder, "--context", 0), "a context of 0 tokens")
    refused(run(folder, "--kv", "int4"), "int4")
    refused(run(folder, "--prompt", "x" * 40), "the context is 32")


def test_a_map_that_is_no_integer_is_named(tmp_path, monkeypatch, capsys):
    model = load(static_artifact(tmp_path / "static")).model
    model.replace("blocks.1.o", hostile.tiny_model().blocks[1].o)
    mixed = hostile.artifact(tmp_path / "mixed", model)
    for verb in ("run", "plan"):
        refused(netsuke(monkeypatch, capsys, verb, mixed), "blocks.1.o is stored as", "--backend torch")
