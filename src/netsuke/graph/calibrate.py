"""One pass over calibration samples: a histogram of every activation, and the mean input of every linear layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.inputs import from_array
from netsuke.graph.interpret import Interpreter
from netsuke.graph.ir import Op, QGraph
from netsuke.graph.ops.conv import LINEAR, centred, patches
from netsuke.graph.ranges import Histogram


@dataclass
class Observed:
    """histograms by tensor; means by operator: the mean window (KH, KW, I) or row (I,) that a linear layer reads."""

    histograms: dict[int, Histogram] = field(default_factory=dict)
    means: dict[int, np.ndarray] = field(default_factory=dict)
    samples: int = 0


def observe(graph: QGraph, calibration: Iterable[np.ndarray], asked: str) -> Observed:
    """Runs a float graph on every item of `calibration`: an array (n, …), or a tuple of them for several inputs.

    Raises NetsukeError when there is none, or one of the wrong shape, or a result that is not finite.
    """
    found, interpreter = Observed(), Interpreter(graph)
    for item in calibration:
        parts = item if isinstance(item, tuple) else (item,)
        if len(parts) != len(graph.inputs):
            raise NetsukeError(asked, f"calibration items of {len(parts)} inputs", f"{len(graph.inputs)}")
        where = f"{asked} with these calibration data"
        inputs = [from_array(np.asarray(x, np.float32), graph.tensors[i], where) for x, i in zip(parts, graph.inputs)]
        for part in rows(graph, inputs):
            _one(graph, interpreter, part, found, asked)
    if not found.samples:
        raise NetsukeError(
            asked, "the calibration data are empty", "at least one sample", "--data with a few dozen samples"
        )
    return found


def rows(graph: QGraph, inputs: list[np.ndarray]) -> list[list[np.ndarray]]:
    """The batch as it is, or sample by sample where an operator takes exactly the graph's batch of 1, as a slice does."""
    if all(op.kind != "slice" for op in graph.ops):
        return [inputs]
    return [[x[k : k + 1] for x in inputs] for k in range(len(inputs[0]))]


def _one(graph: QGraph, interpreter: Interpreter, inputs: list[np.ndarray], found: Observed, asked: str) -> None:
    values = dict(zip(graph.inputs, inputs))

    def on_op(k: int, outputs: tuple[np.ndarray, ...]) -> None:
        values.update(zip(graph.ops[k].outputs, outputs))

    interpreter.run(*inputs, on_op=on_op)
    for i, value in values.items():
        if not np.all(np.isfinite(value)):
            raise NetsukeError(
                asked, f"{graph.tensors[i].name!r} is not finite on the calibration data", "finite numbers"
            )
        found.histograms.setdefault(i, Histogram()).add(value)
    n = len(inputs[0])
    for k, op in enumerate(graph.ops):
        if op.kind in LINEAR:
            mean = _mean_window(graph, op, values[op.inputs[0]])
            old = found.means.get(k, np.zeros_like(mean))
            found.means[k] = old + (mean - old) * (n / (found.samples + n))
    found.samples += n


def _mean_window(graph: QGraph, op: Op, x: np.ndarray) -> np.ndarray:
    w = graph.tensors[op.inputs[1]]
    if op.kind == "dense":
        return x.reshape(-1, w.shape[1]).mean(0, dtype=np.float64)
    kernel = w.shape[:2] if op.kind == "depthwise2d" else w.shape[1:3]
    return patches(centred(graph, op, x), op, *kernel).mean((0, 1, 2))
