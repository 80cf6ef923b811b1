"""What the claims of `tiny_training` are measured on: networks, photographs, training runs, firmware, a float rival."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from netsuke.data.catalogue import find
from netsuke.graph.arena import plan_arena
from netsuke.graph.differentiate import ReferenceTraining, UpdateRule, training_graph
from netsuke.graph.interpret import Interpreter
from netsuke.graph.ir import QGraph
from netsuke.graph.lower import lower, scratch
from netsuke.graph.ops.base import limits
from netsuke.graph.read.npz import read_npz
from netsuke.graph.simulate import Simulation, frontier
from netsuke.graph.update_plan import UpdatePlan, first_op, head, last, layers, qas
from netsuke.tasks.images import Images, clothing
from netsuke.train.int8_sgd import Diverged, Int8SGD, Trained, accuracy, train
from netsuke.train.sparse_update import PUBLISHED, Contributions, contributions, extra_bytes, search

MODEL = "tiny-training/mcunet-5fps.npz"
MODELS = (MODEL, "tiny-training/mbv2-w0.35.npz", "tiny-training/proxyless-w0.3.npz")
CLOTHES = tuple(f"mobiletl/clothing128_{s}.zip" for s in ("train", "validation", "test"))
CLASSES = 10
EXPANSIONS = (
    21,
    24,
    27,
    30,
    33,
    36,
    39,
)  # pointwise layers of small input and large output: what published plans train
SRAM, FLASH = 256 << 10, 1 << 20
HEAD_RATES = (0.0125, 0.025, 0.05, 0.1)
CODE_RATES = (1e1, 1e2, 1e3, 1e4, 1e5)  # without scaling: gradients by codes are s_w^2 times those that scaling gives
WIDER = 4  # steps that a grid goes on beyond an end


@cache
def network(name: str = MODEL) -> QGraph:
    return read_npz(find(name))


@cache
def clothes() -> dict[str, Images]:
    return clothing()


def plans() -> dict[str, UpdatePlan]:
    """The plans that are trained here, by name."""
    g = network()
    own = {"head": UpdatePlan(0), "last 6": last(g, 6), "last 12": last(g, 12)}
    return own | {f"plan {k}": PUBLISHED[k] for k in (49, 99)}


def plan_of(name: str) -> UpdatePlan:
    """A plan by name: of `plans`, or the one that was "searched"."""
    return searched(False)[0] if name == "searched" else plans()[name]


@cache
def cuts() -> dict[int, dict[str, list[np.ndarray]]]:
    """By first trained operator and split, the codes there: one pass over the photographs for all plans."""
    g = network()
    starts = {first_op(g, p) for p in plans().values()}
    wanted = {s: frontier(g, s) for s in starts}
    whole = g.copy()
    whole.ops = whole.ops[: max(starts)]
    whole.outputs = tuple(sorted({i for tensors in wanted.values() for i in tensors}))
    run = Interpreter(whole).run
    out: dict[int, dict[str, list[np.ndarray]]] = {s: {} for s in starts}
    for split, images in clothes().items():
        parts = [run(images.codes[k : k + 16]) for k in range(0, len(images), 16)]
        codes = dict(zip(whole.outputs, (np.concatenate(column) for column in zip(*parts))))
        for s, tensors in wanted.items():
            out[s][split] = [codes[i] for i in tensors]
    return out


@cache
def trained(
    knobs_of: str, rate: float, scaled: bool, seed: int, epochs: int, shuffled: bool = False,
    head_rate: float | None = None,
) -> Trained:  # fmt: skip
    """A network trained by the plan of that name; `shuffled` labels are the control. `head_rate`: None is as `rate`."""
    plan, labels = plan_of(knobs_of), clothes()["train"].labels
    if shuffled:
        labels = np.random.default_rng(0).permutation(labels)
    knobs = Int8SGD(plan, rate=rate, scaled=scaled, seed=seed, epochs=epochs, head_rate=head_rate)
    return train(network(), knobs, cuts()[first_op(network(), plan)]["train"], labels, CLASSES)


def score(split: str, knobs_of: str, *args: Any, **kw: Any) -> float:
    cut = cuts()[first_op(network(), plan_of(knobs_of))][split]
    return accuracy(trained(knobs_of, *args, **kw).module, cut, clothes()[split].labels)


@cache
def best_rate(knobs_of: str, rates: tuple[float, ...], scaled: bool, epochs: int) -> tuple[float, dict[float, float]]:
    """(the rate that validation photographs prefer at seed 0, accuracy there by rate)"""
    found = {r: score("validation", knobs_of, r, scaled, 0, epochs) for r in rates}
    return max(found, key=found.__getitem__), found


def on_test(knobs_of: str, rates: tuple[float, ...], scaled: bool, quick: bool) -> dict[str, Any]:
    """Test accuracy at the rate that validation prefers: {"rate", "validation": by rate, "test": by seed, "mean"}."""
    epochs, seeds = (2, 1) if quick else (20, 3)
    rate, found = (rates[len(rates) // 2], {}) if quick else best_rate(knobs_of, rates, scaled, epochs)
    test = [score("test", knobs_of, rate, scaled, seed, epochs) for seed in range(seeds)]
    return {"rate": rate, "validation": found, "test": test, "mean": float(np.mean(test))}


def widened(rates: Sequence[float], measure: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """(the best rate, what `measure` gave by rate): the grid goes on while its best stands at an end. A rate at which
    training diverges counts as 0."""

    def safe(rate: float) -> float:
        try:
            return measure(rate)
        except Diverged:
            return 0.0

    found = {r: safe(r) for r in rates}
    for _ in range(WIDER):
        best, order = max(found, key=found.__getitem__), sorted(found)
        if best not in (order[0], order[-1]):
            break
        beside = order[1] if best == order[0] else order[-2]
        new = float(f"{best * best / beside:.3g}")
        found[new] = safe(new)
    return max(found, key=found.__getitem__), found


def unscaled_on_test(knobs_of: str, quick: bool) -> dict[str, Any]:
    """As `on_test`, without scaling: the codes and the float head have gradients of unlike sizes, so each has a rate of its
    own. All choices on validation photographs at seed 0: the head's rate alone, the codes' by decades and then between
    them, the head's again beside it."""
    epochs, seeds = (2, 1) if quick else (20, 3)

    def measured(rate: float, head_rate: float) -> float:
        return score("validation", knobs_of, rate, False, 0, epochs, head_rate=head_rate)

    if quick:
        rate, head_rate, alone, codes, heads = CODE_RATES[2], HEAD_RATES[1], {}, {}, {}
    else:
        head_rate, alone = widened(HEAD_RATES, lambda r: score("validation", "head", r, False, 0, epochs))
        rate, codes = widened(CODE_RATES, lambda r: measured(r, head_rate))
        codes |= widened((rate / 3, rate, rate * 3), lambda r: measured(r, head_rate))[1]
        rate = max(codes, key=codes.__getitem__)
        head_rate, heads = widened((head_rate / 2, head_rate, head_rate * 2), lambda r: measured(rate, r))
    test = [score("test", knobs_of, rate, False, seed, epochs, head_rate=head_rate) for seed in range(seeds)]
    return {
        "rate": rate, "head_rate": head_rate, "validation": codes, "validation_head_alone": alone, "validation_head": heads,
        "test": test, "mean": float(np.mean(test)),
    }  # fmt: skip


