"""A smaller Llama that starts from the weights of a larger one: blocks, heads, hidden units and residual channels are cut.

"Rethinking Optimization and Architecture for Tiny Language Models" (PanGu-π Pro, ICML 2024). Two choices:

    between layers   the loss after skipping each block says which ones matter: the first ones and the last. They stay, the
                     middle is thinned
    inside layers    scores of units (unit_scores.py: random, l1, l2, taylor, mask); the best of each block stay. A residual
                     channel is one choice for the whole model: embedding, norms and all maps that touch the stream

RMSNorm divides by the mean square of what is left of the stream: norm weights are multiplied by sqrt(e·d/d'), e being the
share of the stream's energy in the d' of d channels that stay, measured on calibration text.

What comes out is a beginning for training, far from the model it came from and far better than random weights; by itself it
is of little use. To cut without training use modegpt. Cut before quantizing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import msgspec
import torch
from torch import Tensor, nn

from netsuke.compress.method import Method
from netsuke.compress.unit_scores import KINDS, Counts, Units, score_units
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.measure.activations import SquareSum, tapped
from netsuke.models.llama import Block, BlockShape, Llama, LlamaConfig, half_precision
from netsuke.tasks.base import Task, run_calibration

FREE = ("blocks", "width", "heads", "kv_heads", "context", "bos", "eos")  # fields in which a target may differ
PROFILE = 4  # batches that the layer-skip profile is measured on


@dataclass(frozen=True)
class Choice:
    """What stays: blocks; of each of them key heads, query heads and hidden units; channels. All ascending."""

    blocks: tuple[int, ...]
    keys: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]
    channels: Tensor


@torch.no_grad()
def skip_profile(model: Llama, task: Task, together: int = 1, limit: int = PROFILE) -> list[float]:
    """Rise of the mean loss in nats when blocks i … i+together-1 add nothing to the stream, for every i; train text. Functions
    at the model's sites are gone afterwards."""
    batches = list(task.batches("train", limit))

    def loss() -> float:
        return sum(float(task.loss(model, b)) for b in batches) / len(batches)

    model.stand({})
    whole, out = loss(), []
    for i in range(len(model.blocks) - together + 1):
        skipped = [f"blocks.{k}.{end}" for k in range(i, i + together) for end in ("o", "down")]
        model.stand(dict.fromkeys(skipped, torch.zeros_like))
        out.append(loss() - whole)
    model.stand({})
    return out


def choose_blocks(profile: list[float], count: int, first: int = 2, last: int = 1) -> tuple[int, ...]:
    """`count` blocks: the first and the last ones as long as there is room, then those whose loss would be felt most."""
    depth = len(profile)
    last = min(last, count)
    kept = set(range(depth - last, depth)) | set(range(min(first, count - last)))
    rest = sorted(set(range(depth)) - kept, key=lambda i: -profile[i])
    return tuple(sorted(kept | set(rest[: count - len(kept)])))


def refusal(model: nn.Module, target: LlamaConfig | None = None) -> str | None:
    """Why this model cannot be cut (to `target`), naming the layer or the field, or None."""
    if not isinstance(model, Llama):
        return f"{type(model).__name__} is no Llama-style decoder"
    cfg = model.cfg
    if cfg.mixture is not None:
        return f"blocks.{cfg.mixture}.experts is a mixture: its hidden units see only some tokens"
    for name, layer in model.linears().items():
        if not isinstance(layer, Dense):
            return f"{name} is stored as {layer.spec()['kind']}; inherit first, treat after"
    if target is None:
        return None
    for field in LlamaConfig.__struct_fields__:
        if field not in FREE and getattr(target, field) != getattr(cfg, field):
            remedy = {"vocab": "; trim the vocabulary first", "head_dim": "; cut heads, or head widths with modegpt"}
            return f"{field} is {getattr(target, field)}, the larger model has {getattr(cfg, field)}{remedy.get(field, '')}"
    for field in ("width", "heads", "kv_heads"):
        if getattr(target, field) > getattr(cfg, field):
            return f"{field} is {getattr(target, field)}, wider than the larger model's {getattr(cfg, field)}"
    if target.heads % target.kv_heads or target.heads // target.kv_heads > cfg.heads // cfg.kv_heads:
        return f"{target.heads} heads on {target.kv_heads} key heads do not come from {cfg.heads} on {cfg.kv_heads}"
    widest = max(b.hidden for b in cfg.blocks)
    if max(b.hidden for b in target.blocks) > widest:
        return (
            f"a block has {max(b.hidden for b in target.blocks)} hidden units, the larger model's have up to {widest}"
        )
    if len(target.blocks) > len(cfg.blocks):
        return f"{len(target.blocks)} blocks, the larger model has {len(cfg.blocks)}"
    return None


