"""What an operator kind is: one row of `OPS`, with the NumPy reference that every back end is held to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from netsuke.graph.ir import Op, QGraph, Tensor

Array = np.ndarray
LIMITED = ("conv2d", "depthwise2d", "dense", "add", "mul", "avgpool2d", "maxpool2d")  # kinds whose output is clipped


def none(graph: QGraph, op: Op) -> None:
    return None


def no_macs(graph: QGraph, op: Op) -> int:
    return 0


def nowhere(graph: QGraph, op: Op) -> tuple[int, ...]:
    return ()


@dataclass(frozen=True)
class Kind:
    """run      (graph, op, input arrays or None) -> output arrays; the leading axis may be any batch
    check    None, or what is wrong with the operator's tensors and attributes, as a clause
    macs     multiply-accumulates of one run
    inplace  positions of inputs whose bytes the output may take over (from the same address on)
    """

    run: Callable[[QGraph, Op, list[Array | None]], tuple[Array, ...]]
    check: Callable[[QGraph, Op], str | None] = none
    macs: Callable[[QGraph, Op], int] = no_macs
    inplace: Callable[[QGraph, Op], tuple[int, ...]] = nowhere


def first(graph: QGraph, op: Op) -> tuple[Tensor, Tensor]:
    """The first input and the first output."""
    return graph.tensors[op.inputs[0]], graph.tensors[op.outputs[0]]


def arity(graph: QGraph, op: Op, low: int, high: int | None = None) -> str | None:
    """A clause when the operator has too few or too many inputs, or none where one is needed."""
    high = high or low
    if not low <= len(op.inputs) <= high or any(i < 0 for i in op.inputs[:low]) or len(op.outputs) < 1:
        return f"it has {len(op.inputs)} inputs and {len(op.outputs)} outputs; it takes {low} to {high}"
    return None


def same_type(graph: QGraph, op: Op, dtypes: tuple[str, ...] = ("int8", "float32")) -> str | None:
    x, y = first(graph, op)
    if x.dtype not in dtypes or y.dtype != x.dtype:
        return f"it maps {x.dtype} to {y.dtype}; it maps {' or '.join(dtypes)} to the same"
    if x.dtype == "int8" and (x.scale is None or y.scale is None):
        return "its input or output has no scale"
    return None


def limits(graph: QGraph, op: Op) -> tuple[float, float]:
    """The clip of the output: codes for int8, real numbers for float32."""
    y = graph.tensors[op.outputs[0]]
    low, high = (-128, 127) if y.dtype == "int8" else (-math.inf, math.inf)
    return op.attrs.get("low", low), op.attrs.get("high", high)


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from the front, 0 to rank - 1. Raises ValueError for one that is not there."""
    if not -rank <= axis < rank:
        raise ValueError(f"the axis {axis} of {rank}")
    return axis % rank


def window(size: int, kernel: int, stride: int, before: int, after: int, dilation: int = 1) -> int:
    """Length of the output of a sliding window."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
