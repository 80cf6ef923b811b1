"""A small bidirectional encoder: BERT's job, over tokens or over frames of numbers, with full or Linformer attention.

Pre-norm blocks, x + o(attention(norm(x))) and x + fc2(gelu(fc1(norm(x)))), learned positions, biases everywhere, a last norm.
Inputs are ids (B, T) or frames (B, T, I): pixels, log-mel columns. The output is one row of logits per sequence (the mean over
its tokens) or, without classes, one per token through the table, for masked-token training.

Linformer ("Linformer: Self-Attention with Linear Complexity", 2020): each block learns E and F (P, n), one pair for all heads or
one per head, and attends to P summaries K' = E K, V' = F V instead of n tokens: 4·n·P·C multiply-accumulates for 2·n²·C. It
has a largest n and no causal form. Keys and values of padding are zeroed before they are projected: a mask after it would
come too late, as every summary would hold some padding. Shorter sequences use the first T columns, which equals padding to n.

Attention runs in PyTorch's fused kernel, whose memory grows with n alone. `open_maps` computes softmax(QKᵀ) in the open, as
everything did when these methods were published: H·n² numbers per sequence and block.

Dimension letters: B batch, T tokens, C width, H heads, D head width, P projected length, F hidden, V vocabulary, I features.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense, LinearBase
from netsuke.models.llama import Llama

LINEARS = ("q", "k", "v", "o", "fc1", "fc2")
LIMITS = {
    "vocab": 1 << 22, "features": 1 << 20, "width": 1 << 17, "heads": 1 << 12, "context": 1 << 20, "classes": 1 << 20,
    "layers": 1 << 11, "hidden": 1 << 20, "project": 1 << 20,
}  # fmt: skip


class EncoderShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Widths of one block."""

    hidden: int


class EncoderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Either `vocab` (ids) or `features` (numbers in a frame) is above 0. `classes` 0: logits for every token. `project` is
    Linformer's P; `shared` gives all heads of a block one pair of projections. `mask` is the id that hides a token."""

    width: int
    heads: int
    context: int
    blocks: tuple[EncoderShape, ...]
    vocab: int = 0
    features: int = 0
    classes: int = 0
    attention: Literal["full", "linformer"] = "full"
    project: int = 0
    shared: bool = True
    norm_eps: float = 1e-5
    bos: int | None = None
    eos: tuple[int, ...] = ()
    mask: int | None = None
    family: str = "encoder"

    @classmethod
    def uniform(cls, layers: int, hidden: int, **rest) -> EncoderConfig:
        """A config whose blocks are all alike."""
        return cls(blocks=tuple(EncoderShape(hidden) for _ in range(layers)), **rest)

    def linear_shapes(self, layer: int) -> dict[str, tuple[int, int, bool]]:
        """name -> (O, I, has bias) of the six linear maps of a block."""
        C, hidden = self.width, self.blocks[layer].hidden
        square = {n: (C, C, True) for n in ("q", "k", "v", "o")}
        return square | {"fc1": (hidden, C, True), "fc2": (C, hidden, True)}


def check_encoder(cfg: EncoderConfig, source: str | Path = "encoder") -> EncoderConfig:
    """The config itself. Raises NetsukeError naming the first field that no encoder can have."""
    asked = f"load {source}"

    def bound(name: str, value: int, least: int = 1, label: str = "") -> None:
        if not least <= value <= LIMITS[name]:
            raise NetsukeError(asked, f"{label or name} is {value}", f"{least} to {LIMITS[name]}")

    for name in ("width", "heads", "context"):
        bound(name, getattr(cfg, name))
    for name in ("vocab", "features", "classes"):
        bound(name, getattr(cfg, name), 0)
    bound("layers", len(cfg.blocks), label="the number of layers")
    for i, block in enumerate(cfg.blocks):
        bound("hidden", block.hidden, label=f"hidden of block {i}")
    if (cfg.vocab > 0) == (cfg.features > 0):
        raise NetsukeError(asked, f"vocab {cfg.vocab} and features {cfg.features}", "one of the two above 0")
    if not cfg.vocab and not cfg.classes:
        raise NetsukeError(asked, "frames as inputs and no classes", "classes above 0, or tokens")
    if cfg.width % cfg.heads:
        raise NetsukeError(asked, f"a width of {cfg.width} for {cfg.heads} heads", "a multiple of the heads")
    if cfg.attention == "linformer":
        if not 1 <= cfg.project <= cfg.context:
            raise NetsukeError(asked, f"project is {cfg.project}", f"1 to {cfg.context}, the context")
    elif cfg.project:
        raise NetsukeError(asked, f"project {cfg.project} with full attention", "0, or attention linformer")
    if not 0 <= cfg.norm_eps < 1:
        raise NetsukeError(asked, f"norm_eps is {cfg.norm_eps}", "0 to 1")
    for token in (cfg.bos, cfg.mask, *cfg.eos):
        if token is not None and not 0 <= token < cfg.vocab:
            raise NetsukeError(asked, f"special token {token} is outside the vocabulary", f"0 to {cfg.vocab - 1}")
    return cfg


