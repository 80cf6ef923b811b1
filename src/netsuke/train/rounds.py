"""A second round over the batches that a small model finds hard.

"Rethinking Optimization and Architecture for Tiny Language Models" (PanGu-π Pro, ICML 2024): tiny models forget what they saw
early in a pass. After the first round the loss l_i of every batch is taken from the frozen model; batches are drawn without
replacement with p_i = exp(l_i/T) / Σ exp(l_j/T) inside each part of the corpus, and trained on once more.

The mean losses of large batches hardly differ: at T = 1 the draw is then as good as uniform. `effective_share` says how much so
(1: uniform), and two switches make it sharper: a lower temperature, and scoring single sequences instead of batches.

    method of the draw: the k largest of l_i/T + Gumbel noise, which is the sequential draw without replacement, exactly,
    however peaked p is; never fewer than k come out
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from netsuke.errors import NetsukeError
from netsuke.tasks.language import token_losses
from netsuke.train.loop import History, LoopKnobs, train

SCORED = 16  # rows of a forward pass without gradients


@dataclass(frozen=True)
class Rounds:
    """Attributes:

    keep         share of the first round's batches that the second one sees
    temperature  of the softmax over losses in nats; 1 as published
    by           "batch" (as published: means over batches) or "sequence": rows are drawn singly and batched anew
    parts        the draw is done inside each of so many parts of the corpus
    seed         of the draw and of the second round's order
    """

    keep: float = 0.5
    temperature: float = 1.0
    by: str = "batch"
    parts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        asked = "train a second round"
        if not 0 < self.keep <= 1:
            raise NetsukeError(asked, f"keep={self.keep}", "above 0, up to 1 (the whole pass again)")
        if not self.temperature > 0:
            raise NetsukeError(asked, f"temperature={self.temperature}", "a positive number", "inf draws uniformly")
        if self.by not in ("batch", "sequence"):
            raise NetsukeError(asked, f"by={self.by!r}", "batch, sequence")
        if self.parts < 1:
            raise NetsukeError(asked, f"parts={self.parts}", "1 or more")


@dataclass(frozen=True)
class Drawn:
    """The second round's batches in order, and what the draw was like."""

    batches: list[Tensor]
    effective_share: float  # 1/(n·Σ p²), the mean over parts: 1 where the draw is uniform
    mean_loss: float  # of all batches
    drawn_loss: float  # of those drawn


@torch.no_grad()
def losses_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean next-token loss of every row of ids (N, T), (N,) float64, by the model as it is."""
    return torch.cat([token_losses(model, part).double().mean(1) for part in rows.split(SCORED)])


def effective_share(losses: Tensor, temperature: float) -> float:
    """Effective sample size of softmax(losses/T) over the number of losses."""
    p = (losses.double() / temperature).softmax(0)
    return float(1 / (len(p) * p.square().sum()))


def draw(losses: Tensor, count: int, temperature: float, rng: torch.Generator) -> Tensor:
    """`count` different positions, drawn one after the other with p = softmax(losses/T) over those that are left."""
    noise = -torch.log(-torch.log(torch.rand(len(losses), generator=rng, dtype=torch.float64).clamp(1e-300, 1 - 1e-16)))
    return (losses.double() / temperature + noise).topk(count).indices


def second_round(model: nn.Module, batches: Sequence[Tensor], how: Rounds) -> Drawn:
    """Chooses from the first round's batches, each (B, T) ids, by the losses of the model that it left.

    Raises NetsukeError when a part of the corpus has no batch.
    """
    if len(batches) < how.parts:
        raise NetsukeError(
            "train a second round", f"{len(batches)} batches in {how.parts} parts", "a batch in each part"
        )
    size, rng = len(batches[0]), torch.Generator().manual_seed(how.seed)
    rows = torch.cat(list(batches))
    losses = losses_of(model, rows)
    if how.by == "batch":
        losses, units = losses.view(len(batches), size).mean(1), list(batches)
    else:
        units = list(rows)
    chosen, shares = [], []
    for part in torch.arange(len(units)).chunk(how.parts):
        count = max(round(how.keep * len(part)), 1)
        chosen.append(part[draw(losses[part], count, how.temperature, rng)])
        shares.append(effective_share(losses[part], how.temperature))
    order = torch.cat(chosen)
    drawn = float(losses[order].mean())
    order = order[torch.randperm(len(order), generator=rng)]
    picked = [units[i] for i in order.tolist()]
    if how.by == "sequence":
        picked = [torch.stack(picked[i : i + size]) for i in range(0, len(picked) - size + 1, size)]
    return Drawn(picked, sum(shares) / len(shares), float(losses.mean()), drawn)


def train_rounds(
    model: nn.Module, batch_at: Callable[[int], Tensor], loss: Callable[[nn.Module, Tensor], Tensor], knobs: LoopKnobs,
    how: Rounds, *, second: LoopKnobs | None = None, on_draw: Callable[[Drawn], None] | None = None,
) -> tuple[History, History, Drawn]:  # fmt: skip
    """Trains `model` in place for `knobs.steps` steps, then once more on the batches drawn by `how`, one step each.

    second  knobs of the second round (its steps are the number of batches drawn); None: those of the first, a third of the rates:
            a model that has been annealed is not thrown far off again
    Returns both histories and the draw.
    """
    first = train(model, batch_at, loss, knobs)
    drawn = second_round(model, [batch_at(step) for step in range(len(first.steps))], how)
    if on_draw:
        on_draw(drawn)
    return first, train_drawn(model, drawn.batches, loss, second or gentler(knobs)), drawn


def gentler(knobs: LoopKnobs, by: float = 1 / 3) -> LoopKnobs:
    """The same schedule at a share of the rates."""
    return replace(knobs, muon_lr=knobs.muon_lr * by, adam_lr=knobs.adam_lr * by)


def train_drawn(
    model: nn.Module, batches: Sequence[Tensor], loss: Callable[[nn.Module, Tensor], Tensor], knobs: LoopKnobs
) -> History:
    """One step on each batch, in order, annealed to the end."""
    return train(model, lambda step: batches[step], loss, replace(knobs, steps=len(batches), minutes=None))
