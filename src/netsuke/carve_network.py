"""The steps of `fit` for a small network: measure, offer choices, allocate, build, pack, prove.

Choices: each layer's weights at 8 or 4 bits, inner layers narrower (graph/slim.py), and, where nothing depends on it, a smaller
picture (graph/resolution.py). Storage and time add up over parts, so the one allocator picks them; RAM is a peak, so what was
picked is planned for real. Where the peak is too high the first layers run in bands (graph/patches.py), which costs time only;
where that is not enough the layers that are live at the peak are offered narrower only.
The test part is scored once before and once after; everything in between looks at calibration and validation samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from netsuke import __version__
from netsuke.allocate import Allocation, Option, allocate
from netsuke.devices import Budget, Device, format_bytes, format_seconds
from netsuke.errors import NetsukeError
from netsuke.graph.ir import QGraph
from netsuke.graph.ops.conv import LINEAR
from netsuke.graph.slim import Seam, observe, seams, slim
from netsuke.network_plan import NetworkCost, network_cost

BITS, CUTS, SIDES = (8, 4), (0.0, 0.125, 0.25, 0.5), (1.0, 0.875, 0.75, 0.5)
PROBE = 64  # validation samples per trial: divergences have little noise
CALIBRATION = 128  # samples for channel statistics
REPAIRS, BISECTIONS = 8, 6
UNITS = {"storage": format_bytes, "ram": format_bytes, "latency": format_seconds, "energy": lambda v: f"{v:.3g} J"}


@dataclass(frozen=True)
class Choice:
    """What is done to one part: its layers' bits and the share of channels that its seam loses."""

    part: str
    weights: tuple[str, ...]
    bits: int
    cut: float


@dataclass
class Candidate:
    """An allocation that was built at one size of picture; `final` is `graph`, or the same in bands."""

    side: int | None
    found: Allocation
    graph: QGraph
    final: QGraph
    cost: NetworkCost
    divergence: float
    bands: int = 1

    @property
    def choices(self) -> list[Choice]:
        return [o.value for o in self.found.picks]


