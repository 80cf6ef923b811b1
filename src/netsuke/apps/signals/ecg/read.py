"""Every file that `netsuke ecg` reads, told apart by its ending: WFDB, EDF, NumPy, CSV or plain text, wearables' JSON.

Text: one column per lead, optional names in the first line, comma, semicolon, tab or blanks between; a column named
time, t or seconds gives the rate. JSON: {"fs": 250, "unit": "mV", "leads": {"I": [...]}} or {"fs": …, "samples": [...]}.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.apps.signals.ecg.edf import read_edf
from netsuke.apps.signals.ecg.record import Record, of_array
from netsuke.apps.signals.ecg.wfdb import read_wfdb
from netsuke.errors import NetsukeError

ENDINGS = (".hea", ".dat", ".edf", ".npy", ".npz", ".csv", ".txt", ".tsv", ".json")
TIME = ("time", "t", "seconds", "sec", "s", "time_s", "timestamp")
RATE_KEYS = ("fs", "rate", "sampling_rate", "samplingRate", "sampleRate", "samplingFrequency", "frequency")
LARGEST_TEXT = 2_000_000_000
UNREADABLE = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error)  # what NumPy raises for a damaged file


def read(path: str | Path, *, rate: float | None = None, unit: str | None = None) -> Record:
    """The record in `path`. `rate` (Hz) and `unit` (V, mV, uV, nV, N/mV) for files that do not say theirs; mV if silent.

    Raises NetsukeError for anything that cannot be read: absent, unknown, truncated, without rate, not numeric.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in ENDINGS and path.with_name(path.name + ".hea").is_file():
        return read_wfdb(path, rate)
    if not path.is_file():
        raise NetsukeError(f"read {path.name or path}", "there is no such file", "", "its full path")
    if kind not in ENDINGS:
        raise NetsukeError(f"read {path.name}", f"files ending in {kind!r} are unknown", ", ".join(ENDINGS))
    if kind in (".hea", ".dat"):
        return read_wfdb(path.with_suffix(".hea"), rate)
    if kind == ".edf":
        return read_edf(path)
    if kind in (".npy", ".npz"):
        return read_numpy(path, rate, unit)
    if path.stat().st_size > LARGEST_TEXT:
        raise NetsukeError(f"read {path.name}", "the text has more than 2 GB", "", "NumPy or WFDB files")
    return (read_json if kind == ".json" else read_text)(path, rate, unit)


def read_numpy(path: Path, rate: float | None, unit: str | None) -> Record:
    """.npy: (N,) or (leads, N). .npz: `signal` or the only array; `fs`, `leads`, `unit` beside it. Never unpickled."""
    ask = f"read {path.name}"
    try:
        got = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
    except UNREADABLE as e:
        raise NetsukeError(ask, first_line(e), "numbers saved by numpy.save") from None
    if isinstance(got, np.ndarray):
        return of_array(got, rate, unit=unit or "mV", name=path.name)
    try:
        with got:
            names = list(got.files)
            wide = [n for n in names if n in ("signal", "ecg", "x")] or [n for n in names if got[n].ndim in (1, 2)][:1]
            if not wide:
                raise NetsukeError(ask, f"it holds {', '.join(names) or 'nothing'}", "an array named signal, and fs")
            fs = next((float(got[k]) for k in RATE_KEYS if k in names), None)
            leads = tuple(str(n) for n in got["leads"]) if "leads" in names else ()
            said = str(got["unit"]) if "unit" in names else "mV"
            return of_array(got[wide[0]], rate or fs, leads, unit or said, path.name)
    except (*UNREADABLE, TypeError) as e:
        raise NetsukeError(ask, first_line(e), "plain arrays") from None


def first_line(e: BaseException) -> str:
    """What NumPy, zipfile or zlib say about a damaged file, where they say anything."""
    return (str(e).splitlines() or ["the file is damaged"])[0]


