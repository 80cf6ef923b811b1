"""Series from files and arrays: columns, dates in equal steps, missing values.

A CSV has a header, a column of dates if it likes (its name holds "date" or "time", or it is the first and begins with
one), and numeric columns. Empty cells, NA, NaN and null are missing. Missing rows (a gap in the dates) become missing values.
"""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from netsuke.apps.signals.forecast.fold import Array
from netsuke.errors import NetsukeError

MISSING = ("", "na", "nan", "null", "none", "-")
LARGEST_FILE = 1 << 30  # bytes
LARGEST_SHARE = 0.5  # of a column that may be missing
POLICIES = ("fill", "error")


@dataclass
class Series:
    """values (T, channels) float64 with NaN where missing; start and step when the file has dates."""

    values: Array
    names: list[str]
    start: datetime | None = None
    step: timedelta | None = None
    notes: list[str] = field(default_factory=list)

    def date(self, row: int) -> str:
        """The date of a row, which may lie behind the last one; its number without dates."""
        return str(row) if self.start is None else (self.start + row * self.step).isoformat(sep=" ")


def read(path: Path, columns: list[str] | None = None) -> Series:
    """The series in a .csv, .txt (comma, semicolon or tab), .npy (T,) or (T, C). Raises NetsukeError for anything else."""
    asked = f"read {path.name}"
    if not path.is_file():
        raise NetsukeError(asked, "there is no such file", "a .csv, .txt or .npy file")
    if path.stat().st_size > LARGEST_FILE:
        raise NetsukeError(asked, "it has more than 1 GB", "", "one file per group of meters")
    if path.suffix == ".npy":
        try:
            x = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError, MemoryError) as e:
            raise NetsukeError(
                asked, f"it is not a sound .npy file ({e})", "numbers of shape (T,) or (T, channels)"
            ) from None
        got = from_array(x, asked)
    elif path.suffix in (".csv", ".txt", ".tsv"):
        got = _table(path, asked)
    else:
        raise NetsukeError(asked, f"the ending {path.suffix!r} is unknown", ".csv, .txt, .tsv, .npy")
    return pick(got, columns) if columns else got


def from_array(x: Array, asked: str = "use the array") -> Series:
    """A series of an array (T,) or (T, channels), rows in time order. Infinite values are refused, NaN are missing."""
    x = np.asarray(x)
    if x.dtype.kind not in "fiub" or x.ndim not in (1, 2) or x.size == 0:
        raise NetsukeError(asked, f"it is {x.dtype} of shape {x.shape}", "numbers of shape (T,) or (T, channels)")
    x = x.astype(np.float64).reshape(len(x), -1)
    if np.isinf(x).any():
        raise NetsukeError(asked, "it holds infinite values", "finite numbers, NaN where missing")
    return Series(x, [f"channel {k}" for k in range(x.shape[1])])


def pick(series: Series, columns: list[str]) -> Series:
    """Some columns, by name."""
    absent = [c for c in columns if c not in series.names]
    if absent:
        raise NetsukeError(f"forecast the column {absent[0]!r}", "there is no such column", ", ".join(series.names))
    at = [series.names.index(c) for c in columns]
    return Series(series.values[:, at], list(columns), series.start, series.step, series.notes)


def _table(path: Path, asked: str) -> Series:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise NetsukeError(asked, "it is not text in UTF-8", "a table of numbers with a header line") from None
    first = text.split("\n", 1)[0]
    mark = max(",;\t", key=first.count)
    try:
        rows = [r for r in csv.reader(text.splitlines(), delimiter=mark) if r]
    except csv.Error as e:
        raise NetsukeError(
            asked, f"line by line it is not a table ({e})", "comma, semicolon or tab between cells"
        ) from None
    if len(rows) < 2:
        raise NetsukeError(asked, f"it has {len(rows)} lines", "a header line and rows of numbers")
    head, body = [h.strip() for h in rows[0]], rows[1:]
    for k, r in enumerate(body):
        if len(r) != len(head):
            raise NetsukeError(
                asked, f"line {k + 2} has {len(r)} cells, the header {len(head)}", "equally many everywhere"
            )
    if all(_number(h) is not None for h in head):
        raise NetsukeError(asked, "its first line holds numbers", "a header line with the columns' names")
    dated = next((k for k, h in enumerate(head) if any(w in h.lower() for w in ("date", "time"))), None)
    if dated is None and _date(body[0][0]) is not None and _number(body[0][0]) is None:
        dated = 0
    names = [h for k, h in enumerate(head) if k != dated]
    if len(set(names)) < len(names) or not names:
        raise NetsukeError(
            asked, f"its columns are {', '.join(names) or 'dates only'}", "one or more, with different names"
        )
    values = np.empty((len(body), len(names)))
    for k, r in enumerate(body):
        cells = [c for j, c in enumerate(r) if j != dated]
        for j, cell in enumerate(cells):
            v = _number(cell)
            if v is None or math.isinf(v):
                raise NetsukeError(
                    asked, f"line {k + 2}, column {names[j]!r}: {cell.strip()[:30]!r} is no finite number",
                    "numbers with a decimal point, or an empty cell", "leave the column out with --columns",
                )  # fmt: skip
            values[k, j] = v
    if dated is None:
        return Series(values, names)
    return _dated(values, names, [r[dated] for r in body], asked)


def _number(cell: str) -> float | None:
    cell = cell.strip()
    if cell.lower() in MISSING:
        return math.nan
    try:
        return float(cell)
    except ValueError:
        return None


