"""Descent from forward passes alone: no gradients, no stored activations, no optimiser state.

"Fine-Tuning Language Models with Just Forward Passes" (MeZO, 2023), as used by ZeroQAT (arXiv 2509.00031, 2025). For q
random directions u_i ~ N(0, I) and one batch that both signs share,

    g_i = [L(W + ε u_i) − L(W − ε u_i)] / 2ε, clipped to ± clip / ε,        W <- W − (η / q) Σ g_i u_i

E[g u] is the gradient of L smoothed over a ball of size ε, so L may have steps, as the loss of a quantized model has. One
direction points to the gradient with a cosine of about 1/√d: thousands of steps, each as cheap as two forward passes.

u is never stored. It is drawn again, in both passes and in the update, from a generator keyed by (seed, step, direction,
parameter name, block of rows): no order of drawing has to be kept, and a layer may ask for the rows it is about to use.
A whole run is its seed and the list of its g: `replay` repeats it bit for bit.

A perturbed model is either never mutated (`Perturbation.rows` while a layer works, or `standing`, which puts perturbed copies
in and the very tensors back), or shifted in place (`shift_`: no copy at all, but +ε, −2ε, +ε drifts by roundings).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from netsuke.errors import NetsukeError
from netsuke.layers.linear import WIDENED


@dataclass(frozen=True)
class ZerothOrderKnobs:
    """Attributes:

    eps         size of a perturbation; below the resolution of the weights both losses are the same and the run stops
    rate        η of the first step. The best one falls like 1/d: 1e-5 for 250,000 weights that all move
    directions  q per step; the cosine to the gradient grows like sqrt(q / d), the cost like q
    clip        |g| is held below clip / eps, so that one lucky direction cannot throw the model out
    final       share of the rate that is left at the end, falling linearly: 0.5 is the paper's
    """

    eps: float = 1e-3
    rate: float = 1e-5
    directions: int = 1
    clip: float = 0.2
    final: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        asked = "take zeroth-order steps"
        for knob in ("eps", "rate", "clip"):
            if not 0 < getattr(self, knob) < math.inf:
                raise NetsukeError(asked, f"{knob}={getattr(self, knob)!r}", "a number above 0")
        if not isinstance(self.directions, int) or self.directions < 1:
            raise NetsukeError(asked, f"directions={self.directions!r}", "a whole number from 1")
        if not 0 <= self.final <= 1:
            raise NetsukeError(asked, f"final={self.final!r}", "0 to 1")

    def rate_at(self, progress: float) -> float:
        """The rate after a share of the run, 0 to 1."""
        return self.rate * (1 - (1 - self.final) * min(max(progress, 0.0), 1.0))


@dataclass(frozen=True)
class Perturbation:
    """scale · u of one direction of one step, u ~ N(0, 1) for every parameter by name."""

    seed: int
    step: int
    direction: int
    scale: float

    def blocks(self, name: str, shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
        """(a, b, u of the rows a … b−1) in blocks that cover rows start … stop−1 of a parameter of `shape`. At most half a
        megabyte is drawn at a time."""
        width = math.prod(shape[1:])
        size = max(1, WIDENED // max(width, 1))
        for number in range(start // size, -(-stop // size)):
            first, last = number * size, min((number + 1) * size, shape[0])
            key = f"{self.seed}/{self.step}/{self.direction}/{name}/{number}".encode()
            rng = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little"))
            u = torch.randn(last - first, *shape[1:], generator=rng)
            a, b = max(first, start), min(last, stop)
            yield a, b, u[a - first : b - first]

    def rows(self, name: str, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Rows start … stop−1 of `tensor`, moved: new memory, `tensor` stays as it is."""
        out = tensor[start:stop].clone()
        for a, b, u in self.blocks(name, tensor.shape, start, stop):
            out[a - start : b - start].add_(u, alpha=self.scale)
        return out

    def shift_(self, parameters: dict[str, Tensor]) -> None:
        """Adds scale · u to the parameters in place, block by block."""
        for name, tensor in parameters.items():
            for a, b, u in self.blocks(name, tensor.shape, 0, len(tensor)):
                tensor.data[a:b].add_(u, alpha=self.scale)

    @contextmanager
    def standing(self, parameters: dict[str, Tensor]) -> Iterator[None]:
        """While open, the parameters hold moved copies of themselves; afterwards their own memory, bit for bit."""
        kept = {name: tensor.data for name, tensor in parameters.items()}
        try:
            for name, tensor in parameters.items():
                tensor.data = self.rows(name, kept[name], 0, len(tensor))
            yield
        finally:
            for name, tensor in parameters.items():
                tensor.data = kept[name]


Loss = Callable[[Perturbation], float]


@torch.no_grad()
def slopes(loss: Loss, step: int, knobs: ZerothOrderKnobs) -> tuple[list[float], float]:
    """g of every direction and the mean of all losses. `loss(p)` is the loss of one batch with p standing, in float64 as far
    as it is a mean of many; the batch must depend on the step alone.

    Raises NetsukeError when no direction changes the loss at all, FloatingPointError when a loss is not finite.
    """
    out, total = [], 0.0
    for i in range(knobs.directions):
        plus = loss(Perturbation(knobs.seed, step, i, knobs.eps))
        minus = loss(Perturbation(knobs.seed, step, i, -knobs.eps))
        if not math.isfinite(plus + minus):
            raise FloatingPointError(f"the loss became {plus + minus} at step {step}")
        bound = knobs.clip / knobs.eps
        out.append(max(-bound, min(bound, (plus - minus) / (2 * knobs.eps))))
        total += (plus + minus) / 2
    if not any(out):
        raise NetsukeError(
            f"estimate a gradient with eps={knobs.eps:g}", "both losses are identical: perturbation below weight resolution",
            "an eps that changes a rounded weight", "raise eps or use float32",
        )  # fmt: skip
    return out, total / knobs.directions


@torch.no_grad()
def descend(
    parameters: dict[str, Tensor], found: Sequence[float], step: int, rate: float, knobs: ZerothOrderKnobs
) -> None:
    """One update in place: W −= rate / q · Σ g u, with every u drawn again."""
    for i, g in enumerate(found):
        Perturbation(knobs.seed, step, i, -rate * g / len(found)).shift_(parameters)


def replay(
    parameters: dict[str, Tensor], log: Sequence[tuple[float, Sequence[float]]], knobs: ZerothOrderKnobs
) -> None:
    """Repeats a run in place from where it began; `log` holds (rate, slopes) of every step."""
    for step, (rate, found) in enumerate(log):
        descend(parameters, found, step, rate, knobs)


def in_micro_batches(loss: Callable[[Tensor], Tensor], rows: Tensor, micro: int) -> float:
    """Mean of `loss(part)` over parts of `micro` rows each, weighted by their rows: the memory of a part, whatever the
    batch. `loss` returns the mean of equally long rows."""
    return math.fsum(float(loss(part).double()) * len(part) for part in rows.split(micro)) / len(rows)
