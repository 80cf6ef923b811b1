"""Adapting a model where it runs: the methods, one file each, and the verb `netsuke train`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from netsuke.verb import verb

PLACES = ("mcu",)


@verb
def train(
    model: str, *, data: str, on: str = "mcu", sram: str = "256KB", plan: str | None = None, epochs: int = 5,
    rate: float = 0.01, seed: int = 0, out: str | None = None, on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Adapts a small int8 network to the user's own classes as a microcontroller would: the chip's kernels, one sample at a
    time, int8 weights changed in place, everything inside `sram`. What comes out is what the chip would hold, bit for bit.

    data    a folder or .zip of <class>/<picture>, or an .npz with x and y
    sram    bytes for arena, trained weights and stack
    plan    an update plan (JSON); None: searched by contribution analysis inside `sram`
    rate    learning rate of the first step; it falls as a cosine

    Returns {plan, classes, before, after (accuracy on test data, of the head alone and of the plan), memory, artifact…}.
    Raises NetsukeError for unusable input and when nothing fits.
    """
    from netsuke.errors import NetsukeError
    from netsuke.train.on_mcu import OnMCU

    if on not in PLACES:
        raise NetsukeError(f"train on {on!r}", "there is no such place", ", ".join(PLACES))
    if epochs < 1 or not 0 < rate < 1e6:
        raise NetsukeError(
            "train with these settings", f"epochs {epochs}, rate {rate:g}", "epochs >= 1, a rate above 0"
        )
    run = OnMCU(model, data, sram, epochs, rate, seed, out, on_progress or (lambda *_: None))
    return run.run(plan)
