"""How many instructions a graph takes on a Cortex-M4/M7, predicted per operator from counts on the emulated board.

    instructions = a + b * outputs + c * multiply-accumulates + d * inputs       per kernel and width of weights

The coefficients are a non-negative least-squares fit to the counts of every operator of the bundled networks and of a sweep
of shapes (`python benchmarks/instructions.py`), which writes `instructions.json` with the errors of the fit.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

from netsuke.graph.ir import Op, QGraph
from netsuke.graph.ops import OPS
from netsuke.graph.ops.conv import pointwise

TABLE = Path(__file__).parent / "instructions.json"


def kernel_class(graph: QGraph, op: Op) -> str:
    """The row of the table that an operator belongs to: what decides which inner loop runs."""
    x = graph.tensors[op.inputs[0]]
    name = op.kind
    if op.kind in ("conv2d", "depthwise2d", "dense"):
        w = graph.tensors[op.inputs[1]]
        if op.kind == "conv2d":
            name = "pointwise" if pointwise(graph, op) else "conv2d"
        if op.kind == "depthwise2d":
            name += f"_{w.shape[1]}"
        return f"{name} {w.dtype}{' float' if x.dtype == 'float32' and w.dtype != 'float32' else ''}"
    return f"{name} {x.dtype}"


def features(graph: QGraph, op: Op) -> np.ndarray:
    """(1, outputs, multiply-accumulates, inputs) of an operator."""
    y = sum(graph.tensors[i].size for i in op.outputs)
    return np.array([1.0, y, OPS[op.kind].macs(graph, op), graph.tensors[op.inputs[0]].size])


@functools.cache
def table() -> dict[str, list[float]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))["classes"]


def per_operator(graph: QGraph) -> list[float]:
    """Predicted instructions of each operator; a kernel that was never counted is taken as the dearest of its kind."""
    return [_predicted(kernel_class(graph, op), features(graph, op)) for op in graph.ops]


def _predicted(name: str, x: np.ndarray) -> float:
    known = table()
    if name in known:
        return float(np.dot(known[name], x))
    kind = name.split()[0].split("_")[0]
    rows = [row for other, row in known.items() if other.split()[0].split("_")[0] == kind] or list(known.values())
    return max(float(np.dot(row, x)) for row in rows)


def instructions(graph: QGraph) -> float:
    """Predicted instructions of one run."""
    return sum(per_operator(graph))
