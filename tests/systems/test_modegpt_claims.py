"""The claims of MoDeGPT: measured on the real model where it is there, and well-formed where it is not."""

import pytest
import torch

from netsuke.claims import run_claim
from netsuke.compress.modegpt import block_parameters
from netsuke.data.catalogue import missing
from netsuke.systems import modegpt, modegpt_cases
from netsuke.systems.modegpt_rivals import pruned_by_norm
from tests.tiny import tiny_llama, tiny_task

NO_STORIES = missing(modegpt_cases.STORIES_FILES)
with_stories = pytest.mark.skipif(bool(NO_STORIES), reason=f"NETSUKE_DATA lacks {', '.join(NO_STORIES)}")


@pytest.fixture
def tiny_case(monkeypatch):
    """Stands a random model in for both real ones."""
    case = modegpt_cases.Case(tiny_llama(), tiny_task(), 16, modegpt_cases.SETTINGS[::4], {"validation": 2, "test": 2})
    for module in (modegpt, modegpt_cases):
        monkeypatch.setattr(module, "case_of", lambda name, quick: case)
    yield case
    for cached in ("dense_score", "stats_of", "sweep", "ratio_on_test", "healed"):
        getattr(modegpt_cases, cached).cache_clear()


def test_every_claim_can_be_judged_or_says_why_not():
    assert len({c.text for c in modegpt.CLAIMS}) == len(modegpt.CLAIMS)
    for claim in modegpt.CLAIMS:
        assert bool(claim.measure) != bool(claim.why)
        assert claim.measure is None or claim.bar or not claim.control


def test_without_pycode_its_claims_cannot_be_shown(monkeypatch):
    monkeypatch.setattr(modegpt, "PYCODE", "no-such-model")
    monkeypatch.delenv("NETSUKE_DATA", raising=False)
    rows = [run_claim(c, True) for c in modegpt.CLAIMS if "pycode" in c.text and "random weights" not in c.text]
    assert len(rows) >= 6 and {r["verdict"] for r in rows} == {"cannot be shown"}
    assert all("no-such-model" in r["measured"] for r in rows)


@with_stories
def test_exactness_and_its_control_on_the_real_model():
    assert modegpt.exactness((modegpt.STORIES,), True).met
    assert modegpt.exactness((modegpt.STORIES,), True, fewer=True).met is False


@with_stories
def test_type_three_is_optimal_and_unwhitened_is_not():
    got = modegpt.optimality((modegpt.STORIES,), True)
    assert got.met and got.values["margin"] >= 1 and got.values["heads"] == 20
    assert modegpt.optimality((modegpt.STORIES,), True, whitened=False).met is False


@with_stories
def test_allocated_cuts_beat_random_ones_and_real_text_is_only_scored():
    case = modegpt_cases.case_of(modegpt.STORIES, True)
    assert len(case.task.rows["test"]) == 5
    assert case.score(case.model, "test") == pytest.approx(3.54, abs=0.02)  # 3.54 in the data's own description
    ratio = modegpt_cases.ratio_on_test(modegpt.STORIES, 0.2, "chosen", True)
    assert 1 < ratio < 0.8 * modegpt_cases.ratio_on_test(modegpt.STORIES, 0.2, "random", True)


def test_own_text_is_seeded():
    model = tiny_llama(bos=1)
    first, second, other = (modegpt_cases.written_by(model, 4, 12, seed) for seed in (0, 0, 1))
    assert first.shape == (4, 13) and bool((first[:, 0] == 1).all())
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_the_setting_is_chosen_on_validation_text_alone(tiny_case, monkeypatch):
    splits = []
    monkeypatch.setattr(
        modegpt_cases.Case, "score", lambda self, model, split: splits.append(split) or float(len(splits) % 3 + 1)
    )
    found = modegpt_cases.sweep("tiny", 0.2, True)
    assert set(splits) == {"validation"} and len(found.validation) == len(tiny_case.settings)
    assert min(found.validation, key=found.validation.get) == found.setting


def test_every_rival_gets_the_same_widths(tiny_case):
    found = modegpt_cases.sweep("tiny", 0.2, True)
    model = modegpt_cases.random_choice(tiny_case.model, found, 0)
    assert 1 - block_parameters(model.cfg) / block_parameters(tiny_case.model.cfg) == pytest.approx(0.2, abs=0.01)
    bare = modegpt_cases.random_choice(tiny_case.model, found, 0, compensate=False)
    for a, b in zip(model.blocks, bare.blocks):  # the same units, whose outputs alone are adjusted
        assert torch.equal(a.up.weight, b.up.weight) and not torch.equal(a.down.weight, b.down.weight)
    again = modegpt_cases.random_choice(tiny_case.model, found, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    for how in ("chosen", "uniform", "norm", "norm-uniform", "random", "random-bare", "svd", "whitened"):
        assert modegpt_cases.ratio_on_test("tiny", 0.2, how, True) > 0


def test_healing_lowers_the_loss_and_is_reported_apart(tiny_case, monkeypatch):
    monkeypatch.setattr(modegpt_cases, "QUICK_STEPS", 10)
    got = modegpt.after_training("tiny", 0.3, 1.08, True)
    assert got.values["ratio"] < got.values["before"] and got.values["steps"] == 10


def test_time_is_taken_without_gradients_and_the_watch_works(tiny_case):
    got = modegpt.cut_time("tiny", 0.25, True)
    assert got.met and got.values["gradients"] is False
    assert modegpt.gradients_are_seen("tiny", True).met is False
    modegpt.cut_seconds.cache_clear()


def test_the_file_shrinks_and_zeros_do_not():
    dense, sliced, zeroed = modegpt.wide(True)
    assert sliced.bytes() < 0.8 * dense.bytes() and zeroed.bytes() == dense.bytes()
    assert modegpt.file_size(1, True).met
    assert modegpt.file_size(2, True).met is False


def test_speed_is_taken_in_alternating_pairs(monkeypatch):
    dense = tiny_llama(context=160)
    small = pruned_by_norm(dense, ((0.3, 0.3, 0.3),) * 2)
    monkeypatch.setattr(modegpt, "wide", lambda quick: (dense, small, dense))
    order = []
    real = modegpt.generate
    monkeypatch.setattr(modegpt, "generate", lambda model, *a, **k: order.append(model) or real(model, *a, **k))
    got = modegpt.speed(1, True)
    assert all(len(r) == 5 and min(r) > 0 for r in got.values["ratios"].values())
    assert [m is dense for m in order[:4]] == [False, True, True, False] and len(order) == 12
