"""`QGraph`: the one static graph of a small network, integer or float: what a microcontroller runs and trains.

A graph is a list of tensors and a list of operators in the order in which they run. Every shape is known; images are
(N, H, W, C) with N = 1 in the graph (the interpreter takes any N). A quantized tensor stands for
real = scale * (q - zero); weights have zero = 0 and one scale per output channel. What the operators are and what they
compute is said in `ops/`; the NumPy functions there are the reference that C and the boards are held to.

A *view* is a tensor without bytes of its own: a part of another one, from a byte offset on. Bands of rows (patches),
reshapes and concatenations along the outermost axis cost nothing that way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

DTYPES = ("int8", "int16", "int32", "uint8", "uint32", "uint64", "float32", "int4")  # int4: constants only, two a byte


@dataclass
class Tensor:
    """One value. `data` is there for constants (weights, biases): for "int4" as int8 values in -8…7.

    scale   float64, shape () or (channels,) along `axis`; None when the tensor is not quantized
    view    (parent tensor, byte offset) when the bytes belong to another tensor
    variable  `data` is only the start: the tensor lives in RAM and training changes it
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "int8"
    scale: np.ndarray | None = None
    zero: int = 0
    axis: int | None = None
    data: np.ndarray | None = None
    view: tuple[int, int] | None = None
    variable: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes in the memory of a device."""
        return (self.size + 1) // 2 if self.dtype == "int4" else self.size * np.dtype(self.dtype).itemsize

    @property
    def constant(self) -> bool:
        return self.data is not None

    def real(self, q: np.ndarray) -> np.ndarray:
        """The real numbers that codes stand for, float64."""
        if self.scale is None:
            return np.asarray(q, np.float64)
        scale = self.scale
        if self.axis is not None and scale.ndim:
            scale = scale.reshape([-1 if i == self.axis else 1 for i in range(len(self.shape))])
        return (np.asarray(q, np.float64) - self.zero) * scale

    def codes(self, real: np.ndarray) -> np.ndarray:
        """The nearest codes of real numbers (half to even), saturated; float32 when the tensor is not quantized."""
        if self.scale is None:
            return np.asarray(real, self.dtype)
        low, high = (-8, 7) if self.dtype == "int4" else (np.iinfo(self.dtype).min, np.iinfo(self.dtype).max)
        scale = self.scale
        if self.axis is not None and scale.ndim:
            scale = scale.reshape([-1 if i == self.axis else 1 for i in range(len(self.shape))])
        stored = "int8" if self.dtype == "int4" else self.dtype
        return np.clip(np.rint(np.asarray(real, np.float64) / scale) + self.zero, low, high).astype(stored)


@dataclass
class Op:
    """One operator: `kind` is a key of `ops.OPS`; inputs and outputs are indices of tensors, -1 an absent input."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    name: str = ""


@dataclass
class QGraph:
    """Tensors, operators in running order, and which tensors come in and go out.

    `states` are pairs (tensor read, tensor written) that live on between runs: the memory of a recurrent network.
    `meta` is free: where the graph came from, class names, how to prepare the input.
    """

    name: str
    tensors: list[Tensor] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    states: tuple[tuple[int, int], ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> int:
        """Appends a tensor and returns its index."""
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def constant(self, name: str, data: np.ndarray, **kw: Any) -> int:
        """Appends a constant and returns its index."""
        return self.add(Tensor(name, data.shape, kw.pop("dtype", str(data.dtype)), data=data, **kw))

    def append(self, kind: str, inputs: tuple[int, ...], out: Tensor, name: str = "", **attrs: Any) -> int:
        """Appends an operator with one new output tensor and returns the tensor's index."""
        index = self.add(out)
        self.ops.append(Op(kind, tuple(inputs), (index,), attrs, name or out.name))
        return index

    def copy(self) -> QGraph:
        """A graph that may be changed without changing this one; the arrays are shared until they are replaced."""
        return QGraph(
            self.name, [replace(t) for t in self.tensors], [replace(o, attrs=dict(o.attrs)) for o in self.ops],
            self.inputs, self.outputs, self.states, dict(self.meta),
        )  # fmt: skip

    def root(self, index: int) -> int:
        """The tensor that owns the bytes of `index`."""
        while (view := self.tensors[index].view) is not None:
            index = view[0]
        return index

    def offset(self, index: int) -> int:
        """Where a view begins in its root, in bytes."""
        out = 0
        while (view := self.tensors[index].view) is not None:
            index, out = view[0], out + view[1]
        return out

    def constants(self) -> Iterator[tuple[int, Tensor]]:
        """Constants that some operator reads."""
        used = {i for op in self.ops for i in op.inputs if i >= 0}
        return ((i, t) for i, t in enumerate(self.tensors) if t.constant and i in used)

    def weight_bytes(self) -> int:
        """Bytes of the constants in flash."""
        return sum(t.bytes for _, t in self.constants())

    def macs(self) -> int:
        """Multiply-accumulates of one run."""
        from netsuke.graph.ops import OPS

        return sum(OPS[op.kind].macs(self, op) for op in self.ops)

    def check(self) -> QGraph:
        """This graph, after its structure has been verified (`check.py`).

        Raises NetsukeError that names the operator or tensor. Importers call it last; hostile files end here.
        """
        from netsuke.graph.check import check_graph

        check_graph(self)
        return self
