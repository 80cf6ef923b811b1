"""Prints a program (`graph/lower.py`) as C99: the files of an exported folder, and its facts."""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.export.c import FORMAT, VERSION, golden
from netsuke.graph import abi
from netsuke.graph.arena import Arena, plan_arena
from netsuke.graph.ir import QGraph
from netsuke.graph.lower import Pointer, Program, lower, scratch
from netsuke.graph.packing import up

TYPES = {
    "int8": "int8_t", "int16": "int16_t", "int32": "int32_t", "uint8": "uint8_t", "uint16": "uint16_t",
    "uint32": "uint32_t", "uint64": "uint64_t", "float32": "float", "int4": "uint8_t",
}  # fmt: skip
WIDTH = 116  # characters of a line of numbers
TOLERANCE = 1e-4  # of float outputs: libm differs between machines


def sources(
    graph: QGraph, name: str, examples: list[np.ndarray] | None, seed: int
) -> tuple[dict[str, str], dict[str, Any]]:
    """(path in the folder -> text, facts of size.json)"""
    arena = plan_arena(graph, scratch)
    program = lower(graph, arena)
    functions = {c.function for c in program.calls}
    parts = {part: (abi.KERNELS / part).read_text() for part in abi.sources(functions)}
    inputs, outputs = golden.runs(graph, examples, seed)
    facts = _facts(graph, program, name, list(parts))
    places = [_io(graph, program, side) for side in ("input", "output")]
    view = {
        "name": name, "upper": name.upper(), "graph": graph, "facts": facts, "program": program,
        "title": _plain(graph.name), "headers": _headers(parts, functions), "calls": _calls(graph, program),
        "inputs": places[0], "outputs": places[1], "states": _states(graph, arena),
        "in_type": _common(places[0]), "out_type": _common(places[1]), "signature": _signature(*places),
        "runs": len(inputs), "golden_in": _stack(inputs) if examples is not None else None,
        "golden_out": _stack(outputs), "seed": (golden.START + seed) & 0xFFFFFFFF or golden.START,
        "tolerance": TOLERANCE, "TYPES": TYPES,
    }  # fmt: skip
    files = {
        f"src/{name}.h": "model.h", f"src/{name}.c": "model.c", f"src/{name}_weights.h": "weights.h",
        f"test/{name}_test.c": "test.c", f"examples/{name}/{name}.ino": "example.ino", "Makefile": "Makefile",
        "CMakeLists.txt": "CMakeLists.txt", "library.properties": "library.properties", "README.md": "README.md",
    }  # fmt: skip
    out = {path: environment().get_template(template + ".j2").render(view) for path, template in files.items()}
    out |= {f"src/kernels/{part}": text for part, text in parts.items()}
    out["size.json"] = json.dumps(facts, indent=1, allow_nan=False) + "\n"
    return out, facts


