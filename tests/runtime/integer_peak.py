"""What tests/runtime/test_integer_plan.py runs in a fresh process to measure its peak."""

from __future__ import annotations

from netsuke.runtime.allocator import return_freed_memory
from netsuke.runtime.integer_engine import IntegerEngine


def fill(folder: str, context: int) -> dict[str, int]:
    """Opens an artifact as `netsuke run` does, fills the context but for 8 tokens, and decodes those."""
    return_freed_memory()
    with IntegerEngine.load(folder, context=context) as engine:
        for at in range(0, context - 8, engine.chunk):
            part = [(at + i) % engine.vocab for i in range(min(engine.chunk, context - 8 - at))]
            engine.forward(part, [0] * len(part))
        for _ in range(8):
            engine.forward([3], [0])
        return engine.memory()
