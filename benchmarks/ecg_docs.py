"""The tables of docs/ecg.md, written from results/ecg.json: `python benchmarks/ecg.py --docs`.

Every table stands between `<!-- NAME -->` and `<!-- /NAME -->` and holds nothing that is not in the result file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pages import fill, where

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks/results/ecg.json", ROOT / "docs/ecg.md"
KEYS = ("PR", "QRS", "QT")
CONSTANT, CONSTANT_QT = "a constant", "a constant, RR as marked"
METHODS = {
    "netsuke": "**netsuke**", "released": "released FeatureDB", "neurokit2 prominence": "NeuroKit2 prominence",
    "neurokit2 dwt": "NeuroKit2 dwt", CONSTANT: CONSTANT, CONSTANT_QT: CONSTANT_QT,
}  # fmt: skip
OTHERS = ("released", "neurokit2 prominence", "neurokit2 dwt")
SHOWN = {"AVR": "aVR", "AVL": "aVL", "AVF": "aVF"}
TRAINED = ("I", "II")
PAPER_R = 0.836  # arXiv 2502.17499


def grid(head: tuple[str, ...], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(r)} |" for r in (head, ["---"] * len(head), *rows)).replace(" --- ", "---")


def runs(got: dict[str, Any]) -> str:
    """Where the figures were measured; parts that were measured again name their own run."""
    again: dict[str, list[str]] = {}
    for part, run in got.get("runs", {}).items():
        again.setdefault(where(run), []).append(part)
    later = "".join(f"; measured again on {at}: {', '.join(parts)}" for at, parts in again.items())
    return f"Measured on {where(got['run'])}{later}."


def ludb(got: dict[str, Any]) -> str:
    def cell(v: dict[str, Any]) -> str:
        r = f"{v['r']:.2f}" if v.get("r") is not None else "–"
        return f"{v['mae']:.1f} / {v['median']:.1f} / {r} / {v['failures']}"

    def area(v: dict[str, Any]) -> str:
        return f"{v['auc']:.2f} ({v['interval'][0]:.2f}–{v['interval'][1]:.2f})"

    rows = [
        [lead, shown, *(cell(v[k]) for k in KEYS), area(v["AV block"]), area(v["long QTc"])]
        for lead in TRAINED for method, shown in METHODS.items() if (v := got["intervals"][lead].get(method))
    ]  # fmt: skip
    return (
        grid(("lead", "method", *KEYS, "AV block AUC", "long QTc AUC"), rows) + f"\n\n{correlation(got)}\n\n{runs(got)}"
    )


def correlation(got: dict[str, Any]) -> str:
    """Whether QTc, the worst of the four, correlates as the paper's least does."""
    r = {lead: got["intervals"][lead]["netsuke"]["QTc"]["r"] for lead in TRAINED}
    missed = [lead for lead in TRAINED if r[lead] < PAPER_R]
    return (
        f"QTc (Bazett) correlates with the marks' by {' and '.join(f'{r[k]:.2f} on {k}' for k in TRAINED)}; the paper's lowest "
        f"correlation, on people of its own, is {PAPER_R}: {'missed on ' + ' and '.join(missed) if missed else 'reached'}."
    )


def fold_zero(got: dict[str, Any]) -> str:
    rows = [
        [
            lead,
            *(f"{got['fold 0'][lead][k]['mae']:.1f} / {got['intervals'][lead]['netsuke'][k]['mae']:.1f}" for k in KEYS),
        ]
        for lead in TRAINED
    ]
    return grid(("lead", *KEYS), rows)


def other_leads(got: dict[str, Any]) -> str:
    rows, beaten = [], []
    for lead, methods in got["intervals"].items():
        if lead in TRAINED:
            continue
        own, name = methods["netsuke"], SHOWN.get(lead, lead)
        best = {k: min(methods[m][k]["mae_with_failures"] for m in OTHERS) for k in KEYS}
        cells = [f"{own[k]['mae']:.1f} / {own[k]['failures']} / {own[k]['mae_with_failures']:.1f}" for k in KEYS]
        floor = {k: own[k]["floor_mae"] for k in KEYS}
        rows.append([name, *cells, *(f"{best[k]:.1f}" for k in KEYS), *(f"{floor[k]:.1f}" for k in KEYS)])
        beaten += [f"{name} {k}" for k in KEYS if floor[k] <= best[k]]
    head = ("lead", "netsuke: PR", "QRS", "QT", "best other: PR", "QRS", "QT", "a constant: PR", "QRS", "QT")
    return grid(head, rows) + (
        "\n\nMean error / failures / mean error where each failure costs what a constant answer costs; the others by the last "
        "of these. The constant is the median of the references. It is no worse than the best other method for "
        f"{', '.join(beaten)}."
    )


def calibration(got: dict[str, Any]) -> str:
    return grid(
        ("lead", *KEYS),
        [
            [SHOWN.get(lead, lead), *(f"{100 * v['netsuke'][k]['within_plus_minus']:.0f} %" for k in KEYS)]
            for lead, v in got["intervals"].items()
        ],
    )


def peaks(got: dict[str, Any]) -> str:
    def one(method: str) -> str:
        v = got["peaks"][method]
        return f"{method} " + ", ".join(
            f"{k} {v[k]['sensitivity']:.4f} / {v[k]['predictivity']:.4f}" for k in (*TRAINED, "MIT-BIH 100")
        )

    return "R peaks, sensitivity / predictivity: " + ";\n".join(one(m) for m in got["peaks"]) + "."


def spoiled(got: dict[str, Any]) -> str:
    grades = ("good", "fair", "poor", "refused")
    rows = [[r["case"], *(str(r["grades"][g]) for g in grades), str(r["wrong"])] for r in got["robustness"]]
    return grid(("case", *grades, "far off"), rows)


def day(got: dict[str, Any]) -> str:
    v = got["day"]
    clock = v["all_seconds"]
    return (
        "A day (24 h of one lead at 250 Hz, record 100 of MIT-BIH over and over with noise): "
        f"{v['cpu_seconds']:.0f} s of one core\n({min(clock):.0f} to {max(clock):.0f} s by the clock of a busy machine), "
        f"{v['peak_mb']:.0f} MB at its highest."
    )


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "ludb": ludb, "fold 0": fold_zero, "other leads": other_leads, "calibration": calibration, "peaks": peaks,
    "spoiled": spoiled, "day": day,
}  # fmt: skip


def write(page: Path = PAGE) -> None:
    """Fills the tables of `page` from the result file."""
    got = json.loads(RESULT.read_text(encoding="utf-8"))
    fill(page, {name: partial(make, got) for name, make in PARTS.items()})
