"""Adapting a model where it runs: the methods, one file each, and the verb `netsuke train`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from netsuke.verb import verb

PLACES = ("mcu", "here")
NEW = "new"  # in place of a model: begin one


@verb
def train(
    model: str, *, data: str, on: str = "mcu", sram: str = "256KB", plan: str | None = None, epochs: int = 5,
    rate: float | None = None, seed: int = 0, steps: int = 1000, minutes: float | None = None, rounds: int = 1,
    keep: float = 0.5, temperature: float = 1.0, by: str = "batch", parameters: str | None = None, vocab: int = 2048,
    min_tps: float = 0.0, speed: Callable[[Any], float] | None = None, context: int | None = None, out: str | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Adapts a small int8 network as a microcontroller would (on "mcu"), or trains a language model on this machine ("here").

    On "mcu": the chip's kernels, one sample at a time, int8 weights changed in place, everything inside `sram`. What comes out
    is what the chip would hold, bit for bit.

    data    a folder or .zip of <class>/<picture>, or an .npz with x and y; for language a UTF-8 file or folder
    sram    bytes for arena, trained weights and stack
    plan    an update plan (JSON); None: searched by contribution analysis inside `sram`
    rate    on the chip the learning rate of the first step (0.01), which falls as a cosine; here the share of the training
            loop's rates (1 for a new model, 0.1 for a trained one)

    "here" (train/here.py): `steps` or `minutes`; `rounds` 2 goes once more over the share `keep` of hard batches (`temperature`,
    `by` "batch" or "sequence": train/rounds.py). The model "new" is begun first: `parameters` ("2M") in all, a tokenizer of
    `vocab` pieces trained on `data`, the deepest shape that generates `min_tps` tokens a second by `speed`
    (runtime/shape_speed.py: in the engine on this machine, or on a device's card).

    Returns what the place reports: on the chip {plan, classes, before, after (accuracy on test data, of the head alone and of the
    plan), memory, artifact…}, here {steps, tokens, bits_per_byte (validation, before and after), test, artifact…}.
    Raises NetsukeError for unusable input and when nothing fits.
    """
    from netsuke.errors import NetsukeError

    tell = on_progress or (lambda *_: None)
    if on not in PLACES:
        raise NetsukeError(f"train on {on!r}", "there is no such place", ", ".join(PLACES))
    if on == "mcu":
        from netsuke.train.on_mcu import OnMCU

        rate = 0.01 if rate is None else rate
        if epochs < 1 or not 0 < rate < 1e6:
            found = f"epochs {epochs}, rate {rate:g}"
            raise NetsukeError("train with these settings", found, "epochs >= 1, a rate above 0")
        return OnMCU(model, data, sram, epochs, rate, seed, out, tell).run(plan)
    from netsuke.train.here import train_here, train_new
    from netsuke.train.rounds import Rounds

    target = (
        out
        or f"{'trained' if model == NEW else model.rpartition('/')[2].removesuffix('.netsuke') + '-trained'}.netsuke"
    )
    settings: dict[str, Any] = {
        "steps": steps, "minutes": minutes, "rounds": rounds, "seed": seed, "on_progress": tell,
        "how": Rounds(keep, temperature, by, seed=seed) if rounds == 2 else None,
    }  # fmt: skip
    if model == NEW:
        from netsuke.devices import parse_count

        if parameters is None:
            raise NetsukeError("train a new model", "no number of parameters was given", "", "--parameters 2M")
        if min_tps and speed is None:
            raise NetsukeError(
                "train a new model", "a floor of tokens a second and no way to tell a shape's", "speed=…"
            )
        count = parse_count(parameters, "--parameters")
        return train_new(
            data, count, vocab, target, context=context or 256, min_speed=min_tps, speed=speed,
            rate=1.0 if rate is None else rate, **settings,
        )  # fmt: skip
    return train_here(model, data, target, context=context, rate=0.1 if rate is None else rate, **settings)
