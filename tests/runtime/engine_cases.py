"""Tiny models of every shape and storage that the native engine knows, and the PyTorch reference that it is held to.

The engine rounds what a quantized map reads to int8, one scale per block of inputs, and keeps keys and values in float16
or int8. `reference` does the same roundings in PyTorch, so that what is left between the two is the order of float32 sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from netsuke.layers.linear import Dense, LinearBase
from netsuke.layers.lowrank import LowRank
from netsuke.layers.quantized import QuantLinear
from netsuke.layers.sparse import InputSparse
from netsuke.models.llama import BlockShape, KVCache, Llama, LlamaConfig, RopeScaling, random_llama

VOCAB = 101
CUT = (
    BlockShape(45, 7, ((0, 3, 9), (1, 2, 5))),
    BlockShape(130, 45),
    BlockShape(90, 20, (tuple(range(9)), tuple(range(1, 10)))),
)


def shaped(seed: int = 0, blocks: tuple[BlockShape, ...] | None = None, **changes) -> Llama:
    """Width 72, 4 heads on 2 key heads of 20, hidden widths 90 and 200: no multiple of a vector anywhere. Norms and biases
    are random too."""
    base = {"vocab": VOCAB, "width": 72, "heads": 4, "kv_heads": 2, "head_dim": 20, "context": 96} | changes
    shapes = blocks or (BlockShape(90, base["head_dim"]), BlockShape(200, base["head_dim"]))
    model = random_llama(LlamaConfig(blocks=shapes, **base), seed, std=0.15)
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.add_(torch.randn(p.shape, generator=rng), alpha=0.2)
            elif name.endswith("bias"):
                p.normal_(0, 0.3, generator=rng)
    return model


def quantize(layer: LinearBase, bits: int, group: int | None) -> QuantLinear:
    """Asymmetric rounding by groups; `group` None: one group for a whole row."""
    w, group = layer.to_dense(), group or layer.ins
    parts = F.pad(w, (0, -layer.ins % group), value=float("nan")).unflatten(1, (-1, group))
    low, high = parts.nan_to_num(9e9).amin(-1).clamp(max=0), parts.nan_to_num(-9e9).amax(-1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-6).half()
    zero = (-low / scale.float()).round().clamp(0, 2**bits - 1)
    codes = (parts / scale.float()[..., None] + zero[..., None]).round().nan_to_num(0).clamp(0, 2**bits - 1)
    return QuantLinear.from_codes(
        codes.flatten(1)[:, : layer.ins].to(torch.uint8), scale, zero, bits, group, layer.bias
    )


def factors(layer: LinearBase, rank: int, bias: bool) -> tuple[Dense, Dense]:
    U, S, V = torch.linalg.svd(layer.to_dense().double(), full_matrices=False)
    second = (U[:, :rank] * S[:rank]).float()
    return Dense(V[:rank].float().contiguous()), Dense(second, layer.bias if bias else None)


def swap(model: Llama, make: Callable[[str, LinearBase], LinearBase]) -> Llama:
    """Every map of the model as `make(leaf name, map)` stores it."""
    for name, layer in list(model.linears().items()):
        model.replace(name, make(name.rpartition(".")[2], layer))
    return model


def stored(dtype: torch.dtype) -> Llama:
    def make(_: str, layer: LinearBase) -> Dense:
        return Dense(layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))

    return swap(shaped(tied=False, qkv_bias=True, out_bias=True, mlp_bias=True), make)


def quant(bits: int, group: int | None, **changes) -> Llama:
    return swap(shaped(**changes), lambda _, layer: quantize(layer, bits, group))


def unlike() -> Llama:
    """Another storage for every map of a block: gate and up differ, so that they cannot share a pass."""
    kinds = {"embed": (8, 32), "q": (4, 64), "k": (3, 48), "v": (2, 32), "o": (8, 64), "up": (4, 32), "down": (3, 128)}
    return swap(
        shaped(tied=False, blocks=CUT, mlp_bias=True),
        lambda leaf, layer: quantize(layer, *kinds[leaf]) if leaf in kinds else layer,
    )


def lowrank(bits: int | None, **changes) -> Llama:
    """Pairs of rank 11 everywhere but in the table; `bits` for the second factor, one of two first factors in 8."""

    def make(leaf: str, layer: LinearBase) -> LinearBase:
        if leaf == "embed":
            return layer
        rank = 11 if leaf in ("q", "k", "v", "head") else min(30, layer.ins - 1)
        first, second = factors(layer, rank, True)
        if bits:
            second = quantize(second, bits, 32)
            first = quantize(first, 8, 64) if leaf in ("q", "o", "up") else first
        return LowRank(first, second)

    return swap(shaped(tied=False, qkv_bias=True, **changes), make)


def sparse(bits: int | None, rank: int = 0, dtype: torch.dtype = torch.float32, group: int = 32) -> Llama:
    """Thresholds that leave out about half of the channels."""

    def make(leaf: str, layer: LinearBase) -> LinearBase:
        if leaf == "embed":
            return layer
        low = factors(layer, rank, False) if rank else ()
        threshold = {"down": 0.4, "o": 0.5}.get(leaf, 0.9)
        if bits is None:
            bias = None if layer.bias is None else layer.bias.to(dtype)
            return InputSparse.from_dense(Dense(layer.weight.to(dtype), bias), threshold, *low)
        low = [quantize(f, 8, 32) for f in low]
        return InputSparse.from_quant(quantize(layer, bits, group), threshold, *low)

    return swap(shaped(tied=False, qkv_bias=True, mlp_bias=True), make)


ROPE = {
    "linear": RopeScaling("linear", factor=4.0),
    "llama3": RopeScaling("llama3", factor=8.0, low=1.0, high=4.0, original_context=32),
    "yarn": RopeScaling("yarn", factor=4.0, original_context=24),
    "yarn-attention": RopeScaling("yarn", factor=4.0, original_context=24, attention_factor=0.9),
}
FLOATS: dict[str, Callable[[], Llama]] = {
    "tied": lambda: shaped(),
    "untied": lambda: shaped(tied=False),
    "biases": lambda: shaped(qkv_bias=True, out_bias=True, mlp_bias=True),
    "qk-norm": lambda: shaped(qk_norm=True),
    "one-key-head": lambda: shaped(kv_heads=1),
    "no-groups": lambda: shaped(kv_heads=4),
    "window": lambda: shaped(window=7),
    "cut": lambda: shaped(blocks=CUT),
    "wide-heads": lambda: shaped(head_dim=80),
    **{f"rope-{name}": lambda s=s: shaped(rope_scaling=s) for name, s in ROPE.items()},
    "float16": lambda: stored(torch.float16),
    "bfloat16": lambda: stored(torch.bfloat16),
    "lowrank": lambda: lowrank(None),
    "sparse": lambda: sparse(None),
    "sparse-float16": lambda: sparse(None, dtype=torch.float16),
    "sparse-lowrank": lambda: sparse(None, 5),
}
GROUPS = ((8, 64), (8, 32), (8, 48), (8, None), (4, 64), (4, 32), (4, 128), (4, 7), (3, 64), (3, 128), (3, 32), (2, 64))
GROUPS = (*GROUPS, (2, 32), (2, 48), (3, None), (2, None))
QUANTS: dict[str, Callable[[], Llama]] = {
    **{f"{b}-bits-{g or 'row'}": lambda b=b, g=g: quant(b, g, qkv_bias=True) for b, g in GROUPS},
    "unlike": unlike,
    "lowrank-4-bits": lambda: lowrank(4),
    "lowrank-cut": lambda: lowrank(3, blocks=CUT),
    "sparse-4-bits": lambda: sparse(4),
    "sparse-8-bits-lowrank": lambda: sparse(8, 5, group=64),
    "sparse-3-bits-48": lambda: sparse(3, 5, group=48),
    "sparse-2-bits": lambda: sparse(2),
}
CASES = FLOATS | QUANTS


def block_of(group: int) -> int:
    """Inputs that share one scale: 64, or what divides the group best below it."""
    if group % 64 == 0:
        return 64
    if group % 32 == 0:
        return 32
    return max(d for d in range(1, min(group, 64) + 1) if group % d == 0)


def int8(x: Tensor, block: int) -> Tensor:
    """x (…, n) rounded to 127 steps of the largest number of each block of the last dimension."""
    n = x.shape[-1]
    parts = F.pad(x, (0, -n % block)).unflatten(-1, (-1, block))
    most = parts.abs().amax(-1, keepdim=True)
    q = (parts * torch.where(most > 0, 127 / most, 0)).round()
    return (q * (most / 127)).flatten(-2)[..., :n]


def _quant_forward(self: QuantLinear, x: Tensor) -> Tensor:
    return F.linear(int8(x, block_of(self.group)), self.to_dense(), self.bias)


def _sparse_forward(self: InputSparse, x: Tensor) -> Tensor:
    read = x if self.bits is None else int8(x, block_of(self.group))
    ruled = x.shape[-2] == 1 and self.threshold > 0
    mask = self.chosen(x) if ruled else torch.ones_like(x, dtype=torch.bool)
    y = F.linear(read * mask, self.to_dense())
    if self.first is not None and ruled:
        y = y + self.second(self.first(x * ~mask))
    return y if self.bias is None else y + self.bias


@contextlib.contextmanager
def rounding() -> Iterator[None]:
    """Quantized maps read int8, as they do in the engine."""
    with (
        mock.patch.object(QuantLinear, "forward", _quant_forward),
        mock.patch.object(InputSparse, "forward", _sparse_forward),
    ):
        yield


class Int8Cache(KVCache):
    """Keys and values with one scale per token and key head."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return super().extend(layer, int8(k, k.shape[-1]), int8(v, v.shape[-1]))


@torch.inference_mode()
def reference(model: Llama, prompt: list[int], made: list[int], kv: str = "float16") -> Tensor:
    """Logits of all rows (T, V): a prompt at once, then tokens one by one."""
    length = len(prompt) + len(made)
    cache = Int8Cache(model.cfg, 1, length) if kv == "int8" else KVCache(model.cfg, 1, length, torch.float16)
    with rounding():
        out = [model(torch.tensor([prompt]), cache)]
        out += [model(torch.tensor([[token]]), cache) for token in made]
    return torch.cat(out, 1)[0]
