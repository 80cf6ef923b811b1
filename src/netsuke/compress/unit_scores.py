"""How much every hidden unit, attention head and residual channel of a Llama matters: the scores that a smaller one is cut by.

    random   the floor
    l1, l2   norm of all weights that belong to the unit
    taylor   E|∂L/∂g| of a gate g = 1 on the unit, which is |Σ w ∂L/∂w| over the unit's weights (Molchanov et al., 2019)
    mask     gates learned on the frozen model, as "Rethinking Optimization and Architecture for Tiny Language Models" (2024) does
             without saying how. Here: the forward pass keeps the n best gates of each group and nothing else, n falls from
             all to the wanted number over the first part of the run, gradients pass straight through; it starts from Taylor's
             order. The count is exact at every step, so no budget term has to be balanced

A residual channel has ONE gate for the whole model: at the embedding and on all that any block adds to the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netsuke.errors import NetsukeError
from netsuke.models.llama import Block, Llama, Site
from netsuke.tasks.base import Task
from netsuke.train.loop import LoopKnobs, train

KINDS = ("random", "l1", "l2", "taylor", "mask")
SETTLED = 0.6  # of a mask's run: from here on exactly the wanted number of units is left
BATCHES = 16  # that a mask goes round in


@dataclass(frozen=True)
class Units:
    """Numbers per unit: `hidden` and `heads` (query heads) by block, `channels` for the whole model."""

    hidden: tuple[Tensor, ...]
    heads: tuple[Tensor, ...]
    channels: Tensor

    def flat(self) -> list[Tensor]:
        return [*self.hidden, *self.heads, self.channels]

    @classmethod
    def of(cls, flat: Sequence[Tensor]) -> Units:
        blocks = (len(flat) - 1) // 2
        return cls(tuple(flat[:blocks]), tuple(flat[blocks:-1]), flat[-1])


@dataclass(frozen=True)
class Counts:
    """How many units stay: hidden units and query heads of every block, channels of the model."""

    hidden: tuple[int, ...]
    heads: tuple[int, ...]
    channels: int

    def flat(self) -> list[int]:
        return [*self.hidden, *self.heads, self.channels]


def ones(model: Llama) -> Units:
    cfg = model.cfg
    return Units(
        tuple(torch.ones(b.hidden) for b in cfg.blocks), tuple(torch.ones(cfg.heads) for _ in cfg.blocks),
        torch.ones(cfg.width),
    )  # fmt: skip


def gate_sites(gates: Units) -> dict[str, Site]:
    """What multiplies every unit by its gate, for `Llama.stand`. A gate of 0 takes the unit out of the model."""

    def times(gate: Tensor) -> Site:
        return lambda x: x * gate

    def times_heads(gate: Tensor) -> Site:
        return lambda x: (x.unflatten(-1, (len(gate), -1)) * gate[:, None]).flatten(-2)

    sites = {"blocks.0.attn_stream": times(gates.channels)}
    for i, (hidden, heads) in enumerate(zip(gates.hidden, gates.heads)):
        sites |= {f"blocks.{i}.{end}": times(gates.channels) for end in ("o", "down")}
        sites |= {f"blocks.{i}.hidden": times(hidden), f"blocks.{i}.heads": times_heads(heads)}
    return sites


def score_units(
    model: Llama, kind: str, task: Task | None, *, calibration: int = 32, counts: Counts | None = None, steps: int = 60,
    seed: int = 0,
) -> Units:  # fmt: skip
    """Scores of all units, larger ones are kept. `counts` and `steps` are for "mask". Functions at the model's sites are gone
    afterwards: give it a copy.

    Raises NetsukeError for an unknown kind, and without a task where one is needed.
    """
    if kind not in KINDS:
        raise NetsukeError("score units", f"score {kind!r}", ", ".join(KINDS))
    if kind == "random":
        rng = torch.Generator().manual_seed(seed)
        return Units.of([torch.rand(len(t), generator=rng) for t in ones(model).flat()])
    if kind in ("l1", "l2"):
        return weight_norms(model, 1 if kind == "l1" else 2)
    if task is None:
        raise NetsukeError(f"score units by {kind}", "no text was given", "a task", "--data FILE, or score=l2")
    found = taylor(model, task, calibration)
    return found if kind == "taylor" else learned(model, task, found, counts, steps)


@torch.no_grad()
def weight_norms(model: Llama, power: int) -> Units:
    """(Σ |w|^p)^(1/p) over the weights of each unit; a key head's own weights are divided among its query heads."""

    def mass(block: Block, name: str) -> Tensor:
        return getattr(block, name).to_dense().double().abs() ** power

    cfg, hidden, heads = model.cfg, [], []
    channels = sum((t.to_dense().double().abs() ** power).sum(0) for t in (model.embed, model.head) if t is not None)
    group = cfg.heads // cfg.kv_heads
    for block in model.blocks:
        m = {name: mass(block, name) for name in ("q", "k", "v", "o", "gate", "up", "down")}
        hidden.append(m["gate"].sum(1) + m["up"].sum(1) + m["down"].sum(0))
        shared = sum(m[n].view(cfg.kv_heads, -1).sum(1) for n in "kv").repeat_interleave(group) / group
        heads.append(m["q"].view(cfg.heads, -1).sum(1) + m["o"].sum(0).view(cfg.heads, -1).sum(1) + shared)
        channels = channels + sum(m[n].sum(0) for n in ("q", "k", "v", "gate", "up")) + m["o"].sum(1) + m["down"].sum(1)
    return Units.of([t ** (1 / power) for t in (*hidden, *heads, channels)])


