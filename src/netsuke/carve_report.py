"""The report of one carving as a dictionary: what `netsuke fit --json` prints and report.html draws."""

from __future__ import annotations

import math
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netsuke import __version__
from netsuke.allocate import frontier
from netsuke.carve import CHECK, ENGINE_LIMIT, GROUP, LOGIT_LIMIT, Carving
from netsuke.measure.machine import provenance

if TYPE_CHECKING:
    from netsuke.compress.choices import PartChoice

DEVICE_FACTS = ("name", "title", "kind", "ram", "storage", "ram_bandwidth", "rates")


def report_of(c: Carving) -> dict[str, Any]:
    """Everything that was measured, predicted, chosen and proved. Quality in curves and floors is on validation text."""
    found, base = c.winner.found, math.exp(c.base_loss)
    run = provenance()
    return {
        "fits": True, "model": Path(c.name).name.removesuffix(".netsuke"), "source": c.loaded.kind,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(c.started)),
        "command": shlex.join(["netsuke", *sys.argv[1:]]), "seed": 0,
        "device": {k: getattr(c.device, k) for k in DEVICE_FACTS}, "budget": vars(c.budget),
        "metric": {"name": c.task.metric, "higher_is_better": c.task.higher_is_better, "data": c.task.facts()},
        "before": c.before,
        "predicted": {
            "quality": base * math.exp(min(found.harm, 60)), "bytes": round(found.costs["storage"] + c.fixed["storage"]),
            "peak_ram": round(found.costs["ram"] + c.fixed["ram"]), "latency": found.costs["latency"] + c.fixed["latency"],
        },
        "after": c.after, "curve": curve(c), "floors": floors(c), "choices": choices(c), "tried": tried(c),
        "memory_before": c.memory_before, "memory_after": c.memory_after, "checks": checks(c),
        "methods": [m.to_json() for m in c.winner.methods],
        "artifact": str(c.out), "report": str(c.out.with_suffix(".report.html")),
        "versions": {"netsuke": __version__, "python": platform.python_version(), "torch": run["torch"], "numpy": run["numpy"]},
        "machine": {"cpu": run["cpu"], "cores": run["cores"]}, "seconds": c.seconds,
    }  # fmt: skip


def curve(c: Carving) -> list[dict[str, Any]]:
    """Quality against bytes: the allocator's predictions, and what was built and measured."""
    base = math.exp(c.base_loss)
    out = [
        {"bytes": a.costs["storage"] + c.fixed["storage"], "quality_predicted": base * math.exp(min(a.harm, 60)),
         "quality_measured": None, "chosen": False, "label": ""}
        for a in frontier(c.parts, "storage")
    ]  # fmt: skip
    for built in c.candidates:
        label = f"all choices (harm of cuts x{built.cut_factor:g})"
        out.append({
            "bytes": built.costs["storage"], "quality_predicted": base * math.exp(min(built.found.harm, 60)),
            "quality_measured": math.exp(min(built.loss, 80)), "chosen": built is c.winner,
            "label": ("healed" if built.healed else label if math.isfinite(built.cut_factor) else "without cuts and factors"),
        })  # fmt: skip
    return sorted(out, key=lambda point: point["bytes"])


def floors(c: Carving) -> list[dict[str, Any]]:
    """The trivial way: every layer rounded to the same bits, nothing else."""
    from netsuke.compress.quantize import Quantize

    rows = []
    for bits in (8, 4, 3):
        c.on_progress(f"measuring plain {bits}-bit rounding", 0, 0)
        plain = Quantize(bits=bits, group=GROUP, solver="rtn").apply(c.dense, c.task)
        linears = plain.linears()
        costs = c.costs(plain.cfg, {n: m.spec() for n, m in linears.items()}, sum(m.bytes() for m in linears.values()))
        rows.append({
            "name": f"{bits}-bit round-to-nearest, all layers alike", "bytes": costs["storage"],
            "quality": math.exp(min(c.task.mean_loss(plain, "validation", CHECK), 80)),
            "fits": all(costs[r] <= v for r, v in c.limits.items()),
        })  # fmt: skip
    c.lap("floors")
    return rows


def choices(c: Carving) -> list[dict[str, Any]]:
    before = {o.value.part: round(o.costs["storage"]) for o in c.untouched}
    return [
        {"part": o.value.part, "method": " + ".join(methods_of(o.value)) or "kept", "cut": o.value.cut,
         "rank": o.value.rank, "sparsity": o.value.sparsity,
         "bits": {n.rsplit(".", 1)[-1]: b for n, b in o.value.bits.items()},
         "bytes": round(o.costs["storage"]), "bytes_before": before[o.value.part], "harm": o.harm}
        for o in c.winner.found.picks
    ]  # fmt: skip


def methods_of(choice: PartChoice) -> list[str]:
    """Names of the methods that make an option."""
    used = {
        "modegpt": choice.cut > 0, "factorize": choice.rank is not None, "quantize": min(choice.bits.values()) < 16,
        "sparsify": choice.sparsity > 0,
    }  # fmt: skip
    return [name for name, yes in used.items() if yes]


def tried(c: Carving) -> list[dict[str, Any]]:
    """By method: options that were offered and, of those, picked; why the others lost, as far as figures can say it: the
    least harm per saved byte (or second, where that limit is named) among the offered and among the picked."""
    scarce = next((r for r in ("latency", "energy", "ram", "storage") if getattr(c.asked, r) is not None), "storage")
    names = ("quantize", "modegpt", "factorize", "sparsify")
    offered: dict[str, list[float]] = {n: [] for n in names}
    picked: dict[str, list[float]] = {n: [] for n in names}
    for part, whole, pick in zip(c.parts, c.untouched, c.winner.found.picks):
        for option in part:
            saved = whole.costs[scarce] - option.costs[scarce]
            for name in methods_of(option.value):
                if saved > 0:
                    offered[name].append(option.harm / saved)
                    if option.value == pick.value:
                        picked[name].append(option.harm / saved)
    rows = [
        {"method": n, "options": len(offered[n]), "parts_picked": len(picked[n]), "saves": scarce,
         "least_harm_per_saved": min(offered[n], default=None), "harm_per_saved_of_picked": max(picked[n], default=None)}
        for n in names
    ]  # fmt: skip
    if c.heal_seconds:
        rows.append({"method": "heal", "options": 1, "parts_picked": int(c.winner.healed > 0), "saves": "loss",
                     "least_harm_per_saved": None, "harm_per_saved_of_picked": None, "nats": c.winner.healed})  # fmt: skip
    return rows


def checks(c: Carving) -> list[dict[str, Any]]:
    rows = [
        ("the artifact, read back, gives the carved model's logits (largest difference)", c.proof["difference"], LOGIT_LIMIT),
        ("the native engine's divergence from the reference, nats per token", c.proof["divergence"], ENGINE_LIMIT),
        ("bytes of the artifact's files against the storage limit", c.proof["bytes"], c.budget.storage),
        ("planned peak RAM against the limit", c.after["peak_ram"], c.budget.ram),
    ]  # fmt: skip
    return [{"what": what, "value": value, "limit": limit, "ok": value <= limit} for what, value, limit in rows]
