"""How well a method agrees with people: Bland–Altman, correlation, errors, ROC, each with a bootstrap interval.

A reference value without an answer is a failure and is counted; next to the mean error over answered records stands
the one in which each failure costs what a constant answer would have cost (the median of all references). An answer
where people marked nothing is a false one and is counted too. Nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.apps.signals.ecg import wfdb
from netsuke.apps.signals.ecg.parameters import QTC, gap
from netsuke.apps.signals.ecg.pipeline import blocks, merged, segments
from netsuke.apps.signals.ecg.record import of_array
from netsuke.apps.signals.ecg.reference import AV_BLOCK, INTERVALS, Marked
from netsuke.apps.signals.ecg.screening import LONG_QT
from netsuke.errors import NetsukeError

DRAWS = 2000
HIT = 0.15  # s: a peak within it of a marked one has found it (ANSI/AAMI EC57)


def auc(score: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve; NaN scores rank lowest, ties count half."""
    s = np.where(np.isnan(score), -np.inf, score)
    above, below = s[positive], s[~positive]
    if not len(above) or not len(below):
        return float("nan")
    return float(np.mean((above[:, None] > below) + 0.5 * (above[:, None] == below)))


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of (N,) and (N,); NaN where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else float("nan")


def bootstrap(f: Callable[[np.ndarray], float], size: int, seed: int = 0) -> tuple[float, float]:
    """95 % interval of `f(rows)` over `DRAWS` resamples of `size` rows."""
    rng = np.random.default_rng(seed)
    got = np.array([f(rng.integers(size, size=size)) for _ in range(DRAWS)])
    low, high = np.nanquantile(got, (0.025, 0.975))
    return float(low), float(high)


def agreement(found: np.ndarray, wanted: np.ndarray, plus_minus: np.ndarray | None = None) -> dict[str, Any]:
    """Of (N,) answers and references in ms (NaN: none): errors, bias, limits of agreement, correlation, failures."""
    both, wanted_only = np.isfinite(found) & np.isfinite(wanted), np.isfinite(wanted) & ~np.isfinite(found)
    error, known = (found - wanted)[both], wanted[np.isfinite(wanted)]
    out: dict[str, Any] = {
        "records": len(known), "answered": int(both.sum()), "failures": int(wanted_only.sum()),
        "false": int((np.isfinite(found) & ~np.isfinite(wanted)).sum()),
    }  # fmt: skip
    if len(error) < 3:
        return out
    floor = np.abs(known - np.median(known))
    cost = np.concatenate((np.abs(error), np.abs(wanted[wanted_only] - np.median(known))))
    bias, spread = float(error.mean()), float(error.std(ddof=1))
    out |= {
        "mae": float(np.abs(error).mean()), "median": float(np.median(np.abs(error))), "mae_with_failures": float(cost.mean()),
        "mae_interval": bootstrap(lambda i: np.abs(error[i]).mean(), len(error)),
        "bias": bias, "limits": (bias - 1.96 * spread, bias + 1.96 * spread), "floor_mae": float(floor.mean()),
        "r": pearson(found[both], wanted[both]),
        "r_interval": bootstrap(lambda i: pearson(found[both][i], wanted[both][i]), len(error)),
    }  # fmt: skip
    if plus_minus is not None and np.isfinite(plus_minus[both]).all():
        out["within_plus_minus"] = float(np.mean(np.abs(error) <= plus_minus[both]))
    return out


def matched(found: np.ndarray, wanted: np.ndarray, fs: float) -> tuple[int, int, int]:
    """Hits, misses, false peaks, counted between the first and the last marked peak (databases skip the rest)."""
    if not len(wanted):
        return 0, 0, len(found)
    reach = HIT * fs
    found = found[(found >= wanted[0] - reach) & (found <= wanted[-1] + reach)]
    hits = sum(bool(len(found)) and np.abs(found - w).min() <= reach for w in wanted)
    false = sum(np.abs(wanted - f).min() > reach for f in found)
    return int(hits), len(wanted) - int(hits), int(false)


def measured(m: Marked, method: str, weights: str) -> dict[str, np.ndarray | tuple[int, int, int]]:
    """PR, QRS, QT in ms (NaN: refused), their plus_minus, RR in s, and the R peaks' counts of one marked lead."""
    record = of_array(m.x, m.fs, (m.lead,), name=m.name)
    found = list(segments(blocks(record, 0), m.fs, method, weights))
    values = merged([s.values for s in found])
    r = np.concatenate([s.r for s in found])
    answers = [values.get(k, gap("")) for k in (*INTERVALS, "RR used")]
    numbers = np.array([np.nan if v.value is None else float(v.value) for v in answers])
    spread = np.array([np.nan if v.plus_minus is None else v.plus_minus for v in answers[:3]])
    return {"values": numbers[:3], "plus_minus": spread, "rr": numbers[3], "peaks": matched(r * m.fs, m.r, m.fs)}


