"""Packing blocks whose size changes with time into the least memory: the mathematics under `arena`.

Each block is a list of spans, rectangles of steps and bytes, that keep their places relative to each other. A block gets
one base address; spans of two blocks that share a step must not share a byte. Strip packing is NP-hard: several greedy
orders (first fit, by size, by size x lifetime, by first use, by lifetime), then a seeded search over orders that ends at
the lower bound or after a fixed number of placements, so that a graph has one plan on every machine.
Greedy by size: Pisarchyk and Lee, 2020.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import NamedTuple

import numpy as np

ALIGNMENT = 4  # bytes; the chips load words, and no tensor of a network needs more
PLACEMENTS = 30_000  # of blocks, in one search: about a second where the bound is not met


class Span(NamedTuple):
    """Bytes low…high-1 (of a block) that belong to `tensor` (-1: scratch) and are live from step start to step end."""

    start: int
    end: int
    low: int
    high: int
    tensor: int


def up(n: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def union(intervals: list[tuple[int, int]]) -> int:
    """Bytes covered by intervals that may overlap."""
    total, reached = 0, None
    for low, high in sorted(intervals):
        total += max(0, high - (low if reached is None else max(low, reached)))
        reached = high if reached is None else max(reached, high)
    return total


def live_bytes(blocks: list[list[Span]], steps: int) -> np.ndarray:
    """int64 (steps,): bytes live at each step."""
    live = np.zeros(steps, np.int64)
    for spans in blocks:
        edges = sorted({s.start for s in spans} | {s.end + 1 for s in spans})
        for start, end in pairwise(edges):
            live[start:end] += union([(s.low, s.high) for s in spans if s.start <= start <= s.end])
    return live


def pack(
    blocks: list[list[Span]], floors: list[int], bound: int, placements: int = PLACEMENTS
) -> tuple[list[int], int]:
    """(base address per block, size of the whole): each base at least its floor, a multiple of ALIGNMENT.

    Stops early once the size is within `bound` bytes; `placements` 0 keeps the best greedy order.
    """
    n = len(blocks)
    clashes = _clashes(blocks)
    tops = [max(s.high for s in b) for b in blocks]

    def place(order: list[int]) -> tuple[list[int], int]:
        bases: list[int | None] = [None] * n
        for b in order:
            taken = sorted((bases[a] + low, bases[a] + high) for a, low, high in clashes[b] if bases[a] is not None)
            at = up(floors[b])
            for low, high in taken:  # `at` is free unless low < at < high
                if low >= at:
                    break
                at = max(at, up(high))
            bases[b] = at
        return bases, max((bases[b] + tops[b] for b in range(n)), default=0)

    height = [max(s.high for s in b) - min(s.low for s in b) for b in blocks]
    start = [min(s.start for s in b) for b in blocks]
    length = [max(s.end for s in b) - start[k] + 1 for k, b in enumerate(blocks)]
    keys = (lambda b: -height[b], lambda b: -height[b] * length[b], lambda b: start[b], lambda b: -length[b])
    best = min(((*place(o), o) for o in (sorted(range(n), key=k) for k in keys)), key=lambda x: x[1])
    bases, size, order = best
    rng = random.Random(0)
    for _ in range(placements // max(n, 1)):
        if size <= bound:
            break
        top = [b for b in range(n) if bases[b] + tops[b] == size]
        moved = rng.choice(top) if rng.random() < 0.5 else rng.randrange(n)
        tried = [b for b in order if b != moved]
        tried.insert(rng.randrange(order.index(moved) + 1) if moved in top else rng.randrange(n), moved)
        found, reached = place(tried)
        if reached <= size:
            bases, size, order = found, reached, tried
    return bases, size


def _clashes(blocks: list[list[Span]]) -> list[list[tuple[int, int, int]]]:
    """Per block b, (other block a, low, high): with a at address 0, b may not be at low < address < high."""
    owner = np.array([k for k, b in enumerate(blocks) for _ in b])
    table = np.array([s[:4] for b in blocks for s in b], np.int64).reshape(-1, 4)
    out = []
    for k, spans in enumerate(blocks):
        found = set()
        for s in spans:
            near = np.flatnonzero((table[:, 0] <= s.end) & (table[:, 1] >= s.start) & (owner != k))
            found.update((int(owner[j]), int(table[j, 2]) - s.high, int(table[j, 3]) - s.low) for j in near)
        out.append(sorted(found))
    return out
