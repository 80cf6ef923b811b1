"""An 8-bit LSTM layer: int8 in, int8 weights, int8 out, a 16-bit cell; the state lives on between runs.

LSTM of Hochreiter & Schmidhuber (1997) with forget gates, quantized after Li & Alvarez, "On the quantization of recurrent
neural networks" (2021), as TensorFlow Lite's "8x8_16" form. For each step t, with rows in the order i, f, g, o:

    a = sat16(sat16(q(W (x_t - zx) + b)) + q(U (h - zh)))     q(sum) = (sum * M + 2^(S-1)) >> S in int64, to Q3.12
    i, f, o = table(sigmoid, a)   g = table(tanh, a)    Q0.15; `look_up` interpolates in 513 entries
    c' = clip((f * c + ((i * g) >> (15 - n)) + 2^14) >> 15, -limit, limit)     int16, scale 2^-n, n in 9 … 15
    h' = clip(((o * table(tanh, sat16(c' in Q3.12)) * M + 2^(S-1)) >> S) + zh, -128, 127)

M and S are those of the ratio of scales to 2^-12, M per row, one pair for W and one for U (`gate_multipliers`), and of
2^-30 / scale_h for h; the sums are int32. The part of x saturates on its own, as in LiteRT (TensorFlow Lite Micro saturates
the part of h, too: the two differ where gates are saturated). c' goes to Q3.12 by a left shift of 12 - n bits, or a right
shift (half up) of n - 12.

inputs   x (1, T, I) int8, W (4 H, I) int8, U (4 H, H) int8, b (4 H) int32 of scale scale_x * scale_W, h (1, H) int8,
         c (1, H) int16 of scale 2^-n and zero point 0; scales of W and U are one per row
outputs  y (1, T, H), h', c' of the types and scales of h and c; y has the scale of h
attrs    limit  largest |c| in codes, 32767 when the cell is not clipped
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from netsuke.graph.ops.base import Array, Kind, arity
from netsuke.graph.ops.elementwise import FUNCTIONS
from netsuke.graph.requant import multipliers, requantize

if TYPE_CHECKING:
    from netsuke.graph.ir import Op, QGraph

GATE = 2.0**-12  # the scale of what goes into a table


def curve(function: str) -> Array:
    """int16 (513,): `function` of -8, -8 + 1/32, …, 8 in Q0.15, 1 saturated to 32767."""
    y = FUNCTIONS[function](np.arange(-256, 257) / 32)
    return np.minimum(np.rint(y * 32768), 32767).astype(np.int16)


def look_up(table: Array, a: Array) -> Array:
    """Q3.12 codes (int64) through a `curve`: the upper 9 bits choose a segment, the lower 7 interpolate, half up."""
    k, f = (a + 32768) >> 7, (a + 32768) & 127
    low, high = table[k].astype(np.int64), table[k + 1].astype(np.int64)
    return low + (((high - low) * f + 64) >> 7)


def gate_multipliers(graph: QGraph, op: Op) -> tuple[tuple[Array, int], tuple[Array, int]]:
    """(M int32 per row, S) of the sums over x, and of those over h."""
    x, w, u, _, h, _ = (graph.tensors[i] for i in op.inputs)
    over_x, over_h = (np.broadcast_to(a.scale * b.scale / GATE, (w.shape[0],)) for a, b in ((x, w), (h, u)))
    return multipliers(over_x), multipliers(over_h)


def gate(total: Array, m: Array, shift: int) -> Array:
    """int32 sums to Q3.12, not yet saturated."""
    return (total * m + (1 << (shift - 1))) >> shift


def cell_bits(graph: QGraph, op: Op) -> int:
    """n of the cell's scale 2^-n."""
    return -round(math.log2(float(graph.tensors[op.inputs[5]].scale)))


