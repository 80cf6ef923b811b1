"""A record: one or several leads in millivolt at one rate, with names; what every reader makes and every step takes."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from netsuke.errors import NetsukeError

SLOWEST, FASTEST = 100.0, 10_000.0  # samples per second: a QRS of 80 ms needs eight of them
SHORTEST = 3.0  # seconds: three beats at 60 a minute
LIMB = ("I", "II", "III", "AVR", "AVL", "AVF")
TO_MV = {"v": 1e3, "mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "nv": 1e-6}


@dataclass(frozen=True)
class Record:
    """`signals` (leads, N), anything NumPy can slice; millivolt = (signals - offset) / gain per lead.

    Readers of large files hand over a memory map, so a day of signal costs no memory until a block is asked for.
    Samples that the file calls missing are NaN after `millivolts`.
    """

    signals: Any
    fs: float
    leads: tuple[str, ...]
    gain: np.ndarray  # (leads,) units of the file per millivolt
    offset: np.ndarray  # (leads,) units of the file at 0 mV
    name: str = ""
    sex: str = ""  # "F", "M" or unknown
    age: float | None = None
    missing: int | None = None  # the code of a missing sample
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        check_rate(self.fs, self.name)

    @property
    def samples(self) -> int:
        return self.signals.shape[1]

    @property
    def seconds(self) -> float:
        return self.samples / self.fs

    def lead_index(self, lead: str | None) -> int:
        """Position of a lead by name (capitals do not matter) or number from 0; None: II if there is one, else 0."""
        known = [n.upper() for n in self.leads]
        if lead is None:
            return next((known.index(n) for n in ("II", "MLII") if n in known), 0)
        if lead.upper() in known:
            return known.index(lead.upper())
        if lead.isdigit() and int(lead) < len(known):
            return int(lead)
        raise NetsukeError(f"read lead {lead!r} of {self.name}", "there is no such lead", ", ".join(self.leads))

    def millivolts(self, lead: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """(n,) float64 mV of one lead, NaN where a sample is missing."""
        raw = np.asarray(self.signals[lead, start:stop])
        out = (raw - float(self.offset[lead])) / float(self.gain[lead])
        return np.where(raw == self.missing, np.nan, out) if self.missing is not None else out

    def forget(self) -> None:
        """Gives back the pages of a memory-mapped file that were read so far: a day's file need not stay in memory."""
        base = self.signals
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
            base.madvise(mmap.MADV_DONTNEED)


def check_rate(fs: float, name: str = "a record") -> None:
    if not (isinstance(fs, int | float) and SLOWEST <= fs <= FASTEST):
        raise NetsukeError(
            f"read {name}", f"its rate is {fs} samples per second", f"{SLOWEST:g} to {FASTEST:g} Hz",
            "--rate with the number of samples per second",
        )  # fmt: skip


def of_array(
    x: Any, fs: float | None, leads: tuple[str, ...] = (), unit: str = "mV", name: str = "the array"
) -> Record:
    """A Record from (N,) or (leads, N) numbers at `fs` Hz in `unit` (V, mV, uV, nV, or "N/mV": N counts per mV).

    Raises NetsukeError for a missing rate, an unknown unit, anything but numbers, or a wrong shape.
    """
    ask = f"read {name}"
    if fs is None:
        raise NetsukeError(ask, "nothing says how many samples there are per second", "", "--rate 250")
    check_rate(fs, name)
    x = np.asarray(x)
    if x.dtype.kind not in "iuf":
        raise NetsukeError(ask, f"it holds {x.dtype}, not numbers", "integers or floats")
    if x.ndim == 1:
        x = x[None]
    if x.ndim != 2 or not x.size:
        raise NetsukeError(ask, f"its shape is {x.shape}", "(N,) or (leads, N)")
    if x.shape[0] > x.shape[1]:
        raise NetsukeError(
            ask, f"it has {x.shape[0]} leads of {x.shape[1]} samples", "(leads, N) with more samples than leads",
            "the transpose",
        )  # fmt: skip
    names = leads or (("lead",) if len(x) == 1 else tuple(str(i) for i in range(len(x))))
    if len(names) != len(x):
        raise NetsukeError(ask, f"{len(names)} lead names for {len(x)} leads", "one name per lead")
    gain = np.full(len(x), counts_per_mv(unit, ask))
    return Record(x, float(fs), tuple(names), gain, np.zeros(len(x)), name)


def counts_per_mv(unit: str, ask: str) -> float:
    """ "uV" -> 1000, "200/mV" -> 200. Raises NetsukeError for anything else."""
    text = unit.strip().lower()
    if text in TO_MV:
        return 1 / TO_MV[text]
    number, slash, rest = text.partition("/")
    try:
        value = float(number) if slash and rest == "mv" else float("nan")
    except ValueError:
        value = float("nan")
    if not 0 < value < 1e9:
        raise NetsukeError(ask, f"the unit {unit!r} is unknown", "V, mV, uV, nV, or counts such as 200/mV")
    return value
