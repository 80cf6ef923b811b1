"""The claims of nn4mc: quick measurements on the published networks where they are there, well-formed where not."""

import numpy as np
import pytest

from netsuke.claims import run_claim
from netsuke.data.catalogue import missing
from netsuke.devices.board import missing_tools
from netsuke.systems import nn4mc
from netsuke.systems import nn4mc_cases as cases

ABSENT = missing(nn4mc.ALL)
with_data = pytest.mark.skipif(bool(ABSENT), reason=f"NETSUKE_DATA lacks {', '.join(ABSENT)}")


def test_every_claim_can_be_judged_or_says_why_not():
    assert len({c.text for c in nn4mc.CLAIMS}) == len(nn4mc.CLAIMS)
    for claim in nn4mc.CLAIMS:
        assert bool(claim.measure) != bool(claim.why)
        assert claim.measure is None or claim.bar or not claim.control


def test_derivatives_of_one_state_are_compared():
    """Seeds whose first control differs between the kinds of derivatives: the histories must not."""
    found = cases.curved_errors(12)
    assert max(found["gradient"], found["hessian"]) < 1e-7 and min(found[k] for k in cases.ROUGH) > 1e-3


def test_without_the_other_compiler_nothing_is_judged(monkeypatch):
    monkeypatch.delenv(cases.PEERS, raising=False)
    got = nn4mc.beside_nn4mc(True)
    assert got.met is None and cases.PEERS in got.shown


def test_the_duel_is_judged_against_a_pid_that_sees_ahead():
    duel, (sees, blind) = cases.duel(3.0, 0.0, 1, True), cases.rivals(3.0, 0.0, 10, True)
    assert sees.advance == duel.advance > 0 == blind.advance
    assert duel.pid < duel.pid_blind and duel.ratio == duel.mpc / duel.pid
    assert 0 < duel.linear < duel.blind


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(cases, "QUICK_TICKS", 40)
    monkeypatch.setattr(cases, "FAST", slice(2600, 2640))
    cases.whole_path.cache_clear()
    cases.on_board.cache_clear()
    yield
    cases.whole_path.cache_clear()
    cases.on_board.cache_clear()


@with_data
@pytest.mark.parametrize("what", ["generated_code", "tracking", "same_as_python", "int8_weights", "derivatives"])
def test_quick_measurements_meet_their_bars(short, what):
    assert getattr(nn4mc, what)(True).met


@with_data
@pytest.mark.parametrize(
    "what", ["wrong_weights", "other_seed", "int8_in_metres", "plain_newton", "standing", "rough_derivatives"]
)
def test_controls_miss(short, what):
    assert not getattr(nn4mc, what)(True).met


@with_data
def test_the_path_backwards_is_the_path_and_every_seed_is_judged(monkeypatch):
    path = cases.backwards()
    assert np.array_equal(path[0], cases.hasel.samples()[-1]) and np.array_equal(path[::-1], cases.whole_path(False))
    kept = {5: nn4mc.Trace(path, path, path), 6: nn4mc.Trace(path + 0.01, path, path)}
    monkeypatch.setattr(nn4mc, "OTHER_SEEDS", tuple(kept))
    monkeypatch.setattr(nn4mc.simulate, "on_host", lambda model, knobs, path, start: kept[knobs.seed])
    assert nn4mc.backwards(True).met and not nn4mc.backwards(False).met


@with_data
@pytest.mark.skipif(bool(missing_tools()), reason=f"needs {missing_tools()}")
def test_the_board_is_fast_and_small_enough(short):
    assert nn4mc.cycles(True).met and nn4mc.size(True).met and not nn4mc.differences_cycles(True).met


def test_absent_data_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("NETSUKE_DATA", str(tmp_path))
    row = run_claim(next(c for c in nn4mc.CLAIMS if "whole" in c.text), True)
    assert row["verdict"] == "cannot be shown" and "hasel_reference_path.mat" in row["measured"]
