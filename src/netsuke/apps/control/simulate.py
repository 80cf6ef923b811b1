"""Closed loops of the controller's C: compiled for this computer, or for an emulated board that counts instructions.

The plant is a network too (csrc/loop.c), so a loop of thousands of ticks needs no Python.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from netsuke.apps.control.arithmetic import Array
from netsuke.apps.control.firmware import SOURCES, controller_c, plant_c
from netsuke.apps.control.loop import Trace
from netsuke.apps.control.newton import NewtonMPC
from netsuke.apps.control.predictor import Predictor
from netsuke.devices import board
from netsuke.errors import NetsukeError

FLAGS = ("-std=c99", "-O2", "-Wall", "-Wextra", "-ffp-contract=off")
NAME = "controller"
FLASH, RAM = 1 << 20, 256 << 10  # bytes, of the emulated device


@dataclass(frozen=True)
class Emulated:
    """A loop on a board: instructions of the controller per tick (T,), bytes of flash and RAM without the plant and path,
    largest use of the stack."""

    trace: Trace
    instructions: Array
    flash: int
    ram: int
    stack: int
    parts: dict[str, board.Size]


def compiler() -> str | None:
    """This computer's C compiler."""
    return shutil.which("cc") or shutil.which("gcc")


def on_host(predictor: Predictor, knobs: NewtonMPC, path: Array, start: Array, plant: Predictor | None = None) -> Trace:
    """The loop along path (T, p) from rest at `start`, in C on this computer; the plant is the model unless another is given.

    Raises NetsukeError when there is no C compiler or it refuses.
    """
    asked, cc = "run the controller's C here", compiler()
    if cc is None:
        raise NetsukeError(asked, "there is no C compiler", "cc or gcc", "sudo apt-get install gcc")
    with tempfile.TemporaryDirectory(prefix="netsuke-control-") as folder:
        here = Path(folder)
        own, around = _lay_out(here, predictor, knobs, plant or predictor)
        sources = [str(p) for p in (*own, *around, SOURCES / "host.c")]
        include = [f"-I{here}", f"-I{board.SOURCES}"]
        built = subprocess.run(
            [cc, *FLAGS, *include, *(f"-D{k}={v}" for k, v in _defines(knobs).items()), *sources, "-o", here / "loop"],
            capture_output=True, text=True,
        )  # fmt: skip
        if built.returncode:
            raise NetsukeError(asked, built.stderr.strip().splitlines()[0], "C99")
        (here / "path.bin").write_bytes(_path_bytes(path, start))
        done = subprocess.run([here / "loop"], cwd=here, capture_output=True)
        if done.returncode:
            raise NetsukeError(asked, f"it ended with the code {done.returncode}", "networks of up to 256 units")
        return _trace(predictor, path, (here / "outputs.bin").read_bytes(), (here / "controls.bin").read_bytes())


def on_board(
    predictor: Predictor, knobs: NewtonMPC, path: Array, start: Array, plant: Predictor | None = None, core: str = "m4",
    flash: int = FLASH, ram: int = RAM, optimise: str = "-O3", seconds: float = 600,
) -> Emulated:  # fmt: skip
    """The same loop on an emulated Cortex-M4F or M7. Plant, path and loop lie outside of the device's flash."""
    machine = board.EmulatedBoard.load(core, flash, ram)
    with tempfile.TemporaryDirectory(prefix="netsuke-control-") as folder:
        here = Path(folder)
        own, around = _lay_out(here, predictor, knobs, plant or predictor)
        (here / "out").mkdir()
        firmware = machine.build(
            own, here / "out", include=[here], defines=_defines(knobs), optimise=optimise, beside=around
        )
        run = firmware.run(files={"path.bin": _path_bytes(path, start)}, seconds=seconds)
    trace = _trace(predictor, path, run.files["outputs.bin"], run.files["controls.bin"])
    counts = np.frombuffer(run.files["counts.bin"], np.uint32).astype(np.int64)
    return Emulated(trace, counts, firmware.flash, firmware.ram, run.stack_peak, firmware.parts)


def _lay_out(here: Path, predictor: Predictor, knobs: NewtonMPC, plant: Predictor) -> tuple[list[Path], list[Path]]:
    """Writes the sources; (those of the firmware, those around it)."""
    files = controller_c(predictor, knobs, NAME)
    for name, text in files.items():
        (here / name).write_text(text)
    (here / "plant.c").write_text(plant_c(plant, "plant"))
    return [here / f for f in files if f.endswith(".c")], [here / "plant.c", SOURCES / "loop.c"]


def _defines(knobs: NewtonMPC) -> dict[str, str | int]:
    return {"NAME": NAME, "HORIZON": knobs.last}


def _path_bytes(path: Array, start: Array) -> bytes:
    return np.concatenate([np.float32(start)[None], np.float32(path)]).tobytes()


def _trace(predictor: Predictor, path: Array, outputs: bytes, controls: bytes) -> Trace:
    y = np.frombuffer(outputs, np.float32).reshape(-1, predictor.outputs)
    u = np.frombuffer(controls, np.float32).reshape(-1, predictor.controls)
    return Trace(y, np.asarray(path, np.float64), u)
