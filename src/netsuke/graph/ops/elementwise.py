"""Operators that look at one element at a time, and softmax.

add          q = clip(((x1 - z1)*A + (x2 - z2)*B + 2^(S-1)) >> S) + zero; float: x1 + x2; the second may broadcast
mul          int8: requant((x1 - z1) * (x2 - z2)); float: x1 * x2; the second may broadcast
lut          int8 -> int8 through attrs["table"] (int8, 256 entries, from code -128 on): any function, or a requantization
unary        float32: attrs["function"] of FUNCTIONS
softmax      int8 over the last axis: t[d] = rint(2^20 exp(-beta scale d)), d the distance from the largest code;
             q = (256 t + sum/2) // sum - 128, so the output has scale 1/256 and zero point -128
quantize     float32 -> int8;  dequantize  int8 -> float32
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from netsuke.graph.ops.base import Array, Kind, arity, first, limits, same_type
from netsuke.graph.requant import multipliers, requantize, sum_multipliers

if TYPE_CHECKING:
    from netsuke.graph.ir import Op, QGraph


def sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


SELU = (1.6732632423543772, 1.0507009873554805)
FUNCTIONS = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "sigmoid": sigmoid,
    "hard_sigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),  # Keras 2's; ONNX' has its own slope and comes as clip
    "tanh": np.tanh,
    "softplus": lambda x: np.logaddexp(x, 0),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "selu": lambda x: SELU[1] * np.where(x > 0, x, SELU[0] * np.expm1(np.minimum(x, 0))),
    "exponential": np.exp,
    "swish": lambda x: x * sigmoid(x),
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hard_sigmoid6": lambda x: np.clip(x + 3, 0, 6) / 6,  # PyTorch's and MobileNetV3's
    "gelu": lambda x: x * 0.5 * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3))),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
}


def table(function: str, x_scale: float, x_zero: int, y_scale: float, y_zero: int) -> Array:
    """The 256 int8 outputs of a function for the codes -128…127, each the nearest code of the exact value."""
    real = (np.arange(-128, 128) - x_zero) * float(x_scale)
    return np.clip(np.rint(FUNCTIONS[function](real) / float(y_scale)) + y_zero, -128, 127).astype(np.int8)


def softmax_table(scale: float, beta: float = 1.0) -> Array:
    """uint32 (256,): 2^20 exp(-beta * scale * d) for the distance d from the largest code."""
    return np.rint(2.0**20 * np.exp(-beta * float(scale) * np.arange(256))).astype(np.uint32)


def add(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    a, b = args
    y = graph.tensors[op.outputs[0]]
    low, high = limits(graph, op)
    if y.dtype == "float32":
        return (np.clip(a + b, low, high).astype(np.float32),)
    ta, tb = (graph.tensors[i] for i in op.inputs)
    ma, mb, shift = sum_multipliers(float(ta.scale / y.scale), float(tb.scale / y.scale))
    total = (a.astype(np.int64) - ta.zero) * ma + (b.astype(np.int64) - tb.zero) * mb
    return (np.clip(((total + (1 << (shift - 1))) >> shift) + y.zero, low, high).astype(np.int8),)


def mul(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    a, b = args
    y = graph.tensors[op.outputs[0]]
    low, high = limits(graph, op)
    if y.dtype == "float32":
        return (np.clip(a * b, low, high).astype(np.float32),)
    ta, tb = (graph.tensors[i] for i in op.inputs)
    m, shift = multipliers(float(ta.scale * tb.scale / y.scale))
    total = (a.astype(np.int64) - ta.zero) * (b.astype(np.int64) - tb.zero)
    return (requantize(total, m, shift, y.zero, int(low), int(high)),)


def lut(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    return (np.asarray(op.attrs["table"], np.int8)[args[0].astype(np.int64) + 128],)


def unary(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    with np.errstate(over="ignore"):
        return (FUNCTIONS[op.attrs["function"]](args[0].astype(np.float64)).astype(np.float32),)


def softmax(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    x, beta = graph.tensors[op.inputs[0]], op.attrs.get("beta", 1.0)
    if x.dtype == "float32":
        z = beta * args[0].astype(np.float64)
        e = np.exp(z - z.max(-1, keepdims=True))
        return ((e / e.sum(-1, keepdims=True)).astype(np.float32),)
    codes = args[0].astype(np.int64)
    t = softmax_table(x.scale, beta).astype(np.int64)[codes.max(-1, keepdims=True) - codes]
    total = t.sum(-1, keepdims=True)
    return (np.clip((256 * t + total // 2) // total - 128, -128, 127).astype(np.int8),)


def quantize(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    """In float32, as the chip does it: x times the reciprocal of the scale, half to even."""
    y = graph.tensors[op.outputs[0]]
    q = np.rint(args[0] * np.float32(1.0 / float(y.scale))) + np.float32(y.zero)
    return (np.clip(q, -128, 127).astype(np.int8),)


def dequantize(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    x = graph.tensors[op.inputs[0]]
    return ((args[0].astype(np.float32) - np.float32(x.zero)) * np.float32(float(x.scale)),)


def _binary(graph: QGraph, op: Op) -> str | None:
    wrong = arity(graph, op, 2) or same_type(graph, op)
    if wrong:
        return wrong
    a, b = (graph.tensors[i] for i in op.inputs)
    y = graph.tensors[op.outputs[0]]
    if b.dtype != a.dtype or (b.dtype == "int8" and b.scale is None):
        return f"its inputs are {a.dtype} and {b.dtype}"
    try:
        shape = np.broadcast_shapes(a.shape, b.shape)
        if y.dtype == "int8" and op.kind == "add":
            sum_multipliers(float(a.scale / y.scale), float(b.scale / y.scale))
        elif y.dtype == "int8":
            multipliers(float(a.scale * b.scale / y.scale))
    except ValueError as e:
        return f"shapes {a.shape} and {b.shape}: {e}"
    return None if shape == y.shape == a.shape else f"shapes {a.shape} and {b.shape} do not give {y.shape}"


def _same_shape(graph: QGraph, op: Op) -> str | None:
    x, y = first(graph, op)
    return arity(graph, op, 1) or (None if x.shape == y.shape else f"it maps {x.shape} to {y.shape}")


def _lut(graph: QGraph, op: Op) -> str | None:
    codes = np.asarray(op.attrs.get("table"))
    if codes.shape != (256,) or codes.dtype.kind != "i" or codes.min() < -128 or codes.max() > 127:
        return "its table does not have 256 entries of int8"
    return _same_shape(graph, op) or same_type(graph, op, ("int8",))


def _unary(graph: QGraph, op: Op) -> str | None:
    if op.attrs.get("function") not in FUNCTIONS:
        return f"the function {op.attrs.get('function')!r} is unknown; known are {', '.join(FUNCTIONS)}"
    return _same_shape(graph, op) or same_type(graph, op, ("float32",))


def _softmax(graph: QGraph, op: Op) -> str | None:
    beta = op.attrs.get("beta", 1.0)
    if not 0 < beta < math.inf:
        return f"its beta is {beta}; it is a positive number"
    wrong = _same_shape(graph, op) or same_type(graph, op)
    y = graph.tensors[op.outputs[0]]
    if wrong is None and y.dtype == "int8" and (abs(float(y.scale) * 256 - 1) > 1e-6 or y.zero != -128):
        return f"its output has scale {float(y.scale)} and zero point {y.zero}; an int8 softmax has 1/256 and -128"
    return wrong


def _convert(graph: QGraph, op: Op) -> str | None:
    x, y = first(graph, op)
    want = ("float32", "int8") if op.kind == "quantize" else ("int8", "float32")
    quantized = y if op.kind == "quantize" else x
    if (x.dtype, y.dtype) != want or quantized.scale is None:
        return f"it maps {x.dtype} to {y.dtype}; it maps {want[0]} to {want[1]}"
    return _same_shape(graph, op)


def _first(graph: QGraph, op: Op) -> tuple[int, ...]:
    return (0,)


def _either(graph: QGraph, op: Op) -> tuple[int, ...]:
    y = graph.tensors[op.outputs[0]]
    return tuple(k for k, i in enumerate(op.inputs) if graph.tensors[i].shape == y.shape)


KINDS = {
    "add": Kind(add, _binary, inplace=_either),
    "mul": Kind(mul, _binary, lambda g, op: g.tensors[op.outputs[0]].size, _either),
    "lut": Kind(lut, _lut, inplace=_first),
    "unary": Kind(unary, _unary, inplace=_first),
    "softmax": Kind(softmax, _softmax, inplace=_first),
    "quantize": Kind(quantize, _convert, inplace=_first),  # one byte is written after four were read
    "dequantize": Kind(dequantize, _convert),
}
