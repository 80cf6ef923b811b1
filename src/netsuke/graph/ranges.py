"""Which range of real numbers an 8-bit code should span: histograms of activations in one pass, and the search over clips.

A range that holds every value seen wastes steps on rare ones. Among ranges (low, high) inside what was seen, the one is taken
that makes the squared error smallest: outside, the distance to the end; inside, step^2 / 12; zero is exact everywhere and
costs nothing. (Post-training range search by squared error: Krishnamoorthi 2018; Nagel et al., 2021.)
"""

from __future__ import annotations

import numpy as np

BINS = 4096
GRID = 64  # candidates per end
SMALLEST = 2.0**-100  # values below count as zero


class Histogram:
    """Counts of values in [-reach, reach); `reach` is a power of two that grows by joining pairs of bins."""

    def __init__(self) -> None:
        self.reach, self.low, self.high = 0.0, 0.0, 0.0
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Counts the values that are not zero; zero always lies in the range."""
        values = np.asarray(values, np.float64).reshape(-1)
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        values = values[np.abs(values) > SMALLEST]
        if values.size:
            self._grow(float(np.abs(values).max()))
            places = np.floor((values / self.reach + 1) * (BINS / 2)).astype(np.int64)
            self.counts += np.bincount(np.minimum(places, BINS - 1), minlength=BINS)

    def merge(self, other: Histogram) -> None:
        """Counts what the other has counted, too."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        if other.reach:
            self._grow(other.reach / 2)
            same = Histogram()
            same.reach, same.counts = other.reach, other.counts.copy()
            same._grow(self.reach / 2)
            self.counts += same.counts

    def _grow(self, largest: float) -> None:
        """Makes `reach` larger than `largest`."""
        wanted = 2.0 ** (np.floor(np.log2(largest)) + 1)
        if not self.reach:
            self.reach = wanted
        while self.reach < wanted:
            joined = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.pad(joined, BINS // 4)
            self.reach *= 2

    def range(self, method: str) -> tuple[float, float]:
        """(low, high) with low <= 0 <= high: of everything seen ("minmax") or of least squared error ("range")."""
        if method == "minmax" or not self.counts.any():
            return self.low, self.high
        shares = np.linspace(1 / GRID, 1, GRID)
        lows = self.low * shares if self.low < 0 else np.zeros(1)
        highs = self.high * shares if self.high > 0 else np.zeros(1)
        below, above = self._outside(lows, -1.0), self._outside(highs, 1.0)
        low, high = np.meshgrid(lows, highs, indexing="ij")
        inside = self.counts.sum() - below[1][:, None] - above[1][None]
        error = below[0][:, None] + above[0][None] + inside * ((high - low) / 255) ** 2 / 12
        best = int(np.argmin(error[::-1, ::-1]))  # of equals the widest
        i, j = np.unravel_index(error.size - 1 - best, error.shape)
        return float(lows[i]), float(highs[j])

    def _outside(self, ends: np.ndarray, sign: float) -> tuple[np.ndarray, np.ndarray]:
        """Per end: the squared distance of the values beyond it, and their number."""
        centres = ((np.arange(BINS) + 0.5) * 2 / BINS - 1) * self.reach
        centres, counts = (centres, self.counts) if sign > 0 else (-centres[::-1], self.counts[::-1])
        sums = [np.concatenate((np.cumsum((counts * centres**k)[::-1])[::-1], [0.0])) for k in range(3)]
        at = np.searchsorted(centres, ends * sign, side="right")
        n, first, second = (s[at] for s in sums)
        end = ends * sign
        return np.maximum(second - 2 * end * first + end**2 * n, 0.0), n


def spread(low: float, high: float) -> tuple[np.float64, int]:
    """(scale, zero point) of 256 codes over low <= 0 <= high."""
    scale = np.float64((high - low) / 255) if high - low > SMALLEST else np.float64(1 / 255)
    return scale, int(np.clip(np.rint(-128 - low / scale), -128, 127))


def weight_scales(rows: np.ndarray, bits: int, method: str) -> np.ndarray:
    """One symmetric scale per row of weights (O, n); "range" searches for the least squared error per row.

    A row of zeros takes the largest row's scale.
    """
    top = 2 ** (bits - 1) - 1
    largest = np.abs(rows).max(1)
    scales = largest / top
    if method == "range":
        best = np.full(len(rows), np.inf)
        for share in np.linspace(1, 0.5 if bits == 8 else 0.3, 26):
            trial = np.maximum(largest * share / top, SMALLEST)[:, None]
            codes = np.clip(np.rint(rows / trial), -top - (bits == 4), top)
            error = ((codes * trial - rows) ** 2).sum(1)
            scales, best = np.where(error < best, trial[:, 0], scales), np.minimum(error, best)
    return np.where(largest > SMALLEST, scales, scales.max() if largest.max() > SMALLEST else 1 / top)
