"""What `fit` may choose between: for every part of a model, its widths, ranks, bits and the share of its weights that a token
reads, each with its cost and measured harm.

A part is a module pair of a block (feed-forward, query/key, value/output) or the embedding. Its options are all
combinations of a form (as it is, a MoDeGPT cut, or thin factors), of bits per linear map and, where traffic matters, of
input sparsity. Harm is measured, not guessed: the part is replaced by its cut
or quantized self, everything else left alone, and the divergence KL(before || after) of the next-token distribution on
probe text is taken (nats per token). For a calibrated model that is the expected rise of the loss, without its noise: the
rise on a few thousand tokens goes either way by more than most parts cost, and an allocator that believes it picks the
luckiest parts (measured on pycode at 4 MB: a rise of 4 % where plain rounding had 2 %). Form, bits and sparsity are taken
to add up; the sum is a prediction that `fit` checks by measuring what it built.

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
from netsuke.compress.decompose import whitened_svd
from netsuke.compress.factorize import Factorize, rank_for
from netsuke.compress.modegpt import PARTS, MoDeGPT, block_stats, cut_module, full_width, widths_for
from netsuke.compress.quantize import quantize_linear, table_solver
from netsuke.compress.sparse_channels import Candidate, block_maps
from netsuke.compress.statistics import collect
from netsuke.devices import Device, Work
from netsuke.layers.linear import Dense, LinearBase
from netsuke.layers.lowrank import LowRank
from netsuke.layers.registry import layer_bytes
from netsuke.models.llama import Block, BlockShape, Llama, rope_table
from netsuke.tasks.language import LanguageModeling

CUTS = (0.0, 0.125, 0.25, 0.375, 0.5)
BITS = (16, 8, 4, 3, 2)
RANKS = (0.75, 0.5)  # of the break-even rank: factors beside cuts
SPARSITIES = (0.3, 0.5)  # of the weights of a part, unread by a decoded token


@dataclass(frozen=True)
class PartChoice:
    """One option of one part: the share of its width removed, bits per linear map ("blocks.0.gate" -> 4), the rank of its
    factors as a share of the break-even rank (None: no factors), the share of its weights that a decoded token skips."""

    part: str
    layer: int | None
    module: str
    cut: float
    bits: dict[str, int]
    rank: float | None = None
    sparsity: float = 0.0


@dataclass(frozen=True)
class Form:
    """A shape that a part may take before rounding: a cut or factors, with its harm and the block's widths."""

    shape: BlockShape
    harm: float = 0.0
    cut: float = 0.0
    rank: float | None = None


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


def map_spec(outs: int, ins: int, bits: int, group: int, rank: float | None = None) -> dict:
    """How a linear map is stored at these bits, as one matrix or as factors of a share of the break-even rank."""
    spec = {"kind": "dense", "dtype": "float16"} if bits == 16 else {"kind": "quant", "bits": bits, "group": group}
    if rank is None:
        return spec
    return {"kind": "lowrank", "rank": rank_for(rank, outs, ins), "first": spec, "second": spec}


def map_cost(
    outs: int,
    ins: int,
    bias: bool,
    bits: int,
    group: int,
    device: Device,
    rank: float | None = None,
    sparsity: float = 0.0,
) -> dict[str, float]:
    """Bytes and seconds per generated token of one linear map on this device, in the native engine."""
    size = read = layer_bytes(map_spec(outs, ins, bits, group, rank), outs, ins, bias)
    macs = outs * ins if rank is None else rank_for(rank, outs, ins) * (outs + ins)
    if sparsity:  # the norms of the channels are stored and read beside what is left of the weights
        size, read, macs = size + 4 * ins, round((1 - sparsity) * size) + 4 * ins, round((1 - sparsity) * macs)
    work = Work(macs=macs, bytes_read=read, bits=32 if bits == 16 else 8)  # as the native engine multiplies
    cost = device.cost(work)
    return {"storage": size, "ram": size, "latency": cost.latency, "energy": cost.energy}


def offer(
    model: Llama, task: LanguageModeling, device: Device, *, group: int = 64, windows: int = 8, calibration: int = 32,
    cuts: tuple[float, ...] = CUTS, ranks: tuple[float, ...] = RANKS, bits: tuple[int, ...] = BITS,
    sparsities: tuple[float, ...] = (), modules: tuple[str, ...] = ("mlp", "qk", "vo"), kv_bytes: float = 0.0,
    on_trial: Callable[[int, int], None] | None = None,
) -> list[list[Option]]:  # fmt: skip
    """The options of every part of a dense model, harm measured on `windows` validation windows.

    `kv_bytes` is what one number per token and block of the key/value cache costs in RAM (tokens × bytes), so that
    narrower heads are credited with it. `sparsities` are worth their trials where latency or energy is scarce.
    """
    with torch.no_grad():
        trials = Trials(model, task, device, group, windows, calibration, bits, bool(sparsities), on_trial)
        trials.total = trials.count(cuts, ranks, sparsities, modules)
        parts = []
        for i in range(len(model.blocks)):
            rounding = trials.rounding(i)
            for module in PARTS:
                forms = trials.forms(i, module, cuts if module in modules else (), ranks)
                skipping = {0.0: 0.0} | {s: trials.sparse_harm(i, module, s) for s in sparsities}
                parts.append(list(trials.part_options(i, module, forms, rounding, skipping, kv_bytes)))
        return parts + [trials.table_options(name) for name in trials.tables]


