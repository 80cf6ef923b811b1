"""Beat-to-beat variability of shape: dynamic time warping between neighbouring beats, and its alternating part.

Every beat, from 50 ms before P to the end of T, is resampled to 50 points at equal distances along its curve; neighbours
are compared by dynamic time warping within three points; the series of distances over beat numbers goes through a
Lomb–Scargle periodogram, whose share between 0.3 and 0.55 per beat is high when every other beat differs (alternans).
"""

from __future__ import annotations

import numpy as np

from netsuke.apps.signals.ecg.beats import LIKE, Beat, windows
from netsuke.apps.signals.ecg.parameters import Value, gap

POINTS, WARP, FEWEST = 50, 3, 20
ALTERNATING = (0.3, 0.55)  # per beat


def equal_paths(rows: np.ndarray) -> np.ndarray:
    """(B, n) mV -> (B, 50) at equal distances along each curve (time and amplitude each scaled to 1)."""
    scale = np.ptp(rows) or 1.0
    steps = np.hypot(np.diff(rows, axis=1) / scale, 1 / rows.shape[1])
    path = np.concatenate((np.zeros((len(rows), 1)), np.cumsum(steps, axis=1)), axis=1)
    return np.array([np.interp(np.linspace(0, p[-1], POINTS), p, y) for p, y in zip(path, rows)])


def warped_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(B, 50), (B, 50) -> (B,): dynamic time warping of |a − b| with at most `WARP` points of displacement."""
    count, n = a.shape
    cost = np.full((count, n + 1, n + 1), np.inf)
    cost[:, 0, 0] = 0
    for i in range(1, n + 1):
        for j in range(max(1, i - WARP), min(n, i + WARP) + 1):
            best = np.minimum(np.minimum(cost[:, i - 1, j], cost[:, i, j - 1]), cost[:, i - 1, j - 1])
            cost[:, i, j] = np.abs(a[:, i - 1] - b[:, j - 1]) + best
    return cost[:, n, n]


def alternation(x: np.ndarray, peaks: np.ndarray, beat: Beat) -> dict[str, Value]:
    """Median distance between neighbouring beats (mV per point) and the share of its power at 0.3 to 0.55 per beat."""
    from scipy import signal

    rows = windows(x, peaks + beat.shift)
    good = np.flatnonzero((beat.like >= LIKE) & ~np.isnan(rows).any(1))
    pairs = good[1:][np.diff(good) == 1]
    if len(pairs) < FEWEST:
        why = gap(f"needs {FEWEST} neighbouring beats of one shape, {len(pairs)} are here")
        return {"distance": why, "alternating": why}
    curves = np.zeros((len(rows), POINTS))
    curves[good] = equal_paths(rows[good, 20:250])  # 370 ms before R to 550 ms after
    distance = warped_distance(curves[pairs - 1], curves[pairs]) / POINTS
    grid = np.linspace(0.02, 0.55, 200)
    y = distance - distance.mean()
    power = signal.lombscargle(pairs.astype(float), y, 2 * np.pi * grid) if y.any() else np.zeros(200)
    share = float(power[grid >= ALTERNATING[0]].sum() / max(power.sum(), 1e-30))
    return {
        "distance": Value(float(np.median(distance)), "mV", "fair", len(pairs)),
        "alternating": Value(share, "", "fair", len(pairs)),
    }
