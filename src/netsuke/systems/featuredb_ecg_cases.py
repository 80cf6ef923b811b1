"""Cases of the FeatureDB-ECG claims: LUDB judged by folds, R peaks of MIT-BIH 100, and signals spoiled on purpose.

A spoiled case is a row of counts: how many values were graded good, fair or poor, how many were refused with a reason,
and how many were confidently wrong: graded good and off by more than `TOLERANCE`. The clean signal is a row like any
other, since an honest grade has its misses there too.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.apps.signals.ecg import device, evaluate, synthetic, wfdb
from netsuke.apps.signals.ecg.conditioning import RATE, resample
from netsuke.apps.signals.ecg.parameters import Value
from netsuke.apps.signals.ecg.pipeline import Analysis, analyse
from netsuke.apps.signals.ecg.record import of_array
from netsuke.apps.signals.ecg.reference import Marked, fold_weights, ludb
from netsuke.data.catalogue import find
from netsuke.devices.board import missing_tools

MITDB = "featuredb-ecg/wfdb-sample/100.hea"
TOLERANCE = {
    "heart rate": 5.0,
    "PR": 40.0,
    "QRS": 40.0,
    "QT": 60.0,
}  # /min and ms: twice the spread of two cardiologists
RATES = (30, 45, 60, 80, 100, 120, 140, 160, 180, 200, 220)


@functools.cache
def people(lead: str, quick: bool) -> tuple[Marked, ...]:
    rows = ludb(lead)
    return tuple(rows[::5] if quick else rows)


@functools.cache
def judged(lead: str, method: str, quick: bool) -> dict[str, Any]:
    """Agreement of a method with LUDB's marks on one lead; the network never saw the person it marks."""
    return evaluate.judge(people(lead, quick), method, fold_weights)


@functools.cache
def shuffled(lead: str, quick: bool) -> dict[str, Any]:
    """The control: every person is given the answers for another one."""
    rows = people(lead, quick)
    answers = [np.append(r["found"], 1.0) for r in judged(lead, "netsuke", quick)["rows"]]
    order = np.random.default_rng(0).permutation(len(rows))
    return evaluate.table(list(rows), [answers[i] for i in order])


@functools.cache
def mit_peaks(quick: bool, moved: float = 0.0) -> dict[str, float]:
    """Sensitivity and predictivity on record 100 of MIT-BIH (the first five minutes if quick), `moved` s past its marks."""
    path = find(MITDB)
    record, wanted = wfdb.read_wfdb(path), wfdb.read_annotations(path.with_suffix(".atr")).beats
    stop = round(300 * record.fs) if quick else record.samples
    got = analyse(of_array(record.millivolts(0, 0, stop), record.fs), across=False)
    hits, misses, false = evaluate.matched((got.r + moved) * record.fs, wanted[wanted < stop], record.fs)
    return {
        "beats": hits + misses, "sensitivity": hits / (hits + misses), "predictivity": hits / max(hits + false, 1)
    }  # fmt: skip


CHILD = """
import json, sys, time
begin = time.perf_counter()
from netsuke.apps.signals.ecg.pipeline import analyse
from netsuke.apps.signals.ecg.read import read
from netsuke.apps.signals.ecg.report import text
a = analyse(read(sys.argv[1], rate=250, unit="1000/mV"))
words = text(a)
from netsuke.measure.peak import resident
seconds = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time()}
print(json.dumps({**seconds, "beats": len(a.r), "hours": a.seconds / 3600,
                  "peak_mb": resident()["mark"] / 1e6}))
"""


def day_long(hours: float = 24.0) -> dict[str, float]:
    """Seconds (of the clock, of the core) and peak memory (MB) of a fresh process that reports `hours` of one lead at
    250 Hz: record 100 of MIT-BIH over and over with 20 µV of noise, as a NumPy file of 16-bit counts."""
    record = wfdb.read_wfdb(find(MITDB))
    x, rng, total = resample(record.millivolts(0), record.fs), np.random.default_rng(0), round(hours * 3600 * RATE)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "day.npy"
        out = np.lib.format.open_memmap(path, "w+", np.int16, (total,))
        for k in range(0, total, len(x)):
            part = x[: total - k]
            out[k : k + len(part)] = np.rint(1000 * (part + rng.normal(0, 0.02, len(part))))
        out.flush()
        job = [sys.executable, "-c", CHILD, str(path)]
        return json.loads(subprocess.run(job, capture_output=True, text=True, check=True).stdout)


