"""Weights as 2- to 8-bit integers with one scale per group: 4 to 13 times smaller than float32, no training.

The solvers are those of rounding.py. "gptq" (Frantar et al., 2023) rounds columns in turn; "descent" aims at the outputs of
the model as it was (GPTAQ: Li et al., 2025) and goes on from there by coordinate descent (QuantEase: Behdin et al., 2023);
the trivial floor, rounding to nearest with the same search of scales, is "rtn". Blocks are treated in order, and the inputs of
each linear map are those of the already quantized model before it: q, k and v, then o, then gate and up, then down. An
embedding table is rounded to nearest, since rows that are looked up have no H; one that is the head as well and gets less than
8 bits is treated as the head, with more damping.

Use it when weights must shrink up to about 4 times with hardly any loss (4 bits); below 3 bits on small models expect
real damage. It speeds nothing up by itself: the engine must read packed weights for that.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from netsuke.compress.method import Method
from netsuke.compress.rounding import aimed, descend, gptq, round_to_nearest
from netsuke.compress.walk import stages
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense, LinearBase, halved
from netsuke.layers.lowrank import LowRank
from netsuke.layers.packing import WIDTHS
from netsuke.layers.quantized import QuantLinear
from netsuke.measure.activations import Gram
from netsuke.models.llama import Llama
from netsuke.tasks.base import Task

TABLE_RIDGE = 0.1  # of the mean diagonal: rows of a tied table also enter the stream, where all directions count alike
SOLVERS = ("descent", "gptq", "rtn")


def quantize_linear(
    layer: LinearBase,
    bits: int,
    group: int,
    solver: str = "descent",
    gram: Gram | None = None,
    name: str = "this layer",
    damp: float = 0.01,
) -> QuantLinear:
    """`layer` with its weights quantized; its bias stays as it is. `gram` holds its inputs and is needed for all
    solvers but "rtn"; where it knows how they have drifted, the weights aim at what the map gave before.

    Raises NetsukeError, with `name`, for weights that are not finite or exceed float16 scales, for a missing or
    ill-fitting `gram`, and for one that cannot be factored.
    """
    asked, W = f"quantize {name} to {bits} bits", layer.to_dense()
    if not bool(W.isfinite().all()):
        raise NetsukeError(
            asked, f"{name} holds NaN or infinite weights", "finite weights", "another copy of the model"
        )
    if float(W.max().clamp(min=0) - W.min().clamp(max=0)) > 65504 * (2**bits - 1):
        raise NetsukeError(
            asked, f"weights of {name} reach {float(W.abs().max()):.3g}", "a range within float16 scales"
        )
    if solver != "rtn":
        if gram is None or gram.total is None or len(gram.total) != layer.ins:
            raise NetsukeError(asked, f"no statistics of its {layer.ins} inputs", "calibration text", "solver=rtn")
        try:
            H, drift = gram.mean(), gram.mean_drift()
            aim = W if drift is None else aimed(W, H, drift, damp)
            codes = gptq(aim, H, bits, group, damp)
            if solver == "descent":
                codes = descend(aim, H, codes, damp)
        except ValueError as e:
            raise NetsukeError(
                asked, f"the input statistics of {name} have {e}", "finite activations",
                "more calibration text, or solver=rtn",
            ) from None  # fmt: skip
    else:
        codes = round_to_nearest(W, bits, group)
    return codes.layer(None if layer.bias is None else layer.bias.detach().clone())


def quantize_factors(
    layer: LowRank, bits: int, group: int, solver: str, gram: Gram | None, name: str, damp: float
) -> LowRank:
    """Both factors quantized. With A the first one before and B now, the second sees B C Bᵀ, and a drift of (A E[y xᵀ] − B C) Bᵀ.
    Raises NetsukeError as `quantize_linear`."""
    first = quantize_linear(layer.first, bits, group, solver, gram, f"{name}.first", damp)
    between = None
    if gram is not None:
        before, now, between = layer.first.to_dense().double(), first.to_dense().double(), Gram()
        between.total, between.rows = now @ gram.total @ now.T, gram.rows
        if gram.drift is not None:
            between.drift = before @ (gram.drift + gram.total) @ now.T - between.total
    return LowRank(first, quantize_linear(layer.second, bits, group, solver, between, f"{name}.second", damp))


def table_solver(tied: bool, name: str, bits: int, solver: str = "descent") -> tuple[str, float]:
    """Solver and damping for "embed" or "head". A head is a linear map like others; a table that is only looked up has no
    inputs to compensate for; a tied one is both, so its compensation is held back by a ridge, and 8 bits need none."""
    if name == "head":
        return solver, 0.01
    return (solver, TABLE_RIDGE) if tied and bits < 8 else ("rtn", 0.0)


def calibration_windows(task: Task, windows: int) -> list[Tensor]:
    """Ids of the first `windows` windows of the train split, in batches (B, T). Raises NetsukeError for no text."""
    out, left = [], windows
    for batch in task.batches("train"):
        out.append(batch[:left, :-1])
        left -= len(batch)
        if left <= 0:
            break
    if not sum(ids.numel() for ids in out):
        raise NetsukeError("calibrate quantize", "the train split holds no window", "at least two tokens of text")
    return out


def gram_of(inputs: Iterable[Tensor], before: Iterable[Tensor] | None = None) -> Gram:
    gram = Gram()
    for x, y in zip(inputs, itertools.repeat(None) if before is None else before):
        gram.add(x, y)
    return gram


@dataclass(frozen=True)
class Quantize(Method):
    """Attributes:

    bits         of the blocks' linear maps: 16 leaves them, 8 is lossless in practice, 4 costs a few percent, 3 and 2
                 hurt
    group        inputs that share a scale; 32 is better and 9 % larger at 4 bits, beyond 128 little is saved
    solver       "descent"; "gptq", where it starts from, in half the time; or "rtn", which needs no text
    embed_bits   of the embedding table and the head. None: 8 below 16 bits, because a tied table is read both as rows
                 and as head, so its errors enter every sum twice; 8 bits cost nothing measurable there, 4 cost 2 %
    per_layer    bits of single linear maps by name, over all of the above ("blocks.3.down": 8); 16 stores float16
    calibration  windows of the task's train split
    """

    name: ClassVar[str] = "quantize"
    paper: ClassVar[str] = (
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (ICLR 2023); "
        "QuantEase: Optimization-based Quantization for Language Models (2023); "
        "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration (ICML 2025)"
    )
    needs_data: ClassVar[bool] = True

    bits: int = 4
    group: int = 64
    solver: str = "descent"
    embed_bits: int | None = None
    per_layer: dict[str, int] = field(default_factory=dict, hash=False)
    calibration: int = 32

    def __post_init__(self) -> None:
        asked = f"build {self.name}"
        if not isinstance(self.per_layer, dict):
            raise NetsukeError(asked, f"per_layer={self.per_layer!r}", "bits by name of the linear map")
        object.__setattr__(self, "per_layer", dict(self.per_layer))
        wanted = {"bits": self.bits, **{f"per_layer[{n}]": b for n, b in self.per_layer.items()}}
        if self.embed_bits is not None:
            wanted["embed_bits"] = self.embed_bits
        for knob, value in wanted.items():
            if value not in (*WIDTHS, 16):
                raise NetsukeError(asked, f"{knob}={value!r}", "16, 8, 4, 3, 2")
        self.require_whole(group=1, calibration=1)
        if self.solver not in SOLVERS:
            raise NetsukeError(asked, f"solver={self.solver!r}", ", ".join(SOLVERS))
        # The class tells of its defaults; a value that rounds to nearest, or does nothing, asks for no text.
        object.__setattr__(self, "needs_data", self.solver != "rtn" and not self.is_identity)

    @property
    def is_identity(self) -> bool:
        return {self.bits, self.embed_bits or 16, *self.per_layer.values()} == {16}

    def plan(self, model: Llama) -> dict[str, int]:
        """Bits of every linear map by name."""
        table = self.embed_bits or (8 if self.bits < 16 else 16)
        bits = {n: table if n in ("embed", "head") else self.bits for n in model.linears()}
        return bits | self.per_layer

    def accepts(self, model: nn.Module) -> str | None:
        if not isinstance(model, Llama):
            return f"{type(model).__name__} is no Llama-style decoder"
        linears = model.linears()
        for name in self.per_layer:
            if name not in linears:
                return f"per_layer names {name!r}, which this model does not have (it has {', '.join(linears)})"
        for name, bits in self.plan(model).items():
            parts = (
                (linears[name].first, linears[name].second) if isinstance(linears[name], LowRank) else (linears[name],)
            )
            if bits < 16 and not all(isinstance(p, Dense) for p in parts):
                return (
                    f"{name} is stored as {linears[name].spec()['kind']} already: quantize the dense model it came from"
                )
        return None

    def apply(self, model: nn.Module, task: Task | None = None) -> nn.Module:
        before, model = model, self.checked(model, task)
        if self.is_identity:
            return model
        bits = self.plan(model)

        def treat(names: list[str], gram: Gram | None, solver: str = self.solver, damp: float = 0.01) -> None:
            for name in names:
                layer = model.get_submodule(name)
                if bits[name] == 16:
                    new = halved(layer, name)
                elif isinstance(layer, LowRank):
                    new = quantize_factors(layer, bits[name], self.group, solver, gram, name, damp)
                else:
                    new = quantize_linear(layer, bits[name], self.group, solver, gram, name, damp)
                model.replace(name, new)

        with torch.no_grad():
            if self.solver == "rtn":
                treat(list(bits), None)
                return model
            ids = calibration_windows(task, self.calibration)
            solver, damp = table_solver(model.head is None, "embed", bits["embed"], self.solver)
            treat(["embed"], None if solver == "rtn" else gram_of(deque(stages(model, ids), 1)[0][1]), solver, damp)
            sent: dict = {}
            steps = stages(model, ids, sent)
            pairs = zip(steps, stages(before, ids, sent)) if self.solver == "descent" else ((s, None) for s in steps)
            for (names, inputs), wanted in pairs:
                if names != ["head"] or model.head is not None:
                    quantized = any(bits[n] < 16 for n in names)
                    treat(names, gram_of(inputs, wanted and wanted[1]) if quantized else None)
        return model

    def strengths(self) -> list[Method]:
        return [replace(self, bits=b, embed_bits=None, per_layer={}) for b in (16, 8, 4, 3, 2)]
