"""A linear map stored as small integers with one scale and one zero point per group of inputs.

    W[o, i] = scales[o, g] · (code[o, i] − zeros[o, g]),   g = i div group

Codes have 2, 3, 4 or 8 bits and are really packed (layout: packing.py). Scales are float16, zero points are integers in
[0, 2^bits − 1], one byte each. The last group of a row may be shorter. A float16 scale has 11 significant bits and
code − zero at most 9, so the product is exact in float32: every engine that multiplies in float32 gets the same W.

Bytes per weight: bits/8 + 3/group, that is 0.547 at 4 bits and groups of 64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from netsuke.layers.linear import LinearBase
from netsuke.layers.packing import WIDTHS, pack, packed_width, unpack

CHUNK = (
    1 << 18
)  # weights per step of dequantization: codes, floats and W's slice stay inside a core's second-level cache


def group_count(ins: int, group: int) -> int:
    return -(-ins // group)


def dequantize(
    packed: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int, ins: int, dtype: torch.dtype
) -> Tensor:
    """packed (N, bytes) uint8, scales and zeros (N, n_groups) -> (N, ins) in `dtype`; row by row in chunks, so that the
    memory it takes is the result and about a megabyte."""
    n, full = packed.shape[0], ins // group
    out = torch.empty(n, ins, dtype=dtype, device=packed.device)
    step = max(1, CHUNK // max(ins, 1))
    for a in range(0, n, step):
        part = (
            out[a : a + step]
            if dtype == torch.float32
            else torch.empty(len(packed[a : a + step]), ins, device=out.device)
        )
        part.copy_(unpack(packed[a : a + step], bits, ins))
        scale, zero = scales[a : a + step].float(), zeros[a : a + step].float()
        body = part[:, : full * group].unflatten(1, (full, group)) if full else None
        if body is not None:
            body.sub_(zero[:, :full, None]).mul_(scale[:, :full, None])
        if full * group < ins:
            part[:, full * group :].sub_(zero[:, full:]).mul_(scale[:, full:])
        if dtype != torch.float32:
            out[a : a + step] = part
    return out


class QuantLinear(LinearBase):
    """Group-wise quantized W. Tensors: codes (O, ceil(I·bits/8)) uint8, scales (O, n_groups) float16, zeros (O, n_groups)
    uint8, bias (O,) as it was."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(
        self, packed: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int, ins: int, bias: Tensor | None = None
    ):
        super().__init__()
        if bits not in WIDTHS or group < 1:
            raise ValueError(f"{bits} bits in groups of {group}")  # a caller's slip: methods and loaders refuse by name
        self.outs, self.ins, self.bits, self.group = packed.shape[0], ins, bits, group
        self.register_buffer("codes", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_codes(
        cls, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int, bias: Tensor | None = None
    ) -> QuantLinear:
        """From unpacked codes (O, I) uint8, scales (O, n_groups) float16 and zeros (O, n_groups) uint8."""
        return cls(pack(codes, bits), scales.half(), zeros.to(torch.uint8), bits, group, codes.shape[1], bias)

    @classmethod
    def from_spec(cls, spec: dict, outs: int, ins: int, bias: bool) -> QuantLinear:
        """The empty layer that `spec()` describes; its tensors are then loaded."""
        bits, group = spec["bits"], spec["group"]
        return cls(
            torch.empty(outs, packed_width(ins, bits), dtype=torch.uint8),
            torch.empty(outs, group_count(ins, group), dtype=torch.float16),
            torch.empty(outs, group_count(ins, group), dtype=torch.uint8),
            bits, group, ins,
            torch.empty(outs, dtype=getattr(torch, spec.get("bias", "float32"))) if bias else None,
        )  # fmt: skip

    def spec(self) -> dict:
        out = {"kind": "quant", "bits": self.bits, "group": self.group}
        if self.bias is not None and self.bias.dtype != torch.float32:
            out["bias"] = str(self.bias.dtype).removeprefix("torch.")
        return out

    def weight_for(self, dtype: torch.dtype) -> Tensor:
        return dequantize(self.codes, self.scales, self.zeros, self.bits, self.group, self.ins, dtype)

    def weight_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        tensors = self.codes[start:stop], self.scales[start:stop], self.zeros[start:stop]
        return dequantize(*tensors, self.bits, self.group, self.ins, dtype)

    def to_dense(self) -> Tensor:
        return self.weight_for(torch.float32)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W, (…,) -> (…, I) float32; only these rows are dequantized."""
        flat = ids.reshape(-1)
        tensors = self.codes[flat], self.scales[flat], self.zeros[flat]
        return dequantize(*tensors, self.bits, self.group, self.ins, torch.float32).view(*ids.shape, self.ins)
