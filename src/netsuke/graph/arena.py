"""The arena: one static array in which every tensor of a run has its place, planned before anything is built.

A *span* is a run of bytes that is live from one step to another: what an operator writes, until its last reader has
run. A *block* is what must keep its relative place: a tensor with its views, tensors that are only another look at its
bytes (reshape, contiguous slices), an output in place of its input, parts that lie where their concatenation wants
them. Planning is choosing the blocks, here, and packing them, in `packing`.

Steps: 0 is the caller filling the inputs, k + 1 is operator k, the last is the caller reading the outputs.
Reshapes, slices and concatenations whose input lies at its place in the output have nothing left to do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from netsuke.graph.ir import Op, QGraph, Tensor
from netsuke.graph.ops import OPS
from netsuke.graph.packing import ALIGNMENT, PLACEMENTS, Span, live_bytes, pack, union, up


class Place(NamedTuple):
    """Where a tensor lies in its block."""

    block: int
    at: int


@dataclass
class Arena:
    """A plan. `size` and `lower_bound` (the most bytes live at one step, `peak_op`) in bytes; size >= lower_bound."""

    size: int
    lower_bound: int
    peak_op: int
    offsets: dict[int, int]
    scratch: dict[int, int]
    taken: dict[int, int]
    blocks: list[list[Span]] = field(repr=False)

    def __contains__(self, tensor: int) -> bool:
        """Whether the tensor lies in the arena (constants and variables do not)."""
        return tensor in self.offsets

    def offset(self, tensor: int) -> int:
        """Byte offset of a tensor. Raises KeyError for one outside the arena."""
        return self.offsets[tensor]

    def scratch_offset(self, op: int) -> int:
        """Byte offset of operator `op`'s scratch, 0 when it has none."""
        return self.scratch.get(op, 0)

    def in_place(self, op: int) -> int | None:
        """The position of the input whose bytes operator `op`'s first output takes over, or None."""
        return self.taken.get(op)

    def live(self, op: int) -> list[tuple[int, int]]:
        """(tensor, bytes) at operator `op`, largest first; they sum to the live bytes. An output in place of an input
        counts with what it is longer by; tensor -1 is scratch."""
        count: dict[int, int] = defaultdict(int)
        for block in self.blocks:
            covered: list[tuple[int, int]] = []
            for s in sorted(s for s in block if s.start <= op + 1 <= s.end):
                before = union(covered)
                covered.append((s.low, s.high))
                count[s.tensor] += union(covered) - before
        return sorted(((t, n) for t, n in count.items() if n), key=lambda x: (-x[1], x[0]))


Scratch = Callable[[QGraph, Op], int]


def no_scratch(graph: QGraph, op: Op) -> int:
    return 0


def plan_arena(
    graph: QGraph, scratch: Scratch = no_scratch, in_place: bool = True, placements: int = PLACEMENTS
) -> Arena:
    """Places everything a run of `graph` touches in RAM, apart from variables, at multiples of 4 bytes.

    `scratch(graph, op)` is the bytes that an operator's kernel needs while it runs. Inputs are live from the start until
    their last reader (they do not survive a run), outputs to the end, states always. `in_place=False` gives every output
    bytes of its own, for comparison or where a kernel is faster so. `placements`: see `packing`.
    """
    best: Arena | None = None
    for backwards in (False, True):  # which of an addition's two dead inputs is overwritten
        arena = _plan(graph, _Layout(graph, scratch, in_place, backwards), placements)
        if best is None or arena.size < best.size:
            best = arena
        if best.size <= up(best.lower_bound):
            break
    return best


def peak_bytes(graph: QGraph, scratch: Scratch = no_scratch) -> int:
    """The most bytes live at one step: what `plan_arena` comes near, at a fraction of its time."""
    return int(live_bytes(list(_Layout(graph, scratch, True, False).spans.values()), len(graph.ops) + 2).max())