def choose_units(model: Llama, scores: Units, blocks: tuple[int, ...], target: LlamaConfig) -> Choice:
    """The best units by their scores. Key heads are ranked by the sum of their query heads.

    Raises NetsukeError when a kept block is narrower inside than the target's.
    """
    cfg, group = model.cfg, model.cfg.heads // model.cfg.kv_heads
    keys, queries, hidden = [], [], []
    for i, shape in zip(blocks, target.blocks):
        if shape.hidden > cfg.blocks[i].hidden:
            found = f"{shape.hidden} hidden units, blocks.{i} of the larger model has {cfg.blocks[i].hidden}"
            raise NetsukeError("inherit", found, "a target that is nowhere larger")
        grouped = scores.heads[i].view(cfg.kv_heads, group)
        keys.append(best(grouped.sum(1), target.kv_heads))
        inside = [best(grouped[k], target.heads // target.kv_heads) + k * group for k in keys[-1].tolist()]
        queries.append(torch.cat(inside))
        hidden.append(best(scores.hidden[i], shape.hidden))
    return Choice(blocks, tuple(keys), tuple(queries), tuple(hidden), best(scores.channels, target.width))


def best(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest, ascending."""
    return scores.topk(count).indices.sort().values


def stream_energy(model: Llama, task: Task, calibration: int) -> dict[str, Tensor]:
    """Σ x² per channel at the input of every norm of the stream, (C,) by the norm's name."""
    norms = {n: m for n, m in model.named_modules() if n.endswith(("attn_norm", "mlp_norm")) or n == "norm"}
    sums = {name: SquareSum() for name in norms}
    with torch.no_grad(), tapped({module: sums[name] for name, module in norms.items()}):
        run_calibration(model, task, calibration)
    return {name: acc.total for name, acc in sums.items()}


@torch.no_grad()
def cut(model: Llama, choice: Choice, target: LlamaConfig, energy: dict[str, Tensor] | None = None) -> Llama:
    """A new model of the target's widths out of the chosen units. Value widths and rotary pairs are those of the block that a
    block comes from."""
    cfg, ch = model.cfg, choice.channels
    shapes = []
    for i, keys, shape in zip(choice.blocks, choice.keys, target.blocks):
        old = cfg.blocks[i]
        kept = None if old.pairs is None else tuple(old.pairs[k] for k in keys.tolist())
        shapes.append(BlockShape(shape.hidden, old.value_dim, kept))
    out = Llama(msgspec.structs.replace(target, blocks=tuple(shapes)))

    def norm(old: nn.Module, name: str) -> Tensor:
        if energy is None or len(ch) == len(old.weight):
            return old.weight[ch].clone()
        share = float(energy[name][ch].sum() / energy[name].sum())
        return old.weight[ch] * math.sqrt(share * len(old.weight) / len(ch))

    for new, (i, keys, queries, hidden) in enumerate(zip(choice.blocks, choice.keys, choice.queries, choice.hidden)):
        old, made = model.blocks[i], out.blocks[new]
        for name, (rows, columns) in _rows_and_columns(old, keys, queries, hidden, ch).items():
            map_ = getattr(old, name)
            bias = None if map_.bias is None else map_.bias[rows].clone()
            out.replace(f"blocks.{new}.{name}", Dense(map_.weight[rows][:, columns].clone(), bias))
        for name in ("attn_norm", "mlp_norm"):
            getattr(made, name).weight.copy_(norm(getattr(old, name), f"blocks.{i}.{name}"))
        if cfg.qk_norm:
            made.q_norm.weight.copy_(old.q_norm.weight)
            made.k_norm.weight.copy_(old.k_norm.weight)
    out.norm.weight.copy_(norm(model.norm, "norm"))
    for name in ("embed",) if cfg.tied else ("embed", "head"):
        out.replace(name, Dense(getattr(model, name).weight[:, ch].clone()))
    return out


def _rows_and_columns(
    block: Block, keys: Tensor, queries: Tensor, hidden: Tensor, ch: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Kept rows and columns of the seven maps of a block."""

    def inside(heads: Tensor, width: int) -> Tensor:
        return (heads[:, None] * width + torch.arange(width)).flatten()

    pairs, value = 2 * block.cfg.pair_count(block.layer), block.cfg.blocks[block.layer].value_dim
    return {
        "q": (inside(queries, pairs), ch), "k": (inside(keys, pairs), ch), "v": (inside(keys, value), ch),
        "o": (ch, inside(queries, value)), "gate": (hidden, ch), "up": (hidden, ch), "down": (ch, hidden),
    }  # fmt: skip


def inherit(
    model: Llama, target: LlamaConfig, task: Task | None, score: str = "taylor", *, calibration: int = 32, steps: int = 60,
    seed: int = 0, blocks: tuple[int, ...] | None = None,
) -> Llama:  # fmt: skip
    """The start of a model of `target`'s shape from the weights of `model`, which stays as it is.

    score   of unit_scores.KINDS; `steps` are a mask's
    blocks  those that stay; None: chosen by the layer-skip profile (without a task: the middle one goes first)

    Raises NetsukeError when the target is no part of the model, naming what does not fit.
    """
    reason = refusal(model, target)
    if reason:
        raise NetsukeError("inherit", reason, "a target that is nowhere larger")
    model = _private(model)
    if blocks is None:
        depth = len(model.blocks)
        distance = [abs(2 * i - depth + 1) / depth for i in range(depth)]
        blocks = choose_blocks(skip_profile(model, task) if task else distance, len(target.blocks))
    energy = stream_energy(model, task, calibration) if task else None
    if score == "mask":  # learns around the blocks that are gone
        whole = msgspec.structs.replace(model.cfg, blocks=tuple(model.cfg.blocks[i] for i in blocks))
        model = cut(model, choose_units(model, score_units(model, "l1", None), blocks, whole), whole)
        energy = {new: energy[old] for new, old in _renamed(blocks).items()} if energy else None
        blocks = tuple(range(len(blocks)))
    counts = Counts(tuple(b.hidden for b in target.blocks), (target.heads,) * len(blocks), target.width)
    scores = score_units(model, score, task, calibration=calibration, counts=counts, steps=steps, seed=seed)
    return cut(model, choose_units(model, scores, blocks, target), target, energy)


def _renamed(blocks: tuple[int, ...]) -> dict[str, str]:
    """New name of a norm -> the name that it had before blocks were left out."""
    ends = ("attn_norm", "mlp_norm")
    return {f"blocks.{new}.{end}": f"blocks.{old}.{end}" for new, old in enumerate(blocks) for end in ends} | {
        "norm": "norm"
    }


def _private(model: Llama) -> Llama:
    """A copy in float32: listeners and gates are put into it."""
    out = Llama(model.cfg)
    out.load_state_dict(model.state_dict())
    return out


@dataclass(frozen=True)
class Inherit(Method):
    """Attributes:

    keep         share of blocks, key heads, hidden units and channels that stay, each; 0.5 keeps an eighth of the parameters
    layers, kv_heads, hidden, width   numbers instead, where they are given
    score        random, l1, l2, taylor, mask
    multiple     widths become multiples of this
    calibration  windows of the task's train split
    steps        of a mask's training; the weights stay
    seed         of random scores
    """

    name: ClassVar[str] = "inherit"
    paper: ClassVar[str] = "Rethinking Optimization and Architecture for Tiny Language Models (ICML 2024)"
    needs_data: ClassVar[bool] = True
    trains: ClassVar[bool] = True  # taylor and mask: gradients of gates, while the weights stay

    keep: float = 0.7
    layers: int | None = None
    kv_heads: int | None = None
    hidden: int | None = None
    width: int | None = None
    score: str = "taylor"
    multiple: int = 8
    calibration: int = 32
    steps: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        asked = f"build {self.name}"
        if not 0 < self.keep <= 1:
            raise NetsukeError(asked, f"keep={self.keep}", "above 0, up to 1")
        if self.score not in KINDS:
            raise NetsukeError(asked, f"score={self.score!r}", ", ".join(KINDS))
        for knob in ("layers", "kv_heads", "hidden", "width", "multiple", "calibration", "steps"):
            if getattr(self, knob) is not None and getattr(self, knob) < 1:
                raise NetsukeError(asked, f"{knob}={getattr(self, knob)}", "1 or more")

    def target(self, cfg: LlamaConfig, blocks: Sequence[int] | None = None) -> LlamaConfig:
        """The widths that are asked for, of these blocks (their number counts until they are known)."""

        def part(of: int, multiple: int = 1) -> int:
            return of if self.keep == 1 else min(max(round(of * self.keep / multiple), 1) * multiple, of)

        keys, group = self.kv_heads or part(cfg.kv_heads), cfg.heads // cfg.kv_heads
        kept = [cfg.blocks[i % len(cfg.blocks)] for i in blocks or range(self.layers or part(len(cfg.blocks)))]
        shapes = tuple(BlockShape(self.hidden or part(b.hidden, self.multiple), b.value_dim, b.pairs) for b in kept)
        width = self.width or part(cfg.width, self.multiple)
        return msgspec.structs.replace(cfg, blocks=shapes, width=width, kv_heads=keys, heads=keys * group)

    def accepts(self, model: nn.Module) -> str | None:
        return refusal(model) or refusal(model, self.target(model.cfg))

    def apply(self, model: nn.Module, task: Task | None = None) -> nn.Module:
        if self.accepts(model) is None and self.target(model.cfg) == model.cfg:
            return copy.deepcopy(model)
        private = self.checked(model, task)
        target = self.target(private.cfg)
        blocks = choose_blocks(skip_profile(private, task), len(target.blocks))
        target, halves = self.target(private.cfg, blocks), private.embed.weight.dtype != torch.float32
        out = inherit(
            private,
            target,
            task,
            self.score,
            calibration=self.calibration,
            steps=self.steps,
            seed=self.seed,
            blocks=blocks,
        )
        return half_precision(out) if halves else out

    def strengths(self) -> list[Method]:
        return [Inherit(keep=k, score=self.score) for k in (1.0, 0.85, 0.7, 0.5)]
