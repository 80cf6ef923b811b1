"""Which input channels a token reads: the weight budget divided, thresholds from quantiles, thin factors, traffic counted.

The parts of R-Sparse (ICLR 2025) that `sparsify` and the search of its recipe share. For a map W (O, I), sparsity s and split
ρ the budget is (1 − s) O I weights per token, whatever ρ:

    rank r       the whole number nearest to (1 − ρ) (1 − s) O I / ((O + I) k), k the bytes of a factor's weight over those of W's
    channels n   ((1 − s) O I − r (O + I) k) / O: what the factors leave, so that rounding the rank moves no traffic
    threshold    the (1 − n/I)-quantile of the scores |x_i| c_i

O and I are those of the map itself: the released code takes the model's width for both, which grants the narrow keys and
values of grouped queries twice their rank or more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from netsuke.compress.decompose import svd
from netsuke.compress.walk import stages
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense, LinearBase
from netsuke.layers.quantized import QuantLinear
from netsuke.layers.sparse import ChannelsRead, InputSparse, column_norms
from netsuke.measure.activations import ScoreSketch
from netsuke.models.llama import LINEARS, Llama

NONE_CHOSEN = torch.finfo(torch.float32).max  # a threshold that no score exceeds
Plan = dict[str, tuple[float, float]]  # name of a map -> its sparsity s and its split ρ


def block_maps(model: Llama) -> dict[str, LinearBase]:
    """The seven maps of every block by name. Experts are left out: which of them a token reads is a choice already."""
    return {n: m for n, m in model.linears().items() if n.count(".") == 2 and n.rpartition(".")[2] in LINEARS}


def divide(outs: int, ins: int, sparsity: float, rho: float, cost: float = 1.0) -> tuple[float, int]:
    """Channels read per token (a mean, 0 to I) and rank of the factors for a map of (outs, ins).

    cost   bytes of a factor's weight over bytes of a weight of W: 1 for floats, 4 for float16 factors of 4-bit weights
    """
    budget, unit = (1 - sparsity) * outs * ins, (outs + ins) * cost
    rank = min(round((1 - rho) * budget / unit), int(budget / unit), min(outs, ins) - 1)
    return min((budget - rank * unit) / outs, float(ins)), rank


class Candidate:
    """A map about to be sparse: the norms of its channels, the sketch of its scores, its singular values once asked for.

    `plain` where ρ = 1: the score is |x_i| alone, as in the released code.
    """

    def __init__(self, name: str, layer: Dense | QuantLinear, plain: bool = False):
        self.name, self.layer = name, layer
        self.norms = column_norms(layer.to_dense())
        if not bool(self.norms.isfinite().all()):
            found = f"{name} holds NaN or infinite weights"
            raise NetsukeError("calibrate sparsify", found, "finite weights", "another copy of the model")
        self.scored = ScoreSketch(self.norms)
        self.unscored = ScoreSketch(torch.ones_like(self.norms)) if plain else None

    def add(self, x: Tensor) -> None:
        """Counts the scores of inputs (B, T, I). Raises NetsukeError, with the name, where they are not finite."""
        try:
            self.scored.add(x)
            if self.unscored:
                self.unscored.add(x)
        except ValueError:
            found = f"inputs of {self.name} are not finite"
            raise NetsukeError("calibrate sparsify", found, "finite weights and activations") from None

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        return svd(self.layer.to_dense(), min(self.layer.outs, self.layer.ins))

    @property
    def kind(self) -> torch.dtype:
        """The dtype of the factors: float16 beside weights of 16 bits and less, or float32."""
        floats = isinstance(self.layer, Dense) and self.layer.weight.dtype != torch.float16
        return torch.float32 if floats else torch.float16

    @property
    def cost(self) -> float:
        """Bytes of a factor's weight over those of a weight."""
        bits = self.layer.bits if isinstance(self.layer, QuantLinear) else 8 * self.kind.itemsize
        return 8 * self.kind.itemsize / bits

    def factors(self, rank: int) -> tuple[Dense, Dense] | tuple[()]:
        """The best factors of W of this rank, (r, I) and (O, r); none for rank 0."""
        if not rank:
            return ()
        u, s, vt = self._svd
        first, second = s[:rank, None] * vt[:rank], u[:, :rank]
        return Dense(first.to(self.kind)), Dense(second.to(self.kind))

    def setting(self, sparsity: float, rho: float) -> tuple[float, int, Tensor]:
        """Threshold, rank and channel weights for this split. Raises NetsukeError, with the name, where the calibration text
        has too few numbers to tell the quantile."""
        channels, rank = divide(self.layer.outs, self.layer.ins, sparsity, rho, self.cost)
        sketch = self.unscored if self.unscored and rho == 1 else self.scored
        share = channels / self.layer.ins
        if sketch.count * min(share, 1 - share) < 1 and 0 < share < 1:
            found = f"{sketch.count} scores of {self.name} for a quantile of {1 - share:.6g}"
            needed = f"at least {1 / min(share, 1 - share):.0f}"
            raise NetsukeError("calibrate sparsify", found, needed, "more calibration text (calibration=32)")
        threshold = NONE_CHOSEN if share <= 0 else sketch.quantile(1 - share)
        return threshold, rank, sketch.weights

    def build(self, sparsity: float, rho: float) -> InputSparse:
        """The sparse map. Raises NetsukeError as `setting`."""
        threshold, rank, norms = self.setting(sparsity, rho)
        make = InputSparse.from_quant if isinstance(self.layer, QuantLinear) else InputSparse.from_dense
        return make(self.layer, threshold, *self.factors(rank), norms=norms)


