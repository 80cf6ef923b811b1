"""The mixture that the test models are trained on: five domains (src/netsuke/data/domains.py), windows drawn by share.

Small domains are seen three to five times while a 6 M model trains, the library less than once: the shares are a
compromise between balance, which telling skills apart needs, and repetition.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer

from netsuke.data.domains import DOMAINS, documents

SHARE = {"coding": 0.3, "math": 0.22, "knowledge": 0.2, "writing": 0.18, "translation": 0.1}
TOKENIZER = Path(__file__).parent / "tokenizer.json"


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


@cache
def stream(domain: str, split: str) -> torch.Tensor:
    """All documents of a domain's split in a fixed shuffled order as one row of ids, each opened by <|text|> (id 0)."""
    texts = list(documents(domain, split))
    random.Random(0).shuffle(texts)
    ids: list[int] = []
    for coded in tokenizer().encode_batch(texts):
        ids.append(0)
        ids.extend(coded.ids)
    return torch.tensor(ids, dtype=torch.long)


def batch_at(step: int, batch: int, context: int, seed: int = 0) -> torch.Tensor:
    """Windows (batch, context + 1) of the train splits, drawn with the step as seed: a resumed run sees the same ones."""
    rng = random.Random(f"{seed}/{step}")
    rows = []
    for domain in rng.choices(DOMAINS, [SHARE[d] for d in DOMAINS], k=batch):
        ids = stream(domain, "train")
        start = rng.randrange(len(ids) - context)
        rows.append(ids[start : start + context + 1])
    return torch.stack(rows)


def held_out(domain: str, context: int, rows: int, split: str = "validation") -> torch.Tensor:
    """The first `rows` windows of a domain's held-out text."""
    ids = stream(domain, split)
    count = min(rows, (len(ids) - 1) // context)
    return torch.stack([ids[i * context : (i + 1) * context + 1] for i in range(count)])


@cache
def bytes_per_token(domain: str, split: str = "validation") -> float:
    return sum(len(t.encode()) for t in documents(domain, split)) / len(stream(domain, split))