@functools.cache
def environment() -> Any:
    """The templates of this folder (jinja2)."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, undefined=jinja2.StrictUndefined, autoescape=False,
    )  # fmt: skip
    environment.filters |= {"number": _number, "plain": _plain, "numbers": _numbers, "ctype": lambda d: TYPES[str(d)]}
    return environment


def _facts(graph: QGraph, program: Program, name: str, parts: list[str]) -> dict[str, Any]:
    """What size.json says: bytes of flash by part (code depends on the compiler and is measured), RAM, work, calls."""
    flash: Counter[str] = Counter()
    counted: set[int] = set()
    for call in program.calls:
        op = graph.ops[call.op]
        for a in call.args:
            if a.space == "constant" and a.at not in counted:  # what several calls share counts for the first
                counted.add(a.at)
                flash[_plain(op.name or op.kind)] += program.constants[a.at].data.nbytes
    variables = sum(v.data.nbytes for v in program.variables)
    return {
        "format": FORMAT, "version": VERSION, "name": name, "network": _plain(graph.name), "macs": graph.macs(),
        "arena": up(program.arena),
        "flash": {
            "constants": sum(t.data.nbytes for t in program.constants),
            "parameters": sum(4 * len(c.params) for c in program.calls),
            "variables": variables, "by_operator": dict(flash),
        },
        "ram": {"arena": up(program.arena), "variables": variables},
        "kernels": [part for part in parts if part.endswith(".c")],
        "inputs": [_described(graph, i) for i in graph.inputs],
        "outputs": [_described(graph, i) for i in graph.outputs],
        "variables": [_described(graph, v.tensor) | {"bytes": v.data.nbytes} for v in program.variables],
        "calls": [{"function": c.function, "kind": graph.ops[c.op].kind, "name": _plain(graph.ops[c.op].name)}
                  for c in program.calls],
    }  # fmt: skip


def _described(graph: QGraph, index: int) -> dict[str, Any]:
    t = graph.tensors[index]
    scale = None if t.scale is None or np.ndim(t.scale) else float(t.scale)
    return {
        "name": _plain(t.name), "shape": list(t.shape), "dtype": t.dtype, "size": t.size, "bytes": t.bytes,
        "scale": scale, "zero": int(t.zero),
    }  # fmt: skip


def _io(graph: QGraph, program: Program, side: str) -> list[dict[str, Any]]:
    """The inputs or outputs with `at`, where they lie, as C."""
    indices, pointers = (graph.inputs, program.inputs) if side == "input" else (graph.outputs, program.outputs)
    return [_described(graph, i) | {"at": _argument(program, p)} for i, p in zip(indices, pointers)]


def _common(rows: list[dict[str, Any]]) -> str:
    """The C type of all inputs or outputs, void when they differ."""
    types = {TYPES[r["dtype"]] for r in rows}
    return types.pop() if len(types) == 1 else "void"


def _signature(inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> str:
    ins = [f"const {TYPES[t['dtype']]} *in{k if len(inputs) > 1 else ''}" for k, t in enumerate(inputs)]
    outs = [f"{TYPES[t['dtype']]} *out{k if len(outputs) > 1 else ''}" for k, t in enumerate(outputs)]
    return ", ".join(ins + outs)


def _headers(parts: dict[str, str], functions: set[str]) -> list[str]:
    """The headers that declare the functions."""
    declared = {part: set(re.findall(r"^void (ns_\w+)\(", text, re.M)) for part, text in parts.items()}
    return [part for part in parts if part.endswith(".h") and declared[part] & functions]


def _calls(graph: QGraph, program: Program) -> list[dict[str, Any]]:
    """Per call its function, initialiser and arguments as C, and the operator's name for a comment."""
    return [
        {
            "function": c.function,
            "params": ", ".join(f".{field} = {_number(value)}" for field, value in c.params.items()),
            "args": ", ".join(_argument(program, a) for a in c.args),
            "comment": _plain(f"{graph.ops[c.op].kind} {graph.ops[c.op].name}"),
        }
        for c in program.calls
    ]


def _argument(program: Program, a: Pointer) -> str:
    kind = TYPES[a.dtype]
    if a.space == "none":
        return "NULL"
    if a.space == "arena":
        return f"AT({kind}, {a.at})"
    table = (program.constants if a.space == "constant" else program.variables)[a.at]
    symbol = f"{'c' if a.space == 'constant' else 'v'}{a.at}"
    if TYPES[str(table.data.dtype)] == kind:
        return symbol
    return f"(const {kind} *){symbol}" if a.space == "constant" else f"({kind} *){symbol}"


def _states(graph: QGraph, arena: Arena) -> list[dict[str, Any]]:
    """Per state where it is read, where the next value is written, and what it starts from."""
    return [
        _described(graph, a)
        | {"read": arena.offset(a), "written": arena.offset(b), "type": TYPES[graph.tensors[a].dtype]}
        for a, b in graph.states
    ]


def _stack(runs: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Per input or output (runs, size)."""
    return [np.stack([r[k].reshape(-1) for r in runs]) for k in range(len(runs[0]))]


def _plain(text: Any) -> str:
    """Text from a file as part of a comment or a title: nothing in it can end the comment or begin a line."""
    return re.sub(r"[^A-Za-z0-9_.:/ +\-]", "_", str(text)).replace("*/", "__").replace("//", "/")[:100].strip()


def _number(value: Any) -> str:
    """A C literal with exactly this value: 32-bit integers and floats, 64-bit unsigned integers."""
    if isinstance(value, float | np.floating):
        if math.isinf(value):
            return "INFINITY" if value > 0 else "-INFINITY"
        text = f"{np.float32(value):.9g}"
        return text + ("f" if any(c in text for c in ".e") else ".0f")
    value = int(value)
    if value == -(1 << 31):
        return "-2147483647 - 1"
    return f"{value}u" if value >= 1 << 31 and value < 1 << 32 else f"{value}ull" if value >= 1 << 32 else str(value)


def _numbers(data: np.ndarray) -> str:
    """The elements of an array as lines of literals."""
    flat = data.reshape(-1)
    if flat.dtype.kind == "f" or flat.dtype.itemsize > 2:
        words = [_number(v) for v in flat.tolist()]
    else:
        words = list(map(str, flat.tolist()))
    lines, line, length = [], [], 0
    for word in words:
        if length + len(word) + 1 > WIDTH:
            lines.append(",".join(line))
            line, length = [], 0
        line.append(word)
        length += len(word) + 1
    return ",\n  ".join([*lines, ",".join(line)])
