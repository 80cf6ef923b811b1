"""Sums in a fixed order and functions made of float32 operations: the arithmetic that NumPy, a PC's C and a board share.

A controller compares costs, and a cost that differs in its last bit may choose another plan: within a few ticks two loops are
apart. So the reference rounds where the C does (compiled with -ffp-contract=off), and neither asks a C library for tanh.
The same functions serve float64, where the order costs nothing and the functions are NumPy's own.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
ACTIVATIONS = ("linear", "relu", "tanh", "sigmoid", "elu")  # in the order of csrc/ns_dense.h


def fold(start: Array, terms: Array) -> Array:
    """start + terms[0] + terms[1] + …, in float32 rounded after every addition. terms (K, …), start of the rest's shape."""
    if terms.dtype == np.float64:
        return start + terms.sum(axis=0)
    terms = np.concatenate([np.broadcast_to(start, terms.shape[1:])[None], terms])
    return np.add.accumulate(terms, axis=0, dtype=terms.dtype)[-1]


def exp(x: Array) -> Array:
    """float32 e^x between e^-87 and e^88, as ns_exp computes it: relative error below 3e-7. float64: NumPy's."""
    if x.dtype == np.float64:
        return np.exp(x)
    f = np.float32
    x = np.maximum(np.where(x < f(88), x, f(88)), f(-87))
    scaled = x * f(1.44269504)
    k = np.trunc(scaled + np.where(scaled < 0, f(-0.5), f(0.5))).astype(np.int32)
    r = (x - k.astype(f) * f(0.693145752)) - k.astype(f) * f(1.42860677e-6)
    p = np.full_like(x, 1.98412698e-4)
    for c in (1.38888889e-3, 8.33333333e-3, 4.16666667e-2, 1.66666667e-1, 0.5, 1.0, 1.0):
        p = p * r + f(c)
    return p * ((k + 127).astype(np.uint32) << np.uint32(23)).view(f)


def tanh(x: Array) -> Array:
    """float32 as ns_tanh: the continued fraction below 1, the exponential above. float64: NumPy's."""
    if x.dtype == np.float64:
        return np.tanh(x)
    f = np.float32
    z = x * x
    with np.errstate(over="ignore", invalid="ignore"):  # the fraction is not used where z is large
        near = x * (f(945) + z * (f(105) + z)) / (f(945) + z * (f(420) + z * f(15)))
    size = np.abs(x)
    far = np.where(size > 9, f(1), f(1) - f(2) / (exp(f(2) * size) + f(1)))
    return np.where(size < 1, near, np.where(x < 0, -far, far))


def activate(name: str, x: Array) -> Array:
    one = x.dtype.type(1)
    match name:
        case "relu":
            return np.where(x > 0, x, x.dtype.type(0))
        case "tanh":
            return tanh(x)
        case "sigmoid":
            return one / (one + exp(-x))
        case "elu":
            return np.where(x > 0, x, exp(x) - one)
    return x


def slope(name: str, y: Array) -> Array:
    """The first derivative of an activation, from its value."""
    one = y.dtype.type(1)
    match name:
        case "relu":
            return (y > 0).astype(y.dtype)
        case "tanh":
            return one - y * y
        case "sigmoid":
            return y * (one - y)
        case "elu":
            return np.where(y > 0, one, y + one)
    return np.ones_like(y)


def curvature(name: str, y: Array) -> Array:
    """The second derivative of an activation, from its value."""
    match name:
        case "tanh":
            return -2 * y * (1 - y * y)
        case "sigmoid":
            return y * (1 - y) * (1 - 2 * y)
        case "elu":
            return np.where(y > 0, 0, y + 1).astype(y.dtype)
    return np.zeros_like(y)
