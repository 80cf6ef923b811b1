"""What `fit` may choose between: for every part of a model, its widths and bits, each with its cost and measured harm.

A part is a module pair of a block (feed-forward, query/key, value/output) or the embedding. Its options are all
combinations of a MoDeGPT cut and of bits per linear map. Harm is measured, not guessed: the part is replaced by its cut
or quantized self, everything else left alone, and the divergence KL(before || after) of the next-token distribution on
probe text is taken (nats per token). For a calibrated model that is the expected rise of the loss, without its noise: the
rise on a few thousand tokens goes either way by more than most parts cost, and an allocator that believes it picks the
luckiest parts (measured on pycode at 4 MB: a rise of 4 % where plain rounding had 2 %). Cuts and bits are taken to add up;
the sum is a prediction that `fit` checks by measuring what it built.

The residual stream before every block is kept, so a trial runs from its own block on: half the time of a full pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import msgspec
import torch
from torch import Tensor

from netsuke.allocate import Option
from netsuke.compress.modegpt import PARTS, MoDeGPT, block_stats, cut_module, full_width, widths_for
from netsuke.compress.quantize import quantize_linear, table_solver
from netsuke.compress.statistics import collect
from netsuke.devices import Device, Work
from netsuke.layers.linear import Dense, LinearBase
from netsuke.layers.registry import layer_bytes
from netsuke.models.llama import Block, BlockShape, Llama, rope_table
from netsuke.tasks.language import LanguageModeling

CUTS = (0.0, 0.125, 0.25, 0.375, 0.5)
BITS = (16, 8, 4, 3, 2)


@dataclass(frozen=True)
class PartChoice:
    """One option of one part: the share of its width removed, and bits per linear map ("blocks.0.gate" -> 4)."""

    part: str
    layer: int | None
    module: str
    cut: float
    bits: dict[str, int]


class Probe:
    """Divergence of a model with one block or table replaced, on fixed windows (W, T), without running what is unchanged."""

    def __init__(self, model: Llama, ids: Tensor):
        self.model, self.ids = model, ids
        self.streams: list[Tensor] = []
        x = model.embed.rows(ids)
        for block in model.blocks:
            self.streams.append(x)
            x = block(x)
        self.streams.append(x)
        self.base = model.logits(x).log_softmax(-1)

    def divergence(self, layer: int, blocks: dict[int, Block], x: Tensor | None = None) -> float:
        """KL(base || changed) in nats per token when `blocks` stand in for the model's, run from the stream before `layer`."""
        x = self.streams[layer] if x is None else x
        for i in range(layer, len(self.model.blocks)):
            x = blocks.get(i, self.model.blocks[i])(x)
        changed = self.model.logits(x).log_softmax(-1)
        return float((self.base.exp() * (self.base - changed)).sum(-1).double().mean())

    def block_harm(self, layer: int, block: Block) -> float:
        return max(self.divergence(layer, {layer: block}), 0.0)

    def table_harm(self, name: str, table: LinearBase) -> float:
        """Harm of replacing "embed" or "head"."""
        before = getattr(self.model, name)
        self.model.replace(name, table)
        try:
            if name == "embed":
                return max(self.divergence(0, {}, table.rows(self.ids)), 0.0)
            return max(self.divergence(len(self.model.blocks), {}), 0.0)
        finally:
            self.model.replace(name, before)


def with_linears(block: Block, linears: dict[str, LinearBase], shape: BlockShape | None = None) -> Block:
    """A copy of `block` that shares all but the given linear maps (and their widths)."""
    blocks = tuple(shape if shape and i == block.layer else b for i, b in enumerate(block.cfg.blocks))
    cfg = msgspec.structs.replace(block.cfg, blocks=blocks)
    with torch.device("meta"):
        new = Block(cfg, block.layer)
    new.freq = rope_table(cfg, block.layer)[0]
    for name, module in block.named_children():
        setattr(new, name, linears.get(name, module))
    return new


def dense_cost(outs: int, ins: int, bias: bool, bits: int, group: int, device: Device) -> dict[str, float]:
    """Bytes and seconds per generated token of one linear map at these bits on this device, in the native engine."""
    spec = {"kind": "dense", "dtype": "float16"} if bits == 16 else {"kind": "quant", "bits": bits, "group": group}
    size = layer_bytes(spec, outs, ins, bias)
    work = Work(macs=outs * ins, bytes_read=size, bits=32 if bits == 16 else 8)  # as the native engine multiplies
    cost = device.cost(work)
    return {"storage": size, "ram": size, "latency": cost.latency, "energy": cost.energy}


