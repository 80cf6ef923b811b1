"""An analysis as text for the terminal and as one self-contained page (HTML) or sheet (PDF) for the file."""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netsuke.apps.signals.ecg import pictures, quality
from netsuke.apps.signals.ecg.parameters import Value
from netsuke.apps.signals.ecg.pipeline import Analysis
from netsuke.errors import NetsukeError

if TYPE_CHECKING:
    from jinja2 import Template

FIRST = ("heart rate", "PR", "QRS", "QT", "QTc Bazett", "QTc Fridericia", "QTc Framingham", "QTc Hodges", "RR used")
DIGITS = {"ms": 0, "/min": 0, "s": 3, "mV": 2, "%": 1, "ms²": 0, "°": 0}


@dataclass(frozen=True)
class Cell:
    """One value in words: "158 ± 12 ms", its quality, and a note: the reason, or what the number rests on."""

    text: str
    quality: str = ""
    note: str = ""


def cell(v: Value) -> Cell:
    if v.value is None:
        return Cell("–", "none", v.reason)
    if isinstance(v.value, str):
        return Cell(v.value, v.quality)
    digits = DIGITS.get(v.unit, 2)
    spread = f" ± {v.plus_minus:.{digits}f}" if v.plus_minus is not None else ""
    beats = f", {v.beats} beats" if v.beats else ""
    note = f"{v.quality}{beats}" + (f"; {v.reason}" if v.reason else "")
    return Cell(f"{v.value:.{digits}f}{spread} {v.unit}".strip(), v.quality, note)


def shape_rows(shapes: dict[str, Any]) -> list[tuple[str, Cell]]:
    """P, QRS, T, ST of the representative beat."""
    rows: list[tuple[str, Cell]] = []
    for name in ("P", "QRS", "T", "ST"):
        for key, v in shapes.get(name, {}).items():
            if isinstance(v, Value):
                rows.append((f"{name} {key}", cell(v)))
            elif key == "form":
                rows.append((f"{name} form", Cell(v or "–", "" if v else "none", shapes[name].get("reason", ""))))
            elif key == "deflections":
                text = ", ".join(f"{d['name']} {d['mV']:.2f} mV {d['ms']:.0f} ms" for d in v)
                rows.append(("QRS deflections", Cell(text or "–")))
            elif isinstance(v, float):
                rows.append((f"{name} {key}" if "/" not in key else key, Cell(f"{v:.2f}")))
    rows += [(f"beat to beat, {k}", cell(v)) for k, v in shapes.get("alternation", {}).items()]
    return rows


def screening_rows(screening: dict[str, dict[str, Any]]) -> list[tuple[str, Cell]]:
    rows = []
    for name, s in screening.items():
        if s["score"] is None:
            rows.append((name, Cell("–", "none", s["reason"])))
            continue
        digits = 0 if s["unit"] == "ms" else 2
        text = f"{s['score']:.{digits}f} ({s['low']:.{digits}f} to {s['high']:.{digits}f}) {s['unit']}".strip()
        note = f"limit {s['limit']:g}; {100 * s['share_above']:.0f} % of the draws above"
        rows.append((name, Cell(text, s["quality"], note)))
    return rows


def tables(a: Analysis) -> list[tuple[str, list[tuple[str, Cell]]]]:
    rest = [(k, cell(v)) for k, v in a.values.items() if k not in FIRST]
    out = [("Waves", shape_rows(a.shapes) + rest), ("Screening (95 % interval)", screening_rows(a.screening))]
    if a.leads:
        out.append(("Across leads", [(k, cell(v)) for k, v in a.leads.items() if isinstance(v, Value)]))
    given = [(k, cell(v)) for k, v in a.variability.items() if v.value is not None]
    absent = {v.reason: k for k, v in a.variability.items() if v.value is None}
    if absent:  # what the record is too short for is one line, not twenty
        count = sum(v.value is None for v in a.variability.values())
        given.append(
            (f"{count} more", Cell("–", "none", next(iter(absent)) if len(absent) == 1 else "a longer record"))
        )
    out.append(("Variability", given))
    return [(title, rows) for title, rows in out if rows]


def headline(a: Analysis) -> str:
    long = f"{a.seconds / 3600:.1f} h" if a.seconds > 7200 else f"{a.seconds:.0f} s"
    return f"{long} at {a.fs:g} Hz, {len(a.r)} beats"


