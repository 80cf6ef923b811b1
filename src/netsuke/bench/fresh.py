"""What the fresh processes of `netsuke bench lm` run: opening a model up to its first token, and the peak of a short run.

Everything that any side imports is imported here, before the idle level is taken (measure/peak.py), for both sides alike:
what is measured afterwards is the model's own.
"""

from __future__ import annotations

import contextlib
import time

import numpy as np

from netsuke.bench.peers import open_side

with contextlib.suppress(ImportError):
    import llama_cpp

    llama_cpp.llama_backend_init()

PROMPT, STEPS = 32, 8


def start(
    name: str, folder: str, file: str | None, context: int, threads: int, vocab: int, long: int
) -> dict[str, float]:
    """Opens a side, makes the first token of a prompt of 32 ({"load": seconds}), then runs a prompt of `long` tokens and
    eight more, for the peak."""
    ids = [int(i) for i in np.random.default_rng(0).integers(0, vocab, max(long, PROMPT))]
    begin = time.perf_counter()
    side = open_side(name, folder, file, context, 1, threads)
    side.feed([ids[:PROMPT]])
    side.logits()[0].argmax()
    seconds = time.perf_counter() - begin
    side.cut(0)
    side.feed([ids[:long]])
    for token in ids[:STEPS]:
        side.feed([[token]])
    side.close()
    return {"load": seconds}
