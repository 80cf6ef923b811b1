"""What a Llama takes in memory and work, by arithmetic alone: before a weight is read, for any device.

A plan follows the forward pass of models/llama.py step by step and adds up what is alive in each: the peak is the
largest step, not a sum of maxima. It is the peak of a process above its idle level (Python with torch and netsuke
imported), for `netsuke run`: weights as they are stored, a key/value cache allocated once for the whole context, prefill
in chunks, logits of the last position only. `tests/runtime/test_memory_plan.py` and `benchmarks/plan.py` hold it
against fresh processes.

Two things are measured, not derived, and are the same for every model: `RUNTIME` and the BLAS panel (`PANEL`).

Letters: B batch, T tokens of this pass, S tokens seen so far, C width, H heads, K key heads, F hidden, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from netsuke.devices import Work
from netsuke.errors import NetsukeError
from netsuke.runtime.allocator import LARGE

if TYPE_CHECKING:
    from netsuke.models.llama import LlamaConfig

SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
QUANT_PART = 10  # bytes for each weight of a quantized sparse map in work: itself, its scale as stored and as float32
CHANNEL = 20  # bytes for each input channel that a sparse map chooses from: scores, mask, indices, the chosen part of x
F32 = 4  # the pass computes in float32 however weights are stored
WIDENED = 1 << 17  # weights that layers/linear.py and layers/quantized.py widen at a time
# What loading and the first pass touch beside their tensors: kernels of the torch and BLAS libraries (10 MB of mapped code),
# their tables, torch's small objects, and holes in the heap. Measured with models of 0.1 to 30 MB on x86-64, torch 2.13.
RUNTIME = 11_000_000
# Floats of packed weights that a BLAS thread keeps: 192 inputs of at most 4096 outputs. Measured with MKL 2024.2, products
# of 256 rows with 170 to 32,768 outputs on 1 and 2 threads; it keeps them once the products have more than two rows.
PANEL = (192, 4096)
# The rest of a `netsuke run`: Python, torch (84 MB of it file-mapped), the command line, a tokenizer of 4096 entries. Measured:
# the largest resident size of `netsuke run pycode` less the peak planned for it.
PROCESS = {"torch": 252_000_000}
# Operators that models/llama.py launches for one pass: in each block, and beside the blocks. Views cost next to nothing and
# are not counted; a test counts the rest.
OPERATORS = (59, 10)
CHECKED = 1 << 16  # numbers that models/weights.py looks at in one piece
FLASH_ROWS = ((768, 256), (192, 64), (0, 32))  # query rows per tile of torch's fused attention, by T
FLASH_COLUMNS = 512
MAPS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Layer:
    """One linear map: its shape and spec, and what follows from them. Transient are the float32 copies of the weights in use;
    quantized weights pass through unpacked codes of one byte each."""

    name: str
    outs: int
    ins: int
    bias: bool
    spec: dict

    @property
    def bytes(self) -> int:
        """Bytes of its tensors, on disk and in memory alike."""
        kind, n = self.spec.get("kind"), self.outs * self.ins
        if kind == "dense":
            return (n + self.outs * self.bias) * SIZES[self.spec["dtype"]]
        if kind == "quant":
            groups = -(-self.ins // self.spec["group"])
            codes = (self.ins * self.spec["bits"] + 7) // 8
            row = codes + 3 * groups  # and a float16 scale and a zero point per group
            return self.outs * (row + self.bias * SIZES[self.spec.get("bias", "float32")])
        from netsuke.layers.registry import layer_bytes

        return layer_bytes(self.spec, self.outs, self.ins, self.bias)

    @property
    def factors(self) -> tuple[Layer, ...]:
        """The two thin maps inside a low-rank map, or beside a sparse one or an adapter's base."""
        if "rank" not in self.spec:
            return ()
        rank, own = self.spec["rank"], self.bias and self.spec["kind"] == "lowrank"
        return (
            Layer(f"{self.name}.first", rank, self.ins, False, self.spec["first"]),
            Layer(f"{self.name}.second", self.outs, rank, own, self.spec["second"]),
        )

    @property
    def base(self) -> tuple[Layer, ...]:
        """The map that an adapter stands beside."""
        if self.spec["kind"] != "adapter":
            return ()
        return (Layer(f"{self.name}.base", self.outs, self.ins, self.bias, self.spec["base"]),)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one row of x; a sparse map reads all channels, as it does in a prompt."""
        if self.spec["kind"] in ("lowrank", "adapter"):
            return sum(part.macs for part in (*self.base, *self.factors))
        return self.outs * self.ins

    @property
    def plain(self) -> bool:
        """Whether W is used as it lies in memory."""
        return self.spec.get("kind") == "dense" and self.spec["dtype"] == "float32"

    @property
    def float_bytes(self) -> int:
        """Bytes of one stored weight if it is a float, else 0."""
        return SIZES[self.spec["dtype"]] if "dtype" in self.spec else 0

    @property
    def rows(self) -> int:
        """Rows of W in one product."""
        if self.spec["kind"] in ("lowrank", "adapter"):
            return max(part.rows for part in (*self.base, *self.factors))
        if self.plain or self.spec["kind"] == "sparse":  # which works on a few inputs of all rows at a time
            return self.outs
        return min(self.outs, max(1, WIDENED // self.ins))

    def transient(self, n: int) -> int:
        """Bytes that the product with n rows of x takes beside x and y."""
        kind, factors = self.spec["kind"], self.factors
        if kind == "lowrank":
            return F32 * n * self.spec["rank"] + max(f.transient(n) for f in factors)
        if kind == "adapter":  # the base's result waits while the factors work, and both while they are added
            thin = F32 * n * (self.outs + self.spec["rank"]) + max(f.transient(n) for f in factors)
            return max(self.base[0].transient(n), thin, 2 * F32 * n * self.outs)
        if kind == "sparse":
            part = self.outs * min(self.ins, max(1, WIDENED // self.outs))
            gathered = part * (F32 if "dtype" in self.spec else QUANT_PART)
            if n > 1:
                return 0 if self.spec.get("dtype") == "float32" else gathered
            thin = F32 * (self.spec["rank"] + self.outs) + max(f.transient(1) for f in factors) if factors else 0
            return CHANNEL * self.ins + max(gathered, thin)
        if self.plain:
            return 0
        return self.rows * self.ins * (F32 if kind == "dense" else F32 + 2)

    def lookup(self, n: int) -> int:
        """Bytes that reading n rows of W takes beside them as float32 and as they are passed on."""
        row = F32 * n * self.ins
        if self.spec["kind"] == "lowrank":
            first, second = self.factors
            whole = 0 if first.plain else F32 * first.outs * first.ins
            return F32 * n * second.ins + max(second.lookup(n), whole)
        if self.spec["kind"] == "adapter":
            first, second = self.factors
            whole = 0 if first.plain else F32 * first.outs * first.ins
            return max(self.base[0].lookup(n), 2 * row + F32 * n * second.ins + max(second.lookup(n), whole))
        if self.spec["kind"] == "sparse":
            return self.transient(max(n, 2))
        return min(self.transient(n), 2 * row)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. `peak` is the sum of the five; `moment` says where in the pass it is reached, and `parts` what each layer
    keeps ("blocks.3.up" -> bytes)."""

    weights: int
    kv_cache: int
    activations: int
    buffers: int
    runtime: int
    moment: str
    parts: dict[str, int] = field(repr=False)

    @property
    def peak(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.buffers + self.runtime

    def as_dict(self) -> dict[str, int]:
        names = ("weights", "kv_cache", "activations", "buffers", "runtime", "peak")
        return {name: getattr(self, name) for name in names}

    def largest(self, count: int = 5) -> list[tuple[str, int]]:
        """The largest tensors and layers, the key/value cache among them."""
        everything = self.parts | {"key/value cache": self.kv_cache}
        return sorted(everything.items(), key=lambda item: -item[1])[:count]


@dataclass(frozen=True)
class Moment:
    """One step of a pass: the sizes in bytes of the tensors that are alive, and of transient buffers."""

    name: str
    tensors: tuple[int, ...]
    scratch: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(self.tensors) + sum(self.scratch)

    @property
    def in_heap(self) -> int:
        """Bytes of those that are too small to be mapped on their own (runtime/allocator.py)."""
        return sum(size for size in (*self.tensors, *self.scratch) if size < LARGE)


def linear_layers(cfg: LlamaConfig, layers: dict[str, dict]) -> dict[str, Layer]:
    """All linear maps in the order of the pass. Raises NetsukeError when `layers` lacks one, and for mixtures of experts."""
    if cfg.mixture is not None:
        found = f"block {cfg.mixture} is a mixture of {cfg.blocks[cfg.mixture].experts} experts"
        raise NetsukeError("plan the memory", found, "blocks with one feed-forward part", "netsuke run --backend torch")
    shapes = {"embed": (cfg.vocab, cfg.width, False)}
    for i in range(len(cfg.blocks)):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in cfg.linear_shapes(i).items()}
    if not cfg.tied:
        shapes["head"] = (cfg.vocab, cfg.width, False)
    missing = [name for name in shapes if name not in layers]
    if missing:
        raise NetsukeError("plan the memory", f"no spec for {', '.join(missing[:3])}", "one spec for each linear map")
    return {name: Layer(name, *shape, layers[name]) for name, shape in shapes.items()}


