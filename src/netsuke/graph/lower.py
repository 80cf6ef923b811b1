"""From a graph and its arena to calls of C kernels: the one description that the host runs and the C home prints.

A kernel is a C function of `kernels/ns.h`: `void NAME(const NAME_params *p, pointers…)`. Its parameters are 32-bit integers
and floats only, so that one table here makes the ctypes structure for the host and the initialiser in generated code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Space = Literal["arena", "constant", "variable", "none"]


@dataclass(frozen=True)
class Pointer:
    """An argument: a byte offset in the arena, an index into `Program.constants` or `Program.variables`, or NULL."""

    space: Space
    at: int = 0
    dtype: str = "int8"


@dataclass(frozen=True)
class Call:
    """One kernel call: `params` in the order of the C structure, `args` in the order of the C function; `op` is the
    index of the operator it came from."""

    function: str
    params: dict[str, int | float]
    args: tuple[Pointer, ...]
    op: int


@dataclass(frozen=True)
class Table:
    """An array of a program. `data` is what C holds: packed, reordered, padded as its kernel wants it."""

    name: str
    data: np.ndarray


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
