"""Kernel calls of the arithmetic operators: convolutions, dense layers, elementwise operators, pools, softmax."""

from __future__ import annotations

import math

import numpy as np

from netsuke.graph.ir import Op, QGraph, Tensor
from netsuke.graph.lower import SPARE, Lowering, Pointer, Rule
from netsuke.graph.ops.base import first, limits
from netsuke.graph.ops.conv import LARGEST_SUM, largest_bias, pointwise, ratios
from netsuke.graph.ops.elementwise import FUNCTIONS, softmax_table
from netsuke.graph.ops.shape import one_scale, pool_counts, pool_multipliers
from netsuke.graph.requant import multipliers, sum_multipliers

BLOCK = 4  # rows (pixels) that the integer kernels work on at once
STRIP = 8  # rows of outputs for which a depthwise convolution copies one channel's rows out
UNARY = tuple(FUNCTIONS)  # the numbers of unary_f32.c
LARGEST = float(np.finfo(np.float32).max)


def _window(op: Op, x: Tensor, y: Tensor, kh: int, kw: int) -> dict[str, int]:
    """The fields that everything with a sliding window has."""
    (sy, sx), (top, _, left, _) = op.attrs.get("stride", (1, 1)), op.attrs.get("pad", (0, 0, 0, 0))
    return {
        "h": x.shape[1], "w": x.shape[2], "c": x.shape[3], "oh": y.shape[1], "ow": y.shape[2],
        "kh": kh, "kw": kw, "sy": sy, "sx": sx, "top": top, "left": left,
    }  # fmt: skip


def _dilated(op: Op) -> dict[str, int]:
    dy, dx = op.attrs.get("dilation", (1, 1))
    return {"dy": dy, "dx": dx}


def _clip(graph: QGraph, op: Op) -> dict[str, int | float]:
    low, high = limits(graph, op)
    if graph.tensors[op.outputs[0]].dtype == "int8":
        return {"low": int(low), "high": int(high)}
    return {"low": max(float(low), -LARGEST), "high": min(float(high), LARGEST)}


def pack4(codes: np.ndarray) -> np.ndarray:
    """(rows, n) int4 codes as uint8 (rows, ceil(n / 2)), the low half of a byte first."""
    rows = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))).astype(np.uint8) & 15
    return rows[:, ::2] | rows[:, 1::2] << 4


def _weights(lowering: Lowering, op: Op, by_channel: bool = False, position: int = 1) -> Pointer:
    """The weights of a linear operator as its kernel reads them. by_channel: a depthwise operator's with the output channel
    first, as those of a convolution of one input channel. position: of the weights among the inputs."""
    index = op.inputs[position]
    t = lowering.graph.tensors[index]
    if t.dtype == "float32" or t.variable or t.data is None:
        return lowering.tensor(index)
    swap = op.kind == "depthwise2d" and (by_channel or t.dtype == "int4")

    def make() -> np.ndarray:
        data = np.moveaxis(t.data, -1, 0) if swap else t.data
        if t.dtype == "int4":
            data = pack4(np.ascontiguousarray(data).reshape(data.shape[0], -1))
        return np.pad(np.ascontiguousarray(data).reshape(-1), (0, SPARE))

    return lowering.constant(index, f"{t.dtype}{'.by_channel' if swap else ''}", make)


def _room(graph: QGraph, op: Op) -> int:
    """By how many bits every sum of an integer linear operator may be shifted left and still fit 32 bits: 0 to 8."""
    b = graph.tensors[op.inputs[2]] if len(op.inputs) > 2 and op.inputs[2] >= 0 else None
    if b is not None and (b.variable or not b.constant):
        return 0
    w = graph.tensors[op.inputs[1]]
    products = LARGEST_SUM - largest_bias(w, op.kind) + (0 if b is None else np.abs(b.data.astype(np.int64)))
    return max(0, min(8, 31 - int(np.max(products)).bit_length()))


