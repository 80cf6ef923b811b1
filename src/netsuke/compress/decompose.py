"""Closed-form pieces that several methods share: everything here is float64, deterministic and free of gradients.

Activations come as a Gram matrix C = E[xᵀx] (D, D) with rows x; weights come as they act on rows, y = x A, so a layer's
stored (O, I) weight enters transposed. "Relative" floors and ridges are shares of C's scale, so that one default serves
models whose activations differ by orders of magnitude.

    svd               the rank-r matrix nearest to a weight: exact, or randomised and seeded for wide ones (Halko, 2011)
    balanced          a pair of factors with the scale of each rank-one term shared equally between them
    sym_sqrt          C^½ and C^-½ with a floor under the eigenvalues
    whitened_svd      the rank-r map nearest to A on data with Gram C: min ‖C^½ (A − LR)‖ (greenformers, SVD-LLM 2024)
    pair_svd          the same for a product A B, from an SVD no larger than the inner width (MoDeGPT Type III, 2024)
    ridge_leverage    how hard each channel is to predict from the others (Alaoui & Mahoney, 2015)
    nystrom           the best linear guess of all channels from the kept ones (MoDeGPT Type I, 2024)
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 4096  # the narrower side up to which the SVD is exact: its time grows with the cube
OVERSAMPLE, ITERATIONS = (
    16,
    4,
)  # of the randomised SVD: within 1e-3 of the exact error on spectra as flat as trained weights'
ATTEMPTS = 12  # the ridge grows tenfold each time: from 1e-12 of the mean diagonal to a tenth of it


def svd(weight: Tensor, rank: int, seed: int = 0, exact: int = EXACT) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, r), s (r,), Vᵀ (r, I) of the leading `rank` terms of weight (O, I), float64.

    Beyond `exact` on the narrower side the range is found from seeded random directions and a few power iterations
    (Halko, Martinsson & Tropp, "Finding structure with randomness", 2011): the same result on every call.
    """
    W = weight.double()
    if min(W.shape) <= exact:
        u, s, vt = torch.linalg.svd(W, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    rng = torch.Generator().manual_seed(seed)
    probes = torch.randn(W.shape[1], min(rank + OVERSAMPLE, *W.shape), generator=rng, dtype=W.dtype).to(W.device)
    basis = torch.linalg.qr(W @ probes).Q
    for _ in range(ITERATIONS):  # orthogonalised each time, or small singular values drown in rounding
        basis = torch.linalg.qr(W @ torch.linalg.qr(W.T @ basis).Q).Q
    u, s, vt = torch.linalg.svd(basis.T @ W, full_matrices=False)
    return basis @ u[:, :rank], s[:rank], vt[:rank]


def balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (r, I) and (O, r) of the same product whose rows and columns have equal norms, term by term.

    An SVD with all of S on one side trains badly: gradients of the two factors differ by S. For a plain SVD this puts √S on
    both sides. Terms that are zero stay zero.
    """
    rows, columns = first.norm(dim=1), second.norm(dim=0)
    scale = torch.where((rows > 0) & (columns > 0), (columns / rows.clamp_min(1e-300)).sqrt(), torch.ones_like(rows))
    return first * scale[:, None], second / scale


def sym_sqrt(gram: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """C^½ and C^-½, (D, D) each, of the symmetric square root (not Cholesky factors: their columns have other norms).

    Eigenvalues below `floor` times the largest are lifted to it: directions the data never showed stay finite, and the
    two results remain exact inverses of each other.
    """
    values, vectors = torch.linalg.eigh(_symmetric(gram))
    values = values.clamp_min(max(float(values[-1]) * floor, torch.finfo(torch.float64).tiny))
    root = values.sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def whitened_svd(gram: Tensor, weight: Tensor, rank: int, floor: float) -> tuple[Tensor, Tensor]:
    """L (I, r), R (r, O) with the least ‖C^½ (A − L R)‖ over all rank-r products; gram (I, I), weight A (I, O)."""
    root, inverse = sym_sqrt(gram, floor)
    u, s, vt = torch.linalg.svd(root @ weight.double(), full_matrices=False)
    return inverse @ u[:, :rank], s[:rank, None] * vt[:rank]


def pair_svd(roots: tuple[Tensor, Tensor], first: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The rank-r pair nearest to the product A B on the data, and the share of its energy that is lost.

    roots   C^½ and C^-½ of the input, (I, I): one pair of roots serves all heads of a block
    first   A (I, K); second B (K, O), with K the inner width to be cut; returns A' (I, r), B' (r, O)

    svd(C^½ A) = U S Vᵀ, then svd(S Vᵀ B) = U' S' V'ᵀ: as U is orthonormal, U U' S' V'ᵀ is the SVD of C^½ A B, at the
    cost of a K-row matrix. A' = C^-½ U U'_r has unit variance per channel, all scale sits in B' = S'_r V'_rᵀ.
    """
    root, inverse = roots
    u, s, vt = torch.linalg.svd(root @ first.double(), full_matrices=False)
    u2, s2, vt2 = torch.linalg.svd(s[:, None] * (vt @ second.double()), full_matrices=False)
    energy = s2.square()
    lost = float(energy[rank:].sum() / energy.sum().clamp_min(torch.finfo(torch.float64).tiny))
    return inverse @ (u @ u2[:, :rank]), s2[:rank, None] * vt2[:rank], lost


def ridge_leverage(gram: Tensor, ridge: float) -> Tensor:
    """ℓ_i = [C (C + λI)⁻¹]_ii in [0, 1), (D,), with λ = ridge · trace(C)/D."""
    factor, added = safe_cholesky(gram, ridge)
    return 1.0 - added * torch.cholesky_inverse(factor).diagonal()


def nystrom(gram: Tensor, keep: Tensor, ridge: float) -> Tensor:
    """M (k, D): the activations of all D channels are guessed as x[keep] M. Columns of kept channels are the identity.

    The others are (C_SS + λI)⁻¹ C_S·, the Nyström approximation; leaving kept channels alone, where the plain formula
    would shrink them too, makes k = D exact and lets a ridge too large fall back to cutting without compensation.
    """
    gram = _symmetric(gram)
    factor, _ = safe_cholesky(gram[keep][:, keep], ridge, scale=_mean_diagonal(gram))
    guess = torch.cholesky_solve(gram[keep], factor)
    guess[:, keep] = torch.eye(len(keep), dtype=torch.float64, device=gram.device)
    return guess


def safe_cholesky(gram: Tensor, ridge: float, scale: float | None = None) -> tuple[Tensor, float]:
    """Lower factor of C + λI and the λ that was used: ridge · scale, ten times more for as long as the factor fails.

    scale   what `ridge` is relative to; None: the mean of C's diagonal. A matrix of zeros gets λ = 1.
    """
    gram = _symmetric(gram)
    scale = _mean_diagonal(gram) if scale is None else scale
    scale = scale if scale > 0 else 1.0
    eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    for attempt in range(ATTEMPTS):
        added = scale * (ridge if attempt == 0 else max(ridge, 1e-12) * 10.0**attempt)
        factor, failed = torch.linalg.cholesky_ex(gram + added * eye)
        if int(failed) == 0 and bool(factor.isfinite().all()):
            return factor, added
    raise ValueError(f"a {len(gram)} x {len(gram)} Gram matrix has no Cholesky factor: it holds NaN or is not a Gram")


def _symmetric(gram: Tensor) -> Tensor:
    return (gram.double() + gram.double().T) / 2


def _mean_diagonal(gram: Tensor) -> float:
    return float(gram.diagonal().double().mean())
