"""Training on a microcontroller, simulated with the kernels that the chip runs: data, plan, memory, steps, score, artifact.

The plan is the one part that is found off the chip (Lin et al., "On-Device Training Under 256KB Memory", NeurIPS 2022): a few
short trainings say what each layer's update gives, the allocator picks within the memory, and the same plan serves every user.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from netsuke import __version__
from netsuke.devices import format_bytes, parse_bytes
from netsuke.errors import NetsukeError
from netsuke.graph.arena import Arena, plan_arena
from netsuke.graph.differentiate import UpdateRule, training_graph, with_head
from netsuke.graph.host import HostProgram
from netsuke.graph.ir import QGraph
from netsuke.graph.lower import scratch
from netsuke.graph.read import load_graph
from netsuke.graph.simulate import features
from netsuke.graph.store import save_graph
from netsuke.graph.update_plan import UpdatePlan, first_op, layers
from netsuke.models.artifact import check_writable
from netsuke.models.files import write_atomically
from netsuke.tasks.network import NetworkTask, network_task
from netsuke.train.int8_sgd import OnChip, on_chip
from netsuke.train.sparse_update import contributions, extra_bytes, search

STACK = 2048  # bytes
SEARCH_EPOCHS, SEARCH_SAMPLES = 2, 400  # of the short trainings that measure contributions
DEPTHS = (0.1, 0.25, 0.5)  # shares of the layers whose biases are tried
SHRINK = 0.8  # of the memory rule's limit, while the planned arena is still too large


def training_memory(graph: QGraph, plan: UpdatePlan, classes: int | None = None) -> tuple[Arena, int, QGraph]:
    """(arena, bytes of the trained weights in RAM, training graph) of one step; `classes`: the head's, else its own."""
    step = training_graph(graph, plan, classes)
    return plan_arena(step, scratch), sum(t.bytes for t in step.tensors if t.variable), step


