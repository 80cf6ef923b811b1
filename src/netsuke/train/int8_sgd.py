"""Training an int8 network by plain SGD on its codes, with quantization-aware scaling (Lin et al., NeurIPS 2022).

There is no float network underneath: a weight is a code q with the real value s_w q. Its gradient by the code is s_w times the
real one, so the ratio of weight to gradient norm is off by s_w^-2, a different factor for every channel. Scaling

    dL/dq <- dL/dq / s_w^2          dL/db <- dL/db / (s_w s_x)^2

undoes it: SGD on codes then walks where SGD on the float network would. No optimizer state, no tuning per tensor.

Codes are whole, a step is often less than one. Three ways to store it:
    copies      float copies are kept and rounded in the forward pass: what the released simulation does, 4 bytes a weight
    stochastic  rounded up or down at random so that the mean is right, and saturated: what fits a chip, and works
    truncate    cut toward zero, wrapped around: what the released kernels do; steps below one vanish, large ones flip signs

`Int8SGD` trains in batches in PyTorch (graph/simulate.py). The chip's own arithmetic, one image at a time, is
`graph/differentiate.py`, and `on_chip` runs it here with the chip's kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from netsuke.errors import NetsukeError
from netsuke.graph.differentiate import UpdateRule, trained_constants, training_graph, with_head
from netsuke.graph.ir import QGraph
from netsuke.graph.simulate import Simulation, suffix
from netsuke.graph.update_plan import UpdatePlan, first_op, head, kept_channels, layers, qas

Storage = Literal["copies", "stochastic", "truncate"]
DIVERGED = 1e4  # a mean loss: logits of int8 codes give at most a few hundred, and a float head may recover from more
ASKED = 128  # training samples that a network trained on the chip has to tell apart


class Diverged(NetsukeError):
    """Training ran away: what is left answers nothing."""


@dataclass(frozen=True)
class Int8SGD:
    """Knobs. `rate` is a rate of real SGD when `scaled`; without scaling it has to be found anew for each network.

    head   "float": a new float layer on the real features, as in the released simulation; "int8": the rows of the old head
    """

    plan: UpdatePlan
    rate: float = 0.025  # the released 0.1 for batches of 256, at 64
    epochs: int = 20
    warmup: float = 0.1  # share of the run; the released 5 of 50 epochs
    batch: int = 64
    scaled: bool = True
    storage: Storage = "copies"
    head: Literal["float", "int8"] = "float"
    head_rate: float | None = None  # None: as `rate`; without scaling the float head needs a rate of its own
    seed: int = 0


@dataclass
class Trained:
    """`module` maps the cut's codes to logits; `losses` has the mean of each epoch."""

    module: nn.Module
    losses: list[float] = field(default_factory=list)


class FloatHead(nn.Module):
    """The network up to its head, and a new float layer on the features as real numbers."""

    def __init__(self, graph: QGraph, start: int, classes: int, seed: int):
        super().__init__()
        k = head(graph)
        body = graph.copy()
        body.ops, body.outputs = body.ops[:k], (graph.ops[k].inputs[0],)
        self.body = Simulation(body, start) if start < k else None
        self.source = graph.tensors[graph.ops[k].inputs[0]]
        self.linear = nn.Linear(self.source.size, classes)
        bound, rng = self.source.size**-0.5, torch.Generator().manual_seed(seed)
        for p in self.linear.parameters():
            nn.init.uniform_(p, -bound, bound, generator=rng)

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.body is not None:
            real = self.body(*inputs)
        else:
            real = (inputs[0].float() - self.source.zero) * float(self.source.scale)
        return self.linear(real.flatten(1))


def module_for(graph: QGraph, knobs: Int8SGD, classes: int) -> nn.Module:
    """The part of the network that training changes, with gradients on for the plan's parameters."""
    knobs.plan.check(graph)
    start = first_op(graph, knobs.plan)
    if knobs.head == "float":
        module: nn.Module = FloatHead(graph, start, classes, knobs.seed)
        body = module.body
    else:
        module = body = Simulation(with_head(graph, classes), start)
    for k, ratio in trained_ops(graph, knobs.plan).items():
        if knobs.head == "float" and k == head(graph):
            continue
        body.bias(k).requires_grad_(True)
        body.weight(k).requires_grad_(ratio > 0)
    return module