def _plan(graph: QGraph, layout: _Layout, placements: int) -> Arena:
    keys = list(layout.spans)
    spans = [layout.spans[b] for b in keys]
    live = live_bytes(spans, len(graph.ops) + 2)
    bases, size = pack(spans, [layout.floors[b] for b in keys], up(int(live.max())), placements)
    base = dict(zip(keys, bases))
    offsets = {}
    for i in range(len(graph.tensors)):
        root, at = layout.resolve(i)
        if root in layout.places:
            offsets[i] = base[layout.places[root].block] + layout.places[root].at + at
    peak = min(max(int(np.argmax(live)) - 1, 0), max(len(graph.ops) - 1, 0))
    scratch = {-1 - b: at for b, at in base.items() if b < 0}
    return Arena(size, int(live.max()), peak, offsets, scratch, layout.taken, spans)


class _Layout:
    """Blocks of a graph: at first one per tensor with bytes of its own; `_share` joins them. Block -1 - k is operator
    k's scratch, any other is named after one of its tensors."""

    def __init__(self, graph: QGraph, scratch: Scratch, in_place: bool, backwards: bool):
        self.graph = graph
        self.last = len(graph.ops) + 1
        self.aliases: dict[int, tuple[int, int]] = {}
        self.taken: dict[int, int] = {}
        writes, reads = self._accesses()
        self.places = {r: Place(r, 0) for r in sorted(set(writes) | set(reads))}
        self.floors = {r: 0 for r in self.places}
        self.spans = {r: _spans(r, writes[r], reads[r]) for r in self.places}
        if in_place:
            self._share(backwards)
        for k, op in enumerate(graph.ops):
            if n := scratch(graph, op):
                self.spans[-1 - k] = [Span(k + 1, k + 1, 0, n, -1)]
                self.floors[-1 - k] = 0

    def resolve(self, tensor: int) -> tuple[int, int]:
        """(tensor that owns the bytes, offset in it) through views, reshapes and slices."""
        root, at = self.graph.root(tensor), self.graph.offset(tensor)
        while root in self.aliases:
            parent, more = self.aliases[root]
            root, at = self.graph.root(parent), at + more + self.graph.offset(parent)
        return root, at

    def _accesses(self) -> tuple[dict[int, list], dict[int, list]]:
        """Per root, (step, low, high) of every write and every read."""
        g = self.graph
        written_at = defaultdict(list)
        for k, op in enumerate(g.ops):
            for i in op.outputs:
                written_at[g.root(i)].append(k)
        writes: dict[int, list] = defaultdict(list)
        reads: dict[int, list] = defaultdict(list)

        def note(table: dict[int, list], tensor: int, step: int) -> None:
            root, at = self.resolve(tensor)
            if not g.tensors[root].constant:
                table[root].append((step, at, at + g.tensors[tensor].bytes))

        for i in (*g.inputs, *(read for read, _ in g.states)):
            note(writes, i, 0)
        for k, op in enumerate(g.ops):
            for i in op.inputs:
                if i >= 0:
                    note(reads, i, k + 1)
            shift = same_bytes(g, op)
            if shift is not None and self._may_alias(op, k, written_at):
                self.aliases[op.outputs[0]] = (op.inputs[0], shift)
                continue
            for i in op.outputs:
                note(writes, i, k + 1)
        for i in (*g.outputs, *(i for pair in g.states for i in pair)):
            note(reads, i, self.last)
        return writes, reads

    def _may_alias(self, op: Op, k: int, written_at: dict[int, list[int]]) -> bool:
        """Nothing writes the source's bytes later, and the output is nobody's view, state, constant or second write."""
        g, x, y = self.graph, op.inputs[0], op.outputs[0]
        root, _ = self.resolve(x)
        states = {a for a, _ in g.states}
        free = g.tensors[y].view is None and not g.tensors[y].constant and y not in states and y not in g.inputs
        late = root in states or any(j > k for j in written_at[root])
        return free and not late and written_at[y] == [k] and not g.tensors[root].constant

    def _share(self, backwards: bool) -> None:
        """Joins blocks: outputs in place of inputs that nobody reads later, parts in place in their concatenation."""
        g = self.graph
        for k, op in enumerate(g.ops):
            if op.kind == "concat" and outermost(g.tensors[op.outputs[0]]) == op.attrs["axis"]:
                at = 0
                for i in op.inputs:
                    root, low, high = self._range(i)
                    if (low, high) == (0, g.tensors[root].bytes):  # joined parts would pull band after band along
                        self._join(k, i, op.outputs[0], at)
                    at += g.tensors[i].bytes
                continue
            positions = [p for p in OPS[op.kind].inplace(g, op) if op.inputs[p] >= 0]
            for p in reversed(positions) if backwards else positions:
                if self._alone(op, p) and self._join(k, op.inputs[p], op.outputs[0], 0):
                    self.taken[k] = p
                    break

    def _alone(self, op: Op, position: int) -> bool:
        """No other input reads some of the same bytes from elsewhere (the very same tensor twice is harmless)."""
        mine = self._range(op.inputs[position])
        others = (self._range(i) for p, i in enumerate(op.inputs) if p != position and i >= 0)
        return all(o == mine or o[0] != mine[0] or o[1] >= mine[2] or mine[1] >= o[2] for o in others)

    def _range(self, tensor: int) -> tuple[int, int, int]:
        root, at = self.resolve(tensor)
        return root, at, at + self.graph.tensors[tensor].bytes

    def _join(self, k: int, source: int, out: int, at: int) -> bool:
        """Puts `source` at byte `at` of `out` for good, unless bytes that are still needed would be lost."""
        (x, xl, xh), (y, yl, yh) = self._range(source), self._range(out)
        if x not in self.places or y not in self.places:
            return False  # a constant or a variable
        a, b = self.places[x], self.places[y]
        shift = (b.at + yl + at) - (a.at + xl)  # of a's block
        if shift % ALIGNMENT or (a.block == b.block and shift):
            return False
        step = k + 1
        if a.block == b.block:
            return True
        moved = [s._replace(low=s.low + shift, high=s.high + shift) for s in self.spans[a.block]]
        reading = (a.at + xl + shift, a.at + xh + shift)
        writing = (b.at + yl, b.at + yh)
        for s in moved:
            handed = s.tensor == x and s.end == step and reading[0] <= s.low and s.high <= reading[1]
            for t in self.spans[b.block]:
                if s.end < t.start or t.end < s.start or s.high <= t.low or t.high <= s.low:
                    continue
                if not (handed and t.tensor == y and t.start == step and writing[0] <= t.low and t.high <= writing[1]):
                    return False
        self.spans[b.block] += moved
        self.floors[b.block] = max(self.floors[b.block], self.floors[a.block] - shift)
        for root, place in self.places.items():
            if place.block == a.block:
                self.places[root] = Place(b.block, place.at + shift)
        del self.spans[a.block]
        return True


