"""From a record to everything that is reported of it: block by block, so that a day needs no more memory than a minute.

A record of up to a minute is one block; a longer one is cut into blocks of 30 s with two seconds of context on either
side. Every block has a representative beat and intervals of its own; the record's are the medians over its blocks. R
peaks run through, and with them rate and variability.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from netsuke.apps.signals.ecg import parameters, quality
from netsuke.apps.signals.ecg.conditioning import CONTEXT, RATE
from netsuke.apps.signals.ecg.delineate import Delineation, delineate
from netsuke.apps.signals.ecg.morphology import alternation
from netsuke.apps.signals.ecg.parameters import Value, gap
from netsuke.apps.signals.ecg.record import SHORTEST, Record, of_array
from netsuke.apps.signals.ecg.rpeaks import refined
from netsuke.apps.signals.ecg.screening import screen
from netsuke.apps.signals.ecg.variability import hrv
from netsuke.errors import NetsukeError

WHOLE, BLOCK = 60.0, 30.0  # s
GRADES = ("poor", "fair", "good")
SAME_BEAT = 0.2  # s: two blocks' peaks closer than this are one beat seen twice


@dataclass(frozen=True)
class Block:
    """`x` (n,) mV at the record's rate, from second `start` on; beats from `keep_from` to `keep_to` belong to it."""

    x: np.ndarray
    start: float
    keep_from: float
    keep_to: float


@dataclass(frozen=True)
class Segment:
    """What one block gave. `r` (P,) s from the record's start, `marks` (P, 8) s, `why` (P,) reasons per beat."""

    start: float
    end: float
    r: np.ndarray
    marks: np.ndarray
    why: list[str]
    values: dict[str, Value]
    flags: list[str]
    delineation: Delineation


@dataclass(frozen=True, slots=True)
class Stretch:
    """What is kept of a segment when it has passed: a row of the trend."""

    start: float
    beats: int
    rate: float | None
    values: dict[str, Value]
    flags: list[str]

    def as_dict(self) -> dict[str, Any]:
        some = {k: self.values[k].value for k in ("PR", "QRS", "QT")}
        return {"start": self.start, "beats": self.beats, "heart rate": self.rate, **some, "flags": self.flags}


@dataclass
class Analysis:
    """All that is known of one lead; `as_dict` for JSON. `typical` is the segment whose QT is the record's median."""

    name: str
    lead: str
    fs: float
    seconds: float
    method: str
    values: dict[str, Value]
    shapes: dict[str, Any]
    variability: dict[str, Value]
    screening: dict[str, dict[str, Any]]
    flags: dict[str, float]  # share of the segments
    r: np.ndarray
    marks: np.ndarray
    why: list[str]
    trend: list[dict[str, Any]]
    typical: Segment
    leads: dict[str, Any] = field(default_factory=dict)

    def as_dict(self, beats: bool = False) -> dict[str, Any]:
        """Plain values; with `beats` also R and marks of every beat in seconds (NaN as None) and their reasons."""
        out: dict[str, Any] = {
            "record": self.name, "lead": self.lead, "rate": self.fs, "seconds": self.seconds, "method": self.method,
            "values": plain(self.values), "shapes": plain(self.shapes), "variability": plain(self.variability),
            "screening": plain(self.screening), "across leads": plain(self.leads), "trend": plain(self.trend),
            "flags": [{"flag": f, "share": s, "meaning": quality.sentence(f)} for f, s in self.flags.items()],
        }  # fmt: skip
        if beats:
            out["beats"] = plain({"r": self.r, "marks": self.marks, "reasons": self.why})
        return out


def plain(x: Any) -> Any:
    """As JSON can hold it: values, arrays and NaN turned into dictionaries, lists and None."""
    if isinstance(x, Value):
        return plain(x.as_dict())
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, np.ndarray | list | tuple):
        return [plain(v) for v in (x.tolist() if isinstance(x, np.ndarray) else x)]
    if isinstance(x, float | np.floating):
        return float(x) if math.isfinite(x) else None
    return x.item() if isinstance(x, np.generic) else x


