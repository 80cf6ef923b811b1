"""A graph as an artifact: `manifest.json` with tensors and operators, `weights.safetensors` with scales and constants.

The same bytes for the same graph. int4 constants are packed two a byte (low nibble first), as a device holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.ir import Op, QGraph, Tensor
from netsuke.models.artifact import write_artifact
from netsuke.models.files import read_json
from netsuke.models.places import FORMAT, MANIFEST, VERSION, WEIGHTS

FAMILY = "graph"


class _Tensor(msgspec.Struct, omit_defaults=True):
    name: str
    shape: tuple[int, ...]
    dtype: str
    zero: int = 0
    axis: int | None = None
    view: tuple[int, int] | None = None
    variable: bool = False


class _Op(msgspec.Struct, omit_defaults=True):
    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    name: str = ""
    attrs: dict[str, Any] = {}


class _Graph(msgspec.Struct):
    name: str
    tensors: list[_Tensor]
    ops: list[_Op]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    states: tuple[tuple[int, int], ...]
    meta: dict[str, Any]


def pack4(values: np.ndarray) -> np.ndarray:
    """int8 values in -8…7 (channels, n) as uint8 (channels, ceil(n / 2)), low nibble first: each row begins on a byte."""
    rows = np.pad(values, ((0, 0), (0, values.shape[1] % 2))).astype(np.uint8) & 15
    return rows[:, ::2] | rows[:, 1::2] << 4


def unpack4(packed: np.ndarray, n: int) -> np.ndarray:
    """The int8 values that `pack4` packed, (channels, n)."""
    both = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)[:, :n].astype(np.int8)
    return np.where(both > 7, both - 16, both).astype(np.int8)


def save_graph(
    folder: Path, graph: QGraph, provenance: dict[str, Any], facts: dict[str, Any], budget: dict[str, Any] | None = None,
    verify: Callable[[Path], None] | None = None,
) -> Path:  # fmt: skip
    """Writes the artifact; `verify`, replacing and errors are those of `write_artifact`."""
    from netsuke.models.weights import write_safetensors

    graph.check()
    described = _Graph(
        graph.name, [_Tensor(t.name, t.shape, t.dtype, int(t.zero), t.axis, t.view, t.variable) for t in graph.tensors],
        [_Op(o.kind, o.inputs, o.outputs, o.name, o.attrs) for o in graph.ops],
        graph.inputs, graph.outputs, graph.states, graph.meta,
    )  # fmt: skip
    plain = msgspec.to_builtins(described, enc_hook=_plain)
    manifest = {"family": FAMILY, "graph": plain, "provenance": provenance, "budget": budget, "facts": facts}
    write_artifact(
        folder, manifest, lambda part: write_safetensors(part / WEIGHTS, _arrays(graph), {"format": "pt"}), verify
    )
    return folder


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise NotImplementedError(f"an attribute of type {type(value).__name__}")


def _arrays(graph: QGraph) -> dict[str, Any]:
    import torch

    out: dict[str, np.ndarray] = {}
    used = {i for i, _ in graph.constants()}
    for i, t in enumerate(graph.tensors):
        if t.scale is not None:
            out[f"{i}.scale"] = np.asarray(t.scale, np.float64)
        if i in used:
            out[f"{i}.data"] = (
                pack4(t.data.reshape(t.shape[0], -1)) if t.dtype == "int4" else np.ascontiguousarray(t.data)
            )
    return {name: torch.from_numpy(array.copy()) for name, array in out.items()}


def is_graph_artifact(folder: Path) -> bool:
    """Whether a folder is an artifact that holds a graph."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        return read_json(folder / MANIFEST).get("family") == FAMILY
    except NetsukeError:
        return False


def load_graph_artifact(folder: Path) -> tuple[QGraph, dict[str, Any]]:
    """The graph and the manifest. Raises NetsukeError for files that are missing, changed, damaged or hostile."""
    from netsuke.models.load import check_files, files_of
    from netsuke.models.weights import WeightFile

    raw, asked = read_json(folder / MANIFEST), f"load {folder}"
    if raw.get("format") != FORMAT or raw.get("version") != VERSION:
        raise NetsukeError(asked, f"format {str(raw.get('format'))[:40]!r}", f"{FORMAT!r}, version {VERSION}")
    check_files(folder, files_of(raw, folder), verify=True)
    try:
        got = msgspec.convert(raw.get("graph"), _Graph)
    except msgspec.ValidationError as e:
        raise NetsukeError(asked, f"manifest.json: {e}", "a manifest as netsuke writes it") from e
    weights = WeightFile(folder / WEIGHTS)
    names, tensors = set(weights.names()), []
    for i, t in enumerate(got.tensors):
        scale = weights.get(f"{i}.scale").numpy() if f"{i}.scale" in names else None
        tensor = Tensor(t.name, t.shape, t.dtype, scale, t.zero, t.axis, None, t.view, t.variable)
        if f"{i}.data" in names:
            tensor.data = _data(weights.get(f"{i}.data").numpy(), tensor, asked)
        tensors.append(tensor)
    ops = [Op(o.kind, o.inputs, o.outputs, dict(o.attrs), o.name) for o in got.ops]
    return QGraph(got.name, tensors, ops, got.inputs, got.outputs, got.states, got.meta).check(), raw


def _data(array: np.ndarray, t: Tensor, asked: str) -> np.ndarray:
    if t.dtype == "int4":
        per_row = t.size // max(t.shape[0], 1)
        if array.dtype != np.uint8 or array.shape != (t.shape[0], (per_row + 1) // 2):
            raise NetsukeError(
                asked, f"the packed weights {t.name!r} are {array.dtype} {array.shape}", "two codes a byte"
            )
        return unpack4(array, per_row).reshape(t.shape)
    if str(array.dtype) != t.dtype or array.shape != t.shape:
        raise NetsukeError(asked, f"the weights {t.name!r} are {array.dtype} {array.shape}", f"{t.dtype} {t.shape}")
    return array
