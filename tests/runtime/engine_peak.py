"""What tests/runtime/test_engine.py runs in a fresh process to measure its peak."""

from __future__ import annotations

from pathlib import Path

from netsuke import _native  # noqa: F401  (the library's own pages are no part of the figure)
from netsuke.runtime.engine import Engine


def fill(folder: str) -> dict[str, int]:
    """Opens an artifact, fills its context, and returns the memory that the engine says it takes."""
    with Engine(Path(folder), chunk=128, threads=1) as engine:
        for at in range(0, engine.context, engine.chunk):
            part = [(at + i) % engine.vocab for i in range(min(engine.chunk, engine.context - at))]
            engine.forward(part, [0] * len(part))
        return engine.memory()
