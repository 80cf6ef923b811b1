"""What a Llama takes in the native engine: memory to the byte, and the work of a pass, before a weight is read.

The engine allocates one block, laid out by the same C code that plans it; its weights are pages of the mapped file. What
is beside them (`RUNTIME`, `PROCESS`) is measured, and the same for every model. runtime/memory_plan.py says the same of
the PyTorch runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netsuke.devices import Work
from netsuke.runtime.engine import CHUNK, plan_of
from netsuke.runtime.memory_plan import MemoryPlan, linear_layers, small_tensors

if TYPE_CHECKING:
    from netsuke.models.llama import LlamaConfig

# What opening and running touch beside the engine's block: its code, the parsed headers, logits handed to Python.
# Measured: the peak of fresh processes above their idle level, less weights and block, models of 13 to 600 MB.
RUNTIME = 1_500_000
# The rest of a `netsuke run` on the engine: Python, NumPy, the command line, a tokenizer of 4096 entries; no PyTorch.
# Measured: the largest resident size of `netsuke run pycode` less the peak planned for it.
PROCESS = 54_500_000
MEETINGS = 10  # times per block that the engine's threads wait for one another
# A meeting of spinning threads against waking them, which is the overhead that device cards state: 0.3 against 6
# microseconds on the machine of the benchmarks.
MEETING = 1 / 20
KV_BYTES = {"float16": 2, "int8": 1}


def native_plan(
    cfg: LlamaConfig, layers: dict[str, dict], *, context: int, batch: int = 1, threads: int | None = None,
    kv: str = "float16", chunk: int = CHUNK,
) -> MemoryPlan:  # fmt: skip
    """The peak of running a model for `context` tokens of `batch` sequences; `layers` as in memory_plan.inference_plan.

    Raises NetsukeError for a missing layer and for sizes that no engine takes.
    """
    maps = linear_layers(cfg, layers)
    got = plan_of(cfg, layers, context=context, slots=batch, threads=threads, kv=kv, chunk=chunk)
    parts = {name: m.bytes for name, m in maps.items()}
    weights = sum(parts.values()) + small_tensors(cfg)
    buffers = got["scratch"] + got["tables"]
    return MemoryPlan(weights, got["kv_cache"], got["activations"], buffers, RUNTIME, "allocated at the start", parts)


def native_work(
    cfg: LlamaConfig, layers: dict[str, dict], *, context: int, tokens: int, batch: int = 1, kv: str = "float16",
    shares: dict[str, float] | None = None,
) -> Work:  # fmt: skip
    """The work of one pass over `tokens` tokens: a prompt's, or with `tokens` = 1 the decoding of one token after
    `context` - 1 others.

    Weights are read once per pass of `CHUNK` rows; quantized maps multiply int8, all others and attention float32. Of an
    embedding table that is no output head only the tokens' rows are read. The head works on the last position alone.
    `shares` tells of input-sparse maps which share of their weights a decoded token reads (prompts read all).
    """
    maps = linear_layers(cfg, layers)
    head = maps["embed" if cfg.tied else "head"]
    inner = [m for name, m in maps.items() if name.startswith("blocks.")]
    seen = context if tokens == 1 else tokens
    pairs = seen if tokens == 1 else tokens * (tokens + 1) / 2  # (query, key) pairs under the causal mask
    if cfg.window is not None:
        seen, pairs = min(seen, cfg.window), min(pairs, tokens * cfg.window)
    attention = pairs * sum(cfg.heads * (2 * cfg.pair_count(i) + b.value_dim) for i, b in enumerate(cfg.blocks))
    passes = -(-tokens // CHUNK)
    rows = {m.name: tokens if m is not head else 1 for m in (*inner, head)}
    share = {m.name: (shares or {}).get(m.name, 1.0) if tokens == 1 else 1.0 for m in (*inner, head)}
    macs = {32: attention, 8: 0.0}
    for m in (*inner, head):
        for part in m.factors if m.spec["kind"] == "lowrank" else (m, *m.factors):
            macs[32 if part.float_bytes else 8] += rows[m.name] * share[m.name] * part.macs
    read = passes * (sum(round(share[m.name] * m.bytes) for m in (*inner, head)) + small_tensors(cfg))
    read += KV_BYTES[kv] * batch * seen * sum(cfg.kv_width(i) for i in range(len(cfg.blocks)))
    if not cfg.tied:
        read += min(batch * tokens, cfg.vocab) * maps["embed"].bytes // cfg.vocab
    return Work(
        macs=batch * macs[8], float_macs=batch * macs[32], bits=8, bytes_read=read,
        layers=passes * (1 + MEETINGS * len(cfg.blocks) * MEETING),
        ram=native_plan(cfg, layers, context=max(context, tokens), batch=batch, kv=kv).peak,
        storage=sum(m.bytes for m in maps.values()) + small_tensors(cfg),
    )  # fmt: skip
