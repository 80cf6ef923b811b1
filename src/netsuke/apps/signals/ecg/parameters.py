"""From marks to what a clinician reads: intervals, four corrected QT, wave shapes, ST, axis; a reason for every gap.

Times in ms, amplitudes in mV from the level at QRS onset, `rr` in s. `plus_minus` of an interval is the spread of the
marks it is made of. On people of LUDB that the network had not seen, 88 to 99 in 100 lie closer to the cardiologists on
leads I and II, 70 to 98 on the ten other leads: no interval of fixed confidence (table in docs/ecg.md).
QTc: Bazett 1920 QT/√RR, Fridericia 1920 QT/∛RR, Framingham (Sagie 1992) QT + 154 (1 − RR), Hodges 1983 QT + 1.75 (HR − 60).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from netsuke.apps.signals.ecg import quality
from netsuke.apps.signals.ecg.beats import BEFORE
from netsuke.apps.signals.ecg.conditioning import RATE
from netsuke.apps.signals.ecg.delineate import P, T, level_before

MS = 1000 / RATE
LOBE = 0.05  # mV: a smaller lobe of P or T is ignored
DOUBTFUL = (
    "paced",
    "inverted",
    "missing in part",
    "short",
    "brisk",
    "fibrillation",
    "noisy",
)  # make an interval fair at best
FAIR, POOR = 30.0, 50.0  # ms of plus_minus from which an interval is only fair, or poor
P_CERTAIN = 0.95
PARTS = {"PR": (0, 3), "QRS": (3, 4), "QT": (3, 7), "P duration": (0, 2), "T duration": (5, 7)}
NEEDS = {"PR": ("P", "QRS"), "QRS": ("QRS",), "QT": ("QRS", "T"), "P duration": ("P",), "T duration": ("T",)}
QTC: dict[str, Callable[[float, float], float]] = {
    "Bazett": lambda qt, rr: qt / rr**0.5,
    "Fridericia": lambda qt, rr: qt / rr ** (1 / 3),
    "Framingham": lambda qt, rr: qt + 154 * (1 - rr),
    "Hodges": lambda qt, rr: qt + 1.75 * (60 / rr - 60),
}


@dataclass(frozen=True, slots=True)
class Value:
    """A measured number or the `reason` why there is none. `quality`: good, fair, poor, none."""

    value: float | str | None
    unit: str = ""
    quality: str = "none"
    beats: int = 0
    plus_minus: float | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k == "value" or v not in (None, "", 0)}


def gap(reason: str, unit: str = "") -> Value:
    return Value(None, unit, reason=reason)


def grade(plus_minus: float, flags: list[str]) -> str:
    """Quality of an interval. An unknown spread (the released method knows none) is fair at best."""
    if plus_minus >= POOR or any(f in flags for f in quality.SEVERE):
        return "poor"
    if not plus_minus < FAIR or any(f in flags for f in DOUBTFUL):
        return "fair"
    return "good"


def intervals(
    at: np.ndarray, spread: np.ndarray, rr: float, beats: int, reasons: dict[str, str], flags: list[str],
    p_present: float = 1.0,
) -> dict[str, Value]:  # fmt: skip
    """PR, QRS, QT, P and T duration in ms, QTc four ways with the RR used, from marks (8,) in samples. What rests on P is
    fair at best unless a P wave is certain (`p_present`)."""
    out = {}
    for name, (a, b) in PARTS.items():
        why = next((reasons[w] for w in NEEDS[name] if w in reasons), "")
        length = (at[b] - at[a]) * MS
        if why or not np.isfinite(length):
            out[name] = gap(why or "a mark is missing", "ms")
            continue
        spreads = float(np.hypot(spread[a], spread[b]) * MS)
        known = spreads if math.isfinite(spreads) else None
        quality_ = grade(spreads, flags)
        if "P" in NEEDS[name] and p_present < P_CERTAIN and quality_ == "good":
            quality_ = "fair"
        out[name] = Value(float(length), "ms", quality_, beats, known)
    out |= corrected(out["QT"], rr)
    out["RR used"] = Value(rr, "s", "good", beats)
    return out


def corrected(qt: Value, rr: float) -> dict[str, Value]:
    """QTc by the four formulas; outside 50 to 110 a minute Bazett's is graded no better than fair."""
    if qt.value is None or not rr > 0:
        return {f"QTc {n}": gap(qt.reason or "no RR interval", "ms") for n in QTC}
    out = {}
    for name, formula in QTC.items():
        fast = name == "Bazett" and not 50 <= 60 / rr <= 110
        grade_ = "fair" if fast and qt.quality == "good" else qt.quality
        out[f"QTc {name}"] = Value(formula(float(qt.value), rr), "ms", grade_, qt.beats, qt.plus_minus)
    return out


def form(part: np.ndarray) -> str:
    """ "+", "-", "+-", "-+" of a P or T (n,) mV above its baseline; lobes below 0.05 mV are ignored; "flat" if all are."""
    high, low = int(np.argmax(part)), int(np.argmin(part))
    lobes = sorted((at, sign) for at, sign, v in ((high, "+", part[high]), (low, "-", -part[low])) if v >= LOBE)
    return "".join(sign for _, sign in lobes) or "flat"


