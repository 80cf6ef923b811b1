"""Weights as 2- to 8-bit integers with one scale per group: 4 to 13 times smaller than float32, no training.

"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (Frantar et al., 2023). A linear map
y = W x, W (O, I), sees inputs with H = E[x xᵀ] (I, I). Rounding W to Ŵ costs tr((W − Ŵ) H (W − Ŵ)ᵀ). Columns are rounded
one after the other; the error of column j is paid back by the columns that are still free,

    e = (w_j − ŵ_j) / U_jj,    W[:, j+1:] −= e U[j, j+1:],    H⁻¹ = Uᵀ U, U upper triangular,

which is the exact minimiser over the free columns. The scale of a group is searched when its first column is reached, on
the weights as the earlier columns have left them. The trivial floor, rounding to nearest with the same search, is
`solver="rtn"`. Blocks are treated in order, and the inputs of each linear map are those of the already quantized model
before it: q, k and v, then o, then gate and up, then down. An embedding table is rounded to nearest, since rows that are
looked up have no H; one that is the head as well and gets less than 8 bits is treated as the head, with more damping.

Use it when weights must shrink up to about 4 times with hardly any loss (4 bits); below 3 bits on small models expect
real damage. It speeds nothing up by itself: the engine must read packed weights for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from netsuke.compress.method import Method
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense, LinearBase, halved
from netsuke.layers.lowrank import LowRank
from netsuke.layers.packing import WIDTHS
from netsuke.layers.quantized import QuantLinear, group_count
from netsuke.measure.activations import Gram
from netsuke.models.llama import Block, Llama
from netsuke.tasks.base import Task

SHRINKS = torch.linspace(1.0, 0.35, 27).tolist()  # shares of the full range; 2 bits like 0.6, 4 bits 0.9, 8 bits 1.0
TINY = 2.0**-24  # the smallest positive float16
LAZY = 128  # columns whose errors are paid within a block before the rest of the matrix is updated in one product
SEARCHED = 1 << 18  # floats per step of the search for scales
TABLE_RIDGE = 0.1  # of the mean diagonal: rows of a tied table also enter the stream, where all directions count alike
SOLVERS = ("gptq", "rtn")


@dataclass(frozen=True)
class Codes:
    """A quantized matrix, unpacked: codes (O, I) uint8, scales (O, n_groups) float16, zeros (O, n_groups) uint8."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group: int

    def layer(self, bias: Tensor | None = None) -> QuantLinear:
        return QuantLinear.from_codes(self.codes, self.scales, self.zeros, self.bits, self.group, bias)


