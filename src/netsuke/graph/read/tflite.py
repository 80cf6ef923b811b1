"""Reads `.tflite` files (TensorFlow Lite, LiteRT, TensorFlow Lite Micro): full-integer, float32, float16 and hybrid ones.

Only the first subgraph is read, and of it only what the outputs need: the chains of SHAPE and PACK that exporters leave for
a dynamic batch vanish. Operator versions are not looked at: a newer version of a known operator reads the same. A batch of
-1 is taken as 1. uint8 activations become int8 with codes 128 lower (`meta["uint8"]` names such inputs and outputs).
What each operator becomes stands in `tflite_ops.py` and `tflite_moves.py`; the numbers of slots are those of the public
schema (version 3).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.ir import QGraph, Tensor
from netsuke.graph.read.flatbuffer import Flatbuffer, Table
from netsuke.models.files import reading

LARGEST_FILE = 256 << 20  # bytes; what is larger is no network for a microcontroller
MOST = 20_000  # tensors or operators
TYPES = {
    0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 7: "int16", 9: "int8", 10: "float64",
    12: "uint64", 15: "uint32", 16: "uint16", 17: "int4",
}  # fmt: skip
OPERATORS = {
    0: "ADD", 1: "AVERAGE_POOL_2D", 2: "CONCATENATION", 3: "CONV_2D", 4: "DEPTHWISE_CONV_2D", 6: "DEQUANTIZE",
    9: "FULLY_CONNECTED", 14: "LOGISTIC", 16: "LSTM", 17: "MAX_POOL_2D", 18: "MUL", 19: "RELU", 20: "RELU_N1_TO_1",
    21: "RELU6", 22: "RESHAPE", 23: "RESIZE_BILINEAR", 25: "SOFTMAX", 27: "SVDF", 28: "TANH", 34: "PAD",
    36: "GATHER", 37: "BATCH_TO_SPACE_ND", 38: "SPACE_TO_BATCH_ND", 39: "TRANSPOSE", 40: "MEAN", 41: "SUB", 42: "DIV",
    43: "SQUEEZE", 44: "UNIDIRECTIONAL_SEQUENCE_LSTM", 45: "STRIDED_SLICE", 47: "EXP", 49: "SPLIT", 50: "LOG_SOFTMAX",
    53: "CAST", 54: "PRELU", 55: "MAXIMUM", 56: "ARG_MAX", 57: "MINIMUM", 59: "NEG", 60: "PADV2", 65: "SLICE",
    67: "TRANSPOSE_CONV", 69: "TILE", 70: "EXPAND_DIMS", 73: "LOG", 74: "SUM", 75: "SQRT", 76: "RSQRT", 77: "SHAPE",
    82: "REDUCE_MAX", 83: "PACK", 88: "UNPACK", 92: "SQUARE", 97: "RESIZE_NEAREST_NEIGHBOR", 98: "LEAKY_RELU",
    100: "MIRROR_PAD", 101: "ABS", 102: "SPLIT_V", 111: "ELU", 114: "QUANTIZE", 117: "HARD_SWISH", 118: "IF",
    119: "WHILE", 126: "BATCH_MATMUL", 129: "CALL_ONCE", 142: "VAR_HANDLE", 143: "READ_VARIABLE",
    144: "ASSIGN_VARIABLE", 150: "GELU", 152: "RELU_0_TO_1",
}  # fmt: skip


@dataclass(frozen=True)
class FileTensor:
    """A tensor as the file has it. `data` are the bytes of a constant, `dynamic` the axes that the file leaves open."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: np.ndarray | None
    zero: int
    axis: int | None
    data: np.ndarray | None
    dynamic: tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """An operator as the file has it; `options` is its table of attributes, `custom` the bytes of a custom operator's."""

    index: int
    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Table | None
    custom: bytes

    def option(self, slot: int, form: str = "i", default: int = 0) -> int:
        return default if self.options is None else self.options.integer(slot, form, default)

    def real(self, slot: int, default: float = 0.0) -> float:
        return default if self.options is None else float(self.options.number(slot, "f", default))


