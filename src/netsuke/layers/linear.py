"""The linear-layer family. A linear map is y = x Wᵀ + b with W of shape (O, I); how W is stored is its own affair.

Every member offers the same few facts and calls, so that models, methods, plans and exports never ask for its kind:

    layer(x)            (…, I) -> (…, O), in the dtype of x
    layer.rows(ids)     rows of W, (…,) -> (…, I): a linear map doubles as an embedding table (tied heads)
    layer.to_dense()    W as float32, (O, I)
    layer.bytes()       bytes of all stored tensors, on disk and in RAM alike
    layer.macs()        multiply-accumulates for one row of x
    layer.spec()        {"kind": …, …}: enough to rebuild the empty layer before its tensors are loaded
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netsuke.errors import NetsukeError


class LinearBase(nn.Module):
    """What all linear maps share. Subclasses set `outs`, `ins`, `bias` and implement `to_dense`, `spec`, `empty`."""

    outs: int
    ins: int
    bias: nn.Parameter | None

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    def macs(self) -> int:
        return self.outs * self.ins

    def weight_for(self, dtype: torch.dtype) -> Tensor:
        """W in the dtype of the computation; a transient copy unless W is stored in that dtype."""
        return self.to_dense().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight_for(x.dtype), bias)

    def rows(self, ids: Tensor) -> Tensor:
        return self.to_dense()[ids]

    def extra_repr(self) -> str:
        return f"{self.ins} -> {self.outs}, {self.spec()}"


class Dense(LinearBase):
    """W as one float tensor (float32, float16 or bfloat16). Half-precision storage is widened when used: the CPU's
    half-precision products are slower and less exact, and the widened copy of one layer is all that it costs."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.outs, self.ins = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def empty(cls, outs: int, ins: int, bias: bool, dtype: str = "float32") -> Dense:
        kind = getattr(torch, dtype)
        return cls(torch.empty(outs, ins, dtype=kind), torch.empty(outs, dtype=kind) if bias else None)

    @classmethod
    def from_spec(cls, spec: dict, outs: int, ins: int, bias: bool) -> Dense:
        """The empty layer of a spec. Raises NetsukeError when its dtype is none of the three."""
        dtype = spec.get("dtype")
        if dtype not in ("float32", "float16", "bfloat16"):
            raise NetsukeError("build a dense layer", f"dtype {dtype!r}", "float32, float16, bfloat16")
        return cls.empty(outs, ins, bias, dtype)

    def weight_for(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def to_dense(self) -> Tensor:
        return self.weight.float()

    def rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).float()

    def spec(self) -> dict:
        return {"kind": "dense", "dtype": str(self.weight.dtype).removeprefix("torch.")}
