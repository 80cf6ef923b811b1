"""A feed-forward part made of experts, of which every token runs a few.

    l = W_r x (E,),  chosen: the k largest,  p = softmax(l[chosen]),   y = Σ_{e chosen} p_e · down_e(silu(gate_e x) · up_e x)

The order (choose, then softmax over the chosen) is that of "Mixtral of Experts" (2024). E experts of F hidden units hold E
times the weights of one and take k times its multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netsuke.layers.linear import Dense, LinearBase


class Expert(nn.Module):
    """down(silu(gate x) · up x), F hidden units."""

    gate: LinearBase
    up: LinearBase
    down: LinearBase

    def __init__(self, width: int, hidden: int, bias: bool, dtype: str):
        super().__init__()
        self.gate, self.up = (Dense.empty(hidden, width, bias, dtype) for _ in range(2))
        self.down = Dense.empty(width, hidden, bias, dtype)

    def inner(self, x: Tensor) -> Tensor:
        """x (N, C) -> hidden activations (N, F), the input of `down`."""
        return F.silu(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.inner(x))


class Experts(nn.Module):
    """E experts named "0", "1", … and their `router`; x (…, C) -> (…, C)."""

    router: LinearBase

    def __init__(self, width: int, hidden: int, count: int, active: int, bias: bool = False, dtype: str = "float32"):
        super().__init__()
        self.count, self.active = count, active
        self.router = Dense.empty(count, width, False, dtype)
        for e in range(count):
            self.add_module(str(e), Expert(width, hidden, bias, dtype))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the chosen experts of x (N, C): (N, k) each."""
        logits, chosen = self.router(x).topk(self.active, dim=-1)
        return logits.softmax(-1), chosen

    def dealt(self, x: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(expert's name, numbers of the rows of x (N, C) that it gets, their weights), for experts that get any."""
        weights, chosen = self.route(x)
        for e in range(self.count):
            rows, slot = (chosen == e).nonzero(as_tuple=True)
            if rows.numel():
                yield str(e), rows, weights[rows, slot]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = torch.zeros_like(flat)
        for name, rows, weights in self.dealt(flat):
            out = out.index_add(0, rows, (weights[:, None] * self.get_submodule(name)(flat[rows])).to(out.dtype))
        return out.view_as(x)


def balance_loss(logits: Tensor, active: int) -> Tensor:
    """E Σ_e (share of tokens sent to e)·(mean probability of e), 1 when even ("Switch Transformers", 2021): added to the loss
    with a small factor, or a few experts get everything. logits (…, E), the router's outputs."""
    flat = logits.flatten(0, -2)
    count = flat.shape[-1]
    sent = F.one_hot(flat.topk(active, dim=-1).indices, count).float().mean((0, 1))
    return count * (sent * flat.softmax(-1).mean(0)).sum()
