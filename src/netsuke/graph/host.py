"""Runs a graph on this machine with the C kernels that the chip runs, through ctypes: the same calls, the same bits."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.abi import structures
from netsuke.graph.arena import plan_arena
from netsuke.graph.check import check_inputs
from netsuke.graph.ir import QGraph
from netsuke.graph.lower import Places, Pointer, lower, scratch

ARGUMENTS = 12  # of a kernel, at most (kernels/host.c)


class _Call(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_void_p), ("params", ctypes.c_void_p), ("args", ctypes.c_void_p * ARGUMENTS),
        ("count", ctypes.c_int32), ("reserved", ctypes.c_int32),
    )  # fmt: skip


VECTORS = ("_mcu", "_mcu_avx2", "_mcu_avx512")  # builds of the kernels, by ns_host_vectors()


@cache
def library(vectors: int | None = None) -> ctypes.CDLL:
    """The package's kernels, built for this processor or for the given level of VECTORS.

    Raises NetsukeError when they were not built.
    """
    return load_library(VECTORS[best_vectors() if vectors is None else vectors])


def best_vectors() -> int:
    """Index into VECTORS of the best build for this processor. Raises NetsukeError when they were not built."""
    return load_library(VECTORS[0]).ns_host_vectors()


def load_library(name: str) -> ctypes.CDLL:
    """A library of C that came with the package. Raises NetsukeError when it was not built."""
    folder = Path(sys.modules["netsuke"].__file__).parent
    for suffix in (".so", ".dylib", ".dll"):
        if (path := folder / f"{name}{suffix}").exists():
            return ctypes.CDLL(str(path))
    raise NetsukeError("run the C kernels", f"their library {name} is not built", "", "install the package again")


class HostProgram:
    """A graph's C program with its memory: one arena, constants, variables and states, which live from run to run."""

    def __init__(self, graph: QGraph, arena: Places | None = None, vectors: int | None = None):
        """`arena` is that of a device; without one, outputs get bytes of their own, with which a processor is faster.
        `vectors`: see `library`."""
        self._library = library(vectors)
        self.graph = graph
        self._places = arena if arena is not None else plan_arena(graph, scratch, in_place=False)
        self.program = lower(graph, self._places)
        self._arena = _aligned(np.zeros(self.program.arena, np.uint8))
        self._constants = [_aligned(t.data) for t in self.program.constants]
        self._variables = [_aligned(t.data) for t in self.program.variables]
        self._calls = (_Call * max(len(self.program.calls), 1))()
        self._params = []
        for slot, call in zip(self._calls, self.program.calls):
            self._params.append(structures()[call.function](**call.params))
            slot.kernel = ctypes.cast(getattr(self._library, call.function), ctypes.c_void_p)
            slot.params = ctypes.addressof(self._params[-1])
            slot.count = len(call.args)
            for k, pointer in enumerate(call.args):
                slot.args[k] = self._address(pointer)
        self._run = self._library.ns_host_run
        self._run.restype = None
        self._arguments = ctypes.byref(self._calls), ctypes.c_int32(len(self.program.calls))
        self.reset()

    def reset(self) -> None:
        """States back to the code of zero, and variables to their start values."""
        for array, table in zip(self._variables, self.program.variables):
            array[...] = table.data
        for index, _ in self.graph.states:
            t = self.graph.tensors[index]
            start = np.full(t.size, t.zero, t.dtype)
            self._bytes(Pointer("arena", self._places.offset(index)), index)[...] = start.view(np.uint8)

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Outputs for input arrays of the graph's types; the leading axis may be any batch in a graph without states.

        Raises NetsukeError for a wrong number, shape or type.
        """
        g = self.graph
        batch = check_inputs(g, inputs, bool(g.states))
        outs = [np.empty((batch * t.shape[0], *t.shape[1:]), t.dtype) for t in (g.tensors[i] for i in g.outputs)]
        for n in range(batch):
            for i, pointer, x in zip(g.inputs, self.program.inputs, inputs):
                k = g.tensors[i].shape[0]
                part = np.ascontiguousarray(x[n * k : (n + 1) * k]).reshape(-1)
                self._bytes(pointer, i)[...] = part.view(np.uint8)
            self.step()
            for i, pointer, out in zip(g.outputs, self.program.outputs, outs):
                k = g.tensors[i].shape[0]
                out[n * k : (n + 1) * k] = self._bytes(pointer, i).view(g.tensors[i].dtype).reshape(g.tensors[i].shape)
        return outs

    def step(self) -> None:
        """One run on what lies in the arena."""
        self._run(*self._arguments)
        for read, written, size in self.program.states:
            self._arena[read : read + size] = self._arena[written : written + size]

    def variables(self) -> dict[int, np.ndarray]:
        """The trained values in RAM by tensor index; they are the program's memory: writing to them changes it."""
        out = {}
        for table, array in zip(self.program.variables, self._variables):
            t = self.graph.tensors[table.tensor]
            out[table.tensor] = array[: t.size].reshape(t.shape)
        return out

    def _address(self, pointer: Pointer) -> int | None:
        if pointer.space == "none":
            return None
        if pointer.space == "arena":
            return self._arena.ctypes.data + pointer.at
        return (self._constants if pointer.space == "constant" else self._variables)[pointer.at].ctypes.data

    def _bytes(self, pointer: Pointer, index: int) -> np.ndarray:
        """The bytes of tensor `index`, which begins at `pointer`."""
        if pointer.space == "arena":
            return self._arena[pointer.at :][: self.graph.tensors[index].bytes]
        owner = self._constants if pointer.space == "constant" else self._variables
        return owner[pointer.at].reshape(-1).view(np.uint8)[: self.graph.tensors[index].bytes]


def _aligned(data: np.ndarray) -> np.ndarray:
    """A copy of `data` that begins at a multiple of 64 bytes."""
    raw = np.zeros(data.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + data.nbytes].view(data.dtype).reshape(data.shape)
    out[...] = data
    return out