def read_json(path: Path, rate: float | None, unit: str | None) -> Record:
    ask = f"read {path.name}"
    try:
        got = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise NetsukeError(ask, f"it is not JSON ({str(e)[:60]})", '{"fs": 250, "leads": {"I": [...]}}') from None
    if not isinstance(got, dict):
        raise NetsukeError(ask, "it is not an object", '{"fs": 250, "leads": {"I": [...]}}')
    fs = next((got[k] for k in RATE_KEYS if isinstance(got.get(k), int | float)), None)
    leads: Any = got.get("leads") or {"lead": got.get("samples") or got.get("ecg") or got.get("values")}
    if not isinstance(leads, dict) or not all(isinstance(v, list) for v in leads.values()):
        raise NetsukeError(ask, "it has neither leads nor samples", '{"fs": 250, "samples": [...]}')
    return of_array(
        rows_of(list(leads.values()), ask), rate or fs, tuple(leads), unit or str(got.get("unit", "mV")), path.name
    )


def rows_of(columns: list[list[Any]], ask: str) -> np.ndarray:
    """Lists of numbers (None: missing) of one length -> (leads, N) float64."""
    if len({len(c) for c in columns}) != 1:
        raise NetsukeError(
            ask, f"its leads have {', '.join(str(len(c)) for c in columns[:4])} samples", "equal lengths"
        )
    try:
        return np.array([[np.nan if v is None else float(v) for v in c] for c in columns])
    except (TypeError, ValueError, OverflowError):
        raise NetsukeError(ask, "some samples are not numbers", "numbers and null") from None


def read_text(path: Path, rate: float | None, unit: str | None) -> Record:
    """Columns of numbers; empty cells and "nan" are missing samples. A unit in brackets in a name counts: "I [uV]"."""
    ask = f"read {path.name}"
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        lines = [line for line in f if line.strip() and not line.startswith("#")]
    if not lines:
        raise NetsukeError(ask, "it is empty", "numbers, one row per sample")
    separator = next((s for s in (",", ";", "\t") if s in lines[0]), None)
    cells = [c.strip().strip('"') for c in lines[0].split(separator)]
    named = not all(is_number(c) for c in cells)
    names = cells if named else [str(i) for i in range(len(cells))]
    table, start = np.full((len(lines) - named, len(names)), np.nan), 2 if named else 1
    for i, line in enumerate(lines[named:]):
        row = line.split(separator)
        if len(row) != len(names):
            raise NetsukeError(ask, f"row {i + start} has {len(row)} cells instead of {len(names)}", "a whole table")
        for j, cell in enumerate(row):
            text = cell.strip()
            if not is_number(text):
                raise NetsukeError(ask, f"row {i + start} has {text[:20]!r} where a number belongs", "numbers")
            table[i, j] = float(text or "nan")
    clock = next((j for j, n in enumerate(names) if n.lower() in TIME), None)
    if clock is not None:
        rate = rate or rate_of(table[:, clock], ask)
        table, names = np.delete(table, clock, axis=1), names[:clock] + names[clock + 1 :]
    said = {m.group(1) for n in names if (m := re.search(r"[\[(]([^\])]+)[\])]", n))}
    plain = tuple(re.sub(r"\s*[\[(].*[\])]", "", n) or n for n in names)
    plain = ("lead",) if plain == ("0",) else plain
    return of_array(table.T, rate, plain, unit or (said.pop() if len(said) == 1 else "mV"), path.name)


def is_number(text: str) -> bool:
    try:
        float(text or "nan")
    except ValueError:
        return False
    return True


def rate_of(clock: np.ndarray, ask: str) -> float:
    """Rate of a column of seconds. Raises NetsukeError when its steps are not equal."""
    steps = np.diff(clock)
    step = float(np.median(steps)) if len(steps) else 0.0
    if not step > 0 or np.abs(steps - step).max() > 0.1 * step + 1e-3:
        raise NetsukeError(ask, "the column of times does not advance evenly", "equal steps in seconds", "--rate")
    fs = (len(clock) - 1) / float(clock[-1] - clock[0])
    return round(fs) if abs(fs - round(fs)) < 0.01 * fs else fs