@dataclass
class Row:
    """Counts of one spoiled case over its signals and the four values."""

    case: str
    graded: bool = True  # False: every number counts as graded good
    grades: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("good", "fair", "poor", "refused"), 0))
    wrong: int = 0
    spoiled: int = 0  # wrong here, but not on the clean signal
    unexplained: int = 0
    flags: dict[str, int] = field(default_factory=dict)
    worst: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)  # of `worst`, those that the clean signal lacks
    where: set[str] = field(default_factory=set)  # of the wrong ones: "61 QT"

    def add(self, got: Analysis, truth: dict[str, float], name: str, known: set[str] = frozenset()) -> None:
        """`truth` per value; NaN: there is nothing to measure, so any answer graded good is wrong. `known`: wrong before."""
        for key, true in truth.items():
            v: Value = got.values[key]
            quality = "refused" if v.value is None else v.quality if self.graded else "good"
            self.grades[quality] += 1
            self.unexplained += v.value is None and not v.reason
            if v.value is not None and quality == "good" and not abs(float(v.value) - true) <= TOLERANCE[key]:
                self.wrong += 1
                self.where.add(f"{name} {key}")
                self.worst.append(f"{name}: {key} {float(v.value):.0f}, true {true:.0f}")
                if f"{name} {key}" not in known:
                    self.spoiled += 1
                    self.fresh.append(f"{self.case}, {self.worst[-1]}")
        for f in got.flags:
            self.flags[f] = self.flags.get(f, 0) + 1

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("where", "graded", "fresh")} | {
            "worst": self.worst[:6]
        }


def hum(f: float, size: float) -> Callable:
    return lambda x, fs, rng: x + size * np.sin(2 * np.pi * f * np.arange(len(x)) / fs + rng.uniform(0, 6))


def wander(x: np.ndarray, fs: float, rng: np.random.Generator) -> np.ndarray:
    t = np.arange(len(x)) / fs
    return x + sum(a * np.sin(2 * np.pi * f * t + rng.uniform(0, 6)) for a, f in ((1.0, 0.15), (0.4, 0.31)))


def muscle(decibel: float) -> Callable:
    """White noise below the signal's power by so many decibels (the signal: 0.5 to 40 Hz, without its baseline)."""

    def spoil(x: np.ndarray, fs: float, rng: np.random.Generator) -> np.ndarray:
        power = float(np.var(x - np.median(x)))
        return x + rng.normal(0, np.sqrt(power / 10 ** (decibel / 10)), len(x))

    return spoil


def clipped(x: np.ndarray, fs: float, rng: np.random.Generator) -> np.ndarray:
    low, high = np.quantile(x, (0.01, 0.99))
    return np.clip(x, 0.5 * low, 0.5 * high)


def lead_off(share: float) -> Callable:
    """The electrode falls off for the last `share` of the record."""

    def spoil(x: np.ndarray, fs: float, rng: np.random.Generator) -> np.ndarray:
        out = x.copy()
        out[round((1 - share) * len(x)) :] = 0.0
        return out

    return spoil


SPOILED: dict[str, Callable] = {
    "clean": lambda x, fs, rng: x,
    "mains hum 50 Hz, 0.2 mV": hum(50, 0.2),
    "mains hum 60 Hz, 0.2 mV": hum(60, 0.2),
    "baseline wander 1.4 mV": wander,
    "noise, 6 dB": muscle(6),
    "noise, 0 dB": muscle(0),
    "clipped at half height": clipped,
    "lead off for a third": lead_off(1 / 3),
    "inverted": lambda x, fs, rng: -x,
    "samples missing (5 %)": lambda x, fs, rng: np.where(rng.random(len(x)) < 0.05, np.nan, x),
    "µV taken for mV": lambda x, fs, rng: 1000 * x,
    "V taken for mV": lambda x, fs, rng: x / 1000,
}
NOTHING: dict[str, Callable] = {
    "lead off": lambda n, rng: np.zeros(n),
    "white noise": lambda n, rng: rng.normal(0, 0.3, n),
    "mains hum alone": lambda n, rng: np.sin(2 * np.pi * 50 * np.arange(n) / 500) + rng.normal(0, 0.003, n),
    "a drifting baseline": lambda n, rng: np.cumsum(rng.normal(0, 0.01, n)),
}


def truth_of(m: Marked) -> dict[str, float]:
    pr, qrs, qt, rr = m.intervals()
    return {"heart rate": 60 / rr, "PR": pr, "QRS": qrs, "QT": qt}


def steady(m: Marked) -> bool:
    """Whether the marked rhythm has one rate to be right or wrong about."""
    rr = np.diff(m.r)
    return len(rr) > 2 and np.ptp(rr) < 0.3 * np.median(rr)


