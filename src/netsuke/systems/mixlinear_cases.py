"""What the claims of `mixlinear` are measured on: the ETTh split, every model trained by one loop, floors, moments."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from torch import nn

from netsuke.apps.signals.forecast import fold
from netsuke.apps.signals.forecast.device import SWEEPS
from netsuke.apps.signals.forecast.floors import FLOORS, repeat
from netsuke.apps.signals.forecast.fold import Array, Shape
from netsuke.apps.signals.forecast.forecaster import MixLinear, Weights
from netsuke.apps.signals.forecast.models import DLinear, Fits, MixLinearNet, OneLayer, SparseTSF, parameters
from netsuke.apps.signals.forecast.moments import Moments, fit_both, least_squares, sweep
from netsuke.apps.signals.forecast.series import read
from netsuke.apps.signals.forecast.training import Plan, errors, fit, seeded
from netsuke.data.catalogue import find

FILES = {"ETTh1": "mixlinear/ETTh1.csv", "ETTh2": "mixlinear/ETTh2.csv"}
HORIZONS = (96, 192, 336, 720)
TASKS = [(name, h) for name in FILES for h in HORIZONS]
LOOKBACK, PERIOD, MONTH = 720, 24, 30 * 24
# (alpha, lpf) of the authors' best scripts, with their rates, batches and patience
SCRIPTS = {
    ("ETTh1", 96): (0.95, 1), ("ETTh1", 192): (0.95, 5), ("ETTh1", 336): (0.99, 2), ("ETTh1", 720): (0.99, 19),
    ("ETTh2", 96): (0.5, 19), ("ETTh2", 192): (0.01, 19), ("ETTh2", 336): (0.01, 15), ("ETTh2", 720): (0.5, 19),
}  # fmt: skip
RATES, PATIENCE = {"ETTh1": 0.03, "ETTh2": 0.02}, {"ETTh1": 10, "ETTh2": 5}
BATCHES = {("ETTh2", 192): 310, ("ETTh2", 336): 128, ("ETTh2", 720): 310}
SHARE = {96: 0.5, 192: 0.5, 336: 0.35, 720: 0.35}  # of SparseTSF's parameters that the card allows
RIDGES = 10.0 ** np.arange(-7, 3)  # strengths, of the mean diagonal, among which validation chooses
TIMED = 5  # repeats of which a time is the median
WIDE = {"fits": 1e-3, "dlinear": 5e-3, "one layer": 1e-3}  # rates of the models with thousands of weights


def shape_of(horizon: int) -> Shape:
    return Shape(LOOKBACK, horizon, PERIOD)


@cache
def data(name: str) -> dict[str, Array]:
    """12, 4 and 4 months, scaled by the training months' mean and deviation; the later parts begin with a look-back."""
    x = read(find(FILES[name])).values
    train, end = 12 * MONTH, 16 * MONTH
    x = (x - x[:train].mean(0)) / x[:train].std(0)
    return {
        "train": x[:train], "validation": x[train - LOOKBACK : end], "test": x[end - LOOKBACK : 20 * MONTH]
    }  # fmt: skip


