"""Training any forecaster by gradients: all windows of the training rows, early stopping on validation rows, one loop.

Rows before the validation part serve as its look-backs, as the protocol of long forecasts has it: n rows of targets give
n - horizon + 1 windows. No batch is dropped, neither in training nor in scoring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from netsuke.apps.signals.forecast.fold import Shape
from netsuke.train.loop import LoopKnobs, train


@dataclass(frozen=True)
class Plan:
    """rate       of Adam; it stays for three epochs and then falls by a fifth per epoch
    batch      windows a step; each brings all its channels
    patience   epochs without a better validation error before the end; the best epoch's weights are kept
    """

    rate: float = 0.02
    epochs: int = 30
    patience: int = 10
    batch: int = 256
    seed: int = 0


def windows(rows: np.ndarray, shape: Shape) -> Tensor:
    """float32 view (channels, windows, lookback + horizon) of rows (T, channels)."""
    x = torch.from_numpy(np.ascontiguousarray(rows.T, np.float32))
    return x.unfold(1, shape.lookback + shape.horizon, 1)


@torch.no_grad()
def errors(model: nn.Module, rows: np.ndarray, shape: Shape, batch: int = 512) -> tuple[float, float]:
    """(MSE, MAE) over every window, step and channel of rows (T, channels)."""
    seen, square, absolute = windows(rows, shape), 0.0, 0.0
    for part in seen.split(batch, dim=1):
        flat = part.reshape(-1, part.shape[2])
        e = (model(flat[:, : shape.lookback]) - flat[:, shape.lookback :]).double()
        square, absolute = square + float(e.square().sum()), absolute + float(e.abs().sum())
    count = seen.shape[0] * seen.shape[1] * shape.horizon
    return square / count, absolute / count


def fit(
    model: nn.Module, rows: np.ndarray, validation: np.ndarray, shape: Shape, plan: Plan,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Trains `model` in place on scaled rows (T, channels) and returns {epochs, validation (MSE), seconds}.

    `validation` begins with `lookback` rows that are only seen, not forecast. `on_step(step, steps)` reports progress.
    """
    seen = windows(rows, shape)
    epoch = -(-seen.shape[1] // plan.batch)
    order: dict[int, Tensor] = {}
    best: dict[str, object] = {"validation": np.inf, "epochs": 0}

    def judge(number: int) -> None:
        found = errors(model, validation, shape)[0]
        if found < best["validation"]:
            state = {k: v.clone() for k, v in model.state_dict().items()}
            best.update(validation=found, epochs=number, state=state)

    def batch_at(step: int) -> Tensor:
        number = step // epoch
        if number not in order:
            order.clear()
            order[number] = torch.randperm(
                seen.shape[1], generator=torch.Generator().manual_seed(plan.seed + 7919 * number)
            )
        picked = order[number][step % epoch * plan.batch :][: plan.batch]
        return seen[:, picked].reshape(-1, seen.shape[2])

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.mse_loss(net(batch[:, : shape.lookback]), batch[:, shape.lookback :])

    def after(step: int, _: float, __: float) -> bool:
        if on_step:
            on_step(step, plan.epochs * epoch)
        if step % epoch:
            return False
        judge(step // epoch)
        return step // epoch - best["epochs"] >= plan.patience

    knobs = LoopKnobs(steps=plan.epochs * epoch, adam_lr=plan.rate, clip=float("inf"), epoch=epoch, betas=(0.9, 0.999))
    judge(0)  # a start from moments may be hard to better
    history = train(model, batch_at, loss, knobs, on_step=after)
    model.load_state_dict(best["state"])
    return {"epochs": best["epochs"], "validation": best["validation"], "seconds": history.seconds}


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model whose start depends on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