class NetworkCarving:
    """One run. `run()` leaves `before`, `after`, `candidates`, `winner` and `proof` for the report."""

    def __init__(
        self, model: str, device: str, budget: Budget, data: str | None, out: Path, cuts: bool,
        on_progress: Callable[[str, int, int], None],
    ):  # fmt: skip
        from netsuke.graph.read import load_graph
        from netsuke.models.artifact import check_writable
        from netsuke.tasks.network import network_task

        self.name, self.on_progress, self.started = model, on_progress, time.time()
        self.clock, self.seconds, self.cuts = time.monotonic(), {}, CUTS if cuts else (0.0,)
        self.device = Device.load(device)
        self.asked, self.budget = budget, Budget.for_device(self.device, budget)
        self.out = check_writable(out)
        self.source = load_graph(model)
        if data is None:
            raise NetsukeError(
                f"carve {model}", "no data were given to measure the harm with", "--data FOLDER, .zip or .npz",
                "--data with a folder of <class>/<picture>, or an .npz with x and y",
            )  # fmt: skip
        self.task = network_task(data, self.source)
        self.limits = {r: v for r in UNITS if (v := getattr(self.budget, r)) is not None}
        if {"latency", "energy"} & self.limits.keys() and self.device.clock is None:
            found = f"the card of {self.device.name} gives no clock"
            raise NetsukeError(
                f"fit {model} with a latency or an energy", found, "stm32f4, stm32f746, nrf52840, rp2350"
            )

    def run(self) -> None:
        self.measure_before()
        self.offer_choices()
        self.build_candidates()
        self.pack()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.clock = round(now - self.clock, 2), now

    # 1. the network as it is, in integers

    def measure_before(self) -> None:
        self.on_progress("measuring the network as it is", 0, 0)
        self.base = self.integer(self.source)
        run = runner(self.source)
        self.task.keep_original(run)
        self.cost_before = network_cost(self.source, self.device)
        self.before = {
            "quality": {s: self.task.score(run, s, self.source) for s in ("validation", "test")},
            "bytes": self.cost_before.storage, "peak_ram": self.cost_before.ram,
            "latency": latency_of(self.cost_before, self.device), "energy": self.cost_before.energy,
        }  # fmt: skip
        self.lap("measure")

    def integer(self, graph: QGraph) -> QGraph:
        """A float network quantized with the calibration samples; an integer one as it is."""
        if graph.tensors[graph.inputs[0]].dtype != "float32":
            return graph
        from netsuke.graph.quantize import quantize

        self.on_progress("quantizing to 8 bits", 0, 0)
        return quantize(graph, batches(self.task.codes("train")))

    # 2. choices

    def offer_choices(self) -> None:
        self.seams = disjoint(seams(self.base))
        self.statistics = observe(self.base, self.seams, batches(self.task.codes("train", self.base)[:CALIBRATION]))
        self.parts = parts_of(self.base, self.seams)
        trials = [
            Choice(part, weights, bits, cut)
            for part, (weights, seam) in self.parts.items()
            for bits in BITS
            for cut in (self.cuts if seam else (0.0,))
        ]
        self.harms: dict[Choice, float] = {}
        base = self.task.divergence(runner(self.base), self.base, PROBE)
        for k, choice in enumerate(trials):
            self.on_progress("trying each part", k, len(trials))
            trial = self.changed(self.base, [choice])
            self.harms[choice] = max(self.task.divergence(runner(trial), trial, PROBE) - base, 0.0)
        self.lap("choices")

    def changed(self, graph: QGraph, choices: list[Choice]) -> QGraph:
        """`graph` (the base, at any resolution) with the choices applied: narrower first, then fewer bits."""
        from netsuke.graph.quantize import narrow

        cuts = {c.part: c.cut for c in choices if c.cut > 0}
        narrower = slim(graph, cuts, self.statistics) if cuts else graph
        bits = {w: c.bits for c in choices for w in c.weights if c.bits != BITS[0]}
        return narrow(narrower, bits) if bits else narrower

    def options(self, graph: QGraph, least: dict[str, float]) -> list[list[Option]]:
        """The choices of every part with their cost in `graph`; parts in `least` are offered from that cut on."""
        whole = network_cost(graph, self.device, arena=False)
        out = []
        for part in self.parts:
            rows = []
            for choice, harm in self.harms.items():
                if choice.part != part or choice.cut < least.get(part, 0.0):
                    continue
                cost = network_cost(self.changed(graph, [choice]), self.device, arena=False)
                saved = {"storage": whole.storage - cost.storage}
                if whole.latency is not None:
                    saved |= {"latency": whole.latency - cost.latency, "energy": whole.energy - cost.energy}
                # what a part saves can be negative (4-bit weights take time to unpack): costs are counted from the whole
                rows.append(Option(choice, harm, {r: -v for r, v in saved.items()}))
            out.append(rows)
        return out

    # 3. allocate and build, at each size of picture

    def sizes(self) -> list[tuple[int | None, QGraph]]:
        """(side or None for other data than pictures, base at that side), whole pictures first."""
        graphs = [g for share in SIDES if (g := self.smaller(share)) is not None]
        return [(g.tensors[g.inputs[0]].shape[1] if self.task.pictures else None, g) for g in graphs]

    def smaller(self, share: float) -> QGraph | None:
        """The base for pictures of that share of its side, or None where the network does not allow it."""
        from netsuke.graph.resolution import at_resolution

        if share == 1.0:
            return self.base
        if not self.task.pictures:
            return None
        side = round(self.base.tensors[self.base.inputs[0]].shape[1] * share / 16) * 16
        try:
            return at_resolution(self.base, side, side) if side >= 32 else None
        except NetsukeError:
            return None

    def build_candidates(self) -> None:
        sizes = self.sizes()
        self.candidates, self.refused = [], []
        for k, (side, graph) in enumerate(sizes):
            self.on_progress("building what was chosen", k, len(sizes))
            candidate = self.smallest(side, graph) if self.smallest_wanted else self.build(side, graph)
            (self.candidates if not self.excess(candidate.cost) else self.refused).append(candidate)
        if not self.candidates:
            raise self.refusal()
        good = [c for c in self.candidates if self.loss(c) <= (self.budget.max_loss or 0.0)]
        if self.smallest_wanted and good:
            self.winner = min(good, key=lambda c: c.cost.storage)
        else:
            self.winner = min(self.candidates, key=lambda c: c.divergence)
        self.lap("build")

    @property
    def smallest_wanted(self) -> bool:
        """Only a loss was named: the least flash within it is wanted."""
        return self.budget.max_loss is not None and all(getattr(self.asked, r) is None for r in UNITS)

    def loss(self, c: Candidate) -> float:
        """By what share of itself the metric falls on validation samples."""
        return share_lost(self.before["quality"]["validation"], self.task.score(runner(c.graph), "validation", c.graph))

    def smallest(self, side: int | None, graph: QGraph) -> Candidate:
        """The least flash within the allowed loss: the loss grows as flash falls, so the limit is bisected."""
        best = self.build(side, graph)
        low, high = 0.0, float(best.cost.storage)
        for _ in range(BISECTIONS):
            limit = (low + high) / 2
            tried = self.build(side, graph, limit)
            if tried.cost.storage <= limit and self.loss(tried) <= self.budget.max_loss:
                best, high = tried, limit
            else:
                low = limit
        return best

    def build(self, side: int | None, graph: QGraph, storage: float = math.inf) -> Candidate:
        """The picks of least harm within the limits (and `storage`), applied, and repaired where RAM is short."""
        asked = self.limits | {"storage": min(storage, self.limits["storage"])}
        whole, least = network_cost(graph, self.device), {}
        for _ in range(REPAIRS):
            parts = self.options(graph, least)
            # costs of options are differences from the whole
            limits = {r: v - getattr(whole, r) for r, v in asked.items() if r in parts[0][0].costs}
            found = solve(parts, limits)
            built = self.changed(graph, [o.value for o in found.picks])
            final, cost, bands = self.in_bands(built)
            candidate = Candidate(side, found, built, final, cost, self.task.divergence(runner(built), built), bands)
            if "ram" not in self.excess(cost):
                return candidate
            tighter = self.narrower_at_peak(final, found, least)
            if tighter is None:
                return candidate
            least = tighter
        return candidate

    def in_bands(self, built: QGraph) -> tuple[QGraph, NetworkCost, int]:
        """(graph, cost, bands): in bands of rows when it needs too much RAM otherwise and this helps."""
        from netsuke.graph.lower import scratch
        from netsuke.graph.patches import best_patching

        cost = network_cost(built, self.device)
        if "ram" not in self.excess(cost):
            return built, cost, 1
        banded, facts = best_patching(built, scratch)
        after = network_cost(banded, self.device)
        slower = set(self.excess(after)) - set(self.excess(cost))
        return (built, cost, 1) if slower or after.ram >= cost.ram else (banded, after, facts["bands"])

    def frontier(self, points: int) -> list[QGraph]:
        """What the allocator picks at the whole picture for flash limits from the smallest possible to everything."""
        parts = self.options(self.base, {})
        low = sum(min(o.costs["storage"] for o in part) for part in parts)
        picks = [solve(parts, {"storage": low * (1 - k / points) + 1}) for k in range(points)]
        return [self.changed(self.base, [o.value for o in found.picks]) for found in picks]

    def narrower_at_peak(self, built: QGraph, found: Allocation, least: dict[str, float]) -> dict[str, float] | None:
        """The next larger cut for the seams whose tensors are live at the peak; None when all are at their largest."""
        picked = {o.value.part: o.value.cut for o in found.picks}
        # a band's tensors are named after the whole ones
        live = [name.split("[")[0] for name in network_cost(built, self.device).live]
        out = dict(least)
        for name in live:
            part = next((p for p, (_, seam) in self.parts.items() if seam and name in self.inside(seam)), None)
            more = [c for c in self.cuts if part is not None and c > picked.get(part, 0.0)]
            if more:
                out[part] = more[0]
        return out if out != least else None

    def inside(self, seam: Seam) -> set[str]:
        return {self.base.tensors[self.base.ops[k].outputs[0]].name for k in (seam.writer, *seam.between)}

    def excess(self, cost: NetworkCost) -> dict[str, float]:
        return {r: getattr(cost, r) - v for r, v in self.limits.items() if getattr(cost, r) > v}

    def refusal(self) -> NetsukeError:
        """Nothing fits: the limit that binds, and the nearest thing that would work."""
        nearest = min(self.refused, key=lambda c: max(getattr(c.cost, r) / self.limits[r] for r in self.excess(c.cost)))
        over = self.excess(nearest.cost)
        name = max(over, key=lambda r: getattr(nearest.cost, r) / self.limits[r])
        show, need = UNITS[name], getattr(nearest.cost, name)
        size = f" at {nearest.side} x {nearest.side} pixels" if nearest.side else ""
        return NetsukeError(
            f"fit {self.name} into this budget",
            f"the {name} limit binds: the smallest carving{size} needs {show(need)}, {show(self.limits[name])} allowed",
            attempt=f"--{name} {show(need * 1.02).replace(' ', '')}, or a smaller network", code=1,
        )  # fmt: skip

    # 4. pack, prove

    def pack(self) -> None:
        """Writes the artifact. Before it gets its name it is read back: the C kernels and the reference give the same outputs."""
        from netsuke.graph import Interpreter
        from netsuke.graph.read import load_graph
        from netsuke.graph.store import save_graph

        self.on_progress("scoring the test part", 0, 0)
        w = self.winner
        run = runner(w.graph)
        quality = {s: self.task.score(run, s, w.graph) for s in ("validation", "test")}
        drop, validation_drop = (share_lost(self.before["quality"][x], quality[x]) for x in ("test", "validation"))
        if self.budget.max_loss is not None and validation_drop > self.budget.max_loss:
            raise NetsukeError(
                f"fit {self.name} into this budget",
                f"--max-loss binds: {self.task.metric} falls by {validation_drop:.1%} on validation data, "
                f"{self.budget.max_loss:.1%} allowed",
                attempt=f"--max-loss {validation_drop * 1.05:.1%}, or a wider limit", code=1,
            )  # fmt: skip
        sample = self.task.codes("validation", w.graph)[:16]
        expected, self.proof = Interpreter(w.graph).run(sample)[0], {}  # without bands: they must give the same

        def prove(folder: Path) -> None:
            again = load_graph(folder)
            self.proof["elements"] = int((runner(again)(sample) != expected).sum())
            self.proof["bytes"] = sum(f.stat().st_size for f in folder.iterdir())
            if self.proof["elements"]:
                found = f"{self.proof['elements']} outputs of the C kernels differ from the reference's"
                raise NetsukeError(f"prove {self.out.name}", found, "0", code=1)

        facts = {
            f"{self.task.metric}_test": quality["test"],
            "loss_of_quality": drop,
            "arena": w.cost.arena,
            "flash": w.cost.storage,
        }
        budget = {k: v for k, v in vars(self.budget).items() if v is not None} | {"device": self.device.name}
        choices = [{"part": c.part, "bits": c.bits, "cut": c.cut} for c in w.choices]
        provenance = {
            "base": Path(self.name).name,
            "side": w.side,
            "bands": w.bands,
            "choices": choices,
            "netsuke": __version__,
        }
        self.on_progress("packing and proving", 0, 0)
        save_graph(self.out, w.final, provenance, facts, budget, verify=prove)
        self.after = {
            "quality": quality, "bytes": w.cost.storage, "peak_ram": w.cost.ram, "peak_ram_how": "planned",
            "latency": latency_of(w.cost, self.device), "energy": w.cost.energy, "loss_of_quality": drop,
        }  # fmt: skip
        self.lap("pack")


