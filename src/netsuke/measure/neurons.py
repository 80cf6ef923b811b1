"""What single neurons of feed-forward parts do: how strongly each answers, and to which kind of text.

Neuron i of a block is row i of gate and up and column i of down; at the site "hidden" of a model's blocks its activation a_i
passes. Two indicators per token ("Configurable Foundation Models", 2024, section 4):

    by activation   |a_i|
    by output       |a_i| · ‖W_down[:, i]‖, what it adds to the stream

An instance is a text with a label; its activation is the mean over its tokens. A neuron's score for a skill is the average
precision of ranking instances by it: 1 when all texts of the skill come first, the share of the skill's texts when it knows
nothing. The best of a thousand neurons scores higher than that by luck alone: `Ranking.by_chance` says how much, with
shuffled labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netsuke.layers.linear import LinearBase
from netsuke.layers.sparse import column_norms
from netsuke.measure.activations import tapped

INDICATORS = ("activation", "output")
LOW = 0.2  # of the layer's largest indicator: below it the paper calls a neuron inactive


def weights_of(indicator: str, down: LinearBase) -> Tensor | None:
    """What |a| is multiplied with, (F,) or None. Raises ValueError for an unknown indicator."""
    if indicator not in INDICATORS:
        raise ValueError(f"indicator {indicator!r}; one of {', '.join(INDICATORS)}")
    return column_norms(down.to_dense()) if indicator == "output" else None


def strength(hidden: Tensor, norms: Tensor | None) -> Tensor:
    """The indicator of hidden activations (…, F), norms (F,)."""
    size = hidden.detach().abs()
    return size if norms is None else size * norms.to(size.dtype)


class InstanceMeans:
    """Mean indicator of every neuron over the tokens of each instance: rows of (B, T, F) are instances."""

    def __init__(self, norms: Tensor | None = None):
        self.norms = norms
        self.parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self.parts.append(strength(x, self.norms).double().mean(1).float())

    def rows(self) -> Tensor:
        """(instances, F) float32."""
        return torch.cat(self.parts)


class TokenIndicators:
    """The indicator of every neuron on every `every`-th token."""

    def __init__(self, norms: Tensor | None = None, every: int = 1):
        self.norms, self.every = norms, every
        self.parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self.parts.append(strength(x.flatten(0, -2)[:: self.every], self.norms).float())

    def rows(self) -> Tensor:
        """(tokens, F) float32."""
        return torch.cat(self.parts)


class Activity:
    """Per neuron the share of tokens on which its indicator is above its layer's median; over all neurons and tokens the share
    below LOW of the layer's largest."""

    def __init__(self, norms: Tensor | None = None):
        self.norms, self.tokens, self.low = norms, 0, 0
        self.above: Tensor | None = None

    def add(self, x: Tensor) -> None:
        size = strength(x, self.norms).flatten(0, -2)
        part = (size > size.median(-1, keepdim=True).values).sum(0)
        self.above = part if self.above is None else self.above + part
        self.low += int((size < LOW * size.amax(-1, keepdim=True)).sum())
        self.tokens += len(size)

    def share(self) -> Tensor:
        """(F,) float64."""
        return self.above.double() / self.tokens

    def low_share(self) -> float:
        return self.low / (self.tokens * len(self.above))


@torch.no_grad()
def listen(
    model: nn.Module, heard: Sequence[InstanceMeans | TokenIndicators | Activity], batches: Iterable[Tensor]
) -> None:
    """Runs ids (B, T) through a model whose `blocks` have the site "hidden"; block i feeds heard[i]."""
    with tapped(sites={(block, "hidden"): h for block, h in zip(model.blocks, heard, strict=True)}):
        for ids in batches:
            model(ids)


def silence_lowest(share: float, norms: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """What stands at "hidden" to zero, for every token, the `share` of neurons with the lowest indicator. Sorting costs more
    than it saves: this is for analysis."""

    def at(x: Tensor) -> Tensor:
        count = round(share * x.shape[-1])
        if not count:
            return x
        lowest = strength(x, norms).topk(count, dim=-1, largest=False).indices
        return x.scatter(-1, lowest, 0.0)

    return at


def silence(neurons: Tensor) -> Callable[[Tensor], Tensor]:
    """What stands at "hidden" to zero the given neurons on every token."""
    return lambda x: x.index_fill(-1, neurons, 0.0)


@dataclass(frozen=True)
class Chance:
    """Average precision with shuffled labels: mean over neurons, its deviation between shuffles, and the best neuron's mean
    and 95 % point."""

    mean: float
    deviation: float
    best: float
    best_95: float


class Ranking:
    """Instances sorted by every neuron once; any labels are scored against it. scores (N instances, F neurons)."""

    def __init__(self, scores: Tensor):
        self.count = len(scores)
        ordered, self.order = scores.double().sort(0, descending=True)
        last = torch.ones_like(ordered, dtype=torch.bool)
        last[:-1] = ordered[:-1] != ordered[1:]
        # Equal scores are one threshold: the precision at each of them is that at the last one.
        places = torch.arange(self.count)[:, None].expand_as(ordered).masked_fill(~last, self.count)
        self.ends = places.flip(0).cummin(0).values.flip(0)

    def precision(self, labels: Tensor) -> Tensor:
        """Average precision of every neuron, (F,) float64, for labels (N,) of truth values: Σ (R_k − R_{k−1}) P_k, as
        scikit-learn defines it, all neurons at once. Raises ValueError without a positive label."""
        if not bool(labels.any()):
            raise ValueError("no instance has the label")
        hits = labels[self.order].double()
        found = hits.cumsum(0).gather(0, self.ends) / (self.ends + 1)
        return (found * hits).sum(0) / hits.sum(0)

    def by_chance(self, labels: Tensor, shuffles: int = 20, seed: int = 0) -> Chance:
        """The same with `labels` dealt at random."""
        rng = torch.Generator().manual_seed(seed)
        got = torch.stack([self.precision(labels[torch.randperm(self.count, generator=rng)]) for _ in range(shuffles)])
        means, best = got.mean(1), got.amax(1)
        return Chance(
            float(means.mean()), float(means.std()) if shuffles > 1 else 0.0, float(best.mean()),
            float(best.quantile(0.95)),
        )  # fmt: skip


def random_baseline(labels: Tensor) -> float:
    """What a neuron that knows nothing scores: the share of positive labels."""
    return float(labels.double().mean())


def top(scores: Tensor, share: float, allowed: Tensor | None = None) -> Tensor:
    """The `share` of neurons with the highest scores (F,), at least one, in ascending order; `allowed` (F,) of truth values
    leaves the others out (the share stays that of all)."""
    count = max(1, round(share * len(scores)))
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
        count = min(count, int(allowed.sum()))
    return scores.topk(count).indices.sort().values


def overlap(first: Tensor, second: Tensor) -> float:
    """Share of the smaller set of neurons that is in the other; for top-k sets drawn by chance the share k of each."""
    if not len(first) or not len(second):
        return 0.0
    return float(torch.isin(first, second).sum()) / min(len(first), len(second))
