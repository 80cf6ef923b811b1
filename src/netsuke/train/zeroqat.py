"""Quantization-aware training with forward passes only: a model learns to live with low bits at the memory of inference.

"End-to-End On-Device Quantization-Aware Training for LLMs at Inference Cost" (ZeroQAT, arXiv 2509.00031, 2025). Float
masters W of the blocks' linear maps are moved by zeroth-order steps on the loss of the quantized model
(train/zeroth_order.py):

    g = [L(Q(W + ε u)) − L(Q(W − ε u))] / 2ε,      W <- W − η g u

Q is the affine grid of compress/fake_quant.py, per group of inputs, with learned clips; activations (a < 16) are rounded per
token where they enter a product: the inputs of all linear maps, rotated queries and keys, values. A short block-wise
reconstruction (train/reconstruct.py) sets clips, and scales of equivalent transformations where activations are rounded; it
is the one part that uses gradients, of one block at a time, and `warm=0` leaves it out.

    trainable="all"  every linear map of the blocks moves: for quantizing a model on its own text
    trainable="qv"   the light variant for adapting to other text: all but the query and value maps is packed at once,
                     never copied, never perturbed

Here and not in the paper: the grid of the warm start stays (`grid="moving"` is the paper's: it is found anew for every
perturbed weight); scales are learned in the reconstruction and folded, the zeroth-order steps move W alone; attention
weights are not rounded to 16 bits (no effect). Activation grids are per token and head at queries, keys and values.

Use it when the memory for back-propagation is missing, below 4 bits, or with rounded activations. Each step moves along one
random direction, so thousands are needed; after a warm start the first hundreds lose a per cent, the luck of its rounding,
before any is gained, and the warm start is returned if nothing is. With the memory, training with gradients
(train/loop.py) is faster by far.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from netsuke.compress.method import Method
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.layers.packing import WIDTHS
from netsuke.layers.quantized import QuantLinear
from netsuke.layers.static import TokenGrid
from netsuke.models.llama import Block, Llama
from netsuke.tasks.base import Task
from netsuke.train.masters import MasterLinear, quantized
from netsuke.train.reconstruct import Quantized, reconstruct, starting_scales
from netsuke.train.zeroth_order import Perturbation, ZerothOrderKnobs, descend, in_micro_batches, slopes

ROUNDED = ("attn_in", "q_rot", "k_rot", "v", "heads", "mlp_in", "hidden")  # sites that enter a product
MOVED = {"all": ("q", "k", "v", "o", "gate", "up", "down"), "qv": ("q", "v")}
GRIDS = ("fixed", "moving")
RATE = 4.75e-3  # over the root of the number of moved weights: 1e-5 for 225,000, as swept on stories260K
RISES = 5  # evaluations in a row with a rising loss that end a run


@dataclass(frozen=True)
class ZeroQAT(Method):
    """Attributes:

    w, a        bits of weights (2, 3, 4, 8; 16 leaves the model alone) and of activations (2 to 8; 16 are left alone)
    group       inputs that share a scale; 0 is a whole row. Where it does not divide a width, the last group is shorter
    trainable   all or qv, see above
    grid        fixed (that of the warm start stays) or moving (scales and zero points follow every perturbed weight, as
                published). Of the difference of two losses of stories260K at 3 bits, the part that goes with the gradient has
                a correlation of 0.72 with it when fixed, 0.39 when moving: zero points that flip are noise
    steps       two forward passes each and direction; with `minutes` the run ends at whichever comes first
    eps         1e-3 is the paper's. Larger weights want more: with 3e-3 several times as much of g belongs to the gradient on
                stories260K (weights of 0.05 to 0.24), 1e-2 blunts it
    rate        η; None: 4.75e-3 / sqrt(moved weights). From clipped rounding to 3 bits 1,000 steps of 1e-5 take stories260K
                from perplexity 5.90 to 5.33; twice as much climbs after a warm start
    directions  per step
    batch       rows per step, the same for both signs
    micro       rows that run at once: memory is a micro-batch's, whatever the batch
    tokens      rows are cut to this length, at a place that changes from step to step; None: whole rows
    warm        epochs of block-wise reconstruction, one row a step; what counts is the number of steps: 256 take 3 bits of
                stories260K from perplexity 5.90 to 4.94, 64 to 5.54
    alpha       share of an outlier that smoothing moves into the weights (a < 16)
    calibration rows of the train split for the reconstruction
    every       steps between evaluations on the validation split, of which `validation` batches are used. The best is kept
    """

    name: ClassVar[str] = "zeroqat"
    paper: ClassVar[str] = "End-to-End On-Device Quantization-Aware Training for LLMs at Inference Cost (2025)"
    trains: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True

    w: int = 4
    a: int = 16
    group: int = 32
    trainable: str = "all"
    grid: str = "fixed"
    steps: int = 1000
    minutes: float | None = None
    eps: float = 1e-3
    rate: float | None = None
    directions: int = 1
    batch: int = 16
    micro: int = 4
    tokens: int | None = None
    warm: int = 2
    alpha: float = 0.75
    calibration: int = 128
    every: int = 100
    validation: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        asked = f"build {self.name}"
        if self.w not in (*WIDTHS, 16):
            raise NetsukeError(asked, f"w={self.w!r}", "16, 8, 4, 3, 2", "another number of bits from 2 to 16")
        if self.a not in (*range(2, 9), 16) or (self.w == 16 and self.a < 16):
            raise NetsukeError(
                asked, f"a={self.a!r} beside w={self.w}", "2 to 8 beside rounded weights, or 16", "w=8 keeps most of it"
            )
        for knob, known in (("trainable", tuple(MOVED)), ("grid", GRIDS)):
            if getattr(self, knob) not in known:
                raise NetsukeError(asked, f"{knob}={getattr(self, knob)!r}", ", ".join(known))
        tokens = {} if self.tokens is None else {"tokens": 2}
        self.require_whole(group=0, steps=0, batch=1, micro=1, warm=0, calibration=1, every=1, validation=1, **tokens)
        if self.minutes is not None and not self.minutes > 0:
            raise NetsukeError(asked, f"minutes={self.minutes!r}", "a number above 0, or none")
        if not 0 <= self.alpha <= 1:
            raise NetsukeError(asked, f"alpha={self.alpha!r}", "0 to 1")
        self.zeroth_order(1)
        object.__setattr__(self, "needs_data", self.w < 16)

    def zeroth_order(self, moved: int) -> ZerothOrderKnobs:
        """Settings of the steps when `moved` weights move."""
        rate = RATE / math.sqrt(moved) if self.rate is None else self.rate
        return ZerothOrderKnobs(eps=self.eps, rate=rate, directions=self.directions, seed=self.seed)

    def accepts(self, model: nn.Module) -> str | None:
        if not isinstance(model, Llama):
            return f"{type(model).__name__} is no Llama-style decoder"
        for i, shape in enumerate(model.cfg.blocks):
            if shape.experts:
                return f"blocks.{i} is a mixture of experts, which reconstruction does not know"
            if self.a < 16 and model.blocks[i].sites:
                return f"blocks.{i} has functions at {', '.join(model.blocks[i].sites)} already; a=16 leaves them there"
        for name, layer in model.linears().items():
            if name.startswith("blocks.") and not isinstance(layer, Dense):
                return f"{name} is stored as {layer.spec()['kind']}: train the dense model it came from"
        return None

    def apply(self, model: nn.Module, task: Task | None = None) -> nn.Module:
        if self.w == 16:
            return self.checked(model, task)
        work = prepare(model, task, self)
        return finish(work, fit(work, task, self).best)

    def strengths(self) -> list[Method]:
        return [replace(self, w=16, a=16), *(replace(self, w=bits) for bits in (8, 4, 3, 2))]


@dataclass
class Run:
    """What a run did: (step, seconds, mean validation loss) of every evaluation, (rate, slopes) of every step, the maps of the
    best evaluation, and why it ended early."""

    evaluations: list[tuple[int, float, float]] = field(default_factory=list)
    log: list[tuple[float, list[float]]] = field(default_factory=list)
    best: dict[str, QuantLinear] = field(default_factory=dict)
    stopped: str = ""

    @property
    def start(self) -> float:
        """Loss of the warm start."""
        return self.evaluations[0][2]

    @property
    def least(self) -> float:
        return min(loss for _, _, loss in self.evaluations)


def masters_of(model: Llama) -> dict[str, MasterLinear]:
    """The maps that move, by name."""
    return {n: m for n, m in model.linears().items() if isinstance(m, MasterLinear)}


def train_rows(task: Task, knobs: ZeroQAT) -> Tensor:
    """Rows of the train split, (N, T + 1): no more than the run can see. Raises NetsukeError for no text."""
    kept, wanted = [], max(knobs.calibration, knobs.steps * knobs.batch)
    for batch in task.batches("train"):
        kept.append(batch)
        wanted -= len(batch)
        if wanted <= 0:
            break
    if not sum(batch[:, 1:].numel() for batch in kept):
        raise NetsukeError("train zeroqat", "the train split holds no window", "at least two tokens of text")
    return torch.cat(kept)


def batch_at(rows: Tensor, step: int, knobs: ZeroQAT) -> Tensor:
    """The rows of one step (B, t + 1), drawn with (seed, step): a resumed run sees the same ones."""
    rng = torch.Generator().manual_seed(knobs.seed * 1_000_003 + step)
    chosen = rows[torch.randint(len(rows), (knobs.batch,), generator=rng)]
    spare = 0 if knobs.tokens is None else max(rows.shape[1] - knobs.tokens - 1, 0)
    start = int(torch.randint(spare + 1, (), generator=rng))
    return chosen[:, start : start + rows.shape[1] - spare]


def token_grids(blocks: int, bits: int) -> dict[str, TokenGrid]:
    """A grid at every site of every block whose numbers enter a product."""
    return {f"blocks.{i}.{site}": TokenGrid(bits) for i in range(blocks) for site in ROUNDED}


@torch.no_grad()
def prepare(model: Llama, task: Task, knobs: ZeroQAT) -> Llama:
    """The warm start: a copy of `model` whose blocks hold MasterLinear maps, or (trainable="qv") packed ones besides."""
    work = knobs.checked(model, task)
    batches = []
    if knobs.warm or knobs.a < 16:
        rows = train_rows(task, replace(knobs, steps=0))[: knobs.calibration]
        batches = list(rows[:, : knobs.tokens or rows.shape[1] - 1].split(1))
    scales: list[dict[str, Tensor]] = [{} for _ in work.blocks]
    if knobs.a < 16:
        scales = starting_scales(work, batches, knobs.alpha)
        work.stand(token_grids(len(work.blocks), knobs.a))

    def use(block: Block, maps: Quantized) -> None:
        for leaf, (weight, clip) in maps.items():
            bias, group = getattr(block, leaf).bias, knobs.group or weight.shape[1]
            if leaf in MOVED[knobs.trainable]:
                name = f"blocks.{block.layer}.{leaf}"
                setattr(block, leaf, MasterLinear(name, weight, bias, clip, knobs.w, group))
            else:
                setattr(block, leaf, quantized(weight, clip, knobs.w, group, bias))

    reconstruct(work, batches, knobs.w, knobs.group, scales, knobs.warm, use)
    return work


@contextmanager
def perturbed(masters: dict[str, MasterLinear], p: Perturbation | None) -> Iterator[None]:
    """While open, the masters answer as if moved by p; nothing is written to."""
    for m in masters.values():
        m.perturbation = p
    try:
        yield
    finally:
        for m in masters.values():
            m.perturbation = None


@torch.no_grad()
def held_out(model: Llama, task: Task, knobs: ZeroQAT) -> float:
    """Mean loss of the first `validation` batches of the validation split, `micro` rows at a time."""
    total, count = 0.0, 0
    for batch in task.batches("validation", knobs.validation):
        size = batch[:, 1:].numel()
        total += size * in_micro_batches(lambda part: task.loss(model, part), batch, knobs.micro)
        count += size
    return total / max(count, 1)


@torch.no_grad()
def fit(
    model: Llama, task: Task, knobs: ZeroQAT, checkpoint: Path | None = None,
    on_evaluation: Callable[[int, float], None] | None = None, estimate: Callable = slopes,
) -> Run:  # fmt: skip
    """Zeroth-order steps on a prepared model, in place. `Run.best` holds the packed maps of the least validation loss, the warm
    start's among them: the result is never worse than it on that text.

    With `checkpoint`, every evaluation writes (step, masters, best) and a run begins where the file ends; its seed must be
    the same. `estimate` finds the slopes of a step; controls pass one that is wrong. Stops early, with a warning, when a loss
    is not finite or the validation loss rises five times running.
    Raises NetsukeError when eps is too small to change any loss, and for a checkpoint of other settings.
    """
    masters, rows = masters_of(model), train_rows(task, knobs)
    parameters = {f"{n}.weight": m.weight for n, m in masters.items()}
    steps = knobs.zeroth_order(sum(p.numel() for p in parameters.values()))
    for m in masters.values():
        if knobs.grid == "fixed":
            m.fix_grid()
    run, step, spent = Run(), 0, 0.0
    if checkpoint and checkpoint.exists():
        step, spent = _restore(checkpoint, knobs, parameters, run, masters)
    begin = time.monotonic()
    while True:
        seconds = spent + time.monotonic() - begin
        progress = max(step / max(knobs.steps, 1), seconds / (60 * knobs.minutes) if knobs.minutes else 0.0)
        done = progress >= 1 or step >= knobs.steps or bool(run.stopped)
        due = not run.evaluations or run.evaluations[-1][0] < step
        if due and (done or step % knobs.every == 0):
            _evaluate(run, step, seconds, held_out(model, task, knobs), masters)
            if on_evaluation:
                on_evaluation(step, run.evaluations[-1][2])
            if checkpoint:
                _save(checkpoint, knobs, parameters, run, step, spent + time.monotonic() - begin)
        if done or run.stopped:
            break
        batch = batch_at(rows, step, knobs)

        def loss(p: Perturbation, batch: Tensor = batch) -> float:
            with perturbed(masters, p):
                return in_micro_batches(lambda part: task.loss(model, part), batch, knobs.micro)

        try:
            found, _ = estimate(loss, step, steps)
        except FloatingPointError as e:
            run.stopped = f"{e}; the best model so far is kept"
            break
        rate = steps.rate_at(progress)
        descend(parameters, found, step, rate, steps)
        run.log.append((rate, found))
        step += 1
    if run.stopped:
        warnings.warn(f"zeroqat: {run.stopped}", stacklevel=2)
    return run


def _evaluate(run: Run, step: int, seconds: float, loss: float, masters: dict[str, MasterLinear]) -> None:
    """Notes an evaluation and keeps the maps, packed, when it is the best so far."""
    if not run.evaluations or loss < run.least:
        run.best = {name: m.pack() for name, m in masters.items()}
    run.evaluations.append((step, seconds, loss))
    last = [value for _, _, value in run.evaluations[-RISES - 1 :]]
    if not math.isfinite(loss):
        run.stopped = f"the validation loss became {loss} at step {step}; the best model so far is kept"
    elif len(last) > RISES and all(a < b for a, b in pairwise(last)):
        run.stopped = f"learning rate too high: loss rose {RISES} evaluations running, up to step {step}"


def finish(model: Llama, best: dict[str, QuantLinear]) -> Llama:
    """Puts the packed maps in place of the masters, in `model` itself."""
    for name, layer in best.items():
        model.replace(name, layer)
    return model


def _settings(knobs: ZeroQAT) -> str:
    """What a checkpoint must share with the run that goes on from it: all but how long the run is."""
    return str(replace(knobs, steps=0, minutes=None).to_json())


def _save(path: Path, knobs: ZeroQAT, parameters: dict[str, Tensor], run: Run, step: int, seconds: float) -> None:
    state = {
        "settings": _settings(knobs), "step": step, "seconds": seconds, "masters": parameters, "log": run.log,
        "evaluations": run.evaluations, "best": {n: m.state_dict() for n, m in run.best.items()},
    }  # fmt: skip
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def _restore(
    path: Path, knobs: ZeroQAT, parameters: dict[str, Tensor], run: Run, masters: dict[str, MasterLinear]
) -> tuple[int, float]:
    saved = torch.load(path, weights_only=True)
    if saved["settings"] != _settings(knobs) or saved["masters"].keys() != parameters.keys():
        raise NetsukeError(
            f"go on from {path.name}", "it was written with other settings or for another model",
            saved["settings"], "the same settings, or another checkpoint",
        )  # fmt: skip
    for name, tensor in saved["masters"].items():
        parameters[name].copy_(tensor)
    run.log, run.evaluations = saved["log"], [tuple(e) for e in saved["evaluations"]]
    run.best = {name: masters[name].pack() for name in saved["best"]}
    for name, state in saved["best"].items():
        run.best[name].load_state_dict(state)
    return saved["step"], saved["seconds"]