def trained_ops(graph: QGraph, plan: UpdatePlan) -> dict[int, float]:
    """Operator -> trained share of its weights, 0 when only its bias is trained; with the head."""
    numbers = layers(graph)
    biases = numbers[len(numbers) - plan.n_bias :]
    return {k: plan.weights.get(numbers.index(k), 0.0) for k in biases} | {head(graph): 1.0}


def factors(graph: QGraph, knobs: Int8SGD, classes: int) -> dict[str, Tensor]:
    """By parameter name, what its gradient is multiplied by: scaling, and 0 for channels that the plan leaves alone."""
    base = with_head(graph, classes) if knobs.head == "int8" else graph
    out = {}
    for k, ratio in trained_ops(graph, knobs.plan).items():
        op = base.ops[k]
        w = base.tensors[op.inputs[1]]
        scale_w, scale_b = (torch.from_numpy(f) for f in qas(base, op))
        if not knobs.scaled:
            scale_w, scale_b = torch.ones_like(scale_w), torch.ones_like(scale_b)
        out[f"bias{k}"] = scale_b
        mask = torch.zeros(w.shape[-1], dtype=torch.float64)
        if ratio:
            mask[torch.from_numpy(kept_channels(base, op, ratio)).long()] = 1
        if op.kind == "depthwise2d":
            out[f"weight{k}"] = (scale_w * mask).reshape(-1, 1, 1, 1).float()
        else:
            both = scale_w[:, None] * mask[None]
            out[f"weight{k}"] = (both if op.kind == "dense" else both[..., None, None]).float()
    return out