@dataclass
class Import:
    """A graph in the making. `made` maps tensors of the file to those of the graph, `padded` the output of a PAD that a
    convolution takes over to (graph tensor, pads), `stored` a constant that DEQUANTIZE made float to what is in the file."""

    path: Path
    graph: QGraph
    tensors: list[FileTensor]
    outputs: tuple[int, ...]
    readers: dict[int, list[Node]] = field(default_factory=lambda: defaultdict(list))
    made: dict[int, int] = field(default_factory=dict)
    padded: dict[int, tuple[int, tuple[int, int, int, int]]] = field(default_factory=dict)
    stored: dict[int, int] = field(default_factory=dict)
    room: int = 0  # bytes of constants that may still be made: many tensors may claim the same bytes of a hostile file

    def refuse(self, node: Node, found: str, allowed: str = "", attempt: str = "") -> NetsukeError:
        out = self.tensors[node.outputs[0]].name if node.outputs else ""
        return NetsukeError(
            f"read {self.path}", f"{node.kind} (operator {node.index}, {out!r}) {found}", allowed, attempt
        )

    def index(self, node: Node, position: int) -> int:
        """The file's number of the tensor at an input's position. Raises NetsukeError where the operator has none."""
        if not self.has(node, position):
            raise self.refuse(node, f"has no input {position}", "", "export the model again")
        return node.inputs[position]

    def file(self, node: Node, position: int) -> FileTensor:
        return self.tensors[self.index(node, position)]

    def has(self, node: Node, position: int) -> bool:
        return position < len(node.inputs) and node.inputs[position] >= 0

    def array(self, index: int) -> np.ndarray:
        """The elements of a constant; int4 as int8, float16 as float32. Raises NetsukeError for one that is computed."""
        t = self.tensors[index]
        if t.data is None:
            raise NetsukeError(f"read {self.path}", f"{t.name!r} is computed while the network runs", "a constant",
                               "export the model with fixed sizes and weights")  # fmt: skip
        stored = np.dtype("u1" if t.dtype == "int4" else t.dtype).newbyteorder("<")
        size = int(np.prod(t.shape, dtype=np.float64))
        have = t.data.size * 2 if t.dtype == "int4" else t.data.size // stored.itemsize
        if have < size or t.data.size % stored.itemsize:
            raise NetsukeError(f"read {self.path}", f"{t.name!r} has {t.data.size} bytes for {t.shape} {t.dtype}",
                               "", "export the model again")  # fmt: skip
        self.room -= size * (4 if t.dtype == "float16" else stored.itemsize)
        if self.room < 0:
            raise NetsukeError(
                f"read {self.path}", "its tensors claim many times the bytes of the file", "a whole file"
            )
        if t.dtype == "int4":
            nibbles = np.stack([t.data & 15, t.data >> 4], 1).reshape(-1)[:size].astype(np.int8)
            return (nibbles - 16 * (nibbles > 7)).astype(np.int8).reshape(t.shape)
        flat = t.data.view(stored)[:size].reshape(t.shape)
        return flat.astype(np.float32) if t.dtype == "float16" else flat.astype(stored.newbyteorder("="), copy=False)

    def numbers(self, node: Node, position: int) -> list[int]:
        """A small constant of integers: axes, sizes, pads."""
        values = self.array(self.index(node, position))
        if values.dtype.kind not in "iu" or values.size > 64:
            raise self.refuse(node, f"has {values.size} numbers of type {values.dtype} at input {position}", "integers")
        return [int(v) for v in values.reshape(-1)]

    def tensor(self, index: int) -> Tensor:
        """A new graph tensor like a tensor of the file, without data."""
        t = self.tensors[index]
        if any(t.dynamic):
            raise NetsukeError(f"read {self.path}", f"the tensor {t.name!r} has no fixed size along axis {max(t.dynamic)}",
                               "a batch of 1 and fixed sizes", "export the model with a fixed input shape")  # fmt: skip
        if t.dtype == "uint8" and t.scale is not None:
            return Tensor(t.name, t.shape, "int8", t.scale, t.zero - 128, t.axis)
        return Tensor(t.name, t.shape, "float32" if t.dtype == "float16" else t.dtype, t.scale, t.zero, t.axis)

    def value(self, index: int) -> int:
        """The graph tensor of a tensor of the file; a constant is made when it is first asked for."""
        if index not in self.made:
            if self.tensors[index].data is None:
                raise NetsukeError(
                    f"read {self.path}", f"{self.tensors[index].name!r} is read before it is written",
                    "operators in running order", "export the model again",
                )  # fmt: skip
            self.made[index] = self.constant(index)
        return self.made[index]

    def constant(self, index: int) -> int:
        """A new constant of the graph with the file's elements."""
        data, t = self.array(index), self.tensor(index)
        if data.dtype == np.uint8 and t.dtype == "int8":
            data = (data ^ 0x80).view(np.int8)
        t.data = data
        return self.graph.add(t)

    def input(self, node: Node, position: int = 0) -> int:
        return self.value(self.index(node, position))

    def emit(self, kind: str, inputs: tuple[int, ...], index: int, **attrs: object) -> int:
        """Appends the operator that makes a tensor of the file."""
        self.made[index] = self.graph.append(kind, inputs, self.tensor(index), **attrs)
        return self.made[index]

    def between(self, kind: str, inputs: tuple[int, ...], like: Tensor, suffix: str, **attrs: object) -> int:
        """Appends an operator whose output the file does not have, named after `like`."""
        out = Tensor(f"{like.name}.{suffix}", like.shape, like.dtype, like.scale, like.zero)
        return self.graph.append(kind, inputs, out, **attrs)

    def reshaped(self, x: int, shape: tuple[int, ...]) -> int:
        t = self.graph.tensors[x]
        if t.shape == tuple(shape):
            return x
        return self.between("reshape", (x,), Tensor(t.name, tuple(shape), t.dtype, t.scale, t.zero), "reshaped")

    def rescaled(self, x: int, like: Tensor) -> int:
        """`x` in the codes of `like`: as it is, or through a table."""
        t = self.graph.tensors[x]
        if t.dtype != "int8" or like.dtype != "int8" or t.scale is None or like.scale is None:
            return x
        if (float(t.scale), t.zero) == (float(like.scale), like.zero):
            return x
        codes = like.codes(t.real(np.arange(-128, 128)))
        return self.between(
            "lut", (x,), Tensor(t.name, t.shape, "int8", like.scale, like.zero), "rescaled", table=codes
        )


