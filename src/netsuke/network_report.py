"""The report of one carving of a small network as a dictionary: what `netsuke fit --json` prints and report.html draws."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from netsuke import __version__
from netsuke.carve_network import BITS, Choice, NetworkCarving, runner
from netsuke.carve_report import DEVICE_FACTS
from netsuke.graph.ir import QGraph
from netsuke.graph.memory import flash_bytes
from netsuke.measure.machine import provenance
from netsuke.network_plan import network_cost

POINTS = 5  # of the curve beside what was built


def report_of(c: NetworkCarving) -> dict[str, Any]:
    """Everything that was measured, predicted, chosen and proved. Quality in curves and floors is on validation samples."""
    run = provenance()
    return {
        "fits": True, "model": Path(c.name).stem, "source": Path(c.name).suffix.lstrip(".") or "artifact",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(c.started)),
        "command": shlex.join(["netsuke", *sys.argv[1:]]), "seed": 0,
        "device": {k: getattr(c.device, k) for k in DEVICE_FACTS}, "budget": vars(c.budget),
        "metric": {"name": c.task.metric, "higher_is_better": True, "data": c.task.facts()},
        "before": c.before, "after": c.after, "curve": curve(c), "floors": floors(c), "choices": choices(c), "checks": checks(c),
        "side": c.winner.side, "bands": c.winner.bands, "artifact": str(c.out), "report": str(c.out.with_suffix(".report.html")),
        "versions": {"netsuke": __version__, "python": platform.python_version(), "torch": run["torch"], "numpy": run["numpy"]},
        "machine": {"cpu": run["cpu"], "cores": run["cores"]}, "seconds": c.seconds,
    }  # fmt: skip


def curve(c: NetworkCarving) -> list[dict[str, Any]]:
    """Quality against flash: every size of picture that was built, and what the allocator picks at other limits, all measured."""
    rows = []
    for built in (*c.candidates, *c.refused):
        size = f"{built.side} x {built.side} pixels" if built.side else "carved"
        over = "" if built in c.candidates else " (over the budget)"
        rows.append(point(c, built.graph, built.cost.storage, size + over, built is c.winner))
    for k, built in enumerate(c.frontier(POINTS)):
        c.on_progress("measuring what other limits would give", k, POINTS)
        rows.append(point(c, built, flash_bytes(built), "at another limit", False))
    c.lap("curve")
    return sorted(rows, key=lambda r: r["bytes"])


def point(c: NetworkCarving, graph: QGraph, size: int, label: str, chosen: bool) -> dict[str, Any]:
    quality = c.task.score(runner(graph), "validation", graph)
    return {"bytes": size, "quality_predicted": None, "quality_measured": quality, "chosen": chosen, "label": label}


def floors(c: NetworkCarving) -> list[dict[str, Any]]:
    """The trivial way: all layers at the same bits, nothing else."""
    rows = []
    for bits in BITS:
        c.on_progress(f"measuring all layers at {bits} bits", 0, 0)
        graph = c.changed(c.base, [Choice(part, weights, bits, 0.0) for part, (weights, _) in c.parts.items()])
        cost = network_cost(graph, c.device)
        rows.append({
            "name": f"all layers at {bits} bits", "bytes": cost.storage,
            "quality": c.task.score(runner(graph), "validation", graph), "fits": not c.excess(cost),
        })  # fmt: skip
    c.lap("floors")
    return rows


def choices(c: NetworkCarving) -> list[dict[str, Any]]:
    sizes = {t.name: t.bytes for _, t in c.base.constants()}
    now = {t.name: t.bytes for _, t in c.winner.graph.constants()}
    return [
        {"part": x.part, "method": method_of(x), "cut": x.cut, "bits": {w: x.bits for w in x.weights},
         "bytes": sum(now.get(w, 0) for w in x.weights), "bytes_before": sum(sizes.get(w, 0) for w in x.weights),
         "harm": c.harms[x]}
        for x in c.winner.choices
    ]  # fmt: skip


def method_of(x: Choice) -> str:
    return " + ".join((["slim"] if x.cut else []) + (["4 bits"] if x.bits == 4 else [])) or "kept"


def checks(c: NetworkCarving) -> list[dict[str, Any]]:
    rows = [
        ("outputs of the artifact's C kernels that differ from the reference's", c.proof["elements"], 0),
        ("flash (weights, tables, kernels) against the storage limit", c.after["bytes"], c.budget.storage),
        ("planned RAM (arena, variables, stack) against the limit", c.after["peak_ram"], c.budget.ram),
    ]
    if c.budget.latency is not None:
        rows.append(("predicted seconds a run against the limit", c.after["latency"]["per_run"], c.budget.latency))
    if c.budget.energy is not None:
        rows.append(("predicted joules a run against the limit", c.after["energy"], c.budget.energy))
    if c.budget.max_loss is not None:
        rows.append(
            (f"loss of {c.task.metric} on validation samples against the limit", c.loss(c.winner), c.budget.max_loss)
        )
    return [{"what": what, "value": value, "limit": limit, "ok": value <= limit} for what, value, limit in rows]
