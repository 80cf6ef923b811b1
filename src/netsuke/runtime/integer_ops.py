"""The operators of a decoder in integers: rescaling, norm, softmax, tables. NumPy, whole numbers only at run time.

Constants (multipliers, tables) are made from the grids' scales once, in float64; from then on there are int8 and int16 codes,
int32 multipliers and int64 accumulators. Every rescaling is graph/requant.py's multiplier and shift. Two operators divide:
the norm once per token, softmax once per weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from netsuke.graph.requant import multipliers, requantize
from netsuke.layers.static import StaticGrid, levels

Codes = np.ndarray
FAINT = 2.0**-40  # of the largest ratio: what is fainter is nothing in any code


def signed_multipliers(ratio: np.ndarray) -> tuple[np.ndarray, int]:
    """`requant.multipliers` of ratios that may be negative or 0. Raises ValueError when all are 0."""
    size = np.abs(np.asarray(ratio, np.float64))
    m, shift = multipliers(np.maximum(size, size.max() * FAINT))
    return (m * np.sign(ratio)).astype(np.int32), shift


@dataclass(frozen=True)
class Rescale:
    """Sums of products -> codes of a grid: round(total · ratio + bias) + zero, clipped. One ratio, or one per channel (last).

    The bias is in units of 2^-shift of the grid's step: in units of the sum it would be coarser than a 16-bit grid.
    """

    grid: StaticGrid
    m: np.ndarray
    shift: int
    bias: np.ndarray | int = 0

    @classmethod
    def of(cls, ratio: np.ndarray | float, grid: StaticGrid, bias: np.ndarray | None = None) -> Rescale:
        """ratio: the value of one unit of the sum, over the grid's scale. bias: in steps of the grid."""
        m, shift = signed_multipliers(np.atleast_1d(ratio))
        return cls(grid, m, shift, 0 if bias is None else np.rint(bias * 2.0**shift).astype(np.int64))

    def __call__(self, total: np.ndarray) -> Codes:
        total = total.astype(np.int64) * self.m + self.bias
        return requantize(total, np.int64(1), self.shift, self.grid.zero, *levels(self.grid.bits))

    def sum(self, *terms: np.ndarray) -> Codes:
        """Codes of Σ term_k · ratio_k, rounded once: the ratios are those of the terms."""
        total = sum(t.astype(np.int64) * int(m) for t, m in zip(terms, self.m))
        return requantize(total, np.int64(1), self.shift, self.grid.zero, *levels(self.grid.bits))


def centred(codes: Codes, grid: StaticGrid) -> np.ndarray:
    """code − zero as int32."""
    return codes.astype(np.int32) - grid.zero


def root(n: np.ndarray) -> np.ndarray:
    """floor(sqrt(n)) of int64 n in [1, 2^62], by Newton's method from above."""
    r = np.full_like(n, 1 << 31)
    while True:
        better = (r + n // r) >> 1
        if np.all(better >= r):
            return r
        r = np.minimum(r, better)


def bit_length(n: np.ndarray) -> np.ndarray:
    """Bits of int64 n >= 0, exactly."""
    bits = np.zeros_like(n)
    for step in (32, 16, 8, 4, 2, 1):
        above = (n >> (bits + step)) > 0
        bits += np.where(above, step, 0)
    return bits + (n > 0)


@dataclass(frozen=True)
class Norm:
    """RMS norm as L2 normalisation times weights: codes of x_i · w_i · sqrt(C / (Σ x² + C·ε)).

    With N = Σ x² + C·ε in units of the input's step, R = floor(sqrt(N · 2^2k)) has 31 bits, u_i = x_i · floor(2^62 / R) has
    31 after a shift by `spare`, and the code is u_i · M_i >> (S + 62 − k − spare): exact to 2^-28 or so.
    """

    zero: int
    bits: int  # of the codes
    m: np.ndarray  # of w · sqrt(C) / the codes' scale
    shift: int
    eps: int
    spare: int

    @classmethod
    def of(
        cls, weight: np.ndarray, eps: float, step: float, size: int, scale: float, zero: int = 0, bits: int = 16
    ) -> Norm:
        """weight (C,) floats; step of the input, whose sizes are below 2^size; scale, zero and bits of the codes."""
        m, shift = signed_multipliers(weight.astype(np.float64) * np.sqrt(len(weight)) / scale)
        return cls(zero, bits, m, shift, round(len(weight) * eps / step**2), size + 1)

    def __call__(self, x: np.ndarray) -> Codes:
        """x (T, C) int32 -> codes (T, C)."""
        x = x.astype(np.int64)
        total = np.maximum((x * x).sum(-1, keepdims=True) + self.eps, 1)
        k = (62 - bit_length(total)) >> 1
        inverse = (np.int64(1) << 62) // root(total << (2 * k))
        u = (x * inverse + (np.int64(1) << (self.spare - 1))) >> self.spare
        shift = np.clip(self.shift + 62 - k - self.spare, 1, 62)
        return requantize(u, self.m, shift, self.zero, *levels(self.bits))


@dataclass(frozen=True)
class Softmax:
    """exp by two tables of 2^-31: exp(−d·s) = coarse[d >> 8] · fine[d & 255], d the distance from the largest logit."""

    grid: StaticGrid
    coarse: np.ndarray
    fine: np.ndarray
    steps: int  # codes of the weight 1

    @classmethod
    def of(cls, step: float, grid: StaticGrid) -> Softmax:
        at = np.arange(257, dtype=np.float64)
        coarse, fine = (np.rint(np.exp(-at * s) * 2.0**31).astype(np.int64) for s in (256 * step, step))
        return cls(grid, coarse, fine[:256], round(1 / grid.scale))

    def __call__(self, scores: Codes, seen: np.ndarray) -> Codes:
        """scores (…, T, S) codes, seen (T, S) bool -> codes of the weights, those of what is not seen being 0."""
        s = scores.astype(np.int64)
        top = np.where(seen, s, levels(16)[0]).max(-1, keepdims=True)
        d = np.clip(top - s, 0, (1 << 16) - 1)
        e = np.where(seen, (self.coarse[d >> 8] * self.fine[d & 255]) >> 31, 0)
        total = e.sum(-1, keepdims=True)
        codes = (2 * e * self.steps + total) // (2 * total) + self.grid.zero
        low, high = levels(self.grid.bits)
        return np.clip(codes, low, high).astype(np.int8 if self.grid.bits == 8 else np.int16)


def sigmoid_table(gate: StaticGrid, out: StaticGrid) -> Codes:
    """Code of sigmoid(x) for each of the 256 codes of x, from −128 on."""
    x = (np.arange(-128, 128) - gate.zero) * gate.scale
    low, high = levels(out.bits)
    return np.clip(np.rint(1 / (1 + np.exp(-x)) / out.scale) + out.zero, low, high).astype(
        np.int8 if out.bits == 8 else np.int16
    )
