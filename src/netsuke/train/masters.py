"""A linear map in training: float master weights that every product sees perturbed and quantized.

    W_used = Q(W + ε u),   Q a grid of compress/fake_quant.py per group of inputs, as layers/quantized.py stores it

The grid follows the (perturbed) weights' range, clipped by learned logits γ, or it is fixed (`fix_grid`) and only what is
rounded onto it moves. Half a megabyte of rows is moved, rounded, multiplied and dropped at a time, so that neither a
perturbed nor a quantized copy of W ever exists as a whole. With gradients on, the same layer is ordinary
quantization-aware training: rounding is straight-through and W is used whole. `pack` turns it into the QuantLinear that
answers with the same numbers.

Widths that the group does not divide get a shorter last group, as QuantLinear has it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from netsuke.compress.fake_quant import weight_grid
from netsuke.compress.rounding import Codes
from netsuke.layers.linear import LinearBase
from netsuke.layers.quantized import QuantLinear, group_count
from netsuke.layers.static import codes, snap
from netsuke.train.zeroth_order import Perturbation

CLIP_START = 3.0  # σ(3) = 0.953 of the range: the released code's start
Grid = tuple[Tensor, Tensor]  # scales and zero points, (O, n_groups) each


def clip_logits(outs: int, ins: int, group: int, start: float = CLIP_START) -> Tensor:
    """Clip logits (2, O, n_groups): of the low and of the high end of every group."""
    return torch.full((2, outs, group_count(ins, group)), start)


def grid_of(W: Tensor, clip: Tensor, bits: int, group: int) -> Grid:
    """The grid of W (O, I) under clip (2, O, n_groups); differentiable in both."""
    full = W.shape[1] // group
    parts = []
    if full:
        parts.append(weight_grid(W[:, : full * group], bits, group, clip[:, :, :full, None], symmetric=False))
    if full * group < W.shape[1]:  # the shorter last group is a row of its own
        parts.append(weight_grid(W[:, full * group :], bits, "row", clip[:, :, full:], symmetric=False))
    scale, zero = (torch.cat([t.flatten(1) for t in both], 1) for both in zip(*parts))
    return scale, zero


def _by_group(f: Callable[..., Tensor], W: Tensor, grid: Grid, bits: int, group: int) -> Tensor:
    """f(weights, scale, zero, bits) of every group of W, in the shape of W."""
    full, (scale, zero) = W.shape[1] // group, grid
    out = torch.empty(0)
    if full:
        body = W[:, : full * group].unflatten(1, (full, group))
        out = f(body, scale[:, :full, None], zero[:, :full, None], bits).flatten(1)
    if full * group < W.shape[1]:
        tail = f(W[:, full * group :], scale[:, full:], zero[:, full:], bits)
        out = torch.cat((out, tail), 1) if full else tail
    return out


def fake_quantized(W: Tensor, clip: Tensor, bits: int, group: int) -> Tensor:
    """W (O, I) on its grid; differentiable in W and the clip."""
    return _by_group(snap, W, grid_of(W, clip, bits, group), bits, group)


@torch.no_grad()
def stored(W: Tensor, grid: Grid, bits: int, group: int, bias: Tensor | None = None) -> QuantLinear:
    """W on a grid, as it is stored for good."""
    offset = 1 << (bits - 1)
    steps = (_by_group(codes, W, grid, bits, group) + offset).to(torch.uint8)
    packed = Codes(steps, grid[0].half(), (grid[1] + offset).to(torch.uint8), bits, group)
    return packed.layer(None if bias is None else bias.detach().clone())


@torch.no_grad()
def quantized(W: Tensor, clip: Tensor, bits: int, group: int, bias: Tensor | None = None) -> QuantLinear:
    """What `fake_quantized` simulates, stored."""
    return stored(W, grid_of(W, clip, bits, group), bits, group, bias)


class MasterLinear(LinearBase):
    """Float W and clip logits, used quantized. `perturbation` moves W while it stands; `name` keys its noise."""

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None, clip: Tensor, bits: int, group: int):
        super().__init__()
        self.name, self.bits, self.group = name, bits, group
        self.outs, self.ins = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.clip = nn.Parameter(clip, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.perturbation: Perturbation | None = None
        self.fixed: Grid | None = None

    def spec(self) -> dict:
        """Says what it is to whoever asks what stands here; a model in training is not saved."""
        return {"kind": "master", "bits": self.bits, "group": self.group}

    @torch.no_grad()
    def fix_grid(self) -> None:
        """From now on the grid is that of the weights as they are."""
        self.fixed = grid_of(self.weight, self.clip, self.bits, self.group)

    def weight_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        stop = min(stop, self.outs)
        if stop <= start:
            return self.weight.new_empty(0, self.ins, dtype=dtype)
        W, p = self.weight[start:stop], self.perturbation
        if p is not None:
            W = p.rows(f"{self.name}.weight", self.weight, start, stop)
        if self.fixed is None:
            grid = grid_of(W, self.clip[:, start:stop], self.bits, self.group)
        else:
            grid = self.fixed[0][start:stop], self.fixed[1][start:stop]
        return _by_group(snap, W, grid, self.bits, self.group).to(dtype)

    def weight_for(self, dtype: torch.dtype) -> Tensor:
        return self.weight_rows(0, self.outs, dtype)

    def to_dense(self) -> Tensor:
        return self.weight_for(torch.float32)

    def pack(self) -> QuantLinear:
        """The map as it is stored for good."""
        grid = self.fixed or grid_of(self.weight, self.clip, self.bits, self.group)
        return stored(self.weight, grid, self.bits, self.group, self.bias)
