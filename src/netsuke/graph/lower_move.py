"""Kernel calls of the operators that only move elements: each is strided copies (`ns_copy`), a padding fills first."""

from __future__ import annotations

import math

import numpy as np

from netsuke.graph.ir import Op
from netsuke.graph.lower import Lowering, Rule
from netsuke.graph.ops.base import first

AXES = 5  # loops of ns_copy


def _strides(shape: tuple[int, ...], size: int) -> list[int]:
    """Bytes from one index to the next along each axis of a contiguous array."""
    return [math.prod(shape[k + 1 :]) * size for k in range(len(shape))]


def _copy(
    lowering: Lowering, op: Op, source: int, shape: tuple[int, ...],
    steps: tuple[list[int], list[int]], starts: tuple[int, int] = (0, 0),
) -> None:  # fmt: skip
    """Copies `shape` elements of tensor `source` into the output; steps and starts are (read, written), in bytes."""
    size = np.dtype(lowering.graph.tensors[source].dtype).itemsize
    axes: list[list[int]] = []
    for n, a, b in zip(shape, *steps):
        if n == 1:
            continue
        if axes and axes[-1][1] == n * a and axes[-1][2] == n * b:
            axes[-1] = [axes[-1][0] * n, a, b]
        else:
            axes.append([n, a, b])
    axes = axes or [[1, size, size]]
    source_at, target_at = lowering.tensor(source), lowering.tensor(op.outputs[0])
    run = len(axes) == 1 and axes[0][1:] == [size, size]
    if run and source_at.space == target_at.space == "arena" and source_at.at + starts[0] == target_at.at + starts[1]:
        return  # the arena has put it where it belongs
    if len(axes) > AXES:
        raise lowering.refuse(f"it moves {shape} along {len(axes)} runs of axes", f"at most {AXES}")
    axes = [[1, 0, 0]] * (AXES - len(axes)) + axes
    params = {"size": size, "from": starts[0], "to": starts[1]}
    for k, (n, a, b) in enumerate(axes):
        params |= {f"n{k}": n, f"a{k}": a, f"b{k}": b}
    lowering.call("ns_copy", params, source_at, target_at)


def _reshape(lowering: Lowering, op: Op) -> None:
    x, _ = first(lowering.graph, op)
    size = [np.dtype(x.dtype).itemsize]
    _copy(lowering, op, op.inputs[0], (x.size,), (size, size))


def _pad(lowering: Lowering, op: Op) -> None:
    x, y = first(lowering.graph, op)
    value = np.array(x.zero if x.dtype == "int8" else op.attrs.get("value", 0.0), x.dtype)
    size, steps = value.itemsize, _strides(y.shape, value.itemsize)
    bits = int.from_bytes(value.tobytes(), "little", signed=True)
    lowering.call("ns_fill", {"n": y.size, "size": size, "bits": bits}, lowering.tensor(op.outputs[0]))
    start = sum(before * step for (before, _), step in zip(op.attrs["pads"], steps))
    _copy(lowering, op, op.inputs[0], x.shape, (_strides(x.shape, size), steps), (0, start))


def _transpose(lowering: Lowering, op: Op) -> None:
    x, y = first(lowering.graph, op)
    size = np.dtype(x.dtype).itemsize
    read = _strides(x.shape, size)
    _copy(lowering, op, op.inputs[0], y.shape, ([read[p] for p in op.attrs["perm"]], _strides(y.shape, size)))


def _concat(lowering: Lowering, op: Op) -> None:
    y, axis, at = lowering.graph.tensors[op.outputs[0]], op.attrs["axis"], 0
    size = np.dtype(y.dtype).itemsize
    steps = _strides(y.shape, size)
    for i in op.inputs:
        x = lowering.graph.tensors[i]
        _copy(lowering, op, i, x.shape, (_strides(x.shape, size), steps), (0, at * steps[axis]))
        at += x.shape[axis]


def _slice(lowering: Lowering, op: Op) -> None:
    x, y = first(lowering.graph, op)
    size = np.dtype(x.dtype).itemsize
    read, begin = _strides(x.shape, size), op.attrs["begin"]
    strides = op.attrs.get("stride", (1,) * len(y.shape))
    start = sum(b * r for b, r in zip(begin, read))
    taken = [s * r for s, r in zip(strides, read)]
    _copy(lowering, op, op.inputs[0], y.shape, (taken, _strides(y.shape, size)), (start, 0))


RULES = {
    "reshape": Rule(_reshape),
    "pad": Rule(_pad),
    "transpose": Rule(_transpose),
    "concat": Rule(_concat),
    "slice": Rule(_slice),
}
