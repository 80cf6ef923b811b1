"""Reads the int8 networks of MCUNetV3 (Lin et al., 2022) from their original `.pkl` form without trusting the pickle.

The file is torch.save's zip with one pickled dict of plain values and NumPy arrays. A pickle is a program that calls what
it names; here the four names those files use stand for inert stand-ins below, every other name is refused, and NumPy's own
unpickling is never reached. The dict then becomes the same graph as the `.npz` form's (`read/npz.py`).
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.ir import QGraph
from netsuke.graph.read.npz import LARGEST, from_description
from netsuke.models.files import reading

MOST_VALUES = 1 << 18
TYPES = ("i1", "i4", "i8", "f4", "f8")
MALFORMED = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError,
    RecursionError, MemoryError, ImportError, zipfile.BadZipFile, NotImplementedError,
)  # fmt: skip


class _Dtype:
    """Stands for numpy.dtype: a name out of TYPES."""

    __slots__ = ("name",)

    def __init__(self, name: str, *_: Any):
        if name not in TYPES:
            raise ValueError(f"an array of type {str(name)[:20]!r}")
        self.name = name

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|"):
            raise ValueError("an array that is not little-endian")


class _Array:
    """Stands for numpy.ndarray. `value` is the array once its state has come, checked against the bytes there are."""

    __slots__ = ("value",)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_columns, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise ValueError("an array without plain bytes")
        kind = np.dtype(dtype.name)
        if any(not isinstance(n, int) or n < 0 for n in shape) or math.prod(shape) * kind.itemsize != len(data):
            raise ValueError(f"an array of shape {tuple(shape)} with {len(data)} bytes")
        self.value = np.frombuffer(data, kind).reshape(shape, order="F" if by_columns else "C")


class _Reconstruct:
    __slots__ = ()

    def __call__(self, *_: Any) -> _Array:
        return _Array()


class _Encode:
    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1" or not isinstance(text, str):
            raise ValueError("a text in another encoding than latin1")
        return text.encode("latin1")


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        names = {
            ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
            ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
            ("_codecs", "encode"): _Encode(),
        }
        if (module, name) not in names:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}")
        return names[module, name]


def load_plain(data: bytes) -> Any:
    """The value of a pickle of plain values and arrays. Raises one of MALFORMED for any other, and calls nothing of it."""
    return _plain(_Restricted(io.BytesIO(data)).load(), iter(range(MOST_VALUES)))


def _plain(value: Any, left: Iterator[int]) -> Any:
    """The value with its arrays in place. `left` runs out on values that refer to each other many times over."""
    if next(left, None) is None:
        raise ValueError(f"more than {MOST_VALUES} values")
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {k: _plain(v, left) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v, left) for v in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"a value of type {type(value).__name__}")


def read_pickle(path: Path) -> QGraph:
    """The network in `path`. Raises NetsukeError for any pickle but a dict of plain values and arrays."""
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith("/data.pkl")), None)
            if name is None or archive.getinfo(name).file_size > LARGEST:
                raise NetsukeError(
                    f"read {path}", "the archive holds no data.pkl of at most 256 MB", "torch.save's zip"
                )
            value = load_plain(archive.read(name))
    except MALFORMED as e:
        raise NetsukeError(
            f"read {path}", f"not a pickle of plain values and arrays: {str(e)[:100] or type(e).__name__}",
            "MCUNetV3's int8 networks", "save the arrays as .npz (graph_json and i/weight, i/bias, i/w_scales)",
        ) from None  # fmt: skip
    if not isinstance(value, dict):
        raise NetsukeError(
            f"read {path}", f"the pickle is a {type(value).__name__}", "a dict that describes the network"
        )
    arrays: dict[str, np.ndarray] = {}
    return from_description(_numbered(value, arrays), arrays, path)


def _numbered(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The description with the arrays taken out of each convolution's `params` and numbered, as in the `.npz` form."""
    if isinstance(value, list):
        return [_numbered(v, arrays) for v in value]
    if not isinstance(value, dict):
        return value
    if not isinstance(value.get("params"), dict):
        return {k: _numbered(v, arrays) for k, v in value.items()}
    i = len({k.split("/")[0] for k in arrays})
    arrays |= {f"{i}/{k}": v for k, v in value["params"].items() if isinstance(v, np.ndarray)}
    scalars = {k: v for k, v in value["params"].items() if not isinstance(v, np.ndarray)}
    return {k: v for k, v in value.items() if k != "params"} | scalars | {"tensor": i}
