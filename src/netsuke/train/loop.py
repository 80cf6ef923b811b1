"""The one training loop: recipes, healing after a cut and on-device adaptation all call it.

Matrices inside the blocks are stepped by Muon (orthogonalised momentum, Jordan 2024; `torch.optim.Muon`), everything
else by AdamW. The rate warms up, stays, and falls linearly to zero over the last part; progress is counted in steps or, when
`minutes` is given, in whichever of time and steps is further along, so that a run always ends fully annealed. With `epoch` set
the rate falls by a factor per epoch instead, as forecasters are trained, and `on_step` may end the run early; time cannot, as
epochs are counted in steps.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from netsuke.errors import NetsukeError


@dataclass(frozen=True)
class LoopKnobs:
    steps: int
    muon_lr: float = 0.02  # Muon's usual rate for hidden matrices; insensitive within a factor of two
    adam_lr: float = 3e-3  # embeddings and norms of a 1-10 M model; 2e-4 is usual at 1 B
    weight_decay: float = 0.05
    warmup: float = 0.02  # share of the run
    decay: float = 0.5  # share of the run over which the rate falls to zero
    clip: float = 1.0
    minutes: float | None = None
    bf16: bool = False  # bfloat16 autocast: twice the tokens per second where the CPU has the instructions
    epoch: int | None = None  # steps of an epoch: the full rate for `hold` epochs, then times `fall` after each
    hold: int = (
        3  # of the schedule that long forecasts share ("type3"): small maps are close to their end after three epochs
    )
    fall: float = 0.8  # of the same: 30 epochs then end at 0.2 % of the rate, and patience ends most runs before
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's; 0.999 for noisy regression
    floor: float | None = None  # the rate falls as a cosine to this share of it instead

    def __post_init__(self) -> None:
        if self.epoch and self.minutes:
            raise NetsukeError(
                "train by epochs within minutes", "the rate of an epoch depends on steps alone", "epoch or minutes",
                "fewer epochs, or on_step to end the run",
            )  # fmt: skip


@dataclass
class History:
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def rate_at(progress: float, k: LoopKnobs) -> float:
    """Share of the full rate at a progress in [0, 1]."""
    if k.epoch:
        return k.fall ** max(0, round(progress * k.steps) // k.epoch - k.hold + 1)
    if k.floor is not None:
        return min(1.0, (progress + 1e-9) / max(k.warmup, 1e-9)) * (
            k.floor + (1 - k.floor) * (1 + math.cos(math.pi * progress)) / 2
        )
    return max(0.0, min(1.0, (progress + 1e-9) / max(k.warmup, 1e-9), (1 - progress) / max(k.decay, 1e-9)))


def optimizers(model: nn.Module, k: LoopKnobs) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices inside blocks, AdamW for the rest; only parameters that ask for gradients."""
    wanted = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inner = [p for n, p in wanted if p.ndim == 2 and "blocks." in n]
    rest = [p for n, p in wanted if not (p.ndim == 2 and "blocks." in n)]
    out: list[tuple[torch.optim.Optimizer, float]] = []
    if inner:
        out.append((torch.optim.Muon(inner, lr=k.muon_lr, weight_decay=k.weight_decay), k.muon_lr))
    if rest:
        out.append((torch.optim.AdamW(rest, lr=k.adam_lr, betas=k.betas, weight_decay=0.0), k.adam_lr))
    return out


def train(
    model: nn.Module,
    batch_at: Callable[[int], Tensor],
    loss: Callable[[nn.Module, Tensor], Tensor],
    knobs: LoopKnobs,
    *,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 240,
    on_step: Callable[[int, float, float], bool | None] | None = None,
    stepped: list[tuple[torch.optim.Optimizer, float]] | None = None,
) -> History:
    """Trains `model` in place on `loss(model, batch_at(step))` and returns its history.

    `batch_at` must depend on the step alone: a run that is resumed from `checkpoint` then sees the same batches.
    `on_step(step, loss, rate)` is called after every step and ends the run when it returns True. `stepped` are optimizers with
    their full rates, by default those of `optimizers`.
    """
    stepped = optimizers(model, knobs) if stepped is None else stepped
    history, step, spent = History(), 0, 0.0
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for (opt, _), state in zip(stepped, saved["optimizers"]):
            opt.load_state_dict(state)
        step, spent = saved["step"], saved["seconds"]
        history.steps, history.losses = saved["steps"], saved["losses"]
    start = last_save = time.monotonic()

    def save() -> None:
        state = {
            "model": model.state_dict(), "optimizers": [o.state_dict() for o, _ in stepped], "step": step,
            "seconds": spent, "steps": history.steps, "losses": history.losses,
        }  # fmt: skip
        temporary = checkpoint.with_suffix(".part")
        torch.save(state, temporary)
        os.replace(temporary, checkpoint)

    while True:
        seconds = spent + time.monotonic() - start
        progress = max(step / knobs.steps, seconds / (60 * knobs.minutes) if knobs.minutes else 0.0)
        if progress >= 1:
            break
        rate = rate_at(progress, knobs)
        for opt, base in stepped:
            for group in opt.param_groups:
                group["lr"] = base * rate
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=knobs.bf16):
            value = loss(model, batch_at(step))
        value.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], knobs.clip)
        for opt, _ in stepped:
            opt.step()
            opt.zero_grad()
        step += 1
        number = float(value.detach())
        if not math.isfinite(number):
            raise FloatingPointError(f"the loss became {number} at step {step}")
        history.steps.append(step)
        history.losses.append(number)
        if on_step and on_step(step, number, rate):
            break
        if checkpoint and time.monotonic() - last_save > checkpoint_seconds:
            last_save, spent, start = time.monotonic(), spent + time.monotonic() - start, time.monotonic()
            save()
    history.seconds = spent + time.monotonic() - start
    return history
