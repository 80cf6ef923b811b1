"""The report's pictures as SVG: the trace on ECG paper with its marks, the representative beat, rate over time.

Written by hand rather than by a plotting library, so that a day's report stays inside its memory, and to scale: 25 mm a
second and 10 mm a millivolt, as paper has been since Einthoven.
"""

from __future__ import annotations

import html

import numpy as np

from netsuke.apps.signals.ecg.beats import BEFORE
from netsuke.apps.signals.ecg.conditioning import RATE
from netsuke.apps.signals.ecg.delineate import level_before
from netsuke.apps.signals.ecg.pipeline import Analysis, Segment

MM = 4.0  # units of the drawing per millimetre of paper
SECOND, MILLIVOLT = 25 * MM, 10 * MM
ROW = 5.0  # s per row of the trace
COLOURS = {"P": "#2a6f97", "QRS": "#9b2226", "T": "#588157"}
SPANS = (("P", 0, 2), ("QRS", 3, 4), ("T", 5, 7))


def paper(width: float, height: float) -> str:
    """The grid: thin lines every millimetre, thicker ones every five."""
    lines = []
    for step, colour in ((MM, "#f6dcd8"), (5 * MM, "#e8b4ac")):
        across = "".join(f"M{x:g} 0V{height:g}" for x in np.arange(0, width + 0.1, step))
        down = "".join(f"M0 {y:g}H{width:g}" for y in np.arange(0, height + 0.1, step))
        lines.append(f'<path d="{across}{down}" stroke="{colour}" stroke-width="0.6"/>')
    return "".join(lines)


def curve(x: np.ndarray, y: np.ndarray, colour: str = "#1b1b1b", width: float = 1.4) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"/>'


