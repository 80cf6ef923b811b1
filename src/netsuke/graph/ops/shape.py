"""Pooling, and operators that only move elements.

avgpool2d    int8, one scale and zero point: sum of codes / count to the nearest, halves away from zero, as LiteRT does it
             int8, two scales: requant of the sum of (x - zx), e = scale_x / (scale_y * count); float: mean
             `count` excludes padding
maxpool2d    input and output have one scale; padding never wins
reshape      same elements, other shape (a view of its input: costs nothing)
pad          attrs pads ((before, after), …) per axis, with the zero point; attr value for float
transpose    attrs perm;  concat  attrs axis (all inputs have the output's scale);  slice  attrs begin, stride per axis
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from netsuke.graph.ops.base import Array, Kind, arity, first, limits, same_type, window
from netsuke.graph.requant import multipliers, requantize

if TYPE_CHECKING:
    from netsuke.graph.ir import Op, QGraph


def pool_counts(graph: QGraph, op: Op) -> Array:
    """Real elements under each window, (OH, OW)."""
    x, y = first(graph, op)
    (kh, kw), (sy, sx), (t, _, left, _) = (
        op.attrs["window"],
        op.attrs.get("stride", (1, 1)),
        op.attrs.get("pad", (0, 0, 0, 0)),
    )

    def lengths(n_out: int, size: int, k: int, s: int, before: int) -> Array:
        start = np.arange(n_out) * s - before
        return np.minimum(start + k, size) - np.maximum(start, 0)

    return lengths(y.shape[1], x.shape[1], kh, sy, t)[:, None] * lengths(y.shape[2], x.shape[2], kw, sx, left)[None]


def _windows(graph: QGraph, op: Op, x: Array, fill: float) -> Array:
    from netsuke.graph.ops.conv import patches

    t, b, left, r = op.attrs.get("pad", (0, 0, 0, 0))
    return patches(np.pad(x, ((0, 0), (t, b), (left, r), (0, 0)), constant_values=fill), op, *op.attrs["window"])


def avgpool2d(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    x, y = first(graph, op)
    low, high = limits(graph, op)
    count = pool_counts(graph, op)[None, :, :, None]
    if x.dtype == "float32":
        total = _windows(graph, op, args[0].astype(np.float64), 0).sum((3, 4))
        return (np.clip(total / count, low, high).astype(np.float32),)
    if one_scale(graph, op):
        total = _windows(graph, op, args[0].astype(np.int64), 0).sum((3, 4))
        mean = np.sign(total) * ((np.abs(total) + count // 2) // count)
        return (np.clip(mean, low, high).astype(np.int8),)
    total = _windows(graph, op, args[0].astype(np.int64) - x.zero, 0).sum((3, 4))
    m, shift = pool_multipliers(graph, op)
    return (requantize(total, m[count], shift, y.zero, int(low), int(high)),)


def one_scale(graph: QGraph, op: Op) -> bool:
    """Whether an int8 operator's input and output have one scale and zero point."""
    x, y = first(graph, op)
    return float(x.scale) == float(y.scale) and x.zero == y.zero


def pool_multipliers(graph: QGraph, op: Op) -> tuple[Array, int]:
    """For two scales: (M by number of elements under the window, S); M[0] is unused."""
    x, y = first(graph, op)
    kh, kw = op.attrs["window"]
    m, shift = multipliers(float(x.scale / y.scale) / np.maximum(np.arange(kh * kw + 1), 1))
    return m, shift


