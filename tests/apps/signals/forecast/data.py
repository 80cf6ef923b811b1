"""Series for the tests of forecasts: daily shapes that wander, in hours."""

import numpy as np

from netsuke.apps.signals.forecast.fold import Shape


def meters(rows: int = 1200, channels: int = 2, seed: int = 0, period: int = 24) -> np.ndarray:
    """(rows, channels): a daily wave of changing size, a slow wander, noise; every channel with its own unit."""
    rng = np.random.default_rng(seed)
    time = np.arange(rows)[:, None]
    shape = np.sin(2 * np.pi * time / period + np.arange(channels)) + 0.4 * np.sin(4 * np.pi * time / period)
    size = 1 + 0.3 * np.sin(2 * np.pi * time / (13 * period))
    wander = np.cumsum(rng.normal(size=(rows, channels)), 0) * 0.02
    return (shape * size + wander + 0.2 * rng.normal(size=(rows, channels))) * 10.0 ** np.arange(channels)


SMALL = Shape(lookback=7 * 6, horizon=15, period=6)  # n 7, m 3, p 3, q 2: neither n nor m is a square
ODD = Shape(lookback=8 * 5, horizon=10, period=5)
EXACT = Shape(lookback=9 * 4, horizon=16, period=4)
