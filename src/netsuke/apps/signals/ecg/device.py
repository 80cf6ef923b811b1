"""The default pipeline in C99 for a microcontroller, its run on this computer and on an emulated board.

    src/ns_ecg*.c, .h       conditioning, R peaks, representative beat, network, intervals: as in this package, in float32
    src/ns_ecg_tables.*     filters, thresholds and weights, printed from this package
    test/ecg_test.c         a known block: `make test`
    Makefile, ecg.json

A block is 10 s of one lead at a fixed rate (100 to 1000 Hz, whole): samples are pushed one by one and resampled to 250 Hz
as they come; when the block is full, all is computed at once, zero phase, with the edges that Python has. Latency is thus
the block. The whole memory is one struct, no heap: 23 KB at 250 Hz, 28 KB at 500 Hz, where pacing spikes are looked for.
What Python does beyond a block (trend, variability, single beats' marks, shapes) is not in C.
"""

from __future__ import annotations

import ctypes
import json
import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.apps.signals.ecg import beats, conditioning, delineate, network, parameters, quality, rpeaks
from netsuke.apps.signals.ecg.parameters import Value
from netsuke.errors import NetsukeError
from netsuke.models.artifact import check_folder, write_texts

SOURCES = Path(__file__).parent / "csrc"
FORMAT, FACTS = "netsuke-ecg-c", "ecg.json"
CORE = (
    "ns_ecg.h", "ns_ecg_parts.h", "ns_ecg.c", "ns_ecg_filter.c", "ns_ecg_input.c", "ns_ecg_rpeaks.c", "ns_ecg_beats.c",
    "ns_ecg_network.c",
)  # fmt: skip
TABLES = ("ns_ecg_tables.h", "ns_ecg_tables.c")
FLAGS = ("-std=c99", "-O3", "-Wall", "-Wextra", "-ffp-contract=off")
SECONDS = 10
TOLERANCE = 2.0  # ms (for the rate: per minute) between C and Python
RATES = range(100, 1001)  # Hz that samples may be pushed at
SPIKE_RATE = 360  # Hz: quality.pacing_spikes
GRADES = ("none", "poor", "fair", "good")
UNITS = {"RR used": "s", "heart rate": "/min"}  # the others are in ms
VALUES = (*parameters.PARTS, *(f"QTc {n}" for n in parameters.QTC), "RR used", "heart rate")
FLAG_NAMES = (*quality.SENTENCES, "missing in part")
CAUSES = {
    "no P": "no P wave is seen before the QRS", "P order": "the marks of the P wave are out of order",
    "QRS order": "the marks of the QRS are out of order", "T order": "the marks of the T wave are out of order",
    "not found": "the wave was not found",
}  # fmt: skip
REASONS = ("", *(quality.sentence(f) for f in FLAG_NAMES), *CAUSES.values())
BEATS = conditioning.RATE * SECONDS // rpeaks.REFRACTORY + 2
UNIT_NAMES = {k: UNITS.get(k, "ms") for k in VALUES}

VALUE = np.dtype([("value", "<f4"), ("plus_minus", "<f4"), ("quality", "<i4"), ("reason", "<i4"), ("beats", "<i4")])
REPORT = np.dtype([
    ("values", VALUE, len(VALUES)), ("flags", "<u4"), ("peaks", "<i4"), ("used", "<i4"), ("p_present", "<f4"),
    ("rr", "<f4"), ("noise", "<f4"), ("marks", "<f4", 8), ("spread", "<f4", 8), ("r", "<f4", BEATS),
])  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What C found in a block: `values` as pipeline.analyse names them, `flags`, `r` (P,) samples at 250 Hz, `marks` (8,) of
    the representative beat in samples from R."""

    values: dict[str, Value]
    flags: list[str]
    r: np.ndarray
    marks: np.ndarray
    p_present: float


@dataclass(frozen=True)
class Emulated:
    """Blocks on a board. `instructions` (blocks,) of all, `pushing` (blocks,) of these while samples come; bytes of flash and
    of RAM without the board's start-up code, with the C library's; the stack's largest use."""

    reports: list[Report]
    instructions: np.ndarray
    pushing: np.ndarray
    flash: int
    ram: int
    stack: int

    @property
    def per_second(self) -> float:
        """Instructions per second of signal: median over the blocks."""
        return float(np.median(self.instructions)) / SECONDS


