"""The integer-only decoder in C (native/src/integer.c): the codes of runtime/integer.py, bit for bit, at the machine's speed.

`NativeInteger` lays out the constants of an `IntegerModel` for the C code and keeps the key/value cache, int8 codes. It needs
8 bits at every site that a linear map reads and at the keys and values; the rest of the bit map is free.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.host import VECTORS, best_vectors, load_library
from netsuke.layers.static import StaticGrid, levels
from netsuke.models.llama import Llama, LlamaConfig
from netsuke.runtime.integer import ASKED, STREAM_BITS, IntegerBlock, IntegerLinear, IntegerModel, check_tokens
from netsuke.runtime.integer_ops import Norm, Rescale, centred

I32, I64, P = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


def _structure(name: str, *fields: tuple[Any, str]) -> type[ctypes.Structure]:
    """A C structure from (type, "names in order") pairs."""
    return type(name, (ctypes.Structure,), {"_fields_": [(n, kind) for kind, names in fields for n in names.split()]})


Scale = _structure("Scale", (I64, "bias"), (I32, "m second shift zero low high"))
Linear = _structure("Linear", (P, "w m bias"), (I32, "outs ins bits shift zero low high unused"))
NormOf = _structure("NormOf", (P, "m"), (I64, "eps"), (I32, "shift spare zero low high unused"))
Turn = _structure("Turn", (P, "cosine sine"), (Scale, "scale"))
Block = _structure(
    "Block", (Linear, "q k v o gate up down"), (NormOf, "attn_norm mlp_norm"), (Turn, "q_turn k_turn"),
    (Scale, "score mix gated middle joint"), (P, "coarse fine silu"), (I64, "steps"),
    (I32, "tables pairs value_dim hidden prob_zero prob_low prob_high q_zero k_zero v_zero q_rot_zero k_rot_zero heads_zero"),
    (I32, "stream_zero o_zero middle_zero down_zero silu_zero up_zero unused"),
)  # fmt: skip
Model = _structure(
    "Model", (P, "blocks table head table_zeros head_zeros entry head_m"), (Scale, "entered left"), (NormOf, "norm"),
    (I32, "count width vocab context heads kv_heads window head_shift widest unused"),
)  # fmt: skip
Call = _structure(
    "Call", (P, "ids slots at want cache logits"), (ctypes.c_uint64, "stride"), (I32, "rows unused")
)  # fmt: skip
STRUCTURES = (Scale, Linear, NormOf, Turn, Block, Model, Call)
ZEROS = ("q", "k", "v", "q_rot", "k_rot", "heads", "attn_stream", "o", "mlp_stream", "down", "silu", "up")  # as in C
NARROW = ("attn_in", "mlp_in", "heads", "hidden", "k_rot", "v", "gate")


def integer_library(vectors: int | None = None) -> ctypes.CDLL:
    """The executor in C, built for this processor or a level of `graph.host.VECTORS`. Raises NetsukeError for a library of
    another version and when none was built."""
    library = load_library(VECTORS[best_vectors() if vectors is None else vectors].replace("_mcu", "_integer"))
    sizes = (I32 * (2 * len(STRUCTURES)))()  # with room for those of another version
    if library.nsi_sizes(sizes) != len(STRUCTURES) or sizes[: len(STRUCTURES)] != [
        ctypes.sizeof(s) for s in STRUCTURES
    ]:
        found = "the library of the integer decoder is of another version"
        raise NetsukeError(ASKED, found, "", "install the package again")
    library.nsi_forward.argtypes = [P, P]
    library.nsi_room.argtypes, library.nsi_room.restype = [I32] * 3, ctypes.c_uint64
    return library


def check_narrow(i: int, grids: Mapping[str, StaticGrid]) -> None:
    """Raises NetsukeError for the first site of block i that the C code wants in 8 bits and that has 16."""
    for site in NARROW:
        if grids[site].bits != 8:
            raise NetsukeError(
                ASKED, f"blocks.{i}.{site} has {grids[site].bits} bits", "8 bits there", "--backend torch"
            )


def widest(cfg: LlamaConfig) -> int:
    """The most codes of one token that lie side by side."""
    return max(
        cfg.width,
        *(max(b.hidden, cfg.heads * b.value_dim, cfg.heads * 2 * cfg.pair_count(i)) for i, b in enumerate(cfg.blocks)),
    )


class NativeInteger:
    """`slots` sequences, each as `IntegerModel` computes it; `forward` and `generate` run the first, with the arguments and
    errors of `IntegerModel`. `sizes`: bytes of what is kept, {weights, tables}.

    release   the layers of `integer`'s maps are let go one block after the other: it is of no use afterwards
    """

    def __init__(self, integer: IntegerModel, vectors: int | None = None, slots: int = 1, release: bool = False):
        self.cfg, self._kept, self.sizes = integer.cfg, [], Counter()
        library = integer_library(vectors)
        self._forward, self._room = library.nsi_forward, library.nsi_room
        blocks = (Block * len(integer.blocks))()
        for i, block in enumerate(integer.blocks):
            blocks[i] = self._block(integer, i)
            if release:
                block.linear.clear()
        self._kept.append(blocks)
        self.sizes["tables"] += ctypes.sizeof(blocks)
        cfg, first = self.cfg, integer.blocks[0].grids["attn_stream"]
        entered = Scale(1 << (integer.entry.shift - 1), 0, 0, integer.entry.shift, first.zero, *levels(first.bits))
        top = (1 << (STREAM_BITS + 1)) - 1
        left = Scale(1 << (integer.exit_shift - 1), *map(int, integer.exit), integer.exit_shift, 0, -top, top)
        self._model = Model(
            ctypes.addressof(blocks), table := self._at(integer.table),
            table if integer.head is integer.table else self._at(integer.head),
            self._at(integer.table_zeros.astype(np.uint8)), self._at(integer.head_zeros.astype(np.uint8)),
            self._at(integer.entry.m), self._at(integer.head_m.astype(np.int64)), entered, left, self._norm(integer.norm),
            len(blocks), cfg.width, cfg.vocab, cfg.context, cfg.heads, cfg.kv_heads, cfg.window or 0, integer.head_shift,
            widest(cfg),
        )  # fmt: skip
        self._cache = np.zeros((slots, sum(cfg.kv_width(i) for i in range(len(blocks))) * cfg.context), np.int8)
        self._lengths = [0] * slots

    @classmethod
    def of_model(cls, model: Llama, vectors: int | None = None) -> NativeInteger:
        """Raises NetsukeError, naming the map or site, for anything that is not a static integer of these widths."""
        return cls(IntegerModel.of_model(model), vectors)

    def _at(self, array: np.ndarray, part: str = "weights") -> int:
        """The address of an array that stays for as long as this object."""
        self._kept.append(np.ascontiguousarray(array))
        self.sizes[part] += self._kept[-1].nbytes
        return self._kept[-1].ctypes.data

    def _linear(self, linear: IntegerLinear) -> Linear:
        r, layer = linear.rescale, linear.layer
        m = np.broadcast_to(r.m, (layer.outs,)).astype(np.int32)
        # the zero point is taken out of the sum here, once; beside 8-bit weights so are the 128 that make x unsigned
        away = linear.row_sums() * (linear.x.zero + (0 if linear.bits == 4 else 128)) * m
        bias = r.bias + (np.int64(1) << (r.shift - 1)) - away
        bits = 4 if linear.bits == 4 else 8
        stored = layer.codes.numpy() if bits == 4 else linear.unpacked()  # 4 bits lie in the model as C reads them
        return Linear(
            self._at(stored),
            self._at(m),
            self._at(bias),
            layer.outs,
            layer.ins,
            bits,
            r.shift,
            r.grid.zero,
            *levels(r.grid.bits),
        )

    def _norm(self, norm: Norm) -> NormOf:
        return NormOf(self._at(norm.m), norm.eps, norm.shift, norm.spare, norm.zero, *levels(norm.bits))

    def _block(self, integer: IntegerModel, i: int) -> Block:
        b = integer.blocks[i]
        g = b.grids
        check_narrow(i, g)
        gate = np.arange(-128, 128, dtype=np.int8)
        silu = b.silu(centred(gate, g["gate"]) * centred(b.sigmoid, g["sigmoid"])).astype(np.int16)
        joint = integer.joints[i] if i < len(integer.joints) else b.middle
        cfg = self.cfg
        return Block(
            *(self._linear(b.linear[n]) for n in ("q", "k", "v", "o", "gate", "up", "down")),
            self._norm(b.attn_norm), self._norm(b.mlp_norm), self._turn(b, "q"), self._turn(b, "k"),
            *(_scale(s) for s in (b.score, b.mix, b.gated, b.middle, joint)),
            self._at(b.softmax.coarse, "tables"), self._at(b.softmax.fine, "tables"), self._at(silu, "tables"), b.softmax.steps,
            len(b.table["q"][0]), cfg.pair_count(i), cfg.blocks[i].value_dim, cfg.blocks[i].hidden,
            g["probs"].zero, *levels(g["probs"].bits),
            *(g[s].zero for s in ZEROS),
        )  # fmt: skip

    def _turn(self, b: IntegerBlock, name: str) -> Turn:
        cos, sin = b.table[name]
        return Turn(self._at(cos, "tables"), self._at(sin, "tables"), _scale(b.turn[name]))

    @property
    def length(self) -> int:
        """Tokens that the first sequence holds."""
        return self._lengths[0]

    def forward(self, ids: Sequence[int], every: bool = False) -> np.ndarray:
        """ids (T,) after the `length` tokens that are held -> logits (1, V) of the last, or (T, V) with `every`, int64 in
        steps of 2^-16."""
        ids = check_tokens(ids, self.cfg, self.length)
        want = np.full(len(ids), every)
        want[-1] = True
        return self.rows(ids, np.zeros(len(ids), np.int32), want)

    def rows(self, ids: np.ndarray, slots: np.ndarray, want: np.ndarray) -> np.ndarray:
        """Appends ids[i] to the sequence slots[i]; int64 logits (wanted rows, V) of the rows in `want`, in steps of 2^-16.

        What a row gives depends on its own sequence alone. Raises NetsukeError, and no sequence has grown, for tokens outside
        the vocabulary, a slot that there is none of, a full context, and without memory.
        """
        lengths, at = list(self._lengths), np.empty(len(ids), np.int32)
        if not len(ids) or min(ids) < 0 or max(ids) >= self.cfg.vocab:
            found = (
                f"token {max(ids)}" if len(ids) and min(ids) >= 0 else f"{len(ids)} tokens, from {min(ids, default=0)}"
            )
            raise NetsukeError(ASKED, found, f"tokens from 0 to {self.cfg.vocab - 1}")
        for i, slot in enumerate(slots.tolist()):
            if not 0 <= slot < len(lengths):
                raise NetsukeError(ASKED, f"slot {slot}", f"0 to {len(lengths) - 1}")
            at[i] = lengths[slot]
            lengths[slot] += 1
        if max(lengths) > self.cfg.context:
            raise NetsukeError(ASKED, f"{max(lengths)} tokens in a sequence", f"a context of {self.cfg.context}")
        ids, slots, want = ids.astype(np.int32), slots.astype(np.int32), want.astype(np.uint8)
        logits = np.empty((int(want.sum()), self.cfg.vocab), np.int64)
        arrays = (ids, slots, at, want, self._cache, logits)
        call = Call(*(a.ctypes.data for a in arrays), self._cache.shape[1], len(ids))
        if self._forward(ctypes.addressof(self._model), ctypes.addressof(call)):
            raise NetsukeError(ASKED, "there is no memory left", "", "a shorter prompt")
        self._lengths = lengths
        return logits

    def held(self, slot: int = 0) -> int:
        """Tokens that a sequence holds."""
        return self._lengths[slot]

    def truncate(self, slot: int, length: int) -> None:
        """Forgets what lies beyond the first `length` tokens. Raises NetsukeError when there are fewer."""
        if not 0 <= length <= self._lengths[slot]:
            raise NetsukeError("shorten a sequence", f"to {length} tokens", f"0 to {self._lengths[slot]}")
        self._lengths[slot] = length

    def copy(self, target: int, source: int, length: int) -> None:
        """Makes `target` hold the first `length` tokens of `source`. Raises NetsukeError when there are fewer."""
        if not 0 <= length <= self._lengths[source]:
            raise NetsukeError("copy a sequence", f"{length} of its tokens", f"0 to {self._lengths[source]}")
        at = 0
        for i, shape in enumerate(self.cfg.blocks):
            for width in (2 * self.cfg.pair_count(i), shape.value_dim):
                size = self.cfg.kv_heads * self.cfg.context * width
                part = self._cache[:, at : at + size].reshape(-1, self.cfg.kv_heads, self.cfg.context, width)
                part[target, :, :length] = part[source, :, :length]
                at += size
        self._lengths[target] = length

    def room(self, rows: int) -> int:
        """Bytes that a pass over `rows` tokens takes beside constants, cache and logits."""
        return self._room(widest(self.cfg), self.cfg.context, rows)

    @property
    def cache_bytes(self) -> int:
        return self._cache.nbytes

    def forget(self) -> None:
        """Begins a new sequence."""
        self.truncate(0, 0)

    def generate(self, ids: Sequence[int], new_tokens: int) -> Iterator[int]:
        """The most likely tokens after a prompt (the first of equals)."""
        self.forget()
        step = list(ids)
        for _ in range(new_tokens):
            token = int(self.forward(step)[-1].argmax())
            yield token
            step = [token]


def _scale(r: Rescale) -> Scale:
    """One ratio, or those of two terms."""
    m = [int(v) for v in r.m]
    return Scale(1 << (r.shift - 1), m[0], m[1] if len(m) > 1 else 0, r.shift, r.grid.zero, *levels(r.grid.bits))
