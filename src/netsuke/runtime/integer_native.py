"""The integer-only decoder in C (native/src/integer.c): the codes of runtime/integer.py, bit for bit, at the machine's speed.

`NativeInteger` lays out the constants of an `IntegerModel` for the C code and keeps the key/value cache, int8 codes. It needs
8 bits at every site that a linear map reads and at the keys and values; the rest of the bit map is free.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.host import VECTORS, best_vectors, load_library
from netsuke.layers.static import levels
from netsuke.models.llama import Llama
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
STRUCTURES = (Scale, Linear, NormOf, Turn, Block, Model)
ZEROS = ("q", "k", "v", "q_rot", "k_rot", "heads", "attn_stream", "o", "mlp_stream", "down", "silu", "up")  # as in C
NARROW = ("attn_in", "mlp_in", "heads", "hidden", "k_rot", "v", "gate")


class NativeInteger:
    """One sequence at a time, like `IntegerModel`, whose arguments and errors these are."""

    def __init__(self, integer: IntegerModel, vectors: int | None = None):
        self.cfg, self._kept = integer.cfg, []
        library = load_library(VECTORS[best_vectors() if vectors is None else vectors].replace("_mcu", "_integer"))
        sizes = (I32 * len(STRUCTURES))()
        library.nsi_sizes(sizes)
        if list(sizes) != [ctypes.sizeof(s) for s in STRUCTURES]:
            raise NetsukeError(
                ASKED, "the library of the integer decoder is of another version", "", "install the package again"
            )
        self._forward = library.nsi_forward
        self._forward.argtypes = [P, P, ctypes.c_int, ctypes.c_int, P, P, ctypes.c_int]
        blocks = (Block * len(integer.blocks))(*(self._block(integer, i) for i in range(len(integer.blocks))))
        self._kept.append(blocks)
        cfg, first = self.cfg, integer.blocks[0].grids["attn_stream"]
        entered = Scale(1 << (integer.entry.shift - 1), 0, 0, integer.entry.shift, first.zero, *levels(first.bits))
        top = (1 << (STREAM_BITS + 1)) - 1
        left = Scale(1 << (integer.exit_shift - 1), *map(int, integer.exit), integer.exit_shift, 0, -top, top)
        widths = [cfg.width]
        for i, b in enumerate(cfg.blocks):
            widths += [b.hidden, cfg.heads * b.value_dim, cfg.heads * 2 * cfg.pair_count(i)]
        self._model = Model(
            ctypes.addressof(blocks), self._at(integer.table), self._at(integer.head),
            self._at(integer.table_zeros.astype(np.uint8)), self._at(integer.head_zeros.astype(np.uint8)),
            self._at(integer.entry.m), self._at(integer.head_m.astype(np.int64)), entered, left, self._norm(integer.norm),
            len(blocks), cfg.width, cfg.vocab, cfg.context, cfg.heads, cfg.kv_heads, cfg.window or 0, integer.head_shift,
            max(widths),
        )  # fmt: skip
        self._cache = np.zeros(sum(cfg.kv_width(i) for i in range(len(blocks))) * cfg.context, np.int8)
        self.length = 0

    @classmethod
    def of_model(cls, model: Llama, vectors: int | None = None) -> NativeInteger:
        """Raises NetsukeError, naming the map or site, for anything that is not a static integer of these widths."""
        return cls(IntegerModel.of_model(model), vectors)

    def _at(self, array: np.ndarray) -> int:
        """The address of an array that stays for as long as this object."""
        self._kept.append(np.ascontiguousarray(array))
        return self._kept[-1].ctypes.data

    def _linear(self, linear: IntegerLinear) -> Linear:
        r, w = linear.rescale, linear.w
        m = np.broadcast_to(r.m, (len(w),)).astype(np.int32)
        # the zero point is taken out of the sum here, once; beside 8-bit weights so are the 128 that make x unsigned
        away = w.sum(1, dtype=np.int64) * (linear.x.zero + (0 if linear.bits == 4 else 128)) * m
        bias = r.bias + (np.int64(1) << (r.shift - 1)) - away
        stored = w
        if linear.bits == 4:
            codes = np.pad((w + 8).astype(np.uint8), ((0, 0), (0, w.shape[1] % 2)))
            stored = codes[:, 0::2] | codes[:, 1::2] << 4
        bits = 4 if linear.bits == 4 else 8
        return Linear(
            self._at(stored), self._at(m), self._at(bias), *w.shape, bits, r.shift, r.grid.zero, *levels(r.grid.bits)
        )

    def _norm(self, norm: Norm) -> NormOf:
        return NormOf(self._at(norm.m), norm.eps, norm.shift, norm.spare, norm.zero, *levels(norm.bits))

    def _block(self, integer: IntegerModel, i: int) -> Block:
        b = integer.blocks[i]
        g = b.grids
        for site in NARROW:
            if g[site].bits != 8:
                raise NetsukeError(
                    ASKED, f"blocks.{i}.{site} has {g[site].bits} bits", "8 bits there", "runtime.integer.IntegerModel"
                )
        gate = np.arange(-128, 128, dtype=np.int8)
        silu = b.silu(centred(gate, g["gate"]) * centred(b.sigmoid, g["sigmoid"])).astype(np.int16)
        joint = integer.joints[i] if i < len(integer.joints) else b.middle
        cfg = self.cfg
        return Block(
            *(self._linear(b.linear[n]) for n in ("q", "k", "v", "o", "gate", "up", "down")),
            self._norm(b.attn_norm), self._norm(b.mlp_norm), self._turn(b, "q"), self._turn(b, "k"),
            *(_scale(s) for s in (b.score, b.mix, b.gated, b.middle, joint)),
            self._at(b.softmax.coarse), self._at(b.softmax.fine), self._at(silu), b.softmax.steps,
            len(b.table["q"][0]), cfg.pair_count(i), cfg.blocks[i].value_dim, cfg.blocks[i].hidden,
            g["probs"].zero, *levels(g["probs"].bits),
            *(g[s].zero for s in ZEROS),
        )  # fmt: skip

    def _turn(self, b: IntegerBlock, name: str) -> Turn:
        cos, sin = b.table[name]
        return Turn(self._at(cos), self._at(sin), _scale(b.turn[name]))

    def forward(self, ids: Sequence[int], every: bool = False) -> np.ndarray:
        """ids (T,) after the `length` tokens that are held -> logits (1, V) of the last, or (T, V) with `every`, int64 in
        steps of 2^-16."""
        ids = check_tokens(ids, self.cfg, self.length).astype(np.int32)
        logits = np.empty((len(ids) if every else 1, self.cfg.vocab), np.int64)
        failed = self._forward(
            ctypes.addressof(self._model), ids.ctypes.data, len(ids), self.length, self._cache.ctypes.data,
            logits.ctypes.data, len(logits),
        )  # fmt: skip
        if failed:
            raise NetsukeError(ASKED, "there is no memory left", "", "a shorter prompt")
        self.length += len(ids)
        return logits

    def forget(self) -> None:
        """Begins a new sequence."""
        self.length = 0

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