class Trials:
    """Tries changes of single parts of a model, one by one, and prices them."""

    def __init__(
        self, model: Llama, task: LanguageModeling, device: Device, group: int, windows: int, calibration: int,
        bits: tuple[int, ...], sparse: bool, on_trial: Callable[[int, int], None] | None,
    ):  # fmt: skip
        self.model, self.cfg, self.device, self.group, self.bits = model, model.cfg, device, group, bits
        self.knobs, self.on_trial = MoDeGPT(calibration=calibration), on_trial
        self.probe = Probe(model, task.windows("validation")[:windows, :-1])
        self.channels = {n: Candidate(n, m) for n, m in block_maps(model).items()} if sparse else {}
        self.seen = collect(model, task, calibration, self.channels)
        self.stats = block_stats(self.seen, self.cfg)
        self.tables = ["embed"] + (["head"] if model.head is not None else [])
        self.tried = [b for b in bits if b <= 4]
        self.done = self.total = 0

    def count(self, cuts: tuple, ranks: tuple, sparsities: tuple, modules: tuple[str, ...]) -> int:
        per_block = 7 * len(self.tried) + len(modules) * sum(c > 0 for c in cuts) + 3 * (len(ranks) + len(sparsities))
        return len(self.cfg.blocks) * per_block + len(self.tables) * len(self.tried)

    def tick(self) -> None:
        self.done += 1
        if self.on_trial:
            self.on_trial(self.done, self.total)

    def harm(self, layer: int, linears: dict[str, LinearBase], shape: BlockShape | None = None) -> float:
        self.tick()
        return self.probe.block_harm(layer, with_linears(self.model.blocks[layer], linears, shape))

    def rounding(self, i: int) -> dict[tuple[str, int], float]:
        """Harm of every map of a block at every number of bits, by (name, bits)."""
        harms: dict[tuple[str, int], float] = {}
        for name in self.cfg.linear_shapes(i):
            for b in self.tried:
                gram = self.seen.grams[f"blocks.{i}.{name}"]
                small = quantize_linear(getattr(self.model.blocks[i], name), b, self.group, gram=gram)
                harms[name, b] = self.harm(i, {name: small})
            harms |= {(name, b): fine_harm(b, harms, name) for b in self.bits if b not in self.tried}
        return harms

    def forms(self, i: int, module: str, cuts: tuple[float, ...], ranks: tuple[float, ...]) -> list[Form]:
        """The part as it is, cut, and as factors."""
        shape, block = self.cfg.blocks[i], self.model.blocks[i]
        found = [Form(shape)]
        for cut in cuts:
            if cut > 0 and widths_for(self.cfg, i, module, cut) < full_width(self.cfg, i, module):
                changes, linears = cut_module(self.model, i, module, cut, self.stats[i], self.knobs)
                narrow = msgspec.structs.replace(shape, **changes)
                found.append(Form(narrow, self.harm(i, linears, narrow), cut))
        for rank in ranks:
            linears = {n: self.factors(getattr(block, n), f"blocks.{i}.{n}", rank) for n in PARTS[module]}
            found.append(Form(shape, self.harm(i, linears), rank=rank))
        return found

    def factors(self, old: Dense, name: str, rank: float) -> LowRank:
        """The factors that `factorize` makes of a map."""
        gram = self.seen.grams[name].mean()
        left, right = whitened_svd(gram, old.weight.T, rank_for(rank, old.outs, old.ins), Factorize().floor)
        return LowRank(Dense(left.T.float()), Dense(right.T.float(), None if old.bias is None else old.bias.detach()))

    def sparse_harm(self, i: int, module: str, sparsity: float) -> float:
        """Harm of skipping this share of the weights of a part's maps in all tokens but the first."""
        linears = {n: self.channels[f"blocks.{i}.{n}"].build(sparsity, 1.0) for n in PARTS[module]}
        for layer in linears.values():
            layer.always, layer.prompt = True, 1
        return self.harm(i, linears)

    def part_options(
        self, i: int, module: str, forms: list[Form], rounding: dict[tuple[str, int], float],
        skipping: dict[float, float], kv_bytes: float,
    ) -> Iterator[Option]:  # fmt: skip
        names = PARTS[module]
        for form in forms:
            narrow = msgspec.structs.replace(
                self.cfg, blocks=(*self.cfg.blocks[:i], form.shape, *self.cfg.blocks[i + 1 :])
            )
            shapes = narrow.linear_shapes(i)
            cached = {"mlp": 0, "qk": 2 * narrow.pair_count(i), "vo": form.shape.value_dim}[module] * self.cfg.kv_heads
            for sparsity, unread in skipping.items() if form.rank is None else ((0.0, 0.0),):
                prices = {
                    (n, b): map_cost(*shapes[n], b, self.group, self.device, form.rank, sparsity)
                    for n in names for b in self.bits
                }  # fmt: skip
                for combo in product(self.bits, repeat=len(names)):
                    costs = [prices[n, b] for n, b in zip(names, combo)]
                    total = {k: sum(c[k] for c in costs) for k in costs[0]}
                    total["ram"] += cached * kv_bytes
                    # what is left of a cut part carries that much less rounding noise
                    harm = form.harm + unread + (1 - form.cut) * sum(rounding[n, b] for n, b in zip(names, combo))
                    chosen = {f"blocks.{i}.{n}": b for n, b in zip(names, combo)}
                    value = PartChoice(f"blocks.{i}.{module}", i, module, form.cut, chosen, form.rank, sparsity)
                    yield Option(value, harm, total)

    def table_options(self, name: str) -> list[Option]:
        """Options of the embedding table or a separate head. A table that is only looked up costs no bandwidth."""
        table: Dense = getattr(self.model, name)
        tied = name == "embed" and self.model.head is None
        harms: dict[tuple[str, int], float] = {}
        for b in self.tried:
            solver, damp = table_solver(tied, name, b)
            small = quantize_linear(table, b, self.group, solver, self.seen.grams.get(name), name, damp)
            harms[name, b] = self.probe.table_harm(name, small)
            self.tick()
        out = []
        for b in self.bits:
            harm = harms[name, b] if b in self.tried else fine_harm(b, harms, name)
            cost = map_cost(table.outs, table.ins, table.bias is not None, b, self.group, self.device)
            if name == "embed" and not tied:
                cost["latency"] = cost["energy"] = 0.0
            out.append(Option(PartChoice(name, None, name, 0.0, {name: b}), harm, cost))
        return out


