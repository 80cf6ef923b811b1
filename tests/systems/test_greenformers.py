"""The claims of Greenformers: their pieces on small cases, and what a quick run says."""

import math

import pytest

from netsuke.claims import run_claim
from netsuke.compress import advise
from netsuke.data.catalogue import missing
from netsuke.systems import greenformers, greenformers_cases
from netsuke.systems.greenformers_cases import SMALL, bert_block, crossing_of, shapes_only, trained
from netsuke.systems.modegpt_cases import STORIES, STORIES_FILES

with_stories = pytest.mark.skipif(bool(missing(STORIES_FILES)), reason="NETSUKE_DATA lacks stories260K")


def test_every_claim_can_be_judged_or_says_why_not():
    assert len({c.text for c in greenformers.CLAIMS}) == len(greenformers.CLAIMS)
    for claim in greenformers.CLAIMS:
        assert bool(claim.measure) != bool(claim.why)
        assert claim.measure is None or claim.bar


def test_formulas_hold_and_their_control_fails():
    assert greenformers.formulas(True).met
    assert greenformers.formulas(True, forget=True).met is False


@pytest.mark.parametrize("kind", advise.KINDS)
def test_blocks_without_memory_have_the_shapes_of_real_ones(kind):
    real, meta = bert_block(kind, 64, SMALL), shapes_only(kind, 64, SMALL)
    assert {n: p.shape for n, p in real.named_parameters()} == {n: p.shape for n, p in meta.named_parameters()}
    assert meta.open_maps and all(p.device.type == "meta" for p in meta.parameters())


def test_crossings_lie_between_the_lengths_that_show_them():
    rising, level = {64: 1.0, 256: 2.0, 1024: 5.0}, {64: 3.0, 256: 3.0, 1024: 3.0}
    at = crossing_of(rising, level)
    assert 256 < at < 1024
    assert crossing_of(rising, {n: 9.0 for n in rising}) is None
    assert crossing_of(rising, {n: 0.5 for n in rising}) == 64
    assert crossing_of({64: 1.0, 256: 1.0}, {64: 2.0, 256: 0.5}) == pytest.approx(
        math.exp(math.log(64) + (2 / 3) * math.log(4))
    )


def test_times_are_taken_in_turns(monkeypatch):
    order = []
    monkeypatch.setattr(greenformers_cases, "step", lambda block, x: order.append(type(block.fc1).__name__))
    greenformers_cases.step_seconds.cache_clear()
    got = greenformers_cases.step_seconds(64, (("dense", 0), ("lrt", 16)), True, True)
    greenformers_cases.step_seconds.cache_clear()
    assert order == ["Dense", "LowRank"] * 2 and min(got.values()) > 0


def test_files_of_low_rank_blocks_are_smaller_and_linformer_s_are_not():
    got = greenformers.file_sizes(True)
    assert got.met and got.values["lrt"] < 0.25 < 1.0 <= got.values["linformer"]


def test_low_rank_designs_have_fewer_weights_and_are_trained_alike():
    dense, lrt = trained("digits", "dense", 0, True), trained("digits", "lrt", 0, True)
    assert dense.weights >= 2 * lrt.weights
    assert greenformers.short_quality("digits", 1, 1.0, True).met is None  # two steps tell nothing
    assert trained("digits", "dense", 0, True) is dense


def test_a_start_below_the_dense_model_has_no_excess(monkeypatch):
    losses = {"svd": -0.1, "random": 0.4, "whitened-svd": 0.0}
    monkeypatch.setattr(greenformers, "excess", lambda name, solver, rank, steps, quick: losses[solver])
    assert greenformers.svd_start("digits", False).met and greenformers.whitened_start("digits", False).met is False
    losses["svd"] = 0.3
    assert greenformers.svd_start("digits", False).met is False


@with_stories
def test_whitening_is_needed_on_a_tight_model():
    got = greenformers.without_tuning(STORIES, True)
    assert got.met and got.values["0.21"]["whitened-svd"] < 0.3 * got.values["0.21"]["svd"]


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(greenformers, "WIDE", "no-such-model")
    got = greenformers.on(greenformers.in_the_engine, "no-such-model")(True)
    assert got.met is None and "no-such-model" in got.shown


def test_the_package_gives_the_same_outputs():
    pytest.importorskip("linformer", reason="the package linformer is not installed")
    assert greenformers.package_beside(True).met


def test_arithmetic_is_called_so():
    claim = next(c for c in greenformers.CLAIMS if "BERT-base with LRT" in c.text)
    row = run_claim(claim, True)
    assert "by arithmetic" in row["measured"] and "assumed" in row["measured"]
