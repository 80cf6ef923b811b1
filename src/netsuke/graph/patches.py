"""Runs a stage of a network in bands of rows, so that no large tensor of it ever exists as a whole.

The first layers of an image network hold the most bytes and the fewest weights. Here operators `start` (most often 0) to
`until` - 1 are written again per band of rows of the stage's output: a band of the input is a view of the image's rows,
a band's result is a view into the stage's output, and everything between has a few rows only. Two bands compute the rows
at their seam (the halo) both. Same integers as before: padding stays at the image's border. Graphs with bands take one
image at a time.

Lin et al., MCUNetV2, 2021. Keeping the rows of the seam instead (line buffers) saves the arithmetic and was tried: it
needs more bytes on the networks at hand, and four times the operators. Worth it where the stage's output and input are
far smaller than what lies between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from netsuke.errors import NetsukeError
from netsuke.graph.arena import Scratch, no_scratch, peak_bytes, plan_arena
from netsuke.graph.ir import Op, QGraph, Tensor

Rows = tuple[int, int]

WINDOWS = ("conv2d", "depthwise2d", "avgpool2d", "maxpool2d")
POINTS = ("add", "mul", "lut", "unary")
BANDS = (2, 3, 4, 6, 8, 12, 16, 24, 32)


def patch(graph: QGraph, until: int, bands: int, start: int = 0) -> QGraph:
    """`graph` with operators `start` to `until` - 1 in `bands` bands of rows; its tensors keep their indices.

    Raises NetsukeError when those operators are no stage (see `refusal`), or its output has fewer rows than bands.
    """
    asked = f"run operators {start} to {until - 1} of {graph.name} in {bands} bands"
    if found := refusal(graph, until, start):
        raise NetsukeError(asked, found, f"{', '.join(WINDOWS + POINTS)} on images, with one result")
    rows = graph.tensors[_result(graph, until, start)].shape[1]
    if not 1 <= bands <= rows:
        raise NetsukeError(asked, f"the stage's output has {rows} rows", f"1 to {rows} bands")
    return _Stage(graph, until, start).run(bands)


def refusal(graph: QGraph, until: int, start: int = 0) -> str | None:
    """Why operators `start` to `until` - 1 cannot be a stage, as a clause, or None."""
    if not 0 <= start < until <= len(graph.ops):
        return f"the network has {len(graph.ops)} operators"
    written: set[int] = set()
    for op in graph.ops[start:until]:
        name = op.name or op.kind
        if op.kind not in WINDOWS + POINTS:
            return f"the operator {name!r} is {op.kind}, which needs the whole image"
        images, weights = _images(op), [i for i in op.inputs if i >= 0 and i not in _images(op)]
        shapes = [graph.tensors[i].shape for i in (*images, *op.outputs)]
        if any(len(s) != 4 or s[0] != 1 for s in shapes) or any(graph.tensors[i].constant for i in images):
            return f"the operator {name!r} does not work on one image"
        if op.kind in POINTS and len(set(shapes)) > 1:
            return f"the operator {name!r} spreads one of its inputs"
        if any(not graph.tensors[i].constant or graph.tensors[i].variable for i in weights):
            return f"the operator {name!r} has weights that change"
        if any(graph.tensors[i].view or graph.tensors[i].constant or i in written for i in op.outputs):
            return f"the operator {name!r} writes to a part of a tensor, to a variable, or a second time"
        written.update(op.outputs)
    if {i for pair in graph.states for i in pair} & written:
        return "it writes a state"
    if _result(graph, until, start) < 0:
        return "more than one of its results is used later"
    return None


def _result(graph: QGraph, until: int, start: int) -> int:
    """The one tensor that these operators write and later ones read, or -1."""
    written = {i for op in graph.ops[start:until] for i in op.outputs}
    later = {graph.root(i) for op in graph.ops[until:] for i in op.inputs if i >= 0}
    used = written & (later | {graph.root(i) for i in graph.outputs})
    return used.pop() if len(used) == 1 else -1


class _Stage:
    """The rewriting of one stage: `have` says which tensor holds which rows in the band at work."""

    def __init__(self, graph: QGraph, until: int, start: int):
        self.old, self.ops = graph, graph.ops[start:until]
        self.result = _result(graph, until, start)
        self.new = graph.copy()
        self.rest = self.new.ops[until:]
        self.new.ops = self.new.ops[:start]
        self.inside = {i for op in self.ops for i in op.outputs}
        self.have: dict[int, tuple[int, Rows]] = {}

    def run(self, bands: int) -> QGraph:
        rows = self.old.tensors[self.result].shape[1]
        edges = [rows * b // bands for b in range(bands + 1)]
        for number, band in enumerate(pairwise(edges)):
            need = self._need(band)
            for op in self.ops:
                if op.outputs[0] in need:
                    self._emit(op, number, need[op.outputs[0]])
        self.new.ops += self.rest
        return self.new.check()

    def _need(self, band: Rows) -> dict[int, Rows]:
        """Rows of every tensor of the stage that rows of its output come from; one span per tensor, for all readers."""
        need = {self.result: band}
        for op in reversed(self.ops):
            if op.outputs[0] not in need:
                continue
            low, high = _source(self.old, op, need[op.outputs[0]])[0]
            for i in _images(op):
                first, last = need.get(i, (low, high))
                need[i] = (min(first, low), max(last, high))
        return need

    def _emit(self, op: Op, number: int, rows: Rows) -> None:
        y = op.outputs[0]
        if y == self.result:
            out = self._view(y, (0, self.old.tensors[y].shape[1]), rows)
        else:
            t = self.old.tensors[y]
            shape = (1, rows[1] - rows[0], *t.shape[2:])
            out = self.new.add(replace(t, name=f"{t.name}[{rows[0]}:{rows[1]}]", shape=shape))
        self.have[y] = (out, rows)
        source, pads = _source(self.old, op, rows)
        attrs: dict[str, Any] = dict(op.attrs)
        if op.kind in WINDOWS:
            attrs["pad"] = (*pads, *op.attrs.get("pad", (0, 0, 0, 0))[2:])
        images = _images(op)
        inputs = (*(self._part(i, source) for i in images), *op.inputs[len(images) :])
        self.new.ops.append(Op(op.kind, inputs, (out,), attrs, f"{op.name}[{number}]"))

    def _part(self, tensor: int, rows: Rows) -> int:
        """Rows of a tensor of the stage, or of one that the stage only reads."""
        if tensor in self.inside:
            return self._view(*self.have[tensor], rows)
        return self._view(tensor, (0, self.old.tensors[tensor].shape[1]), rows)

    def _view(self, tensor: int, whole: Rows, rows: Rows) -> int:
        """Rows (numbered as in the unbanded tensor) of a tensor that holds the rows `whole`."""
        if rows == whole:
            return tensor
        t: Tensor = self.new.tensors[tensor]
        one = t.bytes // t.shape[1]
        shape = (1, rows[1] - rows[0], *t.shape[2:])
        name = f"{t.name}[{rows[0]}:{rows[1]}]"
        return self.new.add(replace(t, name=name, shape=shape, view=(tensor, (rows[0] - whole[0]) * one)))


def _images(op: Op) -> tuple[int, ...]:
    """The inputs that are cut into bands; the others are weights."""
    return op.inputs if op.kind in POINTS else op.inputs[:1]


def _source(graph: QGraph, op: Op, rows: Rows) -> tuple[Rows, tuple[int, int]]:
    """(input rows that output rows need, padding above and below them)."""
    if op.kind in POINTS:
        return rows, (0, 0)
    height = graph.tensors[op.inputs[0]].shape[1]
    if "window" in op.attrs:
        kernel = op.attrs["window"][0]
    else:
        kernel = graph.tensors[op.inputs[1]].shape[0 if op.kind == "depthwise2d" else 1]
    stride, dilation = op.attrs.get("stride", (1, 1))[0], op.attrs.get("dilation", (1, 1))[0]
    top = op.attrs.get("pad", (0, 0, 0, 0))[0]
    low = rows[0] * stride - top
    high = (rows[1] - 1) * stride - top + dilation * (kernel - 1) + 1
    return (max(low, 0), min(high, height)), (max(-low, 0), max(high - height, 0))


def candidates(graph: QGraph, peak_op: int, most_macs: float) -> Iterator[tuple[int, int, int, QGraph]]:
    """(start, until, bands, the graph with them) for every stage from the earliest operator on that contains the one at
    the peak, while its multiply-accumulates are at most `most_macs`."""
    whole = [k for k, op in enumerate(graph.ops) if op.kind not in WINDOWS + POINTS]
    start = max((k + 1 for k in whole if k <= peak_op), default=0)
    end = min((k for k in whole if k > peak_op), default=len(graph.ops))
    for until in range(max(peak_op, start) + 1, end + 1):
        if refusal(graph, until, start):
            continue
        rows = graph.tensors[_result(graph, until, start)].shape[1]
        for bands in BANDS:
            if bands > rows or (banded := patch(graph, until, bands, start)).macs() > most_macs:
                break
            yield start, until, bands, banded


def best_patching(
    graph: QGraph, scratch: Scratch = no_scratch, most_macs: float = 1.25
) -> tuple[QGraph, dict[str, int]]:
    """The graph with a stage in bands where that needs the least arena, or as it is where nothing is gained.

    Of equal arenas the one with the fewest multiply-accumulates; never more than `most_macs` times the graph's own. The
    second value is {start, until, bands, arena_before, arena, macs_before, macs, extra_macs}: bytes, work of one run;
    `bands` is 1 when nothing is gained.
    """
    plain, macs = plan_arena(graph, scratch), graph.macs()
    best = (plain.size, macs, 0, 0, 1, graph)
    for start, until, bands, banded in candidates(graph, plain.peak_op, most_macs * macs):
        if peak_bytes(banded, scratch) <= best[0]:
            size = plan_arena(banded, scratch, placements=0).size  # its order decides among hundreds; greedy will do
            best = min(best, (size, banded.macs(), start, until, bands, banded), key=lambda x: x[:2])
    size, cost, start, until, bands, banded = best
    if banded is not graph:
        size = plan_arena(banded, scratch).size
    return banded, {
        "start": start, "until": until, "bands": bands, "arena_before": plain.size, "arena": size,
        "macs_before": macs, "macs": cost, "extra_macs": cost - macs,
    }  # fmt: skip