def largest_lpf(horizon: int, smoothed: bool = True) -> int:
    """Bins with which MixLinear stays within the card's share of SparseTSF's parameters."""
    s = shape_of(horizon)
    taps = PERIOD + 1 if smoothed else 0
    return int((SHARE[horizon] * (s.n * s.m + PERIOD + 1) - taps - 2 * s.p * s.q - 4 * s.m) // 4)


def settings(kind: str, name: str, horizon: int) -> tuple[float, int]:
    alpha, lpf = SCRIPTS[name, horizon]
    return {
        "small": (alpha, min(lpf, largest_lpf(horizon))), "time": (1.0, 1), "frequency": (0.0, lpf),
    }.get(kind, (alpha, lpf))  # fmt: skip


@cache
def moments(name: str, horizon: int, split: str = "train") -> Moments:
    out = Moments(shape_of(horizon), 7)
    out.update(data(name)[split])
    return out


@cache
def net(kind: str, name: str, horizon: int, seed: int = 0, quick: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """(trained model, {parameters, validation, epochs, seconds}); MixLinear starts from moments unless `kind` says random.

    kinds: mixlinear, small, time, frequency, random, unsmoothed, unsmoothed random, sparsetsf, fits, dlinear, one layer
    """
    s, rows = shape_of(horizon), data(name)
    wide = kind in WIDE
    plan = Plan(
        rate=WIDE.get(kind, RATES[name]), epochs=1 if quick else 15 if wide else 30,
        patience=5 if wide else PATIENCE[name], batch=BATCHES.get((name, horizon), 256), seed=seed,
    )  # fmt: skip
    others: dict[str, Callable[[], nn.Module]] = {
        "sparsetsf": lambda: SparseTSF(s), "fits": lambda: Fits(s), "dlinear": lambda: DLinear(s),
        "one layer": lambda: OneLayer(s),
    }  # fmt: skip
    alpha, lpf = settings(kind, name, horizon)
    smoothed = not kind.startswith("unsmoothed")
    model = seeded(others.get(kind, lambda: MixLinearNet(s, alpha, lpf, smoothed)), seed)
    start = time.perf_counter()
    if kind not in others and "random" not in kind:
        model.set(*fit_both(moments(name, horizon), alpha, lpf))
    done = fit(model, rows["train"], rows["validation"], s, plan)
    return model, {"parameters": parameters(model)} | done | {"seconds": time.perf_counter() - start}


@cache
def trained(kind: str, name: str, horizon: int, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """What `net` says, with the test's mse and mae."""
    model, done = net(kind, name, horizon, seed, quick)
    mse, mae = errors(model, data(name)["test"], shape_of(horizon))
    return done | {"mse": mse, "mae": mae}


def forecaster(kind: str, name: str, horizon: int, quick: bool = False) -> MixLinear:
    """A trained MixLinear net as the forecaster that users export; channels are scaled already."""
    alpha, lpf = settings(kind, name, horizon)
    out = MixLinear(horizon, LOOKBACK, PERIOD, alpha, lpf, method="adam")
    out.shape, out.names, out.scale = shape_of(horizon), [f"channel {k}" for k in range(7)], np.ones(7)
    out.weights = Weights(*net(kind, name, horizon, quick=quick)[0].arrays())
    return out


def seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median time of each call; they take turns, after one call each that does not count."""
    times: dict[str, list[float]] = {k: [] for k in calls}
    for turn in range(TIMED + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {k: statistics.median(v) for k, v in times.items()}


def scored(forecast: Callable[[Array], Array], name: str, horizon: int, split: str = "test") -> dict[str, float]:
    """MSE and MAE of a function (windows, lookback) -> (windows, horizon) over every window and channel."""
    square = absolute = count = 0.0
    for channel in data(name)[split].T:
        seen = np.lib.stride_tricks.sliding_window_view(channel, LOOKBACK + horizon)
        e = forecast(seen[:, :LOOKBACK]) - seen[:, LOOKBACK:]
        square, absolute, count = square + np.sum(e * e), absolute + np.sum(np.abs(e)), count + e.size
    return {"mse": float(square / count), "mae": float(absolute / count)}


@cache
def floors(name: str, horizon: int) -> dict[str, dict[str, float]]:
    s = shape_of(horizon)
    rows = {k: scored(lambda x, f=f: f(x, s), name, horizon) for k, f in FLOORS.items() if k != "last value"}
    return rows | {"last week": scored(lambda x: repeat(x, s, 7), name, horizon)}


@cache
def without_gradients(name: str, horizon: int) -> dict[str, Any]:
    """The moments form at the script's alpha and lpf: seconds from the rows on, bytes of state, every matrix's errors."""
    alpha, lpf = SCRIPTS[name, horizon]
    s, rows = shape_of(horizon), data(name)["train"]

    def learn() -> tuple[Moments, tuple[Array, Array, Array, Array]]:
        seen = Moments(s, 7)
        seen.update(rows)
        return seen, fit_both(seen, alpha, lpf)

    took = seconds({"moments": learn})["moments"]
    seen, (a1, a2, w1, w2) = learn()
    time_path, frequency = fold.time_matrix(a1, a2, s), fold.frequency_matrix(w1, w2, s)
    full = fold.frequency_matrix(*fit_both(seen, 0, s.n)[2:], s)
    out = {"seconds": took, "bytes": seen.bytes}
    for label, matrix in (
        ("mixed", alpha * time_path + (1 - alpha) * frequency), ("time", time_path), ("rank 2", full),
        ("least squares", least_squares(seen)),
    ):  # fmt: skip
        out[label] = scored(lambda x, m=matrix: fold.forecast(x, m, None, s), name, horizon)
    return out


def gram(name: str, horizon: int, split: str) -> Array:
    """(S + H, S + H): products of all windows' rows, each window minus its look-back's mean, over all channels."""
    total = np.zeros((LOOKBACK + horizon,) * 2)
    for channel in data(name)[split].T:
        seen = np.lib.stride_tricks.sliding_window_view(channel, LOOKBACK + horizon)
        seen = seen - seen[:, :LOOKBACK].mean(1, keepdims=True)
        total += seen.T @ seen
    return total


@cache
def ridge(name: str, horizon: int) -> dict[str, Any]:
    """One linear layer by ridge regression, exactly, its strength chosen on validation: the floor of all that trains one."""
    start = time.perf_counter()
    seen, later = (gram(name, horizon, split) for split in ("train", "validation"))
    values, vectors = np.linalg.eigh(seen[:LOOKBACK, :LOOKBACK])
    right = vectors.T @ seen[:LOOKBACK, LOOKBACK:]

    def matrix(strength: float) -> Array:
        return vectors @ (right / (values + strength * values.mean())[:, None])

    def loss(m: Array) -> float:
        return float(np.sum(m * (later[:LOOKBACK, :LOOKBACK] @ m)) - 2 * np.sum(m * later[:LOOKBACK, LOOKBACK:]))

    strength = min(RIDGES, key=lambda r: loss(matrix(r)))
    best, took = matrix(strength), time.perf_counter() - start

    def forecast(x: Array) -> Array:
        mean = x.mean(1, keepdims=True)
        return (x - mean) @ best + mean

    return {"parameters": best.size, "strength": float(strength), "seconds": took} | scored(forecast, name, horizon)


@cache
def deployed(name: str, horizon: int) -> MixLinear:
    """The forecaster of firmware that learns: the time path alone, fitted to the training months."""
    return MixLinear(horizon, LOOKBACK, PERIOD, 1.0, 1).fit(data(name)["train"])


def refitted(name: str, horizon: int, start: Moments) -> Iterator[Array]:
    """The time path's matrix after each day of the test months as generated firmware refits it, beginning with `start`."""
    model, rows = deployed(name, horizon), data(name)["test"]
    a1, a2 = model.weights.a1, model.weights.a2
    for at in range(0, len(rows) - PERIOD + 1, PERIOD):
        start.update(rows[at : at + PERIOD] / model.scale)
        for _ in range(SWEEPS):
            a1, a2 = sweep(a1, a2, start.sxx, start.sxy, model.shape)
        yield fold.time_matrix(a1, a2, model.shape)


def by_day(name: str, horizon: int, matrices: list[Array]) -> float:
    """MSE over the test's windows, each forecast with the matrix of its day: matrices[k] from row k * PERIOD on."""
    s, square, count = shape_of(horizon), 0.0, 0
    for channel in data(name)["test"].T:
        seen = np.lib.stride_tricks.sliding_window_view(channel, LOOKBACK + horizon)
        for day in range(LOOKBACK // PERIOD, (LOOKBACK + len(seen) - 1) // PERIOD + 1):
            part = seen[day * PERIOD - LOOKBACK :][:PERIOD]
            e = fold.forecast(part[:, :LOOKBACK], matrices[day], None, s) - part[:, LOOKBACK:]
            square, count = square + float(np.sum(e * e)), count + e.size
    return square / count
