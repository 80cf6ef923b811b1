"""Sparse update: train only what a memory limit allows (MCUNetV3: Lin et al., NeurIPS 2022, arXiv 2206.15472).

What a plan (`graph/update_plan.py`) costs beyond inference, per layer that trains:
    bias     1 bit per output element (the mask of the clip) + 32 bits per bias
    weights  8 bits for each saved input element of the kept channels + 8 bits per weight that must live in RAM
and 8 bits per input of the head. Gradient buffers, which live one at a time, are in the arena's plan, not in this rule.

What a layer is worth is measured once, offline, on any data set: the gain in accuracy over training the head alone, from
the biases of the last k layers, and from the weights of one layer at one ratio on top of these biases. The plan is then
the set of largest total gain under the limit: a multiple-choice knapsack for each k, solved exactly by `allocate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from netsuke.allocate import Option, allocate
from netsuke.errors import NetsukeError
from netsuke.graph.ir import QGraph
from netsuke.graph.update_plan import RATIOS, UpdatePlan, head, inputs_of, layers

PUBLISHED = {  # of mcunet-5fps, by the kilobytes that they are named for
    49: UpdatePlan(20, {24: 0.25, 27: 0.5, 30: 0.5}, "49"),
    74: UpdatePlan(21, {21: 1.0, 24: 1.0, 27: 0.5, 30: 1.0}, "74"),
    99: UpdatePlan(22, {21: 1.0, 24: 1.0, 27: 1.0, 30: 1.0, 36: 0.125, 39: 0.25}, "99"),
    124: UpdatePlan(24, {21: 0.25, 24: 1.0, 27: 1.0, 30: 1.0, 33: 0.5, 39: 0.5}, "124"),
    148: UpdatePlan(23, {21: 1.0, 24: 1.0, 27: 1.0, 30: 1.0, 36: 1.0, 39: 0.5}, "148"),
}


def head_bits(graph: QGraph) -> int:
    """The saved input of the head, which is trained by every plan."""
    return 8 * graph.tensors[graph.ops[head(graph)].inputs[0]].size


def bias_bits(graph: QGraph, layer: int) -> int:
    op = graph.ops[layers(graph)[layer]]
    y = graph.tensors[op.outputs[0]]
    return y.size + 32 * y.shape[-1]


def weight_bits(graph: QGraph, layer: int, ratio: float) -> int:
    op = graph.ops[layers(graph)[layer]]
    x, w = graph.tensors[op.inputs[0]], graph.tensors[op.inputs[1]]
    kept = int(inputs_of(graph, op) * ratio)
    return 8 * (x.size // x.shape[-1] + w.size // w.shape[-1]) * kept


def extra_bytes(graph: QGraph, plan: UpdatePlan) -> float:
    """The rule above, in bytes. Raises NetsukeError when the plan does not suit the graph."""
    plan.check(graph)
    n = len(layers(graph))
    bits = head_bits(graph) + sum(bias_bits(graph, i) for i in range(n - plan.n_bias, n))
    return (bits + sum(weight_bits(graph, i, r) for i, r in plan.weights.items())) / 8


@dataclass(frozen=True)
class Contributions:
    """Gains in accuracy (a share, not percent) over the head alone.

    bias     by the number k of last layers whose biases train
    weight   by (layer, ratio), over training the biases alone
    """

    bias: dict[int, float]
    weight: dict[tuple[int, float], float]


def contributions(
    graph: QGraph,
    accuracy: Callable[[UpdatePlan], float],
    depths: Sequence[int],
    candidates: Sequence[int],
    ratios: Sequence[float] = RATIOS,
) -> Contributions:
    """Measures gains by training: `accuracy(plan)` is asked once per plan, on data that is not the test split.

    depths      numbers of bias layers to try, beside 0, the head alone; candidates  layers whose weights are tried, each alone
    """
    if not depths:
        return Contributions({0: 0.0}, {})
    n = len(layers(graph))
    base, deepest = accuracy(UpdatePlan(0)), max(depths)
    bias = {0: 0.0} | {k: accuracy(UpdatePlan(k)) - base for k in depths}
    biases = bias[deepest] + base
    weight = {
        (i, r): accuracy(UpdatePlan(deepest, {i: r})) - biases for i in candidates if i >= n - deepest for r in ratios
    }
    return Contributions(bias, weight)


def search(graph: QGraph, gains: Contributions, limit: float) -> UpdatePlan:
    """The plan of largest total gain within `limit` bytes by the memory rule. Gains below zero are never chosen.

    Raises NetsukeError when not even the head fits.
    """
    n, best = len(layers(graph)), None
    for k, gain in sorted(gains.bias.items()):
        fixed = (head_bits(graph) + sum(bias_bits(graph, i) for i in range(n - k, n))) / 8
        if fixed > limit:
            continue
        parts = []
        for layer in sorted({i for i, _ in gains.weight if i >= n - k}):
            options = [
                Option((layer, r), -g, {"bytes": weight_bits(graph, layer, r) / 8})
                for (i, r), g in gains.weight.items()
                if i == layer
            ]
            parts.append([Option(None, 0.0, {"bytes": 0.0}), *options])
        picks = allocate(parts, {"bytes": limit - fixed}).picks if parts else ()
        total = gain - sum(p.harm for p in picks)
        if best is None or total > best[0]:
            best = total, UpdatePlan(k, dict(p.value for p in picks if p.value), f"search-{limit / 1024:.0f}")
    if best is None:
        least = min(gains.bias, default=0)
        need = extra_bytes(graph, UpdatePlan(least)) / 1024
        raise NetsukeError(
            f"plan the training of {graph.name}", f"{limit / 1024:.1f} KB are free for it",
            f"{need:.1f} KB or more", "a larger --sram or a smaller network", code=1,
        )  # fmt: skip
    return best[1]
