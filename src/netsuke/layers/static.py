"""A static grid for activations: the same few codes for every input, fixed when the model is made.

    code = clip(round(x / scale) + zero, −2^(b−1), 2^(b−1) − 1),   x̂ = scale · (code − zero)

8 bits are affine with an integer zero point, so that 0 (padding, a closed gate) is exact; 16 bits are symmetric (zero = 0),
which int16 lanes hold without a correction. A `StaticGrid` stands at a site of a block (`Llama.stand`) and is stored in the
artifact's manifest: beside the integer weights it is all that integer-only execution needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from netsuke.errors import NetsukeError

ASKED = "build a static grid"
BITS = (8, 16)
KEYS = {"kind", "scale", "zero", "bits"}
TINY = 2.0**-24  # the smallest positive float16: no scale is smaller
DYNAMIC = range(2, 17)  # bits of a TokenGrid


class _Round(torch.autograd.Function):
    """Rounds; the gradient passes as if it had not (straight-through estimator, Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def rounded(x: Tensor) -> Tensor:
    """The nearest integers (half to even), differentiable as the identity."""
    return _Round.apply(x) if x.requires_grad and torch.is_grad_enabled() else x.round()


def levels(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code of `bits` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def codes(x: Tensor, scale: Tensor | float, zero: Tensor | float, bits: int) -> Tensor:
    """Codes of x as floats; `scale` and `zero` broadcast against x. Gradients reach x, scale and zero."""
    return (rounded(x / scale) + zero).clamp(*levels(bits))


def snap(x: Tensor, scale: Tensor | float, zero: Tensor | float, bits: int) -> Tensor:
    """The value on the grid that stands for x."""
    return (codes(x, scale, zero, bits) - zero) * scale


def grid(low: Tensor, high: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point (a rounded code, straight-through) of ranges low … high, elementwise; both in their shape."""
    least, most = levels(bits)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = (torch.maximum(-low, high) / most).clamp(min=TINY)
        return scale, torch.zeros_like(scale)
    scale = ((high - low) / (most - least)).clamp(min=TINY)
    return scale, rounded(least - low / scale).clamp(least, most)


@dataclass(frozen=True)
class StaticGrid:
    """scale (a float32 value, so that it is the same in every engine), zero (a code), bits 8 or 16."""

    scale: float
    zero: int
    bits: int

    def __post_init__(self) -> None:
        low, high = levels(self.bits) if self.bits in BITS else (0, 0)
        if self.bits not in BITS or type(self.bits) is not int:
            raise NetsukeError(ASKED, f"{str(self.bits)[:40]} bits", ", ".join(map(str, BITS)))
        if type(self.scale) is not float or not math.isfinite(self.scale) or not self.scale > 0:
            raise NetsukeError(ASKED, f"scale {str(self.scale)[:40]}", "a finite number above 0")
        if type(self.zero) is not int or not low <= self.zero <= high or (self.bits == 16 and self.zero):
            allowed = f"{low} to {high}" if self.bits == 8 else "0"
            raise NetsukeError(ASKED, f"zero {str(self.zero)[:40]} at {self.bits} bits", allowed)

    @classmethod
    def from_spec(cls, spec: Any) -> StaticGrid:
        """The grid that `spec()` described. Raises NetsukeError for anything else."""
        if not isinstance(spec, dict) or spec.get("kind") != "static" or spec.keys() != KEYS:
            raise NetsukeError(ASKED, f"the entry {str(spec)[:100]}", "kind 'static' with scale, zero and bits")
        return cls(spec["scale"], spec["zero"], spec["bits"])

    def spec(self) -> dict[str, Any]:
        return {"kind": "static", "scale": self.scale, "zero": self.zero, "bits": self.bits}

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest value of the grid."""
        low, high = levels(self.bits)
        return (low - self.zero) * self.scale, (high - self.zero) * self.scale

    def codes(self, x: Tensor) -> Tensor:
        """Codes of x as floats."""
        return codes(x, self.scale, self.zero, self.bits)

    def __call__(self, x: Tensor) -> Tensor:
        return snap(x, self.scale, self.zero, self.bits)


@dataclass(frozen=True)
class TokenGrid:
    """x (…, C) rounded to `bits` on a grid of its own for every token (and head, where C is a head's): dynamic quantization.
    It needs no calibration and hides what static ranges suffer from; no integer-only device runs it."""

    bits: int

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in DYNAMIC:
            raise NetsukeError(ASKED, f"{str(self.bits)[:40]} bits for every token", f"{DYNAMIC[0]} to {DYNAMIC[-1]}")

    def spec(self) -> dict[str, Any]:
        return {"kind": "token", "bits": self.bits}

    def __call__(self, x: Tensor) -> Tensor:
        return snap(x, *grid(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), self.bits), self.bits)


def grid_from_spec(spec: Any) -> StaticGrid | TokenGrid:
    """The grid that `spec()` described. Raises NetsukeError for anything else."""
    if isinstance(spec, dict) and spec.get("kind") == "token" and spec.keys() == {"kind", "bits"}:
        return TokenGrid(spec["bits"])
    return StaticGrid.from_spec(spec)
