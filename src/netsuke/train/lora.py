"""Trains a plugin: thin factors beside the maps of a base that stays as it is.

"LoRA: Low-Rank Adaptation of Large Language Models", 2021: W x + B A x with A (r, I) drawn at random and B (O, r) zero at the
start, both stepped by AdamW. Only the factors have gradients and moments: 16 bytes for each of their weights. Works on
quantized bases as well ("QLoRA", 2023). The plugin remembers the mean embedding of its texts and how they spread, by which it is
found (compress/adapters.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from netsuke.compress.adapters import Plugin, adapted, text_key, thin_of
from netsuke.compress.bricks import fingerprint
from netsuke.errors import NetsukeError
from netsuke.layers.adapter import BASES
from netsuke.layers.lowrank import check_rank
from netsuke.models.llama import LINEARS, Llama
from netsuke.tasks.language import token_losses
from netsuke.train.loop import LoopKnobs, train


@dataclass(frozen=True)
class Lora:
    """Attributes:

    rank     of every thin map; 4 is enough to follow a domain
    steps    of `batch` texts
    rate     of AdamW at its height; five times more forgets what the base knew of other texts
    targets  leaf names of the maps that get factors
    seed     of the first factors and the order of texts
    """

    rank: int = 4
    steps: int = 60
    rate: float = 1e-3
    targets: tuple[str, ...] = LINEARS
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.targets or not set(self.targets) <= set(LINEARS):
            raise NetsukeError("train a plugin", f"targets {', '.join(self.targets)}", ", ".join(LINEARS))
        for knob in ("rank", "steps", "batch"):
            if type(getattr(self, knob)) is not int or getattr(self, knob) < 1:
                raise NetsukeError("train a plugin", f"{knob}={getattr(self, knob)!r}", "a whole number from 1")
        if not 0 < self.rate < 1:
            raise NetsukeError("train a plugin", f"rate={self.rate}", "a number between 0 and 1")


def train_plugin(
    model: Llama, texts: Tensor, knobs: Lora, name: str, skills: dict[str, float] | None = None,
    on_step: Callable[[int, float, float], bool | None] | None = None,
) -> tuple[Plugin, list[float]]:  # fmt: skip
    """A plugin for texts (N, T + 1) of ids, and the losses of its steps. The model is left as it is.

    Raises NetsukeError for texts that are none, a rank that the maps cannot have, and maps that bear no adapter.
    """
    if texts.ndim != 2 or not len(texts) or texts.shape[1] < 2:
        raise NetsukeError("train a plugin", f"texts of shape {list(texts.shape)}", "(N, T) with two tokens or more")
    maps = {n: m for n, m in model.linears().items() if n.rpartition(".")[2] in knobs.targets}
    for n, m in maps.items():
        check_rank(knobs.rank, m.outs, m.ins, f"put a thin map beside {n}")
        if m.spec()["kind"] not in BASES:
            raise NetsukeError(f"put a thin map beside {n}", f"it is stored as {m.spec()['kind']}", ", ".join(BASES))
    work = adapted(model, maps, knobs.rank, knobs.seed)
    factors = [f.weight.requires_grad_(True) for n in maps for f in (work.linears()[n].first, work.linears()[n].second)]

    def batch_at(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(knobs.seed * 1_000_003 + step)
        return texts[torch.randint(len(texts), (knobs.batch,), generator=rng)]

    state, was = torch.get_rng_state(), torch.is_grad_enabled()
    stepped = [(torch.optim.AdamW(factors, lr=knobs.rate, betas=(0.9, 0.99), weight_decay=0.0), knobs.rate)]
    try:
        torch.set_grad_enabled(True)
        history = train(
            work, batch_at, lambda m, ids: token_losses(m, ids).mean(), LoopKnobs(steps=knobs.steps, warmup=0.1),
            stepped=stepped, on_step=on_step,
        )  # fmt: skip
    finally:
        torch.set_grad_enabled(was)
        torch.set_rng_state(state)
    made = Plugin(name, fingerprint(model), thin_of(work), skills or {}, (), **text_key(model, texts))
    return made, history.losses
