"""The same network for a smaller picture: every shape follows from the input's, no weight changes.

It works where nothing depends on the size of the map: convolutions, pooling over all of it, additions. It is the cheapest way
to less RAM and time, as both fall with the square of the side.
"""

from __future__ import annotations

from dataclasses import replace

from netsuke.errors import NetsukeError
from netsuke.graph.ir import Op, QGraph
from netsuke.graph.ops.base import window

SAME = ("lut", "unary", "softmax", "quantize", "dequantize")


def at_resolution(graph: QGraph, height: int, width: int) -> QGraph:
    """`graph` for inputs (1, height, width, C). Raises NetsukeError that names the operator that needs the old size."""
    g = graph.copy()
    asked, shapes = f"run {graph.name} on {height} x {width} pixels", [g.tensors[i].shape for i in g.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise NetsukeError(asked, f"its inputs have the shapes {shapes}", "one input (1, H, W, C)")
    x = g.tensors[g.inputs[0]]
    g.tensors[g.inputs[0]] = replace(x, shape=(1, height, width, x.shape[3]))
    for op in g.ops:
        shape = _shape(graph, g, op)
        if shape is None:
            found = f"the operator {op.name or op.kind!r} ({op.kind}) depends on the size of the picture"
            raise NetsukeError(
                asked, found, "networks that pool over the whole map before their first fully connected layer"
            )
        g.tensors[op.outputs[0]] = replace(g.tensors[op.outputs[0]], shape=shape)
    try:
        return g.check()
    except NetsukeError as e:
        raise NetsukeError(asked, str(e), "a multiple of the network's strides") from None


def _shape(old: QGraph, g: QGraph, op: Op) -> tuple[int, ...] | None:
    """The output's new shape, or None when the operator cannot follow; the window of a pool over all of the map changes."""
    x, y, was = g.tensors[op.inputs[0]].shape, old.tensors[op.outputs[0]].shape, old.tensors[op.inputs[0]].shape
    if x == was:
        return y
    if op.kind in ("conv2d", "depthwise2d", "avgpool2d", "maxpool2d"):
        if op.kind.endswith("pool2d"):
            if tuple(op.attrs["window"]) == tuple(was[1:3]) and y[1:3] == (1, 1):
                op.attrs["window"] = x[1:3]
            kernel = op.attrs["window"]
        else:
            w = g.tensors[op.inputs[1]].shape
            kernel = w[:2] if op.kind == "depthwise2d" else w[1:3]
        (sy, sx), (t, b, left, r) = op.attrs.get("stride", (1, 1)), op.attrs.get("pad", (0, 0, 0, 0))
        dy, dx = op.attrs.get("dilation", (1, 1))
        size = window(x[1], kernel[0], sy, t, b, dy), window(x[2], kernel[1], sx, left, r, dx)
        return (x[0], *size, y[3]) if min(size) > 0 else None
    if op.kind in ("add", "mul"):
        other = g.tensors[op.inputs[1]].shape
        return x if x == other or len(other) < 4 or other[1:3] == (1, 1) else None
    if op.kind == "pad":
        return tuple(n + a + b for n, (a, b) in zip(x, op.attrs["pads"]))
    return x if op.kind in SAME else None