def read_tflite(path: Path) -> QGraph:
    """The network in a `.tflite` file, checked. Raises NetsukeError as `import_tflite`."""
    return import_tflite(path).graph


def import_tflite(path: Path) -> Import:
    """As `read_tflite`, with `made`: which tensor of the file became which of the graph.

    Raises NetsukeError for a damaged file, and for what cannot run here: an unknown operator (by name, index and tensor), a
    shape that is not fixed, an activation of 16 bits, weights with a zero point, NaN.
    """
    path = Path(path)
    with reading(path):
        if path.stat().st_size > LARGEST_FILE:
            raise NetsukeError(f"read {path}", f"the file has {path.stat().st_size} bytes", f"at most {LARGEST_FILE}")
        data = path.read_bytes()
    model = Flatbuffer(data, str(path), "TFL3").root()
    subgraphs = model.tables(2)
    if not subgraphs:
        raise model.buffer.damaged("it has no subgraph")
    main = subgraphs[0]
    tensors = _tensors(main, model.tables(4))
    nodes = _nodes(main, model.tables(1), len(tensors))
    graph = QGraph(path.stem, meta={"source": path.name, "format": "tflite", "description": model.text(3)})
    ends = main.integers(1), main.integers(2)
    if any(not 0 <= i < len(tensors) for i in (*ends[0], *ends[1])) or not ends[1]:
        raise model.buffer.damaged("an input or output names a tensor that does not exist, or there is none")
    work = Import(path, graph, tensors, ends[1], room=8 * len(data) + (1 << 20))
    for i in ends[0]:
        work.made[i] = graph.add(work.tensor(i))
    graph.inputs = tuple(work.made[i] for i in ends[0])
    _convert(work, nodes)
    graph.outputs = tuple(work.value(i) for i in ends[1])
    moved = [
        tensors[i].name for i in (*ends[0], *ends[1]) if tensors[i].dtype == "uint8" and tensors[i].scale is not None
    ]
    if moved:
        graph.meta["uint8"] = moved
    graph.check()
    return work


def _convert(work: Import, nodes: list[Node]) -> None:
    from netsuke.graph.read.tflite_ops import CONVERTERS, data_inputs, unsupported

    needed, live = set(work.outputs), []
    for node in reversed(nodes):
        if needed & set(node.outputs):
            if node.kind not in CONVERTERS:
                raise unsupported(work, node)
            live.append(node)
            needed |= {node.inputs[p] for p in data_inputs(node) if work.has(node, p)}
    for node in live:
        for i in node.inputs:
            work.readers[i].append(node)
    for node in reversed(live):
        try:
            CONVERTERS[node.kind](work, node)
        except (IndexError, ValueError, OverflowError, TypeError, ZeroDivisionError) as e:
            raise work.refuse(node, f"does not fit its tensors ({str(e)[:80]})", "", "export the model again") from None


