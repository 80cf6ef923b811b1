"""Activation statistics, collected by hooks in one pass and shared by every method that calibrates.

`tapped({...})` listens to the inputs or outputs of modules while the caller runs the model; accumulators keep float64
sums only, so memory does not grow with the amount of calibration text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Gram:
    """Σ xᵀx over all rows seen, (I, I) float64, and their number."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.rows = 0

    def add(self, x: Tensor) -> None:
        flat = x.detach().flatten(0, -2)
        # One product in the working precision per batch, summed in float64: the batch is short, the sum is long.
        part = (flat.float().T @ flat.float()).double()
        self.total = part if self.total is None else self.total.add_(part)
        self.rows += flat.shape[0]

    def mean(self) -> Tensor:
        """E[xᵀx], (I, I)."""
        return self.total / max(self.rows, 1)


class SquareSum:
    """Σ x² per channel, (O,) float64: the diagonal of a Gram matrix, without the rest."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.rows = 0

    def add(self, x: Tensor) -> None:
        flat = x.detach().flatten(0, -2)
        part = flat.double().square().sum(0)
        self.total = part if self.total is None else self.total.add_(part)
        self.rows += flat.shape[0]


class Influence:
    """1 − E[cos(x_in, x_out)] of a block: how much it turns the residual stream (block influence, 2024)."""

    def __init__(self) -> None:
        self.cosines, self.rows = 0.0, 0

    def add(self, x: Tensor, y: Tensor) -> None:
        cos = torch.nn.functional.cosine_similarity(x.detach().double(), y.detach().double(), dim=-1)
        self.cosines += float(cos.sum())
        self.rows += cos.numel()

    def value(self) -> float:
        return 1.0 - self.cosines / max(self.rows, 1)


@contextmanager
def tapped(
    inputs: dict[nn.Module, Gram | SquareSum] | None = None,
    outputs: dict[nn.Module, Gram | SquareSum] | None = None,
    influences: dict[nn.Module, Influence] | None = None,
) -> Iterator[None]:
    """While open, every call of a listed module feeds its accumulator."""
    handles = [
        m.register_forward_pre_hook(lambda _, args, acc=acc: acc.add(args[0])) for m, acc in (inputs or {}).items()
    ]
    handles += [
        m.register_forward_hook(lambda _, args, out, acc=acc: acc.add(out)) for m, acc in (outputs or {}).items()
    ]
    handles += [
        m.register_forward_hook(lambda _, args, out, acc=acc: acc.add(args[0], out))
        for m, acc in (influences or {}).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
