"""Writes small `.tflite` files for tests: tables as {slot: (kind, value)}, written front to back."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TYPE = {"float32": 0, "float16": 1, "int32": 2, "uint8": 3, "int64": 4, "int16": 7, "int8": 9, "int4": 17}
# operator: (number, number of its table of options in the schema's union)
CODES = {
    "ADD": (0, 11), "AVERAGE_POOL_2D": (1, 5), "CONCATENATION": (2, 10), "CONV_2D": (3, 1), "DEPTHWISE_CONV_2D": (4, 2),
    "DEQUANTIZE": (6, 38), "FULLY_CONNECTED": (9, 8), "LOGISTIC": (14, 0), "MAX_POOL_2D": (17, 5), "MUL": (18, 21),
    "RELU": (19, 0), "RELU6": (21, 0), "RESHAPE": (22, 17), "RESIZE_BILINEAR": (23, 15), "SOFTMAX": (25, 9),
    "TANH": (28, 0), "PAD": (34, 22), "TRANSPOSE": (39, 26), "MEAN": (40, 27), "SUB": (41, 28), "DIV": (42, 29),
    "SQUEEZE": (43, 30), "STRIDED_SLICE": (45, 32), "SPLIT": (49, 35), "PRELU": (54, 0), "MAXIMUM": (55, 39),
    "MINIMUM": (57, 39), "PADV2": (60, 43), "SLICE": (65, 48), "SHAPE": (77, 55), "REDUCE_MAX": (82, 27),
    "PACK": (83, 59), "UNPACK": (88, 64), "LEAKY_RELU": (98, 75), "ABS": (101, 78), "QUANTIZE": (114, 89),
    "HARD_SWISH": (117, 91), "GELU": (150, 116), "NEG": (59, 42), "EXPAND_DIMS": (70, 52), "WHILE": (119, 93),
}  # fmt: skip


@dataclass
class T:
    """A tensor of a file; `data` makes it a constant."""

    shape: tuple[int, ...]
    dtype: str = "int8"
    scale: Any = None
    zero: int = 0
    data: np.ndarray | None = None
    axis: int = 0
    signature: tuple[int, ...] | None = None
    name: str = ""


@dataclass
class Step:
    """An operator of a file; options {slot: (struct letter, value)}."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict[int, tuple[str, Any]] = field(default_factory=dict)


class _Writer:
    def __init__(self) -> None:
        self.out = bytearray(b"\0\0\0\0TFL3")

    def align(self, to: int, extra: int = 0) -> None:
        self.out += bytes(-(len(self.out) + extra) % to)

    def table(self, fields: dict[int, tuple[str, Any]]) -> int:
        """Kinds: a struct letter, "table", "tables", "text", or "v" + dtype for a vector of numbers."""
        inline, places = bytearray(4), {}
        for slot, (kind, value) in sorted(fields.items()):
            letter = kind if len(kind) == 1 else "I"
            inline += bytes(-len(inline) % struct.calcsize(letter))
            places[slot] = len(inline)
            inline += struct.pack("<" + letter, value if len(kind) == 1 else 0)
        slots = max(fields, default=-1) + 1
        self.align(8, 4 + 2 * slots)
        vtable = len(self.out)
        self.out += struct.pack("<HH", 4 + 2 * slots, len(inline))
        self.out += struct.pack(f"<{slots}H", *(places.get(k, 0) for k in range(slots)))
        at = len(self.out)
        self.out += inline
        struct.pack_into("<i", self.out, at, at - vtable)
        for slot, (kind, value) in sorted(fields.items()):
            if len(kind) > 1:
                place = at + places[slot]
                struct.pack_into("<I", self.out, place, self.child(kind, value) - place)
        return at

    def child(self, kind: str, value: Any) -> int:
        if kind == "table":
            return self.table(value)
        if kind == "tables":
            self.align(4)
            at = len(self.out)
            self.out += struct.pack("<I", len(value)) + bytes(4 * len(value))
            for k, fields in enumerate(value):
                place = at + 4 + 4 * k
                struct.pack_into("<I", self.out, place, self.table(fields) - place)
            return at
        data = value.encode() if kind == "text" else np.asarray(value, kind[1:]).tobytes()
        count = len(data) if kind == "text" else np.asarray(value).size
        self.align(16, 4)  # what vectors of weights ask for
        at = len(self.out)
        self.out += struct.pack("<I", count) + data + b"\0"
        return at