def share_lost(before: float, after: float) -> float:
    """0.9 before and 0.81 after is a tenth; nothing is lost of a metric that was 0."""
    return 1 - after / before if before > 0 else 0.0


def solve(parts: list[list[Option]], limits: dict[str, float]) -> Allocation:
    """The allocator with costs shifted to be positive: options may save (negative cost), its limits are positive."""
    shift = {r: [min(o.costs[r] for o in part) for part in parts] for r in limits}
    moved = [
        [Option(o.value, o.harm, {r: o.costs[r] - shift[r][k] for r in limits}) for o in part]
        for k, part in enumerate(parts)
    ]
    return allocate(moved, {r: max(v - sum(shift[r]), 1e-12) for r, v in limits.items()})


def runner(graph: QGraph) -> Callable[[np.ndarray], np.ndarray]:
    """Codes in, codes of the first output out, with the C kernels."""
    from netsuke.graph.host import HostProgram

    program = HostProgram(graph)
    return lambda codes: program.run(codes)[0]


def batches(codes: np.ndarray, size: int = 32) -> list[np.ndarray]:
    return [codes[i : i + size] for i in range(0, len(codes), size)]


def disjoint(found: dict[str, Seam]) -> dict[str, Seam]:
    """Seams that share no layer, the widest first: the reader of one would be the writer of the next."""
    out: dict[str, Seam] = {}
    taken: set[int] = set()
    for name, seam in sorted(found.items(), key=lambda item: (-item[1].channels, item[1].writer)):
        ops = {seam.writer, *seam.between, seam.reader}
        if seam.channels >= 8 and not ops & taken:
            out[name], taken = seam, taken | ops
    return dict(sorted(out.items(), key=lambda item: item[1].writer))


def parts_of(graph: QGraph, found: dict[str, Seam]) -> dict[str, tuple[tuple[str, ...], Seam | None]]:
    """Part name -> (names of its weights, its seam or None): the layers of a seam together, every other layer alone."""
    owner = {k: name for name, seam in found.items() for k in (seam.writer, *seam.between, seam.reader)}
    out: dict[str, tuple[tuple[str, ...], Seam | None]] = {name: ((), seam) for name, seam in found.items()}
    for k, op in enumerate(graph.ops):
        if op.kind in LINEAR:
            name = owner.get(k, op.name or f"op{k}")
            weights, seam = out.get(name, ((), None))
            out[name] = ((*weights, graph.tensors[op.inputs[1]].name), seam)
    return out


def latency_of(cost: NetworkCost, device: Device) -> dict[str, Any]:
    how = f"predicted from instructions counted on an emulated {device.core}, times {device.cycles_per_instruction} cycles"
    if cost.latency is None:
        how = f"not predicted: the card of {device.name} gives no clock"
    return {"per_run": cost.latency if cost.latency is not None else math.nan, "how": how}
