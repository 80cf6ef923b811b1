"""Linear maps as two thin ones: W (O, I) ≈ B A with A (r, I), B (O, r), nothing between them, the bias after B.

"Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank Approximation" (thesis, 2021);
first in "Lightweight and efficient end-to-end speech recognition using low-rank transformer" (ICASSP 2020). Parameters and
multiply-accumulates per token fall from O·I to r(O + I), so a rank pays only below the break-even rank O·I/(O + I): 384 for
768 x 768, 614 for 768 x 3,072. Maps whose rank would not pay are left as they are and listed.

    svd             W = U S Vᵀ, the leading r terms: the nearest matrix, whatever its inputs
    whitened-svd    the nearest map on the calibration text, min ‖C^½ (Wᵀ − Aᵀ Bᵀ)‖ with C = E[xᵀx] (SVD-LLM, 2024)
    random          factors drawn anew: a model built this way must be trained from scratch. The published library's
                    default, which destroys a trained model without a word; here it must be asked for

Any torch.nn.Module is treated, convolutions included (plain.py); what cannot be is listed. Non-negative factors, which the
library offers too, are left out: trained weights have both signs, and scikit-learn has no semi-non-negative factorization.

On tight models no SVD is usable by itself (stories260K, 20 % of the blocks removed: perplexity x 68 plain, x 11 whitened):
ask for `finetune` steps, or prefer modegpt, which cuts pairs of matrices and needs no training. A wide model has more slack
(6.8 M, half trained: x 1.4 whitened, x 2.7 plain), and factors trained from the start have it by design.
"""

from __future__ import annotations

import fnmatch
import math
import zlib
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from netsuke.compress import decompose
from netsuke.compress.method import Method
from netsuke.compress.plain import Plain
from netsuke.compress.statistics import collect
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.layers.lowrank import LowRank
from netsuke.measure.activations import Gram
from netsuke.tasks.base import Task
from netsuke.train.loop import LoopKnobs, train

SOLVERS = ("whitened-svd", "svd", "random")
TABLES = ("embed", "head")
# A fifth of the rates of training from scratch. No weight decay: on A and B apart it acts as a penalty on the nuclear norm of
# B A and lowers the rank further.
TUNE = LoopKnobs(steps=200, muon_lr=0.004, adam_lr=3e-4, weight_decay=0.0)
BATCHES = 64  # of the train split, kept in memory and gone through in turn


@dataclass(frozen=True)
class Row:
    """What becomes of one linear map. `rank` None: it stays dense, and `why` says so. `error` is ‖W − B A‖/‖W‖, under the
    whitened solver ‖C^½(Wᵀ − (B A)ᵀ)‖/‖C^½ Wᵀ‖: the relative error of its outputs on the calibration text."""

    name: str
    outs: int
    ins: int
    break_even: float
    rank: int | None
    error: float
    before: int
    after: int
    why: str = ""


def break_even(outs: int, ins: int) -> float:
    """The rank at which two factors are as large as the matrix, O·I/(O + I)."""
    return outs * ins / (outs + ins)