def _tensors(main: Table, buffers: list[Table]) -> list[FileTensor]:
    tables = main.tables(0)
    if len(tables) > MOST:
        raise main.buffer.damaged(f"{len(tables)} tensors")
    return [_tensor(t, buffers) for t in tables]


def _tensor(t: Table, buffers: list[Table]) -> FileTensor:
    name = t.text(3).split(";")[0][:200] or "unnamed"
    signature, shape = t.integers(7), t.integers(0)
    dynamic = tuple(k for k, d in enumerate(signature or shape) if d < 0)
    if len(shape) > 8 or (signature and len(signature) != len(shape)):
        raise t.buffer.damaged(f"the tensor {name!r} has {len(shape)} dimensions and a signature of {len(signature)}")
    if t.field(6) is not None:
        raise NetsukeError(f"read {t.buffer.name}", f"the tensor {name!r} is stored sparsely", "dense weights",
                           "convert the model without sparsity")  # fmt: skip
    shape = (1, *shape[1:]) if shape and 0 in dynamic and shape[0] < 1 else shape
    code, buffer = t.integer(1, "b"), t.integer(2, "I")
    if code not in TYPES:
        raise NetsukeError(f"read {t.buffer.name}", f"the tensor {name!r} has the type number {code}",
                           ", ".join(TYPES.values()))  # fmt: skip
    if buffer >= len(buffers):
        raise t.buffer.damaged(f"the tensor {name!r} is in buffer {buffer} of {len(buffers)}")
    data = buffers[buffer].array(0, "u1")
    if (start := buffers[buffer].integer(1, "Q")) > 1:  # models above 2 GB keep their weights behind the flatbuffer
        raise t.buffer.damaged(f"the tensor {name!r} lies outside of the flatbuffer, at byte {start}")
    return FileTensor(name, shape, TYPES[code], *_quantization(t, name), data if data.size else None, dynamic)


def _quantization(t: Table, name: str) -> tuple[np.ndarray | None, int, int | None]:
    """(scale, zero point, axis)."""
    q = t.table(4)
    scale, zeros = (q.array(2, "f4"), q.array(3, "i8")) if q else (np.zeros(0), np.zeros(0))
    if not q or scale.size == 0:
        return None, 0, None
    if zeros.size not in (0, scale.size) or (zeros.size and np.any(zeros != zeros[0])):
        raise NetsukeError(f"read {t.buffer.name}", f"the tensor {name!r} has {zeros.size} different zero points for "
                           f"{scale.size} scales", "one zero point", "convert the model with symmetric weights")  # fmt: skip
    zero = int(zeros[0]) if zeros.size else 0
    if scale.size == 1:
        return np.float64(scale[0]), zero, None
    axis, shape = q.integer(6), t.integers(0)
    if not 0 <= axis < len(shape) or shape[axis] != scale.size:
        raise t.buffer.damaged(f"the tensor {name!r} has {scale.size} scales along axis {axis} of {shape}")
    with np.errstate(invalid="ignore"):  # a signalling NaN; the graph's check refuses it
        return scale.astype(np.float64), zero, axis


def _nodes(main: Table, codes: list[Table], tensors: int) -> list[Node]:
    kinds = []
    for c in codes:
        # Newer files keep the number in slot 3; slot 0 held it while there were fewer than 128 operators
        number = max(c.integer(0, "b"), c.integer(3))
        kinds.append(f"custom {c.text(1)[:80]}" if number == 32 else OPERATORS.get(number, f"operator number {number}"))
    tables = main.tables(3)
    if len(tables) > MOST:
        raise main.buffer.damaged(f"{len(tables)} operators")
    nodes = []
    for k, t in enumerate(tables):
        code, inputs, outputs = t.integer(0, "I"), t.integers(1), t.integers(2)
        if code >= len(kinds):
            raise main.buffer.damaged(f"operator {k} has the code {code} of {len(kinds)}")
        if any(not -1 <= i < tensors for i in inputs) or any(not 0 <= i < tensors for i in outputs):
            raise main.buffer.damaged(f"operator {k} ({kinds[code]}) names a tensor that does not exist")
        if not outputs or len(inputs) > 1024:
            raise main.buffer.damaged(
                f"operator {k} ({kinds[code]}) has {len(inputs)} inputs and {len(outputs)} outputs"
            )
        nodes.append(Node(k, kinds[code], inputs, outputs, t.table(4), t.array(5, "u1").tobytes()))
    return nodes