def _linear(lowering: Lowering, op: Op, kernel: str, shape: dict[str, int], by_channel: bool = False) -> None:
    """A call of one of the linear kernels, integer, float or hybrid, whose dimensions are `shape`."""
    graph = lowering.graph
    x, y = first(graph, op)
    w = graph.tensors[op.inputs[1]]
    weights = _weights(lowering, op, by_channel)
    bias = lowering.tensor(op.inputs[2] if len(op.inputs) > 2 else -1)
    source, target = lowering.tensor(op.inputs[0]), lowering.tensor(op.outputs[0])
    params = shape | _clip(graph, op)
    if x.dtype == "int8":
        m, shift = multipliers(ratios(graph, op))
        params |= {"zx": x.zero, "zy": y.zero, "shift": shift, "room": _room(graph, op)}
        name = f"{kernel}_w4" if w.dtype == "int4" else kernel
        lowering.call(name, params, source, weights, bias, lowering.table("m", m), target, lowering.scratch())
    elif w.dtype == "float32":
        lowering.call(f"{kernel}_f32", params, source, weights, bias, target)
    else:
        outs = w.shape[-1] if op.kind == "depthwise2d" else w.shape[0]
        scale = np.broadcast_to(np.atleast_1d(w.scale), (outs,)).astype(np.float32)
        name = f"{kernel}_f32{'w4' if w.dtype == 'int4' else 'w8'}"
        lowering.call(name, params, source, weights, lowering.table("scale", scale), bias, target)


def _one_image(lowering: Lowering, x: Tensor) -> None:
    if x.shape[0] != 1:
        raise lowering.refuse(f"its input {x.name!r} holds {x.shape[0]} images", "1 image a run")


def _rows(graph: QGraph, op: Op) -> int:
    return graph.tensors[op.inputs[0]].size // graph.tensors[op.inputs[1]].shape[-1]


def _dense(lowering: Lowering, op: Op) -> None:
    graph = lowering.graph
    w = graph.tensors[op.inputs[1]]
    _linear(lowering, op, "ns_dense", {"rows": _rows(graph, op), "i": w.shape[-1], "o": w.shape[0]})


def _conv2d(lowering: Lowering, op: Op) -> None:
    x, y = first(lowering.graph, op)
    o, kh, kw, _ = lowering.graph.tensors[op.inputs[1]].shape
    _one_image(lowering, x)
    if pointwise(lowering.graph, op):
        _dense(lowering, op)
        return
    shape = _window(op, x, y, kh, kw) | _dilated(op) | {"o": o, "groups": op.attrs.get("groups", 1)}
    _linear(lowering, op, "ns_conv2d", shape)


def _of_one_channel(graph: QGraph, op: Op) -> bool:
    """A depthwise convolution of one channel is a convolution whose weights have one input channel."""
    x, y = first(graph, op)
    return x.shape[3] == 1 and y.shape[3] > 1 and x.dtype == "int8" and not graph.tensors[op.inputs[1]].variable


