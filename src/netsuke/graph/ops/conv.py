"""Convolutions and fully connected layers, integer and float.

int8:    y = clip(requant(sum (x - zx) * w + b) + zy), w int8 or int4 with one scale per output channel, b int32
float:   y = clip(sum x * w + b)
hybrid:  x, y float32 and w int8/int4 codes with scales: y = clip(scale_w * sum x * q + b): small flash, no calibration

conv2d       x (N, H, W, I), w (O, KH, KW, I / groups), b (O); padding is with the zero point
depthwise2d  x (N, H, W, C), w (KH, KW, C * multiplier), b; output channel c * multiplier + m reads channel c
dense        x (N, …) flattened to (N * rows, I), w (O, I), b (O)

attrs: stride (y, x), pad (top, bottom, left, right), dilation (y, x), groups, low, high
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from netsuke.graph.ops.base import Array, Kind, arity, first, limits, window
from netsuke.graph.requant import multipliers, requantize

if TYPE_CHECKING:
    from netsuke.graph.ir import Op, QGraph, Tensor

LINEAR = {"conv2d": 0, "depthwise2d": 2, "dense": 0}  # kinds with weights, and the axis of their output channel
LARGEST_SUM = (1 << 31) - 1


def ratios(graph: QGraph, op: Op) -> Array:
    """scale_x * scale_w / scale_y, one per output channel."""
    x, y = first(graph, op)
    w = graph.tensors[op.inputs[1]]
    outs = w.shape[-1] if op.kind == "depthwise2d" else w.shape[0]
    return np.broadcast_to(x.scale * np.atleast_1d(w.scale) / y.scale, (outs,)).astype(np.float64)


def largest_bias(w: Tensor, kind: str) -> Array:
    """Per output channel, the largest |bias| with which no sum passes 32 bits; weights that are trained count as 127."""
    outs, taps = (w.shape[-1], w.size // w.shape[-1]) if kind == "depthwise2d" else (w.shape[0], w.size // w.shape[0])
    if w.data is None or w.variable:
        return np.full(outs, LARGEST_SUM - 255 * 127 * taps)
    axes = (0, 1) if kind == "depthwise2d" else tuple(range(1, w.data.ndim))
    return LARGEST_SUM - 255 * np.abs(w.data.astype(np.int64)).sum(axes)


def bias(graph: QGraph, op: Op, args: list[Array | None]) -> Array:
    if len(args) > 2 and args[2] is not None:
        return args[2]
    w = graph.tensors[op.inputs[1]]
    return np.zeros(w.shape[-1] if op.kind == "depthwise2d" else w.shape[0], np.int64)


def finish(graph: QGraph, op: Op, total: Array, b: Array) -> Array:
    """The sum without bias, channels last, to the output's type. `total` is exact (float64 integers for int8)."""
    y = graph.tensors[op.outputs[0]]
    low, high = limits(graph, op)
    if y.dtype == "int8":
        m, shift = multipliers(ratios(graph, op))
        return requantize(np.rint(total).astype(np.int64) + b, m, shift, y.zero, int(low), int(high))
    w = graph.tensors[op.inputs[1]]
    if w.dtype != "float32":
        total = total * np.atleast_1d(w.scale)
    return np.clip(total + b, low, high).astype(np.float32)


def patches(x: Array, op: Op, kh: int, kw: int) -> Array:
    """Windows of x (N, H, W, C) that is already padded: a view (N, OH, OW, KH, KW, C)."""
    (sy, sx), (dy, dx) = op.attrs.get("stride", (1, 1)), op.attrs.get("dilation", (1, 1))
    n, h, w, c = x.shape
    oh, ow = (h - dy * (kh - 1) - 1) // sy + 1, (w - dx * (kw - 1) - 1) // sx + 1
    a, b, d, e = x.strides
    return np.lib.stride_tricks.as_strided(
        x, (n, oh, ow, kh, kw, c), (a, b * sy, d * sx, b * dy, d * dx, e), writeable=False
    )


def centred(graph: QGraph, op: Op, x: Array) -> Array:
    """x - zero in float64 (integers up to 2^53 are exact there, and matrix products are fast), padded with zeros."""
    t, b, left, r = op.attrs.get("pad", (0, 0, 0, 0))
    tensor = graph.tensors[op.inputs[0]]
    out = x.astype(np.float64) - (tensor.zero if tensor.dtype == "int8" else 0)
    return np.pad(out, ((0, 0), (t, b), (left, r), (0, 0)))


