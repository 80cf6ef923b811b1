"""The reference: runs a `QGraph` in NumPy, operator by operator. Slow, exact, and what C and the boards are compared with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from netsuke.graph.check import check_inputs
from netsuke.graph.ir import QGraph
from netsuke.graph.ops import OPS


class Interpreter:
    """A graph with its state. `run` is a pure function of the inputs unless the graph has states."""

    def __init__(self, graph: QGraph):
        self.graph = graph
        # bytes of a view, and what a state remembers, belong to one sample
        self.single = bool(graph.states) or any(t.view is not None for t in graph.tensors)
        self.reset()

    def reset(self) -> None:
        """States back to the code of zero."""
        g = self.graph
        self.states = {
            a: np.full(g.tensors[a].shape, g.tensors[a].zero, _stored(g.tensors[a].dtype)) for a, _ in g.states
        }

    def run(
        self, *inputs: np.ndarray, on_op: Callable[[int, tuple[np.ndarray, ...]], None] | None = None
    ) -> list[np.ndarray]:
        """Outputs for input arrays of the graph's types; the leading axis may be any batch in a graph without
        states and views.

        `on_op(index, outputs)` sees every operator's result. Raises NetsukeError for a wrong number, shape or type.
        """
        g = self.graph
        values = self._inputs(inputs)
        for k, op in enumerate(g.ops):
            args = [None if i < 0 else values[i] if i in values else self._view(values, i) for i in op.inputs]
            outs = OPS[op.kind].run(g, op, args)
            for i, out in zip(op.outputs, outs):
                self._store(values, i, out)
            if on_op:
                on_op(k, outs)
        for read, written in g.states:
            self.states[read] = values[read] = self._view(values, written).copy()
        return [self._view(values, i) for i in g.outputs]

    def _inputs(self, inputs: tuple[np.ndarray, ...]) -> dict[int, np.ndarray]:
        g = self.graph
        values = {i: t.data for i, t in enumerate(g.tensors) if t.constant} | dict(self.states)
        check_inputs(g, inputs, self.single)
        return values | dict(zip(g.inputs, inputs))

    def _view(self, values: dict[int, np.ndarray], index: int) -> np.ndarray:
        """A view's elements out of its root's, by bytes."""
        if index in values:
            return values[index]
        t, root = self.graph.tensors[index], self.graph.root(index)
        flat = values[root].reshape(-1).view(np.uint8)
        start = self.graph.offset(index)
        return flat[start : start + t.bytes].view(_stored(t.dtype)).reshape(t.shape)

    def _store(self, values: dict[int, np.ndarray], index: int, out: np.ndarray) -> None:
        t = self.graph.tensors[index]
        if t.view is None:
            values[index] = out
            return
        root = self.graph.root(index)
        if root not in values:
            values[root] = np.zeros(self.graph.tensors[root].shape, _stored(self.graph.tensors[root].dtype))
        start = self.graph.offset(index)
        values[root].reshape(-1).view(np.uint8)[start : start + t.bytes] = (
            np.ascontiguousarray(out).reshape(-1).view(np.uint8)
        )


def _stored(dtype: str) -> np.dtype:
    return np.dtype("int8" if dtype == "int4" else dtype)
