"""A feed-forward part as equal groups of neurons, of which a token runs a few.

"MoEfication: Transformer Feed-forward Layers are Mixtures of Experts" (ACL Findings 2022). Neurons that are alike go together:
by parameters (gate rows) or by co-activation (a neuron's indicator on some thousand tokens; harms a quarter less, needs text).
Rows of length 1 go to E centres by k-means in which every centre takes F/E of them (an assignment problem, solved exactly, in
every round). Neurons move whole: row of gate, row of up, column of down. Weights stay; only what runs changes.

Which groups run is decided per token by a score of each group:

    similarity   cosine of the part's input with the group's mean gate row: nothing to train
    mlp          a small network that has learned to predict the group's strength (train/group_router.py)
    oracle       the strength itself, Σ |a_i|·‖W_down[:, i]‖: the bound, it needs what it is meant to save

`gated` puts a choice into a model's forward pass to measure its harm; `GroupedMLP` runs the chosen groups alone, for one token
at a time, which is where it saves: several tokens choose different groups, and their union is soon everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from netsuke.compress.bricks import check_plain
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.measure.neurons import TokenIndicators, listen, strength, weights_of
from netsuke.models.llama import Block, Llama

ROUNDS = 20  # of k-means; the assignment rarely changes after ten
EVERY = 4  # tokens of which one is looked at: neighbours are alike
Router = Callable[[Tensor], Tensor]  # normed input (…, C) -> a score of every group (…, E)


@dataclass(frozen=True)
class Groups:
    """`members` (E, F/E): which neurons are in which group."""

    members: Tensor

    @property
    def count(self) -> int:
        return len(self.members)

    def owner(self) -> Tensor:
        """(F,) the group of every neuron."""
        out = torch.empty(self.members.numel(), dtype=torch.long)
        out[self.members.flatten()] = torch.arange(self.count).repeat_interleave(self.members.shape[1])
        return out

    def total(self, values: Tensor) -> Tensor:
        """Sums over groups, (…, F) -> (…, E)."""
        return values[..., self.members.flatten().to(values.device)].unflatten(-1, self.members.shape).sum(-1)


def balanced_kmeans(rows: Tensor, count: int, seed: int = 0) -> Groups:
    """Equal groups of rows (F, C) by direction. Raises NetsukeError when `count` does not divide F."""
    total = len(rows)
    if not 1 <= count <= total or total % count:
        divisors = [d for d in range(1, total + 1) if total % d == 0]
        near = sorted(divisors, key=lambda d: abs(d - count))[:4]
        raise NetsukeError(
            f"make {count} equal groups", f"{total} neurons do not divide among them", ", ".join(map(str, sorted(near)))
        )
    size, points = total // count, F.normalize(rows.double(), dim=-1)
    centres, before = points[_spread(points, count, seed)], None
    for _ in range(ROUNDS):
        cost = -(points @ F.normalize(centres, dim=-1).T).repeat_interleave(
            size, 1
        )  # a place for each member of a group
        owner = torch.from_numpy(linear_sum_assignment(cost.numpy())[1]) // size
        if before is not None and torch.equal(owner, before):
            break
        before = owner
        centres = torch.zeros_like(centres).index_add_(0, owner, points)
    return Groups(before.argsort(stable=True).view(count, size))


def _spread(points: Tensor, count: int, seed: int) -> list[int]:
    """Rows to begin with, each drawn with the square of its distance to the nearest before it (k-means++, 2007)."""
    rng = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points), (1,), generator=rng))]
    far = torch.full((len(points),), torch.inf, dtype=torch.float64)
    for _ in range(count - 1):
        far = torch.minimum(far, (points - points[chosen[-1]]).square().sum(1)).clamp_min(1e-300)
        far[chosen] = 0.0
        chosen.append(int(torch.multinomial(far, 1, generator=rng)))
    return chosen


@torch.no_grad()
def partition(model: Llama, count: int, batches: Iterable[Tensor] | None = None, seed: int = 0) -> list[Groups]:
    """Groups of every block: by co-activation on ids (B, T), or without text by gate rows.

    Raises NetsukeError as `balanced_kmeans`, and for maps that are no dense ones.
    """
    check_plain(model, "make groups of neurons")
    if batches is None:
        return [balanced_kmeans(b.gate.to_dense(), count, seed) for b in model.blocks]
    heard = [TokenIndicators(weights_of("output", b.down), EVERY) for b in model.blocks]
    listen(model, heard, batches)
    return [balanced_kmeans(h.rows().T, count, seed) for h in heard]


def random_groups(total: int, count: int, seed: int = 0) -> Groups:
    """The same without regard to weights: what clustering must beat."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return Groups(order.view(count, -1).sort(1).values)


