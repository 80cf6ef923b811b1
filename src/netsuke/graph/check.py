"""Whether a `QGraph` is sound, and inputs suit it: indices, order, shapes, types, views, limits. Hostile files end here.

What an operator asks of its tensors and attributes is said by its row of `ops.OPS`; what all have in common stands here, so
that nothing behind it reads outside of an array or meets a number where it expects a list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.ir import DTYPES
from netsuke.graph.ops import OPS
from netsuke.graph.ops.base import LIMITED, limits

if TYPE_CHECKING:
    from netsuke.graph.ir import Op, QGraph, Tensor

LARGEST_TENSOR = 1 << 31  # bytes; a graph that asks for more is hostile, not small
DEEPEST_VIEW = 16  # views of views; bands of a stage inside a merged tensor have 3
INT4 = (-8, 7)
WHOLE = ("stride", "pad", "pads", "dilation", "window", "groups", "perm", "axis", "begin")  # attributes: whole numbers
Refuse = Callable[..., NetsukeError]
MALFORMED = (
    ArithmeticError,
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
)  # from attributes of any kind


def check_graph(graph: QGraph) -> None:
    """Raises NetsukeError that names the first operator or tensor that is not sound."""
    asked, n = f"use the network {graph.name}", len(graph.tensors)
    for t in graph.tensors:
        _tensor(t, asked)
    for t in graph.tensors:
        _view(graph, t, asked)
    for i in (*graph.inputs, *graph.outputs, *(s for pair in graph.states for s in pair)):
        if not 0 <= i < n:
            raise NetsukeError(asked, f"an input or output names tensor {i}", f"0 to {n - 1}")
    for a, b in graph.states:
        read, kept = graph.tensors[a], graph.tensors[b]
        if (read.shape, read.dtype) != (kept.shape, kept.dtype):
            raise NetsukeError(
                asked, f"the state {read.name!r} is {read.dtype} {read.shape} and is kept in {kept.dtype} {kept.shape}",
                "one type and shape",
            )  # fmt: skip
    known = {i for i, t in enumerate(graph.tensors) if t.constant}
    written = known | set(graph.inputs) | {a for a, _ in graph.states}
    for op in graph.ops:
        _operator(graph, op, written, asked)
    for i in (*graph.outputs, *(b for _, b in graph.states)):
        if i not in written and graph.root(i) not in written:
            raise NetsukeError(
                asked, f"the output {graph.tensors[i].name!r} is never written", "an operator that writes it"
            )


def check_inputs(graph: QGraph, inputs: Sequence[np.ndarray], single: bool) -> int:
    """How many runs the arrays are: 1 when `single`, else all have one leading axis of that many times the graph's.

    Raises NetsukeError for a wrong number, shape or type, and for inputs of different lengths.
    """
    asked = f"run {graph.name}"
    if len(inputs) != len(graph.inputs):
        raise NetsukeError(asked, f"{len(inputs)} inputs were given", f"{len(graph.inputs)}")
    batches = set()
    for i, x in zip(graph.inputs, inputs):
        t = graph.tensors[i]
        fits = x.shape == t.shape or (not single and x.ndim == len(t.shape) > 0 and x.shape[1:] == t.shape[1:])
        if not fits or x.dtype != t.dtype or (t.shape and x.shape[0] % t.shape[0]):
            raise NetsukeError(asked, f"the input is {x.dtype} {x.shape}", f"{t.dtype} {t.shape}")
        batches.add(x.shape[0] // t.shape[0] if t.shape else 1)
    if len(batches) > 1:
        raise NetsukeError(
            asked, f"its inputs have the lengths {', '.join(str(x.shape[0]) for x in inputs)}", "as many rows of each"
        )
    return batches.pop() if batches else 1


def _operator(graph: QGraph, op: Op, written: set[int], asked: str) -> None:
    """Checks one operator after all before it, and adds what it writes to `written`."""
    where, n = f"the operator {op.name or op.kind!r}", len(graph.tensors)
    if op.kind not in OPS:
        raise NetsukeError(
            asked, f"{where} is of the unknown kind {op.kind!r}", ", ".join(sorted(OPS)), "split the model before it"
        )  # fmt: skip
    if any(not -1 <= i < n for i in op.inputs) or any(not 0 <= i < n for i in op.outputs):
        raise NetsukeError(asked, f"{where} names a tensor that does not exist", f"0 to {n - 1}")
    for i in op.inputs:
        if i >= 0 and graph.root(i) not in written and i not in written:
            raise NetsukeError(
                asked, f"{where} reads {graph.tensors[i].name!r} before it is written", "operators in running order"
            )
    for i in op.outputs:
        root = graph.tensors[graph.root(i)]
        if root.constant and not root.variable:
            raise NetsukeError(asked, f"{where} writes to a constant", "a tensor of its own")
        if graph.root(i) in graph.inputs or any(x != i and _overlap(graph, i, x) for x in op.inputs):
            raise NetsukeError(asked, f"{where} writes into what it reads, or into an input", "a tensor of its own")
    written |= {graph.root(i) for i in op.outputs} | set(op.outputs)
    try:
        found = _attributes(op) or OPS[op.kind].check(graph, op) or _limits(graph, op)
    except MALFORMED as e:
        raise NetsukeError(
            asked, f"{where} ({op.kind}) has tensors or attributes that it cannot use ({str(e)[:80] or type(e).__name__})",
            "what netsuke or the model's framework writes", "import or export the model again",
        ) from None  # fmt: skip
    if found:
        raise NetsukeError(asked, f"{where} ({op.kind}): {found}")


def _overlap(graph: QGraph, a: int, b: int) -> bool:
    """Whether two tensors have bytes in common."""
    if b < 0 or graph.root(a) != graph.root(b):
        return False
    start, other = graph.offset(a), graph.offset(b)
    return start < other + graph.tensors[b].bytes and other < start + graph.tensors[a].bytes


def _attributes(op: Op) -> str | None:
    for key in WHOLE:
        if key in op.attrs and not _whole(op.attrs[key]):
            return f"its {key} is {str(op.attrs[key])[:40]}; it is made of whole numbers"
    return None


def _whole(value: Any) -> bool:
    """Whether a number, or lists of numbers of one length, are whole and fit 32 bits."""
    array = np.asarray(value)
    return array.size == 0 or (array.dtype.kind in "iu" and bool(np.all(np.abs(array.astype(np.float64)) < 2**31)))


def _limits(graph: QGraph, op: Op) -> str | None:
    """Of operators that clip: limits in order and, under int8, codes."""
    if op.kind not in LIMITED:
        return None
    low, high = limits(graph, op)
    if not low <= high:
        return f"its output is clipped from {low} to {high}"
    y = graph.tensors[op.outputs[0]]
    if y.dtype == "int8" and not (-128 <= low == int(low) and int(high) == high <= 127):
        return f"its codes are clipped from {low} to {high}, which are no codes of int8"
    return None


def _tensor(t: Tensor, asked: str) -> None:
    def refuse(found: str, allowed: str, attempt: str = "") -> NetsukeError:
        return NetsukeError(asked, f"the tensor {t.name!r} {found}", allowed, attempt)

    if t.dtype not in DTYPES:
        raise refuse(f"is of type {t.dtype!r}", ", ".join(DTYPES))
    if any(not isinstance(d, int) or d < 1 for d in t.shape):
        raise refuse(
            f"has the shape {t.shape}", "fixed sizes of 1 or more", "export the model with a batch of 1 and fixed sizes"
        )
    if len(t.shape) > 8 or t.bytes > LARGEST_TENSOR:
        raise refuse(f"has the shape {t.shape}", "at most 8 dimensions and 2 GB")
    if t.axis is not None and not (isinstance(t.axis, int) and 0 <= t.axis < len(t.shape)):
        raise refuse(f"has scales along axis {t.axis} of the shape {t.shape}", f"0 to {len(t.shape) - 1}")
    if t.scale is not None:
        _scale(t, refuse)
    if t.data is not None:
        _data(t, refuse, asked)
    elif t.dtype == "int4" and t.view is None:
        raise refuse("is of type int4 and no constant", "int4 weights")


def _scale(t: Tensor, refuse: Refuse) -> None:
    scale = np.asarray(t.scale)
    if scale.dtype.kind != "f" or not (np.all(np.isfinite(scale)) and np.all(scale > 0)):
        raise refuse("has a scale that is not a positive number", "finite scales above 0")
    if scale.ndim and (t.axis is None or scale.shape != (t.shape[t.axis],)):
        raise refuse(f"has {scale.size} scales for the shape {t.shape}", "one, or one per channel")
    room = t.dtype if t.dtype in ("int8", "uint8", "int16") else "int32"
    if not np.iinfo(room).min <= t.zero <= np.iinfo(room).max:
        raise refuse(f"has the zero point {t.zero}", f"what {room} holds")


def _data(t: Tensor, refuse: Refuse, asked: str) -> None:
    stored = "int8" if t.dtype == "int4" else t.dtype
    if t.view is not None:
        raise refuse("is a view and has data of its own", "one of both")
    if t.data.shape != t.shape or str(t.data.dtype) != stored:
        raise refuse(f"has data of {t.data.dtype} {t.data.shape}", f"{stored} {t.shape}")
    if t.data.dtype.kind == "f" and not np.all(np.isfinite(t.data)):
        raise NetsukeError(
            asked, f"the weights {t.name!r} hold NaN or infinity", "finite weights", "train or export the model again"
        )
    if t.dtype == "int4" and not (INT4[0] <= t.data.min() and t.data.max() <= INT4[1]):
        raise refuse(f"holds codes from {t.data.min()} to {t.data.max()}", f"{INT4[0]} to {INT4[1]} in int4")


def _view(graph: QGraph, t: Tensor, asked: str) -> None:
    """Checks that a view lies inside what it looks at, all the way down, at a multiple of its elements' size."""
    at, depth, inner = 0, 0, t
    while inner.view is not None:
        parent, offset = inner.view
        if depth == DEEPEST_VIEW:
            raise NetsukeError(
                asked, f"the tensor {t.name!r} is a view in a circle, or {DEEPEST_VIEW} views deep", "views of tensors"
            )
        if not 0 <= parent < len(graph.tensors) or offset < 0:
            raise NetsukeError(asked, f"the tensor {t.name!r} is a view of nothing", "a tensor and an offset inside it")
        outer = graph.tensors[parent]
        if offset + inner.bytes > outer.bytes:
            raise NetsukeError(
                asked, f"the tensor {inner.name!r} is a view of {inner.bytes} bytes from byte {offset} of {outer.name!r}",
                f"a part of its {outer.bytes} bytes",
            )  # fmt: skip
        at, depth, inner = at + offset, depth + 1, outer
    if at % np.dtype("int8" if t.dtype == "int4" else t.dtype).itemsize:
        raise NetsukeError(
            asked,
            f"the tensor {t.name!r} is a view of {t.dtype} from byte {at} on",
            "a multiple of its element's bytes",
        )
