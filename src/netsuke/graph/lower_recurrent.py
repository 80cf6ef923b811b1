"""Kernel calls of the recurrent layers (`ops/recurrent.py`, `ops/lstm.py`; `kernels/recurrent.c`, `kernels/lstm_int8.c`)."""

from __future__ import annotations

import numpy as np

from netsuke.graph.ir import Op, QGraph, Tensor
from netsuke.graph.lower import Lowering, Pointer, Rule
from netsuke.graph.lower_ops import UNARY, _weights
from netsuke.graph.ops.lstm import cell_bits, curve, gate_multipliers
from netsuke.graph.requant import multipliers

FORMS = {"float32": "f32", "int8": "f32w8", "int4": "f32w4"}


def _folded(b: Tensor | None, units: int, after: bool) -> np.ndarray:
    """The bias of a GRU in blocks of `units`: z, r, h and, with `after`, what the product of the new state gets. The two
    biases of z and r are only ever added to each other."""
    data = np.zeros((1, 3 * units)) if b is None else np.atleast_2d(b.data.astype(np.float64))
    if not after:
        return data[0].astype(np.float32)
    again = data[1] if len(data) == 2 else np.zeros(3 * units)
    both = data[0].copy()
    both[: 2 * units] += again[: 2 * units]
    return np.concatenate([both, again[2 * units :]]).astype(np.float32)


def _bias(lowering: Lowering, op: Op, units: int, after: bool) -> Pointer:
    index = op.inputs[3] if len(op.inputs) > 3 else -1
    if op.kind != "gru":
        return lowering.tensor(index)
    if index < 0:
        return lowering.table("bias", _folded(None, units, after))
    form = "after" if after else "before"
    return lowering.constant(index, form, lambda: _folded(lowering.graph.tensors[index], units, after))


def _layer(lowering: Lowering, op: Op) -> None:
    """A float layer; its weights are float or both of one kind of codes."""
    tensors = lowering.graph.tensors
    x, w, u = (tensors[i] for i in op.inputs[:3])
    given = [tensors[i] for i in op.inputs[1:] if i >= 0]
    if x.shape[0] != 1:
        raise lowering.refuse(f"its input {x.name!r} holds {x.shape[0]} sequences", "1 sequence a run")
    if any(t.variable or not t.constant for t in given) or w.dtype != u.dtype:
        found = ", ".join(f"{t.name!r} {t.dtype}{'' if t.constant else ' computed'}" for t in given)
        raise lowering.refuse(f"its weights are {found}", "constants, both matrices of one type")
    units, after = u.shape[1], op.kind == "gru" and op.attrs.get("reset_after", True)
    params = {
        "steps": x.shape[1], "i": x.shape[2], "units": units, "after": int(after),
        "activation": UNARY.index(op.attrs.get("activation", "tanh")),
        "recurrent": UNARY.index(op.attrs.get("recurrent_activation", "sigmoid")),
        "sequences": int(bool(op.attrs.get("return_sequences"))),
    }  # fmt: skip
    matrices: list[Pointer] = []
    for position, t in ((1, w), (2, u)):
        if position == 2 and x.shape[1] == 1:  # the state of the only step is zero: u is never read, nor stored
            matrices += [Pointer("none")] * (1 if t.dtype == "float32" else 2)
            continue
        matrices.append(_weights(lowering, op, position=position))
        if t.dtype != "float32":
            scale = np.broadcast_to(np.atleast_1d(t.scale), (len(t.data),)).astype(np.float32)
            matrices.append(lowering.table(f"scale{position}", scale))
    args = [lowering.tensor(op.inputs[0]), *matrices, _bias(lowering, op, units, after), lowering.tensor(op.outputs[0])]
    lowering.call(f"ns_{op.kind}_{FORMS[w.dtype]}", params, *args, lowering.scratch())


def _layer_scratch(graph: QGraph, op: Op) -> int:
    return 4 * graph.tensors[op.inputs[2]].shape[1] * (2 if op.kind == "rnn" else 4)


def _curves() -> np.ndarray:
    return np.concatenate([curve("sigmoid"), curve("tanh")])


def _lstm_int8(lowering: Lowering, op: Op) -> None:
    graph = lowering.graph
    x, h = (graph.tensors[op.inputs[k]] for k in (0, 4))
    (mx, shift_x), (mh, shift_h) = gate_multipliers(graph, op)
    m_out, shift_out = multipliers(2.0**-30 / float(h.scale))
    params = {
        "steps": x.shape[1], "i": x.shape[2], "units": h.shape[1], "zx": x.zero, "zh": h.zero, "shift_x": shift_x,
        "shift_h": shift_h, "m_out": int(m_out[0]), "shift_out": shift_out, "bits": cell_bits(graph, op),
        "limit": op.attrs["limit"],
    }  # fmt: skip
    lowering.call(
        "ns_lstm_int8", params, lowering.tensor(op.inputs[0]), _weights(lowering, op), _weights(lowering, op, position=2),
        lowering.tensor(op.inputs[3]), lowering.table("m", np.concatenate([mx, mh])), lowering.table("curves", _curves()),
        *(lowering.tensor(i) for i in (*op.inputs[4:], *op.outputs)), lowering.scratch(),
    )  # fmt: skip


def _lstm_int8_scratch(graph: QGraph, op: Op) -> int:
    """16-bit numbers for an input and a state, each in whole words of weights."""
    return sum(2 * (-(-graph.tensors[i].shape[1] // 4) * 4) for i in op.inputs[1:3])


RULES = {
    "rnn": Rule(_layer, _layer_scratch),
    "lstm": Rule(_layer, _layer_scratch),
    "gru": Rule(_layer, _layer_scratch),
    "lstm_int8": Rule(_lstm_int8, _lstm_int8_scratch),
}
