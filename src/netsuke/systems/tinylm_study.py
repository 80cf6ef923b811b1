"""Which trainings tinylm's claims rest on, and what is chosen from them on validation text.

    python -m netsuke.systems.tinylm_study [--cache FOLDER]     all cells, in the order in which they build on one another
    netsuke reproduce tinylm                                    the same on demand, and the claims

Stages   tokenizer   four vocabularies at one budget, and the chosen middle one trained instead of trimmed
         shape       random shapes, one seed each
         inherit     a tenth of a training from each score; the score that validation text prefers goes the whole way
         rounds      one round, then a second one over all, half at random, half by hardness
         stack       baseline, + tokenizer, + shape, + inheritance, + second round
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from netsuke.errors import NetsukeError
from netsuke.models.load import find
from netsuke.systems.tinylm_cells import (
    DRAWS,
    FULL,
    MISALIGNED,
    SCORES,
    TEACHER,
    Scale,
    again,
    config,
    drawn_shapes,
    inside_teacher,
    settings_of,
    study_shape,
    trained,
)

Row = dict[str, Any]
SHARP = tuple(d for d in DRAWS if d not in ("whole", "uniform"))
STEPS = ("baseline", "tokenizer", "shape", "inheritance", "second round")


def bits(row: Row, split: str = "test") -> float:
    return row["bits_per_byte"][split]["all"]


def mean(rows: list[Row], split: str = "test") -> float:
    return statistics.fmean(bits(r, split) for r in rows)


def sized(tokenizer: str, s: Scale) -> list[Row]:
    """The tokenizer study's trainings under a tokenizer, one a seed."""
    shape = study_shape(tokenizer, s)
    return [trained(settings_of(tokenizer, shape, seed), s) for seed in range(s.seeds)]


@cache
def chosen_vocab(s: Scale) -> int:
    return min(s.sizes[1:], key=lambda v: mean(sized(str(v), s), "validation"))


def shaped(s: Scale) -> list[Row]:
    return [trained(settings_of(str(s.middle), shape, 0), s) for shape in drawn_shapes(s)]


@cache
def chosen_shape(s: Scale) -> tuple[int, int]:
    """The drawn shape that validation text likes best, of those that can be cut from the teacher under the chosen vocabulary."""
    vocab, fit = str(chosen_vocab(s)), []
    for shape, row in zip(drawn_shapes(s), shaped(s)):
        cfg = config(vocab, *shape, s)
        if cfg is not None and inside_teacher(cfg):
            fit.append((bits(row, "validation"), shape))
    if not fit:
        raise NetsukeError("choose a shape", "none of the drawn ones is a part of the teacher", "more shapes")
    return min(fit)[1]


def student(start: str, seed: int, s: Scale, **rest) -> dict[str, Any]:
    return settings_of(str(chosen_vocab(s)), chosen_shape(s), seed, start, **rest)


def tenth(score: str, s: Scale) -> list[Row]:
    """The first tenth of a training from this start: the schedule is that of the whole."""
    return [trained(student(score, seed, s, stop=0.1), s) for seed in range(s.seeds)]


def tenth_loss(score: str, s: Scale, split: str) -> float:
    return statistics.fmean(r["marks"]["0.1"][split] for r in tenth(score, s))


@cache
def chosen_score(s: Scale) -> str:
    return min(SCORES[1:], key=lambda k: tenth_loss(k, s, "validation"))


def whole_way(start: str, s: Scale) -> list[Row]:
    """ "fresh", or the chosen score: trained to the end, models kept for a second round on top."""
    return [trained(student(start, seed, s, keep=start != "fresh"), s) for seed in range(s.seeds)]


def round_base(seed: int, s: Scale) -> dict[str, Any]:
    return settings_of(str(s.middle), study_shape(str(s.middle), s), seed, steps=s.round_steps, keep=True)


def rounds(draw: str | None, s: Scale) -> list[Row]:
    """After the first round (None), or after a second one by this draw; one row a seed."""
    bases = [round_base(seed, s) for seed in range(s.round_seeds)]
    return [trained(b, s) if draw is None else again(b, draw, s) for b in bases]


@cache
def chosen_draw(s: Scale) -> str:
    return min(SHARP, key=lambda d: mean(rounds(d, s), "validation"))


def on_top(s: Scale) -> list[Row]:
    """As the paper does it: half as many steps again after the whole training."""
    bases = [student(chosen_score(s), seed, s, keep=True) for seed in range(s.seeds)]
    return [again(b, chosen_draw(s), s) for b in bases]


def within(s: Scale) -> list[Row]:
    """At the same number of steps: two thirds are the first round, a third the second."""
    steps = round(s.steps * 2 / 3)
    bases = [student(chosen_score(s), seed, s, steps=steps, keep=True) for seed in range(s.seeds)]
    return [again(b, chosen_draw(s), s) for b in bases]


def stack(step: str, s: Scale) -> list[Row]:
    return {
        "baseline": lambda: sized(str(s.sizes[0]), s), "tokenizer": lambda: sized(str(chosen_vocab(s)), s),
        "shape": lambda: whole_way("fresh", s), "inheritance": lambda: whole_way(chosen_score(s), s),
        "second round": lambda: within(s),
    }[step]()  # fmt: skip


def stages(s: Scale) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything, in order; what is chosen is known when its stage is reached."""
    for vocab in s.sizes:
        yield f"tokenizer {vocab}", lambda v=vocab: mean(sized(str(v), s))
    yield "tokenizer retrained", lambda: mean(sized(f"retrained {s.middle}", s))
    yield "shapes", lambda: [round(bits(r), 3) for r in shaped(s)]
    yield "rounds, first", lambda: mean(rounds(None, s))
    for draw in DRAWS:
        yield f"rounds, {draw}", lambda d=draw: mean(rounds(d, s))
    find(TEACHER)  # raises, with the reason, where it is not there yet
    for score in (*SCORES, MISALIGNED):
        yield f"inherit a tenth, {score}", lambda k=score: tenth_loss(k, s, "test")
    for step in STEPS[2:]:
        yield f"stack, {step}", lambda k=step: mean(stack(k, s))
    yield "stack, second round on top", lambda: mean(on_top(s))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--cache", help="folder of the cells, instead of $NETSUKE_CACHE")
    args = ask.parse_args()
    if args.cache:
        os.environ["NETSUKE_CACHE"] = args.cache
    begin = time.perf_counter()
    for name, run in stages(FULL):
        got = run()
        shown = f"{got:.4f}" if isinstance(got, float) and math.isfinite(got) else str(got)
        print(f"{(time.perf_counter() - begin) / 60:6.1f} min  {name:28} {shown}", flush=True)


if __name__ == "__main__":
    main()
