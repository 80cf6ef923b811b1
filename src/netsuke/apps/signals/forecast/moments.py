"""MixLinear without gradients: one pass over the data leaves two small matrices, and both paths follow from them.

Without smoothing every window of a series, centred by its look-back's mean, gives w pairs (x, y) of n and m values, one a phase:

    Sxx = sum x x'  (n, n),   Sxy = sum x y'  (n, m),   loss(M) = tr(M Sxx M') - 2 tr(M Sxy) + Syy

is all that training can know. 4 (n^2 + n m) bytes in single precision, 4 kB for a look-back of 30 days and a horizon of 4.
New rows add to them exactly; a forgetting factor per row lets old windows fade.

time path       alternating least squares: with A2 fixed, each row of A1 is a p x p solve, and the other way round
frequency path  reduced-rank regression (Izenman, 1975) on the first bins' cosines and sines: real rank 2, which the complex
                rank 2 contains; the complex weights that give exactly this matrix are returned
both            each fitted by itself; alpha mixes two forecasts

When to use it: always first. When not: with smoothing, whose taps need moments of every lag; Adam starts from these then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from netsuke.apps.signals.forecast.fold import Array, Shape, inverse, spectrum, time_matrix

RIDGE = 1e-6  # of the mean diagonal: a solve must not fail on constant phases, and must not be seen in a forecast


@dataclass
class Moments:
    """Second moments of all windows seen so far, and the last rows, which the next window needs.

    forget   factor per row in (0, 1]; 1 keeps everything
    """

    shape: Shape
    channels: int
    forget: float = 1.0
    sxx: Array = field(init=False)
    sxy: Array = field(init=False)
    syy: float = 0.0
    weight: float = 0.0  # pairs times values each: the loss per value is loss / weight
    tail: Array = field(init=False)

    def __post_init__(self) -> None:
        n, m = self.shape.n, self.shape.m
        self.sxx, self.sxy, self.tail = np.zeros((n, n)), np.zeros((n, m)), np.zeros((0, self.channels))

    @property
    def bytes(self) -> int:
        """What a chip keeps of it in single precision."""
        return 4 * (self.sxx.size + self.sxy.size)

    def update(self, rows: Array) -> int:
        """Adds rows (T, channels) in time order, already scaled per channel; returns how many windows they completed."""
        x = np.concatenate([self.tail, np.asarray(rows, np.float64)])
        windows = len(x) - self.shape.window + 1
        if windows > 0:
            self._fade(self.forget**windows)
            for channel in x.T:
                self._add(channel, windows)
        self.tail = x[-(self.shape.window - 1) :].copy()
        return max(windows, 0)

    def on_chip(self) -> Moments:
        """A copy as generated firmware starts: the sums in single precision, and none of the last rows."""
        out = Moments(self.shape, self.channels, self.forget)
        out.sxx, out.sxy = self.sxx.astype(np.float32).astype(float), self.sxy.astype(np.float32).astype(float)
        out.syy, out.weight = self.syy, self.weight
        return out

    def _fade(self, factor: float) -> None:
        self.sxx *= factor
        self.sxy *= factor
        self.syy *= factor
        self.weight *= factor

    def _add(self, x: Array, windows: int) -> None:
        """All windows of one channel. A phase's pair begins at row s and is part of the w windows that begin at s - w + 1 … s,
        which differ in their means only: sums of these (weighted by age) replace the sum over windows."""
        s = self.shape
        w, total = s.period, np.concatenate([[0.0], np.cumsum(x)])
        mean = (total[s.lookback :] - total[: -s.lookback])[:windows] / s.lookback
        age = self.forget ** np.arange(windows - 1, -1, -1.0)
        ones = np.ones(w)
        count, first, second = (np.convolve(age * mean**k, ones) for k in range(3))  # by s, (windows + w - 1)
        pairs = np.lib.stride_tricks.sliding_window_view(x, (s.n + s.m - 1) * w + 1)[:, ::w][: len(count)]
        a, b = pairs[:, : s.n], pairs[:, s.n :]
        weighted, u, v = a * count[:, None], first @ a, first @ b
        self.sxx += a.T @ weighted - (u[:, None] + u) + second.sum()
        self.sxy += weighted.T @ b - (u[:, None] + v) + second.sum()
        self.syy += float(np.sum(b * b * count[:, None]) - 2 * v.sum() + second.sum() * s.m)
        self.weight += float(count.sum()) * s.m

    def mse(self, matrix: Array) -> float:
        """Mean squared error of the forecast with `matrix` (m, n) over all windows seen, in scaled units."""
        loss = np.sum((matrix @ self.sxx) * matrix) - 2 * np.sum(matrix * self.sxy.T) + self.syy
        return float(loss / self.weight)


def ridged(sxx: Array) -> Array:
    return sxx + RIDGE * np.trace(sxx) / len(sxx) * np.eye(len(sxx))


def least_squares(moments: Moments) -> Array:
    """(m, n): the best matrix without any structure."""
    return np.linalg.solve(ridged(moments.sxx), moments.sxy).T


def loss(matrix: Array, sxx: Array, sxy: Array) -> float:
    """Up to Syy."""
    return float(np.sum((matrix @ sxx) * matrix) - 2 * np.sum(matrix * sxy.T))


def sweep(a1: Array, a2: Array, sxx: Array, sxy: Array, shape: Shape) -> tuple[Array, Array]:
    """One round of alternating least squares: A1 given A2, then A2 given A1.

    Output (a, b) = a q + b exists for a q + b < m; input (c, d) = c p + d for c p + d < n, the others are zeros.
    """
    p, q = shape.p, shape.q
    full, cross = np.zeros((p * p, p * p)), np.zeros((p * p, q * q))
    full[: shape.n, : shape.n], cross[: shape.n, : shape.m] = sxx, sxy
    full, cross = full.reshape(p, p, p, p), cross.reshape(p, p, q, q)
    there = (np.arange(q * q) < shape.m).reshape(q, q).astype(float)  # (a, b)
    a1 = _rows(a1, *_normal(a2, full, cross, there))
    a2 = _rows(a2, *_normal(a1, full.transpose(1, 0, 3, 2), cross.transpose(1, 0, 3, 2), there.T))
    return a1, a2


def _normal(fixed: Array, full: Array, cross: Array, there: Array) -> tuple[Array, Array]:
    """Gram matrices (q, p, p) and right sides (q, p) of the rows of the other factor: full[c, d, e, f] and cross[c, d, a, b]
    with fixed (a, c) summed over a, c (and e)."""
    q, p = fixed.shape
    part = (fixed @ full.reshape(p, -1)).reshape(q, p, p, p)  # (a, d, e, f)
    gram = (fixed[:, None, None] @ part)[:, :, 0]  # (a, d, f)
    right = (fixed @ cross.reshape(p, -1)).reshape(q, p, q, q)[np.arange(q), :, np.arange(q)]  # (a, d, b)
    weights = there.T
    return (weights @ gram.reshape(q, -1)).reshape(q, p, p), np.einsum("ba,adb->bd", weights, right)


def _rows(old: Array, gram: Array, right: Array) -> Array:
    """A solve per row, with a ridge; rows of nothing stay."""
    p = old.shape[1]
    trace = np.trace(gram, axis1=1, axis2=2)
    live = trace > 0
    ridge = RIDGE * trace[live, None, None] / p * np.eye(p)
    out = old.copy()
    out[live] = np.linalg.solve(gram[live] + ridge, right[live, :, None])[..., 0]
    return out


def fit_time(
    sxx: Array, sxy: Array, shape: Shape, *, starts: int = 6, sweeps: int = 300, seed: int = 0,
    start: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """(A1, A2) of the least loss of `starts` random starts (or from `start`); a start ends when a sweep gains < 1e-9 of it."""
    rng = np.random.default_rng(seed)
    best, least = None, np.inf
    for _ in range(1 if start is not None else starts):
        a1, a2 = start if start is not None else rng.normal(size=(2, shape.q, shape.p))
        before = np.inf
        for _ in range(sweeps):
            a1, a2 = sweep(a1, a2, sxx, sxy, shape)
            now = loss(time_matrix(a1, a2, shape), sxx, sxy)
            if before - now < 1e-9 * abs(now):
                break
            before = now
        if now < least:
            best, least = (a1, a2), now
    norm = np.sqrt(np.linalg.norm(best[0]) / np.linalg.norm(best[1]))  # both of one size: the product is what counts
    return best[0] / norm, best[1] * norm


def fit_frequency(sxx: Array, sxy: Array, shape: Shape, lpf: int, rank: int = 2) -> tuple[Array, Array]:
    """Complex (W1, W2) of the best matrix of real rank `rank` whose rows are made of the first `lpf` bins."""
    bins = min(lpf, shape.n // 2 + 1)  # the bins above mirror those below
    e = spectrum(shape, bins)
    sines = [k for k in range(bins) if 0 < k < shape.n - k]
    basis = np.concatenate([e.real, e.imag[sines]]).T  # (n, d)
    c = np.linalg.cholesky(basis.T @ ridged(sxx) @ basis)
    white = np.linalg.solve(c, basis.T @ sxy)  # (d, m)
    u, s, v = np.linalg.svd(white, full_matrices=False)
    rank = min(rank, len(s))
    inner = np.linalg.solve(c.T, u[:, :rank] * np.sqrt(s[:rank])).T  # (rank, d)
    outer = v[:rank].T * np.sqrt(s[:rank])  # (m, rank)
    w1, w2 = np.zeros((2, lpf), complex), np.zeros((shape.m, 2), complex)
    w1[:rank, :bins] = inner[:, :bins]
    w1[:rank, sines] -= 1j * inner[:, bins:]  # Re(w e) = Re w Re e - Im w Im e
    w2[:, :rank] = np.linalg.solve(inverse(shape), outer.astype(complex))
    size = np.sqrt(np.linalg.norm(w2) / max(np.linalg.norm(w1), 1e-30))  # of one size, for Adam's steps
    return w1 * size, w2 / max(size, 1e-30)


def fit_both(moments: Moments, alpha: float, lpf: int, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """(A1, A2, W1, W2): each path the best forecast by itself, for alpha to mix; a path that alpha leaves out is zero."""
    s, sxx, sxy = moments.shape, moments.sxx, moments.sxy
    none = np.zeros((s.q, s.p))
    a1, a2 = fit_time(sxx, sxy, s, seed=seed) if alpha > 0 else (none, none)
    w1, w2 = (
        fit_frequency(sxx, sxy, s, lpf) if alpha < 1 else (np.zeros((2, lpf), complex), np.zeros((s.m, 2), complex))
    )
    return a1, a2, w1, w2
