"""Kernel calls of the audio front end and of plain arithmetic (`ops/signal.py`; `kernels/signal*.c`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from netsuke.graph.ir import Op
from netsuke.graph.lower import Lowering, Rule
from netsuke.graph.lower_move import _copy
from netsuke.graph.lower_ops import _broadcast
from netsuke.graph.ops.signal import ARITHMETIC, end_twiddles, log_table, twiddles

FUNCTIONS = tuple(ARITHMETIC)  # the numbers of signal_arithmetic.c
TYPES = {"int32": "i32", "int8": "i8", "float32": "f32"}


def _call(lowering: Lowering, op: Op, params: dict[str, int | float], name: str = "") -> None:
    """The kernel of the operator's name with its inputs, then its outputs."""
    args = [lowering.tensor(i) for i in (*op.inputs, *op.outputs)]
    lowering.call(f"ns_{name or op.kind}", params, *args)


def _size(lowering: Lowering, op: Op) -> int:
    return lowering.graph.tensors[op.outputs[0]].size


def _each(*attrs: str, **renamed: str) -> Callable[[Lowering, Op], None]:
    """A rule for a kernel over all elements, with attributes as its parameters: by their names, or field=attribute."""
    fields = dict(zip(attrs, attrs)) | renamed

    def lower(lowering: Lowering, op: Op) -> None:
        _call(lowering, op, {"n": _size(lowering, op)} | {f: int(op.attrs.get(a, 0)) for f, a in fields.items()})

    return lower


def _rfft(lowering: Lowering, op: Op) -> None:
    half = op.attrs["length"] // 2
    tables = (
        lowering.table("twiddles", twiddles(half)[: max(half * 3 // 4 - 2, 1)].astype(np.int16)),
        lowering.table("end_twiddles", end_twiddles(half).astype(np.int16)),
    )
    x, y = lowering.tensor(op.inputs[0]), lowering.tensor(op.outputs[0])
    lowering.call("ns_rfft", {"n": lowering.graph.tensors[op.inputs[0]].size, "half": half}, x, *tables, y)


def _filter_bank(lowering: Lowering, op: Op) -> None:
    _call(lowering, op, {"bands": lowering.graph.tensors[op.inputs[3]].size})


def _filter_log(lowering: Lowering, op: Op) -> None:
    params = {"n": _size(lowering, op), "correction": op.attrs["correction"], "scale": op.attrs["scale"]}
    x, y = lowering.tensor(op.inputs[0]), lowering.tensor(op.outputs[0])
    lowering.call("ns_filter_log", params, x, lowering.table("logarithms", log_table()), y)


def _cast(lowering: Lowering, op: Op) -> None:
    """Between integers of one size it is a copy."""
    n = _size(lowering, op)
    x, y = (np.dtype(lowering.graph.tensors[i].dtype) for i in (op.inputs[0], op.outputs[0]))
    if y.kind != "f" and x.itemsize == y.itemsize:
        _copy(lowering, op, op.inputs[0], (n,), ([x.itemsize], [x.itemsize]))
        return
    sign = -1 if x.kind == "i" else 1
    _call(lowering, op, {"n": n, "from": sign * x.itemsize, "to": 0 if y.kind == "f" else y.itemsize})


def _arithmetic(lowering: Lowering, op: Op) -> None:
    kind = TYPES[lowering.graph.tensors[op.outputs[0]].dtype]
    params = _broadcast(lowering, op) | {"function": FUNCTIONS.index(op.attrs["function"])}
    _call(lowering, op, params, f"arithmetic_{kind}")


_NOISE = _each(
    "least", "clamp", take0="smoothing", keep0="one_minus_smoothing", take1="alternate_smoothing",
    keep1="alternate_one_minus_smoothing", smoothing="smoothing_bits", subtraction="subtraction_bits",
)  # fmt: skip

RULES = {
    "window": Rule(_each("shift")), "fft_scale": Rule(_each()), "rfft": Rule(_rfft), "energy": Rule(_each("start", "end")),
    "filter_bank": Rule(_filter_bank), "filter_sqrt": Rule(_each()), "noise_subtract": Rule(_NOISE),
    "pcan": Rule(_each(shift="snr_shift")), "filter_log": Rule(_filter_log), "cast": Rule(_cast),
    "arithmetic": Rule(_arithmetic),
}  # fmt: skip
