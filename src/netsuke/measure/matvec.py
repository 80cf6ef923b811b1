"""Seconds of one matrix-vector product of the native engine: input-sparse against dense, alternating in one run.

Same format and size on both sides; every matrix takes turns with a copy, so that one of 32 MB or more stays in no cache.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

PAIRS, REPEATS = 31, 5


@dataclass(frozen=True)
class MatVec:
    """Medians in seconds over `REPEATS` runs; `ratio` of dense over sparse, its median and range (above 1: sparse is faster)."""

    dense: float
    sparse: float
    ratio: float
    lowest: float
    highest: float


def sparse_against_dense(
    outs: int, ins: int, bits: int, share: float, threads: int, pairs: int = PAIRS, repeats: int = REPEATS
) -> MatVec:
    """A map (outs, ins) of 32- or 16-bit floats or 8- to 2-bit codes of which `share` of the channels is read."""
    from netsuke import _native

    runs = [_native.sparse_trial(outs, ins, bits, share, threads, pairs) for _ in range(repeats)]
    ratios = sorted(dense / sparse for dense, sparse in runs)
    dense, sparse = (statistics.median(r[side] for r in runs) for side in (0, 1))
    return MatVec(dense, sparse, statistics.median(ratios), ratios[0], ratios[-1])
