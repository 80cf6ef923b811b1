"""A linear map with a thin one beside it: y = base(x) + second(first(x)), W = base.W + second.W · first.W of rank r.

    first   (r, I), no bias         second  (O, r), no bias         base    any dense or quantized map, with its bias

"LoRA: Low-Rank Adaptation of Large Language Models", 2021. The usual factor alpha/r is part of `second`. The base is held, not
copied: any number of adapters stand on one base, which none of them changes, so taking one off gives the base back bit for bit.
`merged` writes the sum into one dense map: no work left beside it, but in low precision no way back.
"""

from __future__ import annotations

from torch import Tensor, nn

from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense, LinearBase
from netsuke.layers.lowrank import check_factors, check_keys, factors_from_spec
from netsuke.layers.quantized import QuantLinear
from netsuke.layers.registry import layer_from_spec

ASKED = "build an adapter layer"
BASES = ("dense", "quant")


class Adapter(LinearBase):
    """A map on a base that it shares. Tensors: those of the three maps, as base.…, first.… and second.…."""

    base: LinearBase
    first: LinearBase
    second: LinearBase

    def __init__(self, base: LinearBase, first: LinearBase, second: LinearBase):
        """Raises NetsukeError for a base that is no dense or quantized map, and for factors that do not fit it."""
        super().__init__()
        if not isinstance(base, Dense | QuantLinear):
            raise NetsukeError(
                ASKED, f"the base is a {type(base).__name__}", ", ".join(BASES), "merge the one below it"
            )
        check_factors(first, second, ASKED)
        if (second.outs, first.ins) != (base.outs, base.ins) or second.bias is not None:
            bias_too = "" if second.bias is None else " and a bias"
            found = f"factors of a map of {second.outs} by {first.ins}{bias_too}"
            raise NetsukeError(ASKED, found, f"factors of {base.outs} by {base.ins}, without a bias")
        self.outs, self.ins, self.rank = base.outs, base.ins, first.outs
        self.base, self.first, self.second = base, first, second

    @classmethod
    def from_spec(cls, spec: dict, outs: int, ins: int, bias: bool) -> Adapter:
        """The empty layer that `spec()` describes. Raises NetsukeError for a base, a rank or a factor that cannot be."""
        check_keys(spec, {"kind", "rank", "base", "first", "second"}, ASKED)
        inner = spec.get("base")
        kind = inner.get("kind") if isinstance(inner, dict) else None
        if kind not in BASES:  # not nested any deeper: a hostile file could nest without end
            raise NetsukeError(ASKED, f"the base is of kind {str(kind)[:40]!r}", ", ".join(BASES))
        factors = factors_from_spec(spec, outs, ins, False, ASKED)
        return cls(layer_from_spec(inner, outs, ins, bias), *factors)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the base (O,)."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.second(self.first(x))

    def own_bytes(self) -> int:
        """Bytes of the two thin maps: what one more adapter on a base that is there already takes."""
        return self.first.bytes() + self.second.bytes()

    def macs(self) -> int:
        return self.base.macs() + self.first.macs() + self.second.macs()

    def to_dense(self) -> Tensor:
        """W, summed in float64 and rounded once."""
        thin = self.second.to_dense().double() @ self.first.to_dense().double()
        return (self.base.to_dense().double() + thin).float()

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W, (…,) -> (…, I) float32, from as many rows of the base and of the second factor."""
        return self.base.rows(ids) + self.second.rows(ids) @ self.first.to_dense()

    def merged(self) -> Dense:
        """One dense float32 map with the same W and the bias of the base."""
        return Dense(self.to_dense(), None if self.bias is None else self.bias.detach().clone())

    def halved(self, name: str) -> LinearBase:
        parts = {key: getattr(self, key).halved(f"{name}.{key}") for key in ("base", "first", "second")}
        return Adapter(**parts)

    def spec(self) -> dict:
        parts = {key: getattr(self, key).spec() for key in ("base", "first", "second")}
        return {"kind": "adapter", "rank": self.rank, **parts}
