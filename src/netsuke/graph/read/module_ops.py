"""What each ATen operator becomes in a graph: one function per operator, and the table OPERATORS of those that are imported.

A function takes the builder, where the operator stands (for errors and names) and its arguments by the schema's names:
activations are `Value`s, everything that depends on parameters only is a NumPy array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from netsuke.graph.ops.base import axis_of
from netsuke.graph.read.layout import Builder, Value

Arguments = dict[str, Any]
Operator = Callable[[Builder, str, Arguments], Any]


def _pair(value: Any, axes: int) -> tuple[int, int]:
    """A size over images: 1-D ones lie along the second axis."""
    value = [value] * axes if isinstance(value, int) else list(value)
    value = value * axes if len(value) == 1 else value
    return (1, int(value[0])) if axes == 1 else (int(value[0]), int(value[1]))


def _padding(value: Any, axes: int) -> tuple[int, int, int, int]:
    (a, b) = (0, _pair(value, 1)[1]) if axes == 1 else _pair(value, axes)
    return a, a, b, b


def linear(b: Builder, where: str, a: Arguments) -> Value:
    return b.dense(a["input"], a["weight"], a["bias"], where)


def matmul(b: Builder, where: str, a: Arguments) -> Value:
    v, w = (a[k] for k in (("self", "other") if "other" in a else ("self", "mat2")))
    if not isinstance(w, np.ndarray) or w.ndim != 2:
        raise ValueError("a product of two activations")
    return b.dense(v, w.T, None, where)


def addmm(b: Builder, where: str, a: Arguments) -> Value:
    if a.get("beta", 1) != 1 or a.get("alpha", 1) != 1:
        raise ValueError("beta or alpha is not 1")
    return b.dense(a["mat1"], a["mat2"].T, a["self"], where)


def convolution(b: Builder, where: str, a: Arguments) -> Value:
    v, w, axes = a["input"], a["weight"], len(a["input"].shape) - 2
    if axes not in (1, 2):
        raise ValueError(f"an input of the shape {v.shape}")
    w = w[:, :, None] if axes == 1 else w
    stride, dilation, groups = _pair(a["stride"], axes), _pair(a["dilation"], axes), int(a["groups"])
    pad = a["padding"]
    if pad == "same":  # PyTorch's: stride 1, the odd one at the end
        reach = [d * (k - 1) for d, k in zip(dilation, w.shape[2:])]
        pad = [x for r in reach for x in (r // 2, r - r // 2)]
    elif pad == "valid":
        pad = (0, 0, 0, 0)
    else:
        pad = _padding(pad, axes)
    return conv(b, v, w, a["bias"], where, groups, stride, pad, dilation)


def conv(
    b: Builder, v: Value, w: np.ndarray, bias: np.ndarray | None, where: str, groups: int, stride: Sequence[int],
    pad: Sequence[int] | str, dilation: Sequence[int],
) -> Value:  # fmt: skip
    """A convolution with weights (O, I / groups, KH, KW), depthwise where every group is one channel."""
    channels = v.shape[1]
    if w.shape[1] * groups != channels:
        raise b.refuse(where, f"weights {w.shape} in {groups} groups do not fit {channels} channels")
    attrs = {"stride": stride, "pad": pad, "dilation": dilation}
    if groups == channels and groups > 1:
        return b.conv(v, w[:, 0].transpose(1, 2, 0), bias, where, depthwise=True, **attrs)
    return b.conv(v, w.transpose(0, 2, 3, 1), bias, where, groups=groups, **attrs)


def batch_norm(b: Builder, where: str, a: Arguments) -> list[Value]:
    mean, variance = (a[k].astype(np.float64) for k in ("running_mean", "running_var"))
    gain = (1.0 if a["weight"] is None else a["weight"].astype(np.float64)) / np.sqrt(variance + a["eps"])
    shift = (0.0 if a["bias"] is None else a["bias"].astype(np.float64)) - mean * gain
    return [b.norm(a["input"], gain, shift, where)]


def unary(function: str) -> Operator:
    return lambda b, where, a: b.unary(a["self"], function, where)


def same(b: Builder, where: str, a: Arguments) -> Value:
    return a.get("self", a.get("input"))


def dropout(b: Builder, where: str, a: Arguments) -> Value:
    if a["train"]:
        raise ValueError("it drops in evaluation mode, too")
    return a["input"]


def hardtanh(b: Builder, where: str, a: Arguments) -> Value:
    return b.clip(a["self"], a["min_val"], a["max_val"], where)


def clamp(b: Builder, where: str, a: Arguments) -> Value:
    low, high = a.get("min"), a.get("max")
    return b.clip(a["self"], -math.inf if low is None else low, math.inf if high is None else high, where)


def leaky_relu(b: Builder, where: str, a: Arguments) -> Value:
    return b.leaky(a["self"], float(a["negative_slope"]), where)


def gelu(b: Builder, where: str, a: Arguments) -> Value:
    if a["approximate"] != "tanh":
        raise b.refuse(where, "it is a GELU by the error function", "approximate='tanh'", "nn.GELU('tanh')")
    return b.unary(a["self"], "gelu", where)


def elu(b: Builder, where: str, a: Arguments) -> Value:
    if (a["alpha"], a["scale"], a["input_scale"]) != (1, 1, 1):
        raise ValueError("an ELU with alpha or scales other than 1")
    return b.unary(a["self"], "elu", where)


def softplus(b: Builder, where: str, a: Arguments) -> Value:
    if a["beta"] != 1:
        raise ValueError("a softplus with beta other than 1")
    return b.unary(a["self"], "softplus", where)


def softmax(b: Builder, where: str, a: Arguments) -> Value:
    return b.softmax(a["self"], a["dim"], where)


def arithmetic(kind: str, sign: float = 1.0) -> Operator:
    """self + sign * alpha * other, or self * other."""

    def operator(b: Builder, where: str, a: Arguments) -> Value:
        left, right = a["self"], a["other"]
        factor = sign * float(a.get("alpha") or 1.0)
        if not isinstance(left, Value):
            right, left = (
                np.asarray(left),
                b.binary("mul", right, factor, where) if factor != 1 else right,
            )
        elif factor != 1:
            right = b.binary("mul", right, factor, where) if isinstance(right, Value) else factor * right
        return b.binary(kind, left, right if isinstance(right, Value) else np.asarray(right), where)

    return operator


def reversed_sub(b: Builder, where: str, a: Arguments) -> Value:
    return arithmetic("add", -1.0)(b, where, a | {"self": a["other"], "other": a["self"]})


def div(b: Builder, where: str, a: Arguments) -> Value:
    if isinstance(a["other"], Value) or a.get("rounding_mode"):
        raise ValueError("a division by an activation, or with rounding")
    return b.binary("mul", a["self"], 1.0 / np.asarray(a["other"], np.float64), where)


def neg(b: Builder, where: str, a: Arguments) -> Value:
    return b.binary("mul", a["self"], -1.0, where)


def mean(b: Builder, where: str, a: Arguments) -> Value:
    return b.mean(a["self"], a["dim"] or range(1, len(a["self"].shape)), a["keepdim"], where)


def adaptive_pool(b: Builder, where: str, a: Arguments) -> Value:
    v, axes = a["self"], len(a["self"].shape) - 2
    size = _pair((1, *v.shape[2:])[-axes:], axes)
    out = _pair(a["output_size"], axes)
    if any(n % o for n, o in zip(size, out)):
        raise ValueError(f"pooling {size} to {out}, which does not divide it")
    return b.pool("avgpool2d", v, [n // o for n, o in zip(size, out)], where)


def pool(kind: str, average: bool) -> Operator:
    def operator(b: Builder, where: str, a: Arguments) -> Value:
        v, axes = a["self"], len(a["self"].shape) - 2
        size = _pair(a["kernel_size"], axes)
        stride = _pair(a["stride"], axes) if a["stride"] else size
        pad = _padding(a["padding"], axes)
        if a["ceil_mode"]:
            check_ceiling(v, size, stride, pad, axes)
        if a.get("divisor_override") or any(d != 1 for d in _pair(a.get("dilation", 1), axes)):
            raise ValueError("pooling with dilation or another divisor")
        if average and any(pad) and a["count_include_pad"]:
            v, pad = b.pad(v, [(0, 0), (0, 0), *[(pad[-2:] if axes == 1 else pad[2 * k : 2 * k + 2]) for k in range(axes)]],
                           f"{where}.pad"), (0, 0, 0, 0)  # fmt: skip
        return b.pool(kind, v, size, where, stride, pad)

    return operator


def check_ceiling(v: Value, size: Sequence[int], stride: Sequence[int], pad: Sequence[int], axes: int) -> None:
    """Raises ValueError where rounding the output up would add a window that hangs over the edge."""
    shape = (1, v.shape[2]) if axes == 1 else v.shape[2:]
    for n, k, s, p in zip(shape, size, stride, ((pad[0], pad[1]), (pad[2], pad[3]))):
        if (n + sum(p) - k) % s:
            raise ValueError(f"ceil_mode on {n} with a window of {k} and a stride of {s}")


def reshape(b: Builder, where: str, a: Arguments) -> Value:
    return b.reshape(a["self"], a["size"] if "size" in a else a["shape"], where)


def flatten(b: Builder, where: str, a: Arguments) -> Value:
    shape = a["self"].shape
    start, end = a["start_dim"] % len(shape), a["end_dim"] % len(shape)
    return b.reshape(a["self"], (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]), where)


def squeeze(b: Builder, where: str, a: Arguments) -> Value:
    shape = a["self"].shape
    dims = a.get("dim", range(len(shape)))
    dims = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)}
    return b.reshape(a["self"], [n for k, n in enumerate(shape) if k not in dims or n != 1], where)


def unsqueeze(b: Builder, where: str, a: Arguments) -> Value:
    shape = list(a["self"].shape)
    shape.insert(a["dim"] % (len(shape) + 1), 1)
    return b.reshape(a["self"], shape, where)


def permute(b: Builder, where: str, a: Arguments) -> Value:
    return b.transpose(a["self"], a["dims"])


def transpose(b: Builder, where: str, a: Arguments) -> Value:
    rank = len(a["self"].shape)
    perm = list(range(rank))
    i, j = a.get("dim0", 0) % rank, a.get("dim1", 1) % rank
    perm[i], perm[j] = j, i
    return b.transpose(a["self"], perm)


def cat(b: Builder, where: str, a: Arguments) -> Value:
    return b.concat(a["tensors"], a["dim"], where)


def pad(b: Builder, where: str, a: Arguments) -> Value:
    if a.get("mode", "constant") != "constant" or a.get("value"):
        raise ValueError("padding with anything but zeros")
    pads = [(0, 0)] * len(a["self"].shape)
    for k in range(len(a["pad"]) // 2):
        pads[-1 - k] = (a["pad"][2 * k], a["pad"][2 * k + 1])
    return b.pad(a["self"], pads, where)


def cut_axis(b: Builder, v: Value, dim: int, start: int, end: int, step: int, where: str) -> Value:
    dim = axis_of(dim, len(v.shape))
    start, end, step = slice(start, end, step).indices(v.shape[dim])
    begin, stride = ([x if k == dim else y for k in range(len(v.shape))] for x, y in ((start, 0), (step, 1)))
    shape = [len(range(start, end, step)) if k == dim else n for k, n in enumerate(v.shape)]
    return v if tuple(shape) == v.shape else b.slice(v, begin, shape, stride, where)


def cut(b: Builder, where: str, a: Arguments) -> Value:
    return cut_axis(b, a["self"], a["dim"], a["start"], a["end"], a["step"], where)


def select(b: Builder, where: str, a: Arguments) -> Value:
    v, dim = a["self"], a["dim"] % len(a["self"].shape)
    at = a["index"] % v.shape[dim]
    return b.reshape(cut_axis(b, v, dim, at, at + 1, 1, where), v.shape[:dim] + v.shape[dim + 1 :], f"{where}.out")


def split(b: Builder, where: str, a: Arguments) -> list[Value]:
    v, dim = a["self"], a["dim"] % len(a["self"].shape)
    sizes = a["split_size"] if "split_size" in a else a["split_sizes"]
    sizes = [sizes] * -(-v.shape[dim] // sizes) if isinstance(sizes, int) else sizes
    starts = np.cumsum([0, *sizes])
    return [cut_axis(b, v, dim, int(s), int(s) + n, 1, where) for s, n in zip(starts, sizes)]


def expand(b: Builder, where: str, a: Arguments) -> Value:
    want = [n if s == -1 else s for s, n in zip(a["size"], a["self"].shape)]
    if tuple(want) != a["self"].shape:
        raise ValueError(f"repeating {a['self'].shape} to {want}")
    return a["self"]


OPERATORS: dict[str, Operator] = {
    "linear": linear, "matmul": matmul, "mm": matmul, "addmm": addmm, "conv1d": convolution, "conv2d": convolution,
    "_native_batch_norm_legit_no_training": batch_norm, "relu": unary("relu"), "relu6": unary("relu6"),
    "sigmoid": unary("sigmoid"), "tanh": unary("tanh"), "silu": unary("swish"), "hardswish": unary("hard_swish"),
    "hardsigmoid": unary("hard_sigmoid6"), "selu": unary("selu"), "exp": unary("exponential"), "elu": elu,
    "softplus": softplus, "gelu": gelu, "leaky_relu": leaky_relu, "hardtanh": hardtanh, "clamp": clamp,
    "softmax": softmax, "_softmax": softmax, "add": arithmetic("add"), "sub": arithmetic("add", -1.0),
    "mul": arithmetic("mul"), "rsub": reversed_sub, "div": div, "neg": neg, "mean": mean,
    "adaptive_avg_pool1d": adaptive_pool, "adaptive_avg_pool2d": adaptive_pool, "max_pool1d": pool("maxpool2d", False),
    "max_pool2d": pool("maxpool2d", False), "avg_pool1d": pool("avgpool2d", True), "avg_pool2d": pool("avgpool2d", True),
    "view": reshape, "reshape": reshape, "_unsafe_view": reshape, "flatten": flatten, "squeeze": squeeze,
    "unsqueeze": unsqueeze, "permute": permute, "transpose": transpose, "t": transpose, "cat": cat, "pad": pad,
    "constant_pad_nd": pad, "slice": cut, "select": select, "split": split, "split_with_sizes": split,
    "expand": expand, "dropout": dropout, "feature_dropout": dropout, "contiguous": same, "clone": same, "alias": same,
    "detach": same, "to": same, "_to_copy": same,
}  # fmt: skip