def wave(beat: np.ndarray, at: np.ndarray, part: slice, level: float) -> dict[str, Value | str]:
    """Form and signed amplitude of P or T, from the line between its onset and offset."""
    a, b = BEFORE + round(float(at[part.start])), BEFORE + round(float(at[part.stop - 1]))
    a, b = max(a, 0), min(b, len(beat) - 1)
    if b - a < 3:
        return {"form": "", "amplitude": gap("the wave is too narrow to be measured", "mV")}
    rest = np.linspace(beat[a], beat[b], b - a + 1) if part is P else np.full(b - a + 1, level)
    y = beat[a : b + 1] - rest
    return {"form": form(y), "amplitude": Value(float(y[np.argmax(np.abs(y))]), "mV", "good")}


def qrs_form(y: np.ndarray) -> tuple[str, list[dict[str, float | str]]]:
    """Name such as "qRs" of a QRS (n,) mV above its onset, and its deflections {name, mV, ms}; small letter: < 0.5 mV or
    less than half of the largest; deflections below 5 % of the largest are ignored."""
    limit = max(0.05 * np.max(np.abs(y)), 0.02)
    sign = np.where(y > limit, 1, np.where(y < -limit, -1, 0))
    runs: list[list[int]] = []
    for i, s in enumerate(sign):
        if s and runs and sign[runs[-1][-1]] == s:
            runs[-1].append(i)
        elif s:
            runs.append([i])
    tops = [float(y[run][np.argmax(np.abs(y[run]))]) for run in runs]
    largest, out, seen_r, primes = max((abs(t) for t in tops), default=1.0), [], False, {"r": -1, "s": -1}
    if tops and all(t < 0 for t in tops):
        return "QS", [{"name": "QS", "mV": min(tops), "ms": len(runs[0]) * MS}]
    for run, top in zip(runs, tops):
        letter = "r" if top > 0 else "s" if seen_r else "q"
        seen_r |= top > 0
        if letter in primes:
            primes[letter] += 1
        big = abs(top) >= 0.5 * largest
        name = (letter.upper() if big else letter) + "'" * max(0, primes.get(letter, 0))
        out.append({"name": name, "mV": top, "ms": (run[-1] - run[0] + 1) * MS})
    return "".join(str(d["name"]) for d in out), out


def st(beat: np.ndarray, at: np.ndarray, level: float) -> dict[str, Any]:
    """Level at J and 60 ms after it (mV from the level at QRS onset), and the form between J and T onset."""
    j = BEFORE + round(float(at[4]))
    end = BEFORE + round(float(at[5]))
    later = min(j + round(0.06 * RATE), len(beat) - 1)
    part = beat[j : max(end, j + 3)]
    slope = float(part[-1] - part[0])
    shape = "horizontal" if np.ptp(part) < 0.05 else "rising" if slope > 0 else "falling"
    return {
        "J": Value(float(beat[j] - level), "mV", "good"), "J+60": Value(float(beat[later] - level), "mV", "good"),
        "form": shape,
    }  # fmt: skip


def shapes(beat: np.ndarray, at: np.ndarray, reasons: dict[str, str], flags: list[str]) -> dict[str, Any]:
    """P, QRS, T and ST of the representative beat (288,) mV. Amplitudes in a doubtful unit are withheld."""
    doubt = next((quality.sentence(f) for f in ("unit", "clipped") if f in flags), "")
    level = level_before(beat, at)
    out: dict[str, Any] = {}
    for name, part in (("P", P), ("T", T)):
        why = reasons.get(name) or doubt
        out[name] = {"form": "", "amplitude": gap(why, "mV")} if why else wave(beat, at, part, level)
    if "QRS" in reasons or doubt:
        why = reasons.get("QRS") or doubt
        return out | {"QRS": {"form": "", "deflections": [], "reason": why}, "ST": {"form": "", "J": gap(why, "mV")}}
    a, b = (BEFORE + round(float(at[i])) for i in (3, 4))
    name, deflections = qrs_form(beat[a : b + 1] - level)
    sizes = {str(d["name"]).lower(): abs(float(d["mV"])) for d in deflections}
    t_size = out["T"]["amplitude"].value
    out["QRS"] = {
        "form": name, "deflections": deflections, "net": float(sum(float(d["mV"]) for d in deflections)),
        "Q/R": sizes["q"] / sizes["r"] if "q" in sizes and sizes.get("r") else None,
        "R/T": sizes["r"] / abs(t_size) if sizes.get("r") and t_size else None,
    }  # fmt: skip
    why = reasons.get("T")
    out["ST"] = {"form": "", "J": gap(why, "mV")} if why else st(beat, at, level)
    return out


def axis(net_i: float | None, net_iii: float | None) -> Value:
    """Electrical axis of the QRS in degrees from the net deflections (mV) of leads I and III: aVF = III + I/2."""
    if net_i is None or net_iii is None:
        return gap("needs leads I and III (or I and II)", "°")
    if math.hypot(net_i, net_iii) < 0.1:
        return gap("the deflections are too small for an axis", "°")
    return Value(math.degrees(math.atan2(2 / math.sqrt(3) * (net_iii + net_i / 2), net_i)), "°", "good")