@dataclass(frozen=True)
class Factorize(Method):
    """Attributes:

    rank         a whole number: that rank everywhere. A share below 1: of each map's own break-even rank. 0.5, which stands
                 where neither rank nor energy is named, halves the maps
    energy       in place of `rank`: the least rank that keeps this share of Σ s² (of the weight, or of its outputs when
                 whitened). Trained weights have flat spectra: 0.9 takes 88 % of pycode's weights, at 0.95 nearly all maps stay
    per_layer    ranks of single maps by name, whole numbers or shares, over both of the above
    solver       whitened-svd (needs text), svd, random
    only         maps to treat, as patterns ("blocks.*.fc1"); empty: all maps of the blocks; no table, head or router
    exclude      patterns of maps that stay
    finetune     gradient steps after the cut, on the task's train split, with the one training loop
    calibration  windows of the train split for the whitened solver
    floor        smallest eigenvalue of C in C^-½, relative to the largest
    seed         of random factors
    """

    name: ClassVar[str] = "factorize"
    paper: ClassVar[str] = (
        "Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank Approximation (2021)"
    )
    needs_data: ClassVar[bool] = True
    trains: ClassVar[bool] = True  # with `finetune`; without it no gradient is recorded

    rank: int | float | None = None
    energy: float | None = None
    per_layer: dict[str, int | float] = field(default_factory=dict, hash=False)
    solver: str = "whitened-svd"
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    finetune: int = 0
    calibration: int = 32
    floor: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        asked = f"build {self.name}"
        for knob in ("only", "exclude"):
            value = getattr(self, knob)
            object.__setattr__(self, knob, (value,) if isinstance(value, str) else tuple(value))
        if not isinstance(self.per_layer, dict):
            raise NetsukeError(asked, f"per_layer={self.per_layer!r}", "ranks by name of the linear map")
        object.__setattr__(self, "per_layer", dict(self.per_layer))
        if self.rank is not None and self.energy is not None:
            raise NetsukeError(asked, f"rank={self.rank!r} and energy={self.energy!r}", "one of the two")
        if self.rank is None and self.energy is None:
            object.__setattr__(self, "rank", 0.5)
        ranks = {f"per_layer[{n}]": r for n, r in self.per_layer.items()}
        ranks |= {} if self.rank is None else {"rank": self.rank}
        for knob, value in ranks.items():
            check_wanted(asked, knob, value)
        if self.energy is not None and not (_number(self.energy) and 0 < self.energy <= 1):
            raise NetsukeError(asked, f"energy={self.energy!r}", "above 0, up to 1")
        if self.solver not in SOLVERS:
            raise NetsukeError(asked, f"solver={self.solver!r}", ", ".join(SOLVERS))
        if self.solver == "random" and self.energy is not None:
            raise NetsukeError(asked, "an energy with random factors, which keep none", "a rank")
        self.require_whole(finetune=0, calibration=1, seed=0)
        if not (_number(self.floor) and 0 <= self.floor <= 0.1):
            raise NetsukeError(asked, f"floor={self.floor!r}", "0 to 0.1")
        # The class tells of its defaults; a value that looks at weights alone asks for no text.
        data = not self.is_identity and (self.solver == "whitened-svd" or self.finetune > 0)
        object.__setattr__(self, "needs_data", data)

    @property
    def is_identity(self) -> bool:
        return self.energy == 1.0 and not self.per_layer and self.finetune == 0

    def treated(self, model: nn.Module) -> list[str]:
        """Names of the maps that this value is about, in the model's order."""
        names = [n for n in model.linears() if self.only or n in self.per_layer or not _kept_by_default(n)]
        chosen = [n for n in names if not self.only or n in self.per_layer or _matches(n, self.only)]
        return [n for n in chosen if not _matches(n, self.exclude)]

    def accepts(self, model: nn.Module) -> str | None:
        model = family_of(model)
        linears = model.linears()
        if not linears:
            return "there is no linear map in it" + "".join(f"; {n or 'it'}: {why}" for n, why in model.skipped.items())
        for knob, patterns in (("only", self.only), ("exclude", self.exclude), ("per_layer", tuple(self.per_layer))):
            for pattern in patterns:
                if not fnmatch.filter(linears, pattern):
                    return f"{knob} names {pattern!r}, which this model does not have (it has {', '.join(linears)})"
        owners: dict[int, str] = {}
        for name, layer in linears.items():
            if isinstance(layer, Dense) and layer.weight.device.type != "meta":
                other = owners.setdefault(layer.weight.data_ptr(), name)
                if other != name and {name, other} & set(self.treated(model)):
                    return f"{name} shares its matrix with {other}: factors would untie them; exclude both"
        for name in self.treated(model):
            if name == "embed" and model.head is None:
                return "embed is the output head as well: factors would hurt it twice; exclude it, or quantize it"
            layer = linears[name]
            if not isinstance(layer, Dense | LowRank):
                return f"{name} is stored as {layer.spec()['kind']}: factorize the dense model first, then store it otherwise"
            if isinstance(layer, Dense) and not bool(layer.weight.detach().isfinite().all()):
                return f"{name} holds NaN or infinite weights"
        return None

    def plan(self, model: nn.Module, task: Task | None = None) -> list[Row]:
        """The table: every treated map with its break-even rank, its rank, the error of its factors, parameters before and
        after. Raises NetsukeError as `apply`."""
        return self.factors(self.checked(model, task), task)[0]

    def apply(self, model: nn.Module, task: Task | None = None) -> nn.Module:
        work = self.checked(model, task)
        if self.is_identity:
            return work
        family = family_of(work)
        for name, layer in self.factors(work, task)[1].items():
            family.replace(name, layer)
        return fine_tune(work, task, self.finetune) if self.finetune else work.requires_grad_(False)

    @torch.no_grad()
    def factors(self, model: nn.Module, task: Task | None) -> tuple[list[Row], dict[str, LowRank]]:
        """The table and the new maps by name, for a model that `accepts` has passed."""
        model = family_of(model)
        linears, rows, new = model.linears(), [], {}
        grams: dict[str, Gram] = {}
        if self.solver == "whitened-svd" and self.needs_data:
            plain = isinstance(model, Plain)
            grams = model.grams(task, self.calibration) if plain else collect(model, task, self.calibration).grams
        if isinstance(model, Plain):
            rows += [Row(name, 0, 0, 0.0, None, 0.0, 0, 0, why) for name, why in model.skipped.items()]
        roots: dict[int, tuple[Tensor, Tensor]] = {}  # maps that share their inputs share the two roots
        for name in self.treated(model):
            old = linears[name]
            count = sum(p.numel() for p in old.parameters())
            limit = break_even(old.outs, old.ins)
            stays = Row(name, old.outs, old.ins, limit, None, 0.0, count, count)
            if isinstance(old, LowRank):
                rows.append(replace(stays, why=f"has factors of rank {old.rank} already"))
                continue
            pair = None
            if name in grams and grams[name].rows:  # an expert that no token was sent to is taken by its weights
                gram = grams[name]
                if id(gram) not in roots:
                    roots[id(gram)] = decompose.sym_sqrt(gram.mean(), self.floor)
                pair = roots[id(gram)]
            wanted = self.per_layer.get(name, self.rank)
            rank = None if wanted is None else rank_for(wanted, old.outs, old.ins)
            if rank is not None and rank >= limit:
                rows.append(replace(stays, why=f"rank {rank} would not pay"))
                continue
            first, second, error = self._solve(old, name, rank, pair)
            if len(first) >= limit:
                rows.append(replace(stays, why=f"{self.energy:g} of the energy takes rank {len(first)}"))
                continue
            kind = old.weight.dtype
            bias = None if old.bias is None else old.bias.detach().clone()
            new[name] = LowRank(Dense(first.to(kind)), Dense(second.to(kind), bias))
            after = sum(p.numel() for p in new[name].parameters())
            rows.append(replace(stays, rank=len(first), error=error, after=after))
        return rows, new

    def _solve(
        self, old: Dense, name: str, rank: int | None, roots: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, float]:
        """Balanced factors A (r, I), B (O, r) and their relative error; `rank` None: by energy."""
        W = old.weight.detach()
        if self.solver == "random":
            first, second = random_factors(old.outs, old.ins, rank, W.std().item(), f"{self.seed}/{name}")
            return first, second, float((W - second @ first).norm() / W.norm().clamp_min(1e-30))
        target = W.double() if roots is None else W.double() @ roots[0]  # (O, I)
        full = min(W.shape)
        u, s, vt = decompose.svd(target, full if rank is None else rank, self.seed)
        if rank is None:
            kept = s.square().cumsum(0) / target.square().sum().clamp_min(1e-300)
            rank = min(int((kept < self.energy - 1e-12).sum()) + 1, full)
            u, s, vt = u[:, :rank], s[:rank], vt[:rank]
        left = target.square().sum() - s.square().sum()
        error = math.sqrt(max(float(left / target.square().sum().clamp_min(1e-300)), 0.0))
        first, second = decompose.balanced(s[:, None] * vt if roots is None else s[:, None] * (vt @ roots[1]), u)
        return first, second, error

    def strengths(self) -> list[Method]:
        plain = replace(self, per_layer={}, finetune=0)
        steps = [replace(plain, rank=r, energy=None) for r in (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2)]
        return [replace(plain, rank=None, energy=1.0, solver=self.spectral), *steps]

    @property
    def spectral(self) -> str:
        """The solver, or the plain SVD where it is the random one, which knows no energy."""
        return "svd" if self.solver == "random" else self.solver


