"""Operators of training on the chip: forward int8, gradients float32, weights and biases updated in place. Batch of 1.

Every float32 sum is taken in the order that is written here, from +0, one addition after the other, with no fused
multiply-add: NumPy and C (-ffp-contract=off) then give the same bits, and weights stay equal over any number of steps.

clip_mask           x int8 -> bits uint8 (1, ceil(n / 8)), lowest bit first: 1 where low < x < high
pick_channels       x (1, H, W, C) int8, channels int32 (c) -> (1, H, W, c)
loss_gradient       logits int8 (1, K), label int32 (1), exps float32 (256) -> gradient float32 (1, K) by codes, and the
                    probability (1) of the label: t_k = exps[max - x_k], S = sum t_k, p_k = t_k / S,
                    g_k = (p_k - [k = label]) scale
clip_gradient       g, bits or none, e float32 (C) or (1) -> g e where the bit is 1, else 0; may overwrite g
pool_gradient       g (1, 1, 1, C) -> (1, H, W, C), g times attrs["factor"]
conv_gradient       g (1, OH, OW, O), w -> gradient of the input: sum over ky, kx, then o, of g w
depthwise_gradient  g (1, OH, OW, C), w (KH, KW, C) -> sum over ky, kx of g w
conv_update         g, x, w (O, KH, KW, c), s float32 (O), rate (1), step -> w; x and w have the trained channels only
depthwise_update    g, x, w (KH, KW, c), channels of g or none, s (c), rate, step -> w
                    both: a = sum over oy, ox of (x - zero) g;  w <- clip(w - round(rate s a), -127, 127)
merge_channels      w int8, kept int8 (its trained channels), channels -> w with these channels in place, for a layer to read
bias_update         g, b, s, rate, step -> b: a = sum over oy, ox of g;  b <- clip(b - round(rate s a), -room, room)
count_step          step uint32 (1) -> step + 1

round is stochastic: floor(v + u), u = (h >> 8) 2^-24 with h = mix(mix(key + step) + i) for element i of the update, mix the
finaliser of MurmurHash3 (32 bit): no state, the same numbers in any order, so they can be made in parallel and on any
machine. |v| is held below 2^24. attrs["truncate"]: as the released kernels, v is cut toward zero and the code wraps around.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from netsuke.graph.ops.base import Array, Kind
from netsuke.graph.ops.conv import patches

if TYPE_CHECKING:
    from netsuke.graph.ir import Op, QGraph

F32 = np.float32
LARGEST_CHANGE = F32(1 << 24)


def mix(h: Array) -> Array:
    """MurmurHash3's finaliser on uint32."""
    h = np.asarray(h, np.uint32)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def uniform(key: int, step: Array, n: int) -> Array:
    """n float32 numbers in [0, 1), multiples of 2^-24; `step` uint32 (1,)."""
    start = mix(np.array([key & 0xFFFFFFFF], np.uint32) + step)
    return (mix(start + np.arange(n, dtype=np.uint32)) >> np.uint32(8)).astype(F32) * F32(2.0**-24)


def change(op: Op, a: Array, s: Array, rate: Array, step: Array) -> Array:
    """int64: what is subtracted, for gradients `a` and their scales `s` of the same shape."""
    with np.errstate(over="ignore", invalid="ignore"):
        v = (rate[0] * s).astype(F32) * a
    v = np.where(v < LARGEST_CHANGE, v, LARGEST_CHANGE)
    v = np.where(v > -LARGEST_CHANGE, v, -LARGEST_CHANGE)
    if op.attrs.get("truncate"):
        return np.trunc(v).astype(np.int64)
    return np.floor(v + uniform(op.attrs["key"], step, a.size).reshape(a.shape)).astype(np.int64)


def _stored(op: Op, old: Array, delta: Array, room: int) -> Array:
    new = old.astype(np.int64) - delta
    if op.attrs.get("truncate"):
        return new.astype(old.dtype)
    return np.clip(new, -room, room).astype(old.dtype)


