"""Changes one fact of a model: a rank-one plugin beside one block's down, written in closed form.

"Locating and Editing Factual Associations in GPT" (ROME, 2022), an *update* operation of "Configurable Foundation Models"
(2024). down is read as a memory of keys k (hidden activations) and values. With C = E[k kᵀ] over other text,

    k*   mean key at the subject's last token, over the prompt alone and behind other words
    δ    what must be added to the block's output at that token so that the target follows: found by gradient, the model stays
    ΔW = δ (C⁻¹ k*)ᵀ / (k*ᵀ C⁻¹ k*)     gives δ at k*, and changes other keys least, in the mean square

The result is a Plugin of rank one (compress/adapters.py): it can be attached, taken off without a trace, kept in a file, and
several are attached by `merge` with weights 1, as long as their keys lie apart (`check_apart`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netsuke.compress.adapters import Plugin
from netsuke.compress.bricks import fingerprint
from netsuke.compress.decompose import safe_cholesky
from netsuke.errors import NetsukeError
from netsuke.layers.adapter import BASES
from netsuke.measure.activations import Gram, tapped
from netsuke.models.llama import Llama
from netsuke.train.loop import LoopKnobs, train

CLOSE = 0.5  # cosine of two edits' directions: the second would undo half of the first


@dataclass(frozen=True)
class Edit:
    """Attributes:

    steps   of AdamW on δ
    rate    of the same, as a share of the mean length of the block's output
    ridge   on C, a share of its mean diagonal
    decay   of δ's squared length, in units of that mean length: small changes are found first
    """

    steps: int = 40
    rate: float = 0.1
    ridge: float = 1e-2
    decay: float = 1e-3


@dataclass(frozen=True)
class Fact:
    """`prompt` (T,) and `target` (n,) are ids; the subject ends at `subject` in the prompt; `before` are texts (m, S) that the
    prompt also stands behind while the edit is made, so that it does not hang on the first position."""

    prompt: Tensor
    subject: int
    target: Tensor
    before: Tensor

    def rows(self) -> list[tuple[Tensor, int]]:
        """[(ids (N, …) with the target at the end, position of the subject's last token)]."""
        whole = torch.cat((self.prompt, self.target))
        behind = torch.cat((self.before, whole.expand(len(self.before), -1)), 1)
        return [(whole[None], self.subject)] + ([(behind, self.before.shape[1] + self.subject)] if len(behind) else [])


@torch.no_grad()
def key_gram(model: Llama, block: int, batches: Iterable[Tensor]) -> Tensor:
    """C = E[k kᵀ] (F, F) of a block's hidden activations over ids (B, T)."""
    gram = Gram()
    with tapped(inputs={model.blocks[block].down: gram}):
        for ids in batches:
            model(ids)
    if not gram.rows:
        raise NetsukeError("edit a fact", "no other text was given", "a few thousand tokens")
    return gram.mean()


@torch.no_grad()
def says(model: Llama, prompt: Tensor, target: Tensor) -> bool:
    """Whether the target is what the model writes after the prompt, token by token."""
    logits = model(torch.cat((prompt, target))[None, :-1])[0, len(prompt) - 1 :]
    return bool((logits.argmax(-1) == target).all())


class Delta(nn.Module):
    """δ at one position of a block's output, in units of `size`."""

    def __init__(self, width: int, size: float):
        super().__init__()
        self.size, self.place = size, 0
        self.value = nn.Parameter(torch.zeros(width))

    def at(self, x: Tensor) -> Tensor:
        here = F.one_hot(torch.tensor(self.place), x.shape[1]).to(x.dtype)
        return x + here[:, None] * (self.value * self.size)


def make_edit(model: Llama, fact: Fact, block: int, gram: Tensor, name: str, knobs: Edit | None = None) -> Plugin:
    """The plugin that makes a fact so; `gram` is that of `key_gram`. The model is left as it is.

    Raises NetsukeError for a subject outside the prompt, an empty target, and a block that cannot bear a plugin.
    """
    knobs, asked = knobs or Edit(), "edit a fact"
    if not 0 <= fact.subject < len(fact.prompt) or not len(fact.target):
        found = f"a subject at {fact.subject} of {len(fact.prompt)} tokens, {len(fact.target)} tokens to follow"
        raise NetsukeError(asked, found, "a subject in the prompt and a target")
    if not 0 <= block < len(model.blocks) or model.cfg.blocks[block].experts:
        raise NetsukeError(asked, f"block {block}", f"0 to {len(model.blocks) - 1}, one feed-forward part each")
    site = model.blocks[block]
    if site.down.spec()["kind"] not in BASES:
        raise NetsukeError(asked, f"blocks.{block}.down is stored as {site.down.spec()['kind']}", ", ".join(BASES))
    rows, standing = fact.rows(), site.sites
    keys, outs = [], []
    try:
        for ids, place in rows:
            seen: dict[str, Tensor] = {}
            site.sites = standing | {n: lambda x, n=n, seen=seen: seen.setdefault(n, x) for n in ("hidden", "down")}
            with torch.no_grad():
                model(ids)
            keys.append(seen["hidden"][:, place].double())
            outs.append(seen["down"][:, place].norm(dim=-1))
        delta = Delta(model.cfg.width, float(torch.cat(outs).mean()))
        site.sites = standing | {"down": delta.at}
        _learn(model, delta, rows, len(fact.target), knobs)
    finally:
        site.sites = standing
    key = torch.cat(keys).mean(0)
    factor, _ = safe_cholesky(gram, knobs.ridge)
    turned = torch.cholesky_solve(key[:, None], factor)[:, 0]
    first = (turned / (key @ turned))[None].float()
    second = (delta.value.detach() * delta.size)[:, None].clone()
    return Plugin(name, fingerprint(model), {f"blocks.{block}.down": (first, second)})


def _learn(model: Llama, delta: Delta, rows: list[tuple[Tensor, int]], length: int, knobs: Edit) -> None:
    """Moves δ until the target follows in all rows."""

    def loss(module: Delta, _: Tensor) -> Tensor:
        losses = []
        for ids, place in rows:
            module.place = place
            logits = model(ids[:, :-1])[:, -length:]
            wanted = ids[:, -length:].flatten()
            losses.append(F.cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="none"))
        return torch.cat(losses).mean() + knobs.decay * module.value.square().sum()

    was, stepped = torch.is_grad_enabled(), torch.optim.AdamW([delta.value], lr=knobs.rate, weight_decay=0.0)
    try:
        torch.set_grad_enabled(True)
        settings = LoopKnobs(steps=knobs.steps, warmup=0.0, clip=10.0)
        train(delta, lambda step: torch.tensor(step), loss, settings, stepped=[(stepped, knobs.rate)])
    finally:
        torch.set_grad_enabled(was)


def check_apart(edits: Sequence[Plugin]) -> None:
    """Raises NetsukeError for two edits of one map whose keys are nearly the same: the later would overwrite the earlier."""
    for i, b in enumerate(edits):
        for a in edits[:i]:
            for name in a.thin.keys() & b.thin.keys():
                cosine = float(F.cosine_similarity(a.thin[name][0], b.thin[name][0]))
                if abs(cosine) > CLOSE:
                    found = f"both change {name} at nearly the same key (cosine {cosine:.2f})"
                    raise NetsukeError(
                        f"attach the edits {a.id!r} and {b.id!r}", found, f"below {CLOSE}", "one of them"
                    )