def family_of(model: nn.Module) -> nn.Module | Plain:
    """A netsuke family as it is, any other module as its named linear maps."""
    return model if hasattr(model, "linears") and hasattr(model, "replace") else Plain(model)


def check_wanted(asked: str, knob: str, value: object) -> None:
    """Raises NetsukeError unless a rank is a whole number from 1 or a share below 1. 1.0 is neither: as a share it changes
    nothing, as a rank it leaves one direction, and the two are easily mixed up."""
    whole = type(value) is int and value >= 1
    share = isinstance(value, float) and 0 < value < 1
    if not whole and not share:
        allowed = "a whole number from 1 (a rank), or a share of the break-even rank above 0 and below 1"
        raise NetsukeError(asked, f"{knob}={value!r}", allowed, f"{knob}=0.5")


def rank_for(wanted: int | float, outs: int, ins: int) -> int:
    """The rank that a wanted rank or share of the break-even rank comes to, at least 1."""
    if isinstance(wanted, int):
        return wanted
    return max(1, int(wanted * break_even(outs, ins)))


def random_factors(outs: int, ins: int, rank: int, std: float, seed: str) -> tuple[Tensor, Tensor]:
    """A (r, I) and B (O, r) whose product has independent-looking entries of deviation `std`, balanced: each entry of B A is
    a sum of r products, so both factors get deviation √(std/√r)."""
    rng = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    each = math.sqrt(max(std, 1e-12) / math.sqrt(rank))
    first = torch.randn(rank, ins, generator=rng) * each
    return first, torch.randn(outs, rank, generator=rng) * each


def fine_tune(model: nn.Module, task: Task, steps: int, knobs: LoopKnobs = TUNE) -> nn.Module:
    """`steps` gradient steps on the task's train split, in place; gradients are off again afterwards."""
    batches = list(task.batches("train", BATCHES))
    kinds = {n: p.dtype for n, p in model.named_parameters()}
    model.float().requires_grad_(True)  # half-precision weights would swallow the small steps
    with torch.enable_grad():
        train(model, lambda step: batches[step % len(batches)], task.loss, replace(knobs, steps=steps))
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(kinds[name])
        parameter.grad = None
    return model


def low_rank_design(model: nn.Module, rank: int | float, seed: int = 0) -> nn.Module:
    """A low-rank Transformer by design: a copy of a freshly initialised model whose blocks' maps have random factors, to be
    trained from scratch."""
    return Factorize(rank=rank, solver="random", seed=seed).apply(model)


def _kept_by_default(name: str) -> bool:
    """Tables, and routers of mixtures: a few rows, on which the choice of experts hangs."""
    return name in TABLES or name.endswith(".router")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for p in patterns)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
