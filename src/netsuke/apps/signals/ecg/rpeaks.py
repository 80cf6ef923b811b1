"""R peaks of one lead: steep and strong beats tall, whatever the polarity; 30 to 250 beats a minute.

Energy of the slope in the 6 to 22 Hz band, averaged over the width of a QRS, against a threshold that follows the
beats' own height (median of the largest peaks of short stretches). A gap of more than 1.7 beats is searched again at
less than half the threshold; a peak that trails another within 360 ms and is much flatter is a T wave. All positions
are samples at 250 Hz of the conditioned lead.
"""

from __future__ import annotations

import numpy as np

from netsuke.apps.signals.ecg.conditioning import RATE, zero_phase

WIDTH = round(0.09 * RATE)  # of the moving average: a QRS and its slopes
REFRACTORY = round(0.22 * RATE)
T_REGION = round(0.36 * RATE)
STRETCH = 2 * RATE  # each stretch of 2 s holds at least one beat from 30 a minute on
SHARE, SEARCH_BACK = 0.22, 0.08  # of the typical energy peak: found at once, found on the second look
SNAP = round(0.06 * RATE)  # the peak of the wave lies this close to the peak of the energy


def slope_energy(x: np.ndarray) -> np.ndarray:
    """(N,) mV at 250 Hz -> (N,) energy of its slope, (mV per sample)², averaged over `WIDTH`."""
    d = np.gradient(zero_phase(x, "qrs"))
    return moving_average(d * d, WIDTH)


def moving_average(x: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` samples, shrinking at the ends."""
    total = np.concatenate(([0.0], np.cumsum(x)))
    at = np.arange(len(x))
    low, high = np.maximum(at - width // 2, 0), np.minimum(at + (width + 1) // 2, len(x))
    return (total[high] - total[low]) / (high - low)


def local_maxima(e: np.ndarray, apart: int) -> np.ndarray:
    """Positions of maxima of `e`, the higher of any two closer than `apart` samples."""
    peaks = np.flatnonzero((e[1:-1] > e[:-2]) & (e[1:-1] >= e[2:])) + 1
    kept: list[int] = []
    for p in peaks:  # left to right; a higher newcomer replaces the peak it is too close to
        if kept and p - kept[-1] < apart:
            if e[p] > e[kept[-1]]:
                kept[-1] = int(p)
        else:
            kept.append(int(p))
    return np.array(kept, dtype=np.int64)


def typical_height(e: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """For every peak the median of the largest energies of the stretches around it (±4): follows slow changes only."""
    count = max(1, len(e) // STRETCH)
    tops = np.array([e[i * STRETCH : (i + 1) * STRETCH].max() for i in range(count)])
    typical = np.array([np.median(tops[max(0, i - 4) : i + 5]) for i in range(count)])
    return typical[np.minimum(peaks // STRETCH, count - 1)]


def detect(x: np.ndarray) -> np.ndarray:
    """Positions of the R peaks (largest deflection of each QRS) in a conditioned lead `x` (N,) at 250 Hz, ascending."""
    if len(x) < RATE:
        return np.zeros(0, dtype=np.int64)
    e = slope_energy(x)
    peaks = local_maxima(e, REFRACTORY)
    if not len(peaks):
        return peaks
    height = typical_height(e, peaks)
    chosen = without_t_waves(e, peaks[e[peaks] > SHARE * height])
    weaker = peaks[(e[peaks] > SEARCH_BACK * height) & (e[peaks] <= SHARE * height)]
    chosen = without_t_waves(e, search_back(e, chosen, weaker))
    return snap(x, chosen)


def without_t_waves(e: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """Leaves out a peak that follows another within `T_REGION` with less than half its energy."""
    kept: list[int] = []
    for p in peaks:
        if kept and p - kept[-1] < T_REGION and e[p] < 0.5 * e[kept[-1]]:
            continue
        if kept and p - kept[-1] < T_REGION and e[kept[-1]] < 0.15 * e[p]:
            kept.pop()  # a P wave or an artefact just before a real QRS
        kept.append(int(p))
    return np.array(kept, dtype=np.int64)


def search_back(e: np.ndarray, peaks: np.ndarray, weaker: np.ndarray) -> np.ndarray:
    """Adds the strongest of `weaker` into every gap longer than 1.7 typical intervals, until none is left to add."""
    peaks = [int(p) for p in peaks]
    for _ in range(len(weaker)):
        if len(peaks) < 3:
            break
        gaps = np.diff(peaks)
        typical = np.median(gaps)
        added = False
        for i in np.flatnonzero(gaps > 1.7 * typical)[::-1]:
            inside = weaker[(weaker > peaks[i] + T_REGION) & (weaker < peaks[i + 1] - REFRACTORY)]
            if len(inside):
                peaks.insert(i + 1, int(inside[np.argmax(e[inside])]))
                added = True
        if not added:
            break
    return np.array(peaks, dtype=np.int64)


def snap(x: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """Moves every peak to the largest deflection within ±60 ms, of the sign that most beats' energy has."""
    if not len(peaks):
        return peaks
    spans = [x[max(0, p - SNAP) : p + SNAP + 1] for p in peaks]
    centred = [s - np.median(s) for s in spans]
    up = np.median([s.max() for s in centred]) >= 0.8 * np.median([-s.min() for s in centred])
    at = [max(0, p - SNAP) + int(np.argmax(s if up else -s)) for p, s in zip(peaks, centred)]
    return np.unique(np.array(at, dtype=np.int64))


def refined(x: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """(P,) positions with fractions: the top of the parabola through each peak and its neighbours (4 ms are too coarse
    for the variability of RR)."""
    k = np.clip(peaks, 1, len(x) - 2)
    left, mid, right = x[k - 1], x[k], x[k + 1]
    bend = left - 2 * mid + right
    move = np.where(np.abs(bend) > 1e-12, 0.5 * (left - right) / np.where(bend == 0, 1.0, bend), 0.0)
    return peaks + np.clip(move, -0.5, 0.5)
