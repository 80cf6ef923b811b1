"""Routers for groups of neurons, trained on what the groups do: seconds on a few thousand tokens.

"MoEfication" (ACL Findings 2022): a small network x -> tanh -> E per block learns which groups will be strong, from the part's
input alone. Target: the share of each group in the sum of |a_i|·‖W_down[:, i]‖; loss: cross-entropy with it, so that groups
that matter are told from those that do not. The model stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netsuke.compress.neuron_groups import Groups, Router
from netsuke.measure.activations import tapped
from netsuke.measure.neurons import strength, weights_of
from netsuke.models.llama import Llama
from netsuke.train.loop import LoopKnobs, train


@dataclass(frozen=True)
class RouterKnobs:
    """hidden units of the router; `steps` of `batch` tokens; `rate` of AdamW; `seed` of weights and order."""

    hidden: int = 128
    steps: int = 800
    batch: int = 256
    rate: float = 3e-3
    seed: int = 0


class Rows:
    """Keeps the values that reach a site, as rows."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self.parts.append(x.detach().flatten(0, -2))

    def rows(self) -> Tensor:
        return torch.cat(self.parts)


class Strengths(Rows):
    """Keeps how strong every group is, (N, E)."""

    def __init__(self, groups: Groups, norms: Tensor):
        super().__init__()
        self.groups, self.norms = groups, norms

    def add(self, x: Tensor) -> None:
        super().add(self.groups.total(strength(x, self.norms)))


@torch.no_grad()
def seen(model: Llama, groups: Sequence[Groups], batches: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Per block the inputs (N, C) of the feed-forward part and the strengths of the groups (N, E), for ids (B, T)."""
    inputs = [Rows() for _ in groups]
    outputs = [Strengths(g, weights_of("output", b.down)) for b, g in zip(model.blocks, groups, strict=True)]
    sites = {(b, "mlp_in"): rows for b, rows in zip(model.blocks, inputs)}
    with tapped(sites=sites | {(b, "hidden"): rows for b, rows in zip(model.blocks, outputs)}):
        for ids in batches:
            model(ids)
    return [(x.rows(), y.rows()) for x, y in zip(inputs, outputs)]


def learned(x: Tensor, strengths: Tensor, knobs: RouterKnobs) -> nn.Sequential:
    """A router that predicts the shares of strengths (N, E) from inputs (N, C)."""
    state, was = torch.get_rng_state(), torch.is_grad_enabled()
    torch.manual_seed(knobs.seed)
    try:
        torch.set_grad_enabled(True)
        router = nn.Sequential(
            nn.Linear(x.shape[1], knobs.hidden), nn.Tanh(), nn.Linear(knobs.hidden, strengths.shape[1])
        )
        shares = strengths / strengths.sum(-1, keepdim=True)

        def batch_at(step: int) -> Tensor:
            rng = torch.Generator().manual_seed(knobs.seed * 1_000_003 + step)
            return torch.randint(len(x), (knobs.batch,), generator=rng)

        def loss(module: nn.Module, which: Tensor) -> Tensor:
            return F.cross_entropy(module(x[which]), shares[which])

        train(router, batch_at, loss, LoopKnobs(steps=knobs.steps, adam_lr=knobs.rate))
    finally:
        torch.set_grad_enabled(was)
        torch.set_rng_state(state)
    return router.requires_grad_(False)


def train_routers(
    model: Llama, groups: Sequence[Groups], batches: Iterable[Tensor], knobs: RouterKnobs | None = None
) -> list[Router]:
    """One router per block, as `neuron_groups.gated` takes them, from ids (B, T)."""
    return [learned(x, y, knobs or RouterKnobs()) for x, y in seen(model, groups, batches)]
