"""One stretch of one lead: R peaks, the representative beat with its marks, every beat's marks, and reasons for gaps.

The network marks the representative beat (network.py). A single beat takes those marks over: its P and its T are moved
to where they fit best, within 24 ms of where the representative ones lie. A beat whose wave fits nowhere, or that is of
another shape, has NaN there and a reason, so that all arrays have one row per R peak.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from netsuke.apps.signals.ecg import network, quality
from netsuke.apps.signals.ecg.beats import BEFORE, LIKE, Beat, best_shifts, representative
from netsuke.apps.signals.ecg.conditioning import HUM, at_250, hum, zero_phase
from netsuke.apps.signals.ecg.network import MARKS
from netsuke.apps.signals.ecg.rpeaks import detect
from netsuke.errors import NetsukeError

METHODS = ("netsuke", "released")
P_SURE = 0.5  # below it the network sees no P wave
P_SURE_IF = {"irregular": 0.9, "paced": 0.9}  # f waves and spikes can average to something that looks like a P
HASTE = 0.004  # of correlation per sample: a wave moves only for a reason
FIT = 0.5  # correlation that a single beat's P or T must have with the representative one
P, QRS, T = slice(0, 3), slice(3, 5), slice(5, 8)


@dataclass(frozen=True)
class Delineation:
    """`x` (N,) the conditioned lead at 250 Hz and `peaks` (P,) its R; `marks`, `spread` (8,) of `beat` in samples from R
    (NaN: not there); `per_beat` (P, 8) samples of `x`; `reasons` says of "P", "QRS", "T" why they are missing,
    `beat_reasons` (P,) the same of each beat ("" for none)."""

    x: np.ndarray
    peaks: np.ndarray
    beat: Beat | None
    marks: np.ndarray
    spread: np.ndarray
    p_present: float
    per_beat: np.ndarray
    reasons: dict[str, str]
    beat_reasons: list[str]
    flags: list[str]


def delineate(x: np.ndarray, fs: float, method: str = "netsuke", weights: str = "default") -> Delineation:
    """Marks of one lead `x` (N,) in mV at `fs` Hz, a stretch of 2 to 60 seconds (longer ones: pipeline.analyse).

    `method` "netsuke" or "released" (released.py); `weights` names those of the network.
    Bad signal gives NaN with reasons. Raises NetsukeError for an unknown method.
    """
    if method not in METHODS:
        raise NetsukeError(f"delineate by the method {method!r}", "there is none of that name", ", ".join(METHODS))
    flags = quality.of_signal(x, fs)
    fatal = next((f for f in flags if f in quality.FATAL), None)
    if fatal:
        return nothing(np.zeros(0), np.zeros(0, np.int64), flags, fatal)
    raw = bridged(x)
    whole = at_250(raw, fs, tuple(f for f, a in hum(raw, fs).items() if a > HUM))
    y = zero_phase(whole, "band")
    if method == "released":
        from netsuke.apps.signals.ecg.released import peaks_and_marks

        peaks, found = peaks_and_marks(raw, fs)
    else:
        peaks, found = detect(y), None
    beat = representative(y, peaks) if len(peaks) >= 2 else None
    flags += quality.of_beats(whole, peaks, beat)
    fatal = next((f for f in flags if f in ("noise only", "short")), None)
    if beat is None or fatal:
        return nothing(y, peaks, flags, fatal or "short")
    if found is None:
        found = network.mark(beat.wave, beat.rr, weights)
    if quality.pacing_spikes(raw, fs, peaks):
        flags.append("paced")
    flags, reasons, at, spread = judged(found, flags, beat, learned=method == "netsuke")
    per_beat, why = single_beats(y, peaks, beat, at, reasons)
    return Delineation(y, peaks, beat, at, spread, found.p_present, per_beat, reasons, why, flags)


def bridged(x: np.ndarray) -> np.ndarray:
    """Missing samples replaced by a straight line between their neighbours."""
    bad = ~np.isfinite(x)
    if not bad.any():
        return np.asarray(x, dtype=np.float64)
    return np.interp(np.arange(len(x)), np.flatnonzero(~bad), x[~bad])


def nothing(x: np.ndarray, peaks: np.ndarray, flags: list[str], fatal: str) -> Delineation:
    """No marks at all, because of `fatal`."""
    why = quality.sentence(fatal)
    gaps = np.full(8, np.nan)
    rows = np.full((len(peaks), 8), np.nan)
    return Delineation(
        x, peaks, None, gaps, gaps, 0.0, rows, dict.fromkeys(("P", "QRS", "T"), why), [why] * len(peaks),
        list(dict.fromkeys([*flags, fatal])),
    )  # fmt: skip


def judged(
    found: network.Marks, flags: list[str], beat: Beat, learned: bool
) -> tuple[list[str], dict[str, str], np.ndarray, np.ndarray]:
    """Flags completed, reasons for waves that are not believed, marks with NaN for those, their spread."""
    at, spread, reasons = found.at.copy(), found.spread.copy(), {}
    limit = max([P_SURE, *(v for k, v in P_SURE_IF.items() if k in flags)])
    unsure = learned and found.p_present < limit
    if unsure and "irregular" in flags:
        flags = [*(f for f in flags if f != "irregular"), "fibrillation"]
    if unsure:
        cause = next((f for f in ("fibrillation", "paced") if f in flags), None)
        reasons["P"] = quality.sentence(cause) if cause else "no P wave is seen before the QRS"
    elif "fast" in flags:
        reasons["P"] = quality.sentence("fast")
    elif not at[0] < at[2] <= at[3] + 2:
        reasons["P"] = "the marks of the P wave are out of order"
    if not at[3] < at[4]:
        reasons["QRS"] = "the marks of the QRS are out of order"
    if "fast" in flags:
        reasons["T"] = quality.sentence("fast")
    elif not at[4] <= at[6] < at[7]:
        reasons["T"] = "the marks of the T wave are out of order"
    for name, part in (("P", P), ("QRS", QRS), ("T", T)):
        if name in reasons or not np.isfinite(at[part]).all():
            reasons.setdefault(name, "the wave was not found")
            at[part] = spread[part] = np.nan
    core = beat.wave - level_before(beat.wave, at)
    if "P" not in reasons and core[BEFORE + round(at[1])] < 0 and np.sum(core[BEFORE - 20 : BEFORE + 20]) < 0:
        flags = [*flags, "inverted"]
    return flags, reasons, at, spread


def level_before(wave: np.ndarray, at: np.ndarray) -> float:
    """mV at QRS onset, mean of 12 ms: the level from which amplitudes are counted; the median if there is no onset."""
    if not np.isfinite(at[3]):
        return float(np.median(wave))
    k = BEFORE + round(float(at[3]))
    return float(np.mean(wave[max(0, k - 2) : k + 1]))


def single_beats(
    x: np.ndarray, peaks: np.ndarray, beat: Beat, at: np.ndarray, reasons: dict[str, str]
) -> tuple[np.ndarray, list[str]]:
    """Every beat's marks in samples of `x` (P, 8), and why some are missing (P,)."""
    out = np.full((len(peaks), len(MARKS)), np.nan)
    same, start = beat.like >= LIKE, peaks + beat.shift
    said = [[] if s else ["beyond the record" if e else "another shape"] for s, e in zip(same, np.isnan(beat.like))]
    if "QRS" not in reasons:
        out[same, QRS] = start[same, None] + at[QRS]
    for name, part in (("P", P), ("T", T)):
        if name in reasons:
            continue
        low, high = BEFORE + int(at[part][0]) - 3, BEFORE + int(at[part][2]) + 4
        low, high = max(low, 0), min(high, len(beat.wave))
        if high - low < 5:  # marks at the very edge of the window leave nothing to compare
            continue
        moved, fit = best_shifts(x, start + low - BEFORE, beat.wave[low:high], HASTE)
        good = same & (fit >= FIT)
        out[good, part] = (start + moved)[good, None] + at[part]
        for i in np.flatnonzero(same & ~good):
            said[i].append(f"{name} beyond the record" if np.isnan(fit[i]) else f"no {name} like the typical one")
    return out, ["; ".join(s) for s in said]
