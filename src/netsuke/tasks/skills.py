"""Labelled texts as instances of one length: what skills of a model are found with (compress/bricks.py).

A skill is a folder of texts, `skills/coding/*.py`, `skills/math/*.txt`; its name is the folder's. An instance is `length` tokens
of one text behind the start token; a long text gives a few, so that it does not stand for its skill.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from netsuke.errors import NetsukeError
from netsuke.models.tokenizer import Tokenizer
from netsuke.tasks.language import TEXT_ENDINGS, read_utf8

PER_TEXT = 8  # instances from one text at most
LONG = 8  # characters a token has at most, roughly: what lies beyond is not encoded


def instances(
    texts: Iterable[str], tokenizer: Tokenizer, bos: int | None, length: int, count: int, per_text: int = PER_TEXT
) -> Tensor:
    """(count, length) ids, or 1 + length with a start token, from texts in a fixed shuffled order; fewer where they end."""
    chosen, rows, head = list(texts), [], [] if bos is None else [bos]
    random.Random(0).shuffle(chosen)
    for text in chosen:
        ids = tokenizer.encode(text[: LONG * length * per_text])
        pieces = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        rows += [[*head, *piece] for piece in pieces[:per_text]]
        if len(rows) >= count:
            break
    return torch.tensor(rows[:count], dtype=torch.long).view(-1, length + len(head))


def read_skills(
    folder: str | Path, tokenizer: Tokenizer, bos: int | None, length: int = 64, count: int = 400
) -> dict[str, Tensor]:
    """Skill -> instances, as `bricks.find` takes them. Raises NetsukeError when the folder holds fewer than two folders, and
    for a folder without a text of `length` tokens."""
    folder, out = Path(folder), {}
    asked = f"read skills from {folder.name}"
    names = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if len(names) < 2:
        raise NetsukeError(asked, f"it holds {len(names)} folders", "one folder of texts for each skill, two or more")
    for place in names:
        files = sorted(p for p in place.rglob("*") if p.is_file() and p.suffix.lower() in TEXT_ENDINGS)
        got = instances(map(read_utf8, files), tokenizer, bos, length, count)
        if not len(got):
            raise NetsukeError(asked, f"{place.name} has no text of {length} tokens", "texts", "a smaller length")
        out[place.name] = got
    return out
