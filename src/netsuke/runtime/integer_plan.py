"""What a model with static grids takes in the integer-only decoder: memory to the byte, before a weight is read.

Weights are read with PyTorch and handed over block by block: 8-bit codes are copied and the block's own let go, 4-bit codes
are used where they lie. Beside them the decoder keeps a multiplier and a bias per row, and tables of cosines and sines per
position. What is beside all that (`RUNTIME`) is measured.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import replace
from pathlib import Path

from netsuke.devices import Device
from netsuke.devices.cost import Cost
from netsuke.errors import NetsukeError
from netsuke.models.files import read_json
from netsuke.models.llama import LINEARS, Llama, LlamaConfig
from netsuke.models.load import find, open_artifact
from netsuke.models.places import MANIFEST
from netsuke.runtime.engine import CHUNK
from netsuke.runtime.integer import ASKED, check_context, check_map, check_table, static_grids
from netsuke.runtime.integer_engine import LOGIT_BYTES
from netsuke.runtime.integer_native import Block, check_narrow, integer_library, widest
from netsuke.runtime.memory_plan import Layer, MemoryPlan, linear_layers, loading_peak, small_tensors
from netsuke.runtime.native_plan import native_work

# What opening and running touch beside what is counted: kernels of the torch library that unpack codes, parsed headers, holes in
# the heap. Measured: the peak of fresh processes above their idle level, less what the decoder counts, 38 to 86 MB: 6.7 to 8.7.
RUNTIME = 7_500_000
ROW = 12  # bytes beside a row's codes: multiplier and bias
FIXED_TABLES = 8 * (257 + 256) + 2 * 256  # of a block: exp twice, silu


def headers_of(path: str | Path) -> Llama:
    """The model of an artifact with its grids and without its weights, held against what the decoder runs.

    Raises NetsukeError, naming the map or site, for what the decoder would refuse, and as models.load.load does.
    """
    folder, _ = find(path)
    model = open_artifact(folder, read_json(folder / MANIFEST), verify=False).model
    for i, block in enumerate(model.blocks):
        check_narrow(i, static_grids(block))
        for name in LINEARS:
            check_map(f"blocks.{i}.{name}", getattr(block, name).spec(), getattr(block, name).ins)
    for name in ("embed", "head"):
        if (table := getattr(model, name)) is not None:
            check_table(name, table.spec(), table.ins)
    return model


def kept_bytes(m: Layer) -> int:
    """Bytes that the decoder keeps of a map of a block."""
    codes = (m.ins + 1) // 2 if m.spec["bits"] == 4 else m.ins
    return m.outs * (codes + ROW)


def table_bytes(cfg: LlamaConfig, context: int) -> int:
    """Bytes of tables, and of the structures that point to weights."""
    turns = sum(
        4 * 8 * context * cfg.pair_count(i) * (1 if b.pairs is None else cfg.kv_heads) for i, b in enumerate(cfg.blocks)
    )
    return turns + len(cfg.blocks) * (FIXED_TABLES + ctypes.sizeof(Block))


def integer_plan(model: Llama, *, context: int, batch: int = 1, chunk: int = CHUNK) -> MemoryPlan:
    """The peak of running a model (`headers_of`) for `context` tokens of `batch` sequences.

    Raises NetsukeError for sizes that the decoder does not take.
    """
    cfg = model.cfg
    check_context(context, cfg)
    if not 1 <= batch <= chunk:
        raise NetsukeError(ASKED, f"{batch} slots and {chunk} rows at a time", "1 or more slots, and as many rows")
    maps = linear_layers(cfg, {name: m.spec() for name, m in model.linears().items()})
    ends = {name: maps[name] for name in ("embed", "head") if name in maps}
    blocks = [[maps[f"blocks.{i}.{name}"] for name in LINEARS] for i in range(len(cfg.blocks))]
    parts = {m.name: m.outs * (m.ins + 1) for m in ends.values()} | {
        m.name: kept_bytes(m) for m in itertools.chain.from_iterable(blocks)
    }
    # multipliers of the table's rows (int32) and of the head's (int64), zero points of both, norms' multipliers
    rows = cfg.vocab * (4 + 8) + (cfg.vocab if cfg.tied else 0) + 4 * cfg.width * (2 * len(cfg.blocks) + 1)
    tables, weights = table_bytes(cfg, context), sum(parts.values()) + rows
    cache = batch * context * sum(cfg.kv_width(i) for i in range(len(cfg.blocks)))
    room = integer_library().nsi_room(widest(cfg), context, chunk) + batch * cfg.vocab * LOGIT_BYTES
    running = weights + cache + room + tables
    buffers, moment = tables, f"a pass of {chunk} tokens"
    building, block = _building(maps, blocks)
    building += rows + tables + small_tensors(cfg)
    loading, name = loading_peak(maps)
    for size, when in ((building, f"handing over block {block}"), (loading, f"loading {name}")):
        if size > running:
            buffers, moment, running = buffers + size - running, when, size
    return MemoryPlan(weights, cache, room, buffers, RUNTIME, moment, parts)


def _building(maps: dict[str, Layer], blocks: list[list[Layer]]) -> tuple[int, int]:
    """The most bytes of maps that are alive, PyTorch's and the decoder's, while blocks are handed over one by one."""
    alive, best, where = sum(m.bytes for m in maps.values()), 0, 0
    for i, block in enumerate(blocks):
        shared = sum(m.outs * ((m.ins + 1) // 2) for m in block if m.spec["bits"] == 4)
        alive += sum(kept_bytes(m) for m in block) - shared
        if alive > best:
            best, where = alive, i
        alive -= sum(m.bytes for m in block) - shared
    return best, where


def integer_cost(card: Device, model: Llama, *, context: int, tokens: int, batch: int = 1) -> Cost:
    """What a pass over `tokens` tokens costs on a device (native_plan.native_work), on one of its cores. Attention multiplies
    32-bit integers, which is counted as float32 is."""
    specs = {name: m.spec() for name, m in model.linears().items()}
    work = native_work(model.cfg, specs, context=context, tokens=tokens, batch=batch, kv="int8")
    work = replace(work, layers=0)  # no threads that meet
    alone = card.cost(replace(work, macs=work.macs * card.cores, float_macs=work.float_macs * card.cores))
    return replace(card.cost(work), latency=alone.latency, bound=alone.bound)