def table(rows: list[Marked], answers: list[np.ndarray], spreads: list[np.ndarray] | None = None) -> dict[str, Any]:
    """Agreement per interval, screening by PR and QTc, for any method's `answers` (PR, QRS, QT in ms, RR in s)."""
    got, want = np.array(answers), np.array([m.intervals() for m in rows])
    out: dict[str, Any] = {}
    for j, name in enumerate(INTERVALS):
        out[name] = agreement(got[:, j], want[:, j], np.array(spreads)[:, j] if spreads is not None else None)
    bazett = QTC["Bazett"]
    out["QTc"] = agreement(bazett(got[:, 2], got[:, 3]), bazett(want[:, 2], want[:, 3]))
    known = np.array([m.av_block is not None for m in rows]) & np.isfinite(want[:, 0])
    if known.any():
        block = np.array([bool(m.av_block) for m in rows])[known]
        out["AV block"] = screened(got[known, 0], block) | {"by_marks": auc(want[known, 0], block)}
    usable = np.isfinite(want[:, 2]) & np.isfinite(want[:, 3])
    limit = np.array([LONG_QT[m.sex] for m in rows])[usable]
    long_qt = bazett(want[usable, 2], want[usable, 3]) > limit
    out["long QTc"] = screened(bazett(got[usable, 2], got[usable, 3]) - limit, long_qt)
    return out


def screened(score: np.ndarray, positive: np.ndarray) -> dict[str, Any]:
    """AUC with its bootstrap interval, cases, and the ROC curve's corners."""
    if not positive.any() or positive.all():
        return {"cases": int(positive.sum()), "of": len(positive)}
    s = np.where(np.isnan(score), -np.inf, score)
    cuts = np.unique(s)[::-1]
    roc = [(float(np.mean(s[~positive] >= c)), float(np.mean(s[positive] >= c))) for c in cuts]
    interval = bootstrap(lambda i: auc(score[i], positive[i]), len(score))
    return {
        "auc": auc(score, positive), "interval": interval, "cases": int(positive.sum()), "of": len(positive),
        "unanswered": int(np.isnan(score).sum()), "roc": [(0.0, 0.0), *roc],
    }  # fmt: skip


def judge(
    rows: Iterable[Marked], method: str = "netsuke", weights: Callable[[Marked], str] = lambda m: "default"
) -> dict[str, Any]:
    """`table` of a method over marked leads, with the R peaks' sensitivity and predictivity and every record's numbers.

    `weights` names the network's weights for a record: those of its fold where it was held out.
    """
    rows = list(rows)
    if not rows:
        raise NetsukeError("evaluate", "no record with marks was found", "records with annotation files beside them")
    got = [measured(m, method, weights(m)) for m in rows]
    out = table(rows, [np.append(g["values"], g["rr"]) for g in got], [g["plus_minus"] for g in got])
    hits, misses, false = np.sum([g["peaks"] for g in got], axis=0)
    out["R peaks"] = {
        "marked": int(hits + misses), "missed": int(misses), "false": int(false),
        "sensitivity": float(hits / max(hits + misses, 1)), "predictivity": float(hits / max(hits + false, 1)),
    }  # fmt: skip
    out["rows"] = [
        {"record": m.name, "lead": m.lead, "found": g["values"], "marked": m.intervals()[:3], "plus_minus": g["plus_minus"]}
        for m, g in zip(rows, got)
    ]  # fmt: skip
    return out


def marked_folder(folder: Path, lead: str | None = None) -> list[Marked]:
    """Every lead of the WFDB records in `folder` that has delineation marks in a file named after it (record.ii), or the
    first lead with beat marks (record.atr). Raises NetsukeError for a folder without such records."""
    ask = f"evaluate {folder}"
    if not folder.is_dir():
        raise NetsukeError(ask, "it is no folder", "a folder of WFDB records with annotation files")
    out = []
    for head in sorted(folder.glob("*.hea"), key=lambda p: (len(p.stem), p.stem)):
        record = wfdb.read_wfdb(head)
        for i, name in enumerate(record.leads):
            marks = head.with_suffix(f".{name.lower()}")
            if (lead is None or name.upper() == lead.upper()) and marks.is_file():
                rows = wfdb.waves(wfdb.read_annotations(marks))
                out.append(one(record, i, head.stem, rows))
        beats = head.with_suffix(".atr")
        if beats.is_file():
            at = wfdb.read_annotations(beats).beats
            rows = np.stack((np.ones_like(at), np.full_like(at, -1), at, np.full_like(at, -1)), axis=1)
            out.append(one(record, record.lead_index(lead), head.stem, rows))
    if not out:
        raise NetsukeError(ask, "it has no WFDB record with marks", "NAME.hea with NAME.ii or NAME.atr beside it")
    return out


def one(record: Any, lead: int, name: str, rows: np.ndarray) -> Marked:
    person = int("".join(c for c in name if c.isdigit()) or 0)
    text = "\n".join(record.notes).lower()
    block = bool(AV_BLOCK.search(text)) if "diagnoses" in text else None
    return Marked(
        name,
        record.leads[lead],
        person,
        record.millivolts(lead),
        record.fs,
        rows[np.argsort(rows[:, 2])],
        record.sex,
        block,
    )