def offer(
    model: Llama, task: LanguageModeling, device: Device, *, group: int = 64, windows: int = 8, calibration: int = 32,
    cuts: tuple[float, ...] = CUTS, bits: tuple[int, ...] = BITS, modules: tuple[str, ...] = ("mlp", "qk", "vo"),
    kv_bytes: float = 0.0, on_trial: Callable[[int, int], None] | None = None,
) -> list[list[Option]]:  # fmt: skip
    """The options of every part of a dense model, harm measured on `windows` validation windows.

    `kv_bytes` is what one number per token and block of the key/value cache costs in RAM (tokens × bytes), so that
    narrower heads are credited with it.
    """
    cfg, knobs = model.cfg, MoDeGPT(calibration=calibration, modules=modules)
    with torch.no_grad():
        probe = Probe(model, task.windows("validation")[:windows, :-1])
        seen = collect(model, task, calibration)
        grams = seen.grams
        stats = block_stats(seen, cfg) if any(c > 0 for c in cuts) else None
        tables = ["embed"] + (["head"] if model.head is not None else [])
        tried = [b for b in bits if b <= 4]
        total = len(cfg.blocks) * (7 * len(tried) + len(modules) * sum(c > 0 for c in cuts)) + len(tables) * len(tried)
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            if on_trial:
                on_trial(done, total)

        parts = []
        for i, block in enumerate(model.blocks):
            bit_harm = {}
            for name in cfg.linear_shapes(i):
                for b in tried:
                    small = quantize_linear(getattr(block, name), b, group, "gptq", grams[f"blocks.{i}.{name}"])
                    bit_harm[name, b] = probe.block_harm(i, with_linears(block, {name: small}))
                    tick()
                bit_harm |= {(name, b): fine_harm(b, bit_harm, name) for b in bits if b not in tried}
            for module, names in PARTS.items():
                trials = [(0.0, 0.0, cfg.blocks[i])]
                for cut in cuts:
                    kept = widths_for(cfg, i, module, cut)
                    if cut > 0 and module in modules and kept < full_width(cfg, i, module):
                        changes, linears = cut_module(model, i, module, cut, stats[i], knobs)
                        shape = msgspec.structs.replace(cfg.blocks[i], **changes)
                        harm = probe.block_harm(i, with_linears(block, linears, shape))
                        trials.append((cut, harm, shape))
                        tick()
                parts.append(
                    list(_part_options(cfg, i, module, names, trials, bit_harm, bits, group, device, kv_bytes))
                )
        for name in tables:
            parts.append(_table_options(model, name, probe, bits, tried, group, device, grams, tick))
        return parts


def _part_options(cfg, i, module, names, trials, bit_harm, bits, group, device, kv_bytes) -> Iterator[Option]:
    for cut, cut_harm, shape in trials:
        narrow = msgspec.structs.replace(cfg, blocks=(*cfg.blocks[:i], shape, *cfg.blocks[i + 1 :]))
        shapes = narrow.linear_shapes(i)
        cost_of = {(n, b): dense_cost(*shapes[n], b, group, device) for n in names for b in bits}
        cached = {"mlp": 0, "qk": 2 * narrow.pair_count(i), "vo": shape.value_dim}[module] * cfg.kv_heads * kv_bytes
        for combo in product(bits, repeat=len(names)):
            costs = [cost_of[n, b] for n, b in zip(names, combo)]
            total = {k: sum(c[k] for c in costs) for k in costs[0]}
            total["ram"] += cached
            # what is left of a cut part carries that much less rounding noise
            harm = cut_harm + (1 - cut) * sum(bit_harm[n, b] for n, b in zip(names, combo))
            chosen = {f"blocks.{i}.{n}": b for n, b in zip(names, combo)}
            yield Option(PartChoice(f"blocks.{i}.{module}", i, module, cut, chosen), harm, total)


def _table_options(model, name, probe, bits, tried, group, device, grams, tick) -> list[Option]:
    """Options of the embedding table or a separate head. A table that is only looked up costs no bandwidth."""
    table: Dense = getattr(model, name)
    harms: dict[tuple[str, int], float] = {}
    for b in tried:
        solver, damp = table_solver(name == "embed" and model.head is None, name, b)
        small = quantize_linear(table, b, group, solver, grams.get(name), name, damp)
        harms[name, b] = probe.table_harm(name, small)
        tick()
    out = []
    for b in bits:
        harm = harms[name, b] if b in tried else fine_harm(b, harms, name)
        cost = dense_cost(table.outs, table.ins, table.bias is not None, b, group, device)
        if name == "embed" and model.head is not None:
            cost["latency"] = cost["energy"] = 0.0
        out.append(Option(PartChoice(name, None, name, 0.0, {name: b}), harm, cost))
    return out


def fine_harm(bits: int, harms: dict[tuple[str, int], float], name: str) -> float:
    """Harm of bits too fine to be tried: noise power falls fourfold with every bit, from the finest that was tried."""
    finest = max(b for n, b in harms if n == name)
    return 0.0 if bits == 16 else harms[name, finest] * 4.0 ** (finest - bits)


def untouched(part: list[Option]) -> Option:
    """The option that leaves a part as it is, in 16 bits."""
    return next(o for o in part if o.value.cut == 0 and set(o.value.bits.values()) == {16})


def methods_for(choices: list[PartChoice], layers: int, group: int, calibration: int) -> list:
    """The method values that build what was chosen: first the cuts, then the bits."""
    from netsuke.compress.quantize import Quantize

    cuts = [{"mlp": 0.0, "qk": 0.0, "vo": 0.0} for _ in range(layers)]
    bits: dict[str, int] = {}
    for c in choices:
        bits.update(c.bits)
        if c.layer is not None:
            cuts[c.layer][c.module] = c.cut
    out: list = []
    if any(f > 0 for row in cuts for f in row.values()):
        per_block = tuple((r["mlp"], r["qk"], r["vo"]) for r in cuts)
        out.append(MoDeGPT(per_block=per_block, calibration=calibration))
    if any(b < 16 for b in bits.values()):
        out.append(Quantize(bits=16, group=group, per_layer=bits, calibration=calibration))
    return out