def conv2d(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    x, w = args[0], args[1].astype(np.float64)
    o, kh, kw, i = w.shape
    groups = op.attrs.get("groups", 1)
    cut = patches(centred(graph, op, x), op, kh, kw)
    n, oh, ow = cut.shape[:3]
    parts = []
    for g in range(groups):
        rows = np.ascontiguousarray(cut[..., g * i : (g + 1) * i]).reshape(n * oh * ow, kh * kw * i)
        parts.append(rows @ w[g * (o // groups) : (g + 1) * (o // groups)].reshape(-1, kh * kw * i).T)
    total = np.concatenate(parts, axis=1).reshape(n, oh, ow, o)
    return (finish(graph, op, total, bias(graph, op, args)),)


def depthwise2d(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    x, w = args[0], args[1].astype(np.float64)
    kh, kw, o = w.shape
    cut = patches(centred(graph, op, x), op, kh, kw)
    times = o // x.shape[3]
    total = np.zeros((*cut.shape[:3], o))
    for a in range(kh):
        for b in range(kw):
            total += np.repeat(cut[:, :, :, a, b], times, axis=3) * w[a, b]
    return (finish(graph, op, total, bias(graph, op, args)),)


def dense(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    x, w = args[0], args[1].astype(np.float64)
    tensor, y = first(graph, op)
    rows = x.reshape(-1, w.shape[1]).astype(np.float64) - (tensor.zero if tensor.dtype == "int8" else 0)
    total = rows @ w.T
    return (finish(graph, op, total, bias(graph, op, args)).reshape(-1, *y.shape[1:]),)


def _check(graph: QGraph, op: Op) -> str | None:
    wrong = arity(graph, op, 2, 3)
    if wrong:
        return wrong
    x, y = first(graph, op)
    w = graph.tensors[op.inputs[1]]
    b = graph.tensors[op.inputs[2]] if len(op.inputs) > 2 and op.inputs[2] >= 0 else None
    outs = w.shape[-1] if op.kind == "depthwise2d" else w.shape[0]
    if (x.dtype, y.dtype) not in (("int8", "int8"), ("float32", "float32")):
        return f"it maps {x.dtype} to {y.dtype}; it maps int8 to int8 or float32 to float32"
    if w.dtype not in ("int8", "int4", "float32") or (x.dtype == "int8" and w.dtype == "float32"):
        return f"its weights are {w.dtype} under {x.dtype} activations"
    if w.dtype != "float32" and (w.scale is None or w.zero != 0):
        return "its weights need scales and the zero point 0"
    if b is not None and (b.shape != (outs,) or b.dtype != ("int32" if x.dtype == "int8" else "float32")):
        return f"its bias is {b.dtype} {b.shape} for {outs} outputs"
    if x.dtype == "int8":
        if x.scale is None or y.scale is None:
            return "its input or output has no scale"
        try:
            multipliers(ratios(graph, op))
        except ValueError as e:
            return f"it has {e}, which no 32-bit multiplier holds"
        if b is not None and b.constant and np.any(np.abs(b.data.astype(np.int64)) > largest_bias(w, op.kind)):
            return f"its sums of {w.size // outs} products and a bias may pass 32 bits"
    if op.kind == "dense":
        return None if x.size % w.shape[1] == 0 and y.size == x.size // w.shape[1] * outs and len(w.shape) == 2 else (
            f"shapes {x.shape} x {w.shape} -> {y.shape} do not fit"
        )  # fmt: skip
    if len(x.shape) != 4 or len(y.shape) != 4 or len(w.shape) != (3 if op.kind == "depthwise2d" else 4):
        return f"shapes {x.shape} x {w.shape} -> {y.shape} are not those of images"
    groups = op.attrs.get("groups", 1)
    kh, kw = w.shape[:2] if op.kind == "depthwise2d" else w.shape[1:3]
    fits = (
        outs % x.shape[3] == 0 if op.kind == "depthwise2d" else w.shape[3] * groups == x.shape[3] and outs % groups == 0
    )
    (sy, sx), (t, bo, le, ri) = op.attrs.get("stride", (1, 1)), op.attrs.get("pad", (0, 0, 0, 0))
    dy, dx = op.attrs.get("dilation", (1, 1))
    if min(sy, sx, dy, dx) < 1 or min(t, bo, le, ri) < 0 or max(t, bo) >= dy * kh or max(le, ri) >= dx * kw:
        return f"stride {sy, sx}, padding {t, bo, le, ri}, dilation {dy, dx} do not fit a window of {kh} x {kw}"
    want = (x.shape[0], window(x.shape[1], kh, sy, t, bo, dy), window(x.shape[2], kw, sx, le, ri, dx), outs)
    if not fits or y.shape != want:
        return f"shapes {x.shape} x {w.shape} -> {y.shape} do not fit (expected {want})"
    return None


def _macs(graph: QGraph, op: Op) -> int:
    w, y = graph.tensors[op.inputs[1]], graph.tensors[op.outputs[0]]
    outs = w.shape[-1] if op.kind == "depthwise2d" else w.shape[0]
    return y.size * (w.size // outs)


def pointwise(graph: QGraph, op: Op) -> bool:
    """Whether a conv2d looks at single pixels: 1 x 1, stride 1, no padding, one group."""
    w = graph.tensors[op.inputs[1]]
    return (
        op.kind == "conv2d" and w.shape[1:3] == (1, 1) and tuple(op.attrs.get("stride", (1, 1))) == (1, 1)
        and not any(op.attrs.get("pad", (0,))) and op.attrs.get("groups", 1) == 1
    )  # fmt: skip


def _inplace(graph: QGraph, op: Op) -> tuple[int, ...]:
    """A pointwise convolution copies a few pixels out before it overwrites them (from the last pixel on when the output
    is larger); a depthwise one copies a channel's plane out, if there is one output per input channel and no more of them."""
    x, y = first(graph, op)
    if x.dtype != "int8":
        return ()
    if pointwise(graph, op):
        return (0,)
    same = op.kind == "depthwise2d" and x.shape[3] == y.shape[3] and y.shape[1] * y.shape[2] <= x.shape[1] * x.shape[2]
    return (0,) if same else ()


KINDS = {
    "conv2d": Kind(conv2d, _check, _macs, _inplace),
    "depthwise2d": Kind(depthwise2d, _check, _macs, _inplace),
    "dense": Kind(dense, _check, _macs),
}
