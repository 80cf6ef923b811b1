"""WFDB files (PhysioNet): headers, signals in the formats 16 and 212, annotations. Own code, bounds checked.

Format after the WFDB programmer's guide. A header line "100 2 360 650000" gives leads, rate and length; then one line
per lead: file, format, gain(baseline)/unit, resolution, zero, first value, checksum, block size, name. Format 16 is
little-endian two-byte samples; 212 packs two 12-bit samples into three bytes. An annotation is a two-byte word, ten bits
of time step and six of kind; the kinds 59 to 63 carry longer steps and fields.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from netsuke.apps.signals.ecg.record import Record, counts_per_mv
from netsuke.errors import NetsukeError

BEATS = frozenset((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 25, 30, 31, 34, 35, 38, 41))  # kinds that are a QRS
OPEN, CLOSE, P, QRS, T = 39, 40, 24, 1, 27  # the kinds "(", ")", "p", "N", "t" of delineation files
SKIP, NUM, SUB, CHN, AUX = 59, 60, 61, 62, 63
MOST_LEADS, LONGEST_HEADER = 64, 100_000
COUNT = r"[0-9]{1,15}"  # a number of leads or samples
MISSING = {"16": -(1 << 15), "212": -(1 << 11)}


@dataclass(frozen=True)
class Signal:
    """A lead's line of the header."""

    file: str
    format: str
    gain: float  # counts per millivolt
    baseline: float
    name: str


@dataclass(frozen=True)
class Annotations:
    """`samples` (A,) at the record's rate, `kinds` (A,) codes; see `BEATS` and the delineation codes above."""

    samples: np.ndarray
    kinds: np.ndarray

    @property
    def beats(self) -> np.ndarray:
        return self.samples[np.isin(self.kinds, tuple(BEATS))]


def read_header(path: Path) -> tuple[float, int | None, list[Signal], list[str]]:
    """Rate, samples per lead (None: not said), leads, comments. Raises NetsukeError for what is no usable header."""
    ask = f"read the header {path.name}"
    try:
        with open(path, "rb") as f:
            text = f.read(LONGEST_HEADER).decode("utf-8", "replace")
    except OSError as e:
        raise NetsukeError(ask, e.strerror or str(e), "a .hea file") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    comments = [line.lstrip("# ").strip() for line in lines if line.startswith("#")]
    lines = [line for line in lines if not line.startswith("#")]
    first = lines[0].split() if lines else []
    if len(first) < 2 or not re.fullmatch(COUNT, first[1]):
        raise NetsukeError(ask, "its first line is not 'name leads rate length'", "a WFDB header")
    if "/" in first[0]:
        raise NetsukeError(ask, "the record has several segments", "records in one piece")
    if len(first) < 3:
        raise NetsukeError(ask, "it names no rate (250 samples per second would be WFDB's guess)", "a rate", "--rate")
    rate = re.match(r"\d+(\.\d*)?(?=[/(]|$)", first[2])
    count = int(first[1])
    if not rate or not 1 <= count <= MOST_LEADS or len(lines) < 1 + count:
        raise NetsukeError(ask, f"{count} leads at rate {first[2]!r} in {len(lines)} lines", f"1 to {MOST_LEADS} leads")
    length = int(first[3]) if len(first) > 3 and re.fullmatch(COUNT, first[3]) and int(first[3]) else None
    return float(rate.group()), length, [_signal(line, ask) for line in lines[1 : 1 + count]], comments


def _signal(line: str, ask: str) -> Signal:
    part = line.split(maxsplit=8)
    if len(part) < 2:
        raise NetsukeError(ask, f"the line {line!r} describes no lead", "file, format, gain …")
    if not re.fullmatch(r"(16|212)", part[1]):
        raise NetsukeError(ask, f"{part[0]} has the format {part[1]}", "the formats 16 and 212, one sample per frame")
    if Path(part[0]).name != part[0] or part[0] in ("-", "~"):
        raise NetsukeError(ask, f"the signal file {part[0]!r} is not beside its header", "a plain file name")
    got = re.fullmatch(r"([-+0-9.eE]+)(?:\(([-+]?[0-9]{1,9})\))?(?:/(\S+))?", part[2]) if len(part) > 2 else None
    try:
        gain = float(got.group(1)) if got else 0.0
    except ValueError:
        gain = 0.0
    zero = part[4] if len(part) > 4 and re.fullmatch(r"-?[0-9]{1,9}", part[4]) else "0"
    if not 0 < gain < 1e9:
        raise NetsukeError(
            ask, f"{part[0]} is not calibrated (gain {part[2] if len(part) > 2 else 'absent'})", "counts per millivolt",
            "the gain in the header, for instance 200/mV",
        )  # fmt: skip
    unit = got.group(3) or "mV"
    if unit.lower() not in ("v", "mv", "uv", "µv", "nv"):
        raise NetsukeError(ask, f"{part[0]} is in {unit}", "a voltage: V, mV, uV or nV")
    name = part[8] if len(part) > 8 else part[0]
    return Signal(part[0], part[1], gain * counts_per_mv(unit, ask), float(got.group(2) or zero), name)