def taylor(model: Llama, task: Task, calibration: int) -> Units:
    """Mean over batches of |∂L/∂g| at g = 1, on `calibration` windows of the train split."""
    flat = [t.requires_grad_(True) for t in ones(model).flat()]
    model.stand(gate_sites(Units.of(flat)))
    total, left = [torch.zeros(len(t), dtype=torch.float64) for t in flat], calibration
    with torch.enable_grad():
        for batch in task.batches("train"):
            loss = task.loss(model, batch[:left])
            for sum_, grad in zip(total, torch.autograd.grad(loss, flat)):
                sum_ += grad.double().abs()
            left -= len(batch)
            if left <= 0:
                break
    model.stand({})
    return Units.of(total)


class Masks(nn.Module):
    """Logits of all units; `forward` runs the frozen model with only the best ones."""

    def __init__(self, model: Llama, start: Units, counts: Counts, steps: int):
        super().__init__()
        ranked = [t.argsort().argsort().float() / len(t) * 2 - 1 for t in start.flat()]  # from -1 to 1
        self.logits = nn.ParameterList(nn.Parameter(r) for r in ranked)
        self.frozen = [model]  # in a list: its weights are none of this module's
        self.counts, self.steps, self.step = counts.flat(), steps, 0

    def masks(self) -> list[Tensor]:
        """1 for the n best units of each group, 0 for the rest; the gradient is that of the sigmoid of the logit."""
        open_ = max(0.0, 1 - self.step / max(SETTLED * self.steps, 1)) ** 3
        out = []
        for logit, count in zip(self.logits, self.counts):
            left = count + round((len(logit) - count) * open_)
            hard = torch.zeros_like(logit).index_fill(0, logit.detach().topk(left).indices, 1.0)
            soft = logit.sigmoid()
            out.append(hard + soft - soft.detach())
        return out

    def forward(self, ids: Tensor) -> Tensor:
        self.frozen[0].stand(gate_sites(Units.of(self.masks())))
        return self.frozen[0](ids)


def learned(model: Llama, task: Task, start: Units, counts: Counts | None, steps: int) -> Units:
    """Logits after `steps` steps of AdamW on the loss of the masked model, whose weights stay."""
    if counts is None:
        raise NetsukeError("learn a mask", "it is not said how many units shall stay", "counts")
    masks = Masks(model, start, counts, steps)
    with torch.enable_grad():
        rows = list(task.batches("train", BATCHES))

        def batch_at(step: int) -> Tensor:
            masks.step = step
            return rows[step % len(rows)]

        # A logit crosses the range of ranks in 40 steps: the order can change, and does not by one batch alone.
        rate, knobs = 0.05, LoopKnobs(steps=steps, warmup=0.0)
        stepped = [(torch.optim.AdamW(masks.parameters(), lr=rate, weight_decay=0.0), rate)]
        train(masks, batch_at, task.loss, knobs, stepped=stepped)
    model.stand({})
    return Units.of([p.detach() for p in masks.logits])
