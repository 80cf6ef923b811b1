"""Narrower inner layers: channels that only pass from one layer to the next are dropped where they matter least.

A *seam* is a convolution or fully connected layer whose output reaches exactly one later such layer through operators that
keep channels apart (depthwise convolution, tables, pooling): the inside of an inverted residual, a hidden layer. With
activation statistics on calibration data, channel c matters by var(x_c) * sum of squared weights that read it, and the
constant part of what is dropped, mean(x_c) times those weights, goes into the reader's bias: the layer's mean output stays.
(Bias compensation as in "Data-Free Quantization", Nagel et al. 2019; the score is the first term of the output error.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from netsuke.graph.interpret import Interpreter
from netsuke.graph.ir import Op, QGraph
from netsuke.graph.ops.conv import largest_bias

APART = ("depthwise2d", "lut", "unary", "maxpool2d", "avgpool2d")


@dataclass(frozen=True)
class Seam:
    """Operators by index: writer, those in between, reader; `channels` is how many there are."""

    writer: int
    between: tuple[int, ...]
    reader: int
    channels: int


@dataclass
class Statistics:
    """Mean (real minus nothing: in codes, zero point subtracted) and variance of each channel that a seam's reader sees."""

    mean: np.ndarray
    variance: np.ndarray


def seams(graph: QGraph) -> dict[str, Seam]:
    """All seams by the writer's name, in running order."""
    users: dict[int, list[int]] = {}
    for k, op in enumerate(graph.ops):
        for i in op.inputs:
            users.setdefault(i, []).append(k)
    out = {}
    for k, op in enumerate(graph.ops):
        if not _dense_kind(graph, op):
            continue
        channels, at, between = graph.tensors[op.outputs[0]].shape[-1], op.outputs[0], []
        while len(users.get(at, [])) == 1 and at not in graph.outputs:
            j = users[at][0]
            after = graph.ops[j]
            if _dense_kind(graph, after) and after.inputs[0] == at:
                if graph.tensors[after.inputs[1]].shape[-1] == channels:
                    out[op.name or f"op{k}"] = Seam(k, tuple(between), j, channels)
                break
            if (after.kind == "reshape" and graph.tensors[at].size != channels) or not _keeps_apart(
                graph, after, channels
            ):
                break
            between.append(j)
            at = after.outputs[0]
    return out


def _dense_kind(graph: QGraph, op: Op) -> bool:
    return op.kind in ("conv2d", "dense") and op.attrs.get("groups", 1) == 1 and graph.tensors[op.inputs[1]].constant


def _keeps_apart(graph: QGraph, op: Op, channels: int) -> bool:
    if op.kind == "reshape":
        return graph.tensors[op.outputs[0]].shape[-1] == channels
    return op.kind in APART and graph.tensors[op.outputs[0]].shape[-1] == channels


def observe(graph: QGraph, found: dict[str, Seam], calibration: Iterable[np.ndarray]) -> dict[str, Statistics]:
    """Channel statistics at every seam's reader, in one pass over batches (n, …) of input codes."""
    sums = {name: [np.zeros(s.channels), np.zeros(s.channels), 0] for name, s in found.items()}
    # what the reader sees is written by the last operator before it that is no view of another one
    source = {name: (s.between or (s.writer,))[-1] for name, s in found.items()}

    interpreter = Interpreter(graph)
    for batch in calibration:

        def see(k: int, outs: tuple[np.ndarray, ...]) -> None:
            for name, at in source.items():
                if at == k:
                    rows = outs[0].reshape(-1, found[name].channels).astype(np.float64)
                    rows = rows - graph.tensors[graph.ops[k].outputs[0]].zero
                    entry = sums[name]
                    entry[0] += rows.sum(0)
                    entry[1] += (rows**2).sum(0)
                    entry[2] += len(rows)

        interpreter.run(batch, on_op=see)
    out = {}
    for name, (total, squares, n) in sums.items():
        mean = total / max(n, 1)
        out[name] = Statistics(mean, np.maximum(squares / max(n, 1) - mean**2, 0))
    return out


