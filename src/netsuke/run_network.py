"""`netsuke run` for small networks: pictures or arrays in, answers out, on this machine or on an emulated board."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.errors import NetsukeError

BACKENDS = ("native", "reference")
TOP = 5
LARGEST_SHOWN = 12  # numbers of an output printed one by one


def run_network(
    model: str, inputs: list[str], *, backend: str = "native", emulate: str | None = None, out: str | None = None
) -> dict[str, Any]:
    """Runs a small network, or a folder that `netsuke export --home c` wrote, on files.

    inputs    for each input of the network one file (.npy, picture); for a network of one input any number of files
    backend   "native" (the C kernels) or "reference" (NumPy)
    emulate   "m4" or "m7": build the C and run it on an emulated Cortex-M board, with instructions and stack counted
    out       an .npy file for the outputs (n, …) of the first output

    Returns {model, backend, rows: [{input, top | values}], …}. Raises NetsukeError for unusable models, files and boards.
    """
    folder = Path(model)
    if backend not in BACKENDS:
        raise NetsukeError(f"run with the backend {backend!r}", "there is no such backend", ", ".join(BACKENDS))
    if (folder / "size.json").is_file() or emulate:
        if backend != "native":
            raise NetsukeError(f"run {model} on a board", f"--backend is {backend}", "native: a board runs the C")
        return _emulated(folder, inputs, emulate or "m4", out)
    from netsuke.graph.inputs import read_input
    from netsuke.graph.read import load_graph

    graph = load_graph(model)
    if not inputs:
        shapes = ", ".join(f"{graph.tensors[i].dtype} {graph.tensors[i].shape}" for i in graph.inputs)
        raise NetsukeError(f"run {model}", "no input was given", f"--input FILE (the network takes {shapes})")
    rows, names = _rows(model, inputs, len(graph.inputs), lambda path, k: read_input(path, graph, k))
    outputs = _runner(backend)(graph).run(*rows)
    return {
        "model": model,
        "backend": backend,
        **_answers(outputs[0], graph.tensors[graph.outputs[0]], graph.meta, names, out),
    }


def _rows(
    model: str, files: list[str], inputs: int, read: Callable[[str, int], np.ndarray]
) -> tuple[list[np.ndarray], list[str]]:
    """(per input of the network the samples (n, …), a name per sample): of one input any number of files, else one each."""
    if inputs == 1:
        got = [read(path, 0) for path in files]
        return [np.concatenate(got)], [Path(p).name for p, r in zip(files, got) for _ in r]
    if len(files) != inputs:
        raise NetsukeError(f"run {model}", f"{len(files)} inputs were given", f"{inputs}, in order")
    rows = [read(path, k) for k, path in enumerate(files)]
    return rows, [Path(files[0]).name] * len(rows[0])


def _runner(backend: str) -> Any:
    if backend == "native":
        from netsuke.graph.host import HostProgram

        return HostProgram
    from netsuke.graph import Interpreter

    return Interpreter


def _emulated(folder: Path, inputs: list[str], board: str, out: str | None) -> dict[str, Any]:
    """A C folder as it is, or a network written as one into a temporary folder, on a board."""
    import tempfile

    from netsuke.export.c import facts_of, tensor_of, write_c
    from netsuke.export.c.emulate import run_emulated
    from netsuke.graph.inputs import from_file, read_input
    from netsuke.graph.read import is_graph, load_graph

    with tempfile.TemporaryDirectory() as temporary:
        graph = None
        if is_graph(folder):
            graph = load_graph(folder)
            write_c(graph, Path(temporary) / "fw")
            folder = Path(temporary) / "fw"
        facts = facts_of(folder)
        tensors = [tensor_of(t) for t in facts["inputs"]] if graph is None else [graph.tensors[i] for i in graph.inputs]

        def read(path: str, k: int) -> np.ndarray:
            return from_file(Path(path), tensors[k]) if graph is None else read_input(path, graph, k)

        rows, names = _rows(str(folder.name), inputs, len(tensors), read) if inputs else (None, [])
        got = run_emulated(folder, board, rows)
    answers: dict[str, Any] = {}
    if rows:
        y = facts["output"] if graph is None else graph.tensors[graph.outputs[0]]
        answers = _answers(got.pop("outputs")[0], y, graph.meta if graph else {}, names, out)
    got.pop("outputs", None)
    return {"model": str(folder.name), "backend": f"emulated {board}", **got, **answers}


def _answers(codes: np.ndarray, tensor: Any, meta: dict[str, Any], names: list[str], out: str | None) -> dict[str, Any]:
    """Rows for people: the most likely classes of a vector, the numbers of a short output, the range of a long one."""
    if out:
        from netsuke.models.files import write_atomically

        write_atomically(Path(out), lambda f: np.save(f, codes))
    labels, rows = meta.get("labels"), []
    for name, row in zip(names, tensor.real(codes)):
        flat = row.reshape(-1)
        entry: dict[str, Any] = {"input": name}
        if (len(flat) > 2 and row.ndim == 1) or len(flat) > LARGEST_SHOWN:
            best = np.argsort(-flat, kind="stable")[:TOP]
            entry["top"] = [
                {
                    "class": int(i),
                    "label": labels[i] if labels and i < len(labels) else str(int(i)),
                    "value": float(flat[i]),
                }
                for i in best
            ]
        else:
            entry["values"] = flat.tolist()
        rows.append(entry)
    return {"rows": rows, "out": out}


def show(got: dict[str, Any]) -> None:
    """The answers as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if got.get("rows"):
        table = Table("input", "answer")
        for row in got["rows"]:
            if "top" in row:
                text = ", ".join(f"{t['label']} {t['value']:.3g}" for t in row["top"])
            else:
                text = ", ".join(f"{v:.5g}" for v in row["values"])
            table.add_row(Text(row["input"]), Text(text))
        console.print(table)
    facts = Table.grid(padding=(0, 2))
    for key, name in (
        ("instructions", "instructions a run"),
        ("stack_peak", "stack, bytes"),
        ("flash", "flash, bytes"),
        ("ram", "RAM, bytes"),
    ):
        if key in got:
            facts.add_row(name, f"{got[key]:,}")
    if "passed" in got:
        facts.add_row("self-test", "passed: the board's outputs equal the reference's" if got["passed"] else "FAILED")
    console.print(facts)