def lstm_int8(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    x, w, u, b, h, c = (a.astype(np.int64) for a in args)
    tx, th, units = graph.tensors[op.inputs[0]], graph.tensors[op.inputs[4]], h.shape[1]
    over_x, over_h = gate_multipliers(graph, op)
    mh, shift_h = multipliers(2.0**-30 / float(th.scale))
    sigmoid, tanh, n, limit = curve("sigmoid"), curve("tanh"), cell_bits(graph, op), op.attrs["limit"]
    inputs = np.clip(gate((x[0] - tx.zero) @ w.T + b, *over_x), -32768, 32767)
    rows = []
    for part in inputs:
        a = part + gate((h[0] - th.zero) @ u.T, *over_h)
        i, f, g, o = np.split(np.clip(a, -32768, 32767), 4)
        i, f, g, o = look_up(sigmoid, i), look_up(sigmoid, f), look_up(tanh, g), look_up(sigmoid, o)
        c = np.clip((f * c[0] + ((i * g) >> (15 - n)) + (1 << 14)) >> 15, -limit, limit)[None]
        inner = c[0] << (12 - n) if n <= 12 else (c[0] + (1 << (n - 13))) >> (n - 12)
        out = look_up(tanh, np.clip(inner, -32768, 32767))
        h = requantize(o * out, mh, shift_h, th.zero)[None].astype(np.int64)
        rows.append(h[0])
    return np.stack(rows)[None].astype(np.int8).reshape(1, -1, units), h.astype(np.int8), c.astype(np.int16)


def _check(graph: QGraph, op: Op) -> str | None:
    wrong = arity(graph, op, 6)
    if wrong:
        return wrong
    if len(op.outputs) != 3:
        return f"it has {len(op.outputs)} outputs; it has 3"
    x, w, u, b, h, c = (graph.tensors[i] for i in op.inputs)
    y, h2, c2 = (graph.tensors[i] for i in op.outputs)
    types = tuple(t.dtype for t in (x, w, u, b, h, c, y, h2, c2))
    if types != ("int8",) * 3 + ("int32", "int8", "int16", "int8", "int8", "int16"):
        return f"its tensors are {', '.join(types)}"
    if len(x.shape) != 3 or x.shape[0] != 1 or len(h.shape) != 2:
        return f"it reads {x.shape} with the state {h.shape}; it reads (1, steps, inputs)"
    n = h.shape[1]
    want = [(4 * n, x.shape[2]), (4 * n, n), (4 * n,), (1, n), (1, n), (1, x.shape[1], n), (1, n), (1, n)]
    if [t.shape for t in (w, u, b, h, c, y, h2, c2)] != want:
        return f"shapes {[t.shape for t in (w, u, b, h, c, y, h2, c2)]} do not fit {x.shape} (expected {want})"
    if any(t.scale is None for t in (x, w, u, h, c)) or w.zero or u.zero or c.zero:
        return "a scale is missing, or its weights or cell have a zero point other than 0"
    if any(t.scale is None or (float(t.scale), t.zero) != (float(h.scale), h.zero) for t in (y, h2)):
        return "its output and its state have different scales"
    if c2.scale is None or float(c2.scale) != float(c.scale) or not 9 <= cell_bits(graph, op) <= 15:
        return f"its cell has the scale {float(c.scale)}; it may be 2^-15 to 2^-9"
    if float(c.scale) != 2.0 ** -cell_bits(graph, op):
        return f"the scale {float(c.scale)} of its cell is no power of two"
    if not isinstance(op.attrs.get("limit"), int) or not 1 <= op.attrs["limit"] <= 32767:
        return f"its limit is {op.attrs.get('limit')}; it may be 1 to 32767"
    if not (w.constant and u.constant and b.constant):
        return "its weights are not constants"
    reach = np.abs(w.data.astype(np.int64)).sum(1) * 255 + np.abs(b.data.astype(np.int64))
    if max(reach.max(), np.abs(u.data.astype(np.int64)).sum(1).max() * 255) >= 1 << 31:
        return "its sums may pass 32 bits"
    try:
        gate_multipliers(graph, op)
        multipliers(2.0**-30 / float(h.scale))
    except ValueError as e:
        return f"it has {e}, which no 32-bit multiplier holds"
    return None


def _macs(graph: QGraph, op: Op) -> int:
    x, w, u = (graph.tensors[i] for i in op.inputs[:3])
    return x.shape[1] * (w.size + u.size)


KINDS = {"lstm_int8": Kind(lstm_int8, _check, _macs)}
