"""The C home: a small network as a folder of C99 that any compiler takes. No malloc, one static arena, weights in flash.

    src/NAME.h, NAME.c, NAME_weights.h, kernels/    what goes into the firmware; an Arduino library as it is
    test/NAME_test.c                                known inputs and the reference's outputs: `make test`
    examples/NAME/NAME.ino                          the first call
    Makefile, CMakeLists.txt, library.properties, README.md, size.json

The calls are those of `graph/lower.py`, so that this code, the host's and the reference interpreter give the same bits.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.ir import DTYPES, QGraph, Tensor
from netsuke.models.artifact import check_folder, write_texts
from netsuke.models.files import read_json

FORMAT, VERSION, FACTS = "netsuke-c", 1, "size.json"
NAME = r"(?!ns(_|$))[A-Za-z][A-Za-z0-9_]*"  # ns_ is the kernels'
LONGEST_NAME = 40
TARGETS = ("all", "clean", "help", "install", "test", "m")  # CMake's own, and the C library's: libm.a is linked by -lm

Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]


class _Tensor(msgspec.Struct):
    name: str
    shape: list[Positive]
    dtype: Literal[DTYPES]
    size: Positive
    bytes: Positive
    scale: float | None
    zero: int


class _Facts(msgspec.Struct):
    """size.json as far as programs read it: names become parts of paths and of C."""

    format: str
    version: int
    name: Annotated[str, msgspec.Meta(pattern=f"^{NAME}$", max_length=LONGEST_NAME)]
    network: str
    macs: int
    arena: int
    flash: dict[str, Any]
    ram: dict[str, int]
    kernels: list[Annotated[str, msgspec.Meta(pattern=r"^\w+\.c$")]]
    inputs: Annotated[list[_Tensor], msgspec.Meta(min_length=1)]
    outputs: Annotated[list[_Tensor], msgspec.Meta(min_length=1)]
    variables: list[_Tensor]
    calls: list[dict[str, str]]


def write_c(
    graph: QGraph, out: Path, *, name: str = "model", golden: list[np.ndarray] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Writes the folder `out` and returns what its size.json says (without the list of calls).

    name    prefix of files, functions and macros: two networks with different names link together
    golden  test inputs, per input of the graph an array (n, …); None: two runs on numbers from a generator with `seed`

    The folder is complete or not there; one that this function wrote before is replaced. Raises NetsukeError for a name
    that C does not take, for anything else at `out`, and for a graph that is not sound.
    """
    asked = f"export {graph.name} as C to {out.name}"
    if not re.fullmatch(NAME, name) or len(name) > LONGEST_NAME or name in TARGETS:
        raise NetsukeError(asked, f"the name {name!r} is no prefix of C functions", "letters, digits, _ (not ns_…)")
    out = check_folder(out, asked, FACTS, FORMAT)
    from netsuke.export.c.source import sources

    files, facts = sources(graph.check(), name, golden, seed)
    write_texts(out, files, asked)
    return {k: v for k, v in facts.items() if k != "calls"}


def facts_of(folder: Path) -> dict[str, Any]:
    """What size.json says, with `input` and `output`: the first of each as a Tensor. NetsukeError for other folders."""
    asked = f"read the C folder {folder}"
    if not (folder / FACTS).is_file():
        raise NetsukeError(asked, f"it has no {FACTS}", "a folder written by netsuke export --home c")
    facts = read_json(folder / FACTS)
    if facts.get("format") != FORMAT or facts.get("version") != VERSION:
        raise NetsukeError(
            asked, f"format {facts.get('format')!r}, version {facts.get('version')!r}", f"{FORMAT} {VERSION}"
        )
    try:
        facts = msgspec.to_builtins(msgspec.convert(facts, _Facts))
    except msgspec.ValidationError as e:
        raise NetsukeError(asked, f"{FACTS}: {e}", "the file as it was written") from None
    return facts | {"input": tensor_of(facts["inputs"][0]), "output": tensor_of(facts["outputs"][0])}


def tensor_of(row: dict[str, Any]) -> Tensor:
    """A row of size.json's inputs or outputs as a Tensor."""
    scale = None if row["scale"] is None else np.float64(row["scale"])
    return Tensor(row["name"], tuple(row["shape"]), row["dtype"], scale, row["zero"])
