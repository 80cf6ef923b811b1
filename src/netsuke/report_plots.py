"""The pictures of a report: the quality-versus-bytes curve, the map of what was carved, the memory bars, the floors.

The curve is drawn by matplotlib and cleaned into inline SVG whose colours are the page's CSS variables, so that it
follows the light or dark scheme. The map and the bars are geometry for the template: real tables and text, which a
screen reader reads and a narrow screen reflows. Nothing here depends on the clock, the locale, or a display.
"""

from __future__ import annotations

import html
import io
import re
from typing import Any

from markupsafe import Markup

from netsuke.report import DASH, figure, finite, metric_name, percent, section, size

# Colours that matplotlib writes and the page replaces by var(--name): values are only markers, all different.
MARKERS = {
    "ink": "#010203", "soft": "#010204", "rule": "#010205", "accent": "#010206", "floor": "#010207", "limit": "#010208",
    "paper": "#010209",
}  # fmt: skip
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
BIT_LEVELS = (2, 3, 4, 5, 6, 8, 16, 32)
MEMORY_NAMES = {"kv_cache": "key/value cache"}
MEMORY_ORDER = ("weights", "kv_cache", "activations", "buffers", "runtime")
MAX_DOTS = 40  # predicted points drawn as dots; the line through them uses all


def floors(report: dict) -> list[dict[str, Any]]:
    """The uniform settings, lettered A, B, C, … for the curve and its table alike."""
    kept = [f for f in report.get("floors") or [] if isinstance(f, dict)]
    return [{**f, "letter": chr(ord("A") + i) if i < 26 else str(i + 1)} for i, f in enumerate(kept)]


def curves(report: dict) -> dict[str, Markup] | None:
    """The curve for a wide and for a narrow page, or None when there are fewer than two points to draw."""
    points = []
    for p in report.get("curve") or []:
        predicted, measured = p.get("quality_predicted"), p.get("quality_measured")
        if finite(p.get("bytes")) and p["bytes"] > 0 and (finite(predicted) or finite(measured)):
            points.append(
                {
                    "x": p["bytes"],
                    "predicted": predicted if finite(predicted) else None,
                    "measured": measured if finite(measured) else None,
                    "chosen": bool(p.get("chosen")),
                    "label": str(p.get("label") or ""),
                }
            )
    if len(points) < 2:
        return None
    points.sort(key=lambda p: p["x"])
    return {name: _curve(report, points, name, *wh) for name, wh in (("wide", (9.4, 4.3)), ("narrow", (4.0, 3.7)))}


def _y_window(report: dict, points: list[dict], lettered: list[dict]) -> tuple[float, float]:
    """The span of qualities to show. Hopeless settings would flatten the rest: they are drawn at the edge instead."""
    up = bool(section(report, "metric").get("higher_is_better"))
    values = [v for p in points for v in (p["predicted"], p["measured"]) if v is not None]
    values += [f["quality"] for f in lettered if finite(f.get("quality"))]
    start = section(report, "before", "quality").get("validation")
    values += [start] if finite(start) else []
    good = max(values) if up else min(values)
    picked = [v for p in points if p["chosen"] for v in (p["predicted"], p["measured"]) if v is not None]
    loss = max([abs(v - good) for v in picked] + [0.06 * abs(good), 1e-9])
    worst = max(abs(v - good) for v in values)
    span = min(worst, 4 * loss) or 1.0
    return (good - span * 1.1, good + span * 0.12) if up else (good - span * 0.22, good + span * 1.1)


