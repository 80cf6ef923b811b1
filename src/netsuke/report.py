"""The proof that `netsuke fit` leaves behind: `report.json`, `report.html` beside it, and the table on the terminal.

A report is a plain dictionary (the fit verb fills it); this file turns it into words. Every part is optional: what was
not measured is left out or shown as a dash, never guessed. Sizes are bytes, times seconds, energies joules, `cut`,
`max_loss` and `loss_of_quality` shares. The pictures are made in `report_plots.py`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netsuke.devices.budget import format_bytes, format_seconds
from netsuke.errors import NetsukeError

if TYPE_CHECKING:
    from jinja2 import Template
    from rich.table import Table

DASH = "–"
LATENCY_NAMES = {"per_token": "time per token", "first_token": "time to first token", "per_run": "time per run"}
TEXT_METRICS = {"perplexity", "bits_per_byte"}


@dataclass(frozen=True)
class Line:
    """One row of the before/after table, ready to print. `use` is what is taken of the limit (1.0: all of it)."""

    what: str
    before: str
    after: str
    change: str = ""
    planned: str = ""  # what the allocator promised before the real thing was measured
    limit: str = ""
    use: float | None = None
    use_before: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool | None:
        return None if self.use is None else self.use <= 1


@dataclass(frozen=True)
class Difference:
    """One row of a comparison of two reports; `change` is b against a."""

    what: str
    a: str
    b: str
    change: str = ""


def finite(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def size(n: float | None) -> str:
    return format_bytes(n) if finite(n) else DASH


def duration(s: float | None) -> str:
    return format_seconds(s) if finite(s) else DASH


def energy(j: float | None) -> str:
    """Joules with a readable unit: 0.0021 -> "2.10 mJ"."""
    if not finite(j):
        return DASH
    scale, unit = next(((s, u) for s, u in ((1.0, "J"), (1e-3, "mJ")) if j >= s), (1e-6, "µJ"))
    return f"{figure(j / scale)} {unit}"


def figure(x: float | None, digits: int = 3) -> str:
    """A plain number with significant digits kept: 9.4 -> "9.40"."""
    if not finite(x):
        return DASH
    return f"{x:#.{digits}g}".rstrip(".") if 1e-3 <= abs(x) < 1e5 else f"{x:.{digits}g}"


def percent(share: float | None, signed: bool = True) -> str:
    """A share as a percentage: -0.694 -> "−69 %", 0.0312 -> "+3.1 %"."""
    if not finite(share):
        return ""
    value = 100 * share
    places = 0 if abs(value) >= 10 and abs(abs(value) - 100) >= 0.5 else 1
    text = f"{abs(value):.{places}f}"
    sign = "" if float(text) == 0 else "−" if value < 0 else "+" if signed else ""
    return f"{sign}{text} %"


def pair(write: Callable[[float | None], str], a: float | None, b: float | None) -> tuple[str, str]:
    """Both numbers as text; figures with as many digits (3 to 6) and sizes to the byte if that tells them apart."""
    left, right = write(a), write(b)
    if left == right and a != b and write is size:
        return f"{a:,} B", f"{b:,} B"
    for digits in range(4, 7):
        if left == right and a != b and write is figure:
            left, right = figure(a, digits), figure(b, digits)
    return left, right


def change(before: float | None, after: float | None) -> str:
    return percent(after / before - 1) if finite(before) and finite(after) and before else ""


def section(report: dict, *path: str) -> dict:
    """A nested dictionary of the report, empty where it is missing or null."""
    for key in path:
        report = report.get(key) or {}
    return report if isinstance(report, dict) else {}


def data_word(report: dict) -> str:
    return "text" if section(report, "metric").get("name") in TEXT_METRICS else "data"


def metric_name(report: dict) -> str:
    return str(section(report, "metric").get("name") or "quality").replace("_", " ")


def device_name(report: dict) -> str:
    """ "the Raspberry Pi 4": a card's title up to its first comma, where the processor begins."""
    device = section(report, "device")
    if device.get("name") == "this":
        return "this machine"
    title = str(device.get("title") or device.get("name") or "device").partition(",")[0]
    article, _, rest = title.partition(" ")
    return f"{article.lower()} {rest}" if article.lower() in ("a", "an", "the", "this") else f"the {title}"


