"""The two forms in which Keras saves a model: what the layers are (JSON) and each layer's weights in their order.

HDF5     attribute `model_config`, group `model_weights` with `weight_names` per layer (Keras 1 to 3)
.keras   a zip of config.json, metadata.json and model.weights.h5 (Keras 3), weights under layers/<class_n>/[cell/]vars/0…
"""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.models.files import parse_json, reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    import h5py

LARGEST = 1 << 29  # bytes of weights: what claims more is no network for a microcontroller
PARTS = (("vars",), ("cell", "vars"))  # where a .keras archive keeps a layer's weights


@dataclass(frozen=True)
class KerasFile:
    """config: class_name and config of the model; version: Keras' major version; weights by layer name."""

    config: dict[str, Any]
    version: int
    weights: dict[str, list[np.ndarray]]


def read_file(path: Path) -> KerasFile:
    """Reads either form. Raises NetsukeError for anything else."""
    with reading(path), path.open("rb") as f:
        head = f.read(8)
    if head[:4] == b"PK\x03\x04":
        return _archive(path)
    if head != b"\x89HDF\r\n\x1a\n":
        raise NetsukeError(f"read {path}", "the file is no Keras model", "HDF5 or a .keras archive")
    with _hdf5(path, path) as file:
        text = file.attrs.get("model_config")
        if text is None or "model_weights" not in file:
            raise NetsukeError(
                f"read {path}", "the file holds weights without the model", "the attribute model_config, model_weights",
                "model.save(…) instead of model.save_weights(…)",
            )  # fmt: skip
        config = parse_json(text if isinstance(text, bytes) else str(text).encode(), path)
        version = file.attrs.get("keras_version", "2")
        group = file["model_weights"]
        total = [0]
        weights = {
            layer: [_dataset(group[layer], name, total, path) for name in _names(group[layer], "weight_names")]
            for layer in _names(group, "layer_names")
        }
    return KerasFile(config, _major(version), weights)


def _archive(path: Path) -> KerasFile:
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            if sum(i.file_size for i in archive.infolist()) > LARGEST:
                raise NetsukeError(f"read {path}", "the archive unpacks to more than 512 MB", "a small network")
            config, about = (parse_json(archive.read(n), path) for n in ("config.json", "metadata.json"))
            data = io.BytesIO(archive.read("model.weights.h5"))
    except (zipfile.BadZipFile, KeyError, NotImplementedError, EOFError, RuntimeError) as e:
        raise NetsukeError(
            f"read {path}", f"not a readable .keras archive ({str(e)[:80]})", "Keras 3's format"
        ) from None
    weights: dict[str, list[np.ndarray]] = {}
    total = [0]
    with _hdf5(data, path) as file:
        for layer, group in _groups(config, file):
            for part in PARTS:
                names = sorted((n for n in _inside(group, part)), key=int)
                weights.setdefault(layer, []).extend(_dataset(group, "/".join((*part, n)), total, path) for n in names)
    return KerasFile(config, _major(about.get("keras_version", "3")), weights)


def _groups(config: dict[str, Any], file: h5py.File) -> Iterator[tuple[str, h5py.Group]]:
    """(layer name, its group): Keras numbers the layers of one class in their order, dense, dense_1, …"""
    seen: Counter[str] = Counter()
    for layer in config["config"]["layers"]:
        name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", layer["class_name"])
        name = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
        key = f"layers/{name}" + (f"_{seen[name]}" if seen[name] else "")
        seen[name] += 1
        if key in file:
            yield layer["config"]["name"], file[key]


def _inside(group: h5py.Group, part: tuple[str, ...]) -> list[str]:
    key = "/".join(part)
    return list(group[key]) if key in group else []


@contextmanager
def _hdf5(source: Path | BinaryIO, path: Path) -> Iterator[h5py.File]:
    try:
        import h5py
    except ImportError:
        raise NetsukeError(
            f"read {path}", "Keras models are HDF5 files and the package h5py is not installed", "",
            "pip install 'netsuke[mcu]'",
        ) from None  # fmt: skip
    try:
        with reading(path), h5py.File(source, "r") as file:
            yield file
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as e:
        raise NetsukeError(f"read {path}", f"the HDF5 file is damaged ({str(e)[:80]})", "a whole file") from None


def _names(group: h5py.Group, key: str) -> list[str]:
    """A list of names in an attribute, or in several (key0, key1, …) when it is long."""
    keys = (
        [key] if key in group.attrs else [k for k in (f"{key}{i}" for i in range(len(group.attrs))) if k in group.attrs]
    )
    return [n.decode() if isinstance(n, bytes) else str(n) for k in keys for n in group.attrs[k]]


def _dataset(group: h5py.Group, name: str, total: list[int], path: Path) -> np.ndarray:
    """An array that lies in this very file: links and storage elsewhere are refused."""
    import h5py

    here: Any = group
    for step in name.split("/"):
        if not isinstance(here.get(step, getlink=True), h5py.HardLink):
            raise NetsukeError(f"read {path}", f"the weights {name!r} are missing or a link", "weights inside the file")
        here = here[step]
    if not isinstance(here, h5py.Dataset) or here.external or here.is_virtual or here.dtype.kind not in "fiu":
        raise NetsukeError(f"read {path}", f"the weights {name!r} are no plain numbers", "weights inside the file")
    total[0] += here.size * max(here.dtype.itemsize, 4)
    if total[0] > LARGEST:
        raise NetsukeError(f"read {path}", "the weights are larger than 512 MB", "a small network")
    return np.asarray(here[()], np.float32)


def _major(version: Any) -> int:
    found = re.match(r"\d+", version.decode() if isinstance(version, bytes) else str(version))
    return int(found.group()) if found else 2