def clip_mask(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    inside = (args[0] > op.attrs["low"]) & (args[0] < op.attrs["high"])
    return (np.packbits(inside.reshape(1, -1), axis=1, bitorder="little"),)


def pick_channels(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    return (np.ascontiguousarray(args[0][..., args[1]]),)


def loss_gradient(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    x, label = args[0].reshape(-1).astype(np.int64), int(args[1][0])
    t = args[2][x.max() - x]
    total = F32(0)
    for v in t:
        total = total + v
    p = t / total
    hit = np.arange(len(x)) == label
    g = (p - hit.astype(F32)) * F32(float(graph.tensors[op.inputs[0]].scale))
    return g.reshape(1, -1), p[hit] if hit.any() else np.zeros(1, F32)


def clip_gradient(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    g, bits, e = args
    out = g * e
    if bits is not None:
        inside = np.unpackbits(bits, axis=1, count=g.size, bitorder="little").reshape(g.shape)
        out = np.where(inside == 1, out, F32(0))
    return (out,)


def pool_gradient(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    y = graph.tensors[op.outputs[0]]
    return (np.broadcast_to(args[0] * F32(op.attrs["factor"]), y.shape).copy(),)


def geometry(x: tuple[int, ...], w: tuple[int, ...], depthwise: bool, op: Op) -> tuple[int, ...]:
    """(h, w, c, oh, ow, o, kh, kw, sy, sx, top, left) of a layer that maps x; a dense layer is a row of pixels."""
    if len(w) == 2:
        return 1, math.prod(x) // w[1], w[1], 1, math.prod(x) // w[1], w[0], 1, 1, 1, 1, 0, 0
    kh, kw = w[:2] if depthwise else w[1:3]
    (sy, sx), (top, bottom, left, right) = op.attrs["stride"], op.attrs["pad"]
    oh, ow = (x[1] + top + bottom - kh) // sy + 1, (x[2] + left + right - kw) // sx + 1
    return x[1], x[2], x[3], oh, ow, w[2] if depthwise else w[0], kh, kw, sy, sx, top, left


def conv_gradient(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    y, w = graph.tensors[op.outputs[0]], args[1]
    h, wide, c, oh, ow, o, kh, kw, sy, sx, top, left = geometry(y.shape, w.shape, False, op)
    g, w = args[0].reshape(oh, ow, o), w.reshape(o, kh, kw, c).astype(F32)
    out = np.zeros((h, wide, c), F32)
    for ky in range(kh):
        for kx in range(kw):
            into, of = _reach(h, oh, ky, sy, top), _reach(wide, ow, kx, sx, left)
            target, source = out[into[0], of[0]], g[into[1], of[1]]
            for k in range(o):
                target += source[..., k, None] * w[k, ky, kx]
    return (out.reshape(y.shape),)


def depthwise_gradient(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    y, w = graph.tensors[op.outputs[0]], args[1].astype(F32)
    h, wide, c, oh, ow, _, kh, kw, sy, sx, top, left = geometry(y.shape, w.shape, True, op)
    g, out = args[0].reshape(oh, ow, c), np.zeros((h, wide, c), F32)
    for ky in range(kh):
        for kx in range(kw):
            into, of = _reach(h, oh, ky, sy, top), _reach(wide, ow, kx, sx, left)
            target = out[into[0], of[0]]
            target += g[into[1], of[1]] * w[ky, kx]
    return (out.reshape(y.shape),)


def _reach(n: int, outs: int, tap: int, stride: int, before: int) -> tuple[slice, slice]:
    """Inputs that a tap sees along one axis, and the outputs that see them: input = output * stride + tap - before."""
    low = max(0, -(-(before - tap) // stride))
    high = min(outs, (n - 1 + before - tap) // stride + 1)
    if high <= low:
        return slice(0, 0), slice(0, 0)
    start = low * stride + tap - before
    return slice(start, start + (high - low - 1) * stride + 1, stride), slice(low, high)


def update_geometry(graph: QGraph, op: Op) -> tuple[int, ...]:
    """`geometry` of an update, where c counts the channels that are trained."""
    x, w = graph.tensors[op.inputs[1]], graph.tensors[op.inputs[2]]
    return geometry(x.shape, w.shape, op.kind == "depthwise_update", op)


def windows(graph: QGraph, op: Op, x: Array) -> tuple[Array, tuple[int, ...]]:
    """float32 (OH, OW, KH, KW, c) of x - zero, and the geometry."""
    tensor, w = graph.tensors[op.inputs[1]], graph.tensors[op.inputs[2]]
    geo = update_geometry(graph, op)
    h, wide, c, _, _, _, kh, kw, *_ = geo
    top, bottom, left, right = op.attrs["pad"] if len(w.shape) > 2 else (0, 0, 0, 0)
    centred = x.reshape(h, wide, c).astype(F32) - F32(tensor.zero)
    padded = np.pad(centred, ((top, bottom), (left, right), (0, 0)))[None]
    return patches(padded, op, kh, kw)[0], geo


def conv_weight_gradient(graph: QGraph, op: Op, g: Array, x: Array) -> Array:
    """float32 (O, KH, KW, c)."""
    seen, (_, _, c, oh, ow, o, kh, kw, *_) = windows(graph, op, x)
    g, out = g.reshape(oh, ow, o), np.zeros((o, kh, kw, c), F32)
    for oy in range(oh):
        for ox in range(ow):
            out += g[oy, ox, :, None, None, None] * seen[oy, ox]
    return out


def depthwise_weight_gradient(graph: QGraph, op: Op, g: Array, x: Array) -> Array:
    """float32 (KH, KW, c); g has all channels, x the kept ones."""
    seen, (_, _, c, oh, ow, _, kh, kw, *_) = windows(graph, op, x)
    kept = graph.tensors[op.inputs[3]].data if op.inputs[3] >= 0 else slice(None)
    g, out = g[0][..., kept], np.zeros((kh, kw, c), F32)
    for oy in range(oh):
        for ox in range(ow):
            out += g[oy, ox] * seen[oy, ox]
    return out


def conv_update(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    g, x, w, s, rate, step = args
    a = conv_weight_gradient(graph, op, g, x)
    delta = change(op, a, np.broadcast_to(s[:, None, None, None], a.shape), rate, step)
    return (_stored(op, w, delta.reshape(w.shape), 127),)


def depthwise_update(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    g, x, w, _, s, rate, step = args
    a = depthwise_weight_gradient(graph, op, g, x)
    return (_stored(op, w, change(op, a, np.broadcast_to(s, a.shape), rate, step), 127),)


def merge_channels(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    out = args[0].copy()
    out[..., args[2]] = args[1]
    return (out,)


def bias_gradient(g: Array) -> Array:
    """float32 (O,), the sum over pixels in order."""
    rows = g.reshape(-1, g.shape[-1])
    out = np.zeros(rows.shape[1], F32)
    for row in rows:
        out += row
    return out


def bias_update(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    g, b, s, rate, step = args
    return (_stored(op, b, change(op, bias_gradient(g), s, rate, step), op.attrs["room"]),)


def count_step(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    return (args[0] + np.uint32(1),)


def _types(*want: str | None):
    """A check of the types of all inputs ("?": may be absent) and that there is an output."""

    def check(graph: QGraph, op: Op) -> str | None:
        if len(op.inputs) != len(want) or not op.outputs:
            return f"it has {len(op.inputs)} inputs; it takes {len(want)}"
        for k, (i, name) in enumerate(zip(op.inputs, want)):
            if i < 0 and name.endswith("?"):
                continue
            if i < 0 or graph.tensors[i].dtype != name.rstrip("?"):
                return f"its input {k} is {'absent' if i < 0 else graph.tensors[i].dtype}; it takes {name.rstrip('?')}"
        return _SHAPES.get(op.kind, lambda graph, op: None)(graph, op)

    return check


def _mask_shape(graph: QGraph, op: Op) -> str | None:
    x, y = graph.tensors[op.inputs[0]], graph.tensors[op.outputs[0]]
    return (
        None
        if y.shape == (1, -(-x.size // 8)) and y.dtype == "uint8"
        else f"{x.size} elements have a mask of {y.shape}"
    )


def _pick_shape(graph: QGraph, op: Op) -> str | None:
    x, kept, y = (graph.tensors[i] for i in (*op.inputs, *op.outputs))
    inside = kept.constant and kept.data.min() >= 0 and kept.data.max() < x.shape[-1]
    return None if inside and y.shape == (*x.shape[:-1], kept.size) else f"it picks {kept.size} channels of {x.shape}"


def _clip_shape(graph: QGraph, op: Op) -> str | None:
    g, e, y = graph.tensors[op.inputs[0]], graph.tensors[op.inputs[2]], graph.tensors[op.outputs[0]]
    fits = g.shape == y.shape and e.size in (1, g.shape[-1])
    if fits and op.inputs[1] >= 0:
        fits = graph.tensors[op.inputs[1]].size == -(-g.size // 8)
    return None if fits else f"it scales {g.shape} by {e.size} numbers to {y.shape}"


def _gradient_shape(graph: QGraph, op: Op) -> str | None:
    g, w, y = (graph.tensors[i] for i in (*op.inputs, *op.outputs))
    geo = geometry(y.shape, w.shape, op.kind == "depthwise_gradient", op)
    return None if geo[3] * geo[4] * geo[5] == g.size else f"{g.shape} and {w.shape} give no gradient of {y.shape}"


def _update_shape(graph: QGraph, op: Op) -> str | None:
    g, x, w = (graph.tensors[op.inputs[k]] for k in (0, 1, 2))
    h, wide, c, oh, ow, *_ = update_geometry(graph, op)
    if op.outputs[0] != op.inputs[2] or not w.variable:
        return "it does not update a variable in place"
    if op.kind == "conv_update":
        fits, outs = graph.tensors[op.inputs[3]].size == w.shape[0], w.shape[0]
    else:
        kept = graph.tensors[op.inputs[3]].size if op.inputs[3] >= 0 else g.shape[-1]
        fits, outs = graph.tensors[op.inputs[4]].size == kept == w.shape[-1], g.shape[-1]
    return (
        None if fits and h * wide * c == x.size and oh * ow * outs == g.size else f"{g.shape}, {x.shape} for {w.shape}"
    )


def _merge_shape(graph: QGraph, op: Op) -> str | None:
    w, kept, channels, y = (graph.tensors[i] for i in (*op.inputs, *op.outputs))
    inside = channels.constant and channels.data.min() >= 0 and channels.data.max() < w.shape[-1]
    fits = y.shape == w.shape and kept.shape == (*w.shape[:-1], channels.size)
    return None if inside and fits else f"it puts {kept.shape} into {w.shape} for {y.shape}"


def _bias_shape(graph: QGraph, op: Op) -> str | None:
    g, b, s = (graph.tensors[op.inputs[k]] for k in (0, 1, 2))
    if op.outputs[0] != op.inputs[1] or not b.variable:
        return "it does not update a variable in place"
    return None if b.size == s.size == g.shape[-1] else f"{b.size} biases for a gradient of {g.shape}"


_SHAPES = {
    "clip_mask": _mask_shape, "pick_channels": _pick_shape, "clip_gradient": _clip_shape, "conv_gradient": _gradient_shape,
    "depthwise_gradient": _gradient_shape, "conv_update": _update_shape, "depthwise_update": _update_shape,
    "bias_update": _bias_shape, "merge_channels": _merge_shape,
}  # fmt: skip


def _gradient_macs(graph: QGraph, op: Op) -> int:
    w = graph.tensors[op.inputs[1]]
    outs = w.shape[-1] if op.kind == "depthwise_gradient" else w.shape[0]
    return graph.tensors[op.inputs[0]].size * (w.size // outs)


def _update_macs(graph: QGraph, op: Op) -> int:
    _, _, _, oh, ow, *_ = update_geometry(graph, op)
    return oh * ow * graph.tensors[op.inputs[2]].size


def _first(graph: QGraph, op: Op) -> tuple[int, ...]:
    return (0,)


KINDS = {
    "clip_mask": Kind(clip_mask, _types("int8")),
    "pick_channels": Kind(pick_channels, _types("int8", "int32")),
    "loss_gradient": Kind(loss_gradient, _types("int8", "int32", "float32")),
    "clip_gradient": Kind(clip_gradient, _types("float32", "uint8?", "float32"), inplace=_first),
    "pool_gradient": Kind(pool_gradient, _types("float32")),
    "conv_gradient": Kind(conv_gradient, _types("float32", "int8"), _gradient_macs),
    "depthwise_gradient": Kind(depthwise_gradient, _types("float32", "int8"), _gradient_macs),
    "conv_update": Kind(conv_update, _types("float32", "int8", "int8", "float32", "float32", "uint32"), _update_macs),
    "depthwise_update": Kind(
        depthwise_update, _types("float32", "int8", "int8", "int32?", "float32", "float32", "uint32"), _update_macs
    ),
    "merge_channels": Kind(merge_channels, _types("int8", "int8", "int32")),
    "bias_update": Kind(bias_update, _types("float32", "int32", "float32", "float32", "uint32")),
    "count_step": Kind(count_step, _types("uint32")),
}