def fine_harm(bits: int, harms: dict[tuple[str, int], float], name: str) -> float:
    """Harm of bits too fine to be tried: noise power falls fourfold with every bit, from the finest that was tried."""
    finest = max(b for n, b in harms if n == name)
    return 0.0 if bits == 16 else harms[name, finest] * 4.0 ** (finest - bits)


def is_whole(choice: PartChoice) -> bool:
    """Whether the part keeps its widths, its rank and reads all its weights: nothing but rounding is done to it."""
    return choice.cut == 0 and choice.rank is None and choice.sparsity == 0


def untouched(part: list[Option]) -> Option:
    """The option that leaves a part as it is, in 16 bits."""
    return next(o for o in part if is_whole(o.value) and set(o.value.bits.values()) == {16})


def shares_read(choices: list[PartChoice]) -> dict[str, float]:
    """Share of its weights that a decoded token reads, by name of the maps that skip some."""
    return {n: 1 - c.sparsity for c in choices for n in c.bits if c.sparsity}


def methods_for(choices: list[PartChoice], layers: int, group: int, calibration: int) -> list:
    """The method values that build what was chosen: cuts, factors, bits, then what is skipped."""
    from netsuke.compress.quantize import Quantize
    from netsuke.compress.sparsify import Sparsify

    cuts = [{"mlp": 0.0, "qk": 0.0, "vo": 0.0} for _ in range(layers)]
    bits: dict[str, int] = {}
    for c in choices:
        bits.update(c.bits)
        if c.layer is not None:
            cuts[c.layer][c.module] = c.cut
    ranks = {n: c.rank for c in choices for n in c.bits if c.rank is not None}
    unread = {n: (1 - share, 1.0) for n, share in shares_read(choices).items()}
    out: list = []
    if any(f > 0 for row in cuts for f in row.values()):
        per_block = tuple((r["mlp"], r["qk"], r["vo"]) for r in cuts)
        out.append(MoDeGPT(per_block=per_block, calibration=calibration))
    if ranks:
        out.append(Factorize(per_layer=ranks, only=tuple(ranks), calibration=calibration))
    if any(b < 16 for b in bits.values()):
        out.append(Quantize(bits=16, group=group, per_layer=bits, calibration=calibration))
    if unread:
        out.append(Sparsify(sparsity=0.0, per_layer=unread, calibration=calibration))
    return out
