"""EDF and EDF+ files with 16-bit samples (Kemp 1992): the voltage channels of one rate, as a Record.

A header of 256 bytes, then 256 per channel, all in ASCII; then data records, each with a stretch of every channel in
turn, little-endian. Channels in volts are read; annotations and other sensors are left out. Interrupted recordings
(EDF+D) are refused, since their time axis has holes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from netsuke.apps.signals.ecg.record import TO_MV, Record
from netsuke.errors import NetsukeError

FIELDS = (
    16,
    80,
    8,
    8,
    8,
    8,
    8,
    80,
    8,
    32,
)  # label, sensor, unit, lowest, highest, digital lowest, highest, filter, count
MOST = 256


def number(raw: bytes, what: str, ask: str) -> float:
    try:
        value = float(raw.decode("ascii").strip() or "nan")
    except (UnicodeDecodeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        raise NetsukeError(ask, f"its header gives {raw[:12]!r} as {what}", "a number in ASCII")
    return value


def read_edf(path: Path) -> Record:
    """Channels in volts of the commonest rate. Raises NetsukeError for what is no whole EDF file with such a channel."""
    ask = f"read {path.name}"
    file_size = path.stat().st_size
    with open(path, "rb") as f:
        text = f.read(256 * (1 + MOST))
    head = text[:256]
    if len(head) < 256 or head[:8].strip() not in (b"0",):
        raise NetsukeError(ask, "it does not begin like an EDF file", "EDF with 16-bit samples")
    if head[192:197] == b"EDF+D":
        raise NetsukeError(ask, "it is an interrupted recording (EDF+D)", "recordings without gaps")
    count = int(number(head[252:256], "number of channels", ask))
    seconds, rows = number(head[244:252], "duration", ask), int(number(head[236:244], "number of data records", ask))
    size = 256 * (1 + count)
    if not 1 <= count <= MOST or seconds <= 0 or len(text) < size:
        raise NetsukeError(
            ask, f"{count} channels of {seconds:g} s in {file_size} bytes", f"1 to {MOST} whole channels"
        )
    table, at = [], 256
    for width in FIELDS:
        table.append([text[at + i * width : at + (i + 1) * width] for i in range(count)])
        at += width * count
    labels = [b.decode("latin-1").strip() for b in table[0]]
    units = [b.decode("latin-1").strip().lower() for b in table[2]]
    samples = [int(number(b, "samples per data record", ask)) for b in table[8]]
    if min(samples) < 1 or sum(samples) > 1 << 24:
        raise NetsukeError(ask, f"{samples[:4]} samples per data record", "at least one per channel")
    whole = (file_size - size) // (2 * sum(samples))
    if whole < max(1, rows):
        raise NetsukeError(ask, f"{whole} whole data records, the header promises {rows}", "the whole file")
    chosen = [i for i in range(count) if units[i] in TO_MV and "annotation" not in labels[i].lower()]
    if not chosen:
        raise NetsukeError(
            ask, f"no channel is a voltage ({', '.join(sorted(set(units)))})", "channels in V, mV, uV, nV"
        )
    rate = max({samples[i] for i in chosen}, key=lambda s: (sum(samples[i] == s for i in chosen), s))
    chosen = [i for i in chosen if samples[i] == rate]
    signals = voltages(path, size, whole, samples, chosen)
    gain, zero = [], []
    for i in chosen:
        low, high, bottom, top = (number(table[k][i], "range", ask) for k in (3, 4, 5, 6))
        if high == low or top == bottom:
            raise NetsukeError(
                ask, f"channel {labels[i]} has no range ({low:g} to {high:g})", "a lowest and a highest value"
            )
        slope = (high - low) / (top - bottom) * TO_MV[units[i]]
        gain.append(1 / slope)
        zero.append(bottom - low * TO_MV[units[i]] / slope)
    names = tuple(labels[i].removeprefix("ECG").strip() or labels[i] for i in chosen)
    return Record(signals, rate / seconds, names, np.array(gain), np.array(zero), path.stem)


def voltages(path: Path, start: int, rows: int, samples: list[int], chosen: list[int]) -> np.ndarray:
    """(channels, N) int16 of the chosen channels, read in stretches so that only what is kept is ever in memory."""
    offsets, width = np.cumsum([0, *samples]), sum(samples)
    out = np.empty((len(chosen), rows, samples[chosen[0]]), dtype=np.int16)
    step = max(1, (1 << 20) // width)
    with open(path, "rb") as f:
        f.seek(start)
        for k in range(0, rows, step):
            part = np.fromfile(f, dtype="<i2", count=min(step, rows - k) * width).reshape(-1, width)
            for j, i in enumerate(chosen):
                out[j, k : k + len(part)] = part[:, offsets[i] : offsets[i + 1]]
    return out.reshape(len(chosen), -1)
