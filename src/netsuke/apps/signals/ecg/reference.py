"""Marks made by people, per record: intervals as medians over the marked beats, the way the published tables count.

PR runs from a P onset to the next QRS onset, QT from a QRS onset to the end of the next T, before the next QRS.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from netsuke.data.catalogue import find
from netsuke.errors import NetsukeError

LUDB = "featuredb-ecg/ludb_i_ii.npz"
FOLDS = 5
INTERVALS = ("PR", "QRS", "QT")
AV_BLOCK = re.compile(r"(?<![a-z])i degree av.block", re.I)  # not the second or third degree


@dataclass(frozen=True)
class Marked:
    """A lead with marks: `x` (N,) mV at `fs`; `waves` (W, 4) rows of kind (0 P, 1 QRS, 2 T), onset, peak, offset in
    samples, -1 missing, in order of the peaks; `person` for folds; `av_block` diagnosed (None: unknown)."""

    name: str
    lead: str
    person: int
    x: np.ndarray
    fs: float
    waves: np.ndarray
    sex: str = ""
    av_block: bool | None = None

    @property
    def r(self) -> np.ndarray:
        """R peaks in samples."""
        return self.waves[self.waves[:, 0] == 1, 2]

    def intervals(self) -> np.ndarray:
        """PR, QRS, QT in ms (NaN: not marked) and RR in s, medians over the record."""
        ms = 1e3 / self.fs
        rows: list[list[float]] = [[], [], []]
        q = self.waves[self.waves[:, 0] == 1]
        for i, (_, onset, peak, offset) in enumerate(q):
            low, high = q[i - 1, 2] if i else -1, q[i + 1, 2] if i + 1 < len(q) else np.inf
            p = self.waves[(self.waves[:, 0] == 0) & (self.waves[:, 2] > low) & (self.waves[:, 2] < peak)]
            t = self.waves[(self.waves[:, 0] == 2) & (self.waves[:, 2] > peak) & (self.waves[:, 2] < high)]
            if onset < 0:
                continue
            if len(p) and p[-1, 1] >= 0:
                rows[0].append((onset - p[-1, 1]) * ms)
            if offset >= 0:
                rows[1].append((offset - onset) * ms)
            if len(t) and t[0, 3] >= 0:
                rows[2].append((t[0, 3] - onset) * ms)
        rr = np.median(np.diff(self.r)) / self.fs if len(self.r) > 1 else np.nan
        return np.array([*(np.median(r) if r else np.nan for r in rows), rr])


def diagnoses(folder: Path) -> dict[int, tuple[str, str]]:
    """Record number -> (sex, the whole row of `ludb_meta.csv`)."""
    import csv

    with open(folder / "ludb_meta.csv", newline="", encoding="utf-8") as f:
        return {int(r["ID"]): (r["Sex"].strip(), " | ".join(str(v) for v in r.values())) for r in csv.DictReader(f)}


def fold_weights(m: Marked) -> str:
    """The weights that were trained without this person of LUDB (recipes/ecg/train.py)."""
    return f"fold{m.person % FOLDS}"


def ludb(lead: str) -> list[Marked]:
    """All 200 records of LUDB, lead "I" or "II". Raises NetsukeError where the data are absent."""
    path = find(LUDB)
    about = diagnoses(path.parent)
    with np.load(path, allow_pickle=False) as z:
        names = [str(n).upper() for n in z["leads"]]
        if lead.upper() not in names:
            raise NetsukeError(f"read lead {lead!r} of LUDB", "it is not in the bundled file", ", ".join(names))
        i, fs = names.index(lead.upper()), float(z["fs"])
        signal, gain, base, waves = (z[k] for k in ("signal", "gain", "baseline", "waves"))
    out = []
    for k in range(len(signal)):
        rows = waves[(waves[:, 0] == k + 1) & (waves[:, 1] == i)][:, 2:].astype(np.int64)
        sex, text = about[k + 1]
        x = (signal[k, i] - float(base[k, i])) / float(gain[k, i])
        out.append(
            Marked(
                str(k + 1),
                lead,
                k + 1,
                x,
                fs,
                rows[np.argsort(rows[:, 2], kind="stable")],
                sex,
                bool(AV_BLOCK.search(text)),
            )
        )
    return out
