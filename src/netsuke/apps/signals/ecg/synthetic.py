"""Made hearts with known marks: for tests without data, for rates and rhythms that no database has enough of.

A beat is a sum of bells (P, Q, R, S, T) whose places shrink with the square root of RR, as a heart's do; onset and
offset of a wave lie 2.2 widths from its middle, where a bell has fallen to 9 %. Atrial fibrillation has irregular RR and
f waves instead of P; a paced beat has a spike, a wide QRS and an inverted T.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

REACH = 2.2  # widths from the middle of a bell to where people put the mark
# seconds from R at 60 a minute, width in s, mV
NORMAL = {"P": (-0.17, 0.022, 0.12), "Q": (-0.028, 0.008, -0.1), "R": (0.0, 0.011, 1.1), "S": (0.028, 0.009, -0.2),
          "T": (0.27, 0.042, 0.28)}  # fmt: skip
PACED = {"R": (0.0, 0.03, -0.9), "S": (0.06, 0.025, 0.35), "T": (0.3, 0.05, 0.3)}


@dataclass(frozen=True)
class Heart:
    """`x` (N,) mV at `fs`, R at `r` (B,) s, and the true intervals in ms (NaN: there is none)."""

    x: np.ndarray
    fs: float
    r: np.ndarray
    pr: float
    qrs: float
    qt: float


def heart(
    rate: float = 70.0,
    seconds: float = 10.0,
    fs: float = 500.0,
    *,
    rhythm: str = "sinus",
    noise: float = 0.01,
    seed: int = 0,
) -> Heart:
    """`rate` beats per minute; `rhythm` "sinus", "fibrillation" or "paced"; `noise` in mV."""
    rng = np.random.default_rng(seed)
    count = int(seconds * rate / 60) + 3
    spread = 0.22 if rhythm == "fibrillation" else 0.015
    rr = np.clip(60 / rate * (1 + spread * rng.normal(size=count)), 0.24, None)
    r = 0.3 + np.concatenate(([0.0], np.cumsum(rr)))
    t = np.arange(int(seconds * fs)) / fs
    x = rng.normal(0, noise, len(t)) + 0.05 * np.sin(2 * np.pi * 0.25 * t)
    squeeze = min(1.2, float(np.sqrt(60 / rate)))
    waves = dict(PACED if rhythm == "paced" else NORMAL)
    if rhythm == "fibrillation":
        del waves["P"]
        x += 0.04 * np.sin(2 * np.pi * 6.1 * t + 0.8 * np.sin(2 * np.pi * 0.7 * t))
    place = {
        k: (m * (squeeze if k in "PT" else 1), w * (squeeze if k in "PT" else 1), a) for k, (m, w, a) in waves.items()
    }
    for beat in r:
        for middle, width, size in place.values():
            near = slice(*np.searchsorted(t, [beat + middle - 5 * width, beat + middle + 5 * width]))
            x[near] += size * np.exp(-0.5 * ((t[near] - beat - middle) / width) ** 2)
        if rhythm == "paced":
            k = round((beat - 0.07) * fs)
            if 0 <= k < len(x) - 1:
                x[k : k + max(1, round(0.002 * fs))] += 1.5
    first = place.get("Q", place["R"])
    onset, offset = first[0] - REACH * first[1], place["S"][0] + REACH * place["S"][1]
    end = place["T"][0] + REACH * place["T"][1]
    pr = 1e3 * (onset - (place["P"][0] - REACH * place["P"][1])) if "P" in place else float("nan")
    return Heart(x, fs, r[r < seconds], pr, 1e3 * (offset - onset), 1e3 * (end - onset))
