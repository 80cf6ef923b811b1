"""A matrix rounded to 2- to 8-bit codes with one scale per group of inputs: to nearest, GPTQ, and descent from GPTQ.

A linear map y = W x, W (O, I), sees inputs with H = E[x xᵀ] (I, I). Rounding W to Ŵ costs tr((W − Ŵ) H (W − Ŵ)ᵀ).

"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (Frantar et al., 2023). Columns are rounded
one after the other; the error of column j is paid back by the columns that are still free,

    e = (w_j − ŵ_j) / U_jj,    W[:, j+1:] −= e U[j, j+1:],    H⁻¹ = Uᵀ U, U upper triangular,

which is the exact minimiser over the free columns. The scale of a group is searched when its first column is reached, on
the weights as the earlier columns have left them.

GPTQ never looks back. "QuantEase: Optimization-based Quantization for Language Models" (Behdin et al., 2023) does: with all
other columns held, the cost is a parabola in ŵ_j whose best code is

    ŵ_j = round(ŵ_j + (H (W − Ŵ)ᵀ)_j / H_jj),

and so is it in the scale of a group, s += qᵀ (H E)_g / (qᵀ H_gg q) with q the group's codes less their zero. Sweeps over the
columns therefore never raise the cost, and start here from what GPTQ has found. Scales are descended with the codes, which
that paper leaves open.

Where the maps before have been rounded already, x is not the y that the model gave this map. "GPTAQ: Efficient Finetuning-Free
Quantization for Asymmetric Calibration" (Li et al., 2025) asks for W y from Ŵ x. Least squares give the weights to aim at,

    W* = W + share · W E[(y − x) xᵀ] H⁻¹,

at share 1; there the noise of the calibration text is learnt with the drift. Loss above 16 bits of 2-bit weights, nats per token
of validation text, pycode and wide: GPTQ 0.187 and 0.233, descent alone 0.149 and 0.208, aiming at half of the drift as well
0.119 and 0.153 (a trial of shares 0, 1/2 and 1: 0.159, 0.116, 0.117 and 0.211, 0.152, 0.157).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from netsuke.layers.quantized import QuantLinear, group_count

SHRINKS = torch.linspace(1.0, 0.35, 27).tolist()  # shares of the full range; 2 bits like 0.6, 4 bits 0.9, 8 bits 1.0
TINY = 2.0**-24  # the smallest positive float16
LAZY = 128  # columns whose errors are paid within a block before the rest of the matrix is updated in one product
SEARCHED = 1 << 18  # floats per step of the search for scales
AIMED = 0.5  # share of the drift that weights make good
SWEEPS = 4  # of descent; ten gain a hundredth more and take twice as long


@dataclass(frozen=True)
class Codes:
    """A quantized matrix, unpacked: codes (O, I) uint8, scales (O, n_groups) float16, zeros (O, n_groups) uint8."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group: int

    def layer(self, bias: Tensor | None = None) -> QuantLinear:
        return QuantLinear.from_codes(self.codes, self.scales, self.zeros, self.bits, self.group, bias)


