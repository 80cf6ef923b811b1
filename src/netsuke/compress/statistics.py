"""What one pass over calibration text says about a model: shared by all methods that treat linear maps in closed form.

    grams       C = Σ xᵀx at the input of every linear map (quantization, whitened factors, Nyström, pruning)
    squares     Σ y² of the outputs of q and k, before rotation (choice of rotary pairs)
    influence   how much each block turns the residual stream

The model runs as it is, so later blocks see unspoiled inputs; methods that must see what the treated blocks before them
have become go by walk.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from netsuke.errors import NetsukeError
from netsuke.measure.activations import Gram, Influence, SquareSum, tapped
from netsuke.models.llama import Llama
from netsuke.tasks.base import Task, run_calibration

LEADERS = {"k": "q", "v": "q", "up": "gate"}  # maps whose input is another's


@dataclass
class Statistics:
    """`grams` by name of the linear map ("blocks.0.q", the head as "head" or, tied, "embed"): maps that share an input share
    one Gram. `squares` by name; `influence` by block."""

    grams: dict[str, Gram]
    squares: dict[str, SquareSum]
    influence: list[Influence]


def leader_of(name: str) -> str:
    """The map that stands for all that share its input: "blocks.0.v" -> "blocks.0.q"."""
    parent, dot, leaf = name.rpartition(".")
    return parent + dot + LEADERS.get(leaf, leaf)


class Each:
    """Several accumulators that see the same activations."""

    def __init__(self, *accumulators: Any):
        self.accumulators = accumulators

    def add(self, x: Tensor) -> None:
        for accumulator in self.accumulators:
            accumulator.add(x)


@torch.no_grad()
def collect(model: Llama, task: Task, windows: int, beside: Mapping[str, Any] | None = None) -> Statistics:
    """One pass of `windows` rows of the train split. `beside` holds accumulators, by name of a map, that see its inputs too.

    Raises NetsukeError when there is no text, and for activations that are not finite, naming the map.
    """
    names = [n for n in model.linears() if n not in ("embed", "head")]
    grams: dict[str, Gram] = {}
    inputs = {}
    for name in names:
        leader = leader_of(name)
        grams[name] = grams.setdefault(leader, Gram())
        inputs[model.get_submodule(leader)] = grams[leader]
    head = "embed" if model.head is None else "head"
    grams[head] = inputs[getattr(model, head)] = Gram()
    squares = {n: SquareSum() for n in names if n.rpartition(".")[2] in ("q", "k")}
    influence = [Influence() for _ in model.blocks]
    outputs = {model.get_submodule(n): acc for n, acc in squares.items()}
    for name, accumulator in (beside or {}).items():
        module = model.get_submodule(leader_of(name))
        inputs[module] = Each(inputs[module], accumulator)
    with tapped(inputs, outputs, dict(zip(model.blocks, influence))):
        run_calibration(model, task, windows)
    if not grams[head].rows:
        raise NetsukeError("calibrate", "the train split gave no batch", "at least one window of text")
    for name, gram in grams.items():
        if gram.total is not None and not bool(gram.total.isfinite().all()):
            raise NetsukeError("calibrate", f"inputs of {name} are not finite", "finite weights")
    return Statistics(grams, squares, influence)
