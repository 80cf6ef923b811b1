"""Texts that bricks are found with and judged on: a folder of one folder a skill, or the five built-in domains.

Neurons are scored on some texts and judged on others: a domain has a test split; of a user's folder every fifth of a skill's
instances is held back, from the end, so that they are other texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from netsuke.apps.bricks.store import Opened, check_id
from netsuke.compress.bricks import LEAST
from netsuke.data.domains import DOMAINS, documents, missing
from netsuke.errors import NetsukeError
from netsuke.tasks.language import TEXT_ENDINGS, read_utf8
from netsuke.tasks.skills import instances, read_skills

BUILT_IN = "domains"
FEWEST_HELD = 5  # instances of a skill that a loss is measured on


@dataclass(frozen=True)
class Skills:
    """Skill -> instances (N, T): `found` to name neurons by, `held` to judge them on (empty where there are too few)."""

    found: dict[str, Tensor]
    held: dict[str, Tensor]


def check_length(source: Opened, length: int) -> None:
    """Raises NetsukeError for instances that do not fit into the model's context."""
    largest = source.loaded.model.cfg.context - 1
    if not 4 <= length <= largest:
        raise NetsukeError(
            "cut texts into instances", f"--length {length}", f"4 to {largest} tokens, the model's context"
        )


def read(source: Opened, place: str, length: int, count: int) -> Skills:
    """Instances of `length` tokens, at most `count` a skill, from DIR/<skill>/*.txt or, for "domains", from the built-in ones.

    Raises NetsukeError for a folder that is not there, fewer than two skills, too few instances, and bytes that are no UTF-8.
    """
    check_length(source, length)
    if count < LEAST:
        raise NetsukeError("find bricks", f"--count {count}", f"{LEAST} or more instances a skill")
    tokenizer, bos = source.tokenizer, source.loaded.model.cfg.bos
    if place == BUILT_IN and not Path(place).exists():
        if absent := missing(DOMAINS):
            raise NetsukeError(
                "read the built-in domains", f"absent: {', '.join(absent)}", "their files below NETSUKE_DATA",
                "--skills DIR with texts of your own, DIR/<skill>/*.txt",
            )  # fmt: skip
        found, held = (
            {d: instances(documents(d, split), tokenizer, bos, length, n) for d in DOMAINS}
            for split, n in (("train", count), ("test", max(count // 4, FEWEST_HELD)))
        )
        return Skills(found, held)
    if not Path(place).is_dir():
        found = "it is no folder" if Path(place).exists() else "there is no such folder"
        raise NetsukeError(f"read skills from {place}", found, "DIR/<skill>/*.txt, or domains")
    every = read_skills(place, tokenizer, bos, length, count)
    for name in every:
        check_id(name, f"read skills from {place}")
    spare = {name: min(len(ids) // 5, len(ids) - LEAST) for name, ids in every.items()}
    held = {name: ids[len(ids) - spare[name] :] for name, ids in every.items() if spare[name] >= FEWEST_HELD}
    if len(held) < len(every):
        held = {}
    return Skills({name: ids[: len(ids) - spare[name]] if held else ids for name, ids in every.items()}, held)


def rows_of(source: Opened, place: str, length: int, count: int) -> Tensor:
    """Instances (N, T) of one kind of text: a file, or a folder with all texts below it. Raises NetsukeError as `read`."""
    check_length(source, length)
    path = Path(place)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in TEXT_ENDINGS)
    elif path.is_file():
        files = [path]
    else:
        raise NetsukeError(f"read texts from {place}", "there is no such file or folder", "UTF-8 text")
    got = instances(map(read_utf8, files), source.tokenizer, source.loaded.model.cfg.bos, length, count, count)
    if len(got) < LEAST:
        found = f"{len(got)} instances of {length} tokens"
        raise NetsukeError(f"read texts from {place}", found, f"{LEAST} or more", "more text or a smaller --length")
    return got


def other_text(source: Opened, place: str | None, length: int, count: int) -> Tensor:
    """Text that an edit must leave alone: `place`, by default whatever of the built-in domains is there (Python's own library
    always is), mixed."""
    if place is not None:
        return rows_of(source, place, length, count)
    check_length(source, length)
    here = [d for d in DOMAINS if not missing((d,))]
    tokenizer, bos = source.tokenizer, source.loaded.model.cfg.bos
    every = [instances(documents(d, "train"), tokenizer, bos, length, -(-count // len(here))) for d in here]
    mixed = torch.cat(every)
    return mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(0))]
