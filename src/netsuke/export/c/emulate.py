"""Runs an exported C folder on an emulated board: outputs, instructions, stack, sizes, and whether its self-test passes."""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.devices.board import MACHINE, EmulatedBoard, Firmware, Run
from netsuke.errors import NetsukeError
from netsuke.export.c import facts_of, golden
from netsuke.export.c.source import environment

ROOM = {"flash": MACHINE - (1 << 20), "ram": MACHINE, "stack": 32 << 10}  # a core by name: no device's limits


def run_emulated(
    folder: Path, board: EmulatedBoard | str, inputs: list[np.ndarray] | None = None, *, dsp: bool = True,
    optimise: str = "-O2", profile: bool = False, seconds: float = 600,
) -> dict[str, Any]:  # fmt: skip
    """Builds the folder for the board ("m4" or "m7": the core without a device's limits), tests it and runs it.

    inputs   per input of the network an array (n, …); None: one run on drawn numbers
    dsp      False: portable C instead of the DSP instructions
    profile  count instructions by kind of operator too, in a second build whose hooks cost some dozens a call

    Returns {passed, outputs: arrays (n, …), instructions (median of a run), runs (each), stack_peak, heap_peak, flash, ram
    (bytes linked, without the stack's reserve), arena (bytes linked), parts: {source: [text, data, bss]}, core, dsp,
    optimise}, `kinds` with `profile`, `variables` after the last run where there are some. Raises NetsukeError for other
    folders, inputs that do not fit, boards that are too small, and when QEMU or the compiler are missing.
    """
    facts = facts_of(folder)
    board = EmulatedBoard.load(board, **ROOM) if isinstance(board, str) else board
    data, n = _packed(facts, inputs)
    with tempfile.TemporaryDirectory(prefix="netsuke-c-") as temporary:
        firmware = _build(folder, facts, board, Path(temporary) / "whole", dsp, optimise, False)
        passed = firmware.run(["test"], seconds=seconds, check=False)
        if passed.code > 1:
            raise NetsukeError(f"run {folder.name} on the board {board.core!r}", passed.fault, code=1)
        run = firmware.run(files={"input.bin": data}, seconds=seconds)
        counts = _counts(run, "run")
        out = {
            "core": board.core, "dsp": dsp, "optimise": optimise, "passed": passed.code == 0,
            "outputs": _unpacked(facts["outputs"], run.files["output.bin"], n),
            "instructions": int(statistics.median(counts)), "runs": counts,
            "stack_peak": run.stack_peak, "heap_peak": run.heap_peak, "flash": firmware.flash, "ram": firmware.ram,
            "arena": firmware.symbols()[f"{facts['name']}_arena"],
            "parts": {part: [s.text, s.data, s.bss] for part, s in firmware.parts.items()},
        }  # fmt: skip
        if facts["variables"]:
            out["variables"] = _variables(facts, run.files["variables.bin"])
        if profile:
            roomy = EmulatedBoard.load(board.core, **ROOM)
            hooked = _build(folder, facts, roomy, Path(temporary) / "profile", dsp, optimise, True)
            spent = _counts(hooked.run(files={"input.bin": data}, seconds=seconds), "call")
            out["kinds"] = _by_kind(facts, [s // n for s in spent])
    return out


def count_calls(
    folder: Path, core: str = "m4", *, dsp: bool = True, optimise: str = "-O2", seconds: float = 600
) -> list[int]:
    """Instructions of each call of a run on drawn numbers, in the order of size.json's `calls`, to within some dozens: the
    timer's steps. What the hooks between the calls take is known from a run without them, and subtracted."""
    facts = facts_of(folder)
    board, (data, _) = EmulatedBoard.load(core, **ROOM), _packed(facts, None)
    with tempfile.TemporaryDirectory(prefix="netsuke-c-") as temporary:
        runs = [
            _build(folder, facts, board, Path(temporary) / str(profile), dsp, optimise, profile).run(
                files={"input.bin": data}, seconds=seconds
            )
            for profile in (False, True)
        ]
    spent = _counts(runs[1], "call")
    hook = max(0.0, (sum(spent) - _counts(runs[0], "run")[0]) / max(len(spent), 1))
    return [max(0, round(s - hook)) for s in spent]


def _build(
    folder: Path, facts: dict[str, Any], board: EmulatedBoard, out: Path, dsp: bool, optimise: str, profile: bool
) -> Firmware:
    """The folder's sources with a main program of ours; the self-test lies beside the device's flash."""
    name, source = facts["name"], folder / "src"
    out.mkdir()
    main = environment().get_template("board_main.c.j2").render(name=name, facts=facts, profile=profile)
    (out / "board_main.c").write_text(main)
    step = {"NS_STEP(k)": "{ extern void ns_step(int); ns_step(k); }"} if profile else {}
    return board.build(
        [out / "board_main.c", source / f"{name}.c", *(source / "kernels" / part for part in facts["kernels"])], out,
        include=[source], defines={"NS_NO_MAIN": 1, **step}, optimise=optimise, dsp=dsp,
        beside=[folder / "test" / f"{name}_test.c"],
    )  # fmt: skip


def _packed(facts: dict[str, Any], inputs: list[np.ndarray] | None) -> tuple[bytes, int]:
    """(input.bin, number of runs)"""
    rows, asked = facts["inputs"], f"run {facts['name']} on a board"
    if inputs is None:
        return b"".join(golden.drawn(tuple(t["shape"]), t["dtype"], golden.START)[0].tobytes() for t in rows), 1
    if len(inputs) != len(rows):
        raise NetsukeError(asked, f"{len(inputs)} inputs were given", f"{len(rows)}")
    n = inputs[0].size // rows[0]["size"]
    for x, t in zip(inputs, rows):
        if str(x.dtype) != t["dtype"] or n < 1 or x.size != n * t["size"]:
            found = f"the input {t['name']} is {x.dtype} {x.shape}"
            raise NetsukeError(asked, found, f"{t['dtype']}, any number of times {tuple(t['shape'])}")
    flat = [x.reshape(n, -1) for x in inputs]
    return b"".join(x[k].tobytes() for k in range(n) for x in flat), n


def _unpacked(rows: list[dict[str, Any]], data: bytes, n: int) -> list[np.ndarray]:
    """Per output an array (n, …) of output.bin, in which a run's outputs lie one after another."""
    runs = np.frombuffer(data, np.uint8).reshape(n, -1)
    out, at = [], 0
    for t in rows:
        flat = np.ascontiguousarray(runs[:, at : at + t["bytes"]]).view(t["dtype"])
        out.append(flat.reshape(n * t["shape"][0], *t["shape"][1:]) if t["shape"] else flat.reshape(n))
        at += t["bytes"]
    return out


def _variables(facts: dict[str, Any], data: bytes) -> list[np.ndarray]:
    out, at = [], 0
    for t in facts["variables"]:
        out.append(np.frombuffer(data, t["dtype"], t["size"], at).reshape(t["shape"]))
        at += t["bytes"]
    return out


def _counts(run: Run, label: str) -> list[int]:
    return [int(line.split()[1]) for line in run.text.splitlines() if line.startswith(f"{label} ")]


def _by_kind(facts: dict[str, Any], spent: list[int]) -> dict[str, int]:
    """Instructions of a run by kind of operator, the most first."""
    kinds: Counter[str] = Counter()
    for call, count in zip(facts["calls"], spent):
        kinds[call["kind"]] += count
    return dict(kinds.most_common())
