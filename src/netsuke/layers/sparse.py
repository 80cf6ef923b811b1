"""A linear map that reads only the weights of the inputs that matter for this token (R-Sparse, ICLR 2025).

    score_i = |x_i| · c_i,   m_i = score_i > t,   y = W (m ⊙ x) + second(first((1 − m) ⊙ x)) + b

c_i is the norm of column i of W, so the score bounds what channel i can add to y. W is stored transposed, (I, O): a chosen
channel is one contiguous row, and the rest is not touched. The two thin factors that stand in for the channels left out
are optional. A threshold of 0 leaves nothing out: y is the dense product, factors unused.

The rule holds where x has one token, which is decoding; longer inputs are prompts and stay dense. `always` applies it to
every token but the first `prompt` of a row (to measure the harm on a text at once, by a masked product that saves nothing),
`counting` adds up how many channels the rule reads. All three are set on the layer while it runs and are not stored.

    kind      tensors (beside norms (I,) float32, first.…, second.…, bias)
    floats    weight (I, O) float32 or float16
    codes     codes (I, ceil(O·bits/8)) uint8, packed along O (packing.py); scales (n_groups, O) float16 and zeros
              (n_groups, O) uint8:  W[o, i] = scales[g, o] · (code[i, o] − zeros[g, o]),  g = i div group
The second is an exact re-layout of a QuantLinear: groups run along the inputs there as here.

A batch of tokens has a union of choices, and it grows quickly: only a single token is gathered, more are masked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from netsuke.errors import NetsukeError
from netsuke.layers.linear import WIDENED, Dense, LinearBase, half
from netsuke.layers.lowrank import check_factors, check_keys, factors_from_spec
from netsuke.layers.packing import WIDTHS, pack, packed_width, unpack
from netsuke.layers.quantized import QuantLinear, group_count

ASKED = "build a sparse layer"
FLOATS = ("float32", "float16")
QUANTIZED = ("codes", "scales", "zeros")
KEYS = {"kind", "threshold", "dtype", "bits", "group", "rank", "first", "second", "bias"}


@dataclass
class ChannelsRead:
    """How many input channels tokens under the rule have read: `sum` of channels over `count` tokens."""

    sum: int = 0
    count: int = 0

    @property
    def mean(self) -> float:
        """Channels per token; NaN before the first."""
        return self.sum / self.count if self.count else math.nan


def check_threshold(value: Any) -> float:
    """The threshold as the nearest float32, so that every engine compares with the same number.

    Raises NetsukeError unless it is a finite number that is not negative.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= torch.finfo(torch.float32).max:  # NaN fails every comparison
        raise NetsukeError(ASKED, f"threshold {str(value)[:40]}", "a number from 0, within the range of float32")
    return torch.tensor(value, dtype=torch.float32, device="cpu").item()


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def column_norms(weight: Tensor) -> Tensor:
    """‖W[:, i]‖₂ of W (O, I), summed in float64 -> (I,) float32."""
    return torch.linalg.vector_norm(weight, dim=0, dtype=torch.float64).float()


