"""Holds the integer executor against the simulation it was made from, code by code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from netsuke.measure.activations import tapped
from netsuke.models.llama import SITES, Llama
from netsuke.runtime.integer import IntegerModel
from netsuke.runtime.integer_ops import Codes


@dataclass
class Agreement:
    """Of all codes at one site in all blocks: how many, how many differ, by how much at most."""

    bits: int
    count: int = 0
    different: int = 0
    largest: int = 0


class _Kept:
    """An accumulator that keeps the last values it saw."""

    values: Tensor

    def add(self, x: Tensor) -> None:
        self.values = x


@torch.no_grad()
def simulated(model: Llama, ids: Tensor) -> tuple[dict[tuple[int, str], np.ndarray], np.ndarray]:
    """Codes of every (block, site) for ids (T,), and logits (T, V): the model itself in float64, where sums of products of
    small integers are exact and only true ties are left to chance."""
    kept = {(block, site): _Kept() for block in model.blocks for site in SITES}
    with tapped(sites=kept):
        x = model.embed.rows(ids[None]).double()
        for block in model.blocks:
            x = block(x)
        logits = model.logits(x)[0].numpy()
    codes = {
        (block.layer, site): block.sites[site].codes(acc.values)[0].numpy().astype(np.int64)
        for (block, site), acc in kept.items()
    }
    return codes, logits


def agreement(
    model: Llama, integer: IntegerModel, ids: Tensor, forced: bool = True
) -> tuple[dict[str, Agreement], np.ndarray, np.ndarray]:
    """Codes of the executor beside the simulation's, by site, and the logits of both (T, V).

    forced   every operator gets the simulation's codes as its inputs; without it, the executor goes on with its own

    Attention's logits and weights count where they are seen: the executor masks the rest.
    """
    wanted, logits = simulated(model, ids)
    found: dict[str, Agreement] = {}

    def at(layer: int, site: str, codes: Codes) -> Codes:
        want = wanted[layer, site]
        off = np.abs(codes.astype(np.int64) - want)
        if site in ("scores", "probs"):
            off = off[..., np.tril(np.ones(off.shape[-2:], bool))]
        row = found.setdefault(site, Agreement(model.blocks[layer].sites[site].bits))
        row.count, row.different = row.count + off.size, row.different + int((off > 0).sum())
        row.largest = max(row.largest, int(off.max()))
        return want.astype(codes.dtype) if forced else codes

    made = integer.forward(ids.numpy(), at=at)
    return found, made * 2.0**-16, logits


@torch.no_grad()
def greedy_in_float64(model: Llama, ids: list[int], new_tokens: int) -> list[int]:
    """The most likely tokens after a prompt, by the simulation; every step runs the whole text."""
    text = list(ids)
    for _ in range(new_tokens):
        x = model.embed.rows(torch.tensor([text])).double()
        for block in model.blocks:
            x = block(x)
        text.append(int(model.logits(x[:, -1:])[0, 0].argmax()))
    return text[len(ids) :]