def _curve(report: dict, points: list[dict], name: str, width: float, height: float) -> Markup:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    tips: dict[str, str] = {}
    c, lettered, quality = MARKERS, floors(report), metric_name(report)
    up = bool(section(report, "metric").get("higher_is_better"))
    low, high = _y_window(report, points, lettered)
    rc = {"svg.hashsalt": f"netsuke-{name}", "svg.fonttype": "none", "font.size": 9.5, "axes.facecolor": "none"}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **rc}):
        fig = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        canvas, ax = FigureCanvasSVG(fig), fig.add_subplot()
        before, limit = section(report, "before"), section(report, "budget").get("storage")
        start = (before.get("bytes"), section(before, "quality").get("validation"))
        xs = [p["x"] for p in points] + [f["bytes"] for f in lettered if finite(f.get("bytes"))]
        xs += [v for v in (start[0], limit) if finite(v) and v > 0]
        log = max(xs) / min(xs) > 8
        ax.set_xscale("log" if log else "linear")
        pad = (max(xs) / min(xs)) ** 0.05 if log else 0.05 * (max(xs) - min(xs))
        left, right = (min(xs) / pad, max(xs) * pad) if log else (max(min(xs) - pad, 0), max(xs) + pad)
        ax.set_xlim(left, right)
        ax.set_ylim(low, high)

        def dot(x: float, y: float, tip: str, **style: Any) -> None:
            """One marker with a tooltip; what lies outside the window becomes an arrow at its edge."""
            if not low <= y <= high:
                y, style = (high if y > high else low), {**style, "marker": "^" if y > high else "v", "markersize": 7}
                tip += " (off the scale)"
            gid = f"tip-{len(tips)}"
            tips[gid] = tip
            ax.plot([x], [y], gid=gid, clip_on=False, zorder=style.pop("zorder", 4), linestyle="none", **style)

        def word(text: str, x: float, y: float, dx: float, dy: float, **style: Any) -> None:
            ax.annotate(
                text, (x, min(max(y, low), high)), xytext=(dx, dy), textcoords="offset points", parse_math=False,
                **{"color": c["ink"], "va": "center", "annotation_clip": False, **style},
            )  # fmt: skip

        if finite(limit) and limit > 0:
            ax.axvspan(limit, right, facecolor=c["limit"], alpha=0.06, linewidth=0)
            ax.axvline(limit, color=c["limit"], linewidth=1.2, linestyle=(0, (5, 3)), zorder=2)
            near_right = ax.transAxes.inverted().transform(ax.transData.transform((limit, low)))[0] > 0.8
            word(
                f"limit {size(limit)}",
                limit,
                high,
                -5 if near_right else 5,
                -8,
                color=c["limit"],
                ha="right" if near_right else "left",
            )
        allowed = section(report, "budget").get("max_loss")
        if finite(allowed) and finite(start[1]):
            worst = start[1] - abs(start[1]) * allowed if up else start[1] + abs(start[1]) * allowed
            if low < worst < high:
                ax.axhline(worst, color=c["limit"], linewidth=0.9, linestyle=(0, (1, 2.5)), zorder=2)
                word(f"{100 * allowed:.3g} % loss", right, worst, -4, 7, color=c["limit"], ha="right")
        line = [(p["x"], p["predicted"]) for p in points if p["predicted"] is not None]
        ax.plot(*zip(*line), color=c["accent"], linewidth=1.4, alpha=0.55, zorder=3) if line else None
        step = max(1, -(-len(points) // MAX_DOTS))
        for i, p in enumerate(points):
            both = p["predicted"] is not None and p["measured"] is not None
            tip = ", ".join(
                [t for t in (p["label"], size(p["x"])) if t]
                + [f"{k} {quality} {figure(p[k])}" for k in ("predicted", "measured") if p[k] is not None]
            )
            if both:
                ax.plot([p["x"]] * 2, [p["predicted"], p["measured"]], color=c["accent"], linewidth=0.9, zorder=3)
            if p["predicted"] is not None and low <= p["predicted"] <= high and (i % step == 0 or p["chosen"] or both):
                dot(
                    p["x"], p["predicted"], tip, marker="o", markersize=4, color=c["paper"], markeredgecolor=c["accent"]
                )
            if p["measured"] is not None and low <= p["measured"] <= high:
                dot(p["x"], p["measured"], tip, marker="o", markersize=5.5, color=c["accent"], zorder=5)
            if p["chosen"]:
                y = p["measured"] if p["measured"] is not None else p["predicted"]
                dot(
                    p["x"],
                    y,
                    f"chosen: {tip}",
                    marker="o",
                    markersize=13,
                    color="none",
                    markeredgecolor=c["accent"],
                    markeredgewidth=1.8,
                )
                word("chosen", p["x"], y, -12, 11 if up else -11, ha="right", color=c["accent"], fontweight="bold")
        for f in lettered:
            if finite(f.get("bytes")) and finite(f.get("quality")):
                tip = f"{f['letter']}: {f.get('name') or ''}, {size(f['bytes'])}, {quality} {figure(f['quality'])}"
                dot(
                    f["bytes"],
                    f["quality"],
                    tip,
                    marker="D",
                    markersize=6,
                    color=c["paper"],
                    markeredgecolor=c["floor"],
                    markeredgewidth=1.5,
                )
                shown, aside = low <= f["quality"] <= high, 1 if up else -1
                text = f["letter"] if shown or width < 6 else f"{f['letter']} {figure(f['quality'])}"
                dx, dy = (9, 0) if shown else (0, 13 * aside)
                word(
                    text,
                    f["bytes"],
                    f["quality"],
                    dx,
                    dy,
                    ha="left" if shown else "center",
                    color=c["floor"],
                    fontweight="bold",
                )
        if finite(start[0]) and finite(start[1]):
            dot(
                *start,
                f"before: {size(start[0])}, {quality} {figure(start[1])}",
                marker="s",
                markersize=7,
                color=c["ink"],
            )
            word("before", *start, -2, -13 if not up else 13, ha="center")

        ax.set_xlabel("bytes on disk", color=c["soft"])
        hint = "higher is better" if up else "lower is better"
        ax.set_title(
            f"{quality}, validation ({hint})", color=c["soft"], loc="left", fontsize=9.5, pad=12, parse_math=False
        )
        ax.spines[["top", "right"]].set_visible(False)
        for side in ("left", "bottom"):
            ax.spines[side].set_color(c["rule"])
        ax.tick_params(colors=c["soft"], width=0.8, length=3)
        ax.grid(axis="y", color=c["rule"], linewidth=0.6, alpha=0.7)
        ax.set_axisbelow(True)
        ticks = LogLocator(subs=(1, 2, 5)) if log else MaxNLocator(7 if width > 6 else 4)
        ax.xaxis.set_major_locator(FixedLocator([t for t in ticks.tick_values(left, right) if left <= t <= right]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: re.sub(r"\.0+ ", " ", size(v))))
        sheet = io.StringIO()
        canvas.print_svg(sheet, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(sheet.getvalue(), name, tips, f"{quality} against bytes on disk")


def _inline(svg: str, name: str, tips: dict[str, str], label: str) -> Markup:
    """matplotlib's file as an element of the page: no prologue, no foreign addresses, own ids, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    view = re.search(r'viewBox="[^"]*"', svg).group()
    svg = re.sub(
        r"<svg[^>]*>", f'<svg class="curve {name}" {view} role="img" aria-label="{html.escape(label)}">', svg, count=1
    )
    for gid, tip in tips.items():
        svg = svg.replace(f'<g id="{gid}">', f"<g><title>{html.escape(tip)}</title>")
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    for css, marker in MARKERS.items():
        svg = svg.replace(marker, f"var(--{css})")
    svg = re.sub(r"font: ((?:\w+ )?[\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    return Markup(re.sub(r">\s+<", "><", svg))


def _bits(value: Any) -> tuple[str, str]:
    """(label, colour class) of a width in bits: 4 -> ("4", "b4"), 4.25 -> ("4.25", "b4"), "fp16" -> ("fp16", "b16")."""
    found = re.search(r"\d+(\.\d+)?", str(value)) if value is not None and not isinstance(value, bool) else None
    if not found:
        return (str(value) if isinstance(value, str) else DASH), "b0"
    level = min(BIT_LEVELS, key=lambda b: abs(b - float(found.group())))
    return (f"{value:g}" if finite(value) else str(value)), f"b{level}"


def layer_map(choices: list[dict]) -> dict[str, Any] | None:
    """What was done to every linear map: rows are blocks (and parts outside them), columns the linear maps.

    `bits` and `cut` of a choice are one value for the whole part or a dictionary by linear map. Bytes and harm of the
    parts of one block are summed, as the allocator does.
    """
    rows: dict[str, dict[str, Any]] = {}
    columns: list[str] = []
    for choice in choices:
        part, bits, cut = str(choice.get("part") or "?"), choice.get("bits"), choice.get("cut")
        inside = re.fullmatch(r"(.*\bblocks\.\d+)\.(.+)", part)
        row_name = inside[1] if inside else part
        if not isinstance(bits, dict):
            leaf = inside[2] if inside else part
            group = {"mlp": LINEARS[4:], "ffn": LINEARS[4:], "attention": LINEARS[:4], "attn": LINEARS[:4]}
            bits = dict.fromkeys(group.get(leaf, (leaf,)), bits)
        row = rows.setdefault(
            row_name, {"cells": {}, "bytes": 0, "bytes_before": 0, "harm": None, "inside": bool(inside)}
        )
        for key in ("bytes", "bytes_before"):
            row[key] += choice[key] if finite(choice.get(key)) else 0
        if finite(choice.get("harm")):
            row["harm"] = (row["harm"] or 0) + choice["harm"]
        for linear, width in bits.items():
            share = cut.get(linear) if isinstance(cut, dict) else cut
            keep = 1 - min(max(share, 0), 1) if finite(share) else 1.0
            label, css = _bits(width)
            tip = f"{part} · {linear}: {label} bits" if label[:1].isdigit() else f"{part} · {linear}: {label}"
            tip += f", {100 * keep:.3g} % of its width kept" if keep < 1 else ", full width"
            tip += f"; {choice['method']}" if choice.get("method") else ""
            row["cells"][linear] = {"label": label, "css": css, "keep": round(100 * keep, 2), "tip": tip}
            if inside and linear not in columns:
                columns.append(linear)
    if not rows:
        return None
    columns.sort(key=lambda n: LINEARS.index(n) if n in LINEARS else len(LINEARS))
    largest = max([r["bytes_before"] for r in rows.values()] + [r["bytes"] for r in rows.values()]) or 1
    out, seen = [], set()
    for name, row in rows.items():
        cells = [row["cells"].get(n) for n in columns] if row["inside"] else list(row["cells"].values())
        seen.update(cell["css"] for cell in cells if cell)
        out.append({
            "name": re.sub(r".*blocks\.(\d+)$", r"block \1", name), "cells": cells, "inside": row["inside"],
            "size": size(row["bytes"] or None), "size_before": size(row["bytes_before"] or None),
            "harm": figure(row["harm"], 2),
            "bar": round(100 * row["bytes"] / largest, 2), "bar_before": round(100 * row["bytes_before"] / largest, 2),
        })  # fmt: skip
    legend = [(css, f"{level} bit") for level in BIT_LEVELS if (css := f"b{level}") in seen]
    legend += [("b0", "not quantized")] if "b0" in seen else []
    cut_any = any(cell and cell["keep"] < 100 for row in out for cell in row["cells"])
    return {
        "columns": columns, "rows": out, "legend": legend, "cut": cut_any,
        "harm": any(r["harm"] is not None for r in rows.values()),
    }  # fmt: skip


def memory(report: dict) -> dict[str, Any] | None:
    """Stacked bars of the memory plan before and after, on one scale that ends at the largest peak, or at the limit if
    that is within three times the peak. When the limit is further away, a second strip shows the true proportion."""
    plans = {s: section(report, f"memory_{s}") for s in ("before", "after")}
    plans = {s: {k: v for k, v in p.items() if finite(v) and v >= 0} for s, p in plans.items()}
    plans = {s: p for s, p in plans.items() if p}
    if not plans:
        return None
    names = [n for n in MEMORY_ORDER if any(n in p for p in plans.values())]
    names += sorted({n for p in plans.values() for n in p} - {*names, "peak"})
    peaks = {s: p.get("peak", sum(v for k, v in p.items() if k != "peak")) for s, p in plans.items()}
    widest = max([*peaks.values(), *(sum(p.get(n, 0) for n in names) for p in plans.values())]) or 1
    ram = section(report, "device").get("ram")
    limit = section(report, "budget").get("ram")
    what = "limit" if finite(limit) else "device RAM"
    limit = limit if finite(limit) else ram
    near = finite(limit) and 0 < limit <= 3 * widest
    scale = max(widest, limit) * 1.04 if near else widest
    bars = []
    for s, p in plans.items():
        parts = [
            {"css": f"m{i % 6}", "width": round(100 * p[n] / scale, 3), "tip": f"{_memory_name(n)}: {size(p[n])}"}
            for i, n in enumerate(names)
            if p.get(n)
        ]
        bars.append({"name": s, "peak": size(peaks[s]), "parts": parts})
    strips = []
    if finite(limit) and limit > 0 and not near:
        strips = [
            {"name": s, "width": round(100 * min(v / limit, 1), 3), "share": percent(v / limit, signed=False)}
            for s, v in peaks.items()
        ]
    table = [
        (f"m{i % 6}", _memory_name(n), [size(plans[s][n]) if n in plans[s] else DASH for s in plans])
        for i, n in enumerate(names)
    ]
    return {
        "bars": bars, "table": table, "heads": list(plans), "peaks": [size(v) for v in peaks.values()],
        "limit": size(limit) if finite(limit) else "", "limit_what": what,
        "limit_at": round(100 * limit / scale, 3) if near else None, "strips": strips,
        "ram": size(ram) if finite(ram) else "",
    }  # fmt: skip


def _memory_name(key: str) -> str:
    return MEMORY_NAMES.get(key, key.replace("_", " "))