class InputSparse(LinearBase):
    """W stored by input channel, with the threshold of the rule; tensors as the file's docstring lists them. `macs` are
    those of a prompt's token, which is dense: how much less decoding takes depends on the text."""

    norms: Tensor

    def __init__(
        self, tensors: dict[str, Tensor], norms: Tensor, threshold: float, outs: int, *,
        bits: int | None = None, group: int | None = None, bias: Tensor | None = None,
        first: LinearBase | None = None, second: LinearBase | None = None,
    ):  # fmt: skip
        """`tensors` holds weight, or codes, scales and zeros. Raises NetsukeError for a bad threshold or bad factors."""
        super().__init__()
        self.outs, self.ins = outs, len(norms)
        self.bits, self.group, self.threshold = bits, group, check_threshold(threshold)
        if bits is None:
            self.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        else:
            for name in QUANTIZED:
                self.register_buffer(name, tensors[name])
        self.register_buffer("norms", norms)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        if (first is None) != (second is None):
            raise NetsukeError(ASKED, "one factor without the other", "both factors or none")
        if first is not None:
            check_factors(first, second, ASKED)
            if (second.outs, first.ins) != (outs, self.ins) or second.bias is not None:
                bias_too = "" if second.bias is None else " and a bias"
                found = f"factors of a map of {second.outs} by {first.ins}{bias_too}"
                raise NetsukeError(ASKED, found, f"factors of {outs} by {self.ins}, the bias beside them")
        self.first, self.second = first, second
        self.always = self.counting = False
        self.prompt = 0
        self.channels_read = ChannelsRead()

    @classmethod
    def from_dense(
        cls, layer: Dense, threshold: float, first: LinearBase | None = None, second: LinearBase | None = None,
        norms: Tensor | None = None,
    ) -> InputSparse:  # fmt: skip
        """The same W by channels: float16 stays, bfloat16 is widened to float32. `norms` (I,) overrides the column norms
        (ones: the score is |x_i| alone)."""
        weight = layer.weight.detach()
        norms = column_norms(weight) if norms is None else norms
        weight = weight if word(weight.dtype) in FLOATS else weight.float()
        tensors = {"weight": weight.T.contiguous()}
        return cls(tensors, norms, threshold, layer.outs, bias=layer.bias, first=first, second=second)

    @classmethod
    def from_quant(
        cls, layer: QuantLinear, threshold: float, first: LinearBase | None = None, second: LinearBase | None = None,
        norms: Tensor | None = None,
    ) -> InputSparse:  # fmt: skip
        """The same codes, scales and zero points, laid out by channels: W is equal bit for bit."""
        codes = unpack(layer.codes, layer.bits, layer.ins).T.contiguous()
        tensors = {
            "codes": pack(codes, layer.bits),
            "scales": layer.scales.T.contiguous(),
            "zeros": layer.zeros.T.contiguous(),
        }
        return cls(
            tensors, column_norms(layer.to_dense()) if norms is None else norms, threshold, layer.outs,
            bits=layer.bits, group=layer.group, bias=layer.bias, first=first, second=second,
        )  # fmt: skip

    @classmethod
    def from_spec(cls, spec: dict, outs: int, ins: int, bias: bool) -> InputSparse:
        """The empty layer that `spec()` describes; its tensors are then loaded. Raises NetsukeError for settings that a
        sparse map cannot have."""
        check_keys(spec, KEYS, ASKED)
        bits, group = spec.get("bits"), spec.get("group")
        if ("dtype" in spec) == ("bits" in spec):
            raise NetsukeError(ASKED, "both dtype and bits, or neither", "one of the two")
        if "dtype" in spec:
            if spec["dtype"] not in FLOATS or group is not None:
                found = f"dtype {str(spec['dtype'])[:40]!r}" + ("" if group is None else " with a group")
                raise NetsukeError(ASKED, found, f"{', '.join(FLOATS)}, without a group")
            tensors = {"weight": torch.empty(ins, outs, dtype=getattr(torch, spec["dtype"]))}
        else:
            if type(bits) is not int or bits not in WIDTHS or type(group) is not int or group < 1:
                found = f"bits {str(bits)[:40]} in groups of {str(group)[:40]}"
                raise NetsukeError(ASKED, found, f"bits {', '.join(map(str, WIDTHS))} in groups of 1 or more")
            groups = group_count(ins, group)
            tensors = {
                "codes": torch.empty(ins, packed_width(outs, bits), dtype=torch.uint8),
                "scales": torch.empty(groups, outs, dtype=torch.float16),
                "zeros": torch.empty(groups, outs, dtype=torch.uint8),
            }
        if (kind := spec.get("bias", "float32")) not in (*FLOATS, "bfloat16"):
            raise NetsukeError(ASKED, f"a bias of dtype {str(kind)[:40]!r}", f"{', '.join(FLOATS)}, bfloat16")
        factors = ()
        if spec.keys() & {"rank", "first", "second"}:
            factors = factors_from_spec(spec, outs, ins, False, ASKED)
        return cls(
            tensors, torch.empty(ins), spec.get("threshold"), outs, bits=bits, group=group,
            bias=torch.empty(outs, dtype=getattr(torch, kind)) if bias else None,
            **dict(zip(("first", "second"), factors)),
        )  # fmt: skip

    def spec(self) -> dict:
        out: dict[str, Any] = {"kind": "sparse", "threshold": self.threshold}
        out |= {"dtype": word(self.weight.dtype)} if self.bits is None else {"bits": self.bits, "group": self.group}
        if self.first is not None:
            out |= {"rank": self.first.outs, "first": self.first.spec(), "second": self.second.spec()}
        if self.bias is not None and self.bias.dtype != torch.float32:
            out["bias"] = word(self.bias.dtype)
        return out

    def channels(self, which: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """Rows of Wᵀ for these input channels (indices (n,) or a slice) -> (n, O); no other row is touched."""
        if self.bits is None:
            rows = self.weight[which] if isinstance(which, slice) else self.weight.index_select(0, which)
            return rows.to(dtype)
        if isinstance(which, slice):
            which = torch.arange(*which.indices(self.ins), device=self.codes.device)
        group = which // self.group
        out = unpack(self.codes.index_select(0, which), self.bits, self.outs).to(dtype)
        out.sub_(self.zeros.index_select(0, group))
        return out.mul_(self.scales.index_select(0, group))

    def product(self, x: Tensor, which: Tensor | None = None) -> Tensor:
        """x (N, n) · Wᵀ[which] -> (N, O), a few channels widened at a time; `which` (n,) None means all of them."""
        if which is None and self.bits is None and self.weight.dtype == x.dtype:
            return x @ self.weight
        y, step = x.new_zeros(len(x), self.outs), max(1, WIDENED // self.outs)
        for a in range(0, x.shape[1], step):
            part = slice(a, a + step) if which is None else which[a : a + step]
            y.addmm_(x[:, a : a + step], self.channels(part, x.dtype))
        return y

    def chosen(self, x: Tensor) -> Tensor:
        """The rule: which channels of x (…, I) are worth their weights, as a mask. The score is taken in float32."""
        return x.float().abs() * self.norms > self.threshold

    def sparse(self, x: Tensor) -> Tensor:
        """The sparse product of x (N, I) without bias -> (N, O), each row by its own choice."""
        mask = self.chosen(x)
        if self.counting:
            self.count(int(mask.sum()), len(x))
        if len(x) == 1:
            which = mask[0].nonzero().squeeze(1)
            y = self.product(x.index_select(1, which), which)
        else:
            y = self.product(x * mask)
        return y if self.first is None else y + self.second(self.first(x * ~mask))

    def count(self, channels: int, tokens: int) -> None:
        self.channels_read.sum += channels
        self.channels_read.count += tokens

    def forward(self, x: Tensor) -> Tensor:
        if self.always and self.prompt and x.ndim > 1:
            prompt, decoded = x[..., : self.prompt, :], x[..., self.prompt :, :]
            return torch.cat((self.multiply(prompt, False), self.multiply(decoded, True)), -2)
        return self.multiply(x, self.always or x.ndim == 1 or x.shape[-2] == 1)

    def multiply(self, x: Tensor, choosing: bool) -> Tensor:
        """W x + b for x (…, I), dense or by the rule."""
        # Half-precision inputs are widened: sums over chunks of channels would lose digits in them.
        rows = x.reshape(-1, self.ins).to(torch.promote_types(x.dtype, torch.float32))
        if choosing and self.threshold > 0:
            y = self.sparse(rows)
        else:
            y = self.product(rows)
            if choosing and self.counting:
                self.count(rows.numel(), len(rows))
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.outs)

    @property
    def channel_bytes(self) -> int:
        """Bytes of stored weights that one chosen channel reads."""
        return (self.weight if self.bits is None else self.codes)[0].nbytes

    def to_dense(self) -> Tensor:
        return self.rows(torch.arange(self.outs, device=self.norms.device))

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W, (…,) -> (…, I) float32, gathered from all channels: a dear way to look up an embedding."""
        flat = ids.reshape(-1)
        out, step = self.norms.new_empty(len(flat), self.ins), max(1, WIDENED // self.outs)
        for a in range(0, self.ins, step):
            out[:, a : a + step] = self.channels(slice(a, a + step), torch.float32)[:, flat].T
        return out.view(*ids.shape, self.ins)

    def halved(self, name: str) -> LinearBase:
        tensors = {key: getattr(self, key) for key in (("weight",) if self.bits is None else QUANTIZED)}
        settings: dict[str, Any] = {"bits": self.bits, "group": self.group, "bias": self.bias}
        if self.bits is None and self.weight.dtype == torch.float32:
            tensors, settings["bias"] = half(tensors, name), half({"bias": self.bias}, name)["bias"]
        if self.first is not None:
            settings |= {key: getattr(self, key).halved(f"{name}.{key}") for key in ("first", "second")}
        return InputSparse(tensors, self.norms, self.threshold, self.outs, **settings)