def flag_lines(a: Analysis) -> list[tuple[str, str]]:
    parts = len(a.trend)
    return [
        (quality.sentence(f), "" if parts == 1 else f" ({max(1, round(s * parts))} of {parts} stretches)")
        for f, s in a.flags.items()
    ]


def text(a: Analysis) -> str:
    """The summary for a terminal: what a clinician asks first, then flags, waves, screening and variability."""
    lines = [f"{a.name or 'record'}, lead {a.lead}: {headline(a)}"]
    lines += [f"  ! {words}{share}" for words, share in flag_lines(a)]
    groups = [("", [(k, cell(a.values[k])) for k in FIRST if k in a.values]), *tables(a)]
    for title, rows in groups:
        lines += ["", title] if title else [""]
        width = max((len(n) for n, _ in rows), default=0)
        wide = max((len(c.text) for _, c in rows), default=0)
        lines += [f"  {n:<{width}}  {c.text:>{min(wide, 40)}}  {c.note}".rstrip() for n, c in rows]
    return "\n".join(lines)


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("netsuke.apps.signals.ecg", ".")
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
        "report.html.j2"
    )


def page(a: Analysis) -> str:
    """One page that fetches nothing: pictures are inside it."""
    from markupsafe import Markup

    drawn = {k: Markup(f(a)) for k, f in (("trace", pictures.trace), ("beat", pictures.beat), ("rate", pictures.rate))}
    first = [(k, cell(a.values[k])) for k in FIRST if k in a.values]
    return _template().render(a=a, headline=headline(a), flags=flag_lines(a), values=first, tables=tables(a), **drawn)


def sheet(a: Analysis, path: Path) -> None:
    """The same as a PDF of one A4 sheet: trace, beat, first table."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    from netsuke.apps.signals.ecg.beats import BEFORE

    d, figure = a.typical.delineation, plt.figure(figsize=(11.7, 8.3))
    figure.suptitle(f"{a.name}, lead {a.lead}: {headline(a)}", x=0.05, ha="left")
    top = figure.add_axes((0.06, 0.56, 0.92, 0.34))
    x = d.x[: 10 * 250]
    top.plot(np.arange(len(x)) / 250, x, "k", lw=0.8)
    for row in d.per_beat / 250:
        for first, last, name in ((0, 2, "P"), (3, 4, "QRS"), (5, 7, "T")):
            if np.isfinite(row[[first, last]]).all() and row[last] < 10:
                top.axvspan(row[first], row[last], color=pictures.COLOURS[name], alpha=0.18, lw=0)
    top.set(xlabel="s", ylabel="mV", xlim=(0, max(1, len(x) / 250)))
    if d.beat is not None:
        left = figure.add_axes((0.06, 0.08, 0.38, 0.38))
        left.plot((np.arange(len(d.beat.wave)) - BEFORE) * 4, d.beat.wave, "k", lw=1.2)
        for k, m in enumerate(d.marks):
            name = "P" if k < 3 else "QRS" if k < 5 else "T"
            if np.isfinite(m):
                left.axvline(4 * m, color=pictures.COLOURS[name], lw=1)
        left.set(xlabel="ms from R", ylabel="mV")
    rows = [(k, cell(a.values[k])) for k in FIRST if k in a.values]
    words = "\n".join(f"{n:<15} {c.text:>18}  {c.note[:40]}" for n, c in rows)
    flags = "\n".join(f"! {w[:70]}{s}" for w, s in flag_lines(a))
    figure.text(0.49, 0.45, f"{words}\n\n{flags}", family="monospace", size=9, va="top")
    figure.savefig(path, format="pdf", metadata={"CreationDate": None})
    plt.close(figure)


def write(a: Analysis, path: Path) -> None:
    """The report as .html or .pdf, written beside its target and renamed. Raises NetsukeError when it cannot be."""
    kind = path.suffix.lower()
    if kind not in (".html", ".htm", ".pdf"):
        raise NetsukeError(f"write {path.name}", f"the ending {kind!r} is unknown", ".html or .pdf")
    ask = f"write {path.name}"
    try:
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as e:
        raise NetsukeError(ask, e.strerror or str(e), "an existing, writable folder") from None
    try:
        if kind == ".pdf":
            os.close(handle)
            sheet(a, Path(part))
        else:
            with open(handle, "w", encoding="utf-8") as f:
                f.write(page(a))
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
