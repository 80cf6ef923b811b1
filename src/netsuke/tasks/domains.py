"""Language modelling over several domains of text: training windows drawn by share, quality in bits per byte of each.

    batch_at(step)              (batch, context + 1) ids for a step of training, the same ones whenever it is asked
    bits_per_byte(model, split) {domain: bits per byte, …, "all": their mean}

Bits per byte is the only figure that compares models whose tokenizers differ: perplexity per token gets better by merely
changing the tokenizer. Every tokenizer is scored on the very same bytes, `scored_bytes` of each domain, tail included.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from netsuke.data import domains
from netsuke.errors import NetsukeError
from netsuke.models.tokenizer import Tokenizer
from netsuke.tasks.base import Split
from netsuke.tasks.language import token_losses

# Small domains are seen three to five times while a 6 M model trains on 40 M tokens, the library less than once: a compromise
# between balance, which telling skills apart needs, and repetition.
SHARE = {"coding": 0.3, "math": 0.22, "knowledge": 0.2, "writing": 0.18, "translation": 0.1}
CALIBRATION = 64  # batches that `batches("train")` yields when no limit is given: training asks `batch_at`


@dataclass
class DomainModeling:
    """A task (tasks/base.py) over domains.

    share         domain -> share of the training windows
    seed          of the windows that are drawn
    scored_bytes  of each domain's held-out text that are scored
    documents     (domain, split) -> texts; by default those of data/domains.py
    """

    tokenizer: Tokenizer
    context: int = 512
    batch: int = 16
    share: dict[str, float] = field(default_factory=lambda: dict(SHARE))
    seed: int = 0
    scored_bytes: int = 30_000
    documents: Callable[[str, str], Sequence[str]] = domains.documents
    metric: str = "bits per byte"
    higher_is_better: bool = False
    _streams: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)
    _scored: dict[tuple[str, str], tuple[list[Tensor], int]] = field(default_factory=dict, repr=False)

    def texts(self, domain: str, split: Split) -> list[str]:
        """The documents of a domain's split in a fixed shuffled order."""
        texts = list(self.documents(domain, split))
        random.Random(0).shuffle(texts)
        return texts

    def stream(self, domain: str, split: Split) -> Tensor:
        """All documents as one row of ids, (N,), each opened by the tokenizer's opening token."""
        if (domain, split) not in self._streams:
            ids = [i for text in self.texts(domain, split) for i in self.tokenizer.encode(text, bos=True)]
            self._streams[domain, split] = torch.tensor(ids, dtype=torch.long)
        return self._streams[domain, split]

    def batch_at(
        self, step: int, batch: int | None = None, context: int | None = None, seed: int | None = None
    ) -> Tensor:
        """Train windows (batch, context + 1), drawn with the step as seed: a resumed run sees the same ones.

        Raises NetsukeError when a domain's text is shorter than one window.
        """
        batch, context = batch or self.batch, context or self.context
        rng, rows = random.Random(f"{self.seed if seed is None else seed}/{step}"), []
        for domain in rng.choices(list(self.share), list(self.share.values()), k=batch):
            ids = self.stream(domain, "train")
            if len(ids) <= context:
                found = f"the train text of {domain} has {len(ids)} tokens"
                raise NetsukeError("draw a window", found, f"more than {context}", "a smaller context, a longer text")
            start = rng.randrange(len(ids) - context)
            rows.append(ids[start : start + context + 1])
        return torch.stack(rows)

    def scored(self, domain: str, split: Split) -> tuple[list[Tensor], int]:
        """Rows of ids without overlap that cover the first `scored_bytes` bytes of a split, the last row shorter, and the
        number of bytes."""
        if (domain, split) not in self._scored:
            ids, size = [], 0
            for text in self.texts(domain, split):
                part = text.encode()[: self.scored_bytes - size].decode(errors="ignore")  # never half a character
                ids += self.tokenizer.encode(part, bos=True)
                size += len(part.encode())
                if len(part) < len(text):
                    break
            if len(ids) < 2:
                raise NetsukeError(f"score the {split} text of {domain}", "it is empty", "UTF-8 text")
            row = torch.tensor(ids)
            starts = range(0, len(row) - 1, self.context)
            self._scored[domain, split] = [row[s : s + self.context + 1] for s in starts], size
        return self._scored[domain, split]

    def batches(self, split: Split, limit: int | None = None) -> Iterator[Tensor]:
        """Batches of whole windows; held-out ones are dealt from all domains in turn, so that any prefix is a fair sample."""
        if split == "train":
            yield from (self.batch_at(step) for step in range(CALIBRATION if limit is None else limit))
            return
        whole = [[r for r in self.scored(d, split)[0] if len(r) == self.context + 1] for d in self.share]
        dealt = [rows[i] for i in range(max(map(len, whole))) for rows in whole if i < len(rows)]
        for i in range(0, len(dealt), self.batch):
            if limit is not None and i >= limit * self.batch:
                return
            yield torch.stack(dealt[i : i + self.batch])

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean next-token loss in nats."""
        return token_losses(model, batch).mean()

    @torch.no_grad()
    def bits_per_byte(self, model: nn.Module, split: Split, limit: int | None = None) -> dict[str, float]:
        """Bits per byte of every domain, and "all": their mean. `limit` caps the batches of a domain."""
        out = {}
        for domain in self.share:
            rows, size = self.scored(domain, split)
            whole = [r for r in rows if len(r) == self.context + 1]
            groups = [torch.stack(whole[i : i + self.batch]) for i in range(0, len(whole), self.batch)]
            groups = (groups + [r[None] for r in rows if len(r) <= self.context])[:limit]
            nats = sum(float(token_losses(model, g).double().sum()) for g in groups)
            share = sum(g[:, 1:].numel() for g in groups) / sum(len(r) - 1 for r in rows)
            out[domain] = nats / math.log(2) / (size * share)
        return out | {"all": sum(out.values()) / len(out)}

    def score(self, model: nn.Module, split: Split, limit: int | None = None) -> float:
        """Bits per byte, the mean over domains."""
        return self.bits_per_byte(model, split, limit)["all"]

    def facts(self) -> dict:
        splits = {}
        for split in ("train", "validation", "test"):
            each = {d: "\0".join(self.texts(d, split)).encode() for d in self.share}
            splits[split] = {d: {"bytes": len(t), "sha256": hashlib.sha256(t).hexdigest()} for d, t in each.items()}
        return {"source": ", ".join(self.share), "metric": self.metric, "context": self.context, "splits": splits}


def equal_sample(size: int, share: Sequence[str] = domains.DOMAINS) -> list[str]:
    """`size` bytes of every domain's train text (all of it where there is less): what a tokenizer is trained or trimmed on."""
    return [text for domain in share for text in domains.sample(domain, "train", size)]