@torch.no_grad()
def make_sparse(
    model: Llama, ids: Sequence[Tensor], plan: Plan, plain: bool = False, dense: bool = False
) -> dict[str, Candidate]:
    """Replaces the maps of `plan` in `model` itself, calibrated on windows of ids (B, T), and returns what they were made from.

    Each map's quantile is taken on the inputs that it gets from the sparse maps before it, or (`dense`) on those that
    the dense model gives it.
    """
    made: dict[str, Candidate] = {}

    for names, inputs in stages(model, list(ids)):
        found = {n: Candidate(n, model.get_submodule(n), plain) for n in names if plan.get(n, (0, 1))[0] > 0}
        for x in inputs if found else ():
            for candidate in found.values():
                candidate.add(x)
        for name, candidate in found.items():
            layer = candidate.build(*plan[name])
            layer.always, layer.prompt = not dense, 1
            model.replace(name, layer)
        made.update(found)
    for name in made:
        layer = model.get_submodule(name)
        layer.always, layer.prompt = False, 0
    return made


def sparse_maps(model: Llama) -> dict[str, InputSparse]:
    return {n: m for n, m in model.linears().items() if isinstance(m, InputSparse)}


@contextmanager
def decoding(model: Llama, prompt: int = 1) -> Iterator[None]:
    """While open, all tokens of a row but the first `prompt` go through the rule as if they were decoded one by one, and the
    channels they read are counted afresh. With 1 everything is decoded that can be: a first token has nothing before it."""
    maps = sparse_maps(model).values()
    for layer in maps:
        layer.always = layer.counting = True
        layer.prompt, layer.channels_read = prompt, ChannelsRead()
    try:
        yield
    finally:
        for layer in maps:
            layer.always = layer.counting = False
            layer.prompt = 0


@dataclass(frozen=True)
class MapTraffic:
    """What maps read per decoded token. `channels` is the mean per token of `ins`; `weights` are bytes of weights, factors among
    them, and `dense` those of all weights; `bytes_read` counts norms, scales and biases too."""

    name: str
    ins: int
    channels: float
    rank: int
    weights: float
    dense: float
    bytes_read: float

    @property
    def sparsity(self) -> float:
        """Share of the weight traffic that is saved."""
        return 1 - self.weights / self.dense


def traffic(model: Llama) -> list[MapTraffic]:
    """Weights read per decoded token by every map of the blocks, from what the last `decoding` counted (NaN where nothing was
    decoded); maps without the rule read all they have."""
    rows = []
    for name, layer in block_maps(model).items():
        if isinstance(layer, InputSparse):
            mean, one = layer.channels_read.mean, layer.channel_bytes
            factors = 0 if layer.first is None else layer.first.bytes() + layer.second.bytes()
            rank = 0 if layer.first is None else layer.first.outs
            weights, dense, size = mean * one + factors, layer.ins * one, layer.bytes() - (layer.ins - mean) * one
            rows.append(MapTraffic(name, layer.ins, mean, rank, weights, dense, size))
        else:
            size = layer.bytes()
            rows.append(MapTraffic(name, layer.ins, layer.ins, 0, size, size, size))
    return rows


def total(rows: Iterable[MapTraffic]) -> MapTraffic:
    """All maps as one: bytes of weights that the blocks read per decoded token."""
    rows = list(rows)
    ins, *sums = (
        sum(getattr(r, f) for r in rows) for f in ("ins", "channels", "rank", "weights", "dense", "bytes_read")
    )
    return MapTraffic("all", ins, *sums)