def upper(name: str) -> str:
    return re.sub(r"\W+", "_", name).upper()


def render(template: str, **view: Any) -> str:
    """A template of csrc/ with the C home's filters for numbers and names."""
    from netsuke.export.c.source import environment

    return environment().from_string((SOURCES / template).read_text()).render(view)


def mask(names: tuple[str, ...]) -> int:
    return sum(1 << FLAG_NAMES.index(n) for n in names)


def constants(fs: int) -> dict[str, int | float]:
    """NS_ECG_ names and numbers of the settings that C shares with Python."""
    c, r, b, d, n, q, p = conditioning, rpeaks, beats, delineate, network, quality, parameters
    return {
        "RATE": c.RATE, "PAD": c.PAD, "HUM": c.HUM, "WIDTH": r.WIDTH, "REFRACTORY": r.REFRACTORY,
        "T_REGION": r.T_REGION, "STRETCH": r.STRETCH, "SHARE": r.SHARE, "SEARCH_BACK": r.SEARCH_BACK, "SNAP": r.SNAP,
        "BEFORE": b.BEFORE, "AFTER": b.AFTER, "LENGTH": b.LENGTH, "CORE_BEFORE": b.BEFORE - b.CORE.start,
        "CORE_AFTER": b.CORE.stop - b.BEFORE, "SHIFT": b.SHIFT, "LIKE": b.LIKE, "EARLY": b.EARLY, "P_SURE": d.P_SURE,
        **{f"P_SURE_IF_{upper(k)}": v for k, v in d.P_SURE_IF.items()}, "STRIDE": n.STRIDE, "KERNEL": n.KERNEL,
        "QRS_REACH": n.QRS_REACH, "HALF": n.HALF, "COARSE": len(n.COARSE), "P_POSITIONS": int(n.P_TIMES.sum()),
        "BLOCKS": len(n.DILATIONS), "HUM_FLAG": q.HUM_FLAG, "FLAT": q.FLAT, "NOISY": q.NOISY, "VERY_NOISY": q.VERY_NOISY,
        "UNSTEADY": q.UNSTEADY, "FASTEST_RR": q.FASTEST_RR, "BRISK_RR": q.BRISK_RR, "FAIR_FROM": p.FAIR,
        "POOR_FROM": p.POOR, "P_CERTAIN": p.P_CERTAIN, "SEVERE": mask(q.SEVERE), "DOUBTFUL": mask(p.DOUBTFUL),
        "SPIKE_WIDTH": max(1, round(0.002 * fs)),
    }  # fmt: skip


def layers(name: str) -> dict[str, np.ndarray]:
    """C name -> weights of the network as (taps, inputs, outputs)."""
    w = network.weights(name)
    rows = {"input_weight": w["input.weight"], "marks": w["marks.weight"]}
    rows |= {f"block{i}": w[f"blocks.{i}.weight"] for i in range(len(network.DILATIONS))}
    out = {k: np.ascontiguousarray(v.transpose(2, 1, 0)) for k, v in rows.items()}
    out |= {"present": w["present.weight"][0], "present_bias": w["present.bias"]}
    out |= {"input_bias": w["input.bias"], "marks_bias": w["marks.bias"]}
    return out | {f"block{i}_bias": w[f"blocks.{i}.bias"] for i in range(len(network.DILATIONS))}


def filters() -> dict[str, np.ndarray]:
    """C name -> rows of b0 b1 b2 a1 a2 and the state after a long row of ones."""
    from scipy import signal

    out = {}
    for kind in ("band", "qrs", "rumble", "50", "60"):
        sos = conditioning.sections(kind)
        rows = np.concatenate((sos[:, :3], sos[:, 4:], signal.sosfilt_zi(sos)), axis=1)
        out["mains" + kind if kind.isdigit() else kind] = rows.astype(np.float32)
    return out


