"""The claims of tinylm: well-formed, cells kept and taken up again, mechanics measured, controls that fail."""

import json

import pytest
import torch

from netsuke.claims import run_claim
from netsuke.compress.inherit import inherit
from netsuke.data import domains
from netsuke.errors import NetsukeError
from netsuke.models.load import Loaded
from netsuke.systems import tinylm, tinylm_cells, tinylm_study, tinylm_vocabulary
from netsuke.systems.tinylm_cells import FULL, QUICK, again, cell, config, key_of, settings_of, study_shape, trained
from tests.tiny import tiny_llama

ABSENT = domains.missing()
with_text = pytest.mark.skipif(bool(ABSENT), reason=f"absent: {', '.join(ABSENT)}")


def test_every_claim_can_be_judged_or_says_why_not():
    assert len({c.text for c in tinylm.CLAIMS}) == len(tinylm.CLAIMS)
    for claim in tinylm.CLAIMS:
        assert bool(claim.measure) != bool(claim.why)
        assert claim.measure is None or claim.bar


def test_without_data_nothing_is_judged(monkeypatch):
    monkeypatch.delenv("NETSUKE_DATA", raising=False)
    rows = [run_claim(c, True) for c in tinylm.CLAIMS if c.needs]
    assert len(rows) >= 10 and {r["verdict"] for r in rows} == {"cannot be shown"}


def test_the_finder_and_its_control():
    assert tinylm.finder(True).met and tinylm.finder(True, fitted=False).met is False


def test_rank_correlation_and_its_interval():
    rho, low, high = tinylm.spearman([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 8, 7])
    assert low <= rho <= high and rho == pytest.approx(0.976, abs=1e-3)
    assert tinylm.spearman([1, 2, 3], [3, 2, 1])[0] == -1


def test_a_cell_is_measured_once_and_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("NETSUKE_CACHE", str(tmp_path))
    monkeypatch.setattr(tinylm_cells, "text_digest", lambda: "text")
    runs = []

    def make():
        runs.append(1)
        return {"x": 1.5}, tiny_llama()

    settings = {"start": "fresh", "seed": 0}
    assert cell(settings, FULL, make) == cell(settings, FULL, make) == {"x": 1.5} and runs == [1]
    assert cell({**settings, "seed": 1}, FULL, make) == {"x": 1.5} and runs == [1, 1]
    written = json.loads((tmp_path / "tinylm" / f"{key_of(settings, FULL)}.json").read_text())
    assert written["settings"] == settings and written["seconds"] >= 0
    kept = tinylm_cells.kept_model(settings, FULL, tiny_llama().cfg)
    assert torch.equal(kept.embed.weight, tiny_llama().embed.weight)
    assert not list((tmp_path / "tinylm").glob("*.part"))


def test_a_cell_that_fails_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("NETSUKE_CACHE", str(tmp_path))
    monkeypatch.setattr(tinylm_cells, "text_digest", lambda: "text")

    def make():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cell({"start": "fresh"}, FULL, make)
    assert not list((tmp_path / "tinylm").iterdir())


@with_text
def test_trainings_at_the_budget_and_second_rounds_on_top():
    settings = settings_of("512", study_shape("512", QUICK), 0, keep=True)
    row = trained(settings, QUICK)
    assert abs(row["parameters"] / QUICK.budget - 1) < 0.01 and row["tokens"] == 4 * 4 * 64
    assert set(row["marks"]) == {"0.1", "0.5", "1.0"} and set(row["bits_per_byte"]["test"]) == {*domains.DOMAINS, "all"}
    assert trained(settings_of("512", study_shape("512", QUICK), 0, stop=0.5), QUICK)["tokens"] == 2 * 4 * 64
    later = again(settings, "whole", QUICK)
    assert later["steps"] == 4 and later["bits_per_byte"]["test"]["all"] < row["bits_per_byte"]["test"]["all"]
    assert again(settings, "sharp", QUICK)["steps"] == 2 and again(settings, "uniform", QUICK)["effective_share"] == 1


@with_text
def test_tokenizer_claims_and_their_controls():
    assert tinylm_vocabulary.lossless(True).met and tinylm_vocabulary.lossless(True, spoil=True).met is False
    assert set(tinylm_vocabulary.coverage(True).values) == {"1024", "512", "320"}


@pytest.fixture
def random_teacher(monkeypatch):
    """A random model with the middle tokenizer of the quick scale stands in for the one that is shipped."""
    tok = tinylm_cells.tokenizer_of("512", QUICK)
    model = tiny_llama(
        vocab=512, layers=4, width=256, heads=8, kv_heads=8, head_dim=32, hidden=900, context=512, bos=0, eos=(0,)
    )
    loaded = Loaded(model, tok, "wide", "artifact", None)
    for module in (tinylm_cells, tinylm_vocabulary, tinylm):
        for name, stand in (
            ("teacher", lambda: loaded),
            ("find", lambda n: (0, 0)),
            ("load", lambda n, dtype=None: loaded),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand)
    monkeypatch.setattr(tinylm_cells, "key_of", lambda settings, s: json.dumps(settings, sort_keys=True))
    yield loaded
    for cached in (tinylm_cells.big_model, tinylm_cells.inherited, tinylm_cells.kept_blocks):
        cached.cache_clear()
    for cached in (tinylm_study.chosen_score, tinylm_study.chosen_shape):
        cached.cache_clear()
    tinylm_cells._quick.clear()


@with_text
def test_students_are_parts_of_the_teacher(random_teacher):
    cfg = config("320", 2, 96, QUICK)
    assert tinylm_cells.inside_teacher(cfg) and not tinylm_cells.inside_teacher(config("320", 8, 64, QUICK))
    got = tinylm_cells.begin("320", 2, 96, "l2", 0, QUICK)
    assert got.cfg == cfg
    want = inherit(
        tinylm_cells.big_model("320", QUICK), cfg, tinylm_cells.task_of("320", QUICK), "l2", calibration=QUICK.windows,
        blocks=tinylm_cells.kept_blocks("320", 2, QUICK),
    )  # fmt: skip
    assert torch.equal(got.embed.weight, want.embed.weight)
    other = tinylm_cells.begin("320", 2, 96, "misaligned", 0, QUICK).embed.weight
    again_ = tinylm_cells.begin("320", 2, 96, "taylor", 0, QUICK).embed.weight
    assert not torch.equal(other, again_) and torch.equal(
        other.sum(1).round(decimals=3), again_.sum(1).round(decimals=3)
    )
    assert 0.9 < tinylm_cells.own_rows("320", QUICK) <= 1


@with_text
def test_a_sliced_model_is_exact_and_shifted_rows_are_not(random_teacher):
    assert tinylm_vocabulary.sliced(True).met and tinylm_vocabulary.sliced(True, shift=1).met is False


def test_an_absent_teacher_is_the_reason(monkeypatch):
    def absent(*_, **__):
        raise NetsukeError("load wide", "there is no such file")

    monkeypatch.setattr(tinylm, "whole_way", absent)
    got = tinylm.here(tinylm.inheritance)(True)
    assert got.met is None and "no such file" in got.shown
