"""A heart read as it beats: numbers come in one per line, a line goes out every block; memory does not grow.

Every block of 10 s (by default) is reported when two more seconds have come, which is the context that zero-phase
filters need: the latency is the block and these two seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import numpy as np

from netsuke.apps.signals.ecg.conditioning import CONTEXT
from netsuke.apps.signals.ecg.pipeline import Block, Segment, plain, rates, segments
from netsuke.apps.signals.ecg.record import check_rate, counts_per_mv
from netsuke.errors import NetsukeError

SHORTEST, LONGEST = 4.0, 60.0  # s per block
LONGEST_LINE = 4096


def numbers(source: TextIO, column: int = 0) -> Iterator[float]:
    """One sample per line; of several columns the one asked for; an empty cell or "nan" is missing. A first line that
    is not a number is a heading. Raises NetsukeError for anything else."""
    for i, line in enumerate(iter(lambda: source.readline(LONGEST_LINE), "")):
        cells = line.replace(";", ",").replace("\t", ",").split(",") if line.strip() else []
        if not cells or line.startswith("#"):
            continue
        try:
            yield float(cells[column].strip() or "nan")
        except (ValueError, IndexError):
            if i == 0:
                continue
            raise NetsukeError(
                "read the stream", f"line {i + 1} has {line.strip()[:20]!r}", f"a number in column {column}"
            ) from None


def ring(samples: Iterable[float], fs: float, seconds: float) -> Iterator[Block]:
    """Blocks of `seconds` with context on either side, from a buffer that holds no more than one of them."""
    core, margin = round(seconds * fs), round(CONTEXT * fs)
    buffer = np.empty(core + 2 * margin)
    have, first, keep = 0, 0, 0  # samples in the buffer, the number of its first one, where the next block begins
    for value in samples:
        buffer[have] = value
        have += 1
        if first + have == keep + core + margin:
            yield Block(buffer[:have].copy(), first / fs, keep / fs, (keep + core) / fs)
            keep += core
            drop = max(0, keep - margin - first)
            buffer[: have - drop] = buffer[drop:have].copy()
            have, first = have - drop, first + drop
    if first + have - keep >= fs:  # what is left, unless it is less than a second
        yield Block(buffer[:have].copy(), first / fs, keep / fs, (first + have) / fs)


def summary(s: Segment) -> dict[str, Any]:
    """A block as a plain dictionary: rate, intervals, R in seconds, flags."""
    from collections import Counter

    values = {**rates(s.r, 1, Counter(s.flags)), **s.values}
    names = ("heart rate", "PR", "QRS", "QT", "QTc Bazett")
    return {
        "start": s.start, "end": s.end, "beats": len(s.r), **{k: values[k].as_dict() for k in names},
        "r": plain(np.round(s.r, 4)), "flags": s.flags,
    }  # fmt: skip


def stream(
    source: TextIO, fs: float, *, seconds: float = 10.0, unit: str = "mV", column: int = 0, method: str = "netsuke"
) -> Iterator[dict[str, Any]]:
    """Summaries of consecutive blocks of a text stream. Raises NetsukeError for a bad rate, unit, size or line."""
    check_rate(fs, "the stream")
    if not SHORTEST <= seconds <= LONGEST:
        raise NetsukeError("stream", f"blocks of {seconds:g} s", f"{SHORTEST:g} to {LONGEST:g} s")
    scale = counts_per_mv(unit, "read the stream")
    blocks = ring((v / scale for v in numbers(source, column)), fs, seconds)
    for s in segments(blocks, fs, method):
        yield summary(s)
