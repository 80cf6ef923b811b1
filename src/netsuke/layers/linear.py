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

# Weights widened at a time (0.5 MB as float32): they stay in a core's second-level cache, and a vocabulary of 32,000 by 768
# costs 5 ms per token instead of the 25 ms (and 98 MB) of widening it whole.
WIDENED = 1 << 17


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

    def weight_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor | None:
        """Rows start … stop-1 of W in the dtype of the computation, or None where W is used as it is stored."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        step = max(1, WIDENED // self.ins)
        if torch.is_grad_enabled() or self.outs <= step or self.weight_rows(0, 0, x.dtype) is None:
            return F.linear(x, self.weight_for(x.dtype), bias)
        y = x.new_empty(*x.shape[:-1], self.outs)
        rows, out = x.reshape(-1, self.ins), y.view(-1, self.outs)
        for a in range(0, self.outs, step):  # a few rows are widened, used while in the cache, and dropped
            torch.mm(rows, self.weight_rows(a, a + step, x.dtype).T, out=out[:, a : a + step])
        return y if bias is None else y.add_(bias)

    def rows(self, ids: Tensor) -> Tensor:
        return self.to_dense()[ids]

    def halved(self, name: str) -> LinearBase:
        """This map in 16 bits (see `halved`): itself where its weights are no float32 tensors."""
        return self

    def extra_repr(self) -> str:
        return f"{self.ins} -> {self.outs}, {self.spec()}"


class Dense(LinearBase):
    """W as one float tensor (float32, float16 or bfloat16). Half-precision storage is widened when used: the CPU's
    half-precision products are slower and less exact, and half a megabyte of widened rows is all that it costs."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.outs, self.ins = weight.shape
        # As a file stores it: BLAS rounds a transposed view differently, and a saved model must answer as before.
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
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

    def weight_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor | None:
        return None if self.weight.dtype == dtype else self.weight[start:stop].to(dtype)

    def to_dense(self) -> Tensor:
        return self.weight.float()

    def rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).float()

    def halved(self, name: str) -> LinearBase:
        if self.weight.dtype != torch.float32:
            return self
        return Dense(**half({"weight": self.weight, "bias": self.bias}, name))

    def spec(self) -> dict:
        return {"kind": "dense", "dtype": str(self.weight.dtype).removeprefix("torch.")}


def halved(layer: LinearBase, name: str) -> LinearBase:
    """`layer` in 16 bits: float32 weights become float16, everything else is as small already and stays.

    Raises NetsukeError, with `name`, for weights beyond the range of float16.
    """
    return layer.halved(name)


def half(tensors: dict[str, Tensor | None], name: str) -> dict[str, Tensor | None]:
    """The tensors as float16. Raises NetsukeError, with the map's `name`, for numbers beyond its range."""
    out = {key: None if t is None else t.detach().half() for key, t in tensors.items()}
    for key, t in out.items():
        if t is not None and not bool(t.isfinite().all()):
            raise NetsukeError(
                f"store {name} as float16", f"weights of {name} reach {float(tensors[key].abs().max()):.3g}",
                "up to 65504", f"quantize it: per_layer={{{name!r}: 8}}",
            )  # fmt: skip
    return out
