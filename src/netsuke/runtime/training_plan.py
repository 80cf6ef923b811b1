"""What training a Llama takes in memory: the ledger of a step, by arithmetic alone.

    before the step   weights, optimizer states
    forward           + what autograd saves in every block that trains, + logits and their log-softmax
    backward          saved tensors leave block by block, gradients come; the loss holds three matrices of (B·T, V) at once
    optimizer         gradients of all that trains, + the temporaries of the largest matrix

The peak is the largest of these moments, in a process that gives freed tensors back (runtime/allocator.py); with glibc's own
limits it is up to a third more. What is saved per block was read off a ledger of saved tensors
(measure/saved.py); the tests hold the two together to the byte. With scope "last-K" only the last K blocks train, whole:
nothing is saved before them ("last-1" costs little more than running the model), and gradients pass through the frozen head.

Letters: B batch, T tokens of a window, C width, H heads, K key heads, F hidden, V vocabulary.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netsuke.errors import NetsukeError
from netsuke.runtime.memory_plan import F32, MAPS, Layer, flash_tiles, linear_layers, panels, small_tensors

if TYPE_CHECKING:
    from netsuke.models.llama import LlamaConfig

# What the first step touches beside its tensors: torch's optimizers import its compiler (sympy and 800 modules, 74 MB), then
# kernels, their tables and small objects as in RUNTIME. Measured with models of 0.1 to 10 million parameters, torch 2.13,
# Python 3.11: 98 to 107 MB.
TRAINING_RUNTIME = 100_000_000
OPTIMIZERS = ("loop", "adamw", "muon")


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes. `peak` is the sum of the six as they are at `moment`; `gradients` may be 0 there (the loss comes first)."""

    weights: int
    optimizer: int
    gradients: int
    saved: int
    buffers: int
    runtime: int
    moment: str

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer + self.gradients + self.saved + self.buffers + self.runtime

    def as_dict(self) -> dict[str, int]:
        names = ("weights", "optimizer", "gradients", "saved", "buffers", "runtime", "peak")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Scene:
    """The state at one moment of a step: gradients, saved tensors, transient tensors."""

    name: str
    gradients: int
    saved: int
    buffers: int


def first_trained(cfg: LlamaConfig, scope: str) -> int:
    """The first block that trains: 0 for "full" and "last-N" with all blocks. Raises NetsukeError for other words."""
    blocks = len(cfg.blocks)
    if scope == "full":
        return 0
    match = re.fullmatch(r"last-(\d{1,6})", scope)
    if match is None or not 1 <= int(match[1]) <= blocks:
        raise NetsukeError(
            f"plan training of {scope!r}", "that is no part of this model", f"full, or last-1 to last-{blocks}"
        )
    return blocks - int(match[1])


def trained_names(cfg: LlamaConfig, scope: str, names: Iterator[str] | list[str]) -> set[str]:
    """The parameters of `names` that train: all, or those of the last K blocks (maps, biases and norms)."""
    if scope == "full":
        return set(names)
    first = first_trained(cfg, scope)
    return {n for n in names if n.startswith("blocks.") and int(n.split(".")[1]) >= first}


def block_saved(cfg: LlamaConfig, i: int, B: int, T: int, bf16: bool, leads: bool) -> int:
    """Bytes that autograd saves in block `i` (all of it trains), without casts of weights.

    leads  whether no gradient goes on to the blocks before: the first norm then keeps its normed input alone
    """
    n, H, K, C = B * T, cfg.heads, cfg.kv_heads, cfg.width
    qk, vd, hidden = 2 * cfg.pair_count(i), cfg.blocks[i].value_dim, cfg.blocks[i].hidden
    wide, half = max(qk, vd), 2 if bf16 else F32
    # x, its inverse norm and the normed x; a norm's weighted output is one tensor for its readers, or one cast for each
    norms = F32 * n * ((1 if leads else 2) * C + (0 if leads else 1) + 2 * C + 1)
    inputs = n * C * (2 * (3 + 2) if bf16 else F32 * 2)
    turns = half * T * qk // 2 * 2 * (1 if cfg.blocks[i].pairs is None else K + H)
    if bf16 and cfg.blocks[i].pairs is None:
        turns *= 2  # cast once for the queries and once for the keys
    # q, k, v, the kernel's output and log-sums; the heads in order, a copy, are what `o` reads
    heads = half * n * (2 * H * wide + 2 * K * wide + H * vd) + F32 * n * H
    if cfg.window is not None and cfg.window < T:
        heads += half * T * T
    if cfg.qk_norm:
        heads += F32 * n * (H + K) * (2 * qk + 1)
    return norms + inputs + turns + heads + half * n * 4 * hidden


def narrow_copies(maps: list[Layer], trained: bool, bf16: bool) -> int:
    """Bytes of weights that are kept for the backward pass in another dtype than the stored one."""
    if bf16:
        return sum(2 * m.outs * m.ins for m in maps)
    return 0 if trained else sum(F32 * m.outs * m.ins for m in maps if not m.plain)


def optimizer_states(maps: list[Layer], vectors: int, optimizer: str) -> int:
    """Bytes of the states: AdamW keeps two numbers per parameter, Muon one. In train/loop.py ("loop") Muon takes the
    matrices inside the blocks and AdamW the rest; "muon" gives it the table and the head too."""
    one = sum(m.bytes for m in maps if optimizer == "muon" or (optimizer == "loop" and m.name.startswith("blocks.")))
    return 2 * (sum(m.bytes for m in maps) + vectors) - one


