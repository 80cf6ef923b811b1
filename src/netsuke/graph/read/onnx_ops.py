"""What each ONNX operator becomes in a graph: one function per operator, and the table OPERATORS of those that are imported.

A function takes the builder, the operator's name, its attributes (and the file's `opset`) and its inputs: `Value`s, constant
arrays, or None where one is absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from netsuke.graph.ops.base import axis_of
from netsuke.graph.read.layout import Builder, Value
from netsuke.graph.read.module_ops import check_ceiling, conv, cut_axis

Inputs = list[Any]
Operator = Callable[[Builder, str, dict[str, Any], Inputs], Any]


def _at(inputs: Inputs, k: int) -> Any:
    return inputs[k] if len(inputs) > k else None


def _numbers(attrs: dict[str, Any], inputs: Inputs, name: str, k: int) -> list[int] | None:
    """A list of integers that older opsets hold as an attribute and newer ones as a constant input."""
    if name in attrs:
        return list(attrs[name])
    value = _at(inputs, k)
    if isinstance(value, Value):
        raise ValueError(f"{name} depends on the input")
    return None if value is None else [int(x) for x in np.ravel(value)]


def _two(values: Sequence[int] | None, axes: int, default: int = 1) -> tuple[int, ...]:
    """A size over images: 1-D ones lie along the second axis."""
    values = tuple(values or (default,) * axes)
    return (1, *values) if axes == 1 else values


def _pads(attrs: dict[str, Any], size: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
          dilation: Sequence[int], axes: int) -> tuple[int, ...]:  # fmt: skip
    """(top, bottom, left, right) of `pads` (all begins, then all ends) or `auto_pad`."""
    auto = attrs.get("auto_pad", b"NOTSET").decode()
    if auto == "NOTSET":
        pads = list(attrs.get("pads") or [0] * 2 * axes)
        if axes == 1:
            return 0, 0, pads[0], pads[1]
        return pads[0], pads[2], pads[1], pads[3]
    out: list[int] = []
    for n, k, s, d in zip(size, kernel, stride, dilation):
        missing = 0 if auto == "VALID" else max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        half = missing // 2
        out += [missing - half, half] if auto == "SAME_LOWER" else [half, missing - half]
    return tuple(out)


def _geometry(v: Value, attrs: dict[str, Any], kernel: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """(kernel, stride, pads, dilation) over images."""
    axes = len(v.shape) - 2
    if axes not in (1, 2):
        raise ValueError(f"an input of the shape {v.shape}")
    size = (1, v.shape[2]) if axes == 1 else v.shape[2:]
    kernel, stride, dilation = (_two(x, axes) for x in (kernel, attrs.get("strides"), attrs.get("dilations")))
    return kernel, stride, _pads(attrs, size, kernel, stride, dilation, axes), dilation


def convolution(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    v, w, bias = inputs[0], inputs[1], _at(inputs, 2)
    _, stride, pads, dilation = _geometry(v, attrs, w.shape[2:])
    w = w[:, :, None] if w.ndim == 3 else w
    return conv(b, v, w, bias, name, int(attrs.get("group", 1)), stride, pads, dilation)


def gemm(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    v, w, c = inputs[0], np.asarray(inputs[1], np.float64), _at(inputs, 2)
    if attrs.get("transA"):
        raise ValueError("the input is transposed")
    w = (w if attrs.get("transB") else w.T) * attrs.get("alpha", 1.0)
    bias = None if c is None else np.broadcast_to(np.ravel(c) * attrs.get("beta", 1.0), (len(w),))
    return b.dense(v, w, bias, name)


def matmul(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    v, w = inputs
    if not isinstance(v, Value) or not isinstance(w, np.ndarray) or w.ndim != 2:
        raise ValueError("a product of two activations")
    return b.dense(v, w.T, None, name)


def norm(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    v, (gain, shift, mean, variance) = inputs[0], (np.asarray(x, np.float64) for x in inputs[1:5])
    if attrs.get("training_mode"):
        raise ValueError("training mode")
    gain = gain / np.sqrt(variance + attrs.get("epsilon", 1e-5))
    return b.norm(v, gain, shift - mean * gain, name)


def unary(function: str) -> Operator:
    return lambda b, name, attrs, inputs: b.unary(inputs[0], function, name)


def same(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    return inputs[0]


def cast(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    if attrs["to"] != 1:
        raise ValueError("a cast of activations to another type than float32")
    return inputs[0]


def clip(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    low, high = attrs.get("min", _at(inputs, 1)), attrs.get("max", _at(inputs, 2))
    low, high = (end if x is None else float(np.ravel(x)[0]) for x, end in ((low, -math.inf), (high, math.inf)))
    return b.clip(inputs[0], low, high, name)


def leaky_relu(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    return b.leaky(inputs[0], attrs.get("alpha", 0.01), name)


def elu(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    if attrs.get("alpha", 1.0) != 1.0:
        raise ValueError("an alpha other than 1")
    return b.unary(inputs[0], "elu", name)


def gelu(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    if attrs.get("approximate", b"none") != b"tanh":
        raise ValueError("a GELU by the error function; approximate='tanh' is imported")
    return b.unary(inputs[0], "gelu", name)


def hard_sigmoid(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    """clip(alpha x + beta, 0, 1)."""
    alpha, beta = attrs.get("alpha", 0.2), attrs.get("beta", 0.5)
    for function, slope in (("hard_sigmoid", 0.2), ("hard_sigmoid6", 1 / 6)):
        if abs(alpha - slope) < 1e-6 and abs(beta - 0.5) < 1e-6:
            return b.unary(inputs[0], function, name)
    v = b.binary("add", b.binary("mul", inputs[0], alpha, f"{name}.slope"), beta, f"{name}.shift")
    return b.clip(v, 0.0, 1.0, name)


def softmax(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    v, last = inputs[0], len(inputs[0].shape) - 1
    axis = axis_of(attrs.get("axis", -1 if attrs["opset"] >= 13 else 1), last + 1)
    if attrs["opset"] < 13 and axis != last and any(n != 1 for n in v.shape[axis + 1 :]):
        raise ValueError("a softmax over several axes, as before opset 13")
    return b.softmax(v, axis, name)


def arithmetic(kind: str, sign: float = 1.0) -> Operator:
    """a + sign * b, or a * b."""

    def operator(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
        left, right = inputs
        if sign != 1.0:
            right = b.binary("mul", right, sign, f"{name}.sign") if isinstance(right, Value) else sign * right
        return b.binary(kind, left, right, name) if isinstance(left, Value) else b.binary(kind, right, left, name)

    return operator


def div(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    if not isinstance(inputs[0], Value) or isinstance(inputs[1], Value):
        raise ValueError("a division by an activation")
    return b.binary("mul", inputs[0], 1.0 / np.asarray(inputs[1], np.float64), name)


def neg(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    return b.binary("mul", inputs[0], -1.0, name)


def pool(kind: str) -> Operator:
    def operator(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
        v, axes = inputs[0], len(inputs[0].shape) - 2
        size, stride, pads, dilation = _geometry(v, attrs, attrs["kernel_shape"])
        if any(d != 1 for d in dilation):
            raise ValueError("pooling with dilation")
        if attrs.get("ceil_mode"):
            check_ceiling(v, size, stride, pads, axes)
        if kind == "avgpool2d" and any(pads) and attrs.get("count_include_pad"):
            each = [(pads[0], pads[1]), (pads[2], pads[3])][-axes:]
            v, pads = b.pad(v, [(0, 0), (0, 0), *each], f"{name}.pad"), (0, 0, 0, 0)
        return b.pool(kind, v, size, name, stride, pads)

    return operator


def global_pool(kind: str) -> Operator:
    return lambda b, name, attrs, inputs: b.pool(kind, inputs[0], None, name)


def reduce_mean(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    axes, keep = _numbers(attrs, inputs, "axes", 1), bool(attrs.get("keepdims", 1))
    return b.mean(inputs[0], axes or range(1, len(inputs[0].shape)), keep, name)


def flatten(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    if attrs.get("axis", 1) != 1:
        raise ValueError("an axis other than 1")
    return b.reshape(inputs[0], (inputs[0].shape[0], -1), name)


def reshape(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    shape = _numbers(attrs, inputs, "shape", 1)
    if not attrs.get("allowzero"):
        shape = [inputs[0].shape[k] if n == 0 else n for k, n in enumerate(shape)]
    return b.reshape(inputs[0], shape, name)


def squeeze(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    shape, axes = inputs[0].shape, _numbers(attrs, inputs, "axes", 1)
    gone = {axis_of(a, len(shape)) for a in axes} if axes else {k for k, n in enumerate(shape) if n == 1}
    return b.reshape(inputs[0], [n for k, n in enumerate(shape) if k not in gone], name)


def unsqueeze(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    axes, shape = _numbers(attrs, inputs, "axes", 1), list(inputs[0].shape)
    for a in sorted(axis_of(a, len(shape) + len(axes)) for a in axes):
        shape.insert(a, 1)
    return b.reshape(inputs[0], shape, name)


def transpose(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    return b.transpose(inputs[0], attrs.get("perm") or range(len(inputs[0].shape))[::-1])


def concat(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    return b.concat(inputs, attrs["axis"], name)


def pad(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    v, pads, value = inputs[0], _numbers(attrs, inputs, "pads", 1), attrs.get("value", _at(inputs, 2))
    if attrs.get("mode", b"constant") != b"constant" or (value is not None and np.any(value)):
        raise ValueError("padding with anything but zeros")
    axes, rank = _numbers({}, inputs, "axes", 3) or range(len(v.shape)), len(v.shape)
    both = [(0, 0)] * rank
    for k, a in enumerate(axes):
        both[axis_of(a, rank)] = (pads[k], pads[k + len(pads) // 2])
    return b.pad(v, both, name)


def cut(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> Value:
    v = inputs[0]
    starts, ends, axes, steps = (
        _numbers(attrs, inputs, n, k + 1) for k, n in enumerate(("starts", "ends", "axes", "steps"))
    )
    for k, (start, end) in enumerate(zip(starts, ends)):
        step = steps[k] if steps else 1
        if step < 1:
            raise ValueError("a step backwards")
        v = cut_axis(b, v, axes[k] if axes else k, start, end, step, name)
    return v


def split(b: Builder, name: str, attrs: dict[str, Any], inputs: Inputs) -> list[Value]:
    v, axis, sizes = inputs[0], axis_of(attrs.get("axis", 0), len(inputs[0].shape)), _numbers(attrs, inputs, "split", 1)
    if sizes is None:
        count = attrs["num_outputs"]
        step = -(-v.shape[axis] // count)
        sizes = [min(step, v.shape[axis] - step * k) for k in range(count)]
    starts = np.cumsum([0, *sizes])
    return [cut_axis(b, v, axis, int(s), int(s) + n, 1, name) for s, n in zip(starts, sizes)]


OPERATORS: dict[str, Operator] = {
    "Conv": convolution, "Gemm": gemm, "MatMul": matmul, "BatchNormalization": norm, "Relu": unary("relu"),
    "Sigmoid": unary("sigmoid"), "Tanh": unary("tanh"), "HardSwish": unary("hard_swish"), "Selu": unary("selu"),
    "Softplus": unary("softplus"), "Softsign": unary("softsign"), "Exp": unary("exponential"), "Clip": clip,
    "LeakyRelu": leaky_relu, "Elu": elu, "Gelu": gelu, "HardSigmoid": hard_sigmoid, "Softmax": softmax,
    "Add": arithmetic("add"), "Sub": arithmetic("add", -1.0), "Mul": arithmetic("mul"), "Div": div, "Neg": neg,
    "MaxPool": pool("maxpool2d"), "AveragePool": pool("avgpool2d"), "GlobalAveragePool": global_pool("avgpool2d"),
    "GlobalMaxPool": global_pool("maxpool2d"), "ReduceMean": reduce_mean, "Flatten": flatten, "Reshape": reshape,
    "Squeeze": squeeze, "Unsqueeze": unsqueeze, "Transpose": transpose, "Concat": concat, "Pad": pad, "Slice": cut,
    "Split": split, "Identity": same, "Dropout": same, "Cast": cast,
}  # fmt: skip
