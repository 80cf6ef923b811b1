"""What the claims of `mixlinear` stand on: the split, the card's reference figures, controls that fail."""

import numpy as np
import pytest

from netsuke.data.catalogue import missing
from netsuke.systems import mixlinear
from netsuke.systems import mixlinear_cases as cases

pytestmark = pytest.mark.skipif(
    bool(missing(tuple(cases.FILES.values()))), reason="NETSUKE_DATA does not hold mixlinear/ETTh1.csv and ETTh2.csv"
)


def test_the_split_is_that_of_long_forecasts():
    parts = cases.data("ETTh1")
    assert [len(parts[k]) for k in ("train", "validation", "test")] == [8640, 2880 + 720, 2880 + 720]
    assert np.allclose(parts["train"].mean(0), 0) and np.allclose(parts["train"].std(0), 1)
    assert np.array_equal(parts["train"][-720:], parts["validation"][:720])
    assert np.array_equal(parts["validation"][-720:], parts["test"][:720])


@pytest.mark.parametrize(
    ("task", "repeat", "mean_day", "time", "rank2", "dense"),
    [(("ETTh1", 96), 0.512, 0.394, 0.3618, 0.3673, 0.3712), (("ETTh2", 720), 0.526, 0.402, 0.3850, 0.3879, 0.3829)],
)
def test_floors_and_moments_give_the_known_figures(task, repeat, mean_day, time, rank2, dense):
    floors, got = cases.floors(*task), cases.without_gradients(*task)
    found = [floors["last period"], floors["mean period"], got["time"], got["rank 2"], got["least squares"]]
    assert [f["mse"] for f in found] == pytest.approx([repeat, mean_day, time, rank2, dense], abs=6e-4)


def test_moments_and_windows_agree_on_the_test_months():
    s = cases.shape_of(96)
    matrix = np.random.default_rng(0).normal(size=(s.m, s.n)) / s.n
    by_windows = cases.scored(lambda x: cases.fold.forecast(x, matrix, None, s), "ETTh1", 96)["mse"]
    assert cases.moments("ETTh1", 96, "test").mse(matrix) == pytest.approx(by_windows, rel=1e-9)


def test_a_frozen_forecaster_scored_by_day_is_scored_by_window():
    s = cases.shape_of(336)
    matrix = np.random.default_rng(0).normal(size=(s.m, s.n)) / s.n
    by_window = cases.scored(lambda x: cases.fold.forecast(x, matrix, None, s), "ETTh1", 336)["mse"]
    days = [matrix] * (len(cases.data("ETTh1")["test"]) // cases.PERIOD + 1)
    assert cases.by_day("ETTh1", 336, days) == pytest.approx(by_window, rel=1e-9)


def test_a_days_weights_know_nothing_of_the_days_after(monkeypatch):
    rows = cases.data("ETTh1")
    changed = rows | {"test": rows["test"].copy()}
    changed["test"][1200:] += 5
    start = cases.deployed("ETTh1", 96).moments.on_chip
    before = list(cases.refitted("ETTh1", 96, start()))
    monkeypatch.setattr(cases, "data", lambda name: changed)
    after = list(cases.refitted("ETTh1", 96, start()))
    same = [np.array_equal(a, b) for a, b in zip(before, after)]
    assert len(same) == 150 and all(same[:50]) and not any(same[51:])


def test_the_small_setting_stays_inside_the_cards_share():
    for name, h in cases.TASKS:
        s = cases.shape_of(h)
        alpha, lpf = cases.settings("small", name, h)
        size = cases.parameters(mixlinear.MixLinearNet(s, alpha, lpf))
        assert size <= cases.SHARE[h] * cases.parameters(mixlinear.SparseTSF(s))


@pytest.mark.parametrize("control", [mixlinear.out_of_step, mixlinear.untrained, mixlinear.shuffled_moments])
def test_controls_fail(control):
    assert control(True).met is False