def similarity(block: Block, groups: Groups) -> Router:
    """Cosine with each group's mean gate row."""
    rows = F.normalize(block.gate.to_dense(), dim=-1)[groups.members].mean(1)
    rows = F.normalize(rows, dim=-1)
    return lambda x: F.normalize(x, dim=-1) @ rows.T.to(x.dtype)


def chosen(scores: Tensor, kept: int) -> Tensor:
    """Mask (…, E) of the `kept` highest scores."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(kept, dim=-1).indices, True)


def kept_of(share: float, count: int) -> int:
    """Groups that run. Raises NetsukeError for a share outside (0, 1]."""
    if not 0 < share <= 1:
        raise NetsukeError("run a share of the groups", f"{share}", "more than 0, at most 1")
    return max(1, round(share * count))


def gated(
    model: Llama, groups: Sequence[Groups], share: float, routers: Sequence[Router] | None = None
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What stands at a model's sites (`model.stand`) so that every token runs only its groups; without routers the oracle
    chooses. Masks: for the harm, not for time."""
    sites: dict[str, Callable[[Tensor], Tensor]] = {}
    for i, (block, g) in enumerate(zip(model.blocks, groups, strict=True)):
        kept, owner, norms = kept_of(share, g.count), g.owner(), weights_of("output", block.down)
        if routers is None:
            sites[f"blocks.{i}.hidden"] = _by_oracle(g, kept, owner, norms)
        else:
            choice = _Choice(routers[i], kept, owner)
            sites[f"blocks.{i}.mlp_in"], sites[f"blocks.{i}.hidden"] = choice.decide, choice.apply
    return sites


def _by_oracle(groups: Groups, kept: int, owner: Tensor, norms: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x * chosen(groups.total(strength(x, norms)), kept)[..., owner]


class _Choice:
    """Decides where the input passes, acts where the hidden activations pass."""

    def __init__(self, router: Router, kept: int, owner: Tensor):
        self.router, self.kept, self.owner = router, kept, owner

    def decide(self, x: Tensor) -> Tensor:
        self.mask = chosen(self.router(x), self.kept)
        return x

    def apply(self, x: Tensor) -> Tensor:
        return x * self.mask[..., self.owner]


class GroupedMLP(nn.Module):
    """down(silu(gate x) · up x) over the groups that a router chooses, for real: weights of the others are not read.

    Gate and up rows of a group lie together, so that a group is one product in and one product out; neighbours that are both
    chosen are one longer product. x (C,) or (1, …, C): one token.
    """

    def __init__(self, block: Block, groups: Groups, router: Router, share: float):
        super().__init__()
        for part in ("gate", "up", "down"):
            layer = getattr(block, part)
            if not isinstance(layer, Dense) or layer.bias is not None:
                raise NetsukeError("run groups of neurons", f"{part} is no dense map without bias", "plain dense maps")
        m = groups.members
        self.kept, self.router, self.size = kept_of(share, groups.count), router, m.shape[1]
        gate, up = block.gate.weight[m], block.up.weight[m]  # (E, G, C)
        self.register_buffer("inward", torch.cat((gate, up), 1).flatten(0, 1).contiguous())  # (E·2G, C)
        self.register_buffer("outward", block.down.weight.T[m].flatten(0, 1).contiguous())  # (F, C)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        row, G = x.reshape(-1), self.size
        which = self.router(row).topk(self.kept).indices.sort().values.tolist()
        runs = [[which[0], which[0] + 1]]
        for e in which[1:]:
            if e == runs[-1][1]:
                runs[-1][1] += 1
            else:
                runs.append([e, e + 1])
        wide = torch.cat([torch.mv(self.inward[2 * G * a : 2 * G * b], row) for a, b in runs]).view(-1, 2, G)
        hidden = (F.silu(wide[:, 0]) * wide[:, 1]).flatten()
        out, at = torch.zeros_like(row), 0
        for a, b in runs:
            n = (b - a) * G
            out.addmv_(self.outward[a * G : b * G].T, hidden[at : at + n])
            at += n
        return out.view(x.shape)
