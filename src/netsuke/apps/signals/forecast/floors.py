"""What every forecast must beat: answers that need no training. All map look-backs (…, lookback) to (…, horizon)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from netsuke.apps.signals.forecast.fold import Array, Shape


def repeat(x: Array, shape: Shape, periods: int = 1) -> Array:
    """The last period again and again: seasonal naive. `periods` 7 with daily periods repeats the last week."""
    last = x[..., -periods * shape.period :]
    return np.take(last, np.arange(shape.horizon) % (periods * shape.period), axis=-1)


def mean_period(x: Array, shape: Shape) -> Array:
    """The mean period of the look-back, repeated."""
    mean = x.reshape(*x.shape[:-1], shape.n, shape.period).mean(-2)
    return np.take(mean, np.arange(shape.horizon) % shape.period, axis=-1)


def last_value(x: Array, shape: Shape) -> Array:
    return np.repeat(x[..., -1:], shape.horizon, axis=-1)


FLOORS: dict[str, Callable[[Array, Shape], Array]] = {
    "last value": last_value, "last period": repeat, "mean period": mean_period,
}  # fmt: skip
