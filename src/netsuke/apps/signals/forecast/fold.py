"""What a MixLinear computes, in NumPy: two small linear paths folded into one matrix that every phase of the period shares.

A look-back of S = n w values, period w, is n periods of w phases; a horizon of H <= m w values is m of them. With A1, A2 (q, p),
p = ceil(sqrt n), q = ceil(sqrt m), W1 (2, lpf) and W2 (m, 2) complex, F_n the discrete Fourier transform:

    time        T[(a, b), (c, d)] = A2[a, c] A1[b, d]                 rows cut to m, columns to n: zero padding to p x p
    frequency   F = Re(F_m^-1 W2 W1 F_n[:lpf])                        the full transform, no conjugate symmetry
    folded      M = alpha T + (1 - alpha) F                           (m, n)

    z = x - mean;  z <- z + smooth(z);  y[k, j] = sum_i M[k, i] z[i, j] + mean

Everything is homogeneous in x: units and per-channel scales cancel, so that a forecast needs no scaler.
MixLinear: Ma et al., arXiv 2410.02081 (2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Shape:
    """Look-back and horizon in rows, and the period; `lookback` is a multiple of `period`."""

    lookback: int
    horizon: int
    period: int

    @property
    def n(self) -> int:
        """Periods of the look-back."""
        return self.lookback // self.period

    @property
    def m(self) -> int:
        """Periods that the horizon touches."""
        return -(-self.horizon // self.period)

    @property
    def p(self) -> int:
        return math.isqrt(self.n - 1) + 1

    @property
    def q(self) -> int:
        return math.isqrt(self.m - 1) + 1

    @property
    def window(self) -> int:
        """Rows of one training window: the horizon counts as whole periods."""
        return self.lookback + self.m * self.period


def time_matrix(a1: Array, a2: Array, shape: Shape) -> Array:
    """(m, n) of the time path, A1 and A2 (q, p)."""
    return np.kron(a2, a1)[: shape.m, : shape.n]


def spectrum(shape: Shape, lpf: int) -> Array:
    """complex (lpf, n): the first bins of the transform of n values."""
    return np.exp(-2j * np.pi * np.outer(np.arange(lpf), np.arange(shape.n)) / shape.n)


def inverse(shape: Shape) -> Array:
    """complex (m, m): the inverse transform of m bins."""
    k = np.arange(shape.m)
    return np.exp(2j * np.pi * np.outer(k, k) / shape.m) / shape.m


def frequency_matrix(w1: Array, w2: Array, shape: Shape) -> Array:
    """(m, n) of the frequency path, W1 (2, lpf) and W2 (m, 2) complex."""
    return (inverse(shape) @ w2 @ w1 @ spectrum(shape, w1.shape[1])).real


def smooth(z: Array, kernel: Array) -> Array:
    """z + its convolution along the last axis with w + 1 taps, zeros outside, length kept for odd and even w."""
    taps = len(kernel)
    left = (taps - 1) // 2
    padded = np.pad(z, [(0, 0)] * (z.ndim - 1) + [(left, taps - 1 - left)])
    return z + np.lib.stride_tricks.sliding_window_view(padded, taps, -1) @ kernel


def forecast(x: Array, matrix: Array, kernel: Array | None, shape: Shape) -> Array:
    """(…, horizon) from look-backs (…, lookback), in the type of `x`."""
    mean = x.mean(-1, keepdims=True)
    z = x - mean if kernel is None else smooth(x - mean, kernel)
    z = z.reshape(*x.shape[:-1], shape.n, shape.period)
    y = (matrix @ z).reshape(*x.shape[:-1], -1)
    return y[..., : shape.horizon] + mean


def macs(shape: Shape, smoothed: bool = True) -> int:
    """Multiply-accumulates of one forecast of one channel in the folded form; SparseTSF's are the same."""
    return (shape.lookback * (shape.period + 1) if smoothed else 0) + shape.n * shape.horizon


def unfolded_macs(shape: Shape, lpf: int, smoothed: bool = True) -> int:
    """Real multiply-accumulates with both paths as published: matrix transforms of lpf and m bins, a complex one counts 4."""
    time = shape.q * shape.p * shape.p + shape.q * shape.q * shape.p
    frequency = 2 * lpf * shape.n + 4 * (2 * lpf + 2 * shape.m) + 2 * shape.m * shape.m
    return (shape.lookback * (shape.period + 1) if smoothed else 0) + shape.period * (time + frequency)
