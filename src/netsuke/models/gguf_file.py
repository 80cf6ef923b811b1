"""The GGUF container: metadata and tensors in one file, read strictly and written with the same bytes for the same content.

Layout (GGUF specification, versions 2 and 3, little-endian): "GGUF", version u32, tensor count u64, key count u64; each key
as text, type u32 and value; each tensor as name, dimension count u32, dimensions u64 (the row length first), type u32 and
offset u64; then, aligned, the data. A text is its length u64 and UTF-8 bytes.

Files are hostile until checked: every count is held against the bytes that are left before anything is allocated, and
every span against the file before a byte of data is touched. Block types hold 32 weights of a row:

    Q8_0  34 bytes: float16 scale d, 32 int8 q                              W = d · q
    Q4_0  18 bytes: float16 scale d, 16 bytes; low nibbles are weights      W = d · (q − 8)
          0 … 15 of the block, high nibbles 16 … 31
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from netsuke.errors import NetsukeError
from netsuke.models.files import reading, write_atomically
from netsuke.models.weights import read_bytes

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
LARGEST_HEADER = 300_000_000  # bytes; a vocabulary of 256 thousand tokens with its merges takes about 10 million
LONGEST_NAME, LONGEST_KEY = 63, 65535  # bytes; GGML's own limits
MOST_TENSORS, MOST_KEYS, MOST_TEXTS = 1 << 16, 1 << 14, 1 << 23
BLOCK = 32


class StoredType(NamedTuple):
    name: str
    block: int  # weights per block
    size: int  # bytes per block


TYPES = {
    0: StoredType("F32", 1, 4), 1: StoredType("F16", 1, 2), 2: StoredType("Q4_0", BLOCK, 18),
    8: StoredType("Q8_0", BLOCK, 34), 30: StoredType("BF16", 1, 2),
}  # fmt: skip
IDS = {kind.name: number for number, kind in TYPES.items()}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Named in refusals only.
OTHERS = {
    3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
SUPPORTED = ", ".join(kind.name for kind in TYPES.values())
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
TEXT, ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its type, its shape with the row length last, and where its bytes are in the file."""

    kind: StoredType
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class GGUFHeader:
    """All that stands before the data. Arrays of numbers are NumPy arrays, arrays of texts are lists."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def raw(self, name: str) -> Tensor:
        """The bytes of one tensor, uint8."""
        info = self.tensors[name]
        with reading(self.path), self.path.open("rb") as f:
            return read_bytes(f, info.start, info.end - info.start, self.path)

    def floats(self, name: str) -> Tensor:
        """A float tensor in its stored dtype. Raises NetsukeError when it is stored in blocks."""
        info = self.tensors[name]
        if info.kind.name not in FLOATS:
            raise NetsukeError(f"load {self.path}", f"tensor {name!r} is stored as {info.kind.name}", ", ".join(FLOATS))
        return self.raw(name).view(FLOATS[info.kind.name]).reshape(info.shape)


class _Cursor:
    """Reads a header from its start; every refusal names the file and what was being read."""

    def __init__(self, f: BinaryIO, size: int, path: Path):
        self.f, self.size, self.path, self.at = f, size, path, 0

    def refuse(self, found: str, allowed: str = "") -> NetsukeError:
        return NetsukeError(f"load {self.path}", found, allowed or "an intact GGUF file")

    def take(self, count: int, what: str) -> bytes:
        if count > min(self.size, LARGEST_HEADER) - self.at:
            where = "the file is truncated" if count > self.size - self.at else "the header is too long"
            raise self.refuse(f"{where}: {what} needs {count} bytes at byte {self.at} of {self.size}")
        data = self.f.read(count)
        if len(data) != count:
            raise self.refuse(f"the file is truncated at byte {self.at + len(data)}")
        self.at += count
        return data

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def text(self, what: str, longest: int) -> str:
        length = self.number("<Q", what)
        if length > longest:
            raise self.refuse(f"{what} claims {length} bytes", f"at most {longest}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise self.refuse(f"{what} is no UTF-8 text") from None

    def value(self, key: str) -> Any:
        kind, what = self.number("<I", f"the type of {key!r}"), f"the value of {key!r}"
        if kind == TEXT:
            return self.text(what, LARGEST_HEADER)
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind != ARRAY:
            raise self.refuse(f"{what} has the unknown type {kind}", "types 0 to 12")
        kind, count = self.number("<I", what), self.number("<Q", what)
        if kind == TEXT:
            if count > min(MOST_TEXTS, (self.size - self.at) // 8):
                raise self.refuse(f"{what} claims {count} texts in a file of {self.size} bytes", f"{MOST_TEXTS}")
            return [self.text(what, LARGEST_HEADER) for _ in range(count)]
        if kind not in SCALARS:
            raise self.refuse(f"{what} is an array of type {kind}", "arrays of numbers or of texts")
        dtype = np.dtype("?" if kind == 7 else SCALARS[kind])
        raw = np.frombuffer(self.take(count * dtype.itemsize, what), np.uint8)
        return raw != 0 if kind == 7 else raw.view(dtype)


def is_gguf(path: Path) -> bool:
    """Whether the file begins as a GGUF file."""
    with reading(path), path.open("rb") as f:
        return f.read(4) == MAGIC


def read_gguf(path: Path) -> GGUFHeader:
    """The checked header of a GGUF file; no tensor data are read.

    Raises NetsukeError for another version or byte order, counts and texts that the file has no room for, a key or tensor
    that stands twice, a type that is not supported (by name), rows that are no whole blocks, and data that overlap, leave
    a hole or do not fill the file.
    """
    path = Path(path)
    with reading(path), path.open("rb") as f:
        c = _Cursor(f, os.fstat(f.fileno()).st_size, path)
        if c.take(4, "the magic") != MAGIC:
            raise c.refuse("the file does not begin with GGUF")
        version = c.number("<I", "the version")
        if version not in VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            found = "a big-endian GGUF file" if big else f"GGUF version {version}"
            raise c.refuse(found, "little-endian version 2 or 3")
        n_tensors, n_keys = c.number("<Q", "the tensor count"), c.number("<Q", "the key count")
        if n_tensors > MOST_TENSORS or n_keys > MOST_KEYS:
            raise c.refuse(f"the header claims {n_tensors} tensors and {n_keys} keys", f"{MOST_TENSORS}, {MOST_KEYS}")
        metadata: dict[str, Any] = {}
        for i in range(n_keys):
            key = c.text(f"the name of key {i}", LONGEST_KEY)
            if key in metadata:
                raise c.refuse(f"the key {key[:80]!r} stands twice", "each key once")
            metadata[key] = c.value(key[:80])
        align = metadata.get("general.alignment", ALIGNMENT)
        if type(align) is not int or not 8 <= align <= 1 << 16 or align & (align - 1):
            raise c.refuse(f"general.alignment is {str(align)[:40]}", "a power of two from 8 to 65536")
        rows: dict[str, tuple[StoredType, tuple[int, ...], int]] = {}
        for i in range(n_tensors):
            name = c.text(f"the name of tensor {i}", LONGEST_NAME)
            if name in rows:
                raise c.refuse(f"the tensor {name!r} stands twice", "each tensor once")
            rows[name] = _tensor(c, name)
        return GGUFHeader(path, metadata, _placed(c, rows, align))


def _tensor(c: _Cursor, name: str) -> tuple[StoredType, tuple[int, ...], int]:
    what = f"tensor {name!r}"
    dims = c.number("<I", what)
    if not 1 <= dims <= 4:
        raise c.refuse(f"{what} has {dims} dimensions", "1 to 4")
    shape = struct.unpack(f"<{dims}Q", c.take(8 * dims, what))[::-1]
    kind, offset = c.number("<I", what), c.number("<Q", what)
    if kind not in TYPES:
        raise c.refuse(f"{what} is stored as {OTHERS.get(kind, f'the unknown type {kind}')}", SUPPORTED)
    if min(shape) < 1:
        raise c.refuse(f"{what} has shape {list(shape)}", "no dimension of 0")
    if shape[-1] % TYPES[kind].block:
        raise c.refuse(f"{what} has rows of {shape[-1]} weights", f"{TYPES[kind].name} needs multiples of {BLOCK}")
    return TYPES[kind], shape, offset


def _placed(
    c: _Cursor, rows: Mapping[str, tuple[StoredType, tuple[int, ...], int]], align: int
) -> dict[str, StoredTensor]:
    """Spans in the file: the data follow each other, each aligned, up to the end."""
    data = c.at + -c.at % align
    tensors, end, before = {}, data, "the header"
    for name, (kind, shape, offset) in sorted(rows.items(), key=lambda item: item[1][2]):
        start = data + offset
        stop = start + math.prod(shape) // kind.block * kind.size
        if offset % align:
            raise c.refuse(f"tensor {name!r} begins at byte {offset} of the data", f"multiples of {align}")
        if start != end + -end % align:
            what = "overlaps" if start < end else "leaves a gap after"
            raise c.refuse(f"tensor {name!r} {what} {before}", "tensors one after the other")
        if stop > c.size:
            raise c.refuse(f"tensor {name!r} ends at byte {stop} of {c.size}: the file is truncated")
        tensors[name], end, before = StoredTensor(kind, shape, start, stop), stop, repr(name)
    if rows and c.size - end >= align:
        raise c.refuse(f"{c.size - end} bytes at the end belong to no tensor", "no spare bytes")
    return tensors


def unpack_blocks(raw: Tensor, kind: StoredType, rows: int) -> tuple[Tensor, Tensor]:
    """Bytes of Q4_0 or Q8_0 -> codes (O, I) uint8, where W = d · (code − 8 or 128), and scales d (O, I/32) float16."""
    blocks = raw.view(-1, kind.size)
    scales = blocks[:, :2].contiguous().view(torch.float16).view(rows, -1)
    body = blocks[:, 2:]
    codes = body ^ 0x80 if kind.name == "Q8_0" else torch.cat((body & 15, body >> 4), dim=1)  # two's complement + 128
    return codes.reshape(rows, -1), scales


def pack_blocks(codes: Tensor, scales: Tensor, name: str) -> Tensor:
    """The inverse of `unpack_blocks`: (O, I) and (O, I/32) -> bytes (O, I/32 · block size), uint8."""
    blocks = codes.view(-1, BLOCK)
    half = BLOCK // 2
    body = blocks ^ 0x80 if name == "Q8_0" else blocks[:, :half] | (blocks[:, half:] << 4)
    heads = scales.contiguous().view(torch.uint8).view(-1, 2)
    return torch.cat((heads, body), dim=1).view(codes.shape[0], -1)


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> tuple[int, bytes]:
    """Type number and bytes of a metadata value: whole numbers are u32 (arrays of them i32), fractions f32."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return TEXT, _text(value)
    head = struct.Struct("<IQ")
    if value and isinstance(value[0], str):
        return ARRAY, head.pack(TEXT, len(value)) + b"".join(map(_text, value))
    kind, form = (6, "f") if value and isinstance(value[0], float) else (5, "i")
    return ARRAY, head.pack(kind, len(value)) + struct.pack(f"<{len(value)}{form}", *value)


class Pending(NamedTuple):
    """A tensor to write: its bytes are made when their turn comes, so that only one is held at a time."""

    name: str
    kind: StoredType
    shape: tuple[int, ...]
    data: Callable[[], Tensor]


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Iterable[Pending]) -> None:
    """Writes a GGUF file, version 3, atomically. Raises NetsukeError when the disk refuses."""
    todo = list(tensors)
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(todo), len(metadata)))
    for key, value in metadata.items():
        kind, raw = _typed(value)
        head += _text(key) + struct.pack("<I", kind) + raw
    end = 0
    for t in todo:
        head += _text(t.name) + struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *t.shape[::-1])
        head += struct.pack("<IQ", IDS[t.kind.name], end)
        end += math.prod(t.shape) // t.kind.block * t.kind.size
        end += -end % ALIGNMENT

    def fill(f: BinaryIO) -> None:
        f.write(head + bytes(-len(head) % ALIGNMENT))
        for t in todo:
            raw = t.data().contiguous().view(torch.uint8).numpy()
            f.write(memoryview(raw))
            f.write(bytes(-raw.nbytes % ALIGNMENT))

    write_atomically(path, fill)
