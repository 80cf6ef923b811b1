"""Equivalent transformations of a Llama: the function stays, the numbers become easier to round.

A scale s_j > 0 moves size from channel j of an activation into the weights that read it. Where it is exact, and what moves:

    attn_in   (C,)     attention norm's weight / s;  columns of q, k, v · s
    mlp_in    (C,)     feed-forward norm's weight / s;  columns of gate, up · s
    v_o       (K·D,)   rows of v / s;  columns of o · s, the same for all heads that share a value head
    up_down   (F,)     rows of up / s;  columns of down · s (gating is elementwise, so s passes through silu(gate) · up)
    q_k       (K·R,)   rows of q / s;  rows of k · s. Rotation mixes dimensions i and i + R, so a pair shares one s
    v_shift   (K·D,)   bias of v − δ;  bias of o + W_o δ: attention weights sum to 1. Needs both biases

A shift is exact nowhere else: RMSNorm has no bias to take it, gating and rotation do not commute with it.
("SmoothQuant", Xiao et al. 2023; "OmniQuant", 2024; "MobileQuant", 2024, whose q↔k does not tie rotary pairs and is off
by its rotation for that.)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.models.llama import LINEARS, Block, Llama, LlamaConfig

PAIRS = ("attn_in", "mlp_in", "v_o", "up_down", "q_k")
SMALLEST = 1e-2  # of a learned scale's size


def pair_sizes(cfg: LlamaConfig, layer: int, grouped: bool = False) -> dict[str, int]:
    """Channels of every pair of a block. With grouped queries v_o and q_k are left out, as the paper does, unless `grouped`:
    tied over the heads that share a key head they are exact too."""
    shape = cfg.blocks[layer]
    sizes = {"attn_in": cfg.width, "mlp_in": cfg.width, "up_down": shape.hidden}
    if cfg.heads == cfg.kv_heads or grouped:
        sizes |= {"v_o": cfg.kv_heads * shape.value_dim}
        if not cfg.qk_norm:  # a norm between projection and rotation would undo the scale
            sizes |= {"q_k": cfg.kv_heads * cfg.pair_count(layer)}
    return {name: sizes[name] for name in PAIRS if name in sizes}


def skipped(cfg: LlamaConfig, grouped: bool = False) -> dict[str, str]:
    """Pairs that are left out, with the reason."""
    left = set(PAIRS) - pair_sizes(cfg, 0, grouped).keys()
    if cfg.heads != cfg.kv_heads and not grouped:
        why = f"{cfg.kv_heads} key/value heads feed {cfg.heads} query heads"
    else:
        why = "queries and keys are normed"
    return {name: why for name in PAIRS if name in left}


def weights_of(block: Block) -> dict[str, Tensor]:
    """Norm weights, matrices and biases of a block by their names in its state ("q.weight"), as floats: what
    `torch.func.functional_call` takes back. Raises NetsukeError for a map that is not dense."""
    out = {"attn_norm.weight": block.attn_norm.weight, "mlp_norm.weight": block.mlp_norm.weight}
    for name in LINEARS:
        layer = getattr(block, name)
        if not isinstance(layer, Dense):
            kind = layer.spec()["kind"]
            raise NetsukeError(f"transform blocks.{block.layer}", f"{name} is stored as {kind}", "dense maps")
        out[f"{name}.weight"] = layer.to_dense()
        if layer.bias is not None:
            out[f"{name}.bias"] = layer.bias.float()
    return {name: t.detach() for name, t in out.items()}


def transform(
    weights: Mapping[str, Tensor], scales: Mapping[str, Tensor], cfg: LlamaConfig, layer: int
) -> dict[str, Tensor]:
    """The weights of a block (`weights_of`) after the transformations named in `scales`; differentiable in both.

    Raises NetsukeError for a pair that there is none of, and for a shift without biases.
    """
    w, heads = dict(weights), cfg.heads // cfg.kv_heads
    asked = f"transform blocks.{layer}"

    def rows(name: str, factor: Tensor) -> None:
        w[f"{name}.weight"] = w[f"{name}.weight"] * factor[:, None]
        if f"{name}.bias" in w:
            w[f"{name}.bias"] = w[f"{name}.bias"] * factor

    def columns(name: str, factor: Tensor) -> None:
        w[f"{name}.weight"] = w[f"{name}.weight"] * factor

    for pair, s in scales.items():
        if pair in ("attn_in", "mlp_in"):
            norm, readers = ("attn_norm", ("q", "k", "v")) if pair == "attn_in" else ("mlp_norm", ("gate", "up"))
            w[f"{norm}.weight"] = w[f"{norm}.weight"] / s
            for name in readers:
                columns(name, s)
        elif pair == "v_o":
            rows("v", 1 / s)
            columns("o", _for_queries(s, cfg.kv_heads, heads))
        elif pair == "up_down":
            rows("up", 1 / s)
            columns("down", s)
        elif pair == "q_k" and not cfg.qk_norm:
            tied = s.view(cfg.kv_heads, -1).repeat(1, 2)  # i and i + R
            rows("q", 1 / _for_queries(tied, cfg.kv_heads, heads))
            rows("k", tied.reshape(-1))
        elif pair == "v_shift":
            if "v.bias" not in w or "o.bias" not in w:
                raise NetsukeError(asked, "a shift of v, but v and o have no bias", "scales", "leave v_shift out")
            w["v.bias"] = w["v.bias"] - s
            w["o.bias"] = w["o.bias"] + w["o.weight"] @ _for_queries(s, cfg.kv_heads, heads)
        else:
            raise NetsukeError(asked, f"there is no pair {pair!r}", ", ".join((*PAIRS, "v_shift")))
    return w


def _for_queries(s: Tensor, kv_heads: int, group: int) -> Tensor:
    """Numbers of the key heads' channels, once for every query head that shares them."""
    return s.view(kv_heads, -1).repeat_interleave(group, 0).reshape(-1)


