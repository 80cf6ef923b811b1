"""Reads a small network in whatever form it comes, one file of this folder each. What is returned has passed `QGraph.check`."""

from __future__ import annotations

import importlib
from pathlib import Path

from netsuke.errors import NetsukeError
from netsuke.graph.ir import QGraph

READERS = {
    ".tflite": ("tflite", "read_tflite"), ".npz": ("npz", "read_npz"), ".pkl": ("pickle_free", "read_pickle"),
    ".h5": ("keras", "read_keras"), ".hdf5": ("keras", "read_keras"), ".keras": ("keras", "read_keras"),
    ".onnx": ("onnx", "read_onnx"),
}  # fmt: skip
ALLOWED = "a .tflite, .onnx, Keras (.keras, .h5, .hdf5) or .npz network, or an artifact that netsuke made of one"


def is_graph(path: str | Path) -> bool:
    """Whether a path is a small network (and not a language model), judged by its name or manifest."""
    from netsuke.graph.store import is_graph_artifact

    path = Path(path)
    return path.suffix.lower() in READERS or is_graph_artifact(path)


def load_graph(path: str | Path) -> QGraph:
    """The network in a file or artifact. Raises NetsukeError for one that is missing, damaged or not supported."""
    from netsuke.graph.store import is_graph_artifact, load_graph_artifact

    path = Path(path)
    if is_graph_artifact(path):
        return load_graph_artifact(path)[0]
    if path.suffix.lower() not in READERS:
        raise NetsukeError(f"load {path}", f"a file of unknown kind ({path.suffix or 'no suffix'})", ALLOWED)
    if not path.is_file():
        found = "there is no such file" if not path.exists() else "that is no file"
        raise NetsukeError(f"load {path}", found, ALLOWED)
    module, function = READERS[path.suffix.lower()]
    return getattr(importlib.import_module(f"netsuke.graph.read.{module}"), function)(path)