def blocks(record: Record, lead: int) -> Iterator[Block]:
    """The record in one piece, or in pieces of 30 s with context; a rest of less than 10 s joins the piece before it."""
    total, fs = record.seconds, record.fs
    count = 1 if total <= WHOLE else max(1, int((total + BLOCK - 10) // BLOCK))
    for k in range(count):
        start, end = k * BLOCK, total if k == count - 1 else (k + 1) * BLOCK
        low, high = max(0.0, start - CONTEXT), min(total, end + CONTEXT)
        x = record.millivolts(lead, round(low * fs), round(high * fs))
        if k % 100 == 99:
            record.forget()
        yield Block(x, round(low * fs) / fs, start, end)


def segments(
    source: Iterable[Block], fs: float, method: str = "netsuke", weights: str = "default"
) -> Iterator[Segment]:
    """One Segment per block; beats near a border are kept by the block they lie in."""
    last = -math.inf
    for block in source:
        d = delineate(block.x, fs, method, weights)
        r = block.start + (refined(d.x, d.peaks) if len(d.peaks) else d.peaks) / RATE
        keep = (r >= block.keep_from) & (r < block.keep_to) & (r > last + SAME_BEAT)
        if keep.any():
            last = float(r[keep][-1])
        if d.beat is None:
            values = dict.fromkeys(parameters.PARTS, gap(d.reasons["QRS"], "ms"))
            values |= parameters.corrected(values["QT"], math.nan)
        else:
            beats = int((d.beat.used & keep).sum())
            values = parameters.intervals(d.marks, d.spread, d.beat.rr, beats, d.reasons, d.flags, d.p_present)
        why = [w for w, k in zip(d.beat_reasons, keep) if k]
        marks = block.start + d.per_beat[keep] / RATE
        yield Segment(block.keep_from, block.keep_to, r[keep], marks, why, values, d.flags, d)


def analyse(
    record: Record, lead: str | None = None, *, method: str = "netsuke", weights: str = "default",
    across: bool = True,
) -> Analysis:  # fmt: skip
    """Everything about one lead (by name or number; default II or the first) of `record`.

    `across` adds what needs several leads (axis, QT dispersion) from the first minute. Raises NetsukeError for a record
    of less than three seconds, an unknown lead or method; bad signal gives reasons, not errors.
    """
    index = record.lead_index(lead)
    if record.seconds < SHORTEST:
        raise NetsukeError(
            f"read {record.name or 'the record'}", f"it lasts {record.seconds:.2f} s",
            f"{SHORTEST:g} s or more, better ten", "a longer record, or the right --rate",
        )  # fmt: skip
    stretches: list[Stretch] = []
    r_parts, mark_parts, why, best = [], [], [], None
    for s in segments(blocks(record, index), record.fs, method, weights):
        if best is None or (s.delineation.beat is not None and best.delineation.beat is None):
            best = s
        stretches.append(Stretch(s.start, len(s.r), typical_rate(s.r), s.values, s.flags))
        r_parts.append(s.r)
        mark_parts.append(s.marks)
        why += s.why
    r, marks = np.concatenate(r_parts), np.concatenate(mark_parts)
    r_parts.clear()
    mark_parts.clear()
    typical = middle_segment(record, index, stretches, method, weights) if len(stretches) > 1 else best
    values = merged([s.values for s in stretches])
    flags = Counter(f for s in stretches for f in dict.fromkeys(s.flags))
    values |= rates(r, len(stretches), flags)
    rhythm = hrv(np.diff(r), r[1:]) if len(r) > 1 else {"SDNN": gap("fewer than two beats", "ms")}
    d = typical.delineation
    shapes: dict[str, Any] = {}
    if d.beat is not None:
        shapes = parameters.shapes(d.beat.wave, d.marks, d.reasons, d.flags)
        shapes["alternation"] = alternation(d.x, d.peaks, d.beat)
    out = Analysis(
        record.name, record.leads[index], record.fs, record.seconds, method, values, shapes, rhythm,
        screen(marks, values, record.sex, r), {k: v / len(stretches) for k, v in flags.most_common()},
        r, marks, why, [s.as_dict() for s in stretches], typical,
    )  # fmt: skip
    if across and 1 < len(record.leads) <= 16:
        out.leads = across_leads(record, method, weights)
    return out


def typical_rate(r: np.ndarray) -> float | None:
    """Beats per minute by the median RR of R at `r` (P,) s; None for fewer than three."""
    return 60 / float(np.median(np.diff(r))) if len(r) > 2 else None


def middle_segment(record: Record, lead: int, stretches: list[Stretch], method: str, weights: str) -> Segment:
    """The block whose QT (or else beat count) is nearest to the median of all, delineated once more."""
    key = np.array([float(s.values["QT"].value or math.nan) for s in stretches])
    if np.isnan(key).all():
        key = np.array([float(s.beats) for s in stretches])
    chosen = int(np.nanargmin(np.abs(key - np.nanmedian(key))))
    one = next(b for k, b in enumerate(blocks(record, lead)) if k == chosen)
    return next(segments([one], record.fs, method, weights))


def merged(rows: list[dict[str, Value]]) -> dict[str, Value]:
    """Median over the segments that have a value, with the lower median of their grades; else the commonest reason."""
    out: dict[str, Value] = {}
    for name in dict.fromkeys(k for row in rows for k in row):
        have = [row[name] for row in rows if name in row and row[name].value is not None]
        lack = [row[name].reason for row in rows if name in row and row[name].value is None]
        unit = next((row[name].unit for row in rows if name in row), "")
        if not have:
            out[name] = gap(Counter(lack).most_common(1)[0][0], unit)
            continue
        ranks = sorted(GRADES.index(v.quality) for v in have)
        rank = ranks[(len(ranks) - 1) // 2]
        if len(lack) > len(have):
            rank = min(rank, 1)
        spreads = [v.plus_minus for v in have if v.plus_minus is not None]
        reason = (
            f"missing in {len(lack)} of {len(rows)} stretches: {Counter(lack).most_common(1)[0][0]}" if lack else ""
        )
        out[name] = Value(
            float(np.median([v.value for v in have])), unit, GRADES[rank], sum(v.beats for v in have),
            float(np.median(spreads)) if spreads else None, reason,
        )  # fmt: skip
    return out


def rates(r: np.ndarray, total: int, flags: Counter[str]) -> dict[str, Value]:
    """Heart rate per minute (60 over the median RR), its lowest and highest over eight beats; R at `r` (N,) s."""
    rr = np.diff(r)
    rr = rr[(rr > 0.2) & (rr < 4)]
    bad = sum(flags[f] for f in ("noise only", "flat", "missing", "short"))
    if len(rr) < 2 or bad >= total:
        worst = next((f for f in ("missing", "flat", "noise only") if flags[f]), "short")
        return {k: gap(quality.sentence(worst), "/min") for k in ("heart rate", "lowest rate", "highest rate")}
    doubtful = sum(flags[f] for f in ("very noisy", "partly flat", "missing in part"))
    q = "good" if bad + doubtful == 0 else "fair" if bad + doubtful <= total / 4 else "poor"
    width = min(8, len(rr))
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(rr, width), axis=1)
    both = (60 / float(smooth.max()), 60 / float(smooth.min()))
    return {
        "heart rate": Value(60 / float(np.median(rr)), "/min", q, len(r)),
        "lowest rate": Value(both[0], "/min", q, len(r)), "highest rate": Value(both[1], "/min", q, len(r)),
    }  # fmt: skip


def across_leads(record: Record, method: str, weights: str) -> dict[str, Any]:
    """Axis from I and III (or I and II), QT dispersion, and the intervals of every lead, over the first minute."""
    net: dict[str, float | None] = {}
    rows: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(record.leads):
        x = record.millivolts(i, 0, round(min(record.seconds, BLOCK) * record.fs))
        s = next(segments([Block(x, 0.0, 0.0, math.inf)], record.fs, method, weights))
        rows[name] = {k: s.values[k].value for k in ("PR", "QRS", "QT")}
        d = s.delineation
        if d.beat is not None:
            shape = parameters.shapes(d.beat.wave, d.marks, d.reasons, d.flags)
            net[name.upper()] = shape["QRS"].get("net")
    if "III" not in net and net.get("I") is not None and net.get("II") is not None:
        net["III"] = net["II"] - net["I"]  # Einthoven
    qt = [row["QT"] for row in rows.values() if row["QT"] is not None]
    spread = Value(max(qt) - min(qt), "ms", "fair", len(qt)) if len(qt) >= 6 else gap("needs QT in six leads", "ms")
    return {"axis": parameters.axis(net.get("I"), net.get("III")), "QT dispersion": spread, "leads": rows}


def intervals(x: np.ndarray, fs: float, lead: str = "II", **how: Any) -> dict[str, Value]:
    """PR, QRS, QT, QTc, durations, RR used and heart rate of one lead `x` (N,) in mV at `fs`, each a `Value`."""
    return analyse(of_array(x, fs, (lead,)), lead, across=False, **how).values
