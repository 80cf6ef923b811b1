"""The forecaster as its users meet it: learns, predicts in their units, goes on learning, is kept, and refuses in a sentence."""

import json

import numpy as np
import pytest

from netsuke.apps.signals.forecast import fold
from netsuke.apps.signals.forecast.backtest import backtest, look_backs
from netsuke.apps.signals.forecast.floors import FLOORS, repeat
from netsuke.apps.signals.forecast.forecaster import MixLinear
from netsuke.apps.signals.forecast.moments import Moments
from netsuke.apps.signals.forecast.period import find_period
from netsuke.apps.signals.forecast.series import Series, from_array
from netsuke.errors import NetsukeError
from tests.apps.signals.forecast.data import meters


@pytest.fixture(scope="module")
def fitted():
    return MixLinear(48).fit(meters())


def test_it_finds_its_settings_and_beats_the_floors(fitted):
    x = meters(1600)
    assert fitted.shape == fold.Shape(23 * 24, 48, 24)
    assert any("period 24" in n for n in fitted.notes) and any("chosen on" in n for n in fitted.notes)
    model = fitted.like().fit(x[:1200])
    seen = np.lib.stride_tricks.sliding_window_view(x[1200 - 552 :] / x.std(0), 552 + 48, 0)
    error = {"ours": fold.forecast(seen[..., :552], model.matrix(), None, model.shape)} | {
        k: f(seen[..., :552], model.shape) for k, f in FLOORS.items()
    }
    mse = {k: np.mean((v - seen[..., 552:]) ** 2) for k, v in error.items()}
    assert mse["ours"] < min(v for k, v in mse.items() if k != "ours")


def test_units_cancel(fitted):
    x = meters()
    ahead = fitted.predict(x)
    other = MixLinear(48).fit(x * 1000 + 7)
    assert np.allclose(other.predict(x * 1000 + 7), ahead * 1000 + 7, rtol=1e-6)


def test_one_series_may_be_a_vector():
    x = meters()[:, 0]
    assert MixLinear(24).fit(x).predict(x).shape == (24, 1)


def test_numbers_are_counted(fitted):
    model = MixLinear(96, 720, 24, 0.95, 1).fit(meters(2400))
    assert model.n_parameters() == 24 + 4 + 16 and model.n_parameters(real=False) == 24 + 2 + 8
    assert MixLinear(96, 720, 24, 1.0).fit(meters(2400)).n_parameters() == 24


@pytest.mark.parametrize("forget", [1.0, 0.999])
def test_updates_are_exact(forget):
    x = meters(1500)
    model = MixLinear(48, 240, 24, 0.6, 3, forget=forget).fit(x[:1000])
    for a, b in ((1000, 1001), (1001, 1100), (1100, 1500)):
        model.update(x[a:b])
    whole = Moments(model.shape, 2, forget)
    whole.update(x / model.scale)
    assert np.allclose(model.moments.sxx, whole.sxx) and np.allclose(model.moments.sxy, whole.sxy)
    again = MixLinear(48, 240, 24, 0.6, 3, forget=forget).fit(x)
    assert np.allclose(model.predict(x), again.predict(x), rtol=0.02, atol=0.02 * x.std(0))


def test_updates_follow_a_change():
    x = meters(2400, 1)
    y = np.concatenate([x[:1200], x[1200:] + 3 * np.sin(2 * np.pi * np.arange(1200) / 168)[:, None]])
    still, moving = (MixLinear(48, 336, 24, 1.0, forget=0.995).fit(y[:1200]) for _ in range(2))
    moving.update(y[1200:2200])
    later = Moments(still.shape, 1)
    later.update(y[1900:] / still.scale)
    assert later.mse(moving.matrix()) < 0.9 * later.mse(still.matrix())


def test_adam_starts_from_moments_and_is_no_worse_on_its_validation_rows():
    x = meters(900, 1)
    model = MixLinear(24, 240, 24, 0.9, 2, method="adam", epochs=2).fit(x)
    assert model.n_parameters() == 2 * 4 * 1 + 4 * 2 + 4 + 25
    assert model.predict(x).shape == (24, 1)
    with pytest.raises(NetsukeError, match="Adam"):
        model.update(x)