def importance(graph: QGraph, seam: Seam, statistics: Statistics) -> np.ndarray:
    """What dropping each channel adds to the reader's squared output error, in the reader's real units up to a factor."""
    w = graph.tensors[graph.ops[seam.reader].inputs[1]]
    real = w.real(w.data).reshape(-1, seam.channels)
    return statistics.variance * (real**2).sum(0)


def slim(graph: QGraph, cuts: dict[str, float], statistics: dict[str, Statistics]) -> QGraph:
    """`graph` without the given share of channels at each seam; at least one stays, counts are multiples of 4 where they can be
    (the kernels read four channels at a time)."""
    g, found = graph.copy(), seams(graph)
    for name, share in cuts.items():
        seam = found[name]
        keep = max(4 * round(seam.channels * (1 - share) / 4), min(4, seam.channels))
        if keep >= seam.channels:
            continue
        kept = np.sort(np.argsort(-importance(graph, seam, statistics[name]), kind="stable")[:keep])
        dropped = np.setdiff1d(np.arange(seam.channels), kept)
        _compensate(g, g.ops[seam.reader], dropped, statistics[name].mean)
        _take_outputs(g, g.ops[seam.writer], kept)
        for k in seam.between:
            _take_between(g, g.ops[k], kept)
        _replace(g, g.ops[seam.reader].inputs[1], kept, -1)
    return g.check()


def _replace(g: QGraph, index: int, kept: np.ndarray, axis: int) -> None:
    """Keeps channels of a constant along `axis`, with their scales when it is the axis of the scales."""
    t = g.tensors[index]
    axis %= len(t.shape)
    data = np.ascontiguousarray(t.data.take(kept, axis))
    scale = t.scale[kept] if t.scale is not None and t.scale.ndim and t.axis == axis else t.scale
    g.tensors[index] = replace(t, data=data, shape=data.shape, scale=scale)


def _narrow(g: QGraph, index: int, channels: int) -> None:
    t = g.tensors[index]
    g.tensors[index] = replace(t, shape=(*t.shape[:-1], channels))


def _take_outputs(g: QGraph, op: Op, kept: np.ndarray) -> None:
    _replace(g, op.inputs[1], kept, 0)
    if len(op.inputs) > 2 and op.inputs[2] >= 0:
        _replace(g, op.inputs[2], kept, 0)
    _narrow(g, op.outputs[0], len(kept))


def _take_between(g: QGraph, op: Op, kept: np.ndarray) -> None:
    if op.kind == "depthwise2d":
        _replace(g, op.inputs[1], kept, 2)
        if len(op.inputs) > 2 and op.inputs[2] >= 0:
            _replace(g, op.inputs[2], kept, 0)
    _narrow(g, op.outputs[0], len(kept))


def _compensate(g: QGraph, reader: Op, dropped: np.ndarray, mean: np.ndarray) -> None:
    """The mean of what is dropped goes into the reader's bias, in units of its sums (codes times codes)."""
    w = g.tensors[reader.inputs[1]]
    lost = w.data.astype(np.float64).reshape(len(w.data), -1, w.shape[-1]).sum(1)[:, dropped] @ mean[dropped]
    integer = g.tensors[reader.inputs[0]].dtype == "int8"
    if integer:
        change = np.rint(lost).astype(np.int64)
    else:
        change = lost if w.dtype == "float32" else lost * w.scale
    if len(reader.inputs) > 2 and reader.inputs[2] >= 0:
        b = g.tensors[reader.inputs[2]]
        room = largest_bias(w, reader.kind) if integer else np.inf
        data = np.clip(b.data.astype(change.dtype) + change, -room, room)
        g.tensors[reader.inputs[2]] = replace(b, data=data.astype(b.dtype))
        return
    bias = g.constant(f"{reader.name}.bias", change.astype(np.int32 if integer else np.float32))
    reader.inputs = (*reader.inputs[:2], bias)
