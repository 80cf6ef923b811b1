"""Flatbuffers and flexbuffers without a schema compiler: tables read slot by slot, every offset checked against the file.

A flatbuffer is little-endian. Byte 0: offset of the root table; bytes 4…7: the format's four letters. A table begins with
a signed offset back to its vtable, which gives the place of each field (slot) or 0 for a field that keeps its default.
Vectors begin with their length. A flexbuffer (options of custom operators) is read from its end: only flat maps of numbers.
Nothing is allocated by a length that the file states: arrays are views of the file's bytes, and a vector of what becomes
objects is measured first.
"""

from __future__ import annotations

import struct

import numpy as np

from netsuke.errors import NetsukeError

REMEDY = "export the model again, or copy the file again and compare its checksum"
MOST_ENTRIES = 1 << 16  # tables or integers of one vector: tensors, operators, axes; more would be objects without end
LONGEST_TEXT = 1 << 16  # bytes of a name; fused tensors carry the names of all their parts
LARGEST_MAP = 256  # entries of an operator's options; the longest in use has 9


class Flatbuffer:
    """The bytes of a file and the name that its errors carry."""

    def __init__(self, data: bytes, name: str, identifier: str):
        """Raises NetsukeError when `data` is too short or does not carry `identifier` (four letters)."""
        self.data, self.name = data, name
        if len(data) < 8 or data[4:8] != identifier.encode():
            raise NetsukeError(
                f"read {name}",
                f"it does not carry the letters {identifier} of its format",
                f"a {identifier} flatbuffer",
            )

    def damaged(self, what: str) -> NetsukeError:
        return NetsukeError(f"read {self.name}", f"the file is damaged: {what}", "a whole file", REMEDY)

    def unpack(self, form: str, at: int) -> int | float:
        """One number of the struct letter `form` at byte `at`."""
        if not 0 <= at <= len(self.data) - struct.calcsize(form):
            raise self.damaged(f"an offset points to byte {at} of {len(self.data)}")
        return struct.unpack_from("<" + form, self.data, at)[0]

    def root(self) -> Table:
        return Table(self, int(self.unpack("I", 0)))


class Table:
    """A table at a byte offset. Slots are numbered from 0 in the order of the schema."""

    def __init__(self, buffer: Flatbuffer, at: int):
        self.buffer, self.at = buffer, at
        self.vtable = at - int(buffer.unpack("i", at))
        self.slots = (int(buffer.unpack("H", self.vtable)) - 4) // 2

    def field(self, slot: int) -> int | None:
        """Where a field's bytes are, None when it is absent."""
        if slot >= self.slots:
            return None
        offset = int(self.buffer.unpack("H", self.vtable + 4 + 2 * slot))
        return self.at + offset if offset else None

    def number(self, slot: int, form: str = "i", default: int | float = 0) -> int | float:
        """A scalar; `form` is a struct letter: b B h H i I q Q f."""
        at = self.field(slot)
        return default if at is None else self.buffer.unpack(form, at)

    def integer(self, slot: int, form: str = "i", default: int = 0) -> int:
        return int(self.number(slot, form, default))

    def table(self, slot: int) -> Table | None:
        at = self.field(slot)
        return None if at is None else Table(self.buffer, at + int(self.buffer.unpack("I", at)))

    def _vector(self, slot: int, width: int, most: int | None = None) -> tuple[int, int]:
        """(first byte, length) of a vector of elements of `width` bytes; length 0 when it is absent. Lengths above `most`
        are refused."""
        at = self.field(slot)
        if at is None:
            return 0, 0
        at += int(self.buffer.unpack("I", at))
        n = int(self.buffer.unpack("I", at))
        if n * width > len(self.buffer.data) - at - 4:
            raise self.buffer.damaged(f"a vector of {n} elements is longer than the file")
        if most is not None and n > most:
            raise self.buffer.damaged(f"a vector of {n} elements stands where at most {most} are read")
        return at + 4, n

    def array(self, slot: int, dtype: str, most: int | None = None) -> np.ndarray:
        """A vector of numbers as a read-only view of the file; empty when it is absent."""
        kind = np.dtype(dtype).newbyteorder("<")
        at, n = self._vector(slot, kind.itemsize, most)
        return np.frombuffer(self.buffer.data, kind, n, at) if n else np.zeros(0, kind)

    def integers(self, slot: int) -> tuple[int, ...]:
        """A vector of int32."""
        return tuple(int(v) for v in self.array(slot, "i4", MOST_ENTRIES))

    def tables(self, slot: int) -> list[Table]:
        at, n = self._vector(slot, 4, MOST_ENTRIES)
        return [Table(self.buffer, p + int(self.buffer.unpack("I", p))) for p in range(at, at + 4 * n, 4)]

    def text(self, slot: int) -> str:
        return self.array(slot, "u1", LONGEST_TEXT).tobytes().decode("utf-8", "replace")


_FORMS = {1: "bhiq", 2: "BHIQ", 3: "  fd", 26: "BHIQ"}  # inline int, uint, float, bool by the logarithm of their width


def flexbuffer_map(data: bytes, name: str) -> dict[str, int | float]:
    """The flat map of numbers in a flexbuffer. Raises NetsukeError for anything else or a damaged one."""
    flat = Flatbuffer.__new__(Flatbuffer)
    flat.data, flat.name = data, name
    if len(data) < 3 or data[-2] >> 2 != 9:
        raise flat.damaged("the options are no map")

    def unsigned(at: int, log: int) -> int:
        return int(flat.unpack("BHIQ"[log], at))

    root = len(data) - 2 - data[-1]
    log = data[-2] & 3
    start = root - unsigned(root, data[-1].bit_length() - 1 & 3)
    n = unsigned(start - (1 << log), log)
    place = start - 3 * (1 << log)
    keys, key_log = place - unsigned(place, log), unsigned(start - 2 * (1 << log), log).bit_length() - 1
    if n > LARGEST_MAP or not 0 <= key_log <= 3:
        raise flat.damaged(f"the options claim {n} entries")
    out: dict[str, int | float] = {}
    for i in range(n):
        at = keys + (i << key_log)
        at -= unsigned(at, key_log)
        end = data.find(b"\0", max(at, 0))
        kind = int(flat.unpack("B", start + (n << log) + i)) >> 2
        form = _FORMS.get(kind, "    ")[log]
        if at < 0 or end < 0 or form == " ":
            raise flat.damaged("the options hold more than names and numbers")
        out[data[at:end].decode("utf-8", "replace")] = flat.unpack(form, start + (i << log))
    return out
