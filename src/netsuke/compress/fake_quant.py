"""Quantization simulated in floats, differentiable: what learns ranges, clips and transformations is built from these.

    affine      Δ = (hi − lo) / (2^b − 1),  z = round(−2^(b−1) − lo/Δ),  x̂ = Δ·(clip(round(x/Δ) + z) − z)
    symmetric   Δ = max(|lo|, |hi|) / (2^(b−1) − 1),  z = 0
    clip        hi' = σ(γ_hi)·hi, lo' = σ(γ_lo)·lo, γ starting at 4 (σ = 0.982): learnable weight clipping

Rounding is straight-through. Ranges are widened to hold 0, and z is an integer, so 0 stays 0. Weight scales are float16
values, as layers/quantized.py stores them: the simulation is what is stored, to the last bit. ("OmniQuant", Shao et al.
2024, for the clip; "MobileQuant", 2024, for the formats.)

All functions are pure, work in float32 (float64 where the caller is) and do not need gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from netsuke.compress.rounding import TINY, Codes
from netsuke.errors import NetsukeError
from netsuke.layers.static import StaticGrid, codes, grid, snap

CLIP_START = 4.0
Per = str | int  # "tensor", "row", or the number of inputs that share a scale


# --- weights ---


def grouped(W: Tensor, per: Per, name: str = "these weights") -> Tensor:
    """W (O, I) seen as groups that share a scale: "tensor" (1, O·I), "row" (O, I), G inputs (O, I/G, G).

    Raises NetsukeError, with the map's `name`, when G does not divide the inputs.
    """
    if per == "tensor":
        return W.reshape(1, -1)
    if per == "row":
        return W
    if type(per) is not int or per < 1 or W.shape[1] % per:
        raise NetsukeError(
            f"quantize {name}", f"groups of {per} for {W.shape[1]} inputs", f"'tensor', 'row' or a divisor of {W.shape[1]}"
        )  # fmt: skip
    return W.unflatten(1, (-1, per))


def clip_start(W: Tensor, per: Per) -> Tensor:
    """Logits of a clip that hardly clips: (2, groups…, 1), for the low and the high end of every group."""
    return torch.full((2, *grouped(W, per).shape[:-1], 1), CLIP_START)


def weight_grid(
    W: Tensor, bits: int, per: Per, clip: Tensor | None = None, symmetric: bool = True, name: str = "these weights"
) -> tuple[Tensor, Tensor]:
    """Scale (a float16 value) and zero point of every group of W (O, I), (groups…, 1); `clip` as `clip_start` makes it."""
    parts = grouped(W, per, name)
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    if clip is not None:
        share = clip.sigmoid()
        low, high = low * share[0], high * share[1]
    exact, zero = grid(low, high, bits, symmetric)
    stored = exact.detach().half().to(exact.dtype).clamp(min=TINY)
    return stored + (exact - exact.detach()), zero


def fake_weight(
    W: Tensor, bits: int, per: Per, clip: Tensor | None = None, symmetric: bool = True, name: str = "these weights"
) -> Tensor:
    """W (O, I) on its grid, same shape. Gradients reach W and the clip."""
    scale, zero = weight_grid(W, bits, per, clip, symmetric, name)
    return snap(grouped(W, per, name), scale, zero, bits).reshape(W.shape)


def weight_codes(
    W: Tensor, bits: int, per: Per, clip: Tensor | None = None, symmetric: bool = True, name: str = "these weights"
) -> Codes:
    """What `fake_weight` simulates, as codes to store. A scale per tensor is stored once per row."""
    scale, zero = weight_grid(W.detach(), bits, per, clip, symmetric, name)
    offset = 1 << (bits - 1)
    steps = codes(grouped(W.detach(), per, name), scale, zero, bits).reshape(W.shape) + offset
    outs, ins = W.shape
    shape = (outs, 1) if per in ("tensor", "row") else (outs, ins // per)
    scales, zeros = (t.reshape(-1, shape[1]).expand(shape) for t in (scale, zero + offset))
    group = ins if per in ("tensor", "row") else per
    return Codes(
        steps.to(torch.uint8), scales.half().contiguous(), zeros.to(torch.uint8).contiguous(), bits, group
    )  # fmt: skip


# --- activations ---


def fake_static(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """x on the grid of a fixed range (tensors of one number, perhaps learned). 16 bits are symmetric."""
    return snap(x, *grid(low, high, bits, symmetric=bits == 16), bits)


def freeze(low: Tensor | float, high: Tensor | float, bits: int, name: str = "a site") -> StaticGrid:
    """The grid that `fake_static` uses, as it is stored. Raises NetsukeError, with the site's `name`, for a range that is
    empty or not finite."""
    low, high = (torch.as_tensor(v, dtype=torch.float32).detach() for v in (low, high))
    if not bool((low.isfinite() & high.isfinite()).all()) or not float(low) < float(high):
        raise NetsukeError(
            f"quantize the activations at {name}", f"a range from {float(low):g} to {float(high):g}",
            "finite numbers, low below high", "calibration text that reaches this site, or 16 bits there",
        )  # fmt: skip
    scale, zero = grid(low, high, bits, symmetric=bits == 16)
    return StaticGrid(float(scale), int(zero), bits)