def sources(fs: int = conditioning.RATE, weights: str = "default") -> dict[str, str]:
    """File name -> text of the pipeline in C for samples at `fs` Hz.

    Raises NetsukeError for a rate that is not whole or outside of 100 to 1000 Hz, and for unknown weights.
    """
    if fs != int(fs) or int(fs) not in RATES:
        raise NetsukeError(
            f"print the pipeline in C for {fs:g} Hz", "the rate does not fit",
            f"whole numbers from {RATES.start} to {RATES.stop - 1}", "resample on the host, or another recorder rate",
        )  # fmt: skip
    fs, arrays = int(fs), layers(weights)
    region = [network.REGION.get(m) or network.REGION[m[0]] for m in network.MARKS]
    w = network.weights(weights)["input.weight"]
    view = {
        "fs": fs, "rate": conditioning.RATE, "seconds": SECONDS, "beats": BEATS, "title": weights, "filters": filters(),
        "spikes": fs * SECONDS if fs >= SPIKE_RATE else 0, "spike_rate": SPIKE_RATE, "weights": arrays,
        "constants": constants(fs) | {"WIDE": w.shape[0], "INPUT_TAPS": w.shape[2]},
        "marks": [upper(m) for m in network.MARKS], "values": [upper(v) for v in VALUES],
        "grades": [upper(g) for g in GRADES], "flags": [upper(f) for f in FLAG_NAMES],
        "causes": [upper(c) for c in CAUSES], "region": np.array(region, dtype=np.float32),
    }  # fmt: skip
    out = {name: (SOURCES / name).read_text() for name in CORE}
    return out | {name: render(f"{name}.j2", **view) for name in TABLES}


def self_test(fs: int, weights: str) -> str:
    """A C program that holds a block and what Python finds in it."""
    from netsuke.apps.signals.ecg.pipeline import intervals
    from netsuke.apps.signals.ecg.synthetic import heart

    counts = np.rint(1e3 * heart(seconds=SECONDS, fs=float(fs), rate=70, seed=0).x[: fs * SECONDS]).astype(np.int16)
    got = intervals(counts * 1e-3, float(fs), weights=weights)
    wanted = np.array([got[k].value for k in VALUES], dtype=np.float32)
    return render("test.c.j2", seen=counts, wanted=wanted, seconds=SECONDS, tolerance=TOLERANCE)


def write_c(folder: Path, fs: int = conditioning.RATE, weights: str = "default") -> dict[str, Any]:
    """Writes the folder: src/, test/, Makefile, ecg.json; returns what ecg.json says: rate, block, bytes of state.

    The folder is complete or not there; one written before is replaced. Raises NetsukeError for what `sources` refuses,
    for anything else at its place and for a parent that cannot be written to.
    """
    asked = f"write the C to {folder.name}"
    folder = check_folder(folder, asked, FACTS, FORMAT)
    texts = sources(fs, weights)
    parts = sorted(name for name in texts if name.endswith(".c"))
    spikes = fs * SECONDS if fs >= SPIKE_RATE else 0
    facts = {
        "format": FORMAT, "version": 1, "rate": int(fs), "seconds": SECONDS, "weights": weights,
        "values": list(VALUES), "flags": list(FLAG_NAMES), "reasons": list(REASONS),
        "floats": 2 * conditioning.RATE * SECONDS + conditioning.PAD, "spike bytes": spikes, "latency": SECONDS,
    }  # fmt: skip
    files = {f"src/{name}": text for name, text in texts.items()}
    files |= {"test/ecg_test.c": self_test(int(fs), weights), FACTS: json.dumps(facts, indent=1) + "\n"}
    files["Makefile"] = render("Makefile.j2", parts=[p.removesuffix(".c") for p in parts])
    write_texts(folder, files, asked)
    return facts


