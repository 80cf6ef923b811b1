"""What is wrong with a stretch of signal, in words: each flag is a code and a sentence for the person who reads it.

A flag never changes a number. Fatal ones (nothing to be measured) become the reason of every missing value; the others
stand beside the values and lower their quality.
"""

from __future__ import annotations

import numpy as np

from netsuke.apps.signals.ecg.beats import LIKE, Beat
from netsuke.apps.signals.ecg.conditioning import RATE, hum, zero_phase

FATAL = ("missing", "flat", "noise only")
SENTENCES = {
    "missing": "samples are missing or not finite",
    "flat": "the lead is flat: an electrode is off, the channel is empty, or V were taken for mV",
    "partly flat": "the lead is flat for part of the time",
    "clipped": "the tops of the waves are cut off at the recorder's limit",
    "mains": "mains hum was found and filtered out",
    "noisy": "noise: small waves are less certain",
    "very noisy": "strong muscle noise or an unsteady electrode: small waves are lost",
    "noise only": "no two beats are alike: noise, or no heart in the signal",
    "wander": "the baseline wanders strongly",
    "unit": "the QRS is outside 0.1 to 10 mV: is the unit right?",
    "inverted": "P wave and QRS point down: are the electrodes swapped?",
    "irregular": "the rhythm is irregular",
    "fibrillation": "irregular rhythm without a steady P wave: atrial fibrillation is possible",
    "paced": "pacing spikes",
    "extrasystoles": "beats of another shape or out of rhythm were left out of the typical beat",
    "fast": "at this rate the waves overlap",
    "brisk": "above 120 a minute T and P begin to touch",
    "short": "fewer than three beats",
}
SEVERE = ("clipped", "very noisy", "partly flat", "fast", "unit")  # these make the intervals' quality "poor"
HUM_FLAG = 0.03  # mV
FLAT = 0.005  # mV peak to peak within a second
# Set on all 200 people of LUDB, with no one held out. Over the height of the QRS: noise above 45 Hz (LUDB as recorded:
# 0.015 in 98 of 100; noise 6 dB below the signal: 0.021 or more in 95 of 100, at 0 dB 0.04), and the spread between
# aligned beats (as recorded: 0.06 in 98 of 100)
NOISY, VERY_NOISY, UNSTEADY = 0.02, 0.045, 0.09
FASTEST_RR, BRISK_RR = 0.36, 0.5  # s: at 167 a minute T and the next P lie on each other, from 120 on they touch


def of_signal(x: np.ndarray, fs: float) -> list[str]:
    """Flags of one lead in mV at its own rate, before anything is filtered."""
    flags = []
    bad = ~np.isfinite(x)
    if bad.mean() > 0.5:
        return ["missing"]
    if bad.any():
        flags.append("missing in part")
    good = x[~bad]
    second = max(1, int(fs))
    whole = good[: len(good) // second * second].reshape(-1, second)
    still = np.ptp(whole, axis=1) < FLAT if len(whole) else np.array([np.ptp(good) < FLAT])
    if still.mean() > 0.8:
        return [*flags, "flat"]
    if still.any():
        flags.append("partly flat")
    if clipped(good):
        flags.append("clipped")
    if any(a > HUM_FLAG for a in hum(np.nan_to_num(x), fs).values()):
        flags.append("mains")
    level = np.mean(whole, axis=1)
    if len(level) > 2 and np.ptp(level) > 1.0:
        flags.append("wander")
    return flags


def clipped(x: np.ndarray) -> bool:
    """Whether runs of at least three samples sit on the very largest or smallest value, again and again."""
    top, bottom = x.max(), x.min()
    if top == bottom:
        return False
    for edge in (top, bottom):
        at = (x == edge).astype(np.int8)
        runs = np.diff(np.concatenate(([0], at, [0])))
        lengths = np.flatnonzero(runs == -1) - np.flatnonzero(runs == 1)
        if (lengths >= 3).sum() >= 2 and abs(edge - np.median(x)) > 0.2 * (top - bottom):
            return True
    return False


def pacing_spikes(x: np.ndarray, fs: float, peaks: np.ndarray) -> bool:
    """Whether most beats follow a spike of 1 to 4 ms, far steeper than a QRS. `peaks` are R at 250 Hz.

    A spike comes up and goes down within a few samples, so the second difference changes its sign twice with nearly
    equal sizes; at rates below 360 Hz recorders smooth it away and nothing can be said.
    """
    if fs < 360 or len(peaks) < 3:
        return False
    width = max(1, round(0.002 * fs))
    x = np.nan_to_num(x)
    edge = np.zeros(len(x))
    edge[width:-width] = x[width:-width] - 0.5 * (x[: -2 * width] + x[2 * width :])  # a peak over both its sides
    size, found = np.median(np.abs(edge)) / 0.6745 + 1e-6, 0
    for p in peaks * fs / RATE:
        low, high = int(p - 0.2 * fs), int(p + 0.01 * fs)
        if low < 0:
            continue
        part = np.abs(edge[low:high])
        k = int(np.argmax(part))
        aside = np.concatenate((part[: max(0, k - 3 * width)], part[k + 3 * width + 1 :]))
        found += bool(part[k] > max(25 * size, 0.12) and len(aside) and part[k] > 3.0 * aside.max())
    return found >= 0.6 * len(peaks)


def irregularity(rr: np.ndarray) -> float:
    """Median absolute change from one RR to the next over the median RR: 0.02 in sinus rhythm, above 0.1 in AF."""
    return float(np.median(np.abs(np.diff(rr))) / np.median(rr)) if len(rr) > 3 else 0.0


def of_beats(x: np.ndarray, peaks: np.ndarray, beat: Beat | None) -> list[str]:
    """Flags of a lead at 250 Hz, its high frequencies kept, whose R `peaks` and representative `beat` are known."""
    if beat is None:
        return ["short" if len(peaks) < 3 else "noise only"]
    flags = []
    height = float(np.ptp(beat.wave[90:135]))
    share = float(beat.used.mean())
    if not 0.1 <= height <= 10:
        flags.append("unit")
    rumble = float(np.median(np.abs(zero_phase(x, "rumble")))) / 0.6745
    if beat.noise > UNSTEADY * height or rumble > VERY_NOISY * height:
        flags.append("very noisy")
    elif rumble > NOISY * height:
        flags.append("noisy")
    like = beat.like[np.isfinite(beat.like)]
    if len(peaks) >= 4 and (like >= LIKE).mean() < 0.34:
        flags.append("noise only")
    elif (like < LIKE).any() or share < 0.6:
        flags.append("extrasystoles")
    rr = np.diff(peaks) / RATE
    if irregularity(rr) > 0.09:
        flags.append("irregular")
    if beat.rr < BRISK_RR:
        flags.append("fast" if beat.rr < FASTEST_RR else "brisk")
    if len(peaks) < 3:
        flags.append("short")
    return flags


def sentence(flag: str) -> str:
    return SENTENCES.get(flag, "some samples are missing and were bridged" if flag == "missing in part" else flag)