def _depthwise2d(lowering: Lowering, op: Op) -> None:
    graph = lowering.graph
    x, y = first(graph, op)
    kh, kw, o = graph.tensors[op.inputs[1]].shape
    _one_image(lowering, x)
    shape = _window(op, x, y, kh, kw) | _dilated(op)
    if _of_one_channel(graph, op):
        _linear(lowering, op, "ns_conv2d", shape | {"o": o, "groups": 1}, by_channel=True)
        return
    shape |= {"times": o // x.shape[3]}
    if x.dtype == "int8":
        shape["rows"] = strip_rows(shape)
    _linear(lowering, op, "ns_depthwise2d", shape)


def strip_rows(s: dict[str, int]) -> int:
    """Rows of outputs per strip: `STRIP`, or all of them where a strip's outputs would overwrite rows not read yet."""
    for y0 in range(0, s["oh"], STRIP):
        unread = y0 * s["sy"] - s["top"] + (STRIP - 1) * s["sy"] + (s["kh"] - 1) * s["dy"] + 1
        if unread < s["h"] and min(y0 + STRIP, s["oh"]) * s["ow"] > unread * s["w"]:
            return s["oh"]
    return min(STRIP, s["oh"])


def _whole(w: Tensor) -> int:
    """Codes in a word of weights."""
    return 8 if w.dtype == "int4" else 4


def _block_bytes(w: Tensor, rows: int, length: int) -> int:
    """`rows` rows of 16-bit numbers, padded to whole words of codes; three are worked on as four."""
    return (rows if rows < BLOCK - 1 else BLOCK) * -(-length // _whole(w)) * _whole(w) * 2


def _dense_scratch(graph: QGraph, op: Op) -> int:
    x, w = graph.tensors[op.inputs[0]], graph.tensors[op.inputs[1]]
    return _block_bytes(w, _rows(graph, op), w.shape[-1]) if x.dtype == "int8" else 0


def _conv2d_scratch(graph: QGraph, op: Op) -> int:
    x, y = first(graph, op)
    w = graph.tensors[op.inputs[1]]
    if x.dtype != "int8":
        return 0
    if pointwise(graph, op):
        return _dense_scratch(graph, op)
    channels = w.shape[3] if op.kind == "conv2d" else 1
    length = math.prod(w.shape[1:3] if op.kind == "conv2d" else w.shape[:2]) * channels
    staged = _block_bytes(w, 1, length) // 2 if channels % _whole(w) else 0  # the window's codes, not widened yet
    return _block_bytes(w, y.shape[1] * y.shape[2], length) + staged


def _depthwise2d_scratch(graph: QGraph, op: Op) -> int:
    x, y = first(graph, op)
    if x.dtype != "int8":
        return 0
    if _of_one_channel(graph, op):
        return _conv2d_scratch(graph, op)
    kh, kw = graph.tensors[op.inputs[1]].shape[:2]
    s = _window(op, x, y, kh, kw) | _dilated(op)
    width = (s["sx"] * (s["ow"] + 3 & ~3) + s["dx"] * (max(kw | 1, 3) - 1) + 1) & ~1
    return ((strip_rows(s) - 1) * s["sy"] + (kh - 1) * s["dy"] + 1) * width * 2


def _broadcast(lowering: Lowering, op: Op) -> dict[str, int]:
    """n0…n3 and the steps of the second input in elements, neighbouring axes joined where it advances alike."""
    a, b = (lowering.graph.tensors[i].shape for i in op.inputs)
    shape = (1,) * (len(a) - len(b)) + b
    axes: list[list[int]] = []
    for n, m, step in zip(a, shape, (math.prod(shape[k + 1 :]) for k in range(len(shape)))):
        step = step if m > 1 else 0
        if n == 1:
            continue
        if axes and axes[-1][1] == n * step:
            axes[-1] = [axes[-1][0] * n, step]
        else:
            axes.append([n, step])
    if len(axes) > 4:
        raise lowering.refuse(f"shapes {a} and {b}", "a second input that repeats along at most 4 runs of axes")
    axes = [[1, 0]] * (4 - len(axes)) + axes
    return {f"n{k}": n for k, (n, _) in enumerate(axes)} | {f"s{k}": s for k, (_, s) in enumerate(axes)}


def _add(lowering: Lowering, op: Op) -> None:
    a, b, y = (lowering.graph.tensors[i] for i in (*op.inputs, op.outputs[0]))
    params = _broadcast(lowering, op) | _clip(lowering.graph, op)
    name = "ns_add_f32"
    if y.dtype == "int8":
        ma, mb, shift = sum_multipliers(float(a.scale / y.scale), float(b.scale / y.scale))
        offset = (1 << (shift - 1)) - a.zero * ma - b.zero * mb + (y.zero << shift)
        params, name = params | {"ma": ma, "mb": mb, "offset": offset, "shift": shift}, "ns_add"
    lowering.call(name, params, *(lowering.tensor(i) for i in (*op.inputs, op.outputs[0])))


def _mul(lowering: Lowering, op: Op) -> None:
    a, b, y = (lowering.graph.tensors[i] for i in (*op.inputs, op.outputs[0]))
    params = _broadcast(lowering, op) | _clip(lowering.graph, op)
    name = "ns_mul_f32"
    if y.dtype == "int8":
        m, shift = multipliers(float(a.scale * b.scale / y.scale))
        params, name = params | {"za": a.zero, "zb": b.zero, "zy": y.zero, "m": int(m[0]), "shift": shift}, "ns_mul"
    lowering.call(name, params, *(lowering.tensor(i) for i in (*op.inputs, op.outputs[0])))


def _ends(lowering: Lowering, op: Op) -> tuple[Pointer, Pointer]:
    return lowering.tensor(op.inputs[0]), lowering.tensor(op.outputs[0])


def _lut(lowering: Lowering, op: Op) -> None:
    x, y = _ends(lowering, op)
    table = lowering.table("table", np.asarray(op.attrs["table"], np.int8))
    lowering.call("ns_lut", {"n": first(lowering.graph, op)[1].size}, x, table, y)


def _unary(lowering: Lowering, op: Op) -> None:
    params = {"n": first(lowering.graph, op)[1].size, "function": UNARY.index(op.attrs["function"])}
    lowering.call("ns_unary_f32", params, *_ends(lowering, op))


def _softmax(lowering: Lowering, op: Op) -> None:
    x, beta = lowering.graph.tensors[op.inputs[0]], float(op.attrs.get("beta", 1.0))
    source, target = _ends(lowering, op)
    params = {"rows": x.size // x.shape[-1], "n": x.shape[-1]}
    if x.dtype == "int8":
        lowering.call("ns_softmax", params, source, lowering.table("exps", softmax_table(x.scale, beta)), target)
    else:
        lowering.call("ns_softmax_f32", params | {"beta": beta}, source, target)


def _pool(lowering: Lowering, op: Op) -> None:
    graph = lowering.graph
    x, y = first(graph, op)
    _one_image(lowering, x)
    source, target = _ends(lowering, op)
    params = _window(op, x, y, *op.attrs["window"]) | _clip(graph, op)
    if op.kind == "maxpool2d" or x.dtype == "float32":
        lowering.call(f"ns_{op.kind}{'_f32' if x.dtype == 'float32' else ''}", params, source, target)
        return
    if one_scale(graph, op):
        params |= {"first": 0, "zx": 0, "zy": 0, "shift": 0}
        lowering.call("ns_avgpool2d", params, source, Pointer("none"), target)
        return
    m, shift = pool_multipliers(graph, op)
    counts = pool_counts(graph, op)
    used = m[counts.min() : counts.max() + 1]
    params |= {"first": int(counts.min()), "zx": x.zero, "zy": y.zero, "shift": shift}
    lowering.call("ns_avgpool2d", params, source, lowering.table("m", used), target)


def _quantize(lowering: Lowering, op: Op) -> None:
    x, y = first(lowering.graph, op)
    params: dict[str, int | float] = {"n": x.size, "zero": (y if op.kind == "quantize" else x).zero}
    if op.kind == "quantize":
        params["inverse"] = float(np.float32(1.0 / float(y.scale)))
    else:
        params["scale"] = float(np.float32(float(x.scale)))
    lowering.call(f"ns_{op.kind}", params, *_ends(lowering, op))


RULES = {
    "conv2d": Rule(_conv2d, _conv2d_scratch),
    "depthwise2d": Rule(_depthwise2d, _depthwise2d_scratch),
    "dense": Rule(_dense, _dense_scratch),
    "add": Rule(_add),
    "mul": Rule(_mul),
    "lut": Rule(_lut),
    "unary": Rule(_unary),
    "softmax": Rule(_softmax),
    "avgpool2d": Rule(_pool),
    "maxpool2d": Rule(_pool),
    "quantize": Rule(_quantize),
    "dequantize": Rule(_quantize),
}
