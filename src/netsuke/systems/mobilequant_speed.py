"""Speed and size of integer maps beside float32: one block of seven square maps, every way in turns on one thread.

The integer-only decoder computes with static activations, as MobileQuant means it; the native engine's own 8- and 4-bit maps
scale activations per token and stand beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from netsuke.compress.static import WIDE
from netsuke.layers.linear import Dense, LinearBase
from netsuke.layers.packing import packed_width
from netsuke.layers.quantized import QuantLinear
from netsuke.layers.static import StaticGrid
from netsuke.models.llama import SITES, Llama, LlamaConfig
from netsuke.models.skeleton import skeleton
from netsuke.runtime.engine import Engine
from netsuke.runtime.integer_native import NativeInteger

CHUNK, DECODED = 128, 16  # tokens of a prompt, and after it
GROUP = 64  # inputs per scale in the engine: its integer products scale activations by block


def random_map(outs: int, ins: int, bits: int, rng: torch.Generator, group: int = GROUP) -> LinearBase:
    """Random weights of deviation near 1/sqrt(I); `bits` 32 is float32."""
    if bits == 32:
        return Dense(torch.randn(outs, ins, generator=rng) * ins**-0.5)
    codes = torch.randint(0, 256, (outs, packed_width(ins, bits)), dtype=torch.uint8, generator=rng)
    groups = -(-ins // group)
    scales = torch.full((outs, groups), 3.5 * ins**-0.5 / 2**bits, dtype=torch.float16)
    return QuantLinear(codes, scales, torch.full((outs, groups), 1 << (bits - 1), dtype=torch.uint8), bits, group, ins)


def square_block(width: int, bits: int, static: bool) -> Llama:
    """One block, all of its maps `width` by `width`; with `static` grids everywhere and a scale per row."""
    heads = width // 64
    cfg = LlamaConfig.uniform(
        1, width, vocab=256, width=width, heads=heads, kv_heads=heads, head_dim=64, context=2 * CHUNK
    )
    rng, model = torch.Generator().manual_seed(0), skeleton(cfg)
    for name, layer in model.linears().items():
        table = 8 if static else 32
        group = layer.ins if static else GROUP
        model.replace(name, random_map(layer.outs, layer.ins, table if name == "embed" else bits, rng, group))
    for norm in (model.norm, model.blocks[0].attn_norm, model.blocks[0].mlp_norm):
        norm.weight = nn.Parameter(torch.ones(width), requires_grad=False)
    if static:  # grids of about the right size: time does not depend on what the codes stand for
        wide, narrow = StaticGrid(2.0**-11, 0, 16), StaticGrid(2.0**-5, 3, 8)
        model.stand({f"blocks.0.{s}": wide if s in WIDE else narrow for s in SITES})
    return model


Forward = Callable[[Sequence[int]], object]


def runners(width: int) -> dict[str, tuple[Forward, Callable[[], None]]]:
    """By name: a function that appends tokens, and one that begins anew."""
    out: dict[str, tuple[Forward, Callable[[], None]]] = {}
    for bits in (32, 8, 4):
        engine = Engine.of_model(square_block(width, bits, static=False), threads=1)
        name = "float32" if bits == 32 else f"engine, {bits} bits"
        out[name] = (
            lambda ids, e=engine: e.forward(ids, [0] * len(ids)),
            lambda e=engine: e.truncate(0, 0),
        )
    for bits in (8, 4):
        native = NativeInteger.of_model(square_block(width, bits, static=True))
        out[f"integers, {bits} bits"] = native.forward, native.forget
    return out


def rates(quick: bool) -> dict[str, dict[str, float]]:
    """{way: {prompt, decode}} in tokens per second, medians of turns on one thread."""
    turns = 2 if quick else 7
    ways = runners(512 if quick else 4096)
    seen: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "decode": []} for name in ways}
    prompt = torch.randint(256, (CHUNK,), generator=torch.Generator().manual_seed(0)).tolist()
    for turn in range(turns + 1):
        for name, (forward, begin) in ways.items():
            begin()
            start = time.perf_counter()
            forward(prompt)
            middle = time.perf_counter()
            for token in prompt[:DECODED]:
                forward([token])
            if turn:  # the first turn warms up
                seen[name]["prompt"].append(CHUNK / (middle - start))
                seen[name]["decode"].append(DECODED / (time.perf_counter() - middle))
    return {name: {k: statistics.median(v) for k, v in both.items()} for name, both in seen.items()}


def map_bytes(width: int) -> dict[int, int]:
    """Bytes of one square map as float32, and at 8 and 4 bits with one scale per row, as MobileQuant stores it."""
    rng = torch.Generator().manual_seed(0)
    return {bits: random_map(width, width, bits, rng, group=width).bytes() for bits in (32, 8, 4)}
