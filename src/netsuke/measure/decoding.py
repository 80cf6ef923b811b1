"""How fast an engine answers: seconds per generated token and per prompt, medians on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 5
TOKENS = 16  # generated per round: enough to outlast the scheduler's hiccups, few enough for a large model


@dataclass(frozen=True)
class DecodingSpeed:
    """Seconds: per generated token with half of the context behind it, and for a prompt of `prompt_tokens`."""

    token: float
    prompt: float
    prompt_tokens: int


def decoding_speed(
    forward: Callable, truncate: Callable[[int, int], None], vocab: int, context: int, chunk: int = 256,
    text: Sequence[int] = (),
) -> DecodingSpeed:  # fmt: skip
    """Times an engine whose `forward(tokens, slots)` extends slot 0 and whose `truncate(slot, length)` shortens it.

    Tokens are those of `text`, over and over, or random with a fixed seed: where all weights are read, what a token is does
    not change how long it takes; input-sparse maps read as much as real text asks for. The first round is not counted.
    """
    rng, at_text = np.random.default_rng(0), 0

    def some(count: int) -> np.ndarray:
        nonlocal at_text
        if not len(text):
            return rng.integers(0, vocab, count)
        at_text += count
        return np.take(text, range(at_text - count, at_text), mode="wrap")

    prompt = min(128, chunk, max(context // 2, 1))
    behind = max(min(context // 2, context - TOKENS - 1), 1)
    steps = min(TOKENS, context - behind)
    token, whole = [], []
    for _ in range(ROUNDS + 1):
        truncate(0, 0)
        start = time.perf_counter()
        forward(some(prompt), [0] * prompt)
        whole.append(time.perf_counter() - start)
        truncate(0, 0)
        for at in range(0, behind, chunk):
            size = min(chunk, behind - at)
            forward(some(size), [0] * size)
        start = time.perf_counter()
        for one in some(steps):
            forward([one], [0])
        token.append((time.perf_counter() - start) / steps)
    return DecodingSpeed(statistics.median(token[1:]), statistics.median(whole[1:]), prompt)
