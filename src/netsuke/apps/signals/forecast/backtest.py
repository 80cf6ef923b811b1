"""How wrong a forecast was on rows that the forecaster had not seen: rolling origins, bands per step, floors beside it.

The last part of the series is cut into folds. Before each fold the forecaster learns from everything earlier; then it forecasts
from every origin whose look-back and horizon it can see. What is automatic (period, look-back, alpha, lpf) is decided on the rows
before the first fold, whatever the forecaster was fitted to; gaps of a look-back are filled from the rows before its origin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from netsuke.apps.signals.forecast import fold
from netsuke.apps.signals.forecast.floors import FLOORS
from netsuke.apps.signals.forecast.fold import Array, Shape
from netsuke.apps.signals.forecast.forecaster import MixLinear
from netsuke.apps.signals.forecast.series import Neighbours, Series, filled
from netsuke.errors import NetsukeError

LEVELS = (0.025, 0.1, 0.5, 0.9, 0.975)  # quantiles of the error: bands of 95 % and 80 %
TESTED = 0.3  # share of the rows, where no more is needed for learning
MOST = 4000  # origins a fold and channel; more are thinned evenly


@dataclass
class Backtest:
    """bands (levels, horizon, channels): quantiles of truth - forecast in the series' units; earlier: without the last fold, None
    where there is one only
    scores   per method {mse, mae}: errors divided by each channel's deviation before the first fold
    folds    [{first, last (rows of origins), mse}];  by_step (horizon): mse of the forecaster
    channels  per name {mse, mae, best floor's mae} in the series' units
    coverage  {"80 %": …, "95 %": …}: share of the last fold's truth inside the earlier bands; of 2 folds on
    """

    bands: Array
    earlier: Array | None
    scores: dict[str, dict[str, float]]
    folds: list[dict[str, Any]]
    by_step: Array
    channels: dict[str, dict[str, float]]
    coverage: dict[str, float]
    model: MixLinear

    @property
    def beaten(self) -> list[str]:
        """Floors that are better than the forecaster in MSE."""
        return [k for k in FLOORS if self.scores[k]["mse"] < self.scores["MixLinear"]["mse"]]

    def as_dict(self) -> dict[str, Any]:
        m = self.model
        return {
            "horizon": m.horizon, "lookback": m.shape.lookback, "period": m.shape.period, "alpha": m.alpha, "lpf": m.lpf,
            "parameters": m.n_parameters(), "scores": self.scores, "better_floors": self.beaten, "folds": self.folds,
            "by_step": self.by_step.tolist(), "channels": self.channels, "levels": list(LEVELS),
            "coverage": self.coverage,
            "bands": {n: self.bands[:, :, k].tolist() for k, n in enumerate(m.names)}, "notes": m.notes,
        }  # fmt: skip


def backtest(
    series: Series, model: MixLinear, *, folds: int = 5, on_fold: Callable[[int, int], None] | None = None
) -> Backtest:
    """Tests the settings of `model`, which is left as it is. Raises NetsukeError when the series is too short for it."""
    rows, asked = len(series.values), f"backtest {model.horizon} rows ahead"
    if folds < 1:
        raise NetsukeError(asked, f"{folds} folds", "1 or more")
    cut = int((1 - TESTED) * rows)
    if rows - cut < model.horizon + folds:
        raise NetsukeError(
            asked,
            f"the last {TESTED:.0%} are {rows - cut} rows",
            f"{model.horizon + folds} or more",
            "a shorter horizon",
        )
    edges = np.linspace(cut, rows - model.horizon + 1, folds + 1).astype(
        int
    )  # a forecast begins at row e - 1 at the latest
    filled(series, model.missing, None)  # refuses what its policy refuses, before any work
    chosen, square, wrong, parts = model.as_asked(), [], [], []
    floor_errors: dict[str, list[Array]] = {k: [] for k in FLOORS}
    scale = None
    for k, (first, last) in enumerate(pairwise(edges)):
        if on_fold:
            on_fold(k, folds)
        known = Series(series.values[:first], series.names, series.start, series.step)
        chosen = chosen.like().fit(known)
        s = chosen.shape
        scale = chosen.scale if scale is None else scale
        origins = np.unique(np.linspace(first, last - 1, min(MOST, last - first)).astype(int))
        x = look_backs(series, origins, s)
        y = np.lib.stride_tricks.sliding_window_view(series.values, s.horizon, 0)[
            origins
        ]  # what is missing judges nobody
        error = y - fold.forecast(x, chosen.matrix(), chosen.weights.kernel, s)
        wrong.append(error)
        for name, floor in FLOORS.items():
            floor_errors[name].append(y - floor(x, s))
        square.append(float(np.nanmean((error / scale[:, None]) ** 2)))
        parts.append({"first": int(first), "last": int(last - 1), "origins": len(origins), "mse": square[-1]})
    if on_fold:
        on_fold(folds, folds)
    error = np.concatenate(wrong)
    every = {"MixLinear": error} | {k: np.concatenate(v) for k, v in floor_errors.items()}
    scores = {
        k: {"mse": float(np.nanmean((e / scale[:, None]) ** 2)), "mae": float(np.nanmean(np.abs(e / scale[:, None])))}
        for k, e in every.items()
    }
    channels = {
        n: {
            "mse": float(np.nanmean(error[:, c] ** 2)), "mae": float(np.nanmean(np.abs(error[:, c]))),
            "best_floor_mae": min(float(np.nanmean(np.abs(every[k][:, c]))) for k in FLOORS),
        }
        for c, n in enumerate(series.names)
    }  # fmt: skip
    earlier = _bands(np.concatenate(wrong[:-1])) if folds > 1 else None
    coverage = {} if earlier is None else _coverage(earlier, wrong[-1].transpose(0, 2, 1))
    by_step = np.nanmean((error / scale[:, None]) ** 2, axis=(0, 1))
    return Backtest(_bands(error), earlier, scores, parts, by_step, channels, coverage, chosen)


def look_backs(series: Series, origins: Array, shape: Shape) -> Array:
    """(origins, channels, lookback): the rows before each origin, filled as `predict` would there, from earlier rows alone."""
    x = np.lib.stride_tricks.sliding_window_view(series.values, shape.lookback, 0)[origins - shape.lookback]
    for channel in range(x.shape[1]):
        at, step = np.nonzero(np.isnan(x[:, channel]))
        if len(at):
            around = Neighbours(series.values[:, channel], shape.period)
            x[at, channel, step] = around.fill(origins[at] - shape.lookback + step, origins[at])
    return x


def _bands(error: Array) -> Array:
    """(levels, horizon, channels) of errors (origins, channels, horizon)."""
    return np.nanquantile(error, LEVELS, axis=0).transpose(0, 2, 1)


def _coverage(q: Array, last: Array) -> dict[str, float]:
    """Shares of errors (origins, horizon, channels) inside bands q (levels, horizon, channels)."""
    known = np.isfinite(last)
    inside = {name: (last >= q[k]) & (last <= q[-1 - k]) for name, k in (("95 %", 0), ("80 %", 1))}
    return {name: float(v[known].mean()) for name, v in inside.items()}
