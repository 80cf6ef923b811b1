"""Activation statistics, collected by hooks in one pass and shared by every method that calibrates.

`tapped({...})` listens to the inputs or outputs of modules while the caller runs the model; accumulators keep float64
sums or counts only, so memory does not grow with the amount of calibration text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Gram:
    """Σ xᵀx over all rows seen, (I, I) float64, and their number.

    drift   Σ (y − x)ᵀx of rows that came with y, what they were before the model was changed; None where none did
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.drift: Tensor | None = None
        self.rows = 0

    def add(self, x: Tensor, before: Tensor | None = None) -> None:
        flat = x.detach().flatten(0, -2)
        # One product in the working precision per batch, summed in float64: the batch is short, the sum is long.
        part = (flat.float().T @ flat.float()).double()
        self.total = part if self.total is None else self.total.add_(part)
        if before is not None:
            moved = ((before.detach().flatten(0, -2).float() - flat.float()).T @ flat.float()).double()
            self.drift = moved if self.drift is None else self.drift.add_(moved)
        self.rows += flat.shape[0]

    def mean(self) -> Tensor:
        """E[xᵀx], (I, I)."""
        return self.total / max(self.rows, 1)

    def mean_drift(self) -> Tensor | None:
        """E[(y − x)ᵀx], (I, I)."""
        return None if self.drift is None else self.drift / max(self.rows, 1)


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


class Range:
    """Smallest and largest value seen."""

    def __init__(self) -> None:
        self.low, self.high, self.rows = math.inf, -math.inf, 0

    def add(self, x: Tensor) -> None:
        low, high = x.detach().aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        self.rows += x.shape[:-1].numel()


class AbsMax:
    """Largest |x| per channel, the last `dims` dimensions being channels."""

    def __init__(self, dims: int = 1) -> None:
        self.reach: Tensor | None = None
        self.dims = dims

    def add(self, x: Tensor) -> None:
        part = x.detach().abs().flatten(0, -1 - self.dims).amax(0)
        self.reach = part if self.reach is None else torch.maximum(self.reach, part)


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


class QuantileSketch:
    """Quantiles of numbers ≥ 0 from counts in buckets of equal ratio: two sketches add up, and none forgets.

    A bucket is what float32 numbers have in common in their exponent and their first `DIGITS` bits: a quantile is off by less
    than 2^-DIGITS of itself (0.1 %), from 1e-38 to the largest float32. 2 MB whatever it has seen.
    """

    DIGITS = 10
    SHIFT = 23 - DIGITS  # bits of a float32's fraction that a bucket forgets

    def __init__(self) -> None:
        self.counts = torch.zeros(0x7F80_0000 >> self.SHIFT, dtype=torch.int64)  # as many buckets as lie below infinity

    def add(self, values: Tensor) -> None:
        """Counts numbers of any shape. Raises ValueError for one that is negative, infinite or NaN."""
        flat = values.detach().flatten().float().contiguous() + 0.0  # -0 becomes 0: its bits would be a negative number
        if flat.numel() and not (float(flat.min()) >= 0 and float(flat.max()) < torch.inf):
            raise ValueError("values that are negative or not finite")
        self.counts += torch.bincount(flat.view(torch.int32) >> self.SHIFT, minlength=len(self.counts))

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """The number below which `share` of what was seen lies; 0 gives 0. Raises ValueError before anything was seen."""
        if not self.count:
            raise ValueError("a quantile of nothing")
        wanted, below = share * self.count, self.counts.cumsum(0)
        if wanted <= 0:
            return 0.0
        bucket = min(int(torch.searchsorted(below, wanted)), len(below) - 1)
        edges = torch.tensor([bucket, bucket + 1], dtype=torch.int32) << self.SHIFT
        low, high = edges.view(torch.float32).tolist()
        inside = (wanted - float(below[bucket] - self.counts[bucket])) / max(int(self.counts[bucket]), 1)
        return min(low + (high - low) * inside, torch.finfo(torch.float32).max)


class ScoreSketch(QuantileSketch):
    """Quantiles of |x_i| · weights_i over all channels and tokens of a module's input (B, T, I), weights (I,).

    The first `left_out` tokens of every window are not counted: the first one is where attention rests, its activations are
    tens of times the others', and it is never decoded.
    """

    def __init__(self, weights: Tensor, left_out: int = 1) -> None:
        super().__init__()
        self.weights, self.left_out = weights, left_out

    def add(self, x: Tensor) -> None:
        super().add(x[..., self.left_out :, :].float().abs() * self.weights)


@contextmanager
def tapped(
    inputs: dict[nn.Module, Gram | SquareSum | QuantileSketch] | None = None,
    outputs: dict[nn.Module, Gram | SquareSum | QuantileSketch] | None = None,
    influences: dict[nn.Module, Influence] | None = None,
    sites: dict[tuple[nn.Module, str], Range | AbsMax] | None = None,
) -> Iterator[None]:
    """While open, every call of a listed module feeds its accumulator.

    sites   (block, site of models.llama.SITES) -> what sees the values that reach the site; what stands there stays
    """
    standing = {block: block.sites for block, _ in sites or {}}
    for block, old in standing.items():
        block.sites = old | {s: _listening(acc, old.get(s)) for (b, s), acc in sites.items() if b is block}
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
        for block, old in standing.items():
            block.sites = old


def _listening(acc: Range | AbsMax, then: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    def at(x: Tensor) -> Tensor:
        acc.add(x)
        return x if then is None else then(x)

    return at