def plain(value: Any) -> Any:
    """The report as JSON can hold it: tuples become lists, NumPy scalars numbers, paths text, NaN and infinity null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value)


def lines(report: dict) -> list[Line]:
    """The before/after table: quality, storage, memory, latency, energy, each with its limit if one was set."""
    return [*_quality_lines(report), *_resource_lines(report)]


def _quality_lines(report: dict) -> Iterator[Line]:
    before, after = section(report, "before", "quality"), section(report, "after", "quality")
    limit, lost = section(report, "budget").get("max_loss"), section(report, "after").get("loss_of_quality")
    up = bool(section(report, "metric").get("higher_is_better"))
    name, word = metric_name(report), data_word(report)
    for split, note in (("test", "held out, scored once"), ("validation", "guided the choices")):
        b, a = before.get(split), after.get(split)
        if not finite(b) and not finite(a):
            continue
        use = None
        if split == "test" and finite(limit) and limit > 0:
            if not finite(lost) and finite(a) and finite(b) and b:
                lost = (b - a if up else a - b) / abs(b)
            use = max(lost, 0.0) / limit if finite(lost) else None
        planned = section(report, "predicted").get("quality") if split == "validation" else None
        texts = pair(figure, b, a)
        yield Line(
            f"{name}, {split} {word}", *texts, change(b, a), figure(planned) if finite(planned) else "",
            f"{100 * limit:.3g} % loss" if split == "test" and finite(limit) else "", use, note=note,
        )  # fmt: skip
    b, a = before.get("bits_per_byte_test"), after.get("bits_per_byte_test")
    if finite(b) or finite(a):
        yield Line("bits per byte, test text", *pair(figure, b, a), change(b, a), note="compares across tokenizers")


def _resource_lines(report: dict) -> Iterator[Line]:
    before, after = section(report, "before"), section(report, "after")
    budget, predicted = section(report, "budget"), section(report, "predicted")

    def line(what: str, write: Callable, b: Any, a: Any, planned: Any, limit: Any, note: str = "") -> Iterator[Line]:
        if not finite(b) and not finite(a):
            return
        bounded = finite(limit) and limit > 0
        before_text, after_text = pair(write, b, a)
        limit_text = write(limit) if bounded else ""
        if bounded and finite(a) and a > limit and after_text == limit_text:  # over by less than the digits show
            after_text, limit_text = pair(write, a, limit)
        yield Line(
            what, before_text, after_text, change(b, a), write(planned) if finite(planned) else "", limit_text,
            a / limit if bounded and finite(a) else None, b / limit if bounded and finite(b) else None, note,
        )  # fmt: skip

    for what, key, allowed in (("storage", "bytes", "storage"), ("peak memory", "peak_ram", "ram")):
        how = str(after.get(f"{key}_how") or "")
        yield from line(what, size, before.get(key), after.get(key), predicted.get(key), budget.get(allowed), how)
    lb, la, lp = section(before, "latency"), section(after, "latency"), predicted.get("latency")
    known = (*LATENCY_NAMES, *sorted({*lb, *la} - {"how", *LATENCY_NAMES}))
    keys = [k for k in known if finite(lb.get(k)) or finite(la.get(k))]
    for i, key in enumerate(keys):
        how_b, how_a = lb.get("how"), la.get("how")
        b, same = lb.get(key), how_b == how_a or how_b is None
        note = str(how_a or how_b or "") if same or not finite(b) else f"before: {how_b}; after: {how_a or 'unknown'}"
        planned = lp.get(key) if isinstance(lp, dict) else lp if i == 0 else None
        limit = budget.get("latency") if i == 0 else None
        for row in line(LATENCY_NAMES.get(key, key.replace("_", " ")), duration, b, la.get(key), planned, limit, note):
            # A ratio of two numbers that were obtained in different ways would be no measurement.
            yield row if same else replace(row, change="", use_before=None)
    yield from line("energy", energy, *(part.get("energy") for part in (before, after, predicted, budget)))


def verdict(report: dict) -> str:
    """The one sentence that matters, without its full stop."""
    before, after = section(report, "before"), section(report, "after")
    parts = []
    if finite(after.get("bytes")):
        b, a = pair(size, before.get("bytes"), after["bytes"])
        gain = change(before.get("bytes"), after["bytes"])
        parts.append(f"{b} → {a} ({gain})" if gain else a)
    for split, words in (("test", "held-out test"), ("validation", "validation")):
        a, b = section(after, "quality").get(split), section(before, "quality").get(split)
        if finite(a):
            gain, (left, right) = change(b, a), pair(figure, b, a)
            numbers = f"{left} → {right} ({gain})" if gain else right
            parts.append(f"{metric_name(report)} {numbers} on {words} {data_word(report)}")
            break
    model = str(report.get("model") or "the model")
    if report.get("fits"):
        return f"{model} fits {device_name(report)}" + (f": {', '.join(parts)}" if parts else "")
    over, most = [], section(report, "budget").get("max_loss")
    for row in (r for r in lines(report) if r.ok is False):
        lost = row.limit.endswith("loss")
        got = f"{row.what} loses {percent(row.use * most, signed=False)}" if lost else f"{row.what} {row.after}"
        over.append(f"{got}, {row.limit.removesuffix(' loss')} allowed")
    return f"{model} does not fit {device_name(report)}" + (f": {'; '.join(over)}" if over else "")


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """A nested value as (dotted name, text) rows, for the provenance tables; nulls are left out."""
    if isinstance(value, dict):
        return [row for k, v in value.items() for row in flat(v, f"{name} · {k}" if name else str(k))]
    if isinstance(value, list | tuple):
        return [(name, ", ".join(str(v) for v in value))] if value else []
    if value is None:
        return []
    leaf = name.rpartition(" · ")[2]
    if finite(value) and (leaf.startswith(("ram", "storage")) or leaf == "bytes"):
        text = size(value) + ("/s" if "bandwidth" in leaf else "")
    else:
        text = f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
    return [(name.removeprefix("splits · ").replace("_", " "), text)]


@functools.cache
def _template() -> Template:
    from jinja2 import ChainableUndefined, Environment, PackageLoader

    loader = PackageLoader("netsuke", "templates")
    options = {"autoescape": True, "undefined": ChainableUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=loader, **options).get_template("report.html.j2")


def render(report: dict) -> str:
    """The page as one self-contained string: no script or style or font is fetched from anywhere."""
    from netsuke import report_plots as plots

    report = plain(report)
    sentence = verdict(report)
    about = {
        "Run": [(k, str(report[k])) for k in ("created", "seed", "source", "artifact") if report.get(k) is not None],
        "Versions": flat(section(report, "versions")),
        "Machine that measured": flat(section(report, "machine")),
        "Time taken": [(k.replace("_", " "), duration(v)) for k, v in section(report, "seconds").items()],
        "Device card": flat({k: v for k, v in section(report, "device").items() if k != "name"}),
        "Data": flat(section(report, "metric", "data")),
    }
    how = [section(report, s, "latency").get("how") for s in ("before", "after")]
    return _template().render(
        r=report,
        verdict=sentence,
        headline=re.sub(r"(?<=[\d→]) (?=[\d%→]|[KMGT]?B\b)", "\u00a0", sentence),  # numbers keep their units
        lines=lines(report),
        metric=metric_name(report),
        word=data_word(report),
        how=[h for h in dict.fromkeys(how) if h],
        curves=plots.curves(report),
        layers=plots.layer_map(report.get("choices") or []),
        memory=plots.memory(report),
        floors=plots.floors(report),
        checks=report.get("checks") or [],
        about={title: rows for title, rows in about.items() if rows},
        **{f.__name__: f for f in (figure, size, percent, finite)},
        dash=DASH,
    )


def write_report(report: dict, html: Path, json_path: Path) -> None:
    """Writes both files or neither: rendered first, then written beside their targets, synced and renamed.

    Raises NetsukeError when a target cannot be written.
    """
    texts = {
        Path(html): render(report),
        Path(json_path): json.dumps(plain(report), indent=2, ensure_ascii=False) + "\n",
    }
    parts: dict[Path, str] = {}
    try:
        for path, text in texts.items():
            if path.is_dir():
                raise IsADirectoryError(21, "it is a folder")
            handle, parts[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
            with open(handle, "w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(parts[path], 0o644)  # mkstemp makes private files; a report is for showing
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as e:
        raise NetsukeError(
            f"write the report to {path.name}", e.strerror or str(e), "a file name in an existing, writable folder",
            "-o with another folder",
        ) from None  # fmt: skip
    finally:
        for part in parts.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)


def compare(a: dict, b: dict) -> list[Difference]:
    """Two reports side by side: what was asked, what came out, and whether the same data scored both."""
    a, b, rows = plain(a), plain(b), []
    for what, get in (
        ("model", lambda r: r.get("model")), ("device", lambda r: device_name(r).removeprefix("the ")),
        ("fits", lambda r: "yes" if r.get("fits") else "no"), ("seed", lambda r: r.get("seed")),
    ):  # fmt: skip
        rows.append(Difference(what, *(DASH if get(r) is None else str(get(r)) for r in (a, b))))
    hashes = [section(r, "metric", "data", "splits", "test").get("sha256") for r in (a, b)]
    same_metric = metric_name(a) == metric_name(b)
    if any(hashes):
        note = "same" if hashes[0] == hashes[1] else "different: quality does not compare"
        rows.append(Difference("test data (sha256)", *(str(h or DASH)[:12] for h in hashes), note))
    for what, write, *path in (
        ("storage allowed", size, "budget", "storage"), ("memory allowed", size, "budget", "ram"),
        ("storage before", size, "before", "bytes"), ("storage after", size, "after", "bytes"),
        ("peak memory after", size, "after", "peak_ram"),
        (f"{metric_name(a)}, test, before", figure, "before", "quality", "test"),
        (f"{metric_name(a)}, test, after", figure, "after", "quality", "test"),
        ("loss of quality", lambda x: percent(x) or DASH, "after", "loss_of_quality"),
        ("time per token after", duration, "after", "latency", "per_token"),
        ("time to first token after", duration, "after", "latency", "first_token"),
        ("energy after", energy, "after", "energy"),
    ):  # fmt: skip
        values = [section(r, *path[:-1]).get(path[-1]) for r in (a, b)]
        if not any(finite(v) for v in values):
            continue
        how = [section(r, "after", "latency").get("how") for r in (a, b)]
        fair = same_metric if "quality" in path else how[0] == how[1] if "latency" in path else True
        ratio = change(*values) if fair else "obtained in different ways"
        rows.append(Difference(what, *pair(write, *values), "" if path[-1] == "loss_of_quality" else ratio))
    chosen = [
        {c.get("part"): (c.get("method"), c.get("cut"), c.get("bits")) for c in r.get("choices") or []} for r in (a, b)
    ]
    parts = list(dict.fromkeys([*chosen[0], *chosen[1]]))
    if parts:
        differ = sum(chosen[0].get(p) != chosen[1].get(p) for p in parts)
        rows.append(Difference("parts chosen", *(str(len(c)) for c in chosen), f"{differ} of {len(parts)} differ"))
    return rows


def summary_lines(report: dict) -> list[str]:
    """The verdict and the before/after table as plain text, for logs and pipes."""
    report = plain(report)
    rows = [("", "before", "after", "change", "limit", "used")]
    for r in lines(report):
        used = percent(r.use, signed=False) if r.use is not None else ""
        rows.append((r.what, r.before, r.after, r.change, r.limit, used + ("" if r.ok is not False else " over")))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    out = [verdict(report) + "."]
    for row in rows[: len(rows) if len(rows) > 1 else 0]:
        out.append("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]).rstrip())
    return out


def summary_table(report: dict) -> Table:
    """The same as a rich table; text from the report is never read as markup."""
    from rich.table import Table
    from rich.text import Text

    report = plain(report)
    table = Table(title=Text(verdict(report)), title_justify="left", title_style="bold", header_style="dim")
    for name in ("", "before", "after", "change", "limit", "used"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=bool(name))
    for r in lines(report):
        used = Text("" if r.use is None else percent(r.use, signed=False), style="bold red" if r.ok is False else "")
        table.add_row(Text(r.what), r.before, Text(r.after, style="bold"), r.change, r.limit, used)
    return table
