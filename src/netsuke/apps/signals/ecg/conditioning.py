"""Conditioning of one lead: to 250 Hz, mains hum out, the band of the waves, zero phase; all blocks overlap-safe.

Every later step works at 250 Hz, so every filter is one table of second-order sections and a port needs no design code.
Zero phase means that a filter runs forwards and backwards over a block; the block must then carry `CONTEXT` seconds on
either side, which is the latency of a streaming form (the slowest pole, 0.5 Hz, has settled to below 1 % by then).
"""

from __future__ import annotations

import functools

import numpy as np

RATE = 250  # samples per second of all that follows
CONTEXT = 2.0  # seconds on either side of a block, computed but not kept
BAND = (0.5, 40.0)  # Hz; P and T have their energy at 0.5 to 10, a narrow QRS up to 40
MAINS = (50, 60)
HUM = 0.003  # mV: amplitude from which hum is filtered out; a lower one cannot move a mark
PAD = 3 * RATE  # samples of odd reflection on either side of a block before it is filtered


def resample(x: np.ndarray, fs: float) -> np.ndarray:
    """(N,) at `fs` -> (round(N · 250 / fs),) float64: every output is a triangle-weighted mean of the samples around it.

    The triangle is as wide as the longer of both sampling intervals: linear interpolation upwards, smoothing downwards.
    """
    if fs == RATE:
        return np.asarray(x, dtype=np.float64)
    count = round(len(x) * RATE / fs)
    at, half = np.arange(count) * (fs / RATE), max(1.0, fs / RATE)
    first = np.ceil(at - half).astype(np.int64)
    top, bottom = np.zeros(count), np.zeros(count)
    for k in range(int(2 * half) + 2):
        index = first + k
        weight = np.maximum(0.0, 1 - np.abs(index - at) / half) * ((index >= 0) & (index < len(x)))
        top += weight * x[np.clip(index, 0, len(x) - 1)]
        bottom += weight
    return top / np.maximum(bottom, 1e-12)


@functools.cache
def sections(kind: str) -> np.ndarray:
    """Second-order sections (S, 6) at 250 Hz: "band" (delineation), "qrs" (detection), "rumble" (noise), "50", "60"."""
    from scipy import signal

    if kind in ("50", "60"):
        b, a = signal.iirnotch(float(kind), 25, RATE)
        return signal.tf2sos(b, a)
    if kind == "band":
        low = signal.butter(2, BAND[0], "high", fs=RATE, output="sos")
        return np.concatenate((low, signal.butter(4, BAND[1], "low", fs=RATE, output="sos")))
    return signal.butter(2, {"qrs": (6.0, 22.0), "rumble": (45.0, 100.0)}[kind], "band", fs=RATE, output="sos")


def zero_phase(x: np.ndarray, kind: str) -> np.ndarray:
    """`x` (N,) filtered forwards and backwards, odd reflection at the ends."""
    from scipy import signal

    return signal.sosfiltfilt(sections(kind), x, padlen=min(PAD, len(x) - 1))


def hum(x: np.ndarray, fs: float) -> dict[int, float]:
    """Amplitude in the units of `x` at 50 and 60 Hz above that of the neighbouring frequencies, at the original rate.

    A projection onto windowed sines at f and f ± 4 Hz: the neighbours are what the signal itself has there. Frequencies
    above 0.45 fs are left out.
    """
    count = int(min(len(x), 10 * fs))
    if count < fs:
        return {}
    part = np.asarray(x[:count], dtype=np.float64)
    window = np.hanning(count)
    part, time = (part - part.mean()) * window, np.arange(count) / fs

    def amplitude(f: float) -> float:
        return float(2 * np.abs(np.exp(-2j * np.pi * f * time) @ part) / window.sum())

    return {
        f: max(0.0, amplitude(f) - max(amplitude(f - 4), amplitude(f + 4))) for f in MAINS if f < 0.45 * fs
    }  # fmt: skip


def at_250(x: np.ndarray, fs: float, mains: tuple[int, ...]) -> np.ndarray:
    """(N,) mV at `fs` -> mV at 250 Hz without hum at the frequencies `mains`, all other frequencies kept."""
    y = resample(x, fs)
    for f in mains:
        y = zero_phase(y, str(f))
    return y


def condition(x: np.ndarray, fs: float) -> np.ndarray:
    """(N,) mV at `fs` -> mV at 250 Hz, 0.5 to 40 Hz, zero phase, without what hum was found."""
    return zero_phase(at_250(x, fs, tuple(f for f, a in hum(x, fs).items() if a > HUM)), "band")
