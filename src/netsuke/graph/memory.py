"""What a small network takes on a chip, as plain values: the arena and who fills it at the peak, flash by part and layer.

Flash is counted on the lowered program, so it is what the linker will see of constants, parameters and the start values
of variables; the code of the kernels depends on the compiler: it is what was linked for a Cortex-M4 (instructions.json).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from netsuke.graph.arena import Arena
from netsuke.graph.instructions import code_bytes
from netsuke.graph.ir import QGraph
from netsuke.graph.lower import Program, lower
from netsuke.graph.ops.conv import LINEAR

LARGEST = 5
PARTS = ("weights", "biases", "tables", "parameters", "variables")


class _Anywhere:
    """Stands in for an arena that is not planned yet. Flash hardly depends on it: copies that a plan needs or saves have
    a few parameters."""

    size = 0

    def offset(self, tensor: int) -> int:
        return 0

    def scratch_offset(self, op: int) -> int:
        return 0


def facts(graph: QGraph, arena: Arena) -> dict[str, Any]:
    """{arena, lower_bound, peak_operator, largest, inputs, outputs, flash, macs} in bytes, ready for JSON.

    largest   the five largest tensors live at the peak operator, [{name, shape, dtype, bytes}], scratch among them; one
              that lies in place of another counts with the bytes it is longer by
    flash     {parts, by_layer, total}, see `flash`

    Raises NetsukeError for an operator that has no kernel.
    """
    return {
        "arena": arena.size,
        "lower_bound": arena.lower_bound,
        "peak_operator": _name(graph, arena.peak_op) if graph.ops else "",
        "largest": [_live(graph, i, n) for i, n in arena.live(arena.peak_op)[:LARGEST]],
        "inputs": [_live(graph, i, graph.tensors[i].bytes) for i in graph.inputs],
        "outputs": [_live(graph, i, graph.tensors[i].bytes) for i in graph.outputs],
        "flash": flash(graph, arena),
        "macs": graph.macs(),
    }


def flash(graph: QGraph, arena: Arena | None = None) -> dict[str, Any]:
    """{"parts": {weights, biases, tables, parameters, variables}, "by_layer": {operator: bytes}, "total", "code"}.

    weights     as the kernels read them: 4-bit ones packed, spare bytes for word loads included
    biases      constants with one number per output channel
    tables      multipliers, functions by table and the like
    parameters  shapes, strides and zero points of the calls
    variables   start values of what training changes (they lie in RAM as well)
    code        of the kernels and the program, predicted; not in "total", which is exact

    What several operators share (bands, recurrent steps) counts for the first. Raises NetsukeError for an operator that
    has no kernel.
    """
    program = lower(graph, arena or _Anywhere())
    biases = {op.inputs[2] for op in graph.ops if len(op.inputs) > 2 and op.kind in LINEAR}
    parts = Counter(dict.fromkeys(PARTS, 0))
    for table in program.constants:
        part = "tables" if table.tensor < 0 else "biases" if table.tensor in biases else "weights"
        parts[part] += table.data.nbytes
    parts["parameters"] = sum(4 * len(call.params) for call in program.calls)
    parts["variables"] = sum(table.data.nbytes for table in program.variables)
    code = code_bytes({call.function for call in program.calls}, len(program.calls))
    return {"parts": dict(parts), "by_layer": _by_layer(graph, program), "total": sum(parts.values()), "code": code}


def flash_bytes(graph: QGraph) -> int:
    """All of `flash`, without an arena: constants, parameters, start values, and the code that reads them."""
    got = flash(graph)
    return got["total"] + got["code"]


def _by_layer(graph: QGraph, program: Program) -> dict[str, int]:
    out: Counter[str] = Counter()
    seen: set[tuple[str, int]] = set()
    for call in program.calls:
        out[_name(graph, call.op)] += 4 * len(call.params)
        for a in call.args:
            tables = {"constant": program.constants, "variable": program.variables}.get(a.space)
            if tables is not None and (a.space, a.at) not in seen:
                seen.add((a.space, a.at))
                out[_name(graph, call.op)] += tables[a.at].data.nbytes
    return dict(out)


def _name(graph: QGraph, op: int) -> str:
    return graph.ops[op].name or f"{graph.ops[op].kind} {op}"


def _live(graph: QGraph, tensor: int, size: int) -> dict[str, Any]:
    if tensor < 0:
        return {"name": "scratch", "shape": [size], "dtype": "uint8", "bytes": size}
    t = graph.tensors[tensor]
    return {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "bytes": size}
