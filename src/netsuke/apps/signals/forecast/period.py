"""The period of a series, from its autocorrelation: what users are told to look up in a plot.

Slow wandering has an autocorrelation without contrast: r(p) is about the mean of r(p/2) and r(3p/2). A period p stands out
of both. Candidates are the peaks of the contrast in the series and in its differences; each is then judged on the series
minus its own moving average of length p, which no slower movement survives.
"""

from __future__ import annotations

import math

import numpy as np

from netsuke.apps.signals.forecast.fold import Array

CANDIDATES = 20  # of the series, and as many of its differences
CYCLES = 6  # at least, of anything that is called a period
ENOUGH = 0.9  # of the best score: the first such period is taken, not its multiples


def find_period(x: Array) -> int | None:
    """Rows of the strongest period of x (T, channels), without NaN; None when nothing stands out of chance."""
    t = len(x)
    largest = t // CYCLES
    if largest < 2:
        return None
    found: set[int] = set()
    lags = np.arange(2, largest + 1)
    for z in (x, np.diff(x, axis=0)):
        r = autocorrelation(z, min(2 * largest, len(z)))
        peaks = lags[(r[lags] > r[lags - 1]) & (r[lags] >= r[lags + 1])]
        found |= set(peaks[np.argsort(-contrast(r, peaks))[:CANDIDATES]].tolist())
    scores = {p: float(contrast(filtered(x, p), np.array([p]))[0]) for p in sorted(found)}
    # chance: 1 / p is what the moving average does to noise; a random walk gives up to 2.5 sqrt(p / T)
    scores = {p: v for p, v in scores.items() if v > 0.1 + 1 / p + 2.5 * math.sqrt(p / t)}
    if not scores:
        return None
    first = min(p for p, v in scores.items() if v >= ENOUGH * max(scores.values()))
    r, reach = filtered(x, first), max(1, first // 30)
    times = np.arange(1, 5)  # the fourth multiple tells neighbours apart
    return max(
        range(max(2, first - reach), first + reach + 1), key=lambda p: float(np.mean(r[p * times[p * times < len(r)]]))
    )


def autocorrelation(x: Array, count: int) -> Array:
    """r(0) … r(count - 1), unbiased, the mean over the channels of x (T, channels) after a linear trend is taken out."""
    t = len(x)
    time = np.arange(t) - (t - 1) / 2
    centred = x - x.mean(0)
    centred = centred - np.outer(time, time @ centred) / (time @ time)
    power = (centred * centred).sum(0)
    live = power > 1e-12 * max(float(power.max()), 1e-300)
    if not live.any():
        return np.zeros(count)
    size = 1 << (2 * t - 1).bit_length()
    spectrum = np.abs(np.fft.rfft(centred[:, live] / np.sqrt(power[live]), size, axis=0)) ** 2
    return np.fft.irfft(spectrum, size, axis=0)[:count].mean(1) * t / (t - np.arange(count))


def filtered(x: Array, p: int) -> Array:
    """The autocorrelation, up to 4.5 p, of x minus its centred moving average over p rows."""
    total = np.concatenate([np.zeros((1, x.shape[1])), np.cumsum(x, 0)])
    slow = (total[p:] - total[:-p]) / p
    y = x[(p - 1) // 2 :][: len(slow)] - slow
    return autocorrelation(y, min(4 * p + p // 2 + 2, len(y)))


def contrast(r: Array, lags: Array) -> Array:
    """r(p) - (r(p/2) + r(3p/2)) / 2, halves between the two neighbours."""
    at = np.arange(len(r))
    return np.interp(lags, at, r) - (np.interp(lags / 2, at, r) + np.interp(1.5 * lags, at, r)) / 2
