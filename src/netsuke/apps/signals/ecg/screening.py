"""Screening scores with their intervals: first-degree AV block by PR, long QT by QTc, atrial fibrillation by rhythm.

A score is a measured number with a 95 % interval: a bootstrap over the beats (1,000 resamples, seeded) widened by how
well the marks themselves are known (`plus_minus`, taken for nine cases out of ten: about right on leads I and II, too
narrow where the table of docs/ecg.md has less, down to 70 in 100). `share_above` is the part of those draws above the
limit. None of this is a diagnosis; a score whose number is missing or poor says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from netsuke.apps.signals.ecg.parameters import QTC, Value
from netsuke.apps.signals.ecg.quality import irregularity

AV_BLOCK = 200.0  # ms
LONG_QT = {"M": 450.0, "F": 470.0, "": 460.0}  # ms; AHA/ACCF/HRS 2009 (M 450, F 460), women 470 by the card's paper
IRREGULAR = 0.09  # median change of RR over median RR
DRAWS, NINETY = 1000, 1.645  # `plus_minus` as nine cases out of ten: 1.645 standard deviations


def draws(beats: np.ndarray, centre: float, plus_minus: float | None, seed: int = 0) -> np.ndarray:
    """(1000,) plausible medians: resampled beats, centred on the reported value, plus the uncertainty of the marks."""
    rng = np.random.default_rng(seed)
    beats = beats[np.isfinite(beats)]
    out = np.full(DRAWS, centre)
    if len(beats) > 2:
        some = beats if len(beats) <= 2000 else rng.choice(beats, 2000, replace=False)
        size = min(len(some), 200)
        out = centre + np.median(rng.choice(some, (DRAWS, size)), axis=1) - np.median(some)
    return out + rng.normal(0, (plus_minus or 0.0) / NINETY, DRAWS)


def scored(name: str, value: Value, beats: np.ndarray, limit: float) -> dict[str, Any]:
    if value.value is None:
        return {"score": None, "limit": limit, "reason": value.reason, "unit": "ms"}
    d = draws(beats, float(value.value), value.plus_minus)
    low, high = np.quantile(d, (0.025, 0.975))
    return {
        "score": value.value, "limit": limit, "unit": "ms", "low": float(low), "high": float(high),
        "share_above": float(np.mean(d > limit)), "quality": value.quality, "by": name,
    }  # fmt: skip


def screen(marks: np.ndarray, values: dict[str, Value], sex: str, r: np.ndarray) -> dict[str, dict[str, Any]]:
    """Scores from the beats' `marks` (P, 8) s, the record's `values`, the person's sex and R (P,) s."""
    pr, qt = 1e3 * (marks[:, 3] - marks[:, 0]), 1e3 * (marks[:, 7] - marks[:, 3])
    rr = values["RR used"].value if "RR used" in values else None
    factor = QTC["Bazett"](1.0, float(rr)) if rr else 1.0
    out = {
        "first-degree AV block": scored("PR", values["PR"], pr, AV_BLOCK),
        "long QT": scored("QTc Bazett", values["QTc Bazett"], qt * factor, LONG_QT.get(sex, LONG_QT[""])),
    }
    if len(r) < 8:
        reason = "needs eight beats"
        return out | {"irregular rhythm": {"score": None, "limit": IRREGULAR, "unit": "", "reason": reason}}
    gaps = np.diff(r)[:20_000]
    rng = np.random.default_rng(0)
    change, typical = np.abs(np.diff(gaps)), np.median(gaps)
    d = np.median(rng.choice(change, (DRAWS, min(len(change), 200))), axis=1) / typical
    low, high = np.quantile(d, (0.025, 0.975))
    out["irregular rhythm"] = {
        "score": irregularity(gaps), "limit": IRREGULAR, "unit": "", "low": float(low), "high": float(high),
        "share_above": float(np.mean(d > IRREGULAR)), "quality": "fair", "by": "change of RR",
    }  # fmt: skip
    return out