class LayerNorm(nn.Module):
    """(x − mean)/√(var + eps) · weight + bias over the last axis."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class EncoderBlock(nn.Module):
    """One pre-norm block. Linear maps are swapped in place by methods."""

    q: LinearBase
    k: LinearBase
    v: LinearBase
    o: LinearBase
    fc1: LinearBase
    fc2: LinearBase

    def __init__(self, cfg: EncoderConfig, layer: int, dtype: str = "float32"):
        super().__init__()
        self.cfg, self.layer, self.open_maps = cfg, layer, False
        for name, (outs, ins, bias) in cfg.linear_shapes(layer).items():
            setattr(self, name, Dense.empty(outs, ins, bias, dtype))
        if cfg.attention == "linformer":
            shape = (cfg.project, cfg.context) if cfg.shared else (cfg.heads, cfg.project, cfg.context)
            self.squeeze_k = nn.Parameter(torch.empty(shape), requires_grad=False)
            self.squeeze_v = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.attn_norm, self.mlp_norm = LayerNorm(cfg.width, cfg.norm_eps), LayerNorm(cfg.width, cfg.norm_eps)

    def attention(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normed input (B, T, C), mask (B, T) -> concatenated heads (B, T, C), the input of `o`."""
        B, T, C = x.shape
        q, k, v = (m(x).view(B, T, self.cfg.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.cfg.attention == "linformer":
            if mask is not None:
                hidden = ~mask[:, None, :, None]
                k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
            k = self.squeeze_k[..., :T].to(k.dtype) @ k
            v = self.squeeze_v[..., :T].to(v.dtype) @ v
            mask = None
        seen = None if mask is None else mask[:, None, None]
        if self.open_maps:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            if seen is not None:
                scores = scores.masked_fill(~seen, -torch.inf)
            y = scores.softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return y.transpose(1, 2).reshape(B, T, C)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.o(self.attention(self.attn_norm(x), mask))
        return x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x))))


class Encoder(nn.Module):
    """ids (B, T) or frames (B, T, I), and which of them are real, mask (B, T) -> logits (B, classes), or (B, T, V)."""

    def __init__(self, cfg: EncoderConfig, dtype: str = "float32"):
        super().__init__()
        self.cfg = cfg
        self.embed: LinearBase = (
            Dense.empty(cfg.vocab, cfg.width, False, dtype)
            if cfg.vocab
            else Dense.empty(cfg.width, cfg.features, True, dtype)
        )
        self.position = nn.Parameter(torch.empty(cfg.context, cfg.width), requires_grad=False)
        self.blocks = nn.ModuleList(EncoderBlock(cfg, i, dtype) for i in range(len(cfg.blocks)))
        self.norm = LayerNorm(cfg.width, cfg.norm_eps)
        self.head: LinearBase | None = Dense.empty(cfg.classes, cfg.width, True, dtype) if cfg.classes else None

    # The same walk over named linear maps as a Llama's: methods ask both families alike.
    linears = Llama.linears
    replace = Llama.replace
    bytes = Llama.bytes

    def stream(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What every token has become after the last norm, (B, T, C). Raises NetsukeError for more tokens than the context."""
        if x.shape[1] > self.cfg.context:
            raise NetsukeError(
                "run the encoder", f"{x.shape[1]} tokens", f"at most {self.cfg.context}, its context", "shorter inputs"
            )
        if mask is not None and bool(mask.all()):
            mask = None
        x = self.embed.rows(x) if self.cfg.vocab else self.embed(x)
        x = x + self.position[: x.shape[1]].to(x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.stream(x, mask)
        if self.head is None:
            return self.embed(x)
        if mask is None:
            return self.head(x.mean(1))
        real = mask[..., None].to(x.dtype)
        return self.head((x * real).sum(1) / real.sum(1).clamp_min(1))

    def open_maps(self, on: bool = True) -> Encoder:
        """Computes attention maps in the open (the file's docstring), or in the fused kernel again."""
        for block in self.blocks:
            block.open_maps = on
        return self


def random_encoder(cfg: EncoderConfig, seed: int, std: float = 0.02) -> Encoder:
    """A freshly initialised encoder. Linformer's projections get 1/√n, so that summaries have the scale of keys."""
    model = Encoder(check_encoder(cfg))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif "squeeze" in name:
                p.normal_(0, 1 / math.sqrt(cfg.context), generator=rng)
            elif not name.endswith("norm.weight"):
                p.normal_(0, std, generator=rng)
    return model


def projections(model: Encoder) -> int:
    """Parameters that Linformer adds: 2·n·P per block, times the heads where each has its own."""
    return sum(p.numel() for n, p in model.named_parameters() if "squeeze" in n)
