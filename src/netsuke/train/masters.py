"""A linear map in training: float master weights that every product sees perturbed and quantized.

    W_used = Q(W + ε u; γ),   Q the group-wise grid of compress/fake_quant.py with clip logits γ, as layers/quantized.py stores it

Half a megabyte of rows is moved, rounded, multiplied and dropped at a time, so that neither a perturbed nor a quantized copy
of W ever exists as a whole. With gradients on, the same layer is ordinary quantization-aware training: rounding is
straight-through and W is used whole. `pack` turns it into the QuantLinear that answers with the same numbers.

Widths that the group does not divide get a shorter last group, as QuantLinear has it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from netsuke.compress.fake_quant import fake_dynamic, fake_weight, weight_codes
from netsuke.compress.quantize import Codes
from netsuke.layers.linear import LinearBase
from netsuke.layers.quantized import QuantLinear, group_count
from netsuke.train.zeroth_order import Perturbation

CLIP_START = 3.0  # σ(3) = 0.953 of the range: the released code's start


def clip_logits(outs: int, ins: int, group: int, start: float = CLIP_START) -> Tensor:
    """Clip logits (2, O, n_groups): of the low and of the high end of every group."""
    return torch.full((2, outs, group_count(ins, group)), start)


def _parts(W: Tensor, clip: Tensor, group: int) -> list[tuple[Tensor, int | str, Tensor]]:
    """(columns, grouping, clip) of the whole groups and of the shorter last one, those that there are."""
    full = W.shape[1] // group
    out: list[tuple[Tensor, int | str, Tensor]] = []
    if full:
        out.append((W[:, : full * group], group, clip[:, :, :full, None]))
    if full * group < W.shape[1]:
        out.append((W[:, full * group :], "row", clip[:, :, full:]))
    return out


def fake_quantized(W: Tensor, clip: Tensor, bits: int, group: int) -> Tensor:
    """W (O, I) on its grid, clip (2, O, n_groups); differentiable in both."""
    parts = [fake_weight(w, bits, per, c, symmetric=False) for w, per, c in _parts(W, clip, group)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@torch.no_grad()
def quantized(W: Tensor, clip: Tensor, bits: int, group: int, bias: Tensor | None = None) -> QuantLinear:
    """What `fake_quantized` simulates, stored."""
    parts = [weight_codes(w, bits, per, c, symmetric=False) for w, per, c in _parts(W, clip, group)]
    joined = (torch.cat([getattr(p, n) for p in parts], 1) for n in ("codes", "scales", "zeros"))
    return Codes(*joined, bits, group).layer(None if bias is None else bias.detach().clone())


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

    def spec(self) -> dict:
        """Says what it is to whoever asks what stands here; a model in training is not saved."""
        return {"kind": "master", "bits": self.bits, "group": self.group}

    def weight_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        stop = min(stop, self.outs)
        if stop <= start:
            return self.weight.new_empty(0, self.ins, dtype=dtype)
        W, p = self.weight[start:stop], self.perturbation
        if p is not None:
            W = p.rows(f"{self.name}.weight", self.weight, start, stop)
        return fake_quantized(W, self.clip[:, start:stop], self.bits, self.group).to(dtype)

    def weight_for(self, dtype: torch.dtype) -> Tensor:
        return self.weight_rows(0, self.outs, dtype)

    def to_dense(self) -> Tensor:
        return self.weight_for(torch.float32)

    def pack(self) -> QuantLinear:
        """The map as it is stored for good."""
        return quantized(self.weight, self.clip, self.bits, self.group, self.bias)


class TokenGrid:
    """Stands at a site: x (…, C) rounded to `bits` on a grid of its own for every token (and head, where C is a head's)."""

    def __init__(self, bits: int):
        self.bits = bits

    def __call__(self, x: Tensor) -> Tensor:
        return fake_dynamic(x, self.bits)
