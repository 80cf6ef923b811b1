"""Narrower Transformer blocks by closed-form decompositions of matrix pairs: no training, no extra matrices.

"MoDeGPT: Modular Decomposition for Large Language Model Compression" (ICLR 2025). A block holds three modules, each a
pair of matrices around an inner width; the module's output on calibration text is approximated with a smaller width:

    mlp   Nyström     hidden activations H (rows x F), C = E[HᵀH]. Units with the largest ridge leverage stay with
                      their rows of gate and up, down makes up for the rest: W_d <- W_d [I, (C_SS + λI)⁻¹ C_SR]ᵀ
    qk    selection   rotary pairs with the largest energy product (Σ_heads E|q|²)·E|k|² stay, one list per key head
    vo    SVD         per value head the best rank r of C^½ W_v W_o on the attention input; the output slices of the
                      query heads that share a value head stand side by side, so that they share one basis

The value bias is folded into the output bias, exactly, since attention weights sum to one. The result is an ordinary
model with smaller matrices and a smaller key/value cache. `remove` counts the parameters of the blocks' linear maps;
embeddings stay. Which blocks give how much: φ_l = L·φ·softmax(−s_l/ε), s the block influence, capped: the paper's rule.

Here and not in the paper: kept hidden units get no ridge shrinkage (so that nothing changes at full width); ε is
relative to the mean influence; what coarse widths round away, the finest module makes up for.

Use it for 5 to 30 % of a model with slack, before quantization. Not for models whose head width is 8 or less with "qk":
four rotary pairs are too coarse a choice.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import msgspec
import torch
from torch import Tensor, nn

from netsuke.compress import decompose
from netsuke.compress.method import Method
from netsuke.compress.statistics import Statistics, collect
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.models.llama import Block, Llama, LlamaConfig, rope_table
from netsuke.tasks.base import Task

MODULES = ("mlp", "qk", "vo")
PARTS = {"mlp": ("gate", "up", "down"), "qk": ("q", "k"), "vo": ("v", "o")}
FIELD = {"mlp": "hidden", "qk": "pairs", "vo": "value_dim"}
COARSE_FIRST = ("qk", "vo", "mlp")  # the last of the treated modules evens out what the others rounded away

Fractions = tuple[float, float, float]  # removed shares of (mlp, qk, vo) of one block
Cut = tuple[dict[str, object], dict[str, Dense]]  # changed fields of BlockShape, new linear maps by name


@dataclass(frozen=True)
class MoDeGPT(Method):
    """Attributes:

    remove       share of the blocks' linear parameters to remove, achieved within 1 % where widths are fine enough
    modules      which of mlp, qk, vo are cut
    allocate     "influence" (layers that turn the stream little give more) or "uniform"
    epsilon      temperature of the allocation in units of the mean block influence; large is uniform. Sweep it on held-out
                 text: stories260K at 20 % likes 0.35 (perplexity x 2.7, uniform x 3.6), at 10 % nearly uniform; a half-
                 trained pycode prefers uniform at 10 to 30 % (20 %: x 1.06 against x 1.07)
    cap          largest share that one block may lose; the excess goes to the others in proportion
    multiple     hidden widths become multiples of this; head widths of it or of a quarter head, whichever is less
    ridge        λ of leverage scores and Nyström, relative to the mean of C's diagonal; 1e-8 to 1e-1 hardly differ
    floor        smallest eigenvalue of C in C^-½, relative to the largest
    calibration  windows of the task's train split
    per_block    explicit removed shares (mlp, qk, vo) for every block, instead of `remove` and `allocate`
    """

    name: ClassVar[str] = "modegpt"
    paper: ClassVar[str] = "MoDeGPT: Modular Decomposition for Large Language Model Compression (ICLR 2025)"
    needs_data: ClassVar[bool] = True

    remove: float = 0.25
    modules: tuple[str, ...] = MODULES
    allocate: str = "influence"
    epsilon: float = 0.35
    cap: float = 0.8
    multiple: int = 1
    ridge: float = 1e-2
    floor: float = 1e-6
    calibration: int = 32
    per_block: tuple[Fractions, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", tuple(self.modules))
        if self.per_block is not None:
            object.__setattr__(self, "per_block", tuple(tuple(map(float, row)) for row in self.per_block))
        asked = f"build {self.name}"
        if not set(self.modules) <= set(MODULES) or not self.modules or len(set(self.modules)) < len(self.modules):
            raise NetsukeError(asked, f"modules={','.join(self.modules)}", "some of " + ", ".join(MODULES))
        if self.allocate not in ("influence", "uniform"):
            raise NetsukeError(asked, f"allocate={self.allocate!r}", "influence, uniform")
        for knob, low, high in (("remove", 0, 0.95), ("cap", 0.01, 0.95), ("ridge", 0, 1e3), ("floor", 0, 0.1)):
            if not low <= getattr(self, knob) <= high:
                raise NetsukeError(asked, f"{knob}={getattr(self, knob)}", f"{low} to {high}")
        if not self.epsilon > 0:
            raise NetsukeError(
                asked, f"epsilon={self.epsilon}", "a positive number", "epsilon=0.35, or allocate=uniform"
            )
        for knob in ("multiple", "calibration"):
            if getattr(self, knob) < 1:
                raise NetsukeError(asked, f"{knob}={getattr(self, knob)}", "1 or more")
        for row in self.per_block or ():
            if len(row) != 3 or not all(0 <= share <= 0.95 for share in row):
                raise NetsukeError(
                    asked, f"per_block row {row}", "three shares (mlp, qk, vo) from 0 to 0.95 for each block"
                )

    def accepts(self, model: nn.Module) -> str | None:
        if not isinstance(model, Llama):
            return f"{type(model).__name__} is no Llama-style decoder"
        cfg = model.cfg
        if cfg.mixture is not None and "mlp" in self.modules:
            return (
                f"blocks.{cfg.mixture}.experts is a mixture: its hidden units see only some tokens; use modules=qk,vo"
            )
        if self.per_block is not None and len(self.per_block) != len(cfg.blocks):
            return f"per_block has {len(self.per_block)} rows, the model has {len(cfg.blocks)} blocks"
        if cfg.qk_norm and "qk" in self.modules:
            return "blocks.0.q_norm normalises whole heads, so rotary pairs cannot be left out; use modules=mlp,vo"
        if cfg.head_dim % 2:
            return f"blocks.0.q has heads {cfg.head_dim} wide: rotary pairs need an even width"
        owners: dict[int, str] = {}
        for name, layer in model.linears().items():
            leaf = name.rpartition(".")[2]
            if not any(leaf in PARTS[m] for m in self.modules):
                continue
            if not isinstance(layer, Dense):
                return f"{name} is stored as {layer.spec()['kind']}: cut the dense model first, then store it otherwise"
            other = owners.setdefault(layer.weight.data_ptr(), name)
            if other != name:
                return f"{name} shares its matrix with {other}; untie them first"
        if self.per_block is None:
            most = self.cap * sum(sum(module_sizes(cfg, i, self.modules)) for i in range(len(cfg.blocks)))
            if self.remove * block_parameters(cfg) > most:
                limit = most / block_parameters(cfg)
                return (
                    f"remove={self.remove:g} is more than {','.join(self.modules)} can give: "
                    f"{limit:.3f} of the blocks' parameters at cap={self.cap:g}"
                )
        return None

    def apply(self, model: nn.Module, task: Task | None = None) -> nn.Module:
        if self.remove == 0 and self.per_block is None:
            if reason := self.accepts(model):
                raise NetsukeError(f"apply {self.name}", reason)
            return copy.deepcopy(model)
        work = self.checked(model, task)
        with torch.no_grad():
            stats = calibrate(work, task, self.calibration)
            rows = self.per_block or plan_cuts(work.cfg, [s.influence for s in stats], self)
            return _install(work, _all_cuts(work, stats, rows, self))

    def strengths(self) -> list[Method]:
        return [replace(self, remove=r, per_block=None) for r in (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)]


@dataclass
class BlockStats:
    """What one pass of the original model says about one block. Grams are means over tokens, float64."""

    hidden: Tensor | None  # (F, F) of the inputs of `down`
    inputs: Tensor  # (C, C) of the normed attention input
    query: Tensor  # (O,) mean square of each output of `q`, before rotation
    key: Tensor  # (O,) the same of `k`
    influence: float  # 1 − E[cos(x_in, x_out)]
    tokens: int


def calibrate(model: Llama, task: Task, windows: int) -> list[BlockStats]:
    """`block_stats` of one pass of the uncut model. Raises NetsukeError as statistics.collect."""
    return block_stats(collect(model, task, windows), model.cfg)


def block_stats(seen: Statistics, cfg: LlamaConfig) -> list[BlockStats]:
    """Statistics of all blocks; those of hidden units are absent where experts share them.

    Warns when the text has fewer tokens than a hidden width (the Gram is then rank-deficient and the ridge decides).
    """
    stats = []
    for i, influence in enumerate(seen.influence):
        at = f"blocks.{i}."
        query, key, entry = seen.squares[at + "q"], seen.squares[at + "k"], seen.grams[at + "q"]
        hidden = None if cfg.blocks[i].experts else seen.grams[at + "down"].mean()
        stats.append(
            BlockStats(
                hidden, entry.mean(), query.total / query.rows, key.total / key.rows, influence.value(), entry.rows
            )
        )
    widest = max(b.hidden for b in cfg.blocks)
    if stats[0].tokens < widest:
        warnings.warn(
            f"modegpt: {stats[0].tokens} calibration tokens for {widest} hidden units: their Gram matrix has "
            f"at most rank {stats[0].tokens}; give at least {2 * widest} tokens",
            stacklevel=2,
        )
    return stats


def full_width(cfg: LlamaConfig, layer: int, module: str) -> int:
    """Inner width of a module: hidden units, rotary pairs per key head, value channels per head."""
    if module == "qk":
        return cfg.pair_count(layer)
    return cfg.blocks[layer].hidden if module == "mlp" else cfg.blocks[layer].value_dim


def unit_size(cfg: LlamaConfig, module: str) -> int:
    """Linear parameters (biases included) that go with one unit of a module's inner width."""
    heads = cfg.heads + cfg.kv_heads
    if module == "mlp":
        return 3 * cfg.width + 2 * cfg.mlp_bias
    if module == "qk":
        return 2 * heads * (cfg.width + cfg.qkv_bias)
    return heads * cfg.width + cfg.kv_heads * cfg.qkv_bias


