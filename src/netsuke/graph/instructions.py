"""How many instructions a graph takes on a Cortex-M4/M7, predicted per operator from counts on the emulated board.

An operator belongs to a class: what decides which inner loop runs. Its *features* count what that loop does: the times it is
entered, its turns, what is copied for it. A class's coefficients are instructions per feature, a non-negative least-squares
fit to the counts of the operators of real networks and of a sweep of shapes (`python benchmarks/instructions.py`), which
writes `instructions.json` with the errors on shapes that the fit has not seen.
"""

from __future__ import annotations

import functools
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.graph.abi import defined_in
from netsuke.graph.ir import Op, QGraph
from netsuke.graph.ops import OPS
from netsuke.graph.ops.conv import LINEAR, pointwise

TABLE = Path(__file__).parent / "instructions.json"
RECURRENT = ("rnn", "lstm", "gru")
SQUARE = (3, 5, 7)  # depthwise windows with a loop of their own, at strides 1 and 2
TOGETHER = 4  # rows of activations, or outputs of a row, that a loop works on at once
STRIP = 8  # rows of outputs for which a depthwise convolution copies rows out
OTHER = "other"  # the class of kinds that were never counted


def kernel_class(graph: QGraph, op: Op) -> str:
    """The row of the table that an operator belongs to: kind, with its loop, types."""
    x = graph.tensors[op.inputs[0]]
    if op.kind not in (*LINEAR, *RECURRENT):
        return f"{op.kind}{'/' + op.attrs['function'] if 'function' in op.attrs else ''} {x.dtype}"
    w = graph.tensors[op.inputs[1]]
    name = "dense" if pointwise(graph, op) else op.kind
    if op.kind == "depthwise2d" and x.dtype == "int8":
        if x.shape[3] == 1:  # is run as a convolution
            name = "conv2d"
        else:
            name += f"/{_loop(op, w.shape)}"
    return f"{name} {w.dtype}{' float' if x.dtype == 'float32' and w.dtype != 'float32' else ''}"


def _loop(op: Op, shape: tuple[int, ...]) -> str:
    (_, sx), (kh, kw), dilation = op.attrs.get("stride", (1, 1)), shape[:2], op.attrs.get("dilation", (1, 1))
    square = kh == kw and kh in SQUARE and sx in (1, 2) and tuple(dilation) == (1, 1)
    return f"{kh}x{kw}s{sx}" if square else "any"


