"""Speed and size of integer maps beside float32, in the native engine: one block of seven square maps."""

from __future__ import annotations

import os
import statistics
import time

import torch

from netsuke.layers.linear import Dense, LinearBase
from netsuke.layers.packing import packed_width
from netsuke.layers.quantized import QuantLinear
from netsuke.models.llama import LlamaConfig
from netsuke.models.skeleton import skeleton
from netsuke.runtime.engine import Engine

CHUNK = 128  # tokens of a prompt
GROUP = 64  # inputs per scale: the engine's integer products scale activations by block


def random_map(outs: int, ins: int, bits: int, rng: torch.Generator, group: int = GROUP) -> LinearBase:
    if bits == 32:
        return Dense(torch.randn(outs, ins, generator=rng) * ins**-0.5)
    codes = torch.randint(0, 256, (outs, packed_width(ins, bits)), dtype=torch.uint8, generator=rng)
    groups = -(-ins // group)
    scales = torch.full((outs, groups), ins**-0.5 / 2 ** (bits - 2), dtype=torch.float16)
    return QuantLinear(codes, scales, torch.full((outs, groups), 1 << (bits - 1), dtype=torch.uint8), bits, group, ins)


def rates(quick: bool) -> dict:
    """{bits: {prompt, decode} in tokens per second, medians of turns; width; threads}; bits 32 is float32."""
    width, turns = (512, 2) if quick else (4096, 7)
    threads = len(os.sched_getaffinity(0))
    heads = width // 64
    cfg = LlamaConfig.uniform(
        1, width, vocab=256, width=width, heads=heads, kv_heads=heads, head_dim=64, context=2 * CHUNK
    )
    engines = {}
    for bits in (32, 8, 4):
        rng, model = torch.Generator().manual_seed(0), skeleton(cfg)
        for name, layer in model.linears().items():
            model.replace(name, random_map(layer.outs, layer.ins, bits if name != "embed" else 32, rng))
        model.norm.weight = torch.nn.Parameter(torch.ones(width), requires_grad=False)
        for norm in (model.blocks[0].attn_norm, model.blocks[0].mlp_norm):
            norm.weight = torch.nn.Parameter(torch.ones(width), requires_grad=False)
        engines[bits] = Engine.of_model(model, threads=threads)
    out: dict = {bits: {"prompt": [], "decode": []} for bits in engines}
    prompt = torch.randint(256, (CHUNK,), generator=torch.Generator().manual_seed(0)).tolist()
    for turn in range(turns + 1):
        for bits, engine in engines.items():
            engine.truncate(0, 0)
            start = time.perf_counter()
            engine.forward(prompt, [0] * CHUNK)
            middle = time.perf_counter()
            for token in prompt[:16]:
                engine.forward([token], [0])
            if turn:  # the first turn warms up
                out[bits]["prompt"].append(CHUNK / (middle - start))
                out[bits]["decode"].append(16 / (time.perf_counter() - middle))
    for engine in engines.values():
        engine.close()
    return {b: {k: statistics.median(v) for k, v in r.items()} for b, r in out.items()} | {
        "width": width,
        "threads": threads,
    }


def map_bytes(width: int) -> dict[int, int]:
    """Bytes of one square map as float32, and at 8 and 4 bits with one scale per row, as MobileQuant stores it."""
    rng = torch.Generator().manual_seed(0)
    return {bits: random_map(width, width, bits, rng, group=width).bytes() for bits in (32, 8, 4)}
