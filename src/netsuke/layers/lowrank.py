"""A linear map stored as two thin ones: y = second(first(x)), W = second.W · first.W of rank r.

    first   (r, I), no bias         second  (O, r), with the bias of the map if it has one

Each factor is a dense or quantized map of its own, so r(I + O) weights in any precision stand for O·I. It is smaller than
W where r < O·I/(O + I), and it takes that many fewer multiply-accumulates as well. Where the factors come from (SVD of W, or
of W weighted by its inputs) is the business of methods.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense, LinearBase
from netsuke.layers.quantized import QuantLinear
from netsuke.layers.registry import layer_from_spec

FACTORS = ("dense", "quant")


def check_rank(rank: Any, outs: int, ins: int, asked: str) -> int:
    """The rank itself. Raises NetsukeError unless it is a whole number from 1 to min(O, I) − 1: at full rank the factors
    are larger than the matrix that they stand for."""
    if type(rank) is not int or not 1 <= rank < min(outs, ins):
        allowed = f"whole numbers from 1 to {min(outs, ins) - 1}" if min(outs, ins) > 1 else "no rank: keep it dense"
        raise NetsukeError(asked, f"rank {str(rank)[:40]} for a map of {outs} by {ins}", allowed)
    return rank


def check_factors(first: LinearBase, second: LinearBase, asked: str) -> None:
    """Raises NetsukeError for factors that are no dense or quantized maps, do not fit each other, have a rank that is none,
    or a bias between them."""
    for label, factor in (("first", first), ("second", second)):
        if not isinstance(factor, Dense | QuantLinear):
            raise NetsukeError(asked, f"the {label} factor is a {type(factor).__name__}", ", ".join(FACTORS))
    if second.ins != first.outs:
        found = f"a first factor with {first.outs} outputs and a second with {second.ins} inputs"
        raise NetsukeError(asked, found, "factors of one rank")
    if first.bias is not None:
        raise NetsukeError(asked, "the first factor has a bias", "a bias in the second factor alone")
    check_rank(first.outs, second.outs, first.ins, asked)


def factors_from_spec(spec: dict, outs: int, ins: int, bias: bool, asked: str) -> tuple[LinearBase, LinearBase]:
    """The empty factors that the entries "rank", "first" and "second" of a spec describe. Raises NetsukeError for a rank
    or a factor that cannot be."""
    rank = check_rank(spec.get("rank"), outs, ins, asked)
    for label in ("first", "second"):
        inner = spec.get(label)
        kind = inner.get("kind") if isinstance(inner, dict) else None
        if kind not in FACTORS:  # not nested any deeper: a hostile file could nest without end
            raise NetsukeError(asked, f"the {label} factor is of kind {str(kind)[:40]!r}", ", ".join(FACTORS))
    return layer_from_spec(spec["first"], rank, ins, False), layer_from_spec(spec["second"], outs, rank, bias)


def check_keys(spec: dict, known: set[str], asked: str) -> None:
    """Raises NetsukeError for the first entry of a spec that its kind does not know."""
    for key in sorted(spec.keys() - known):
        raise NetsukeError(asked, f"an unknown setting {key[:40]!r}", ", ".join(sorted(known)))


class LowRank(LinearBase):
    """Two factors in place of W. Tensors: those of the factors, as first.… and second.…."""

    ASKED = "build a lowrank layer"
    first: LinearBase
    second: LinearBase

    def __init__(self, first: LinearBase, second: LinearBase):
        """Raises NetsukeError as `check_factors`."""
        super().__init__()
        check_factors(first, second, self.ASKED)
        self.outs, self.ins, self.rank = second.outs, first.ins, first.outs
        self.first, self.second = first, second

    @classmethod
    def from_spec(cls, spec: dict, outs: int, ins: int, bias: bool) -> LowRank:
        """The empty layer that `spec()` describes. Raises NetsukeError for a rank or a factor that cannot be."""
        check_keys(spec, {"kind", "rank", "first", "second"}, cls.ASKED)
        return cls(*factors_from_spec(spec, outs, ins, bias, cls.ASKED))

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the second factor (O,), which is that of the map."""
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def macs(self) -> int:
        return self.first.macs() + self.second.macs()

    def to_dense(self) -> Tensor:
        return self.second.to_dense() @ self.first.to_dense()

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W, (…,) -> (…, I) float32, from as many rows of the second factor."""
        return self.second.rows(ids) @ self.first.to_dense()

    def halved(self, name: str) -> LinearBase:
        return LowRank(self.first.halved(f"{name}.first"), self.second.halved(f"{name}.second"))

    def spec(self) -> dict:
        return {"kind": "lowrank", "rank": self.rank, "first": self.first.spec(), "second": self.second.spec()}