def maxpool2d(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    low, high = limits(graph, op)
    fill = -128 if args[0].dtype == np.int8 else -np.inf
    return (np.clip(_windows(graph, op, args[0], fill).max((3, 4)), low, high).astype(args[0].dtype),)


def reshape(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    x, y = first(graph, op)
    batch = args[0].size // x.size
    return (args[0].reshape(batch * y.shape[0], *y.shape[1:]),)


def pad(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    x = graph.tensors[op.inputs[0]]
    fill = x.zero if x.dtype == "int8" else op.attrs.get("value", 0.0)
    return (np.pad(args[0], op.attrs["pads"], constant_values=fill),)


def transpose(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    return (np.ascontiguousarray(args[0].transpose(op.attrs["perm"])),)


def concat(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    return (np.concatenate(args, axis=op.attrs["axis"]),)


def cut(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    y = graph.tensors[op.outputs[0]]
    strides = op.attrs.get("stride", (1,) * len(y.shape))
    parts = [slice(b, b + s * n, s) for b, n, s in zip(op.attrs["begin"], y.shape, strides)]
    if graph.tensors[op.inputs[0]].shape[0] == y.shape[0]:
        parts[0] = slice(None)  # the whole batch, however large
    return (args[0][tuple(parts)],)


def _pool(graph: QGraph, op: Op) -> str | None:
    wrong = arity(graph, op, 1) or same_type(graph, op)
    if wrong:
        return wrong
    x, y = first(graph, op)
    (kh, kw), (sy, sx), (t, b, left, r) = (
        op.attrs["window"],
        op.attrs.get("stride", (1, 1)),
        op.attrs.get("pad", (0, 0, 0, 0)),
    )
    if tuple(op.attrs.get("dilation", (1, 1))) != (1, 1):
        return f"its window has the dilation {op.attrs['dilation']}"
    if len(x.shape) != 4 or min(kh, kw, sy, sx) < 1 or min(t, b, left, r) < 0 or max(t, b) >= kh or max(left, r) >= kw:
        return f"a window of {kh} x {kw}, stride {sy, sx}, padding {t, b, left, r} does not fit {x.shape}"
    want = (x.shape[0], window(x.shape[1], kh, sy, t, b), window(x.shape[2], kw, sx, left, r), x.shape[3])
    if y.shape != want:
        return f"it maps {x.shape} to {y.shape} (expected {want})"
    if op.kind == "maxpool2d" and x.dtype == "int8" and not one_scale(graph, op):
        return "its input and output have different scales"
    return None


def _reshape(graph: QGraph, op: Op) -> str | None:
    x, y = first(graph, op)
    if wrong := arity(graph, op, 1):
        return wrong
    return None if x.size == y.size and x.dtype == y.dtype else f"it maps {x.shape} {x.dtype} to {y.shape} {y.dtype}"


def _pad(graph: QGraph, op: Op) -> str | None:
    x, y = first(graph, op)
    pads = op.attrs["pads"]
    if (
        len(pads) != len(x.shape)
        or tuple(n + a + b for n, (a, b) in zip(x.shape, pads)) != y.shape
        or min(map(min, pads)) < 0
    ):
        return f"padding {pads} does not make {y.shape} of {x.shape}"
    if not math.isfinite(op.attrs.get("value", 0.0)):
        return f"it pads with {op.attrs['value']}"
    return _moved(graph, op)


def _transpose(graph: QGraph, op: Op) -> str | None:
    x, y = first(graph, op)
    perm = tuple(op.attrs["perm"])
    if sorted(perm) != list(range(len(x.shape))) or tuple(x.shape[p] for p in perm) != y.shape:
        return f"the order {perm} does not make {y.shape} of {x.shape}"
    return _moved(graph, op)


def _slice(graph: QGraph, op: Op) -> str | None:
    x, y = first(graph, op)
    begin, strides = op.attrs["begin"], op.attrs.get("stride", (1,) * len(y.shape))
    inside = len(x.shape) == len(y.shape) == len(begin) == len(strides) and all(
        b >= 0 and s >= 1 and b + s * (n - 1) < m for b, s, n, m in zip(begin, strides, y.shape, x.shape)
    )
    return _moved(graph, op) if inside else f"{y.shape} from {begin} on in steps of {strides} is not inside {x.shape}"


def _concat(graph: QGraph, op: Op) -> str | None:
    if wrong := arity(graph, op, max(len(op.inputs), 1)):
        return wrong
    y, axis = graph.tensors[op.outputs[0]], op.attrs["axis"]
    parts = [graph.tensors[i] for i in op.inputs]
    if not 0 <= axis < len(y.shape) or any(len(p.shape) != len(y.shape) for p in parts):
        return f"it joins {[p.shape for p in parts]} along axis {axis}"
    rest = [p.shape[:axis] + p.shape[axis + 1 :] for p in (*parts, y)]
    if len(set(rest)) > 1 or sum(p.shape[axis] for p in parts) != y.shape[axis]:
        return f"it joins {[p.shape for p in parts]} to {y.shape} along axis {axis}"
    if any(p.dtype != y.dtype for p in parts):
        return f"it joins {', '.join(p.dtype for p in parts)} to {y.dtype}"
    if y.dtype == "int8" and any(p.zero != y.zero or float(p.scale) != float(y.scale) for p in parts):
        return "its inputs and output have different scales (importers requantize first)"
    return None


def _moved(graph: QGraph, op: Op) -> str | None:
    x, y = first(graph, op)
    if wrong := arity(graph, op, 1):
        return wrong
    if x.dtype != y.dtype:
        return f"it maps {x.dtype} to {y.dtype}"
    if x.scale is not None and (y.scale is None or float(x.scale) != float(y.scale) or x.zero != y.zero):
        return "its input and output have different scales"
    return None


KINDS = {
    "avgpool2d": Kind(avgpool2d, _pool),
    "maxpool2d": Kind(maxpool2d, _pool),
    "reshape": Kind(reshape, _reshape),
    "pad": Kind(pad, _pad),
    "transpose": Kind(transpose, _transpose),
    "concat": Kind(concat, _concat),
    "slice": Kind(cut, _slice),
}
