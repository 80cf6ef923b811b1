"""Recurrent layers with Keras' meaning, over a whole sequence; the state is zero at the start of every run.

rnn   h = act(W x + U h + b)
lstm  i, f, o = rec(W x + U h + b), c = f c + i act(W_c x + U_c h + b_c), h = o act(c)          gates in the order i, f, c, o
gru   z, r = rec(W x + U h + b), h = z h + (1 - z) g                                             gates in the order z, r, h
      reset_after      g = act(W_h x + bi_h + r (U_h h + br_h))        bias (2, 3 U): input row, recurrent row
      not reset_after  g = act(W_h x + b_h + U_h (r h))                bias (3 U)

inputs   x (1, T, I) float32; w (G U, I) and u (G U, U) with the gates' rows one block after another, float32 or int8/int4
         codes with one scale per row; b float32, (G U) or (2, G U) (of the lstm and rnn only one row). G = 1, 4, 3
output   (1, U), or (1, T, U) with return_sequences
attrs    activation, recurrent_activation (names of elementwise.FUNCTIONS), return_sequences, reset_after (gru)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from netsuke.graph.ops.base import Array, Kind, arity, first
from netsuke.graph.ops.elementwise import FUNCTIONS

if TYPE_CHECKING:
    from netsuke.graph.ir import Op, QGraph

GATES = {"rnn": 1, "lstm": 4, "gru": 3}


def _parts(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, Array, Array, Array]:
    """x (N, T, I), w, u and b (rows, G U) in float64; b has two rows exactly when the two biases are apart."""
    x = args[0].astype(np.float64)
    w, u = (graph.tensors[i].real(a) for i, a in zip(op.inputs[1:3], args[1:3]))
    b = args[3].astype(np.float64) if len(args) > 3 and args[3] is not None else np.zeros(len(w))
    return x, w, u, np.atleast_2d(b)


def _functions(op: Op) -> tuple:
    return FUNCTIONS[op.attrs.get("activation", "tanh")], FUNCTIONS[op.attrs.get("recurrent_activation", "sigmoid")]


def _result(op: Op, steps: list[Array]) -> tuple[Array, ...]:
    out = np.stack(steps, axis=1) if op.attrs.get("return_sequences") else steps[-1]
    return (out.astype(np.float32),)


def rnn(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    x, w, u, b = _parts(graph, op, args)
    act, _ = _functions(op)
    h, steps = np.zeros((len(x), u.shape[1])), []
    for t in range(x.shape[1]):
        h = act(x[:, t] @ w.T + h @ u.T + b[0])
        steps.append(h)
    return _result(op, steps)


def lstm(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    x, w, u, b = _parts(graph, op, args)
    act, rec = _functions(op)
    h = c = np.zeros((len(x), u.shape[1]))
    steps = []
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ w.T + h @ u.T + b[0], 4, axis=1)
        c = rec(f) * c + rec(i) * act(g)
        h = rec(o) * act(c)
        steps.append(h)
    return _result(op, steps)


def gru(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    x, w, u, b = _parts(graph, op, args)
    act, rec = _functions(op)
    units, after = u.shape[1], op.attrs.get("reset_after", True)
    again = b[1] if len(b) == 2 else np.zeros(3 * units)
    h, steps = np.zeros((len(x), units)), []
    for t in range(x.shape[1]):
        xz, xr, xh = np.split(x[:, t] @ w.T + b[0], 3, axis=1)
        hz, hr = np.split(h @ u[: 2 * units].T + again[: 2 * units], 2, axis=1)
        z, r = rec(xz + hz), rec(xr + hr)
        if after:
            g = act(xh + r * (h @ u[2 * units :].T + again[2 * units :]))
        else:
            g = act(xh + (r * h) @ u[2 * units :].T)
        h = z * h + (1 - z) * g
        steps.append(h)
    return _result(op, steps)


def _check(graph: QGraph, op: Op) -> str | None:
    wrong = arity(graph, op, 3, 4)
    if wrong:
        return wrong
    x, y = first(graph, op)
    w, u = graph.tensors[op.inputs[1]], graph.tensors[op.inputs[2]]
    b = graph.tensors[op.inputs[3]] if len(op.inputs) > 3 and op.inputs[3] >= 0 else None
    if x.dtype != "float32" or y.dtype != "float32":
        return f"it maps {x.dtype} to {y.dtype}; it maps float32 to float32"
    if len(x.shape) != 3 or len(w.shape) != 2 or len(u.shape) != 2:
        return f"shapes {x.shape}, {w.shape}, {u.shape} are not (N, T, I), (G U, I), (G U, U)"
    units, rows = u.shape[1], GATES[op.kind] * u.shape[1]
    if w.shape != (rows, x.shape[2]) or u.shape[0] != rows:
        return f"weights {w.shape} and {u.shape} do not fit {rows} gate rows over {x.shape[2]} inputs"
    for t in (w, u):
        if t.dtype not in ("float32", "int8", "int4") or (t.dtype != "float32" and (t.scale is None or t.zero != 0)):
            return (
                f"its weights {t.name!r} are {t.dtype}; they are float32, or int8 or int4 with scales and zero point 0"
            )
    wide = op.kind == "gru" and op.attrs.get("reset_after", True)
    if b is not None and (b.dtype != "float32" or b.shape not in ({(rows,), (2, rows)} if wide else {(rows,)})):
        return f"its bias is {b.dtype} {b.shape} for {rows} gate rows"
    want = (x.shape[0], x.shape[1], units) if op.attrs.get("return_sequences") else (x.shape[0], units)
    if y.shape != want:
        return f"it maps {x.shape} to {y.shape} (expected {want})"
    for key in ("activation", "recurrent_activation"):
        if op.attrs.get(key, "tanh") not in FUNCTIONS:
            return f"the {key} {op.attrs[key]!r} is unknown; known are {', '.join(FUNCTIONS)}"
    return None


def _macs(graph: QGraph, op: Op) -> int:
    x, _ = first(graph, op)
    return x.shape[1] * sum(graph.tensors[i].size for i in op.inputs[1:3])


KINDS = {"rnn": Kind(rnn, _check, _macs), "lstm": Kind(lstm, _check, _macs), "gru": Kind(gru, _check, _macs)}
