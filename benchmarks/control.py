"""Error against instructions of the HASEL controller on an emulated Cortex-M4F, and do-mpc beside it on the same model.

    python benchmarks/control.py [--json] [--peers PYTHON]

Errors: the published network as plant and model, the whole path, in C on this computer, four seeds each. Instructions: the
same C on the board, 300 ticks of the path's fast part. Derivatives are exact or, as published, central differences.

do-mpc (CasADi, IPOPT) steers the learned mass-spring-damper with the same cost, horizon, moves and limits; it needs a Python
of its own that has do-mpc 5.1 (--peers). Writes benchmarks/results/control.json and docs/control.svg with --json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.apps.control import hasel, oscillator, simulate
from netsuke.devices import Device
from netsuke.measure.machine import provenance
from netsuke.models.files import write_atomically

RESULT = Path(__file__).parent / "results/control.json"
PICTURE = Path(__file__).parents[1] / "docs/control.svg"
PEER = Path(__file__).parent / "control_peer.py"
EXACT = [(s, i) for s in (1, 2, 3, 4, 8) for i in (1, 2, 4, 8) if s * i <= 32]
DIFFERENCES = [(1, 1), (2, 2), (2, 4), (3, 4)]
SEEDS = (1, 2, 3, 4)
STRETCH = slice(2600, 2900)


def point(starts: int, iterations: int, kind: str) -> dict[str, Any]:
    model, path = hasel.predictor(dtype=np.float32), hasel.whole()
    knobs = replace(hasel.SETTINGS, starts=starts, iterations=iterations, derivatives=kind)
    traces = [simulate.on_host(model, replace(knobs, seed=s), path, hasel.samples()[0]) for s in SEEDS]
    run = simulate.on_board(model, knobs, path[STRETCH], path[STRETCH][0])
    return {
        "starts": starts, "iterations": iterations, "derivatives": kind,
        "rms_mm": [t.rms * 1e3 for t in traces], "worst_mm": [float(t.errors.max()) * 1e3 for t in traces],
        "within_1_mm": [t.within(1e-3) for t in traces],
        "worst_instructions": int(run.instructions.max()), "mean_instructions": float(run.instructions.mean()),
    }  # fmt: skip


def picture(rows: list[dict[str, Any]], limit: float, out: Path) -> None:
    """RMS error over the worst tick's instructions; the 120 Hz limit of the chip."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles = {"exact": ("#1b6ca8", "exact Jacobians"), "differences": ("#e07a1f", "central differences")}
    for kind, (colour, label) in styles.items():
        mine = [r for r in rows if r["derivatives"] == kind]
        x = [r["worst_instructions"] / 1e6 for r in mine]
        rms = [sorted(r["rms_mm"]) for r in mine]
        middle = [statistics.median(v) for v in rms]
        spread = [[m - v[0] for m, v in zip(middle, rms)], [v[-1] - m for m, v in zip(middle, rms)]]
        axes.errorbar(
            x, middle, yerr=spread, fmt="o", color=colour, label=label, capsize=2, markersize=4, linewidth=0.8
        )
        for r, a, b in zip(mine, x, middle):
            name = f"{r['starts']}×{r['iterations']}"
            below = kind == "differences" or r["starts"] in (2, 8)
            axes.annotate(
                name, (a, b), xytext=(4, -9 if below else 4), textcoords="offset points", fontsize=7, color=colour
            )
    axes.axvline(limit / 1e6, color="#888", linewidth=1)
    axes.annotate(
        "120 Hz at 168 MHz", (limit / 1e6, 2.2), rotation=90, ha="right", va="center", fontsize=7, color="#666"
    )
    axes.axhline(0.3, color="#888", linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, ticks in ((axes.xaxis, (0.1, 0.2, 0.5, 1, 2, 3)), (axes.yaxis, (0.2, 0.3, 0.5, 1, 2, 3))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("million instructions in the worst tick, emulated Cortex-M4F")
    axes.set_ylabel("RMS error over the whole path, mm")
    axes.set_title("starts × Newton steps; median and range of four seeds", fontsize=9)
    axes.grid(color="#ddd", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    write_atomically(out, lambda f: figure.savefig(f, format="svg", metadata={"Date": None}))


def beside_peer(python: str) -> dict[str, Any]:
    """RMS errors and seconds a tick on the same references, plant and learned model."""
    rows: dict[str, Any] = {}
    for cubic in (0.0, 1.0):
        plant = oscillator.MassSpringDamper(cubic=cubic)
        model, paths = oscillator.learn(plant), oscillator.references(2, 150)
        knobs = oscillator.mpc(model)
        begin = time.perf_counter()
        ours = oscillator.run(plant, knobs.controller(model), paths, knobs.last)
        spent = time.perf_counter() - begin
        layers = model.network.layers
        job = {
            "weights": [n.weight.tolist() for n in layers], "biases": [n.bias.tolist() for n in layers],
            "plant": [plant.mass, plant.damping, plant.stiffness, plant.cubic, plant.tick, oscillator.SUBSTEPS],
            "paths": [p[:, 0].tolist() for p in paths], "last": knobs.last, "moves": knobs.moves,
            "change": knobs.change[0], "limit": oscillator.LIMIT,
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder) / "job.json"
            where.write_text(json.dumps(job))
            done = subprocess.run([python, str(PEER), str(where)], capture_output=True, text=True, check=True)
        theirs = json.loads(done.stdout.splitlines()[-1])
        ticks = sum(len(p) for p in paths)
        rows[f"k3 {cubic:g}"] = {
            "rms": oscillator.rms(ours), "do_mpc_rms": theirs["rms"], "ratio": oscillator.rms(ours) / theirs["rms"],
            "python_ms_per_tick": spent / ticks * 1e3, "do_mpc_ms_per_tick": theirs["seconds"] / ticks * 1e3,
            "version": theirs["version"],
        }  # fmt: skip
        print(f"k3 {cubic:g}: {rows[f'k3 {cubic:g}']}", flush=True)
    return rows


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--json", action="store_true", help=f"write {RESULT.name} and {PICTURE.name}")
    ask.add_argument("--peers", help="a Python that has do-mpc")
    args = ask.parse_args()
    peer = beside_peer(args.peers) if args.peers else None
    rows = []
    for starts, iterations, kind in [(*e, "exact") for e in EXACT] + [(*d, "differences") for d in DIFFERENCES]:
        rows.append(point(starts, iterations, kind))
        r = rows[-1]
        print(
            f"{starts} x {iterations} {kind}: RMS {statistics.median(r['rms_mm']):.3f} mm, worst tick "
            f"{r['worst_instructions']:,} instructions",
            flush=True,
        )
    chip = Device.load("stm32f4")
    limit = chip.clock / 120 / chip.cycles_per_instruction
    out = {"device": chip.name, "instructions_at_120_hz": limit, "rows": rows, "peer": peer, "run": provenance()}
    if args.json:
        RESULT.parent.mkdir(exist_ok=True)
        write_atomically(RESULT, lambda f: f.write((json.dumps(out, indent=1) + "\n").encode()))
        picture(rows, limit, PICTURE)


if __name__ == "__main__":
    main()