def test_saved_is_loaded(fitted, tmp_path):
    x = meters()
    fitted.save(tmp_path / "f.json")
    back = MixLinear.load(tmp_path / "f.json")
    assert np.array_equal(back.predict(x), fitted.predict(x)) and back.n_parameters() == fitted.n_parameters()
    fresh = meters(1300)[1200:]
    a, b = back.update(fresh).predict(x), MixLinear.load(tmp_path / "f.json").update(fresh).predict(x)
    assert np.array_equal(a, b) and not np.array_equal(a, fitted.predict(x))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format": "other"}, "format"), ({"version": 9}, "version"), ({"horizon": -1}, "horizon"), ({"period": 7}, "settings"),
        ({"a1": [[1.0]]}, "a1"), ({"scale": [0.0, 1.0]}, "scale"), ({"w1": "x"}, "w1"), ({"kernel": [1.0]}, "kernel"),
        ({"lookback": 1 << 40}, "lookback"), ({"names": []}, "names"), ({"lpf": 24}, "settings"),
    ],
)  # fmt: skip
def test_spoiled_files_are_refused(fitted, tmp_path, change, word):
    fitted.save(tmp_path / "f.json")
    spoiled = json.loads((tmp_path / "f.json").read_text()) | change
    (tmp_path / "f.json").write_text(json.dumps(spoiled))
    with pytest.raises(NetsukeError, match=word):
        MixLinear.load(tmp_path / "f.json")


def test_gaps_are_filled_and_said(fitted):
    x = meters()
    holes = x.copy()
    holes[300:303, 0] = np.nan
    holes[500:530, 1] = np.nan
    model = MixLinear(48).fit(holes)
    assert any("33 missing" in n for n in model.notes)
    assert np.abs(model.predict(x) - fitted.predict(x)).max() < 0.1 * x.std(0).max()


