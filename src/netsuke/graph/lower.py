"""From a graph and its arena to calls of C kernels: the one description that the host runs and the C home prints.

A kernel is a C function of `kernels/`: `void NAME(const NAME_params *p, pointers…)`. Its parameters are 32-bit integers and
floats only (`abi.structures`), so that one dictionary here makes the ctypes structure for the host and the initialiser in
generated code. How each kind of operator becomes calls is in `lower_ops.py` and its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, Protocol

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.ir import Op, QGraph

Space = Literal["arena", "constant", "variable", "none"]
SPARE = 4  # bytes behind 8- and 4-bit weights, which kernels may read when they load whole words


@dataclass(frozen=True)
class Pointer:
    """An argument: a byte offset in the arena, an index into `Program.constants` or `Program.variables`, or NULL."""

    space: Space
    at: int = 0
    dtype: str = "int8"


@dataclass(frozen=True)
class Call:
    """One kernel call: `params` has the fields of the C structure in its order, `args` are in the order of the C function;
    `op` is the index of the operator it came from."""

    function: str
    params: dict[str, int | float]
    args: tuple[Pointer, ...]
    op: int


@dataclass(frozen=True)
class Table:
    """An array of a program. `data` is what C holds: packed, reordered, padded as its kernel wants it; `tensor` is the
    graph's tensor whose values it holds, or -1."""

    name: str
    data: np.ndarray
    tensor: int = -1


@dataclass
class Program:
    """What runs: calls in order, constants for flash, variables for RAM with their start values, and the arena's size.

    inputs, outputs   arena offsets and types; states  (read offset, written offset, bytes) copied after each run
    """

    calls: list[Call] = field(default_factory=list)
    constants: list[Table] = field(default_factory=list)
    variables: list[Table] = field(default_factory=list)
    arena: int = 0
    inputs: list[Pointer] = field(default_factory=list)
    outputs: list[Pointer] = field(default_factory=list)
    states: list[tuple[int, int, int]] = field(default_factory=list)


class Places(Protocol):
    """What lowering asks of an arena (`arena.Arena`)."""

    @property
    def size(self) -> int: ...

    def offset(self, tensor: int) -> int: ...

    def scratch_offset(self, op: int) -> int: ...


def no_scratch(graph: QGraph, op: Op) -> int:
    return 0


@dataclass(frozen=True)
class Rule:
    """How a kind becomes calls: `lower(lowering, op)` calls `lowering.call`; `scratch` is in bytes."""

    lower: Callable[[Lowering, Op], None]
    scratch: Callable[[QGraph, Op], int] = no_scratch


@cache
def rules() -> dict[str, Rule]:
    """The rule of every kind of operator that has kernels."""
    from netsuke.graph import lower_move, lower_ops, lower_recurrent, lower_signal, lower_train

    modules = (lower_ops, lower_move, lower_train, lower_recurrent, lower_signal)
    return {kind: rule for module in modules for kind, rule in module.RULES.items()}


def scratch(graph: QGraph, op: Op) -> int:
    """Bytes of working memory that the operator's kernels need while they run."""
    rule = rules().get(op.kind)
    return rule.scratch(graph, op) if rule else 0


def lower(graph: QGraph, arena: Places) -> Program:
    """The program of `graph` in `arena`. Raises NetsukeError for an operator without a kernel, by name."""
    lowering = Lowering(graph, arena)
    for k, op in enumerate(graph.ops):
        if op.kind not in rules():
            raise NetsukeError(
                f"make C of {graph.name}", f"the operator {op.name or k} is of the kind {op.kind!r}, which has no kernel",
                ", ".join(sorted(rules())), "run it with the interpreter, or split the model before it",
            )  # fmt: skip
        lowering.at = k
        rules()[op.kind].lower(lowering, op)
    return lowering.finish()