def write(
    tensors: list[T], ops: list[Step], inputs: tuple[int, ...], outputs: tuple[int, ...], old_codes: bool = True
) -> bytes:
    """A model file. `old_codes` puts operator numbers below 128 into the byte that old files use, too."""
    kinds = sorted({o.kind for o in ops})
    rows, buffers = [], [{}]
    for k, t in enumerate(tensors):
        row = {0: ("vi4", t.shape), 1: ("b", TYPE[t.dtype]), 2: ("I", 0), 3: ("text", t.name or f"t{k}")}
        if t.data is not None:
            row[2] = ("I", len(buffers))
            buffers.append({0: ("vu1", np.frombuffer(np.ascontiguousarray(t.data).tobytes(), np.uint8))})
        if t.scale is not None:
            scales = np.atleast_1d(np.asarray(t.scale, np.float32))
            row[4] = ("table", {2: ("vf4", scales), 3: ("vi8", np.full(scales.size, t.zero)), 6: ("i", t.axis)})
        if t.signature is not None:
            row[7] = ("vi4", t.signature)
        rows.append(row)
    nodes = []
    for o in ops:
        node = {0: ("I", kinds.index(o.kind)), 1: ("vi4", o.inputs), 2: ("vi4", o.outputs)}
        if not o.kind.startswith("custom ") and CODES[o.kind][1]:
            node |= {3: ("B", CODES[o.kind][1]), 4: ("table", o.options)}
        nodes.append(node)
    codes = []
    for kind in kinds:
        number = 32 if kind.startswith("custom ") else CODES[kind][0]
        row = {0: ("b", min(number, 127) if old_codes else 0), 2: ("i", 1), 3: ("i", number)}
        codes.append(row | ({1: ("text", kind[7:])} if number == 32 else {}))
    graph = {0: ("tables", rows), 1: ("vi4", inputs), 2: ("vi4", outputs), 3: ("tables", nodes)}
    w = _Writer()
    model = {0: ("I", 3), 1: ("tables", codes), 2: ("tables", [graph]), 3: ("text", "test"), 4: ("tables", buffers)}
    struct.pack_into("<I", w.out, 0, w.table(model))
    return bytes(w.out)


def small(seed: int = 0) -> tuple[list[T], list[Step]]:
    """A convolution 3 x 3 of (1, 6, 6, 2) to 4 channels with RELU, a mean and a dense layer, int8; input 0, output 6."""
    rng = np.random.default_rng(seed)
    w, d = rng.integers(-127, 128, (4, 3, 3, 2), np.int8), rng.integers(-127, 128, (3, 4), np.int8)
    b, c = rng.integers(-500, 500, 4, np.int32), rng.integers(-500, 500, 3, np.int32)
    tensors = [
        T((1, 6, 6, 2), "int8", 0.05, 3, name="image", signature=(-1, 6, 6, 2)),
        T((4, 3, 3, 2), "int8", [0.01, 0.02, 0.015, 0.005], 0, w, name="conv.weight"),
        T((4,), "int32", [0.0005, 0.001, 0.00075, 0.00025], 0, b, name="conv.bias"),
        T((1, 6, 6, 4), "int8", 0.2, -128, name="conv"),
        T((3, 4), "int8", 0.02, 0, d, name="dense.weight"),
        T((3,), "int32", 0.004, 0, c, name="dense.bias"),
        T((1, 3), "int8", 0.1, 5, name="scores"),
        T((1, 4), "int8", 0.2, -128, name="mean"),
        T((2,), "int32", data=np.array([1, 2], np.int32), name="axes"),
    ]
    ops = [
        Step("CONV_2D", (0, 1, 2), (3,), {0: ("b", 0), 1: ("i", 1), 2: ("i", 1), 3: ("b", 1)}),
        Step("MEAN", (3, 8), (7,), {0: ("b", 0)}),
        Step("FULLY_CONNECTED", (7, 4, 5), (6,)),
    ]
    return tensors, ops