def robustness(quick: bool = False, graded: bool = True) -> Iterator[Row]:
    """Spoiled LUDB records (leads I and II by turns, weights of their folds), signals without a heart, made hearts.

    Not `graded` is the control: what was refused stays refused, all other numbers count as graded good.
    """
    step = 20 if quick else 4
    chosen = [m for i, m in enumerate(zip(ludb("I"), ludb("II"))) if i % step == 0]
    known: set[str] = set()
    for case, spoil in SPOILED.items():
        out, rng = Row(case, graded), np.random.default_rng(1)
        for i, pair in enumerate(chosen):
            m = pair[i % 2]
            if steady(m):
                got = analyse(of_array(spoil(m.x, m.fs, rng), m.fs, (m.lead,)), weights=fold_weights(m), across=False)
                out.add(got, truth_of(m), m.name, known if case != "clean" else out.where)
        known |= out.where if case == "clean" else set()
        yield out
    nothing = dict.fromkeys(TOLERANCE, float("nan"))
    for case, make in NOTHING.items():
        out, rng = Row(case, graded), np.random.default_rng(2)
        for k in range(3 if quick else 20):
            out.add(analyse(of_array(make(5000, rng), 500.0)), nothing, str(k))
        yield out
    yield from hearts(quick, graded)


def hearts(quick: bool, graded: bool = True) -> Iterator[Row]:
    """Made hearts: 30 to 220 a minute at 250 and 500 Hz, fibrillation, pacing."""
    count = 1 if quick else 5
    kinds = [(f"{r} a minute", {"rate": r}) for r in RATES]
    kinds += [("fibrillation", {"rate": 95, "rhythm": "fibrillation"}), ("paced", {"rate": 70, "rhythm": "paced"})]
    for case, knobs in kinds:
        out = Row(f"made heart, {case}", graded)
        for k in range(count):
            for fs in (250.0, 500.0):
                h = synthetic.heart(seconds=20, fs=fs, seed=k, **knobs)
                rate = 60 / float(np.median(np.diff(h.r)))
                truth = {"heart rate": rate, "PR": h.pr, "QRS": h.qrs, "QT": h.qt}
                out.add(analyse(of_array(h.x, fs)), truth, f"{fs:g} Hz")
        yield out


def unlike(python: Analysis, c: device.Report, ms: float) -> list[str]:
    """Where the form in C differs from Python: a value by more than `ms` (RR: a thousandth of it), a grade, a reason."""
    out = []
    for name in device.VALUES:
        a, b = python.values.get(name), c.values[name]
        if a is None:  # RR without a beat: only C has a row for it
            continue
        if a.value is None or b.value is None or (a.quality, a.reason) != (b.quality, b.reason):
            if (a.value is None, a.quality, a.reason) != (b.value is None, b.quality, b.reason):
                out.append(f"{name} {a.value} {a.quality} {a.reason}, in C {b.value} {b.quality} {b.reason}")
        elif not abs(float(a.value) - float(b.value)) <= ms / (1000 if name == "RR used" else 1):
            out.append(f"{name} {a.value}, in C {b.value}")
    if set(python.flags) != set(c.flags):
        out.append(f"flags {sorted(python.flags)}, in C {sorted(c.flags)}")
    return out


def in_c(quick: bool, other: bool = False) -> dict[str, Any]:
    """LUDB, leads I and II, in C on this computer beside Python; the first record on an emulated Cortex-M4F at 250 Hz.

    `other`: the C is given the next person's lead.
    """
    host, exceptions, largest, spent = device.OnHost(500), [], 0.0, []
    for lead in ("I", "II"):
        rows = people(lead, quick)
        for m, given in zip(rows, [*rows[1:], rows[0]] if other else rows):
            x = np.asarray(given.x, np.float32)
            start = time.process_time()
            host.raw(x)
            spent.append(1e3 * (time.process_time() - start))
            python, c = analyse(of_array(m.x, m.fs, (lead,)), across=False), host(x)
            if found := unlike(python, c, device.TOLERANCE):
                exceptions.append(f"{m.name} {lead}: {found[0]}")
            for k in ("PR", "QRS", "QT"):
                if python.values[k].value is not None and c.values[k].value is not None:
                    largest = max(largest, abs(float(python.values[k].value) - float(c.values[k].value)))
    out = {"records": len(spent), "exceptions": exceptions, "largest_ms": largest, "native_ms": float(np.median(spent))}
    if not missing_tools():
        first = people("II", quick)[0]
        for fs, x in ((250, resample(first.x, first.fs)), (500, first.x)):
            run = device.on_board(x[None], fs)
            out[f"board {fs}"] = {
                "per_second": run.per_second, "ram": run.ram + run.stack, "flash": run.flash
            }  # fmt: skip
    return out