def uniform_specs(cfg: LlamaConfig, spec: dict) -> dict[str, dict]:
    """The same spec for every linear map: what a model would be if it were stored so."""
    names = ["embed", *(f"blocks.{i}.{m}" for i in range(len(cfg.blocks)) for m in cfg.linear_shapes(i))]
    names += [] if cfg.tied else ["head"]
    return dict.fromkeys(names, spec)


def small_tensors(cfg: LlamaConfig) -> int:
    """Bytes of norms (as float32) and rotary tables."""
    per_block = 2 * cfg.width + (2 * cfg.head_dim if cfg.qk_norm else 0)
    tables = sum(cfg.pair_count(i) * (1 if b.pairs is None else cfg.kv_heads) for i, b in enumerate(cfg.blocks))
    return F32 * (per_block * len(cfg.blocks) + cfg.width + tables)


def flash_tiles(T: int, S: int, dim: int, threads: int) -> int:
    """Bytes of the fused attention kernel's tiles, one set per thread."""
    rows = min(T, next(size for least, size in FLASH_ROWS if least <= T))
    return F32 * threads * rows * (min(FLASH_COLUMNS, S) + 2 + dim)


def block_moments(
    cfg: LlamaConfig, i: int, maps: dict[str, Layer], B: int, T: int, S: int, kv_bytes: int, threads: int
) -> Iterator[Moment]:
    """The steps of one block, as models/llama.py takes them; the residual that the caller holds is in each of them."""
    row, H, K, C = F32 * B * T, cfg.heads, cfg.kv_heads, cfg.width
    qk, vd, hidden = 2 * cfg.pair_count(i), cfg.blocks[i].value_dim, cfg.blocks[i].hidden
    x, q, k, v, y, f = row * C, row * H * qk, row * K * qk, row * K * vd, row * H * vd, row * hidden
    turns = F32 * T * qk * (1 if cfg.blocks[i].pairs is None else 1 + H)  # cos and sin
    yield Moment("norm", (x, x, x))
    yield Moment("q", (x, x, q), (maps["q"].transient(B * T),))
    yield Moment("v", (x, x, q, k, v), (max(maps["k"].transient(B * T), maps["v"].transient(B * T)),))
    if q >= k:
        yield Moment("rotation", (x, x, q, k, v, turns, q // 2, q // 2, q))
    else:
        yield Moment("rotation", (x, x, q, k, v, turns, k // 2, k // 2, k))
    held, wide, seen = (x, x, q, turns), max(qk, vd), ()
    if kv_bytes != F32:  # a narrow cache is widened for the block that reads it
        seen = (F32 * B * K * S * qk, F32 * B * K * S * vd)
    windowed = cfg.window is not None and cfg.window < S
    if T == 1 and not windowed:
        yield Moment("attention", (*held, F32 * B * H * S, F32 * B * H * S), seen)
    else:
        padded = (F32 * B * K * S * wide,) if qk != vd else ()
        if qk < vd:
            padded += (row * H * vd,)
        masked = S != T or windowed
        mask = (T * S, F32 * T * S) if masked else ()
        out = row * H * wide
        tiles, sums = flash_tiles(T, S, wide, threads), row * H
        yield Moment("attention", (*held, out), (*seen, *padded, *mask, tiles, sums))
        if H != K:
            yield Moment("heads together", (*held, out, out), (*seen, *padded, *mask[:1]))
        yield Moment("heads in order", (*held, out, y))
    yield Moment("o", (x, y, x), (maps["o"].transient(B * T),))
    yield Moment("up", (x, x, x, f, f), (max(maps["gate"].transient(B * T), maps["up"].transient(B * T)),))
    yield Moment("gate times up", (x, x, x, f, f, f))
    yield Moment("down", (x, x, x, x, f), (maps["down"].transient(B * T),))


def pass_moments(
    cfg: LlamaConfig, maps: dict[str, Layer], B: int, T: int, S: int, kv_bytes: int, threads: int
) -> Iterator[Moment]:
    """The steps of one forward pass over T tokens that ends with S tokens seen."""
    logits = F32 * B * cfg.vocab
    table = maps["embed"]
    row = F32 * B * T * cfg.width
    yield Moment("embedding", (row,) if table.plain else (row, row), (table.lookup(B * T),))
    for i in range(len(cfg.blocks)):
        own = {name: maps[f"blocks.{i}.{name}"] for name in MAPS}
        for m in block_moments(cfg, i, own, B, T, S, kv_bytes, threads):
            # the logits of the pass before are still held
            yield Moment(f"block {i}, {m.name}", (*m.tensors, logits), m.scratch)
    yield Moment("logits", (row, logits, logits), (maps["embed" if cfg.tied else "head"].transient(B),))


def passes(context: int, prompt: int, chunk: int) -> list[tuple[int, int]]:
    """(T, S) of the passes that can be the largest: the first chunk, the last full one, the rest, the last token."""
    first = min(prompt, chunk)
    full, rest = prompt // chunk * chunk, prompt % chunk
    out = [(first, first)] + ([(chunk, full)] if full > chunk else []) + ([(rest, prompt)] if full and rest else [])
    return [*out, (1, context)]


def panels(maps: dict[str, Layer], threads: int) -> int:
    """Bytes of packed weights that the BLAS library keeps."""
    depth, most = PANEL
    return F32 * threads * depth * min(most, max(m.rows for name, m in maps.items() if name.startswith("blocks.")))


def loading_peak(maps: dict[str, Layer]) -> tuple[int, str]:
    """The most that is alive while models/load.py reads one tensor after the other and looks for NaN in each, piece by
    piece (a copy of the piece and two masks); the layer at which it is reached."""
    total, best, where = 0, 0, ""
    order = [m for name, m in maps.items() if name != "embed"]
    for m in (maps["embed"], *order):
        total += m.bytes
        floats = [part for part in (m, *m.base, *m.factors) if part.float_bytes]
        alive = total + max((min(p.outs * p.ins, CHECKED) * (p.float_bytes + 2) for p in floats), default=0)
        if alive > best:
            best, where = alive, m.name
    return best, where


def inference_plan(
    cfg: LlamaConfig,
    layers: dict[str, dict],
    *,
    context: int,
    batch: int = 1,
    prompt: int | None = None,
    prefill_chunk: int = 256,
    kv_dtype: str = "float32",
    backend: str = "torch",
    threads: int | None = None,
) -> MemoryPlan:
    """The peak of running a model for `context` tokens, `prompt` of them (default: all but one) given at once.

    layers   name -> spec of each linear map, as `Described.layers` and `LinearBase.spec()` give them
    threads  torch's threads on that machine (default: the cores of this one); each has buffers of its own

    Raises NetsukeError for a missing layer, an unknown backend or dtype, and sizes below one.
    """
    if backend not in PROCESS:
        raise NetsukeError("plan the memory", f"backend {backend!r}", ", ".join(PROCESS))
    if kv_dtype not in SIZES:
        raise NetsukeError("plan the memory", f"a key/value cache of {kv_dtype!r}", ", ".join(SIZES))
    prompt = max(context - 1, 1) if prompt is None else prompt
    if min(context, batch, prompt, prefill_chunk) < 1 or prompt > context:
        raise NetsukeError(
            "plan the memory", f"context {context}, prompt {prompt}, batch {batch}, chunk {prefill_chunk}",
            "1 or more each, and a prompt no longer than the context",
        )  # fmt: skip
    threads = threads or os.cpu_count() or 1
    maps = linear_layers(cfg, layers)
    parts = {name: m.bytes for name, m in maps.items()}
    kv = SIZES[kv_dtype] * batch * context * sum(cfg.kv_width(i) for i in range(len(cfg.blocks)))
    moments = [
        m for T, S in passes(context, prompt, prefill_chunk)
        for m in pass_moments(cfg, maps, batch, T, S, SIZES[kv_dtype], threads)
    ]  # fmt: skip
    top = max(moments, key=lambda m: m.bytes)
    holes = max(m.in_heap for m in moments) - top.in_heap  # the heap keeps the size that its fullest moment gave it
    weights, kept = sum(parts.values()) + small_tensors(cfg), panels(maps, threads) if prompt > 2 else 0
    activations, buffers, moment = sum(top.tensors), sum(top.scratch) + holes + kept, top.name
    loading, layer = loading_peak(maps)
    if loading > (running := weights + kv + activations + buffers):  # before there is a cache or an activation
        buffers, moment = buffers + loading - running, f"loading {layer}"
    return MemoryPlan(weights, kv, activations, buffers, RUNTIME, moment, parts)


def work_of(
    cfg: LlamaConfig, layers: dict[str, dict], *, context: int, tokens: int, batch: int = 1, prefill_chunk: int = 256
) -> Work:
    """The work of one pass over `tokens` tokens: a prompt's prefill, or with `tokens` = 1 the decoding of one token after
    `context` - 1 others. One sequence or `batch` of them.

    Every weight is read once per chunk; of an embedding table that is no output head as well, only the tokens' rows. The
    output head works on the last position alone. A prefill reads back the keys and values that it writes. Arithmetic is
    float32 at any precision of storage, as in models/llama.py.
    """
    maps = linear_layers(cfg, layers)
    head = maps["embed" if cfg.tied else "head"]
    inner = [m for name, m in maps.items() if name.startswith("blocks.")]
    seen = context if tokens == 1 else tokens
    pairs = seen if tokens == 1 else tokens * (tokens + 1) / 2  # (query, key) pairs under the causal mask
    if cfg.window is not None:
        seen, pairs = min(seen, cfg.window), min(pairs, tokens * cfg.window)
    attention = sum(cfg.heads * (2 * cfg.pair_count(i) + b.value_dim) for i, b in enumerate(cfg.blocks))
    chunks = -(-tokens // prefill_chunk)
    kept = sum(m.bytes for m in inner) + small_tensors(cfg)
    read = chunks * (kept + head.bytes) + F32 * batch * seen * sum(cfg.kv_width(i) for i in range(len(cfg.blocks)))
    if not cfg.tied:
        read += min(batch * tokens, cfg.vocab) * maps["embed"].bytes // cfg.vocab
    macs = tokens * sum(m.macs for m in inner) + chunks * head.macs + pairs * attention
    return Work(
        macs=batch * macs, bytes_read=read, bits=32, layers=chunks * (OPERATORS[0] * len(cfg.blocks) + OPERATORS[1]),
        ram=inference_plan(cfg, layers, context=max(context, tokens), batch=batch).peak,
        storage=sum(m.bytes for m in maps.values()) + small_tensors(cfg),
    )  # fmt: skip