def _date(cell: str) -> datetime | None:
    try:
        return datetime.fromisoformat(cell.strip())
    except ValueError:
        return None


def _dated(values: Array, names: list[str], cells: list[str], asked: str) -> Series:
    """Rows on a grid of equal steps: the most frequent one; rows that are not there become NaN."""
    dates = []
    for k, c in enumerate(cells):
        dates.append(_date(c))
        if dates[-1] is None:
            raise NetsukeError(
                asked, f"line {k + 2}: {c.strip()[:30]!r} is no date", "ISO dates such as 2016-07-01 00:00:00"
            )
    if len({d.tzinfo is None for d in dates}) > 1:
        raise NetsukeError(asked, "some dates have a time zone and some have none", "one kind")
    gaps = [b - a for a, b in itertools.pairwise(dates)]
    bad = next((k for k, g in enumerate(gaps) if g <= timedelta(0)), None)
    if bad is not None:
        raise NetsukeError(
            asked, f"line {bad + 3} is dated {cells[bad + 1]}, not after the line before", "rows in time order"
        )
    if not gaps:
        return Series(values, names, dates[0], timedelta(hours=1))
    counts: dict[timedelta, int] = {}
    for g in gaps:
        counts[g] = counts.get(g, 0) + 1
    step = max(counts, key=counts.get)
    at = np.concatenate([[0.0], np.cumsum([g / step for g in gaps])])
    off = np.flatnonzero(np.abs(at - np.rint(at)) > 1e-6)
    if len(off) or at[-1] > 100 * len(at):
        where = int(off[0]) if len(off) else int(np.argmax(np.diff(at))) + 1
        raise NetsukeError(
            asked, f"the dates are not in equal steps: line {where + 2} ({cells[where].strip()}) does not fit a step of {step}",
            "one step from row to row; single rows may be absent", "resample the data first",
        )  # fmt: skip
    out = np.full((round(at[-1]) + 1, len(names)), np.nan)
    out[np.rint(at).astype(int)] = values
    notes = [f"{len(out) - len(values)} rows are absent"] if len(out) > len(values) else []
    return Series(out, names, dates[0], step, notes)


def filled(series: Series, policy: str, period: int | None) -> tuple[Array, int]:
    """(values without NaN, how many were filled). Gaps of up to a quarter period are bridged by a straight line; longer ones
    take, phase by phase, the mean of the nearest periods before and after that have the value.

    Raises NetsukeError under the policy "error", and where a column is mostly or wholly missing.
    """
    if policy not in POLICIES:
        raise NetsukeError(f"treat missing values by {policy!r}", "there is no such policy", ", ".join(POLICIES))
    x = series.values.copy()
    hole = np.isnan(x)
    if not hole.any():
        return x, 0
    asked = "use the series"
    if policy == "error":
        row, column = np.argwhere(hole)[0]
        where = (
            f"{int(hole.sum())} values are missing, the first in {series.names[column]!r} at {series.date(int(row))}"
        )
        raise NetsukeError(asked, where, "a value everywhere", "--missing fill")
    for k, name in enumerate(series.names):
        share = float(hole[:, k].mean())
        if share > LARGEST_SHARE:
            raise NetsukeError(
                asked, f"{share:.0%} of the column {name!r} is missing", f"at most {LARGEST_SHARE:.0%}",
                "leave the column out",
            )  # fmt: skip
        rows = np.flatnonzero(hole[:, k])
        x[rows, k] = Neighbours(x[:, k], period).fill(rows, np.full(len(rows), len(x)))
    return x, int(hole.sum())


class Neighbours:
    """The known values around each row of a column x (T,) with NaN: the nearest ones, and the nearest of its phase."""

    def __init__(self, x: Array, period: int | None):
        self.x, known = x, ~np.isnan(x)
        self.short = max(1, (period or 4) // 4)
        self.near = _nearest(known, 1)
        self.phase = None if period is None else _nearest(known, period)

    def fill(self, rows: Array, ends: Array) -> Array:
        """Values of the missing `rows`, each from known values before its row of `ends` (same length) alone: what `filled`
        gives for x[:end]. NaN where there is none."""
        before, after = (k[rows] for k in self.near)
        low, high = self._value(before), self._value(np.where(after < ends, after, -1))
        line = low + (high - low) * (rows - before) / (after - before)
        inner = np.isfinite(line)
        line = np.where(inner, line, np.where(np.isfinite(low), low, high))
        if self.phase is None:
            return line
        before_, after_ = (k[rows] for k in self.phase)
        low, high = self._value(before_), self._value(np.where(after_ < ends, after_, -1))
        phase = np.where(np.isnan(low), high, np.where(np.isnan(high), low, (low + high) / 2))
        bridged = (inner & (after - before - 1 <= self.short)) | np.isnan(phase)
        return np.where(bridged, line, phase)

    def _value(self, at: Array) -> Array:
        return np.where(at < 0, np.nan, self.x[at])


def _nearest(known: Array, step: int) -> tuple[Array, Array]:
    """Rows of the nearest known values whole `step`s before (-1: none) and after (len(known): none) each row, or itself."""
    total = len(known)
    at = np.arange(-(-total // step) * step)
    there = np.concatenate([known, np.zeros(len(at) - total, bool)])
    before = np.maximum.accumulate(np.where(there, at, -1).reshape(-1, step))
    after = np.minimum.accumulate(np.where(there, at, total).reshape(-1, step)[::-1])[::-1]
    return before.reshape(-1)[:total], after.reshape(-1)[:total]