class OnMCU:
    """One run of `netsuke train --on mcu`."""

    def __init__(
        self, model: str, data: str, sram: str, epochs: int, rate: float, seed: int, out: str | None,
        on_progress: Callable[[str, int, int], None],
    ):  # fmt: skip
        self.model, self.on_progress, self.epochs, self.rate, self.seed = model, on_progress, epochs, rate, seed
        self.sram = parse_bytes(sram)
        self.out = check_writable(Path(out or f"{Path(model).stem}-trained.netsuke"))
        self.graph = load_graph(model)
        if self.graph.tensors[self.graph.inputs[0]].dtype != "int8":
            raise NetsukeError(
                f"train {model}", "its input is float", "an int8 network", "netsuke fit, which quantizes it"
            )
        self.task: NetworkTask = network_task(data, self.graph, own_classes=True)
        self.classes = int(self.task.answers.max()) + 1

    def run(self, plan: str | None) -> dict[str, Any]:
        self.labels = {s: self.task.labels(s) for s in ("train", "validation", "test")}
        if plan:
            chosen = UpdatePlan.from_json(Path(plan)).check(self.graph)
            arena, variables = self.fitting(chosen, "a plan with fewer layers (leave --plan out to have one searched)")
        else:
            self.fitting(UpdatePlan(0), "a smaller network: no plan needs less than the head alone")
            chosen = self.searched()
            arena, variables, _ = training_memory(self.graph, chosen, self.classes)
        head = self.trained(UpdatePlan(0), "training the head alone")
        done = self.trained(chosen, "training by the plan") if chosen.n_bias else head
        whole = done.check(self.model, self.rate).graph
        before, after = self.accuracy(head.graph, "test"), self.accuracy(whole, "test")
        floor = float(np.bincount(self.labels["test"]).max() / len(self.labels["test"]))
        facts = {
            "accuracy_test": after,
            "accuracy_test_head_alone": before,
            "accuracy_test_constant_answer": floor,
            "arena": arena.size,
            "trained_bytes": variables,
        }
        provenance = {"base": Path(self.model).name, "plan": chosen.to_json(), "epochs": self.epochs, "rate": self.rate}
        save_graph(self.out, whole, provenance | {"seed": self.seed, "netsuke": __version__}, facts)
        beside = self.out.with_suffix(".plan.json")
        write_atomically(beside, lambda f: f.write((chosen.to_json() + "\n").encode()))
        return {
            "model": self.model, "data": self.task.facts(), "classes": self.classes,
            "plan": chosen.to_json(), "plan_file": str(beside),
            "memory": {"arena": arena.size, "trained": variables, "stack": STACK, "total": arena.size + variables + STACK,
                       "limit": self.sram},
            "metric": "accuracy", "floor": floor, "before": before, "after": after, "epochs": self.epochs,
            "artifact": str(self.out),
        }  # fmt: skip

    def fitting(self, plan: UpdatePlan, remedy: str) -> tuple[Arena, int]:
        """(arena, bytes of trained weights) of a plan. Raises NetsukeError when a step does not fit the user's memory."""
        arena, variables, _ = training_memory(self.graph, plan, self.classes)
        need = arena.size + variables + STACK
        if need > self.sram:
            names = [f"{self.name(i, plan)} {format_bytes(n)}" for i, n in arena.live(arena.peak_op)[:5]]
            raise NetsukeError(
                f"train {self.model} within {format_bytes(self.sram)}",
                f"a step{'' if plan.n_bias else ' of the head alone'} needs {format_bytes(need)}; largest at the peak: "
                f"{', '.join(names)}",
                attempt=f"--sram {need}, or {remedy}", code=1,
            )  # fmt: skip
        return arena, variables

    def name(self, tensor: int, plan: UpdatePlan) -> str:
        return "scratch" if tensor < 0 else training_graph(self.graph, plan, self.classes).tensors[tensor].name

    def trained(self, plan: UpdatePlan, what: str, samples: int | None = None, epochs: int | None = None) -> OnChip:
        """What training by `plan` on the train part gives."""
        epochs = epochs or self.epochs
        base = with_head(self.graph, self.classes)
        start = first_op(base, plan)
        cut = self.cut(base, start, "train", samples)
        self.on_progress(what, 0, epochs)
        return on_chip(
            self.graph, plan, cut, self.labels["train"][:samples], self.classes, rate=self.rate, epochs=epochs,
            rule=UpdateRule(seed=self.seed), order_seed=self.seed, on_epoch=lambda k, _: self.on_progress(what, k + 1, epochs),
        )  # fmt: skip

    def cut(self, base: QGraph, start: int, split: str, samples: int | None) -> list[np.ndarray]:
        """The codes that reach operator `start`: what lies before it never changes, so it runs once per sample."""
        key = (start, split, samples)
        if getattr(self, "_kept", None) is None or self._kept[0] != key:
            self._kept = key, features(base, start, self.task.codes(split, limit=samples))
        return self._kept[1]

    def accuracy(self, graph: QGraph, split: str) -> float:
        program = HostProgram(graph)
        return self.task.score(lambda codes: program.run(codes)[0], split, graph)

    def searched(self) -> UpdatePlan:
        """Contribution analysis on train and validation samples, then the allocator within the memory."""
        n = len(layers(self.graph))
        depths = sorted({min(max(round(n * s), 1), n) for s in DEPTHS} - {0})  # none in a network that is a head alone
        deepest = max(depths, default=0)
        # the layers that give most per byte are the ones with a small input and a large output: every third in such networks
        pointwise = [
            i for i, k in enumerate(layers(self.graph)) if self.graph.ops[k].kind != "depthwise2d" and i >= n - deepest
        ]
        candidates = pointwise[:: max(len(pointwise) // 6, 1)]
        total, done = 1 + len(depths) + len(candidates), 0

        def accuracy(plan: UpdatePlan) -> float:
            nonlocal done
            self.on_progress("what each layer's update gives", done, total)
            done += 1
            short = self.trained(plan, "what each layer's update gives", SEARCH_SAMPLES, SEARCH_EPOCHS)
            return self.accuracy(short.graph, "validation")

        gains = contributions(self.graph, accuracy, depths, candidates, ratios=(1.0,))
        limit, least = float(self.sram), extra_bytes(self.graph, UpdatePlan(0))
        while True:
            plan = search(self.graph, gains, limit)
            arena, variables, _ = training_memory(self.graph, plan, self.classes)
            if arena.size + variables + STACK <= self.sram or not plan.n_bias:
                return plan
            limit = max(limit * SHRINK, least)  # at `least` the head alone is what is left
