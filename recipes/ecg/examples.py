"""Training examples for the beat network: LUDB beats with the cardiologists' marks, varied so that no lead is special.

An example is a mean of some beats of one person and its marks relative to R. Variation: leads I and II rotated into
each other (their marks weighted alike), P, QRS and T scaled and turned separately, the whole beat inverted, faster
rhythms by overlapping copies, time stretched, R displaced, noise and baseline wander.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from netsuke.apps.signals.ecg.beats import BEFORE, LENGTH, representative
from netsuke.apps.signals.ecg.conditioning import RATE, condition
from netsuke.apps.signals.ecg.rpeaks import detect

MARGIN = 48  # samples on either side of the window, to displace and stretch within
TIMES = np.arange(LENGTH + 2 * MARGIN) - BEFORE - MARGIN
NEAR = round(0.15 * RATE)  # a mark belongs to a beat whose R lies this close to the marked QRS peak


@dataclass(frozen=True)
class Beats:
    """All used beats of one person and lead. `rows`, `other` (B, 384) this lead and the other one, mV; `marks` and
    `other_marks` (B, 8) samples from R, NaN where not marked; `rr` in samples; `wave` (288,) as it is tested."""

    rows: np.ndarray
    other: np.ndarray
    marks: np.ndarray
    other_marks: np.ndarray
    rr: float
    wave: np.ndarray


def beat_marks(waves: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """LUDB rows (type, onset, peak, offset; 500 Hz, -1 missing) around R `peaks` (250 Hz) -> (B, 8) samples from R.

    A P belongs to the next QRS and a T to the one before. A beat without a marked QRS is all NaN.
    """
    q = waves[waves[:, 0] == 1]
    out = np.full((len(peaks), 8), np.nan)
    for i, r in enumerate(peaks):
        j = int(np.argmin(np.abs(q[:, 2] / 2 - r))) if len(q) else -1
        if j < 0 or abs(q[j, 2] / 2 - r) > NEAR:
            continue
        low, high = q[j - 1, 2] if j else -1, q[j + 1, 2] if j + 1 < len(q) else np.inf
        p = waves[(waves[:, 0] == 0) & (waves[:, 2] > low) & (waves[:, 2] < q[j, 2])]
        t = waves[(waves[:, 0] == 2) & (waves[:, 2] > q[j, 2]) & (waves[:, 2] < high)]
        found = [p[-1, 1:4] if len(p) else [-1] * 3, q[j, [1, 3]], t[0, 1:4] if len(t) else [-1] * 3]
        at = np.concatenate(found).astype(float)
        out[i] = np.where(at >= 0, at / 2 - r, np.nan)
    return out


def people(folder) -> list[list[Beats]]:
    """Per person the beats of lead I and lead II, from `ludb_i_ii.npz`. Leads without marked beats are left out."""
    with np.load(folder / "ludb_i_ii.npz") as z:
        signal, gain, base, waves = (z[k] for k in ("signal", "gain", "baseline", "waves"))
    out = []
    for k in range(len(signal)):
        leads = [condition((signal[k, i] - float(base[k, i])) / float(gain[k, i]), 500) for i in (0, 1)]
        table = [waves[(waves[:, 0] == k + 1) & (waves[:, 1] == i)][:, 2:].astype(int) for i in (0, 1)]
        table = [t[np.argsort(t[:, 2])] for t in table]
        both = []
        for i in (0, 1):
            peaks = detect(leads[i])
            beat = representative(leads[i], peaks)
            if beat is None:
                continue
            peaks = peaks + beat.shift
            marks = [beat_marks(table[j], peaks) for j in (i, 1 - i)]
            used = np.flatnonzero(beat.used & np.isfinite(marks[0][:, 3]))
            if not len(used):
                continue
            gap = np.full(BEFORE + MARGIN, np.nan), np.full(LENGTH + MARGIN - BEFORE, np.nan)
            rows = [
                np.concatenate((gap[0], leads[j], gap[1]))[peaks[used][:, None] + np.arange(len(TIMES))]
                for j in (i, 1 - i)
            ]
            both.append(Beats(*rows, marks[0][used], marks[1][used], beat.rr * RATE, beat.wave))
        out.append(both)
    return out


def middle(marks: np.ndarray) -> np.ndarray:
    """(B, 8) -> (8,) medians over the beats; no P unless half of the beats have one."""
    known = np.isfinite(marks)
    with np.errstate(all="ignore"):
        out = np.where(known.any(0), np.nanmedian(np.where(known.any(0), marks, 0), axis=0), np.nan)
    if known[:, 0].mean() < 0.5:
        out[:3] = np.nan
    return out


def draw(beats: Beats, rng: np.random.Generator, mix: float) -> tuple[np.ndarray, np.ndarray]:
    """A mean of some of the beats over `TIMES` and its marks; with probability `mix` in a direction between I and II."""
    count = len(beats.marks)
    some = rng.permutation(count)[: rng.integers(1, count + 1) if rng.random() < 0.6 else count]
    rows, marks = beats.rows[some], beats.marks[some]
    other_marks = beats.other_marks[some]
    if rng.random() < mix and np.isfinite(other_marks[:, 3]).any():
        angle = rng.uniform(0, 2 * np.pi)
        share = np.abs([np.cos(angle) * np.nanstd(rows), np.sin(angle) * np.nanstd(beats.other[some])])
        share /= share.sum()
        rows = np.cos(angle) * rows + np.sin(angle) * beats.other[some]
        marks = share[0] * marks + share[1] * other_marks
    rows = np.nan_to_num(rows - np.nanmedian(rows, axis=1, keepdims=True))
    return np.median(rows, axis=0) if len(rows) > 2 else rows.mean(0), middle(marks)


def regained(wave: np.ndarray, marks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """P, QRS and T scaled by factors of their own (about ±40 %, one in four inverted), around the level at QRS onset."""
    p_end = marks[2] if np.isfinite(marks[2]) else marks[3] - 15
    factors = np.exp(rng.normal(0, 0.4, 3)) * rng.choice([1, 1, 1, -1], 3)
    t_start = max(marks[4] + 12, min(marks[5], marks[4] + 25))
    places = [min(p_end, marks[3] - 5), marks[3] - 3, marks[4] + 2, t_start]
    gain = np.interp(TIMES, places, factors[[0, 1, 1, 2]])
    level = np.interp(marks[3] - 2, TIMES, wave)
    return (wave - level) * gain + level


def faster(
    wave: np.ndarray, marks: np.ndarray, rr: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, float]:
    """The same beat at 90 to 170 a minute: shortened by the 0.4th power of RR, then overlapped with its neighbours."""
    target = rng.uniform(0.35, 0.66) * RATE
    if target >= rr:
        return wave, marks, rr
    squeeze = (target / rr) ** 0.4
    start, end = (marks[0] if np.isfinite(marks[0]) else marks[3]) - 8, marks[7] + 8
    level = np.interp([start, end], TIMES, wave)
    fade = np.interp(TIMES, [start - 10, start, end, end + 10], [0, 1, 1, 0])
    alone = (wave - np.interp(TIMES, [start, end], level)) * fade
    copies = [np.interp((TIMES - k * target) / squeeze, TIMES, alone, 0, 0) for k in range(-3, 4)]
    return np.sum(copies, axis=0), marks * squeeze, float(target)


def example(beats: Beats, rng: np.random.Generator, mix: float) -> tuple[np.ndarray, np.ndarray, float]:
    """One varied example: wave (288,), marks (8,) in samples from R with NaN, RR in samples."""
    wave, marks = draw(beats, rng, mix)
    rr, grid = beats.rr, np.arange(LENGTH) - BEFORE
    whole = np.isfinite(marks[[3, 4, 5, 7]]).all()
    if whole and rng.random() < 0.5:
        wave = regained(wave, marks, rng)
    if whole and rng.random() < 0.15:
        wave, marks, rr = faster(wave, marks, rr, rng)
    stretch, moved = np.exp(rng.normal(0, 0.08)), rng.uniform(-5, 5)
    wave = np.interp((grid + moved) / stretch, TIMES, wave) * rng.choice([-1, 1])
    size = wave.std()
    if rng.random() < 0.5:
        noise = np.convolve(rng.normal(size=LENGTH + 8), np.hanning(11)[1:-1], "valid")
        wave = wave + noise / noise.std() * size * np.exp(rng.normal(-3.5, 0.7))
    if rng.random() < 0.5:
        turn = 2 * np.pi * rng.uniform(0.2, 0.8) / RATE
        wave = wave + 0.15 * size * rng.normal() * np.sin(turn * grid + rng.uniform(0, 2 * np.pi))
    return wave, marks * stretch - moved, rr * stretch
