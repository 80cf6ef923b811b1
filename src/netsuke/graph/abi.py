"""What the C kernels look like from Python, read from their headers: the fields of every parameter structure in order, and
which source file a function is in. The headers are the only place where that is written down.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path

KERNELS = Path(__file__).parent / "kernels"
TYPES = {"int32_t": ctypes.c_int32, "float": ctypes.c_float}
_STRUCT = re.compile(r"typedef struct \{([^}]*)\} (ns_\w+)_params;")
_ALIAS = re.compile(r"typedef (ns_\w+)_params (ns_\w+)_params;")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_DEFINED = re.compile(r"^void (ns_\w+)\(const \w+_params \*", re.MULTILINE)
_INCLUDED = re.compile(r'#include "(\w+\.h)"')
_CALLED = re.compile(r"\b(ns_\w+)\(")


@cache
def structures() -> dict[str, type[ctypes.Structure]]:
    """The parameter structure of every kernel, by the kernel's name; all fields are int32_t or float."""
    out: dict[str, type[ctypes.Structure]] = {}
    for header in sorted(KERNELS.glob("*.h")):
        text = _COMMENT.sub("", header.read_text())
        for body, name in _STRUCT.findall(text):
            fields = []
            for line in filter(None, (s.strip() for s in body.split(";"))):
                kind, names = line.split(maxsplit=1)
                fields += [(n.strip(), TYPES[kind]) for n in names.split(",")]
            out[name] = type(f"{name}_params", (ctypes.Structure,), {"_fields_": fields})
        for base, name in _ALIAS.findall(text):
            out[name] = out[base]
    return out


@cache
def defined_in() -> dict[str, str]:
    """The name of the source file of every kernel."""
    return {
        name: source.name for source in sorted(KERNELS.glob("*.c")) for name in _DEFINED.findall(source.read_text())
    }


def sources(functions: set[str]) -> list[str]:
    """The files of `kernels/` that a program calling these kernels needs: C sources, those of kernels that they call, and
    the headers that they include."""
    files = {defined_in()[name] for name in functions}
    waiting = list(files)
    while waiting:
        source = waiting.pop()
        text = _COMMENT.sub("", (KERNELS / source).read_text())
        needed = set(_INCLUDED.findall(text))
        if source.endswith(".c"):
            needed |= {defined_in()[name] for name in _CALLED.findall(text) if name in defined_in()}
        waiting += needed - files
        files |= needed
    return sorted(files)