@cache
def probe() -> dict[str, float]:
    """Logistic regression on the pooled features; its strength is chosen on validation photographs."""
    from sklearn.linear_model import LogisticRegression

    cut = cuts()[head(network())]
    features = {s: cut[s][0].reshape(len(cut[s][0]), -1).astype(np.float64) / 10 for s in cut}
    fits = {}
    for strength in (0.0003, 0.001, 0.003, 0.01, 0.03):
        fit = LogisticRegression(C=strength, max_iter=3000).fit(features["train"], clothes()["train"].labels)
        fits[strength] = fit.score(features["validation"], clothes()["validation"].labels), fit
    strength = max(fits, key=lambda k: fits[k][0])
    return {
        "strength": strength, "validation": fits[strength][0],
        "test": fits[strength][1].score(features["test"], clothes()["test"].labels),
    }  # fmt: skip


@cache
def searched(quick: bool) -> tuple[UpdatePlan, Contributions]:
    """The plan that contribution analysis on training and validation photographs finds at the memory of plan 99."""
    g, data, epochs = network(), clothes(), 1 if quick else 4
    depths, candidates, ratios = ((6, 20), (39,), (0.25,)) if quick else ((6, 12, 20, 22), EXPANSIONS, (1.0, 0.25))

    def measured(plan: UpdatePlan) -> float:
        cut = cuts()[first_op(g, plan)]
        done = train(g, Int8SGD(plan, rate=0.0125, epochs=epochs), cut["train"], data["train"].labels, CLASSES)
        return accuracy(done.module, cut["validation"], data["validation"].labels)

    gains = contributions(g, measured, depths, candidates, ratios)
    return search(g, gains, extra_bytes(g, PUBLISHED[99])), gains


