"""The tables of docs/forecast.md, written from results/forecast.json and the claims of mixlinear: `python benchmarks/forecast.py
--docs`.

Every table stands between `<!-- NAME -->` and `<!-- /NAME -->` and holds nothing that is not in the result files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pages import fill, where

ROOT = Path(__file__).parents[1]
RESULT, CLAIMS = ROOT / "benchmarks/results/forecast.json", ROOT / "results/mixlinear.json"
PAGE = ROOT / "docs/forecast.md"
OURS = ("MixLinear, moments", "MixLinear, script", "MixLinear, small")
Row = dict[str, Any]


def grid(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(r)} |" for r in (head, ["---"] * len(head), *rows)).replace(" --- ", "---")


def methods(rows: list[Row]) -> tuple[list[str], list[tuple[str, int]]]:
    """(methods, tasks) in the order of their first rows."""
    return list(dict.fromkeys(r["method"] for r in rows)), list(dict.fromkeys((r["set"], r["horizon"]) for r in rows))


def across(got: Row, corner: str, cell: Callable[[Row], str], among: Callable[[Row], bool] = lambda r: True) -> str:
    """Methods down, tasks across."""
    rows = [r for r in got["rows"] if among(r)]
    down, tasks = methods(rows)
    found = {(r["method"], r["set"], r["horizon"]): cell(r) for r in rows}
    lines = [[f"**{m}**" if m in OURS else m, *(found.get((m, *task), "–") for task in tasks)] for m in down]
    return grid([corner, *(f"{name} {h}" for name, h in tasks)], lines)


def count(n: int) -> str:
    return str(n) if n < 10_000 else f"{n / 1000:.0f} k"


def mse(got: Row) -> str:
    return across(got, "MSE (numbers)", lambda r: f"{r['mse']:.4f} ({count(r['parameters'])})")


def errors(got: Row) -> str:
    again = [f"{method}: {where(run)}" for method, run in got.get("runs", {}).items()]
    note = f"Measured on {where(got['run'])}" + ("; measured again: " + "; ".join(again) if again else "") + "."
    least = {}
    for r in got["rows"]:
        least.setdefault((r["set"], r["horizon"]), []).append((r["mse"], r["method"]))
    best = "; ".join(f"{name} {h} {min(v)[1]}" for (name, h), v in least.items())
    return f"{mse(got)}\n\nLeast squared error: {best}. {note}"


def absolute(got: Row) -> str:
    return across(got, "MAE", lambda r: f"{r['mae']:.4f}")


def training(got: Row) -> str:
    def cell(r: Row) -> str:
        return f"{r['seconds']:.2g} s" + (f", epoch {r['epochs']}" if "epochs" in r else "")

    return across(got, "training, best epoch", cell, lambda r: "seconds" in r)


def claim(claims: list[Row], start: str) -> Row:
    return next(c for c in claims if c["text"].startswith(start))


def small_c(claims: list[Row]) -> str:
    head = ["task", "weights", "form", "bytes", "RAM", "k instructions", "MSE lost", "furthest from Python"]
    return grid(head, [
        [r["task"], r["kind"], r["form"], str(r["bytes"]), str(r["ram"]), f"{r['instructions'] / 1e3:.0f}", f"{r['loss']:+.2%}",
         f"{r['difference']:.1g}"]
        for r in claim(claims, "generated C")["values"]["rows"]
    ])  # fmt: skip


def learning(claims: list[Row]) -> str:
    rows = claim(claims, "updates on the chip")["values"]["rows"]
    channels = list(rows[0]["state"])
    head = ["horizon", *(f"state, {c} channel{'s' * (c != '1')}" for c in channels), "of it moments", "k instructions a value",
            "k instructions a refit", "furthest from Python"]  # fmt: skip
    return grid(head, [
        [str(r["horizon"]), *(str(r["state"][c]) for c in channels), str(r["moments"]), f"{r['push'] / 1e3:.0f}",
         f"{r['refit'] / 1e3:.0f}", f"{max(r['forecast'], r['sxx'], r['sxy']):.1g}"]
        for r in rows
    ])  # fmt: skip


def daily(claims: list[Row]) -> str:
    got = claim(claims, "firmware that refits")
    rows = [
        [r["task"], f"{r['frozen']:.4f}", f"{r['refitted']:.4f}", f"{r['ratio']:.4f}"] for r in got["values"]["rows"]
    ]
    board = ", ".join(f"{r['task']} {r['on the board']:.4f}" for r in got["values"]["rows"] if "on the board" in r)
    note = f"The firmware itself, on the emulated board: {board}. " if board else ""
    return grid(["MSE", "frozen", "refitted daily", "ratio"], rows) + f"\n\n{note}From empty sums: {got['control']}."


def judged(claims: list[Row]) -> str:
    cells = [[str(c[k]).replace("|", "\\|") for k in ("text", "bar", "measured", "verdict")] for c in claims]
    return grid(["claim", "bar", "measured", "verdict"], cells)


ERRORS = {"errors": errors, "absolute": absolute, "training": training}
JUDGED = {"c": small_c, "learning": learning, "daily": daily, "claims": judged}


def write(page: Path = PAGE) -> None:
    """Fills the tables of `page` from the result files."""
    got, claims = (json.loads(path.read_text(encoding="utf-8")) for path in (RESULT, CLAIMS))
    parts = {name: partial(make, got) for name, make in ERRORS.items()}
    fill(page, parts | {name: partial(make, claims["claims"]) for name, make in JUDGED.items()})