def train(
    graph: QGraph,
    knobs: Int8SGD,
    cut: Sequence[np.ndarray],
    labels: np.ndarray,
    classes: int,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Trained:
    """Trains on `cut`, the codes at `first_op(graph, plan)` of every image (`simulate.features`), and int64 labels.

    Raises Diverged when the loss grows without bound. `graph` itself is not changed.
    """
    module = module_for(graph, knobs, classes)
    scale = factors(graph, knobs, classes)
    rng, dice = np.random.default_rng(knobs.seed), torch.Generator().manual_seed(knobs.seed)
    data, target = [torch.from_numpy(x) for x in cut], torch.from_numpy(labels)
    steps, done = knobs.epochs * math.ceil(len(labels) / knobs.batch), 0
    trained = Trained(module)
    for epoch in range(knobs.epochs):
        losses = []
        for rows in np.array_split(rng.permutation(len(labels)), math.ceil(len(labels) / knobs.batch)):
            which = torch.from_numpy(rows)
            loss = nn.functional.cross_entropy(module(*(x[which] for x in data)), target[which])
            module.zero_grad()
            loss.backward()
            share = schedule(done / steps, knobs.warmup)
            with torch.no_grad():
                for name, p in module.named_parameters():
                    if p.requires_grad and p.grad is not None:
                        _step(name, p, share, knobs, scale, dice)
            losses.append(float(loss.detach()))
            done += 1
        trained.losses.append(float(np.mean(losses)))
        if not trained.losses[-1] < DIVERGED:
            raise Diverged(
                f"train {graph.name}", f"the loss became {trained.losses[-1]:g} in epoch {epoch + 1}", "one that falls",
                f"a rate below {knobs.rate:g}", code=1,
            )  # fmt: skip
        if on_epoch:
            on_epoch(epoch, trained.losses[-1])
    return trained


def schedule(progress: float, warmup: float) -> float:
    """Share of the full rate: a linear rise, then half a cosine to zero."""
    if progress < warmup:
        return (progress + 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _step(
    name: str, p: nn.Parameter, share: float, knobs: Int8SGD, scale: dict[str, Tensor], dice: torch.Generator
) -> None:
    key = name.rsplit(".", 1)[-1]
    codes = key in scale  # else a parameter of the float head
    g = p.grad * scale[key] if codes else p.grad
    full = knobs.rate if codes or knobs.head_rate is None else knobs.head_rate
    change = full * share * g
    if not codes or knobs.storage == "copies":
        p -= change
        return
    bits = 8 if key.startswith("weight") else 32
    if knobs.storage == "truncate":
        p.copy_(wrapped(p - change.trunc(), bits))
        return
    room = 127 if bits == 8 else 2**31 - 1
    p.copy_((p - (change + torch.rand(p.shape, generator=dice)).floor()).clamp(-room, room))


def wrapped(x: Tensor, bits: int) -> Tensor:
    """Whole numbers as two's complement of `bits` bits."""
    half = 2.0 ** (bits - 1)
    return (x + half).remainder(2 * half) - half


def accuracy(module: nn.Module, cut: Sequence[np.ndarray], labels: np.ndarray, batch: int = 128) -> float:
    """Share of right answers."""
    right = 0
    with torch.no_grad():
        for k in range(0, len(labels), batch):
            logits = module(*(torch.from_numpy(x[k : k + batch]) for x in cut))
            right += int((logits.argmax(1).numpy() == labels[k : k + batch]).sum())
    return right / len(labels)


@dataclass
class OnChip:
    """What training with the chip's kernels gave: the mean loss of each epoch, and the network with its new weights.

    `answer` is None, or the class that every training sample gets at a loss no better than guessing: training collapsed. On
    the chip no loss grows without bound, since codes saturate and their softmax is a table, but channels that stand at an end
    pass no gradient and stay there.
    """

    losses: list[float]
    graph: QGraph
    answer: int | None = None

    def check(self, name: str, rate: float) -> OnChip:
        """This result. Raises Diverged when training collapsed."""
        if self.answer is None:
            return self
        raise Diverged(
            f"train {name} on the chip at the rate {rate:g}",
            f"every sample gets the answer {self.answer}; the mean loss went from {self.losses[0]:.2f} in the first epoch to "
            f"{self.losses[-1]:.2f} in the last", "less than guessing has",
            f"a rate below {rate:g}, or more epochs if the loss still falls", code=1,
        )  # fmt: skip


def on_chip(
    graph: QGraph,
    plan: UpdatePlan,
    cut: Sequence[np.ndarray],
    labels: np.ndarray,
    classes: int,
    *,
    rate: float,
    epochs: int,
    rule: UpdateRule | None = None,
    order_seed: int = 0,
    on_epoch: Callable[[int, float], None] | None = None,
) -> OnChip:
    """One image at a time through the kernels that the chip runs: integers forward, float32 back, codes updated in place.

    The rate falls as a cosine over the run. What lies before the first trained layer comes as `cut`, as in `train`.
    """
    from netsuke.graph.host import HostProgram

    start = first_op(graph, plan)
    base = with_head(graph, classes)
    tail = suffix(base, start)
    plan_of_tail = _shifted(base, plan, start)
    compiled = training_graph(tail, plan_of_tail, classes, rule or UpdateRule())
    program = HostProgram(compiled)
    rng, losses, done = np.random.default_rng(order_seed), [], 0
    for _ in range(epochs):
        total = 0.0
        for i in rng.permutation(len(labels)):
            now = rate * schedule(done / (epochs * len(labels)), 0.05)
            inputs = np.array([labels[i]], np.int32), np.array([now], np.float32)
            _, chance = program.run(*(x[i : i + 1] for x in cut), *inputs)
            total -= math.log(max(float(chance[0]), 1e-12))
            done += 1
        losses.append(total / len(labels))
        if on_epoch:
            on_epoch(len(losses) - 1, losses[-1])
    out = base.copy()
    for index, values in trained_constants(compiled, program.variables()).items():
        if index < len(out.tensors):  # all but the step counter
            out.tensors[index].data = values
    rows = np.unique(np.linspace(0, len(labels) - 1, ASKED).astype(int))
    logits = HostProgram(suffix(out, start)).run(*(x[rows] for x in cut))[0].reshape(len(rows), -1)
    given = np.unique(logits.argmax(1))
    collapsed = len(given) == 1 and losses[-1] > 0.98 * math.log(classes)  # few classes may rightly be one answer
    return OnChip(losses, out, int(given[0]) if collapsed else None)


def _shifted(graph: QGraph, plan: UpdatePlan, start: int) -> UpdatePlan:
    """The plan for the part of the graph from operator `start` on, whose layers are numbered from there."""
    before = sum(1 for k in layers(graph) if k < start)
    return UpdatePlan(plan.n_bias, {i - before: r for i, r in plan.weights.items()}, plan.name)
