"""Homes: the forms in which a model leaves netsuke for other programs, one file each, and the verb that writes them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netsuke.errors import NetsukeError
from netsuke.verb import verb


@dataclass(frozen=True)
class Home:
    """A form of export. `module` has `write(loaded, out, bits) -> facts`; `bits` are the widths of weights it can store,
    the first one is the default. What has no `bits` is a folder of another kind, whose writer has arguments of its own."""

    module: str
    suffix: str
    bits: tuple[int, ...]
    what: str

    def writer(self) -> Callable[[Any, Path, int], dict[str, Any]]:
        return importlib.import_module(self.module).write


HOMES = {
    "gguf": Home("netsuke.export.gguf", ".gguf", (16, 8, 4), "one file for llama.cpp and its relatives"),
    "ranges": Home(
        "netsuke.export.ranges", "", (), "static ranges and the bit map as JSON, for a vendor's converter (mobilequant)"
    ),
    "c": Home("netsuke.export.c", "", (), "a folder of C99 for microcontrollers (small networks)"),
}


@verb
def export(
    model: str, home: str, *, out: str | None = None, bits: int | None = None, name: str = "model", patches: bool = False,
    train: str | None = None, classes: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes `model` in the form of `home` to `out` (default: the model's name with the home's suffix).

    name, patches   for C: the prefix of its functions; the first layers band by band, which needs less RAM and more time
    train, classes  for C: an update plan (JSON): sources that infer and train, with a head for that many classes

    Returns {model, home, file, bits, bytes, …} with the home's own facts and notes. Raises NetsukeError for an unknown
    home, a width it does not have, a place that cannot be written to and models it cannot express.
    """
    if home not in HOMES:
        raise NetsukeError(f"export {model}", f"the home {home!r} is unknown", ", ".join(HOMES))
    if home == "c":
        return _export_c(model, out, bits, name, patches, train, classes)
    if home == "ranges":
        return _export_ranges(model, out, bits)
    row = HOMES[home]
    bits = row.bits[0] if bits is None else bits
    if bits not in row.bits:
        raise NetsukeError(f"export {model} to {home}", f"--bits is {bits}", ", ".join(map(str, row.bits)))
    path = Path(out) if out else Path(Path(model).stem + row.suffix)
    path = path if path.suffix == row.suffix else path.with_name(path.name + row.suffix)
    if path.is_dir() or not path.parent.is_dir():
        found = f"{path} is a folder" if path.is_dir() else f"the folder {path.parent} does not exist"
        raise NetsukeError(f"export {model} to {home}", found, f"a file NAME{row.suffix} in an existing folder")
    from netsuke.models.load import load

    facts = row.writer()(load(model), path, bits)
    return {"model": model, "home": home, "file": str(path), "bits": bits, "bytes": path.stat().st_size, **facts}


def _export_ranges(model: str, out: str | None, bits: int | None) -> dict[str, Any]:
    from netsuke.export.ranges import write
    from netsuke.models.load import load

    if bits is not None:
        attempt = "netsuke compress, which chooses them"
        raise NetsukeError(f"export {model} as ranges", f"--bits is {bits}", "the model's own bit map", attempt)
    path = Path(out or f"{Path(model).stem}-ranges")
    facts = write(load(model), path)
    size = sum(f.stat().st_size for f in path.iterdir())
    return {"model": model, "home": "ranges", "file": str(path), **facts, "bytes": size}


def _export_c(
    model: str, out: str | None, bits: int | None, name: str, patches: bool, train: str | None, classes: int | None
) -> dict[str, Any]:
    from netsuke.export.c import write_c
    from netsuke.graph.lower import scratch
    from netsuke.graph.read import is_graph, load_graph

    if bits is not None:
        raise NetsukeError(
            f"export {model} as C", f"--bits is {bits}", "the network's own widths", "netsuke fit, which chooses them"
        )
    if not is_graph(model):
        attempt = "netsuke export --home gguf"
        raise NetsukeError(
            f"export {model} as C",
            "it is no small network",
            ".tflite, .onnx, Keras, .npz or an artifact of one",
            attempt,
        )
    path = Path(out or Path(model).stem)
    graph, notes = load_graph(model), []
    if train is not None:
        from netsuke.graph.differentiate import training_graph
        from netsuke.graph.update_plan import UpdatePlan

        graph = training_graph(graph, UpdatePlan.from_json(Path(train)), classes)
        notes.append(
            "each run is one training step: inputs are a sample, its label (int32) and the learning rate (float)"
        )
    if patches:
        from netsuke.graph.patches import best_patching

        graph, facts = best_patching(graph, scratch)
        before, after = facts["arena_before"], facts["arena"]
        notes.append(
            f"in patches: arena {before:,} -> {after:,} bytes, {facts['extra_macs']:,} more multiply-accumulates"
        )
    facts = write_c(graph, path, name=name)
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    return {"model": model, "home": "c", "file": str(path), "bytes": size, "notes": notes, **facts}
