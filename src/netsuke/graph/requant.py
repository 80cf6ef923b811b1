"""From a 32-bit sum back to 8 bits, in integers only, the same on every machine.

    q = clip(((sum * M + 2^(S-1)) >> S) + zero, low, high)        M an int32 per channel, S one shift per operator

with M / 2^S = the ratio of scales e. One rounding (half up), 31 bits in the largest M, so q differs from the exactly
rounded value only within 2^-22 of a tie. On a Cortex-M4 this is SMMUL, ADD, ASR, SSAT: rounding and zero point share the
addition. TFLite's two-step rounding differs from it by at most one step, in a few elements of ten thousand.
"""

from __future__ import annotations

import math

import numpy as np

TOP = 1 << 31


def multipliers(ratio: np.ndarray | float) -> tuple[np.ndarray, int]:
    """(M int32 of `ratio`'s shape, S in 1…62) with M / 2^S ≈ ratio, M's largest entry in [2^30, 2^31).

    ratio: scale_x * scale_w / scale_y, any positive float64. Raises ValueError outside 2^-31 … 2^29.
    """
    e = np.atleast_1d(np.asarray(ratio, np.float64))
    top = float(e.max())
    if not (math.isfinite(top) and np.all(e > 0) and 2.0**-31 <= top <= 2.0**29):
        raise ValueError(f"a ratio of scales of {top}")
    shift = 31 - math.frexp(top)[1]  # top = f * 2^x, f in [0.5, 1): M = f * 2^31
    m = np.rint(e * 2.0**shift)
    if m.max() >= TOP:  # f rounded up to 1
        shift -= 1
        m = np.rint(e * 2.0**shift)
    return m.astype(np.int32), shift


def requantize(
    total: np.ndarray, m: np.ndarray, shift: int | np.ndarray, zero: int, low: int = -128, high: int = 127
) -> np.ndarray:
    """The formula above; `total` int32-valued of any integer type, channels last; returns the narrowest of int8, int16 and int32
    that holds the limits. `shift` may differ by row."""
    q = ((total.astype(np.int64) * m.astype(np.int64) + (np.int64(1) << (shift - 1))) >> shift) + zero
    kind = np.int8 if low >= -128 and high <= 127 else np.int16 if low >= -32768 and high <= 32767 else np.int32
    return np.clip(q, low, high).astype(kind)


def sum_multipliers(a: float, b: float) -> tuple[int, int, int]:
    """(A, B, S) for q = ((x1 - z1)*A + (x2 - z2)*B + 2^(S-1)) >> S with 8-bit inputs: every term stays inside int32."""
    shift = min(20, 21 - math.frexp(max(a, b))[1])
    if shift < 1:
        raise ValueError(f"a ratio of scales of {max(a, b)}")
    return round(a * 2**shift), round(b * 2**shift), shift
