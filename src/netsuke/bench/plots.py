"""The picture of `netsuke bench lm`: how many times as good as a peer, per model, width and kind of work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {4: "#1b6ca8", 8: "#e07a1f", 16: "#4a9d5b"}
KINDS = ("decode x1", "decode x4", "prompt-128", "prompt-512", "first-token", "load", "peak")


def kind(row: dict[str, Any]) -> str:
    """The row's `what`, with the batch where it decodes."""
    return f"decode x{row['batch']}" if row["what"] == "decode" else row["what"]


def picture(got: dict[str, Any], out: Path, peer: str = "llama.cpp") -> None:
    """Draws the ratios to one peer as dots on a logarithmic axis, one panel a model; right of the line netsuke is better.

    `got` is what `bench("lm")` returned; `out` ends in .svg or .png.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    rows = [r for r in got["rows"] if r["peer_name"] == peer]
    models = list(dict.fromkeys(r["model"] for r in rows))
    known = [k for k in KINDS if any(kind(r) == k for r in rows)]
    kinds = known + sorted({kind(r) for r in rows} - set(known))
    figure = Figure(figsize=(3.2 * max(1, len(models)) + 1, 0.42 * len(kinds) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(models)), sharey=True, squeeze=False)[0]
    for panel, model in zip(panels, models, strict=False):
        panel.axvline(1, color="#888", linewidth=1)
        for bits in sorted({r["bits"] for r in rows}):
            mine = [r for r in rows if r["model"] == model and r["bits"] == bits]
            at = [kinds.index(kind(r)) for r in mine]
            panel.plot([r["ratio"] for r in mine], at, "o", color=COLOURS.get(bits), label=f"{bits} bits", alpha=0.85)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_title(model, fontsize=10)
        panel.grid(axis="x", color="#ddd", linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(kinds)), kinds)
    panels[0].invert_yaxis()
    panels[-1].legend(frameon=False, fontsize=8)
    figure.supxlabel(f"times as good as {peer}\nright of the line netsuke is better", fontsize=9)
    with matplotlib.rc_context({"svg.hashsalt": "netsuke"}):  # the same figures make the same file
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
