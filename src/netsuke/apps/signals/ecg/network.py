"""The small network that marks a representative beat: 7,225 weights, one million multiplications, no lead in mind.

Input: a beat (288 samples at 250 Hz, R at sample 112) as four rows: the wave over its QRS height, the same over the
size of everything else (compressed by asinh, so that a P wave of 30 µV is seen beside an R of 3 mV), the time from R,
and the time from R over the RR interval. A convolution of stride 2 (width 9), five residual ones (width 5, dilations 1
to 16), then one row of scores per mark: a probability over 144 positions whose mean around the best place is the mark,
and whose spread is how sure it is. One more output says whether there is a P wave at all.

Amplitude, gain and polarity cancel in the input or were drawn at random in training (recipes/ecg/train.py), which also
rotates leads I and II into each other, so nothing can be learnt by heart about a lead.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from netsuke.apps.signals.ecg.beats import BEFORE, LENGTH
from netsuke.errors import NetsukeError

WEIGHTS = Path(__file__).parents[3] / "weights/ecg"  # <name>.npz: default, and fold0 to fold4 for honest tests
MARKS = ("p_on", "p_peak", "p_off", "qrs_on", "qrs_off", "t_on", "t_peak", "t_off")
STRIDE, DILATIONS, KERNEL = 2, (1, 2, 4, 8, 16), 5
QRS_REACH = 25  # samples around R that hold the QRS: its height scales the beat
HALF = 12  # positions (96 ms) around the best one over which a mark is averaged
TIME = np.arange(LENGTH) - BEFORE
COARSE = np.arange(0, LENGTH, STRIDE) - BEFORE
P_TIMES = COARSE < -8  # where a P wave may be, for the question whether there is one
# (from, to) in samples from R, each at most the given share of RR: a mark is sought nowhere else
REGION = {"p": (-110, -4, 0.8), "qrs_on": (-45, 8, 1.0), "qrs_off": (-8, 62, 1.0), "t": (8, 174, 0.92)}


@dataclass(frozen=True)
class Marks:
    """`at` (8,) samples from R at 250 Hz (fractions are meant); `spread` (8,) samples; `p_present` 0 to 1."""

    at: np.ndarray
    spread: np.ndarray
    p_present: float


@functools.cache
def weights(name: str = "default") -> dict[str, np.ndarray]:
    """The arrays of `weights/ecg/<name>.npz` as float32. Raises NetsukeError for a name that was not trained."""
    path = WEIGHTS / f"{name}.npz"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in WEIGHTS.glob("*.npz")))
        raise NetsukeError(f"delineate with the weights {name!r}", "there are none of that name", names)
    with np.load(path, allow_pickle=False) as z:
        return {k: z[k].astype(np.float32) for k in z.files}


def features(wave: np.ndarray, rr: np.ndarray) -> np.ndarray:
    """(B, 288) in any unit, (B,) RR in samples -> (B, 4, 288) float32."""
    wave = wave - np.median(wave, axis=1, keepdims=True)
    near = np.abs(TIME) <= QRS_REACH
    height = np.ptp(wave[:, near], axis=1)[:, None] + 1e-9
    rest = np.sqrt(np.mean(wave[:, ~near] ** 2, axis=1))[:, None] + 0.01 * height
    time = np.broadcast_to(TIME / 100.0, wave.shape)
    rows = (2 * wave / height, np.arcsinh(2 * wave / rest), time, TIME / np.asarray(rr)[:, None])
    return np.stack(rows, axis=1).astype(np.float32)


def convolve(x: np.ndarray, w: np.ndarray, b: np.ndarray, stride: int = 1, dilation: int = 1) -> np.ndarray:
    """(B, I, T), (O, I, K), (O,) -> (B, O, T / stride), zeros beyond the ends."""
    taps, size = w.shape[2], x.shape[2]
    reach = dilation * (taps // 2)
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach)))
    out = sum(w[:, :, k] @ padded[:, :, k * dilation : k * dilation + size : stride] for k in range(taps))
    return out + b[:, None]


def scores(wave: np.ndarray, rr: np.ndarray, w: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(B, 288), (B,) -> scores of the marks (B, 8, 144) and of a P wave's presence (B,), before any normalization."""
    h = np.maximum(convolve(features(wave, rr), w["input.weight"], w["input.bias"], STRIDE), 0)
    for i, dilation in enumerate(DILATIONS):
        h = h + np.maximum(convolve(h, w[f"blocks.{i}.weight"], w[f"blocks.{i}.bias"], dilation=dilation), 0)
    marks = convolve(h, w["marks.weight"], w["marks.bias"])
    present = h[:, :, P_TIMES].max(axis=2) @ w["present.weight"][0] + w["present.bias"][0]
    return marks, present


def allowed(rr: float) -> np.ndarray:
    """(8, 144) bool: where each mark may lie at this RR (samples)."""
    rows = []
    for mark in MARKS:
        low, high, share = REGION.get(mark) or REGION[mark[0]]
        rows.append((max(low, -share * rr) <= COARSE) & (min(high, share * rr) >= COARSE))
    return np.array(rows)


def place(score: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(8, 144) scores, allowed positions -> marks in samples from R (8,), and their spread in samples (8,)."""
    s = np.where(where, score.astype(np.float64), -np.inf)
    p = np.exp(s - s.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    smooth = np.stack([np.convolve(row, np.ones(5) / 5, "same") for row in p])
    best = smooth.argmax(axis=1)[:, None]
    index = np.arange(s.shape[1])
    q = np.where(np.abs(index - best) <= HALF, p, 0)
    q /= q.sum(axis=1, keepdims=True)
    at = q @ COARSE
    whole = p @ COARSE  # the spread counts what lies far from the best place too: two candidates are no certainty
    spread = np.sqrt(np.maximum(p @ COARSE**2 - whole**2, 0.25))
    return at, spread


def mark(wave: np.ndarray, rr: float, name: str = "default") -> Marks:
    """The marks of one beat (288,) at 250 Hz whose RR is `rr` seconds."""
    rr_samples = 250.0 * rr
    marks, present = scores(wave[None], np.array([rr_samples]), weights(name))
    at, spread = place(marks[0], allowed(rr_samples))
    return Marks(at, spread, float(1 / (1 + np.exp(-present[0]))))
