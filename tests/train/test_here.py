"""A small model from a text file: begun, trained in two rounds, trimmed, started from a larger one; refusals write nothing."""

import pathlib
import textwrap

import pytest
import torch

from netsuke import train
from netsuke.compress import compress
from netsuke.errors import NetsukeError
from netsuke.models.load import load
from netsuke.models.shapes import parameters
from netsuke.train.here import begin_small, passes, train_here, trim_vocabulary
from netsuke.train.rounds import Rounds


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(pathlib.Path(textwrap.__file__).read_text(encoding="ascii") * 2)
    return str(path)


@pytest.fixture(scope="module")
def begun(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("begun") / "fresh"
    return begin_small(text, 150_000, 400, str(out), context=64)


@pytest.fixture(scope="module")
def trained(begun, text, tmp_path_factory):
    out, seen = tmp_path_factory.mktemp("trained") / "trained", []
    got = train_here(
        begun["artifact"], text, str(out), steps=20, batch=4, rounds=2, how=Rounds(by="sequence", temperature=0.2),
        on_progress=lambda *row: seen.append(row),
    )  # fmt: skip
    assert seen[-1] == ("choosing hard batches", 0, 0) and seen[0][1:] == (1, 20)
    return got


def test_a_beginning_is_inside_its_budget_and_loads(begun, text):
    loaded = load(begun["artifact"])
    count = sum(p.numel() for p in loaded.model.parameters())
    assert count == begun["parameters"] == parameters(loaded.model.cfg).total and abs(count / 150_000 - 1) <= 0.01
    words = pathlib.Path(text).read_text()[:500]
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(words)) == words and begun["bytes_per_token"] > 1.5


def test_two_rounds_learn_and_are_reported(trained):
    before, after = trained["bits_per_byte"]
    assert after < before - 0.2 and trained["tokens"] == 20 * 4 * 64
    assert trained["second"]["steps"] == 10 and trained["second"]["effective_share"] < 1
    stored = load(trained["artifact"])
    assert stored.model.embed.weight.dtype == torch.float16 and stored.manifest["facts"]["test"] == trained["test"]


def test_a_trained_model_under_fewer_pieces(trained, text, tmp_path):
    got = trim_vocabulary(trained["artifact"], text, 340, str(tmp_path / "trimmed"))
    loaded = load(got["artifact"])
    assert got["pieces"] == [400, 340] and loaded.model.cfg.vocab == loaded.tokenizer.vocab == 340
    assert 0.7 < got["coverage"] < 1 and got["unreachable"] == 0 and got["bytes"][1] < got["bytes"][0]
    assert got["bits_per_byte"][1] < 8


def test_a_smaller_one_starts_from_a_larger_one(trained, text, tmp_path):
    out = str(tmp_path / "small.netsuke")
    compress(trained["artifact"], ["inherit:layers=1,hidden=40,calibration=4"], out=out, data=text)
    small = load(out).model
    assert len(small.blocks) == 1 and small.blocks[0].gate.outs == 40
    got = train_here(out, text, str(tmp_path / "trained"), steps=4, batch=4)
    assert got["bits_per_byte"][1] < got["bits_per_byte"][0] and "second" not in got


def test_every_pass_sees_every_row_once():
    first = torch.cat([passes(10, 4, step, 0) for step in range(5)])
    assert sorted(first[:10].tolist()) == sorted(first[10:].tolist()) == list(range(10))
    assert first[:10].tolist() != first[10:].tolist() != passes(10, 10, 0, 1).tolist()


def test_refusals_write_nothing(begun, text, tmp_path):
    quantized = str(tmp_path / "q.netsuke")
    compress(begun["artifact"], ["quantize:bits=8,calibration=2"], out=quantized, data=text)
    cases = [
        (lambda out: train_here(quantized, text, out), "stored as quant"),
        (lambda out: train_here(begun["artifact"], text, out, rounds=3), "rounds 3"),
        (lambda out: trim_vocabulary(begun["artifact"], text, 100, out), "257 to 400"),
        (lambda out: trim_vocabulary(quantized, text, 300, out), "embed is stored as quant"),
        (lambda out: begin_small(text, 20_000, 400, out), "vocabulary"),
        (lambda out: begin_small(text + "x", 150_000, 400, out), "no such file"),
    ]
    for i, (call, words) in enumerate(cases):
        with pytest.raises(NetsukeError, match=words):
            call(str(tmp_path / f"out{i}"))
        assert not list(tmp_path.glob(f"out{i}*"))


def test_the_verb_begins_and_trains(text, tmp_path):
    got = train(
        "new", data=text, on="here", parameters="150K", vocab=400, context=64, steps=6, min_tps=1.0,
        speed=lambda cfg: 100.0, out=str(tmp_path / "made"),
    )  # fmt: skip
    assert abs(got["parameters"] / 150_000 - 1) <= 0.01 and got["steps"] == 6
    assert load(got["artifact"]).tokenizer.vocab == 400
    again = train(got["artifact"], data=text, on="here", steps=3, out=str(tmp_path / "more"))
    assert again["bits_per_byte"][0] == pytest.approx(got["bits_per_byte"][1], abs=0.01)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made.netsuke", "more.netsuke"]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"model": "new"}, "no number of parameters"),
        ({"model": "new", "parameters": "many"}, "--parameters"),
        ({"model": "new", "parameters": "2M", "min_tps": 9.0}, "no way to tell"),
        ({"model": "pycode", "on": "there"}, "no such place"),
        ({"model": "pycode", "rounds": 3}, "rounds 3"),
    ],
)
def test_misuse_of_the_verb(settings, says, text, tmp_path):
    with pytest.raises(NetsukeError, match=says):
        train(**{"data": text, "on": "here", "out": str(tmp_path / "none"), **settings})
    assert not list(tmp_path.iterdir())


def test_compress_trims_the_vocabulary_or_says_what_is_missing(trained, text, tmp_path):
    got = compress(trained["artifact"], [], out=str(tmp_path / "trimmed"), data=text, vocab=340)
    assert got["pieces"] == [400, 340] and got["bytes"][1] < got["bytes"][0]
    for settings, says in (
        ({"methods": ["quantize:solver=rtn"], "data": text}, "methods beside it"),
        ({"methods": []}, "no text"),
        ({"methods": [], "data": text, "vocab": 12}, "340|specials and bytes"),
    ):
        with pytest.raises(NetsukeError, match=says):
            compress(trained["artifact"], **{"out": str(tmp_path / "none"), "vocab": 340, **settings})
    assert [p.name for p in tmp_path.iterdir()] == ["trimmed.netsuke"]