def search_range(w: Tensor, bits: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of one group of columns for each row, w (O, g) -> both (O,), float32.

    The range [min, max] (widened to hold 0) is shrunk over a grid, the zero point rounded either way, and the pair of least
    Σ weights · (w − ŵ)² taken. Scales are float16 values already; weights (g,) are equal when absent.
    """
    w, top = w.float(), 2**bits - 1
    weights = torch.ones(w.shape[1]) if weights is None else weights.float()
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    # Shrinking both ends alike leaves the zero point where it is: only its rounding is open.
    exact = -low / (high - low).clamp(min=1e-30) * top
    zeros = torch.stack((exact.floor(), exact.ceil()))  # (2, O)
    scales = ((high - low) / top * torch.tensor(SHRINKS)[:, None]).half().float().clamp(min=TINY)  # (S, O)
    best = torch.empty(len(w), dtype=torch.long)
    step = max(1, SEARCHED // (2 * len(SHRINKS) * w.shape[1]))
    for a in range(0, len(w), step):  # (S, 2, rows, g) at once: small enough for the cache, large enough for one call
        part, zero, scale = w[a : a + step], zeros[None, :, a : a + step, None], scales[:, None, a : a + step, None]
        codes = torch.clamp((part / scale).round_(), -zero, top - zero)
        errors = codes.mul_(scale).sub_(part).square_() @ weights
        best[a : a + step] = errors.flatten(0, 1).argmin(0)
    rows = torch.arange(len(w))
    return scales[best // 2, rows], zeros[best % 2, rows]


def round_to_nearest(W: Tensor, bits: int, group: int, weights: Tensor | None = None) -> Codes:
    """W (O, I) rounded group by group after a range search; `weights` (I,), such as diag(H), weigh its errors."""
    outs, ins = W.shape
    codes = torch.empty(outs, ins, dtype=torch.uint8)
    scales, zeros = torch.empty(outs, group_count(ins, group)), torch.empty(outs, group_count(ins, group))
    for g, a in enumerate(range(0, ins, group)):
        part = W[:, a : a + group].float()
        scale, zero = search_range(part, bits, None if weights is None else weights[a : a + group])
        steps = (part / scale[:, None]).round_() + zero[:, None]
        codes[:, a : a + group] = steps.clamp_(0, 2**bits - 1).to(torch.uint8)
        scales[:, g], zeros[:, g] = scale, zero
    return Codes(codes, scales.half(), zeros.to(torch.uint8), bits, group)


def seen_all(H: Tensor) -> tuple[Tensor, float]:
    """(H in float64 with the mean diagonal where a channel was never seen, which leaves it to plain rounding; that mean)."""
    H = H.double().clone()
    diag = H.diagonal()
    live = diag > 0
    mean = float(diag[live].mean()) if live.any() else 1.0
    diag[~live] = mean
    return H, mean


def inverse_factor(H: Tensor, damp: float, tries: int = 6) -> Tensor:
    """U upper triangular with (H + damp · mean(diag H) · 1)⁻¹ = Uᵀ U, (I, I) float64.

    One Cholesky factor of the reversed matrix gives it without forming the inverse. Where the factor fails (rank lost to
    rounding), the damping is raised tenfold, `tries` times in all; then ValueError.
    """
    H, mean = seen_all(H)
    for attempt in range(tries):
        damped = H + torch.eye(len(H), dtype=H.dtype) * (mean * damp * 10**attempt)
        factor, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0 and bool(factor.isfinite().all()):
            unit = torch.eye(len(H), dtype=H.dtype)
            return torch.linalg.solve_triangular(factor, unit, upper=False).flip(0, 1)
    raise ValueError(f"no Cholesky factor up to a damping of {damp * 10 ** (tries - 1):g} of its mean diagonal")


def aimed(W: Tensor, H: Tensor, drift: Tensor, damp: float = 0.01, share: float = AIMED) -> Tensor:
    """W* (O, I) of the file docstring, for drift E[(y − x) xᵀ] (I, I). Raises ValueError when H cannot be factored."""
    U = inverse_factor(H, damp)
    W = W.double()
    return W + share * (W @ drift) @ U.T @ U


def gptq(W: Tensor, H: Tensor, bits: int, group: int, damp: float = 0.01) -> Codes:
    """W (O, I) rounded under H (I, I) as the file docstring tells. Raises ValueError when H cannot be factored.

    Columns go in their stored order. Descending diag(H) with scales fixed beforehand was no better on stories260K
    (perplexity ratio at 4 and 3 bits, groups of 32: 1.056 and 1.347 against 1.054 and 1.334).
    """
    (outs, ins), top = W.shape, 2**bits - 1
    U = inverse_factor(H, damp)
    # Channels that calibration hardly saw keep a say, or the search would clip them at will.
    weights = H.diagonal() + damp * H.diagonal().mean() + TINY
    left = W.T.double().contiguous()  # (I, O): a column of W is a row in memory
    codes = torch.empty(ins, outs, dtype=torch.uint8)
    scales = torch.empty(group_count(ins, group), outs, dtype=torch.float64)
    zeros = torch.empty_like(scales)
    block = max(LAZY // group, 1) * group  # whole groups, so that a group is up to date when it is entered
    for a in range(0, ins, block):
        b = min(a + block, ins)
        errors = torch.empty(b - a, outs, dtype=torch.float64)
        for j in range(a, b):
            g = j // group
            if j % group == 0:
                scales[g], zeros[g] = search_range(left[j : j + group].T, bits, weights[j : j + group])
            code = ((left[j] / scales[g]).round_() + zeros[g]).clamp_(0, top)
            codes[j] = code.to(torch.uint8)
            errors[j - a] = (left[j] - scales[g] * (code - zeros[g])) / U[j, j]
            left[j + 1 : b].addr_(U[j, j + 1 : b], errors[j - a], alpha=-1)
        left[b:].addmm_(U[a:b, b:].T, errors, alpha=-1)
    return Codes(codes.T.contiguous(), scales.T.half().contiguous(), zeros.T.to(torch.uint8).contiguous(), bits, group)


def descend(W: Tensor, H: Tensor, start: Codes, damp: float = 0.01, sweeps: int = SWEEPS) -> Codes:
    """`start`, codes of W (O, I), bettered under H (I, I) as the file docstring tells; it costs never more than `start` under
    the damped H.

    A block of columns knows its part of H E at its begin and keeps it up to date; the rest of the matrix enters by one product.
    """
    (outs, ins), group, top = W.shape, start.group, 2**start.bits - 1
    H, mean = seen_all(H)
    H.diagonal().add_(mean * damp)
    codes, scales, zeros = (t.T.double().contiguous() for t in (start.codes, start.scales, start.zeros))
    errors = torch.empty(ins, outs, dtype=torch.float64)
    for g, a in enumerate(range(0, ins, group)):
        errors[a : a + group] = W[:, a : a + group].T.double() - scales[g] * (codes[a : a + group] - zeros[g])
    block = max(LAZY // group, 1) * group
    for _ in range(sweeps):
        for a in range(0, ins, block):
            b = min(a + block, ins)
            own, pull = H[a:b, a:b], H[a:b] @ errors
            for c in range(a, b, group):
                d, g = min(c + group, b), c // group
                for j in range(c, d):
                    k = j - a
                    better = (codes[j] + pull[k] / (own[k, k] * scales[g])).round_().clamp_(0, top)
                    moved = scales[g] * (better - codes[j])
                    codes[j] = better
                    errors[j] -= moved
                    pull[c - a :].addr_(own[k, c - a :], moved, alpha=-1)
                rows = slice(c - a, d - a)
                steps = codes[c:d] - zeros[g]
                curved = ((own[rows, rows] @ steps) * steps).sum(0)
                scale = scales[g] + (pull[rows] * steps).sum(0) / curved.clamp(min=1e-300)
                scale = scale.half().double()
                scale = torch.where((scale >= TINY) & scale.isfinite(), scale, scales[g])
                moved = (scale - scales[g]) * steps
                errors[c:d] -= moved
                pull[d - a :] -= own[d - a :, rows] @ moved
                scales[g] = scale
    return Codes(codes.T.to(torch.uint8).contiguous(), scales.T.half().contiguous(), start.zeros, start.bits, group)