@torch.no_grad()
def fold(model: Llama, scales: Mapping[str, Tensor]) -> Llama:
    """A copy of `model` whose weights have taken the scales in ("blocks.0.attn_in": (C,)); its function is the same."""
    out = copy.deepcopy(model)
    for i, block in enumerate(out.blocks):
        own = {n.removeprefix(f"blocks.{i}."): s for n, s in scales.items() if n.startswith(f"blocks.{i}.")}
        install(block, transform(weights_of(block), own, model.cfg, i))
    return out


@torch.no_grad()
def install(block: Block, weights: Mapping[str, Tensor]) -> None:
    """Puts the weights of a block (`weights_of`) into its dense maps and norms, in the dtype that they have there."""
    for norm in ("attn_norm", "mlp_norm"):
        old = getattr(block, norm).weight
        old.copy_(weights[f"{norm}.weight"])
    for name in LINEARS:
        layer = getattr(block, name)
        layer.weight.copy_(weights[f"{name}.weight"])
        if layer.bias is not None:
            layer.bias.copy_(weights[f"{name}.bias"])


# --- where to start ---


def column_reach(weights: Mapping[str, Tensor], pair: str, cfg: LlamaConfig) -> Tensor:
    """Largest weight that reads each channel of a pair, over all maps that read it."""
    heads = cfg.heads // cfg.kv_heads
    if pair == "v_o":
        return weights["o.weight"].abs().amax(0).view(cfg.kv_heads, heads, -1).amax(1).reshape(-1)
    readers = {"attn_in": ("q", "k", "v"), "mlp_in": ("gate", "up"), "up_down": ("down",)}[pair]
    return torch.stack([weights[f"{name}.weight"].abs().amax(0) for name in readers]).amax(0)


def smoothing(activations: Tensor, weights: Tensor, alpha: float = 0.5) -> Tensor:
    """s = a^α / w^(1−α) of channels whose activations reach a and whose weights reach w (SmoothQuant); 1 where either is 0.

    alpha   0 evens out the weights, 1 the activations
    """
    a, w = activations.double(), weights.double()
    s = a.clamp(min=1e-12) ** alpha / w.clamp(min=1e-12) ** (1 - alpha)
    return torch.where((a > 0) & (w > 0), s, 1.0).clamp(SMALLEST, 1 / SMALLEST).to(weights.dtype)


def bounded(s: Tensor) -> Tensor:
    """A learned scale kept away from 0, its sign kept."""
    return torch.where(s < 0, -1.0, 1.0) * s.abs().clamp(min=SMALLEST)
