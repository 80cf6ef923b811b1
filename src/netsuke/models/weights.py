"""Weights on disk: safetensors read one tensor at a time and written with the same bytes for the same tensors.

Files are hostile until checked: the header is read by our own code, its length and every span are held against the file
before a byte of data is touched, and pickles are refused, never opened. Tensors are read into fresh memory (no mapping
of the file), so the peak memory of loading is what is kept plus one tensor.

Format: 8 bytes little-endian header length, the header as JSON {name: {dtype, shape, data_offsets}}, then the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from netsuke.errors import NetsukeError
from netsuke.models.files import parse_json, plain_name, read_json, reading, refuse_pickle, write_atomically

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
CHUNK = 1 << 16  # numbers checked at a time: small temporaries leave no holes in the heap for weights to settle in


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: dtype, shape and where its bytes are, counted from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds. `data` is where the data starts in the file."""

    tensors: dict[str, TensorInfo]
    data: int
    metadata: dict[str, str] = field(default_factory=dict)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor_info(path: Path, name: str, entry: Any, room: int) -> TensorInfo:
    """The checked entry of one tensor; `room` is the number of data bytes in the file."""

    def refuse(found: str, allowed: str) -> NetsukeError:
        return NetsukeError(f"load {path}", f"tensor {name!r}: {found}", allowed)

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise refuse("incomplete entry in the header", "dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"unknown dtype {str(dtype)[:20]!r}", ", ".join(DTYPES))
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_whole, shape)):
        raise refuse(f"shape {str(shape)[:60]}", "at most eight whole numbers, none negative")
    if not isinstance(span, list) or len(span) != 2 or not all(map(_whole, span)) or span[0] > span[1]:
        raise refuse(f"data offsets {str(span)[:60]}", "[start, end] with start <= end")
    if span[1] > room:
        raise refuse(f"its data end at byte {span[1]} of {room}: the file is truncated", "spans inside the file")
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if wanted != span[1] - span[0]:
        raise refuse(f"shape {shape} of {dtype} needs {wanted} bytes, its span has {span[1] - span[0]}", "equal sizes")
    return TensorInfo(DTYPES[dtype], tuple(shape), span[0], span[1])


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file; no tensor data are read.

    Raises NetsukeError for a pickle, a header that is too long or no JSON, an unknown dtype, a span that leaves the
    file, overlaps another, leaves a hole or does not match its shape, and data that belong to no tensor.
    """
    path = Path(path)
    refuse_pickle(path)
    with reading(path), path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        length = int.from_bytes(f.read(8), "little") if size >= 8 else -1
        if not 0 < length <= min(LARGEST_HEADER, size - 8):
            found = f"the header claims {length} bytes" if size >= 8 else "the file is shorter than its header"
            raise NetsukeError(
                f"load {path}", f"{found} in a file of {size} bytes",
                f"a safetensors file whose header fits in it and in {LARGEST_HEADER} bytes",
            )  # fmt: skip
        raw = parse_json(f.read(length), path)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise NetsukeError(f"load {path}", "__metadata__ is no map of texts", "a map of texts to texts")
    room = size - 8 - length
    tensors = {name: _tensor_info(path, name, entry, room) for name, entry in raw.items()}
    end, before = 0, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            what = "overlaps" if info.start < end else "leaves a gap after"
            raise NetsukeError(f"load {path}", f"tensor {name!r} {what} {before}", "tensors one after the other")
        end, before = info.end, repr(name)
    if end != room:
        raise NetsukeError(f"load {path}", f"{room - end} bytes at the end belong to no tensor", "no spare bytes")
    return Header(tensors, 8 + length, metadata)


class WeightFile:
    """The tensors of one safetensors file, or of the shards that a `*.safetensors.index.json` lists.

    Opening reads and checks the headers only. Raises NetsukeError for what `read_header` refuses, a shard that is
    missing or lies outside the folder, and a tensor that is not in the shard the index names.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.files: list[Path] = [self.path]
        if self.path.name.endswith(".index.json"):
            self._where = self._read_index()
        else:
            header = read_header(self.path)
            self._where = {name: (self.path, header.data, info) for name, info in header.tensors.items()}

    def _read_index(self) -> dict[str, tuple[Path, int, TensorInfo]]:
        asked, places = f"load {self.path}", read_json(self.path).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise NetsukeError(asked, "the index has no weight_map", "a map of tensor names to shards")
        for shard in places.values():
            if not plain_name(shard):
                raise NetsukeError(asked, f"shard {shard!r} is not a plain file name", "files beside the index")
        shards = {shard: self.path.parent / shard for shard in sorted(set(places.values()))}
        for shard, path in shards.items():
            if not path.is_file():
                raise NetsukeError(asked, f"shard {shard!r} is missing", "all shards beside the index")
        headers = {shard: read_header(path) for shard, path in shards.items()}
        for name, shard in places.items():
            if name not in headers[shard].tensors:
                raise NetsukeError(asked, f"tensor {name!r} is not in shard {shard!r}", "an index that fits its shards")
        self.files = [self.path, *shards.values()]
        return {name: (shards[s], headers[s].data, headers[s].tensors[name]) for name, s in places.items()}

    def names(self) -> list[str]:
        return sorted(self._where)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor, without reading it."""
        return self._place(name)[2]

    def _place(self, name: str) -> tuple[Path, int, TensorInfo]:
        if name not in self._where:
            raise NetsukeError(f"load {self.path}", f"tensor {name!r} is missing", "a complete set of weights")
        return self._where[name]

    def get(self, name: str) -> Tensor:
        """A fresh copy of one tensor."""
        path, data, info = self._place(name)
        with reading(path), path.open("rb") as f:
            raw = read_bytes(f, data + info.start, info.end - info.start, path)
        if info.dtype == torch.bool:
            return (raw != 0).reshape(info.shape)  # a byte other than 0 and 1 is no valid bool in memory
        return raw.view(info.dtype).reshape(info.shape)

    def bytes(self) -> int:
        """Size of all files on disk."""
        return sum(p.stat().st_size for p in self.files)


def read_bytes(f: BinaryIO, start: int, count: int, path: Path) -> Tensor:
    """`count` bytes of an open file as uint8, in memory of their own. Raises NetsukeError when the file ends before."""
    raw = torch.empty(count, dtype=torch.uint8)
    f.seek(start)
    if count and f.readinto(memoryview(raw.numpy())) != count:
        raise NetsukeError(f"load {path}", f"the file ends before byte {start + count}: it is truncated")
    return raw


def check_finite(name: str, tensor: Tensor, source: str | Path = "weights") -> None:
    """Raises NetsukeError that names the tensor when it holds NaN or infinity. Integers pass."""
    if not tensor.is_floating_point():
        return
    narrow = tensor.dtype.itemsize == 1  # float8 has no isfinite
    for part in tensor.reshape(-1).split(CHUNK):
        if not (part.float() if narrow else part).isfinite().all():
            raise NetsukeError(
                f"use {source}", f"tensor {name!r} holds NaN or infinite numbers", "finite weights", "an intact copy"
            )


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as safetensors, atomically; equal tensors and metadata give equal bytes.

    Wide elements come first so that every tensor is aligned, then names in order. Raises NetsukeError when the disk
    refuses.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        t = tensors[name]
        start, end = end, end + t.numel() * t.dtype.itemsize
        entries[name] = {"dtype": CODES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    head = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    def fill(f: BinaryIO) -> None:
        f.write(len(head).to_bytes(8, "little") + head)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            f.write(memoryview(flat.view(torch.uint8).numpy()))

    write_atomically(path, fill)
