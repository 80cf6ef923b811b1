"""Files that are hostile until checked, without PyTorch: reading with one-sentence errors, JSON, names, atomic writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from netsuke.errors import NetsukeError

LARGEST_JSON = 300_000_000  # bytes; the largest index or tokenizer seen in the wild is a tenth of that
PICKLE = "the file is a pickle, which can run code when opened"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an operating-system error into one sentence about `path`."""
    try:
        yield
    except OSError as e:
        raise NetsukeError(f"read {path}", e.strerror or str(e), "a readable file") from e


def is_pickled(path: Path) -> bool:
    """Whether the file begins as a pickle or as the zip file that torch.save writes. Nothing is unpickled."""
    with reading(path), path.open("rb") as f:
        head = f.read(4)
    return head[:2] == b"PK" or (head[:1] == b"\x80" and head[2:4] != b"\0\0")


def refuse_pickle(path: Path) -> None:
    """Raises NetsukeError when the file is a pickle, whatever its name."""
    if is_pickled(path):
        raise NetsukeError(f"load {path}", PICKLE, "safetensors or llama2.c files", "convert to safetensors")


def plain_name(name: Any) -> bool:
    """Whether `name` is a file name and nothing else: no folder, no drive, no dots only, no control characters."""
    return (
        isinstance(name, str)
        and 0 < len(name) < 200
        and name.isprintable()
        and not set(name) & set('/\\:*?"<>|')
        and name.strip(". ") != ""
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises NetsukeError when it is no object, has a key twice, or is absurdly large."""
    with reading(path):
        if path.stat().st_size > LARGEST_JSON:
            raise NetsukeError(f"read {path}", f"{path.stat().st_size} bytes of JSON", f"at most {LARGEST_JSON} bytes")
        return parse_json(path.read_bytes(), path)


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """As `read_json`, from bytes; `path` is named in errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
            raise NetsukeError(f"read {path}", f"the key {twice!r} stands twice", "each key once")
        return out

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise NetsukeError(f"read {path}", f"not valid JSON ({str(e)[:80]})", "one JSON object") from e
    if not isinstance(value, dict):
        raise NetsukeError(f"read {path}", f"JSON of type {type(value).__name__}", "one JSON object")
    return value


def write_atomically(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    """Writes a file under a temporary name beside `path`, flushes it to the disk and renames it. Nothing is
    half-written.

    Raises NetsukeError when the folder is missing, read-only or full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        try:
            with temporary.open("wb") as f:
                fill(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise NetsukeError(f"write {path}", e.strerror or str(e), "a folder that can be written to") from e