def search_range(w: Tensor, bits: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of one group of columns for each row, w (O, g) -> both (O,), float32.

    The range [min, max] (widened to hold 0) is shrunk over a grid, the zero point rounded either way, and the pair of least
    Σ weights · (w − ŵ)² taken. Scales are float16 values already; weights (g,) are equal when absent.
    """
    w, top = w.float(), 2**bits - 1
    weights = torch.ones(w.shape[1]) if weights is None else weights.float()
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    # Shrinking both ends alike leaves the zero point where it is: only its rounding is open.
    exact = -low / (high - low).clamp(min=1e-30) * top
    zeros = torch.stack((exact.floor(), exact.ceil()))  # (2, O)
    scales = ((high - low) / top * torch.tensor(SHRINKS)[:, None]).half().float().clamp(min=TINY)  # (S, O)
    best = torch.empty(len(w), dtype=torch.long)
    step = max(1, SEARCHED // (2 * len(SHRINKS) * w.shape[1]))
    for a in range(0, len(w), step):  # (S, 2, rows, g) at once: small enough for the cache, large enough for one call
        part, zero, scale = w[a : a + step], zeros[None, :, a : a + step, None], scales[:, None, a : a + step, None]
        codes = torch.clamp((part / scale).round_(), -zero, top - zero)
        errors = codes.mul_(scale).sub_(part).square_() @ weights
        best[a : a + step] = errors.flatten(0, 1).argmin(0)
    rows = torch.arange(len(w))
    return scales[best // 2, rows], zeros[best % 2, rows]


def round_to_nearest(W: Tensor, bits: int, group: int, weights: Tensor | None = None) -> Codes:
    """W (O, I) rounded group by group after a range search; `weights` (I,), such as diag(H), weigh its errors."""
    outs, ins = W.shape
    codes = torch.empty(outs, ins, dtype=torch.uint8)
    scales, zeros = torch.empty(outs, group_count(ins, group)), torch.empty(outs, group_count(ins, group))
    for g, a in enumerate(range(0, ins, group)):
        part = W[:, a : a + group].float()
        scale, zero = search_range(part, bits, None if weights is None else weights[a : a + group])
        steps = (part / scale[:, None]).round_() + zero[:, None]
        codes[:, a : a + group] = steps.clamp_(0, 2**bits - 1).to(torch.uint8)
        scales[:, g], zeros[:, g] = scale, zero
    return Codes(codes, scales.half(), zeros.to(torch.uint8), bits, group)


def inverse_factor(H: Tensor, damp: float, tries: int = 6) -> Tensor:
    """U upper triangular with (H + damp · mean(diag H) · 1)⁻¹ = Uᵀ U, (I, I) float64.

    One Cholesky factor of the reversed matrix gives it without forming the inverse. Where the factor fails (rank lost to
    rounding), the damping is raised tenfold, `tries` times in all; then ValueError. Channels never seen (H_ii = 0) get
    the mean diagonal, which leaves them to plain rounding.
    """
    H = H.double().clone()
    diag = H.diagonal()
    live = diag > 0
    mean = float(diag[live].mean()) if live.any() else 1.0
    diag[~live] = mean
    for attempt in range(tries):
        damped = H + torch.eye(len(H), dtype=H.dtype) * (mean * damp * 10**attempt)
        factor, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0 and bool(factor.isfinite().all()):
            unit = torch.eye(len(H), dtype=H.dtype)
            return torch.linalg.solve_triangular(factor, unit, upper=False).flip(0, 1)
    raise ValueError(f"no Cholesky factor up to a damping of {damp * 10 ** (tries - 1):g} of its mean diagonal")


def gptq(W: Tensor, H: Tensor, bits: int, group: int, damp: float = 0.01) -> Codes:
    """W (O, I) rounded under H (I, I) as the file docstring tells. Raises ValueError when H cannot be factored.

    Columns go in their stored order. Descending diag(H) with scales fixed beforehand was no better on stories260K
    (perplexity ratio at 4 and 3 bits, groups of 32: 1.056 and 1.347 against 1.054 and 1.334).
    """
    (outs, ins), top = W.shape, 2**bits - 1
    U = inverse_factor(H, damp)
    # Channels that calibration hardly saw keep a say, or the search would clip them at will.
    weights = H.diagonal() + damp * H.diagonal().mean() + TINY
    left = W.T.double().contiguous()  # (I, O): a column of W is a row in memory
    codes = torch.empty(ins, outs, dtype=torch.uint8)
    scales = torch.empty(group_count(ins, group), outs, dtype=torch.float64)
    zeros = torch.empty_like(scales)
    block = max(LAZY // group, 1) * group  # whole groups, so that a group is up to date when it is entered
    for a in range(0, ins, block):
        b = min(a + block, ins)
        errors = torch.empty(b - a, outs, dtype=torch.float64)
        for j in range(a, b):
            g = j // group
            if j % group == 0:
                scales[g], zeros[g] = search_range(left[j : j + group].T, bits, weights[j : j + group])
            code = ((left[j] / scales[g]).round_() + zeros[g]).clamp_(0, top)
            codes[j] = code.to(torch.uint8)
            errors[j - a] = (left[j] - scales[g] * (code - zeros[g])) / U[j, j]
            left[j + 1 : b].addr_(U[j, j + 1 : b], errors[j - a], alpha=-1)
        left[b:].addmm_(U[a:b, b:].T, errors, alpha=-1)
    return Codes(codes.T.contiguous(), scales.T.half().contiguous(), zeros.T.to(torch.uint8).contiguous(), bits, group)


def quantize_linear(
    layer: LinearBase,
    bits: int,
    group: int,
    solver: str = "gptq",
    gram: Gram | None = None,
    name: str = "this layer",
    damp: float = 0.01,
) -> QuantLinear:
    """`layer` with its weights quantized; its bias stays as it is. `gram` holds its inputs and is needed for "gptq".

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
    if solver == "gptq":
        if gram is None or gram.total is None or len(gram.total) != layer.ins:
            raise NetsukeError(asked, f"no statistics of its {layer.ins} inputs", "calibration text", "solver=rtn")
        try:
            codes = gptq(W, gram.mean(), bits, group, damp)
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
    """Both factors quantized, the second under the statistics of what the first now gives: A C Aᵀ. Raises NetsukeError as
    `quantize_linear`."""
    first = quantize_linear(layer.first, bits, group, solver, gram, f"{name}.first", damp)
    between = None
    if gram is not None:
        A, between = first.to_dense().double(), Gram()
        between.total, between.rows = A @ gram.total @ A.T, gram.rows
    return LowRank(first, quantize_linear(layer.second, bits, group, solver, between, f"{name}.second", damp))


def table_solver(tied: bool, name: str, bits: int) -> tuple[str, float]:
    """Solver and damping for "embed" or "head". A head is a linear map like others; a table that is only looked up has no
    inputs to compensate for; a tied one is both, so its compensation is held back by a ridge, and 8 bits need none."""
    if name == "head":
        return "gptq", 0.01
    return ("gptq", TABLE_RIDGE) if tied and bits < 8 else ("rtn", 0.0)


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


def gram_of(activations: Iterable[Tensor]) -> Gram:
    gram = Gram()
    for x in activations:
        gram.add(x)
    return gram


def walk(model: Llama, ids: list[Tensor], treat: Callable[[list[str], Iterable[Tensor]], None]) -> Iterable[Tensor]:
    """Takes the residual stream of all windows through the blocks, calls `treat(names, inputs)` for each set of linear
    maps that share their input, before they are used, and returns the inputs of the head.

    Memory: the stream and one concatenation of heads, 8 bytes per token and width."""
    states = [model.embed.rows(i) for i in ids]
    for i, block in enumerate(model.blocks):
        at = f"blocks.{i}."
        treat([at + "q", at + "k", at + "v"], map(block.attn_norm, states))
        heads = [block.attention(block.attn_norm(x)) for x in states]
        treat([at + "o"], heads)
        states = [x + block.o(y) for x, y in zip(states, heads)]
        if model.cfg.blocks[i].experts:
            _walk_experts(block, at, states, treat)
            states = [x + block.feed(block.mlp_norm(x)) for x in states]
            continue
        treat([at + "gate", at + "up"], map(block.mlp_norm, states))
        # The hidden activations are the widest of all: computed twice rather than kept.
        treat([at + "down"], map(block.mlp_inner, map(block.mlp_norm, states)))
        states = [x + block.down(block.mlp_inner(block.mlp_norm(x))) for x in states]
    return map(model.norm, states)


def _walk_experts(block: Block, at: str, states: list[Tensor], treat: Callable) -> None:
    """The router sees all tokens, an expert those that are sent to it (by the router as it has become)."""
    inputs = [block.mlp_norm(x).flatten(0, -2) for x in states]
    treat([at + "experts.router"], inputs)
    sent = [{name: rows for name, rows, _ in block.experts.dealt(x)} for x in inputs]
    for e in range(block.experts.count):
        expert = block.experts.get_submodule(str(e))
        own = [x[rows[str(e)]] for x, rows in zip(inputs, sent) if str(e) in rows]
        treat([f"{at}experts.{e}.gate", f"{at}experts.{e}.up"], own)
        treat([f"{at}experts.{e}.down"], map(expert.inner, own))


@dataclass(frozen=True)
class Quantize(Method):
    """Attributes:

    bits         of the blocks' linear maps: 16 leaves them, 8 is lossless in practice, 4 costs a few percent, 3 and 2
                 hurt
    group        inputs that share a scale; 32 is better and 9 % larger at 4 bits, beyond 128 little is saved
    solver       "gptq", or "rtn" which needs no text
    embed_bits   of the embedding table and the head. None: 8 below 16 bits, because a tied table is read both as rows
                 and as head, so its errors enter every sum twice; 8 bits cost nothing measurable there, 4 cost 2 %
    per_layer    bits of single linear maps by name, over all of the above ("blocks.3.down": 8); 16 stores float16
    calibration  windows of the task's train split
    """

    name: ClassVar[str] = "quantize"
    paper: ClassVar[str] = (
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (ICLR 2023)"
    )
    needs_data: ClassVar[bool] = True

    bits: int = 4
    group: int = 64
    solver: str = "gptq"
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
        object.__setattr__(self, "needs_data", self.solver == "gptq" and not self.is_identity)

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
        model = self.checked(model, task)
        if self.is_identity:
            return model
        bits = self.plan(model)

        def treat(
            names: list[str], inputs: Iterable[Tensor] = (), solver: str = self.solver, damp: float = 0.01
        ) -> None:
            below = any(bits[n] < 16 for n in names)
            gram = gram_of(inputs) if below and solver == "gptq" else None
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
                treat(list(bits))
                return model
            ids = calibration_windows(task, self.calibration)
            solver, damp = table_solver(model.head is None, "embed", bits["embed"])
            seen = walk(model, ids, lambda names, inputs: None) if solver == "gptq" else ()
            treat(["embed"], seen, solver, damp)
            inputs = walk(model, ids, treat)
            if model.head is not None:
                treat(["head"], inputs)
        return model

    def strengths(self) -> list[Method]:
        return [replace(self, bits=b, embed_bits=None, per_layer={}) for b in (16, 8, 4, 3, 2)]
