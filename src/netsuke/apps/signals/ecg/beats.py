"""The representative beat: windows around the R peaks, the dominant shape among them, aligned and averaged.

A window holds the P wave before and the T wave after (448 ms before R, 704 ms after). Beats of another shape or out of
rhythm (extrasystoles, artefacts) are left out of the average and counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from netsuke.apps.signals.ecg.conditioning import RATE

BEFORE, AFTER = 112, 176  # samples at 250 Hz: a PR of 400 ms and a QT of 650 ms fit in
LENGTH = BEFORE + AFTER
CORE = slice(BEFORE - 25, BEFORE + 30)  # -100 to +120 ms: the QRS, by whose shape beats are compared
SHIFT = 6  # samples (24 ms) that a beat may move to lie on the template
LIKE = 0.88  # correlation of two QRS of one origin; extrasystoles and artefacts stay below
EARLY = 0.85  # a beat that comes before this share of the typical interval is an extrasystole


@dataclass(frozen=True)
class Beat:
    """`wave` (288,) mV at 250 Hz, R at sample 112; `used` marks the peaks averaged; `rr` in s is the median of these."""

    wave: np.ndarray
    used: np.ndarray  # (peaks,) bool
    like: np.ndarray  # (peaks,) correlation of every QRS with the representative one, NaN where it leaves the record
    shift: np.ndarray  # (peaks,) samples to add to a peak so that it lies on the representative beat
    rr: float
    noise: float  # mV: median over time of the spread between the beats that were averaged


def windows(x: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """(N,), (P,) -> (P, 288): NaN beyond the ends of the record."""
    padded = np.concatenate((np.full(BEFORE, np.nan), x, np.full(AFTER, np.nan)))
    return padded[peaks[:, None] + np.arange(LENGTH)]


def similarity(cores: np.ndarray) -> np.ndarray:
    """(B, n) -> (B, B) correlations; a flat core is like nothing."""
    c = cores - cores.mean(1, keepdims=True)
    norm = np.linalg.norm(c, axis=1)
    return (c @ c.T) / np.maximum(np.outer(norm, norm), 1e-12)


def trimmed_mean(rows: np.ndarray) -> np.ndarray:
    """(B, n) -> (n,): mean of the middle half of the values at every sample, over the rows that reach it."""
    ordered, count = np.sort(rows, axis=0), np.sum(~np.isnan(rows), axis=0)  # NaN sorts last
    cut, index = count // 4, np.arange(len(rows))[:, None]
    inside = (index >= cut) & (index < count - cut)
    return np.where(inside, np.nan_to_num(ordered), 0).sum(0) / np.maximum(inside.sum(0), 1)


def best_shifts(x: np.ndarray, starts: np.ndarray, shape: np.ndarray, haste: float = 0.0) -> tuple[np.ndarray, ...]:
    """Where `x` is most like `shape` (n,) within ±`SHIFT` of each of `starts` (B,): shifts (B,), correlations (B,).

    NaN for a start from which the search would leave the record. `haste` is taken off the correlation per sample of
    shift, so that among equals the smallest move wins.
    """
    low, high = starts - SHIFT, starts + SHIFT + len(shape)
    inside = (low >= 0) & (high <= len(x))
    index = np.where(inside, low, 0)[:, None] + np.arange(len(shape) + 2 * SHIFT)
    spans = x[np.minimum(index, len(x) - 1)]
    c = shape - shape.mean()
    c /= max(float(np.sqrt(c @ c)), 1e-12)
    rows = np.lib.stride_tricks.sliding_window_view(spans, len(shape), axis=1)
    size = np.sqrt(np.maximum((rows**2).sum(2) - rows.sum(2) ** 2 / len(shape), 1e-18))
    r = rows @ c / size
    best = np.argmax(r - haste * np.abs(np.arange(2 * SHIFT + 1) - SHIFT), axis=1)
    return np.where(inside, best - SHIFT, 0), np.where(inside, r[np.arange(len(r)), best], np.nan)


def representative(x: np.ndarray, peaks: np.ndarray) -> Beat | None:
    """The dominant beat of a conditioned lead (N,) with R at `peaks`; None if no two beats are alike."""
    rows = windows(x, peaks)
    whole = ~np.isnan(rows[:, CORE]).any(1)
    if whole.sum() < 2:
        return None
    index = np.flatnonzero(whole)
    gaps = np.diff(peaks).astype(float)
    typical = float(np.median(gaps))
    early = np.concatenate(([False], gaps < EARLY * typical))
    alike = similarity(rows[index][:, CORE]) > LIKE
    votes = alike.sum(1) + 0.5 * ~early[index]  # among equals, a beat in rhythm leads
    members = index[alike[np.argmax(votes)]]
    in_rhythm = members[~early[members]]
    members = in_rhythm if len(in_rhythm) >= max(2, len(members) / 2) else members
    if len(members) < 2:
        return None
    core = trimmed_mean(rows[members][:, CORE])
    shift, like = best_shifts(x, peaks - (BEFORE - CORE.start), core)
    used = np.zeros(len(peaks), dtype=bool)
    used[members] = True
    complete = used & ~np.isnan(rows).any(1)
    if complete.sum() >= 3:  # a beat cut off by the record's end has no baseline to be levelled by
        used = complete
    aligned = windows(x, peaks[used] + shift[used])
    aligned = aligned - np.nanmedian(aligned, axis=1, keepdims=True)
    wave = trimmed_mean(aligned)
    before = np.flatnonzero(used)
    before = before[before > 0] - 1
    rr = float(np.median(gaps[before])) if len(before) else typical
    noise = float(np.nanmedian(np.nanstd(aligned, axis=0))) if used.sum() > 1 else float("nan")
    return Beat(wave, used, like, shift, rr / RATE, noise)
