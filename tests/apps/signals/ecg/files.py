"""WFDB and EDF files written for tests, by other code than reads them: plain loops over the formats' definitions."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


def write_wfdb(
    folder: Path, name: str, counts: np.ndarray, fs: float, format_: int = 16, gain: str = "200(-3)/mV"
) -> Path:
    """`counts` (N, leads) integers; returns the header's path."""
    samples, leads = counts.shape
    flat = counts.reshape(-1)
    if format_ == 16:
        raw = b"".join(struct.pack("<h", int(v)) for v in flat)
    else:
        raw = bytearray()
        for a, b in zip(flat[::2], [*flat[1::2], 0]):
            a, b = int(a) & 0xFFF, int(b) & 0xFFF
            raw += bytes((a & 0xFF, (a >> 8) | ((b >> 8) << 4), b & 0xFF))
    (folder / f"{name}.dat").write_bytes(bytes(raw))
    lines = [f"{name} {leads} {fs:g} {samples}"]
    lines += [f"{name}.dat {format_} {gain} 12 0 0 0 0 {n}" for n in ("I", "II", "V1")[:leads]]
    head = folder / f"{name}.hea"
    head.write_text("\n".join([*lines, "# <age>: 61", "# <sex>: F"]) + "\n")
    return head


def write_annotations(path: Path, rows: list[tuple[int, int]]) -> None:
    """`rows` of (sample, kind) in order; a step of more than 1023 samples becomes a SKIP."""
    out, now = b"", 0
    for sample, kind in rows:
        step = sample - now
        if step > 1023:
            out += struct.pack("<H", 59 << 10) + struct.pack("<HH", step >> 16, step & 0xFFFF)
            step = 0
        out += struct.pack("<H", kind << 10 | step)
        now = sample
    path.write_bytes(out + b"\0\0")


def write_edf(path: Path, channels: dict[str, tuple[np.ndarray, str]], per_record: int, seconds: float = 1.0) -> None:
    """Channels of int16 samples whose ±1000 counts are ±2 of their unit."""
    count, rows = len(channels), len(next(iter(channels.values()))[0]) // per_record

    def cells(values: list, width: int) -> bytes:
        return b"".join(str(v).ljust(width).encode("ascii") for v in values)

    head = b"0".ljust(8) + b" " * 160 + b"01.01.2001.01.01" + str(256 * (1 + count)).ljust(8).encode() + b" " * 44
    head += str(rows).ljust(8).encode() + str(seconds).ljust(8).encode() + str(count).ljust(4).encode()
    head += cells(list(channels), 16) + b" " * 80 * count + cells([u for _, u in channels.values()], 8)
    head += cells([-2] * count, 8) + cells([2] * count, 8) + cells([-1000] * count, 8) + cells([1000] * count, 8)
    head += b" " * 80 * count + cells([per_record] * count, 8) + b" " * 32 * count
    data = [x[k * per_record : (k + 1) * per_record].astype("<i2") for k in range(rows) for x, _ in channels.values()]
    path.write_bytes(head + b"".join(d.tobytes() for d in data))