def step_temporaries(maps: list[Layer], optimizer: str) -> int:
    """Bytes of the largest matrix's temporaries: AdamW's root and denominator, or Muon's update, its bfloat16 copy
    before and after a Newton-Schulz step, and three Gram matrices."""

    def muon(m: Layer) -> int:
        n, short = m.outs * m.ins, min(m.outs, m.ins)
        return n * (F32 + 2 * 2) + 3 * 2 * short * short

    by_muon = [m for m in maps if optimizer == "muon" or (optimizer == "loop" and m.name.startswith("blocks."))]
    by_adam = [m for m in maps if m not in by_muon]
    return max([2 * m.bytes for m in by_adam] + [muon(m) for m in by_muon], default=0)


def scenes(
    cfg: LlamaConfig, maps: dict[str, Layer], B: int, T: int, scope: str, optimizer: str, bf16: bool, threads: int
) -> Iterator[Scene]:
    """The moments of one step that can be its peak."""
    n, C, V, H = B * T, cfg.width, cfg.vocab, cfg.heads
    row = F32 * n
    first, last = first_trained(cfg, scope), len(cfg.blocks) - 1
    full = scope == "full"
    half = 2 if bf16 else F32
    own = {i: [maps[f"blocks.{i}.{name}"] for name in MAPS] for i in range(len(cfg.blocks))}
    table, head = maps["embed"], maps["embed" if cfg.tied else "head"]
    norms = F32 * 2 * C

    saved = {
        i: block_saved(cfg, i, B, T, bf16, leads=i == first and not full) + narrow_copies(own[i], True, bf16)
        for i in range(first, last + 1)
    }  # fmt: skip
    ends = row * (C + 1) + (row * C + half * n * C if full else 0) + narrow_copies([head], full, bf16)
    kept = sum(saved.values()) + ends + 8 * n * (2 if full else 1)  # the ids of the table and of the loss

    widest = max(range(len(cfg.blocks)), key=lambda i: cfg.blocks[i].hidden)
    hidden = cfg.blocks[widest].hidden
    if first > 0:  # the frozen blocks run as in inference, without a cache
        yield Scene("forward, frozen blocks", 0, 0, row * 3 * C + half * n * 3 * hidden)
    wide = half * n * V + (row * V if bf16 else 0)  # logits, widened for the loss
    yield Scene("forward, loss", 0, kept, wide + row * V)
    yield Scene("backward, loss", 0, kept, 3 * row * V)

    grads = head.bytes if full else 0
    yield Scene("backward, head", grads, kept, row * V + (half * n * V if bf16 else 0) + half * n * C)
    kept -= ends
    passed = row * C  # the gradient of the residual stream
    for i in range(last, first - 1, -1):
        f = half * n * cfg.blocks[i].hidden
        dim = max(2 * cfg.pair_count(i), cfg.blocks[i].value_dim)
        y = half * n * H * dim
        grads += own[i][6].bytes
        yield Scene(f"backward, block {i}, gate times up", grads, kept - f, passed + 3 * f)
        grads += own[i][4].bytes + own[i][5].bytes
        # up, gate, silu and their input are gone; the gradients of q, k and v come for every head
        kept_here = kept - 4 * f - (4 if bf16 else 1) * half * n * C
        grads += own[i][3].bytes
        flash = flash_tiles(T, T, dim, threads) + row * H
        yield Scene(f"backward, block {i}, attention", grads, kept_here, passed + 4 * y + flash)
        grads += sum(m.bytes for m in own[i][:3]) + norms
        kept -= saved[i]
    if full:
        grads += 0 if cfg.tied else table.bytes
        yield Scene("backward, table", grads, 0, passed + table.bytes)
    trained = [m for i in range(first, last + 1) for m in own[i]] + (
        [table] + ([] if cfg.tied else [head]) if full else []
    )
    yield Scene("optimizer", grads, 0, step_temporaries(trained, optimizer))


def training_plan(
    cfg: LlamaConfig,
    layers: dict[str, dict],
    *,
    tokens: int,
    batch: int,
    scope: str = "full",
    optimizer: str = "loop",
    bf16: bool = False,
    threads: int | None = None,
) -> TrainingPlan:
    """The peak of one step of train/loop.py on `batch` windows of `tokens` tokens, next-token loss.

    Raises NetsukeError for a scope that the model does not have, an unknown optimizer, sizes below one, and for maps that
    are to train and are not stored as floats.
    """
    if optimizer not in OPTIMIZERS:
        raise NetsukeError("plan training", f"optimizer {optimizer!r}", ", ".join(OPTIMIZERS))
    if min(tokens, batch) < 1:
        raise NetsukeError("plan training", f"{batch} windows of {tokens} tokens", "1 or more each")
    threads = threads or os.cpu_count() or 1
    maps = linear_layers(cfg, layers)
    names = trained_names(cfg, scope, list(maps))
    first_trained(cfg, scope)
    trained = [m for name, m in maps.items() if name in names]
    packed = next((m for m in trained if m.spec.get("kind") != "dense"), None)
    if packed is not None:
        raise NetsukeError(
            f"plan training of {scope!r}", f"{packed.name} is stored as {packed.spec['kind']}", "dense weights",
            "the model before it was quantized",
        )  # fmt: skip
    blocks = len(cfg.blocks) - first_trained(cfg, scope)
    vectors = F32 * (2 * cfg.width * blocks + (cfg.width if scope == "full" else 0))
    top = max(
        scenes(cfg, maps, batch, tokens, scope, optimizer, bf16, threads),
        key=lambda s: s.gradients + s.saved + s.buffers,
    )
    return TrainingPlan(
        weights=sum(m.bytes for m in maps.values()) + small_tensors(cfg),
        optimizer=optimizer_states(trained, vectors, optimizer),
        gradients=top.gradients, saved=top.saved, buffers=top.buffers + panels(maps, threads), runtime=TRAINING_RUNTIME,
        moment=top.name,
    )  # fmt: skip