class FloatNetwork(nn.Module):
    """The network in real numbers, never rounded: clipped to the ranges of its int8 tensors, which hold its ReLU6."""

    def __init__(self, graph: QGraph):
        super().__init__()
        self.graph = graph
        self.simulation = Simulation(graph, 0)
        self.params = nn.ParameterDict()
        for k in (*layers(graph), head(graph)):
            op, module = graph.ops[k], self.simulation.operators[k]
            shape = (-1,) + (1,) * (self.simulation.weight(k).ndim - 1)
            scale = torch.from_numpy(np.broadcast_to(graph.tensors[op.inputs[1]].scale, (module.outs,)).copy()).float()
            self.params[f"weight{k}"] = nn.Parameter(self.simulation.weight(k).detach() * scale.reshape(shape))
            step = scale.double() * float(graph.tensors[op.inputs[0]].scale)
            self.params[f"bias{k}"] = nn.Parameter((self.simulation.bias(k).detach() * step).float())
        self.simulation.params = nn.ParameterDict()  # of it only the layers' shapes are used from here on

    def forward(self, codes: Tensor) -> Tensor:
        g = self.graph
        image = g.tensors[g.inputs[0]]
        values = {g.inputs[0]: (codes.float().permute(0, 3, 1, 2) - image.zero) * float(image.scale)}
        for k, (op, module) in enumerate(zip(g.ops, self.simulation.operators)):
            x, y = values[op.inputs[0]], g.tensors[op.outputs[0]]
            if f"weight{k}" in self.params:
                w, b = self.params[f"weight{k}"], self.params[f"bias{k}"]
                out = module.product(x, w) + b.reshape(1, -1, 1, 1)
            elif op.kind == "add":
                out = x + values[op.inputs[1]]
            else:
                out = x.mean((2, 3), keepdim=True) if op.kind == "avgpool2d" else x.flatten(1)
            low, high = limits(g, op)
            values[op.outputs[0]] = out.clamp(float(y.real(low)), float(y.real(high)))
        return values[g.outputs[0]]