def picture(width: float, height: float, inside: list[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{html.escape(title)}</title>{"".join(inside)}</svg>'
    )


def trace(a: Analysis) -> str:
    """Ten seconds of the typical stretch in two rows, with R, and P, QRS and T of every beat as bars above the trace."""
    d, s = a.typical.delineation, a.typical
    if not len(d.x):
        return ""
    offset = round((s.start - start_of(s)) * RATE)
    x = d.x[offset : offset + 2 * round(ROW * RATE)]
    high, low = float(np.clip(x.max(), 0.5, 4)) + 0.4, float(np.clip(x.min(), -4, -0.3)) - 0.2
    rows = [row(a, k * ROW, x[round(k * ROW * RATE) :][: round(ROW * RATE)], low, high) for k in (0, 1)]
    return "".join(rows)


def row(a: Analysis, begin: float, x: np.ndarray, low: float, high: float) -> str:
    """One row of the trace, from `begin` seconds after the start of the typical stretch."""
    if len(x) < RATE / 2:
        return ""
    s, width, height = a.typical, ROW * SECOND, (high - low) * MILLIVOLT
    first = s.start + begin
    inside = [paper(width, height)]
    inside.append(curve(np.arange(len(x)) / RATE * SECOND, (high - np.clip(x, low, high)) * MILLIVOLT))
    for marks, r in zip(s.marks, s.r):
        for name, on, off in SPANS:
            start, end = ((marks[k] - first) * SECOND for k in (on, off))
            if start >= 0 and end <= width:
                bar = f'width="{end - start:.1f}" height="6" rx="2" fill="{COLOURS[name]}"'
                inside.append(f'<rect x="{start:.1f}" y="3" {bar}/>')
        if 0 <= (at := (r - first) * SECOND) <= width:
            inside.append(f'<path d="M{at - 3:.1f} 12h6l-3 6z" fill="#1b1b1b"/>')
    return picture(width, height, inside, f"lead {a.lead} from second {first:g}, 25 mm/s, 10 mm/mV")


def start_of(s: Segment) -> float:
    """The second at which the segment's conditioned signal begins (its context comes before its beats)."""
    d = s.delineation
    if not len(s.r):
        return s.start
    first = np.flatnonzero(d.peaks / RATE >= 0)[0]
    guess = [s.r[0] - p / RATE for p in d.peaks[first:]]
    return float(min(guess, key=lambda g: abs(g - max(0.0, s.start - 2.0))))


def beat(a: Analysis) -> str:
    """The representative beat, twice as large as on paper, with its marks, their spread as bands, and the intervals."""
    d = a.typical.delineation
    if d.beat is None:
        return ""
    y = d.beat.wave - level_before(d.beat.wave, d.marks)
    low, high = float(min(y.min(), -0.2)) - 0.15, float(max(y.max(), 0.3)) + 0.45
    zoom = min(2.0, 5.0 / (high - low))
    wide, tall = 3 * SECOND, zoom * MILLIVOLT * 1.5
    width, height = len(y) / RATE * wide, (high - low) * tall
    at_x = lambda sample: (sample + BEFORE) / RATE * wide  # noqa: E731 - one axis, used in three places
    inside = [paper(width, height)]
    for name, first, last in SPANS:
        for k in (first, last):
            if np.isfinite(d.marks[k]):
                band = float(np.nan_to_num(d.spread[k])) / RATE * wide
                x = at_x(d.marks[k])
                inside.append(
                    f'<rect x="{x - band:.1f}" y="0" width="{2 * band + 0.1:.1f}" height="{height:.1f}" '
                    f'fill="{COLOURS[name]}" opacity="0.14"/>'
                    f'<path d="M{x:.1f} 0V{height:.1f}" stroke="{COLOURS[name]}" stroke-width="1.2"/>'
                )
    inside.append(curve(at_x(np.arange(len(y)) - BEFORE), (high - y) * tall, width=2.0))
    for k, (name, first, last) in enumerate((("PR", 0, 3), ("QRS", 3, 4), ("QT", 3, 7))):
        if np.isfinite(d.marks[[first, last]]).all():
            x0, x1, y0 = at_x(d.marks[first]), at_x(d.marks[last]), 16 + 15 * k
            inside.append(
                f'<path d="M{x0:.1f} {y0}H{x1:.1f}" stroke="#333" stroke-width="1"/><text x="{x1 + 4:.1f}" y="{y0 + 4}" '
                f'font-size="13" fill="#333">{name} {(d.marks[last] - d.marks[first]) / RATE * 1e3:.0f} ms</text>'
            )
    return picture(width, height, inside, f"representative beat of {int(d.beat.used.sum())} beats")


def rate(a: Analysis) -> str:
    """Heart rate over time from every RR, for records of more than a minute."""
    rr = np.diff(a.r)
    good = (rr > 0.25) & (rr < 3)
    if a.seconds < 60 or good.sum() < 20:
        return ""
    t, hr = a.r[1:][good], 60 / rr[good]
    step = max(1, len(t) // 800)
    count = len(t) // step
    t, hr = (v[: count * step].reshape(count, step) for v in (t, hr))
    t, middle, low, high = t.mean(1), np.median(hr, axis=1), hr.min(1), hr.max(1)
    bottom, top = float(np.floor(low.min() / 10) * 10), float(np.ceil(high.max() / 10) * 10)
    width, height = 1000.0, 180.0
    x, to_y = 40 + t / a.seconds * (width - 50), lambda v: 8 + (top - v) / max(top - bottom, 1) * (height - 34)
    inside = []
    for v in np.linspace(bottom, top, 4):
        inside.append(f'<path d="M40 {to_y(v):.1f}H{width:g}" stroke="#ddd"/>')
        inside.append(f'<text x="4" y="{to_y(v) + 4:.1f}" font-size="12" fill="#555">{v:.0f}</text>')
    band = np.concatenate((np.stack((x, to_y(high)), 1), np.stack((x, to_y(low)), 1)[::-1]))
    inside.append(f'<polygon points="{" ".join(f"{p:.1f},{q:.1f}" for p, q in band)}" fill="#9b2226" opacity="0.2"/>')
    inside.append(curve(x, to_y(middle), COLOURS["QRS"], 1.2))
    unit, size = ("h", 3600) if a.seconds > 7200 else ("min", 60)
    for v in np.linspace(0, a.seconds, 5):
        inside.append(
            f'<text x="{40 + v / a.seconds * (width - 70):.0f}" y="{height - 6:g}" font-size="12" fill="#555">'
            f"{v / size:.3g} {unit}</text>"
        )
    return picture(width, height, inside, "heart rate per minute over time")