def module_sizes(cfg: LlamaConfig, layer: int, modules: Iterable[str] = MODULES) -> list[int]:
    """Parameters that the inner width of each module accounts for."""
    return [full_width(cfg, layer, m) * unit_size(cfg, m) for m in modules]


def block_parameters(cfg: LlamaConfig) -> int:
    """Parameters of the blocks' linear maps: what `remove` is a share of. Embeddings, head and norms do not count."""
    shapes = (s for i in range(len(cfg.blocks)) for s in cfg.linear_shapes(i).values())
    return sum(outs * ins + outs * bias for outs, ins, bias in shapes)


def widths_for(cfg: LlamaConfig, layer: int, module: str, fraction: float, multiple: int = 1) -> int:
    """The width that stays when `fraction` of a module is removed: rounded to `multiple`, at least one step of it."""
    full = full_width(cfg, layer, module)
    step = multiple
    if module != "mlp":
        step = max(1, min(multiple, cfg.head_dim // 4))
        step = max(1, step // 2) if module == "qk" else step
    if fraction <= 0:
        return full
    return min(full, max(step, round(full * (1 - fraction) / step) * step))


def allocate_shares(
    influence: Sequence[float], sizes: Sequence[int], share: float, epsilon: float, cap: float
) -> list[float]:
    """Removed share of every block: proportional to softmax(−s/(ε·mean s)), Σ share_l size_l = share · Σ size_l, and
    none above the cap. What the cap takes away is spread over the other blocks in proportion."""
    s = torch.tensor(influence, dtype=torch.float64)
    weights = torch.softmax(-s / (epsilon * s.mean().clamp_min(1e-12)), 0)
    size = torch.tensor(sizes, dtype=torch.float64)
    free = torch.ones(len(s), dtype=torch.bool)
    out = torch.full_like(s, cap)
    for _ in range(len(s)):
        want = share * size.sum() - cap * size[~free].sum()
        out[free] = weights[free] * want / (weights[free] * size[free]).sum()
        over = free & (out > cap)
        if not over.any():
            break
        free &= ~over
        out[over] = cap
        if not free.any():
            break
    return out.tolist()


def plan_cuts(cfg: LlamaConfig, influence: Sequence[float], knobs: MoDeGPT) -> tuple[Fractions, ...]:
    """Removed shares (mlp, qk, vo) of every block, as achieved by whole widths, that reach `knobs.remove` together.

    Coarse modules are rounded to the block's share; the finest one takes what is missing, and passes its own rounding
    error on to the next block.
    """
    treated = [m for m in COARSE_FIRST if m in knobs.modules]
    sizes = [sum(module_sizes(cfg, i, treated)) for i in range(len(cfg.blocks))]
    share = knobs.remove * block_parameters(cfg) / sum(sizes)
    if knobs.allocate == "uniform":
        shares = [share] * len(sizes)
    else:
        shares = allocate_shares(influence, sizes, share, knobs.epsilon, knobs.cap)
    rows, owed = [], 0.0
    for layer, (part, size) in enumerate(zip(shares, sizes)):
        row = dict.fromkeys(MODULES, 0.0)
        owed += part * size
        for module in treated:
            full, unit = full_width(cfg, layer, module), unit_size(cfg, module)
            want = owed / (full * unit) if module == treated[-1] else part
            kept = widths_for(cfg, layer, module, min(want, knobs.cap), knobs.multiple)
            row[module] = 1 - kept / full
            owed -= (full - kept) * unit
        rows.append(tuple(row[m] for m in MODULES))
    return tuple(rows)


@torch.no_grad()
def cut_module(model: Llama, layer: int, module: str, fraction: float, stats: BlockStats, knobs: MoDeGPT) -> Cut:
    """One module of one block with `fraction` of its width removed: the changed fields of its BlockShape and its new
    linear maps, in the dtype of the old ones. A share of 0 gives the module's exact, re-expressed self."""
    width = widths_for(model.cfg, layer, module, fraction, knobs.multiple)
    changes, linears, _ = _CUTS[module](model.blocks[layer], model.cfg, width, stats, knobs)
    return changes, linears


@torch.no_grad()
def module_error(model: Llama, layer: int, module: str, fraction: float, stats: BlockStats, knobs: MoDeGPT) -> float:
    """Share of the module's output energy on the calibration text that such a cut loses, 0 to 1.

    mlp: of down's output; vo: of W_o W_v x, mean over value heads; qk: of the energy products that select the pairs.
    """
    width = widths_for(model.cfg, layer, module, fraction, knobs.multiple)
    return _CUTS[module](model.blocks[layer], model.cfg, width, stats, knobs)[2]


def apply_cuts(model: Llama, stats: Sequence[BlockStats], per_block: Sequence[Fractions], knobs: MoDeGPT) -> Llama:
    """A smaller copy of `model`; modules whose share rounds to no cut at all keep their very bits."""
    return _install(copy.deepcopy(model), _all_cuts(model, stats, per_block, knobs))


def assemble(model: Llama, cuts: dict[tuple[int, str], Cut]) -> Llama:
    """A copy of `model` with the given cuts of (layer, module), as `cut_module` returned them."""
    return _install(copy.deepcopy(model), cuts)


def cut_table(before: LlamaConfig, after: LlamaConfig) -> list[dict[str, float]]:
    """Per block: widths left, achieved share of the block's linear parameters, cache numbers per token."""
    rows = []
    for i in range(len(before.blocks)):
        size = [sum(o * n + o * b for o, n, b in cfg.linear_shapes(i).values()) for cfg in (before, after)]
        rows.append({
            "block": i, "hidden": after.blocks[i].hidden, "pairs": after.pair_count(i),
            "value_dim": after.blocks[i].value_dim, "removed": 1 - size[1] / size[0], "kv_width": after.kv_width(i),
        })  # fmt: skip
    return rows


def _all_cuts(
    model: Llama, stats: Sequence[BlockStats], per_block: Sequence[Fractions], knobs: MoDeGPT
) -> dict[tuple[int, str], Cut]:
    cuts = {}
    for layer, row in enumerate(per_block):
        for module, fraction in zip(MODULES, row):
            kept = widths_for(model.cfg, layer, module, fraction, knobs.multiple)
            if module in knobs.modules and kept < full_width(model.cfg, layer, module):
                cuts[layer, module] = cut_module(model, layer, module, fraction, stats[layer], knobs)
    return cuts


def _install(model: Llama, cuts: dict[tuple[int, str], Cut]) -> Llama:
    """Puts cuts into `model` itself: config, rotary tables, and zero output biases where other blocks got real ones."""
    cfg, blocks = model.cfg, list(model.cfg.blocks)
    for (layer, _), (changes, linears) in cuts.items():
        blocks[layer] = msgspec.structs.replace(blocks[layer], **changes)
        for name, linear in linears.items():
            setattr(model.blocks[layer], name, linear)
    out_bias = any(block.o.bias is not None for block in model.blocks)
    model.cfg = msgspec.structs.replace(cfg, blocks=tuple(blocks), out_bias=out_bias)
    for layer, block in enumerate(model.blocks):
        block.cfg = model.cfg
        if out_bias and block.o.bias is None:
            dtype = block.v.bias.dtype
            block.o.bias = nn.Parameter(
                torch.zeros(cfg.width, dtype=dtype, device=block.freq.device), requires_grad=False
            )
        if (layer, "qk") in cuts:
            block.freq = rope_table(model.cfg, layer)[0].to(block.freq.device)
    return model


def _dense(like: Dense, weight: Tensor, bias: Tensor | None) -> Dense:
    """A new map in the stored dtype of `like`: cast once, at the very end."""
    kind = like.weight.dtype
    return Dense(weight.to(kind).contiguous(), None if bias is None else bias.to(kind).contiguous())


def _rows(old: Dense, keep: Tensor) -> Dense:
    return _dense(old, old.weight[keep], None if old.bias is None else old.bias[keep])


def _cut_mlp(block: Block, cfg: LlamaConfig, width: int, stats: BlockStats, knobs: MoDeGPT):
    gram, down = stats.hidden, block.down.weight.double()
    keep = decompose.ridge_leverage(gram, knobs.ridge).topk(width).indices.sort().values
    guess = decompose.nystrom(gram, keep, knobs.ridge)  # (k, F)
    new = down @ guess.T
    missed = down.clone()
    missed[:, keep] -= new  # output error is missedᵀ applied to the hidden activations
    error = _energy(missed, gram) / max(_energy(down, gram), 1e-300)
    linears = {
        "gate": _rows(block.gate, keep),
        "up": _rows(block.up, keep),
        "down": _dense(block.down, new, block.down.bias),
    }
    return {"hidden": width}, linears, error


def _energy(weight: Tensor, gram: Tensor) -> float:
    """E|W x|² for rows x with Gram C."""
    return float(((weight @ gram) * weight).sum())


def _cut_qk(block: Block, cfg: LlamaConfig, width: int, stats: BlockStats, knobs: MoDeGPT):
    K, group, R = cfg.kv_heads, cfg.heads // cfg.kv_heads, block.q.outs // (2 * cfg.heads)
    query = stats.query.view(K, group, 2, R).sum((1, 2))  # energy of a pair over the queries that meet this key
    score = query * stats.key.view(K, 2, R).sum(1)  # (K, R)
    chosen = score.topk(width, dim=1).indices.sort(dim=1).values
    error = 1 - float(score.gather(1, chosen).sum() / score.sum().clamp_min(1e-300))
    columns = torch.cat((chosen, chosen + R), 1)  # (K, 2r): both halves of each kept pair
    starts = torch.arange(K * group, device=columns.device) * 2 * R
    rows_k = (columns + starts[:K, None]).flatten()
    rows_q = (columns.repeat_interleave(group, 0) + starts[:, None]).flatten()
    old = cfg.blocks[block.layer].pairs or [list(range(R))] * K
    pairs = tuple(tuple(old[h][j] for j in chosen[h].tolist()) for h in range(K))
    return {"pairs": pairs}, {"q": _rows(block.q, rows_q), "k": _rows(block.k, rows_k)}, error


def _cut_vo(block: Block, cfg: LlamaConfig, width: int, stats: BlockStats, knobs: MoDeGPT):
    K, group, D, C = cfg.kv_heads, cfg.heads // cfg.kv_heads, block.v.outs // cfg.kv_heads, cfg.width
    value = block.v.weight.double().view(K, D, C)
    out = block.o.weight.double().view(C, K, group, D)
    roots, errors = decompose.sym_sqrt(stats.inputs, knobs.floor), []
    new_v, new_o = value.new_zeros(K, width, C), out.new_zeros(C, K, group, width)
    for h in range(K):
        second = out[:, h].permute(2, 1, 0).reshape(D, group * C)  # slices of the sharing query heads side by side
        a, b, lost = decompose.pair_svd(roots, value[h].T, second, width)
        new_v[h, : a.shape[1]] = a.T  # fewer than `width` columns only where the product's rank is smaller
        new_o[:, h, :, : len(b)] = b.view(-1, group, C).permute(2, 1, 0)
        errors.append(lost)
    bias_v, bias_o = None, block.o.bias
    if block.v.bias is not None:  # attention weights sum to one: the value bias reaches the output as a constant
        folded = torch.einsum("ckgd,kd->c", out, block.v.bias.double().view(K, D))
        bias_o = folded if bias_o is None else bias_o.double() + folded
        bias_v = torch.zeros(K * width, device=folded.device)
    linears = {"v": _dense(block.v, new_v.flatten(0, 1), bias_v), "o": _dense(block.o, new_o.flatten(1), bias_o)}
    return {"value_dim": width}, linears, sum(errors) / K


_CUTS = {"mlp": _cut_mlp, "qk": _cut_qk, "vo": _cut_vo}