def outermost(t: Tensor) -> int:
    """The first axis that is longer than 1 (0 when none is): parts along it are contiguous."""
    return next((a for a, n in enumerate(t.shape) if n > 1), 0)


def same_bytes(graph: QGraph, op: Op) -> int | None:
    """Byte offset in the input at which the output of a reshape or of a contiguous slice can be found, else None."""
    if op.kind == "reshape":
        return 0
    if op.kind != "slice":
        return None
    x, y = graph.tensors[op.inputs[0]], graph.tensors[op.outputs[0]]
    axis = outermost(x)
    strides = op.attrs.get("stride", (1,) * len(y.shape))
    if x.shape[axis + 1 :] != y.shape[axis + 1 :] or (strides[axis] != 1 and y.shape[axis] > 1):
        return None
    at = op.attrs["begin"][axis] * (x.bytes // x.shape[axis])
    return at if at % ALIGNMENT == 0 else None


def _spans(root: int, writes: Iterable, reads: Iterable) -> list[Span]:
    """What is live when: the common bytes of each write and each later read; a write that nobody reads, at its step."""
    out = {Span(w, w, low, high, root) for w, low, high in writes}
    for w, low, high in writes:
        for r, first, end in reads:
            if w <= r and max(low, first) < min(high, end):
                out.add(Span(w, r, max(low, first), min(high, end), root))
    return sorted(s for s in out if not any(_within(s, t) for t in out if t != s))


def _within(s: Span, t: Span) -> bool:
    return t.start <= s.start and s.end <= t.end and t.low <= s.low and s.high <= t.high