CONSTANT = np.stack([meters()[:, 0], np.full(1200, 3.0)], 1)
EMPTY = np.where(np.arange(1200)[:, None] > 400, np.nan, meters())


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: MixLinear(0), "horizon"),
        (lambda: MixLinear(9.5), "horizon"),
        (lambda: MixLinear(48, lookback="much"), "lookback"),
        (lambda: MixLinear(48, period=0), "period"),
        (lambda: MixLinear(48, alpha=1.2), "alpha"),
        (lambda: MixLinear(48, lpf=0), "lpf"),
        (lambda: MixLinear(48, method="magic"), "method"),
        (lambda: MixLinear(48, forget=0), "forget"),
        (lambda: MixLinear(48, forget=0.99, method="adam"), "Adam"),
        (lambda: MixLinear(48, missing="ignore").fit(meters()), "missing values"),
        (lambda: MixLinear(48, missing="error").fit(EMPTY[380:420]), "missing"),
        (lambda: MixLinear(48).fit(EMPTY), "67%|66%"),
        (lambda: MixLinear(48).fit(CONSTANT), "'channel 1'.*constant"),
        (lambda: MixLinear(12, period=24).fit(meters()), "horizon 24, of which the first 12"),
        (lambda: MixLinear(48, lpf=30, lookback=480, period=24).fit(meters()), "1 to 20"),
        (lambda: MixLinear(48, lookback=30, period=24).fit(meters()), "1 periods"),
        (lambda: MixLinear(480, lookback=480, period=24).fit(meters()), "1200 rows"),
        (lambda: MixLinear(48).fit(meters(60)), "rows"),
        (lambda: MixLinear(48).fit(np.zeros((2, 3, 4))), "shape"),
        (lambda: MixLinear(48).fit(np.array(["a", "b"])), "numbers"),
        (lambda: MixLinear(48).fit(np.array([1.0, np.inf] * 600)), "infinite"),
        (lambda: MixLinear(48).predict(meters()), "fit"),
        (lambda: MixLinear(48, 240, 24).fit(meters()).predict(meters(100)), "last 240"),
        (lambda: MixLinear(48, 240, 24).fit(meters()).predict(meters(1200, 3)), "3 channels"),
        (lambda: MixLinear(48, 240, 24).fit(meters()).update(meters(10, 1)), "1 channels"),
        (lambda: backtest(from_array(meters(60)), MixLinear(48)), "18 rows"),
        (lambda: backtest(from_array(meters()), MixLinear(48), folds=0), "folds"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences(make, word):
    with pytest.raises(NetsukeError, match=word):
        make()


def test_a_lookback_between_periods_is_rounded_down_and_said():
    model = MixLinear(48, lookback=250, period=24).fit(meters())
    assert model.shape.lookback == 240 and any("rounded down to 240" in n for n in model.notes)


def test_without_a_period_it_still_answers():
    x = np.random.default_rng(0).normal(size=600)
    model = MixLinear(5).fit(x)
    assert model.shape.period == 1 and any("no period" in n for n in model.notes)
    assert np.abs(model.predict(x)).max() < 1.5


RNG = np.random.default_rng(7)
WAVE = np.sin(2 * np.pi * np.arange(2000) / 24)[:, None]
WALK = np.cumsum(RNG.normal(size=(2000, 1)), 0)


@pytest.mark.parametrize(
    ("x", "period"),
    [
        (WAVE, 24), (WAVE + 0.8 * RNG.normal(size=(2000, 1)), 24), (WAVE + WALK / 3, 24),
        (WAVE + 0.1 * np.arange(2000)[:, None], 24),
        (np.tile(RNG.normal(size=7), 80)[:, None] + 0.2 * RNG.normal(size=(560, 1)), 7), (np.tile([0.0, 1.0], 100)[:, None], 2),
        (WAVE * (np.arange(2000) // 24 % 7 < 5)[:, None] + 0.1 * RNG.normal(size=(2000, 1)), 24),
        (RNG.normal(size=(2000, 1)), None),
        (WALK, None), (np.zeros((100, 1)), None), (WAVE[:5], None),
    ],
)  # fmt: skip
def test_periods_are_found_where_there_are_some(x, period):
    assert find_period(x) == period


def test_backtest_sees_only_the_past_and_scores_every_channel():
    x = meters(1500)
    got = backtest(Series(x, ["a", "b"]), MixLinear(48, 240, 24), folds=3)
    assert got.folds[0]["first"] == 1050 and got.folds[-1]["last"] == 1500 - 48
    assert got.scores["MixLinear"]["mse"] < got.scores["last period"]["mse"] and not got.beaten
    assert got.bands.shape == (5, 48, 2) and np.all(np.diff(got.bands, axis=0) >= 0)
    assert 0.6 < got.coverage["80 %"] < 0.95 and got.coverage["80 %"] < got.coverage["95 %"]
    changed = x.copy()
    changed[1450:] += 1e3  # nothing learned before the last fold may know of it
    again = backtest(Series(changed, ["a", "b"]), MixLinear(48, 240, 24), folds=3)
    assert again.folds[0]["mse"] == got.folds[0]["mse"]
    json.dumps(got.as_dict())


def spoiled(seed=1):
    """Series with holes everywhere, short and long, on rows where folds end too."""
    x, rng = meters(1500), np.random.default_rng(seed)
    for length in (1, 2, 5, 12, 30, 70):
        for at in rng.integers(300, 1500 - length, 6):
            x[at : at + length, rng.integers(2)] = np.nan
    x[1188:1212, 0] = np.nan
    return x


def test_look_backs_are_filled_from_rows_before_their_origin():
    x = spoiled()
    model = MixLinear(48, 240, 24, 1.0).fit(x[:1050])
    origins = np.arange(1050, 1450, 7)
    seen = look_backs(Series(x, ["a", "b"]), origins, model.shape)
    for origin, rows in zip(origins, seen):
        assert np.allclose(
            model.predict(x[:origin]).T, fold.forecast(rows, model.matrix(), None, model.shape), rtol=1e-9
        )
    assert np.isfinite(seen).all()


def test_what_comes_after_an_origin_changes_no_forecast():
    x = spoiled()
    changed = x.copy()
    changed[1200:] = meters(1500, seed=9)[1200:] * 50 + 3
    a, b = (backtest(Series(v, ["a", "b"]), MixLinear(48), folds=1) for v in (x, changed))
    assert (a.model.shape, a.model.alpha, a.model.lpf) == (b.model.shape, b.model.alpha, b.model.lpf)
    assert np.array_equal(a.model.matrix(), b.model.matrix())
    until = np.arange(1050, 1201)
    before, after = (look_backs(Series(v, ["a", "b"]), until, a.model.shape) for v in (x, changed))
    assert np.array_equal(before, after)


@pytest.mark.parametrize("asked", [{}, {"alpha": 0.3, "lpf": 2}, {"alpha": 0.3}, {"lookback": 250, "period": 24}])
def test_a_backtest_takes_nothing_from_an_earlier_fit_but_what_was_asked(asked, tmp_path):
    x = meters(1500)
    x[1050:] = meters(1500, period=36, seed=4)[1050:]  # with which other settings would be best
    series = Series(x, ["a", "b"])
    fresh = backtest(series, MixLinear(48, **asked), folds=2)
    known = MixLinear(48, **asked).fit(x)
    known.save(tmp_path / "f.json")
    for model in (known, MixLinear.load(tmp_path / "f.json")):
        assert backtest(series, model, folds=2).scores == fresh.scores
    assert fresh.model.alpha == asked.get("alpha", fresh.model.alpha) and fresh.model.lpf == asked.get(
        "lpf", fresh.model.lpf
    )
    assert fresh.model.shape.lookback == 240 or "lookback" not in asked


def test_the_last_fold_is_not_in_the_earlier_bands():
    x = meters(1500)
    wild = x.copy()
    wild[1380:] += 100 * np.random.default_rng(0).normal(size=(120, 2))
    a, b = (backtest(Series(v, ["a", "b"]), MixLinear(48, 240, 24, 1.0), folds=3) for v in (x, wild))
    assert np.array_equal(a.earlier, b.earlier) and not np.allclose(a.bands, b.bands)
    assert backtest(Series(x, ["a", "b"]), MixLinear(48, 240, 24, 1.0), folds=1).earlier is None


def test_updates_bridge_missing_rows():
    x = meters(1500)
    holes = x.copy()
    holes[1000], holes[1100:1103, 0], holes[1200:1230, 1] = np.nan, np.nan, np.nan
    good, got = (MixLinear(48, 240, 24, 1.0).fit(x[:1000]) for _ in range(2))
    for a, b in ((1000, 1001), (1001, 1101), (1101, 1210), (1210, 1500)):  # the first update is one missing row
        good.update(x[a:b])
        got.update(holes[a:b])
    assert np.isfinite(got.moments.sxx).all() and len(got.moments.tail) == got.shape.window - 1
    assert np.abs(got.predict(x) - good.predict(x)).max() < 0.1 * x.std(0).max()
    with pytest.raises(NetsukeError, match="missing"):
        MixLinear(48, 240, 24, 1.0, missing="error").fit(x[:1000]).update(holes[1000:1001])


def test_a_backtest_judges_nobody_by_filled_values():
    x = meters(1500)
    holes = x.copy()
    holes[1200:1230] = np.nan
    got = backtest(Series(holes, ["a", "b"]), MixLinear(48, 240, 24), folds=2)
    assert np.isfinite(got.bands).all() and np.isfinite(got.scores["MixLinear"]["mse"])


def test_floors_repeat_what_they_say():
    shape = fold.Shape(6, 5, 3)
    x = np.array([1.0, 2, 3, 7, 8, 9])
    assert FLOORS["last period"](x, shape).tolist() == [7, 8, 9, 7, 8]
    assert FLOORS["mean period"](x, shape).tolist() == [4, 5, 6, 4, 5]
    assert FLOORS["last value"](x, shape).tolist() == [9] * 5
    assert repeat(x, shape, 2).tolist() == [1, 2, 3, 7, 8]