def read_wfdb(path: Path, rate: float | None = None) -> Record:
    """The record of a header file (or of a name without ending). Signals are memory-mapped (16) or unpacked (212)."""
    path = path if path.suffix == ".hea" else path.with_name(path.name + ".hea")
    fs, length, leads, comments = read_header(path)
    files = {s.file for s in leads}
    if len(files) != 1:
        raise NetsukeError(f"read {path.name}", f"its leads lie in {len(files)} files", "records in one signal file")
    format_, count = leads[0].format, len(leads)
    if any(s.format != format_ for s in leads):
        raise NetsukeError(f"read {path.name}", "its leads have several formats", "one format per file")
    data = _open(path.with_name(leads[0].file), format_, count, length)
    about = _about(comments)
    return Record(
        data.T, rate or fs, tuple(s.name for s in leads), np.array([s.gain for s in leads]),
        np.array([s.baseline for s in leads]), path.stem, **about, missing=MISSING[format_], notes=tuple(comments),
    )  # fmt: skip


def _open(path: Path, format_: str, leads: int, length: int | None) -> np.ndarray:
    """(N, leads) int16."""
    ask = f"read the signals {path.name}"
    try:
        size = path.stat().st_size
    except OSError as e:
        raise NetsukeError(ask, e.strerror or str(e), "the .dat file beside its header") from None
    per = leads * 2 if format_ == "16" else leads * 1.5
    have = int(size // per)
    if have < 1 or (length is not None and have < length):
        raise NetsukeError(ask, f"it has {have} samples per lead, the header promises {length}", "the whole file")
    length = length or have
    if format_ == "16":
        return np.memmap(path, dtype="<i2", mode="r", shape=(length, leads))
    with open(path, "rb") as f:
        return _unpack_212(f, length * leads).reshape(length, leads)


def _unpack_212(f: BinaryIO, count: int) -> np.ndarray:
    """`count` 12-bit samples, in stretches so that a day of signal needs no wide intermediates."""
    out = np.empty(count + count % 2, dtype=np.int16)
    for start in range(0, (count + 1) // 2, 1 << 17):
        stop = min((count + 1) // 2, start + (1 << 17))
        raw = np.fromfile(f, dtype=np.uint8, count=3 * (stop - start))
        raw = np.concatenate((raw, np.zeros(3 * (stop - start) - len(raw), np.uint8))).reshape(-1, 3).astype(np.int16)
        first = raw[:, 0] | ((raw[:, 1] & 15) << 8)
        second = raw[:, 2] | ((raw[:, 1] >> 4) << 8)
        pair = np.stack((first, second), axis=1).reshape(-1)
        out[2 * start : 2 * stop] = (pair ^ 0x800) - 0x800  # twelve bits with their sign
    return out[:count]


def _about(comments: list[str]) -> dict[str, object]:
    """Sex and age from comments such as '69 M 1085' (MIT-BIH) or '<age>: 51' and '<sex>: F' (LUDB)."""
    text = "\n".join(comments)
    age = re.search(r"<?age>?:\s*(\d+)", text, re.I) or re.search(r"^(\d+) [MF] ", text, re.M)
    sex = re.search(r"<?sex>?:\s*([MF])", text, re.I) or re.search(r"^\d+ ([MF]) ", text, re.M)
    return {"age": float(age.group(1)) if age else None, "sex": sex.group(1).upper() if sex else ""}


def read_annotations(path: Path) -> Annotations:
    """An annotation file of the MIT format. Raises NetsukeError when it is empty or ends inside a field."""
    ask = f"read the annotations {path.name}"
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise NetsukeError(ask, e.strerror or str(e)) from None
    words = np.frombuffer(raw[: len(raw) // 2 * 2], dtype="<u2")
    samples, kinds, now, i = [], [], 0, 0
    while i < len(words) and words[i]:
        kind, step = int(words[i] >> 10), int(words[i] & 1023)
        i += 1
        if kind == SKIP:
            if i + 2 > len(words):
                raise NetsukeError(ask, "it ends inside a long step", "the whole file")
            jump = (int(words[i]) << 16) | int(words[i + 1])  # high word first
            now += jump - (1 << 32) if jump >> 31 else jump
            i += 2
        elif kind == AUX:
            i += (step + 1) // 2
        elif kind in (NUM, SUB, CHN):
            continue
        else:
            now += step
            samples.append(now)
            kinds.append(kind)
    if not samples or i > len(words):
        raise NetsukeError(ask, "it holds no whole annotation", "an annotation file of the MIT format")
    return Annotations(np.array(samples), np.array(kinds))


def waves(a: Annotations) -> np.ndarray:
    """Delineation marks "( p ) ( N ) ( t )" -> (W, 4) rows of kind (0 P, 1 QRS, 2 T), onset, peak, offset; -1 missing."""
    rows = []
    kind_of = {P: 0, QRS: 1, T: 2}
    for i, code in enumerate(a.kinds):
        if int(code) in kind_of:
            before = a.samples[i - 1] if i and a.kinds[i - 1] == OPEN else -1
            after = a.samples[i + 1] if i + 1 < len(a.kinds) and a.kinds[i + 1] == CLOSE else -1
            rows.append((kind_of[int(code)], before, a.samples[i], after))
    return np.array(rows, dtype=np.int64).reshape(-1, 4)