class OnHost:
    """The C of `write_c`, compiled for this computer: `OnHost(500)(x)` gives the Report of a block x (10 fs,) mV.

    Raises NetsukeError when there is no C compiler or it refuses, and for a block of another length.
    """

    def __init__(self, fs: int = conditioning.RATE, weights: str = "default", optimise: tuple[str, ...] = ()):
        from netsuke.apps.control.simulate import compiler

        asked, cc = "run the pipeline's C here", compiler()
        if cc is None:
            raise NetsukeError(asked, "there is no C compiler", "cc or gcc", "sudo apt-get install gcc")
        self.samples = int(fs) * SECONDS
        self._folder = tempfile.TemporaryDirectory(prefix="netsuke-ecg-")
        here = Path(self._folder.name) / "ecg"
        write_c(here, fs, weights)
        built = subprocess.run(
            [cc, *FLAGS, *optimise, "-fPIC", "-shared", *map(str, (here / "src").glob("*.c")), "-lm", "-o", here / "ecg.so"],
            capture_output=True, text=True,
        )  # fmt: skip
        self.warnings = built.stderr
        if built.returncode:
            raise NetsukeError(asked, next(iter(built.stderr.splitlines()), "the compiler failed"), "C99")
        self._run = ctypes.CDLL(str(here / "ecg.so")).ns_ecg_block
        self._state, self._report = ctypes.create_string_buffer(1 << 17), np.zeros(1, REPORT)

    def raw(self, x: np.ndarray) -> np.ndarray:
        """The REPORT record of x (10 fs,) mV; float32 and contiguous arrays are not copied."""
        x = np.ascontiguousarray(x, np.float32)
        if x.shape != (self.samples,):
            raise NetsukeError("run the pipeline's C here", f"{x.shape} samples", f"a block of {self.samples}")
        address = (ctypes.addressof(self._state), x.ctypes.data, self._report.ctypes.data)
        self._run(*map(ctypes.c_void_p, address))
        return self._report[0]

    def __call__(self, x: np.ndarray) -> Report:
        return report_of(self.raw(x))


def report_of(raw: np.ndarray) -> Report:
    """A record of the C's struct as a Report."""
    values = {}
    for name, v in zip(VALUES, raw["values"]):
        spread = float(v["plus_minus"])
        values[name] = Value(
            None if v["quality"] == 0 else float(v["value"]), UNIT_NAMES[name], GRADES[v["quality"]], int(v["beats"]),
            spread if math.isfinite(spread) else None, REASONS[v["reason"]],
        )  # fmt: skip
    flags = [f for k, f in enumerate(FLAG_NAMES) if int(raw["flags"]) >> k & 1]
    r = raw["r"][: raw["peaks"]].astype(np.float64)
    return Report(values, flags, r, raw["marks"].astype(np.float64), float(raw["p_present"]))


def on_board(
    x: np.ndarray, fs: int = conditioning.RATE, core: str = "m4", weights: str = "default", optimise: str = "-O3",
    ram: int = 64 << 10, flash: int = 256 << 10,
) -> Emulated:  # fmt: skip
    """Blocks x (B, 10 fs) mV on an emulated Cortex-M4F or M7. Raises NetsukeError without its tool chain."""
    from netsuke.devices import board

    machine = board.EmulatedBoard.load(core, flash, ram)
    with tempfile.TemporaryDirectory(prefix="netsuke-ecg-") as folder:
        here = Path(folder) / "ecg"
        write_c(here, fs, weights)
        firmware = machine.build(
            [*sorted((here / "src").glob("*.c")), SOURCES / "board_main.c"], here / "out", include=[here / "src"],
            optimise=optimise,
        )  # fmt: skip
        given = np.ascontiguousarray(x, np.float32)
        run = firmware.run(files={"input.bin": given.tobytes()}, seconds=110)
    own = [size for part, size in firmware.parts.items() if part != "board"]
    counts = np.frombuffer(run.files["counts.bin"], np.uint32).reshape(-1, 2).astype(np.int64)
    reports = [report_of(r) for r in np.frombuffer(run.files["reports.bin"], REPORT)]
    return Emulated(
        reports, counts.sum(1), counts[:, 0], sum(s.text + s.data for s in own), sum(s.data + s.bss for s in own),
        run.stack_peak,
    )  # fmt: skip
