"""Heals a carved model: what is left learns to answer as the model before it was carved, and its size stays the same.

Loss: KL(before || carved) of the next-token distribution on the task's train text, or the plain next-token loss where there
is no model before. What learns:

    scales   one factor per group of a quantized map, W = e^s · scale · (code − zero); codes stay ("Memory-Efficient Fine-Tuning
             of Compressed Large Language Models via sub-4-bit Integer Quantization", NeurIPS 2023)
    norms    weights of the norms
    dense    float maps, which cuts leave behind

Back-propagation through the one training loop; the best of the checkpoints on validation text is kept, the start among them,
so the result is never worse there. Use it after all cuts and roundings. It cannot repair a model that lost its function
(2 bits on a small model): there, carve less.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netsuke.compress.method import Method
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.layers.packing import unpack
from netsuke.layers.quantized import QuantLinear, group_count
from netsuke.models.llama import Llama, RMSNorm
from netsuke.tasks.base import Task
from netsuke.train.loop import LoopKnobs, train

PARTS = ("scales", "norms", "dense")
CHECKS = 4  # looks at validation text during a run
CHECKED = 8  # batches of validation text per look


class ScaledCodes(nn.Module):
    """A QuantLinear while its scales learn: codes as integers, one learned log factor for each scale."""

    def __init__(self, layer: QuantLinear):
        super().__init__()
        self.layer = layer
        self.groups = group_count(layer.ins, layer.group)
        codes = unpack(layer.codes, layer.bits, layer.ins).float()
        zeros = layer.zeros.float().repeat_interleave(layer.group, 1)[:, : layer.ins]
        steps = (codes - zeros).to(torch.int16 if layer.bits == 8 else torch.int8)
        self.register_buffer("steps", steps, persistent=False)
        self.factor = nn.Parameter(torch.zeros(layer.outs * self.groups))  # flat: a matrix would be stepped by Muon

    def scales(self) -> Tensor:
        """(O, n_groups) float32."""
        return self.layer.scales.float() * self.factor.exp().view(-1, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        spread = self.scales().repeat_interleave(self.layer.group, 1)[:, : self.layer.ins]
        bias = None if self.layer.bias is None else self.layer.bias.to(x.dtype)
        return F.linear(x, (self.steps * spread).to(x.dtype), bias)

    def learned(self) -> QuantLinear:
        """The map with its new scales, stored as before. Codes and zero points are the old ones, bit for bit."""
        layer, top = self.layer, torch.finfo(torch.float16).max
        scales = self.scales().detach().clamp(max=top).half()
        tensors = layer.codes, scales, layer.zeros
        return QuantLinear(
            *tensors, layer.bits, layer.group, layer.ins, None if layer.bias is None else layer.bias.detach()
        )


@dataclass(frozen=True)
class Heal(Method):
    """Attributes:

    steps   of `batch` windows each; a hundred recover a third of what 3 bits cost, the rest comes slowly
    parts   what learns; "dense" needs the most memory: a float32 gradient and momentum for every weight
    rate    of the log scales and norms (AdamW); a tenth moves nothing, ten times more forgets
    dense   rate of float maps (Muon), a tenth of what training from scratch uses
    batch   windows a step
    seed    of the order of windows
    """

    name: ClassVar[str] = "heal"
    paper: ClassVar[str] = "PEQA: Memory-Efficient Fine-Tuning of Compressed Large Language Models (NeurIPS 2023)"
    trains: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True
    saves: ClassVar[str] = "loss"

    steps: int = 100
    parts: tuple[str, ...] = PARTS
    rate: float = 1e-3
    dense: float = 2e-3
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        asked = f"build {self.name}"
        if not set(self.parts) <= set(PARTS) or not self.parts:
            raise NetsukeError(asked, f"parts={','.join(self.parts)}", f"some of {', '.join(PARTS)}")
        self.require_whole(steps=0, batch=1, seed=0)
        for knob in ("rate", "dense"):
            if not 0 < getattr(self, knob) < 1:
                raise NetsukeError(asked, f"{knob}={getattr(self, knob)}", "a number between 0 and 1")
        object.__setattr__(self, "needs_data", self.steps > 0)

    def accepts(self, model: nn.Module) -> str | None:
        if not isinstance(model, Llama):
            return f"{type(model).__name__} is no Llama-style decoder"
        return None

    def apply(
        self, model: nn.Module, task: Task | None = None, before: nn.Module | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> nn.Module:  # fmt: skip
        """The healed copy; `before` is the model that it learns from. Raises NetsukeError as all methods do."""
        work = self.checked(model, task)
        return heal(work, task, self, before, on_step) if self.steps else work

    def strengths(self) -> list[Method]:
        return [replace(self, steps=n) for n in (0, 20, 60)]


def heal(
    work: Llama, task: Task, knobs: Heal, before: Llama | None, on_step: Callable[[int, int], None] | None
) -> Llama:
    """Trains `work` in place and returns it as it was at its best."""
    start = copy.deepcopy(work)
    kinds = {n: m.weight.dtype for n, m in work.linears().items() if isinstance(m, Dense)}
    prepare(work, knobs.parts)
    rows = task.windows("train")

    def batch_at(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(knobs.seed * 1_000_003 + step)
        return rows[torch.randint(len(rows), (knobs.batch,), generator=rng)]

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        if before is None:
            return task.loss(model, ids)
        with torch.no_grad():
            want = before(ids[:, :-1]).float().log_softmax(-1)
        return (
            F.kl_div(model(ids[:, :-1]).float().log_softmax(-1), want, log_target=True, reduction="sum")
            / ids[:, 1:].numel()
        )

    with torch.no_grad():
        best = start, task.mean_loss(start, "validation", CHECKED)
    every = max(knobs.steps // CHECKS, 1)

    def look(step: int, value: float, rate: float) -> None:
        nonlocal best
        if on_step:
            on_step(step, knobs.steps)
        if step % every and step != knobs.steps:
            return
        with torch.no_grad():
            found = finished(work, kinds)
            score = task.mean_loss(found, "validation", CHECKED)
        if score < best[1]:
            best = found, score

    state, was = torch.get_rng_state(), torch.is_grad_enabled()
    settings = LoopKnobs(
        steps=knobs.steps, muon_lr=knobs.dense, adam_lr=knobs.rate, weight_decay=0.0, warmup=0.1, decay=0.7,
        betas=(0.9, 0.99),
    )  # fmt: skip
    try:
        torch.set_grad_enabled(True)
        train(work, batch_at, loss, settings, on_step=look)
    finally:
        torch.set_grad_enabled(was)
        torch.set_rng_state(state)
    return best[0]


def prepare(model: Llama, parts: tuple[str, ...]) -> None:
    """Makes the parts of `model` learn, in place: quantized maps become ScaledCodes, dense ones float32."""
    model.requires_grad_(False)
    for name, layer in model.linears().items():
        if isinstance(layer, QuantLinear) and "scales" in parts and name != "embed":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent) if parent else model, leaf, ScaledCodes(layer))
        elif isinstance(layer, Dense) and "dense" in parts:
            layer.float().requires_grad_(True)
    for module in model.modules():
        if isinstance(module, RMSNorm) and "norms" in parts:
            module.weight.requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        raise NetsukeError("heal", f"nothing in the model is {' or '.join(parts)}", f"parts among {', '.join(PARTS)}")


@torch.no_grad()
def finished(model: Llama, kinds: dict[str, torch.dtype]) -> Llama:
    """A copy as it is stored: learned scales in float16, dense maps in the dtype that they had."""
    out = copy.deepcopy(model).requires_grad_(False)
    for name, module in list(out.named_modules()):
        if isinstance(module, ScaledCodes):
            out.replace(name, module.learned())
    linears = out.linears()
    for name, kind in kinds.items():
        tensors = linears[name].weight, linears[name].bias
        out.replace(name, Dense(*(None if t is None else t.detach().to(kind) for t in tensors)))
    return out
