"""What the operators of a `.tflite` file become that only move elements: shapes, pads, slices, concatenations.

A PAD that only convolutions read, with zeros around the image and less than a window, becomes their padding: the convolution
reads nothing there, and the larger image is never stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netsuke.graph.ir import Tensor
from netsuke.graph.ops.base import axis_of

if TYPE_CHECKING:
    from netsuke.graph.read.tflite import Import, Node

CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D")


def move(m: Import, node: Node, kind: str, **attrs: object) -> None:
    """An operator of one input whose output has the same codes."""
    m.emit(kind, (m.rescaled(m.input(node), m.tensor(node.outputs[0])),), node.outputs[0], **attrs)


def reshape(m: Import, node: Node) -> None:
    move(m, node, "reshape")


def transpose(m: Import, node: Node) -> None:
    perm = tuple(m.numbers(node, 1))
    move(m, node, "transpose", perm=tuple(p + len(perm) if p < 0 else p for p in perm))


def pad(m: Import, node: Node) -> None:
    flat, x, y = m.numbers(node, 1), m.file(node, 0), m.tensor(node.outputs[0])
    pads = tuple(zip(flat[::2], flat[1::2]))
    value = 0.0
    if node.kind == "PADV2":
        fill = m.index(node, 2)
        value = float(m.tensor(fill).real(m.array(fill)).reshape(-1)[0])
        if y.dtype == "int8" and value != 0.0:
            raise m.refuse(node, f"pads with {value}", "0 in int8 networks", "pad with zeros")
    if value == 0.0 and foldable(m, node, pads):
        m.padded[node.outputs[0]] = (m.input(node), (*pads[1], *pads[2]))
        return
    attrs = {"value": value} if y.dtype == "float32" and value else {}
    if len(pads) != len(x.shape):
        raise m.refuse(node, f"has {len(pads)} pairs of pads for {x.shape}", "one pair per axis")
    move(m, node, "pad", pads=pads, **attrs)


def foldable(m: Import, node: Node, pads: tuple[tuple[int, int], ...]) -> bool:
    """Whether all readers are convolutions whose windows are larger than the pads."""
    out = node.outputs[0]
    if len(pads) != 4 or any(pads[0]) or any(pads[3]) or out in m.outputs or min(map(min, pads)) < 0:
        return False
    x, y = m.graph.tensors[m.input(node)], m.tensor(out)
    if x.dtype == "int8" and (
        x.scale is None or y.scale is None or (float(x.scale), x.zero) != (float(y.scale), y.zero)
    ):
        return False
    for reader in m.readers[out]:
        if reader.kind not in CONVOLUTIONS or reader.inputs.count(out) > 1 or reader.inputs[0] != out:
            return False
        slot = 4 if reader.kind == "CONV_2D" else 5
        shape = m.file(reader, 1).shape
        reach = [reader.option(slot + 1 - k, default=1) * (n - 1) for k, n in enumerate(shape[1:3])]
        if len(shape) != 4 or reader.option(0, "b") == 0 or max(pads[1]) > reach[0] or max(pads[2]) > reach[1]:
            return False
    return True


def strided_slice(m: Import, node: Node) -> None:
    """Masks by bits: 1 and 2 (begin, end: from the edge), 4 (shrink: one element, the axis vanishes)."""
    if node.option(2) or node.option(3):
        raise m.refuse(node, "adds axes or has an ellipsis", "plain ranges", "slice every axis by begin and end")
    shape = m.graph.tensors[m.input(node)].shape
    begin, end, step = (m.numbers(node, p) for p in (1, 2, 3))
    first, last, single = node.option(0), node.option(1), node.option(4)
    cuts, sizes = [], []
    for k, n in enumerate(shape):
        if k >= len(begin):
            cuts.append((0, 1))
            sizes.append(n)
            continue
        if step[k] < 1:
            raise m.refuse(node, f"steps by {step[k]}", "steps of 1 or more", "reverse outside of the network")
        if single >> k & 1:
            at = begin[k] + n if begin[k] < 0 else begin[k]
            start, stop = at, at + 1
        else:
            start = 0 if first >> k & 1 else slice(begin[k], None).indices(n)[0]
            stop = n if last >> k & 1 else slice(0, end[k]).indices(n)[1]
        cuts.append((start, step[k]))
        sizes.append(max(0, -(-(stop - start) // step[k])))
    cut(m, node, 0, node.outputs[0], [c[0] for c in cuts], tuple(sizes), [c[1] for c in cuts])


def cut(
    m: Import,
    node: Node,
    position: int,
    out: int,
    begin: list[int],
    sizes: tuple[int, ...],
    steps: list[int] | None = None,
) -> None:
    """A slice of an input, then a reshape where axes vanish."""
    y = m.tensor(out)
    x = m.rescaled(m.input(node, position), y)
    if len(begin) != len(m.graph.tensors[x].shape):
        raise m.refuse(node, f"has {len(begin)} starts for {m.graph.tensors[x].shape}", "one start per axis")
    attrs = {"begin": tuple(begin), "stride": tuple(steps or [1] * len(begin))}
    if sizes == y.shape:
        m.emit("slice", (x,), out, **attrs)
        return
    part = m.between("slice", (x,), Tensor(y.name, tuple(sizes), y.dtype, y.scale, y.zero), "slice", **attrs)
    m.emit("reshape", (part,), out)


def slice_op(m: Import, node: Node) -> None:
    begin, size = m.numbers(node, 1), m.numbers(node, 2)
    shape = m.graph.tensors[m.input(node)].shape
    cut(m, node, 0, node.outputs[0], begin, tuple(n - b if s < 0 else s for n, b, s in zip(shape, begin, size)))


def split(m: Import, node: Node) -> None:
    """SPLIT has inputs axis, x; SPLIT_V has x, sizes, axis; the sizes are those of the outputs."""
    position, axis = (1, m.numbers(node, 0)[0]) if node.kind == "SPLIT" else (0, m.numbers(node, 2)[0])
    rank = len(m.graph.tensors[m.input(node, position)].shape)
    axis, at = axis_of(axis, rank), 0
    for i in node.outputs:
        shape = m.tensor(i).shape
        cut(m, node, position, i, [at if k == axis else 0 for k in range(rank)], shape)
        at += shape[axis]


def unpack(m: Import, node: Node) -> None:
    shape = m.graph.tensors[m.input(node)].shape
    axis = axis_of(node.option(1), len(shape))
    for at, i in enumerate(node.outputs):
        cut(m, node, 0, i, [at if k == axis else 0 for k in range(len(shape))], (*shape[:axis], 1, *shape[axis + 1 :]))


def concat(m: Import, node: Node) -> None:
    """CONCATENATION and PACK; inputs with other scales come through a table first."""
    y = m.tensor(node.outputs[0])
    parts = [m.rescaled(m.input(node, p), y) for p in range(len(node.inputs))]
    if node.kind == "CONCATENATION" and node.option(1, "b"):
        raise m.refuse(node, "has a fused activation", "none", "put the activation behind it")
    axis = axis_of(node.option(0 if node.kind == "CONCATENATION" else 1), len(y.shape))
    if node.kind == "PACK":
        parts = [m.reshaped(p, (*y.shape[:axis], 1, *y.shape[axis + 1 :])) for p in parts]
    m.emit("concat", tuple(parts), node.outputs[0], axis=axis)


MOVES = {
    **dict.fromkeys(("RESHAPE", "SQUEEZE", "EXPAND_DIMS"), reshape),
    **dict.fromkeys(("PAD", "PADV2"), pad),
    **dict.fromkeys(("SPLIT", "SPLIT_V"), split),
    **dict.fromkeys(("CONCATENATION", "PACK"), concat),
    "TRANSPOSE": transpose,
    "STRIDED_SLICE": strided_slice,
    "SLICE": slice_op,
    "UNPACK": unpack,
}
