"""Decoding that reads only the weights of the inputs that matter for this token; a thin product stands in for the others.

"R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference" (ICLR 2025). For every linear map y = W x of a block,

    y = W (m ⊙ x) + U_r S_r V_rᵀ ((1 − m) ⊙ x) + b,    m_i = |x_i| · ‖W[:, i]‖ > t,

with t the quantile of the scores that leaves the wanted share of W unread, and U_r S_r V_rᵀ the truncated SVD of W. Needs no
training and no ReLU. The weights that a token reads fall by the share s; what is stored grows by the factors, 2.5 % of W at
s = 0.5 and ρ = 0.95. Prompts stay dense. Layer: layers/sparse.py; budgets and calibration: sparse_channels.py; the search for
a split ρ per map: sparse_recipe.py.

Where paper and released code disagree: the code drops the column norm from the score where ρ = 1 (`score="released"`). Its
rank takes the width of the model for both sides of a map; here they are the map's own.

Use it where decoding one sequence waits for memory: the engine gathers the chosen rows, from quantized weights as well (quantize
first). It gains nothing for prompts and little for batches, whose choices unite: at s = 0.5 two sequences of a 6.8 M model read
74 % of the channels together, four 92 %, eight 98 %. The fuller a model, the more it costs: at s = 0.5 the perplexity of
pycode grows by a fifth, that of stories260K doubles.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor, nn

from netsuke.compress.method import Method
from netsuke.compress.quantize import calibration_windows
from netsuke.compress.sparse_channels import Plan, block_maps, divide, make_sparse
from netsuke.compress.sparse_recipe import Found, SearchKnobs, search_recipe
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.layers.quantized import QuantLinear
from netsuke.models.llama import Llama
from netsuke.tasks.base import Task

STEADY = 8192  # tokens from which thresholds hold on other text within 2 points; the paper's 512 drift
MOST = 0.95


@dataclass(frozen=True)
class Sparsify(Method):
    """Attributes:

    sparsity     share of every map's weights that a decoded token does not read
    rho          share of what it reads that are whole channels; the rest are factors. 1: no factors, best almost everywhere
                 but in the attention of first blocks; 0: factors alone, a disaster
    per_layer    (sparsity, rho) of single maps by name, over both; sparsity 0 leaves a map as it is
    score        "norms" (|x_i| ‖W[:, i]‖ everywhere) or "released" (|x_i| alone where rho = 1)
    inputs       thresholds are taken on what a map gets from the "sparse" maps before it, or from the "dense" model as in the
                 paper: then the realised sparsity of single maps is off by up to 6 points on stories260K
    search       "off", or "evolve": find rho for every map by an evolutionary search that starts from rho = 1 and 0.95
    fitness      what the search makes small on trial windows: "divergence" from the dense model, or "perplexity" as published
    population   recipes per generation of the search
    generations  of the search
    trial        windows of the train split on which a recipe of the search is scored
    seed         of the search
    narrowest    maps with fewer inputs are left as they are: too few channels to choose from
    calibration  windows of the train split for thresholds; take 8,192 tokens or more
    """

    name: ClassVar[str] = "sparsify"
    paper: ClassVar[str] = "R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference (ICLR 2025)"
    needs_data: ClassVar[bool] = True
    saves: ClassVar[str] = "traffic"

    sparsity: float = 0.5
    rho: float = 1.0
    per_layer: Plan = field(default_factory=dict, hash=False)
    score: str = "norms"
    inputs: str = "sparse"
    search: str = "off"
    fitness: str = "divergence"
    population: int = 16
    generations: int = 8
    trial: int = 8
    seed: int = 0
    narrowest: int = 64
    calibration: int = 32

    def __post_init__(self) -> None:
        asked = f"build {self.name}"
        if not isinstance(self.per_layer, dict):
            raise NetsukeError(asked, f"per_layer={self.per_layer!r}", "[sparsity, rho] by name of the map")
        for name, pair in self.per_layer.items():
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise NetsukeError(asked, f"per_layer[{name}]={pair!r}", "[sparsity, rho]")
        object.__setattr__(self, "per_layer", {n: tuple(pair) for n, pair in self.per_layer.items()})
        pairs = {"": (self.sparsity, self.rho)} | {f"per_layer[{n}]: ": p for n, p in self.per_layer.items()}
        for at, pair in pairs.items():
            for knob, value, top in zip(("sparsity", "rho"), pair, (MOST, 1)):
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= top:
                    raise NetsukeError(asked, f"{at}{knob}={value!r}", f"0 to {top}")
        words = {
            "score": ("norms", "released"), "inputs": ("sparse", "dense"), "search": ("off", "evolve"),
            "fitness": ("divergence", "perplexity"),
        }  # fmt: skip
        for knob, allowed in words.items():
            if getattr(self, knob) not in allowed:
                raise NetsukeError(asked, f"{knob}={getattr(self, knob)!r}", ", ".join(allowed))
        self.require_whole(population=4, generations=1, trial=1, narrowest=2, calibration=1)
        # The class tells of its defaults; a value that does nothing asks for no text.
        object.__setattr__(self, "needs_data", not self.is_identity)

    @property
    def is_identity(self) -> bool:
        return {self.sparsity, *(s for s, _ in self.per_layer.values())} == {0}

    def plan(self, model: Llama) -> Plan:
        """(sparsity, rho) by name of every map that is treated."""
        wide = {n: (self.sparsity, self.rho) for n, m in block_maps(model).items() if m.ins >= self.narrowest}
        return {n: pair for n, pair in (wide | self.per_layer).items() if pair[0] > 0}

    def skipped(self, model: Llama) -> list[str]:
        """Maps of the blocks that are left alone because they have fewer than `narrowest` inputs."""
        return [n for n, m in block_maps(model).items() if m.ins < self.narrowest and n not in self.per_layer]

    def accepts(self, model: nn.Module) -> str | None:
        if not isinstance(model, Llama):
            return f"{type(model).__name__} is no Llama-style decoder"
        maps = block_maps(model)
        for name in self.per_layer:
            if name not in maps:
                return f"per_layer names {name!r}, which the blocks of this model do not have (they have {', '.join(maps)})"
        for name, (sparsity, rho) in self.plan(model).items():
            layer = maps[name]
            if not isinstance(layer, Dense | QuantLinear):
                return f"{name} is stored as {layer.spec()['kind']}: sparsify dense or quantized maps"
            if rho == 0 and divide(layer.outs, layer.ins, sparsity, rho)[1] == 0:
                return f"{name} of {layer.outs} by {layer.ins} has rank 0 at sparsity={sparsity:g}, rho=0: take rho=1"
        return None

    def apply(
        self, model: nn.Module, task: Task | None = None, on_trial: Callable[[int, int, float], None] | None = None
    ) -> nn.Module:
        """A copy with sparse maps. `on_trial(done, total, best loss)` follows the search."""
        work = self.checked(model, task)
        if self.is_identity:
            return work
        plan, ids = self.plan(work), calibration_windows(task, self.calibration)
        if left := self.skipped(work):
            found = f"{len(left)} maps have fewer than {self.narrowest} inputs and stay dense: {', '.join(left[:8])}"
            warnings.warn(f"sparsify: {found}{', …' if len(left) > 8 else ''}", stacklevel=2)
        if (tokens := sum(i.numel() for i in ids)) < STEADY:
            warnings.warn(f"sparsify: thresholds from {tokens} tokens drift; take {STEADY} or more", stacklevel=2)
        if self.search == "evolve":
            plan = self.searched(work, task, ids, on_trial).plan
        make_sparse(work, ids, plan, **self.rules)
        return work

    @property
    def rules(self) -> dict[str, bool]:
        """Where the paper and its code are followed, as `make_sparse` takes it."""
        return {"plain": self.score == "released", "dense": self.inputs == "dense"}

    def searched(
        self, model: Llama, task: Task, ids: list[Tensor] | None = None,
        on_trial: Callable[[int, int, float], None] | None = None,
    ) -> Found:  # fmt: skip
        """What the search finds for this model: the plan that `per_layer` takes, and how it got there."""
        ids = calibration_windows(task, self.calibration) if ids is None else ids
        knobs = SearchKnobs(self.population, self.generations, self.trial, self.seed, self.fitness)
        return search_recipe(model, task, ids, self.plan(model), knobs, on_trial, **self.rules)

    def strengths(self) -> list[Method]:
        return [replace(self, sparsity=s, per_layer={}) for s in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)]
