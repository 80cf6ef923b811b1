"""Passes over a float graph that change no result: norms and constants into linear layers, clips into limits, padding into
convolutions, reshapes of reshapes into one, and away with what nobody reads."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from netsuke.graph.ir import Op, QGraph
from netsuke.graph.ops.base import LIMITED
from netsuke.graph.ops.conv import LINEAR

CLIPS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


def tidy(graph: QGraph) -> QGraph:
    """A new graph with the same results up to the rounding of folded weights. Integer operators are left as they are."""
    graph = graph.copy()
    rules = (_skip, _fold_pad, _fold_affine, _fold_clip)
    changed = True
    while changed:
        changed = False
        for op in list(graph.ops):
            if graph.tensors[op.outputs[0]].dtype == "float32":
                changed |= any(rule(graph, op) for rule in rules)
        compact(graph)
    return graph


def compact(graph: QGraph) -> None:
    """Drops operators whose results nobody reads and tensors that no operator, input or output names."""
    wanted = {graph.root(i) for i in (*graph.outputs, *(i for pair in graph.states for i in pair))}
    ops: list[Op] = []
    for op in reversed(graph.ops):
        if wanted & {graph.root(i) for i in op.outputs}:
            ops.insert(0, op)
            wanted |= {graph.root(i) for i in op.inputs if i >= 0}
    named = {*graph.inputs, *graph.outputs, *(i for pair in graph.states for i in pair)}
    named |= {i for op in ops for i in (*op.inputs, *op.outputs) if i >= 0}
    for i in list(named):
        while (view := graph.tensors[i].view) is not None:
            named.add(i := view[0])
    kept = sorted(named)
    number = {old: new for new, old in enumerate(kept)} | {-1: -1}

    def renumbered(indices: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(number[i] for i in indices)

    tensors = [graph.tensors[i] for i in kept]
    graph.tensors = [replace(t, view=t.view and (number[t.view[0]], t.view[1])) for t in tensors]
    graph.ops = [replace(op, inputs=renumbered(op.inputs), outputs=renumbered(op.outputs)) for op in ops]
    graph.inputs, graph.outputs = renumbered(graph.inputs), renumbered(graph.outputs)
    graph.states = tuple(renumbered(pair) for pair in graph.states)


def writer(graph: QGraph, index: int) -> Op | None:
    """The operator that writes a tensor."""
    return next((op for op in graph.ops if index in op.outputs), None)


def only_reader(graph: QGraph, index: int) -> Op | None:
    """The operator that reads a tensor, when it is one and reads it once, and the tensor is no output."""
    ops = [op for op in graph.ops for i in op.inputs if i == index]
    return ops[0] if len(ops) == 1 and index not in graph.outputs else None


def has_bias(op: Op) -> bool:
    return len(op.inputs) > 2 and op.inputs[2] >= 0


def _before(graph: QGraph, op: Op, kinds: set[str], channels_kept: bool) -> Op | None:
    """The operator of `kinds` whose only use, through reshapes, is `op`."""
    index = op.inputs[0]
    channels = graph.tensors[index].shape[-1:]
    while only_reader(graph, index) is not None and (found := writer(graph, index)) is not None:
        if channels_kept and graph.tensors[index].shape[-1:] != channels:
            return None
        if found.kind in kinds:
            return found
        if found.kind != "reshape":
            return None
        index = found.inputs[0]
    return None


def _drop(graph: QGraph, op: Op) -> bool:
    """Takes an operator out: what read its output reads its input."""
    x, y = op.inputs[0], op.outputs[0]
    if y in graph.outputs and writer(graph, x) is None:
        return False
    graph.ops = [o for o in graph.ops if o is not op]
    for o in graph.ops:
        o.inputs = tuple(x if i == y else i for i in o.inputs)
    graph.outputs = tuple(x if i == y else i for i in graph.outputs)
    return True


def _skip(graph: QGraph, op: Op) -> bool:
    """Reshapes of reshapes, reshapes to the same shape, the function x -> x."""
    if op.kind == "reshape":
        source = writer(graph, op.inputs[0])
        if source is not None and source.kind == "reshape":
            op.inputs = source.inputs
            return True
    same = graph.tensors[op.inputs[0]].shape == graph.tensors[op.outputs[0]].shape
    nothing = op.kind == "reshape" or (op.kind == "unary" and op.attrs["function"] == "linear")
    return same and nothing and _drop(graph, op)


def _fold_pad(graph: QGraph, op: Op) -> bool:
    """Zero padding into the convolution behind it, as far as its window reaches."""
    if op.kind != "pad" or op.attrs.get("value", 0.0) != 0 or len(op.attrs["pads"]) != 4:
        return False
    batch, rows, columns, channels = op.attrs["pads"]
    reader = only_reader(graph, op.outputs[0])
    if reader is None or reader.kind not in ("conv2d", "depthwise2d") or any((*batch, *channels)):
        return False
    shape = graph.tensors[reader.inputs[1]].shape
    kernel = shape[:2] if reader.kind == "depthwise2d" else shape[1:3]
    reach = [d * (k - 1) for d, k in zip(reader.attrs.get("dilation", (1, 1)), kernel)]
    pad = [a + b for a, b in zip(reader.attrs.get("pad", (0, 0, 0, 0)), (*rows, *columns))]
    if max(pad[:2]) > reach[0] or max(pad[2:]) > reach[1] or not _drop(graph, op):
        return False
    reader.attrs["pad"] = tuple(pad)
    return True


def _affine(graph: QGraph, op: Op) -> tuple[np.ndarray, np.ndarray] | None:
    """(gain, shift) per channel of an operator that does only that, in float64."""
    x = graph.tensors[op.inputs[0]]
    if op.kind == "depthwise2d":
        w = graph.tensors[op.inputs[1]]
        if w.data is None or w.dtype != "float32" or w.shape != (1, 1, x.shape[3]):
            return None
        if tuple(op.attrs.get("stride", (1, 1))) != (1, 1) or any(op.attrs.get("pad", (0,))):
            return None
        shift = graph.tensors[op.inputs[2]].data if has_bias(op) else np.zeros(x.shape[3])
        return w.data[0, 0].astype(np.float64), shift.astype(np.float64)
    if op.kind not in ("add", "mul") or (c := graph.tensors[op.inputs[1]]).data is None:
        return None
    if c.size not in (1, x.shape[-1]) or c.size != c.shape[-1]:
        return None
    value = np.broadcast_to(c.data.astype(np.float64).reshape(-1), x.shape[-1:])
    return (value, np.zeros_like(value)) if op.kind == "mul" else (np.ones_like(value), value)


def _fold_affine(graph: QGraph, op: Op) -> bool:
    """A norm, a scaling or a bias into the linear layer before it; its limits go there, too."""
    affine = _affine(graph, op)
    linear = _before(graph, op, set(LINEAR), True) if affine else None
    if linear is None or {"low", "high"} & set(linear.attrs):
        return False
    w = graph.tensors[linear.inputs[1]]
    if w.data is None or w.dtype != "float32" or not _drop(graph, op):
        return False
    gain, shift = affine
    axis = LINEAR[linear.kind]
    old = graph.tensors[linear.inputs[2]].data.astype(np.float64) if has_bias(linear) else 0.0
    new = w.data * gain.reshape([-1 if k == axis else 1 for k in range(w.data.ndim)])
    weight = graph.constant(w.name, new.astype(np.float32))
    bias = graph.constant(w.name.removesuffix(".weight") + ".bias", (old * gain + shift).astype(np.float32))
    linear.inputs = (linear.inputs[0], weight, bias)
    linear.attrs |= {k: v for k, v in op.attrs.items() if k in ("low", "high")}
    return True


def _fold_clip(graph: QGraph, op: Op) -> bool:
    """relu, relu6 and clips into the limits of the operator before them."""
    if op.kind == "unary" and op.attrs["function"] in CLIPS:
        low, high = CLIPS[op.attrs["function"]]
    elif op.kind == "add" and (c := graph.tensors[op.inputs[1]]).data is not None and not np.any(c.data):
        low, high = op.attrs.get("low", -math.inf), op.attrs.get("high", math.inf)
    else:
        return False
    before = _before(graph, op, LIMITED, False)
    if before is None:
        return False
    low, high = max(low, before.attrs.get("low", -math.inf)), min(high, before.attrs.get("high", math.inf))
    if low > high or not _drop(graph, op):
        return False
    before.attrs |= {k: v for k, v in (("low", low), ("high", high)) if math.isfinite(v)}
    return True
