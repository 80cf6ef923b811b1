"""Cross-layer equalization (Nagel et al., ICCV 2019): moves scale between the channels of neighbouring layers.

relu(s x) = s relu(x) for s > 0. So for two linear layers with only relu, pooling or reshapes between them, output channel c of
the first may be divided by s_c and input channel c of the second multiplied by it:

    s_c = sqrt(max|W1_c, b1_c| / max|W2_c|)     W1_c: row c of the first with its bias, W2_c: column c of the second layer

after which both are the root of the product. (The paper leaves the bias out; dead channels, whose weights are 1e-30 and whose
bias is not, would be blown up by 1e15.) Repeated over all pairs until nothing moves. A relu6 or another upper limit is
not scalable: such pairs are left alone. What gains: layers whose channels differ a lot under one scale (activations always,
weights when they are not quantized per channel, the columns of the second layer in any case).
"""

from __future__ import annotations

import numpy as np

from netsuke.graph.ir import Op, QGraph
from netsuke.graph.ops.conv import LINEAR
from netsuke.graph.read.tidy import has_bias, only_reader

SWEEPS = 50
MOVES = 1e-3  # below this largest change of log s the sweeps end


def pairs(graph: QGraph) -> list[tuple[Op, Op]]:
    """Linear layers whose output only the other one reads, through what commutes with scaling of channels."""
    out = []
    for first in graph.ops:
        if _scalable(graph, first):
            second = _next(graph, first)
            if second is not None:
                out.append((first, second))
    return out


def equalize(graph: QGraph) -> QGraph:
    """The same float function with even channels; weights of layers that are in no pair are shared with `graph`."""
    graph = graph.copy()
    found = pairs(graph)
    weights = {id(op): graph.tensors[op.inputs[1]].data.astype(np.float64) for pair in found for op in pair}
    biases = {id(op): graph.tensors[op.inputs[2]].data.astype(np.float64) for op, _ in found if has_bias(op)}
    for _ in range(SWEEPS):
        moved = 0.0
        for first, second in found:
            w, v = weights[id(first)], weights[id(second)]
            rows, columns = _rows(first, w), _columns(second, v, len(_rows(first, w)))
            a, b = np.abs(rows).max(1), np.abs(columns).max(1)
            if id(first) in biases:
                a = np.maximum(a, np.abs(biases[id(first)]))
            alive = (a > 0) & (b > 0)
            s = np.where(alive, np.sqrt(np.where(alive, a, 1.0) / np.where(alive, b, 1.0)), 1.0)
            weights[id(first)] = _scaled_rows(first, w, 1 / s)
            weights[id(second)] = _scaled_columns(second, v, s)
            if id(first) in biases:
                biases[id(first)] = biases[id(first)] / s
            moved = max(moved, float(np.abs(np.log(s)).max()))
        if moved < MOVES:
            break
    for op in {id(op): op for pair in found for op in pair}.values():
        inputs = list(op.inputs)
        for place, values in ((1, weights), (2, biases)):
            if id(op) in values:
                old = graph.tensors[inputs[place]]
                inputs[place] = graph.constant(old.name, values[id(op)].astype(np.float32))
        op.inputs = tuple(inputs)
    return graph


def _scalable(graph: QGraph, op: Op) -> bool:
    """A float linear layer without activation, or with a relu."""
    return op.kind in LINEAR and _float(graph, op) and op.attrs.get("low", 0.0) == 0.0 and "high" not in op.attrs


def _float(graph: QGraph, op: Op) -> bool:
    w = graph.tensors[op.inputs[1]]
    return w.data is not None and w.dtype == graph.tensors[op.outputs[0]].dtype == "float32"


def _next(graph: QGraph, op: Op) -> Op | None:
    """The linear layer that alone reads the output, when its input channels are the output's channels."""
    channels, index = graph.tensors[op.outputs[0]].shape[-1], op.outputs[0]
    while (reader := only_reader(graph, index)) is not None:
        x = graph.tensors[index]
        if reader.kind in LINEAR:
            width = graph.tensors[reader.inputs[1]].shape[-1] if reader.kind == "dense" else x.shape[-1]
            same = reader.kind != "depthwise2d" or graph.tensors[reader.inputs[1]].shape[-1] == channels
            plain = reader.attrs.get("groups", 1) == 1 and index == reader.inputs[0]
            return reader if width % channels == 0 and same and plain and _float(graph, reader) else None
        y = graph.tensors[reader.outputs[0]]
        pools = reader.kind in ("maxpool2d", "avgpool2d") and not {"low", "high"} & set(reader.attrs)
        pads = reader.kind == "pad" and reader.attrs.get("value", 0.0) == 0 and not any(reader.attrs["pads"][-1])
        if not (pools or pads or (reader.kind == "reshape" and y.shape[-1] % x.shape[-1] == 0)):
            return None
        index = reader.outputs[0]
    return None


def _rows(op: Op, w: np.ndarray) -> np.ndarray:
    """(output channels, the rest)."""
    return np.moveaxis(w, LINEAR[op.kind], 0).reshape(w.shape[LINEAR[op.kind]], -1)


def _columns(op: Op, w: np.ndarray, channels: int) -> np.ndarray:
    """(input channels, the rest); a dense layer over a flattened image reads each channel many times."""
    return w.reshape(-1, w.shape[-1] // channels, channels).transpose(2, 0, 1).reshape(channels, -1)


def _scaled_rows(op: Op, w: np.ndarray, s: np.ndarray) -> np.ndarray:
    return w * s.reshape([-1 if k == LINEAR[op.kind] else 1 for k in range(w.ndim)])


def _scaled_columns(op: Op, w: np.ndarray, s: np.ndarray) -> np.ndarray:
    return w * np.tile(s, w.shape[-1] // len(s))
