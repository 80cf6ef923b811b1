"""Spoken digits (Free Spoken Digit Dataset, CC BY-SA 4.0) and their log-mel frames.

900 recordings of 0 to 9 by six speakers, 8 kHz, mono. Frames are 25 ms long, 10 ms apart, Hann-windowed; power spectra go
through triangular filters on the mel scale and a logarithm. The figures of one recording are brought to mean 0 and deviation 1
per filter: loudness and the microphone are constant offsets in a logarithm.
"""

from __future__ import annotations

import io
import wave
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from netsuke.data import catalogue
from netsuke.errors import NetsukeError

FILES = ("mmedge/fsdd-train-5-14.zip", "mmedge/fsdd-test-0-4.zip")
RATE, WINDOW, HOP, FILTERS = 8000, 200, 80, 40
LARGEST = 1 << 20  # bytes of one recording: a minute, where the longest of the set has 2.3 s


@dataclass(frozen=True)
class Recording:
    samples: np.ndarray  # (N,) float32 in [-1, 1)
    digit: int
    speaker: str
    index: int


@cache
def recordings() -> tuple[Recording, ...]:
    """All recordings of both archives, sorted by speaker, digit and index. Raises NetsukeError for absent or spoiled files."""
    found = [r for name in FILES for r in read_archive(catalogue.find(name))]
    return tuple(sorted(found, key=lambda r: (r.speaker, r.digit, r.index)))


def read_archive(path: Path) -> list[Recording]:
    """The recordings DIGIT_SPEAKER_INDEX.wav of one archive. Raises NetsukeError naming the member that cannot be read."""
    out, member = [], path.name
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.filename.endswith(".wav"):
                    continue
                member = info.filename
                if info.file_size > LARGEST:
                    raise NetsukeError(f"read {path.name}", f"{member} unpacks to {info.file_size} bytes", f"{LARGEST}")
                digit, speaker, index = Path(member).stem.split("_")
                with wave.open(io.BytesIO(archive.read(info))) as sound:
                    if (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) != (RATE, 1, 2):
                        raise NetsukeError(f"read {path.name}", f"{member} is not 8 kHz, mono, 16 bits", "such files")
                    raw = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
                out.append(Recording((raw / 32768).astype(np.float32), int(digit), speaker, int(index)))
    except (zipfile.BadZipFile, zlib.error, wave.Error, EOFError, ValueError, RuntimeError, NotImplementedError) as e:
        raise NetsukeError(
            f"read {path.name}", f"{member} cannot be read ({str(e)[:80]})", "the archive as it was"
        ) from None
    return out


@cache
def mel_filters(filters: int = FILTERS, window: int = WINDOW, rate: int = RATE) -> np.ndarray:
    """Triangles (filters, window // 2 + 1) with peaks evenly spaced on the mel scale, 2595·log10(1 + f/700)."""
    mel = np.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), filters + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    bins = np.fft.rfftfreq(window, 1 / rate)[None]
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return np.maximum(0, np.minimum((bins - low) / (mid - low), (high - bins) / (high - mid)))


def log_mel(samples: np.ndarray) -> np.ndarray:
    """(N,) samples -> (T, FILTERS) float32 frames, mean 0 and deviation 1 per filter; at least one frame."""
    padded = np.pad(samples.astype(np.float64), (0, max(WINDOW - len(samples), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    logs = np.log(power @ mel_filters().T + 1e-6)
    return ((logs - logs.mean(0)) / (logs.std(0) + 1e-3)).astype(np.float32)