class Lowering:
    """The program under construction. `at` is the index of the operator that is being lowered."""

    def __init__(self, graph: QGraph, arena: Places):
        self.graph, self.arena, self.program, self.at = graph, arena, Program(arena=arena.size), 0
        self._known: dict[tuple, Pointer] = {}  # by tensor and form, or by what a table holds

    def call(self, function: str, params: dict[str, int | float], *args: Pointer) -> None:
        """Appends a kernel call. Raises ValueError when the parameters are not those of the C structure."""
        from netsuke.graph.abi import structures

        names = [name for name, _ in structures()[function]._fields_]
        if set(names) != set(params):
            raise ValueError(f"{function} takes {names}, not {list(params)}")
        self.program.calls.append(Call(function, {n: params[n] for n in names}, args, self.at))

    def tensor(self, index: int) -> Pointer:
        """Where a tensor's elements lie as they are: arena, flash or RAM; NULL for -1."""
        if index < 0:
            return Pointer("none")
        t, root = self.graph.tensors[index], self.graph.tensors[self.graph.root(index)]
        if t.variable:
            return self._variable(index)
        if not root.constant:
            return Pointer("arena", self.arena.offset(index), t.dtype)
        if root.variable:
            raise self.refuse(
                f"{t.name!r} is a part of the trained tensor {root.name!r}", "a trained tensor as a whole"
            )
        data = t.data
        if data is None:
            raw = np.ascontiguousarray(root.data).reshape(-1).view(np.uint8)[self.graph.offset(index) :][: t.bytes]
            data = raw.view(t.dtype).reshape(t.shape)
        return self.constant(index, "plain", lambda: np.ascontiguousarray(data))

    def constant(self, index: int, form: str, make: Callable[[], np.ndarray]) -> Pointer:
        """A constant made from tensor `index` in some form; the same (index, form) is stored once."""
        key = (index, form)
        if key not in self._known:
            name = self.graph.tensors[index].name + ("" if form == "plain" else f".{form}")
            self._known[key] = self._append(Table(name, make(), index))
        return self._known[key]

    def table(self, name: str, data: np.ndarray) -> Pointer:
        """A constant of the current operator; bands of one layer, which need the same numbers, share them."""
        data = np.ascontiguousarray(data)
        key = (str(data.dtype), data.shape, data.tobytes())
        if key not in self._known:
            self._known[key] = self._append(Table(f"{self.graph.ops[self.at].name or f'op{self.at}'}.{name}", data))
        return self._known[key]

    def scratch(self) -> Pointer:
        """The current operator's working memory."""
        op = self.graph.ops[self.at]
        return Pointer("arena", self.arena.scratch_offset(self.at)) if scratch(self.graph, op) else Pointer("none")

    def refuse(self, found: str, allowed: str = "") -> NetsukeError:
        """The error for the current operator."""
        op = self.graph.ops[self.at]
        return NetsukeError(f"make C of {self.graph.name}", f"{op.name or op.kind} ({op.kind}): {found}", allowed)

    def _append(self, table: Table) -> Pointer:
        self.program.constants.append(table)
        return Pointer("constant", len(self.program.constants) - 1, str(table.data.dtype))

    def _variable(self, index: int) -> Pointer:
        key = (index, "variable")
        if key not in self._known:
            t = self.graph.tensors[index]
            data = np.ascontiguousarray(t.data if t.data is not None else np.zeros(t.shape, t.dtype)).reshape(-1)
            if t.dtype == "int8":
                data = np.pad(data, (0, SPARE))
            self.program.variables.append(Table(t.name, data, index))
            self._known[key] = Pointer("variable", len(self.program.variables) - 1, t.dtype)
        return self._known[key]

    def finish(self) -> Program:
        graph, program = self.graph, self.program
        program.inputs = [self.tensor(i) for i in graph.inputs]
        program.outputs = [self.tensor(i) for i in graph.outputs]
        program.states = [
            (self.arena.offset(a), self.arena.offset(b), graph.tensors[a].bytes)
            for a, b in graph.states
            if self.arena.offset(a) != self.arena.offset(b)
        ]
        return program