def features(graph: QGraph, op: Op) -> np.ndarray:
    """What the loops of an operator do; operators of one class have the same number of features, the first is 1."""
    x, y = graph.tensors[op.inputs[0]], graph.tensors[op.outputs[0]]
    macs = OPS[op.kind].macs(graph, op)
    if op.kind == "depthwise2d" and x.dtype == "int8" and x.shape[3] > 1:
        return _depthwise(graph, op, macs)
    if op.kind in LINEAR and x.dtype == "int8":
        return _rows(graph, op)
    if op.kind in LINEAR:
        return _float(graph, op, macs)
    if op.kind in ("avgpool2d", "maxpool2d"):
        (kh, kw), pixels = op.attrs["window"], y.shape[1] * y.shape[2]
        return np.array([1.0, pixels, pixels * kh * kw, y.size, y.size * kh * kw])
    size = sum(graph.tensors[i].size for i in op.outputs)
    return np.array([1.0, size, size // y.shape[-1] if y.shape else 1, macs, x.size])


def _rows(graph: QGraph, op: Op) -> np.ndarray:
    """Rows of activations (pixels) times a matrix: four rows at a time, what is left over one by one."""
    x, y = graph.tensors[op.inputs[0]], graph.tensors[op.outputs[0]]
    w = graph.tensors[op.inputs[1]]
    outs = w.shape[-1] if op.kind == "depthwise2d" else w.shape[0]
    length, rows, groups = w.size // outs, y.size // outs, op.attrs.get("groups", 1)
    height = 1 if op.kind == "dense" else w.shape[0] if op.kind == "depthwise2d" else w.shape[1]
    words = -(-length // (8 if w.dtype == "int4" else 4))
    channels = length if op.kind == "dense" else 1 if op.kind == "depthwise2d" else w.shape[3]
    whole = channels % (8 if w.dtype == "int4" else 4) == 0
    staged = 0 if whole or channels == length else rows * groups * length  # collected as bytes before they are widened
    tails = 0 if whole else rows * groups
    blocks, rest = rows // TOGETHER, rows % TOGETHER
    single, three = (0, 1) if rest == TOGETHER - 1 else (rest, 0)
    turns = [n * turn for n in (blocks, single, three) for turn in (outs, outs * words)]  # of all groups
    border = 0 if op.kind == "dense" or pointwise(graph, op) else x.shape[2] * x.shape[3]
    return np.array([1.0, rows * groups * height, rows * groups * length, staged, tails, *turns, border])


def _depthwise(graph: QGraph, op: Op, macs: int) -> np.ndarray:
    """Channel by channel: rows copied out and widened, then four outputs of a row at a time."""
    x, y = graph.tensors[op.inputs[0]], graph.tensors[op.outputs[0]]
    channels, (height, wide), (oh, ow) = y.shape[3], x.shape[1:3], y.shape[1:3]
    (sy, sx), pad = op.attrs.get("stride", (1, 1)), op.attrs.get("pad", (0, 0, 0, 0))
    kh, kw = graph.tensors[op.inputs[1]].shape[:2]
    fours, strips, lines, widened = -(-ow // TOGETHER), -(-oh // STRIP), channels * oh, channels * height
    width = sx * fours * TOGETHER + kw
    strip, outside = (min(oh, STRIP) * sy + kh) * width, channels * (strips > 1) * sum(pad[:2]) * width
    loads = [strip, outside, channels * (strips - 1) * width]
    loads += [widened, widened * (wide // TOGETHER), widened * (wide % TOGETHER)]
    ragged = [lines, lines * (ow % TOGETHER), lines * (ow > TOGETHER)] if ow % TOGETHER else [0, 0, 0]
    return np.array([1.0, channels, channels * strips, *loads, lines, lines * fours, *ragged, macs])


def _float(graph: QGraph, op: Op, macs: int) -> np.ndarray:
    """Float activations: a sum per output, with the taps inside the image, of which the border has fewer."""
    x, y = graph.tensors[op.inputs[0]], graph.tensors[op.outputs[0]]
    w = graph.tensors[op.inputs[1]]
    if op.kind == "dense" or pointwise(graph, op):
        rows, outs = y.size // w.shape[0], w.shape[0]
        rest = rows * (outs % TOGETHER)
        return np.array([1.0, rows, y.size, macs, rest, rest * w.shape[1]])
    kh, kw = w.shape[:2] if op.kind == "depthwise2d" else w.shape[1:3]
    (sy, sx), (top, _, left, _) = op.attrs.get("stride", (1, 1)), op.attrs.get("pad", (0, 0, 0, 0))
    dy, dx = op.attrs.get("dilation", (1, 1))
    tall = _inside(x.shape[1], y.shape[1], kh, sy, top, dy)
    wide = _inside(x.shape[2], y.shape[2], kw, sx, left, dx)
    each = y.shape[3] * macs // max(y.size * kh * kw, 1)  # products of a tap over all channels
    lines = tall * y.shape[2] * y.shape[3]
    return np.array(
        [1.0, y.shape[1] * y.shape[2], y.size, lines, lines * kw, tall * wide * y.shape[3], tall * wide * each]
    )


def _inside(size: int, out: int, kernel: int, stride: int, before: int, dilation: int) -> int:
    """Over all outputs of an axis, the taps that lie inside the image."""
    at = np.arange(out)[:, None] * stride - before + np.arange(kernel) * dilation
    return int(np.count_nonzero((at >= 0) & (at < size)))


@functools.cache
def table() -> dict[str, Any]:
    """instructions.json: `classes` {name: coefficients}, `code` {kernel: bytes}, `errors`, `whole`, `run`."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def per_operator(graph: QGraph) -> list[float]:
    """Predicted instructions of each operator; a class that was never counted is taken as the dearest of its kind."""
    return [predicted(table()["classes"], graph, op) for op in graph.ops]


def predicted(classes: dict[str, list[float]], graph: QGraph, op: Op) -> float:
    """Instructions of an operator with these coefficients. A reshape is another look at the same bytes."""
    if op.kind == "reshape":
        return 0.0
    name, x = kernel_class(graph, op), features(graph, op)
    if name in classes:
        return float(np.dot(classes[name], x))
    kind = _kind(name)
    rows = [row for other, row in classes.items() if _kind(other) == kind and len(row) == len(x)]
    if rows:
        return max(float(np.dot(row, x)) for row in rows)
    return float(np.dot(classes[OTHER], general(graph, op)))


def _kind(name: str) -> str:
    return name.split()[0].split("/")[0]


def general(graph: QGraph, op: Op) -> np.ndarray:
    """(1, outputs, multiply-accumulates, inputs): the features of the class `OTHER`."""
    sizes = (sum(graph.tensors[i].size for i in part if i >= 0) for part in (op.outputs, op.inputs[:1]))
    outputs, inputs = sizes
    return np.array([1.0, outputs, OPS[op.kind].macs(graph, op), inputs])


def instructions(graph: QGraph) -> float:
    """Predicted instructions of one run."""
    return sum(per_operator(graph))


def code_bytes(functions: Iterable[str], calls: int) -> int:
    """Bytes of code in flash of a program that makes `calls` calls of these kernels (`Program.calls` gives both): their own,
    those of the C library that they need, and the program's. Weights and parameters are counted from the program."""
    code, used = table()["code"], set(functions)
    own: dict[str, int] = defaultdict(int)
    brought: dict[str, int] = defaultdict(int)
    for name in used:
        source = Path(defined_in()[name]).stem
        for part, size in code["linked"].get(name, {}).items():
            if part == source:
                own[part] += size
            else:
                brought[part] = max(brought[part], size)
    kernels = sum(max(own[part], brought[part]) for part in {*own, *brought})
    return math.ceil(kernels + code["run"] + calls * code["call"])