def norm_ratios(count: int) -> list[dict[str, Any]]:
    """Per trained tensor, log10 of weight norm over gradient norm: of the float network, of codes, of codes with scaling.

    On `count` training photographs and the network's own 1000 classes; its second answers serve as labels, so that there
    is something to learn.
    """
    g = network()
    codes = torch.from_numpy(clothes()["train"].codes[:: len(clothes()["train"]) // count][:count])
    whole, real = Simulation(g, 0), FloatNetwork(g)
    for p in whole.parameters():
        p.requires_grad_(True)
    with torch.no_grad():
        second = whole(codes).topk(2, 1).indices[:, 1]
    for m in (whole, real):
        nn.functional.cross_entropy(m(codes), second).backward()
    rows = []
    for k in layers(g):
        for name, factor in zip(("weight", "bias"), qas(g, g.ops[k])):
            key = f"{name}{k}"
            live = torch.from_numpy(factor > 0)
            code, grad = (t.detach()[live].double() for t in (whole.params[key], whole.params[key].grad))
            shape = (-1,) + (1,) * (grad.ndim - 1)
            scaled = grad * torch.from_numpy(factor)[live].reshape(shape)
            w, dw = (t.detach()[live].double() for t in (real.params[key], real.params[key].grad))
            logs = [float(torch.log10(a.norm() / b.norm())) for a, b in ((w, dw), (code, grad), (code, scaled))]
            rows.append({"tensor": f"{g.ops[k].name}.{name}", "float": logs[0], "codes": logs[1], "scaled": logs[2]})
    return rows


def desktop_step() -> int:
    """One training step of the whole network in PyTorch, float32, batch of 1: run in a fresh process for its memory."""
    model = FloatNetwork(network())
    loss = nn.functional.cross_entropy(model(torch.zeros(1, 128, 128, 3, dtype=torch.int8)), torch.tensor([1]))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    return sum(p.numel() for p in model.parameters())


def samples(steps: int, rate: float = 0.001) -> list[np.ndarray]:
    """The firmware's inputs for `steps` steps: images, labels, rates."""
    images = clothes()["train"]
    rows = np.random.default_rng(0).permutation(len(images))[:steps]
    rates = np.full((steps, 1), rate, np.float32)
    return [images.codes[rows], images.labels[rows].astype(np.int32)[:, None], rates]


@cache
def firmware(
    core: str, steps: int, plan_name: str = "plan 49", limited: bool = True, rate: float = 0.001
) -> dict[str, Any]:
    """Builds and runs training firmware; `limited` holds it to 256 KB and 1 MB, else to the machine's 4 MB. "learned" are the
    trained tensors at the end, by their number in "graph"."""
    from netsuke.devices.board import EmulatedBoard
    from netsuke.export.c import write_c
    from netsuke.export.c.emulate import run_emulated

    g = network()
    plan = plans().get(plan_name) or last(g, len(layers(g)))
    graph = training_graph(g, plan, CLASSES)
    with tempfile.TemporaryDirectory(prefix="netsuke-train-") as temporary:
        folder = Path(temporary) / "fw"
        write_c(graph, folder)
        board = EmulatedBoard.load(core, flash=FLASH, ram=SRAM) if limited else core
        run = run_emulated(folder, board, samples(steps, rate))
    return run | {"graph": graph, "learned": learned(graph, run["variables"])}


def learned(graph: QGraph, variables: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
    """What a board's variables, in the firmware's order, are in the training graph: values by number of the tensor."""
    tables = lower(graph, plan_arena(graph, scratch)).variables
    return {t.tensor: v.reshape(graph.tensors[t.tensor].shape) for t, v in zip(tables, variables, strict=True)}


@cache
def reference_run(steps: int, seed: int = 0) -> tuple[list[np.ndarray], dict[int, np.ndarray]]:
    """(logits of every step, variables at the end by tensor) of the same training in NumPy; `seed` is the rounding's."""
    graph = training_graph(network(), plans()["plan 49"], CLASSES, replace(UpdateRule(), seed=seed))
    run = ReferenceTraining(graph)
    images, labels, rates = samples(steps)
    logits = [run.step(x, label=int(y[0]), rate=float(r[0]))[0] for x, y, r in zip(images, labels, rates)]
    return logits, {i: t.data for i, t in enumerate(run.graph.tensors) if t.variable}
