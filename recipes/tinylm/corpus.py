"""The mixture that the test models are trained on: the five domains under their tokenizer (src/netsuke/tasks/domains.py)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from netsuke.data.domains import documents
from netsuke.models.tokenizer import HFTokenizer
from netsuke.tasks.domains import SHARE, DomainModeling

__all__ = ["SHARE", "TOKENIZER", "batch_at", "bytes_per_token", "held_out", "stream"]
TOKENIZER = Path(__file__).parent / "tokenizer.json"


@cache
def mixture() -> DomainModeling:
    return DomainModeling(HFTokenizer(TOKENIZER.read_bytes(), bos=0, eos=(0,)))


def stream(domain: str, split: str) -> torch.Tensor:
    """All documents of a domain's split in a fixed shuffled order as one row of ids."""
    return mixture().stream(domain, split)


def batch_at(step: int, batch: int, context: int, seed: int = 0) -> torch.Tensor:
    """Windows (batch, context + 1) of the train splits, drawn with the step as seed."""
    return mixture().batch_at(step, batch, context, seed)


def held_out(domain: str, context: int, rows: int, split: str = "validation") -> torch.Tensor:
    """The first `rows` windows of a domain's held-out text."""
    ids = stream(domain, split)
    count = min(rows, (len(ids) - 1) // context)
    return torch.stack([ids[i * context : (i + 1) * context + 1] for i in range(count)])


@cache
def bytes_per_token(domain: str, split: str = "validation") -> float:
    return sum(len(t.encode()) for t in documents(domain, split)) / len(stream(domain, split))
