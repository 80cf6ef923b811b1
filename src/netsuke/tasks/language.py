"""Language modelling: next-token loss on text, scored as perplexity per token and as bits per byte.

Bits per byte is the figure that compares across tokenizers; perplexity is the task's metric because a model is compared
with its own carved self, under one tokenizer.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netsuke.data import domains, pysource
from netsuke.errors import NetsukeError
from netsuke.models.tokenizer import Tokenizer
from netsuke.tasks.base import Split

if TYPE_CHECKING:
    from netsuke.models.load import Loaded

DOMAIN_BYTES = {"train": 400_000, "validation": 60_000, "test": 60_000}  # of each kind of built-in text, at most
TEXT_ENDINGS = {".txt", ".md", ".py", ".rst", ".json", ".jsonl", ".csv", ".html", ".c", ".h", ".js", ".ts"}


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Loss in nats of every token but the first, (B, T-1)."""
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


@torch.no_grad()
def strided_loss(model: nn.Module, ids: Tensor, context: int, stride: int, batch: int = 8) -> float:
    """Mean loss in nats of ids[1:] (N,), each seen with at least `context - stride` tokens before it where there are any:
    what a compressor built on the model would pay."""
    total, starts = 0.0, list(range(0, max(len(ids) - 1 - (context - stride), 1), stride))
    for group in range(0, len(starts), batch):
        chosen = starts[group : group + batch]
        whole = [s for s in chosen if s + context < len(ids)]
        for part in ([whole] if whole else []) + [[s] for s in chosen if s not in whole]:
            rows = torch.stack([ids[s : s + context + 1] for s in part])
            losses = token_losses(model, rows).double()
            for start, row in zip(part, losses):
                total += float(row[0 if start == 0 else context - stride :].sum())
    return total / (len(ids) - 1)


@dataclass
class LanguageModeling:
    """Windows of `context` tokens over the text of each split, in order, without overlap.

    texts    split -> text; disjoint by construction of whoever calls (`python_library`, `from_path`)
    batch    windows per batch
    """

    texts: dict[str, str]
    tokenizer: Tokenizer
    context: int = 512
    batch: int = 8
    source: str = ""
    metric: str = "perplexity"
    higher_is_better: bool = False
    _ids: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def python_library(cls, tokenizer: Tokenizer, context: int = 512, batch: int = 8) -> LanguageModeling:
        """The standard library of this interpreter, split by module path (data/pysource.py)."""
        texts = {split: pysource.text(split) for split in pysource.SPLITS}
        return cls(texts, tokenizer, context, batch, source="Python standard library, split by module path")

    @classmethod
    def built_in_domains(cls, tokenizer: Tokenizer, context: int = 512, batch: int = 8) -> LanguageModeling:
        """The kinds of text in data/domains.py that are here, as many bytes of each (the library is there always), documents of
        all kinds mixed, so that any prefix of a split is a fair sample."""
        here, texts = [d for d in domains.DOMAINS if not domains.missing((d,))], {}
        for split in pysource.SPLITS:
            size = min(DOMAIN_BYTES[split], min(sum(map(len, domains.documents(d, split))) for d in here))
            mixed = [text for d in here for text in domains.sample(d, split, size)]
            random.Random(0).shuffle(mixed)
            texts[split] = "\n".join(mixed)
        return cls(texts, tokenizer, context, batch, source=f"built-in domains: {', '.join(here)}")

    @classmethod
    def from_path(cls, path: str | Path, tokenizer: Tokenizer, context: int = 512, batch: int = 8) -> LanguageModeling:
        """A user's text: a file is cut 80/10/10 in order, a folder is split by files.

        Raises NetsukeError for a missing, empty, or non-UTF-8 source, and for one too short for three splits.
        """
        path = Path(path)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in TEXT_ENDINGS)
            bodies = [read_utf8(p) for p in files]
            if len(bodies) >= 10:
                texts = {"train": "", "validation": "", "test": ""}
                for i, body in enumerate(bodies):  # every tenth file validates, every tenth tests
                    texts["test" if i % 10 == 9 else "validation" if i % 10 == 8 else "train"] += body + "\n"
            else:
                texts = _cut_in_order("\n".join(bodies))
        elif path.is_file():
            texts = _cut_in_order(read_utf8(path))
        else:
            raise NetsukeError(
                f"read text from {path.name}", "there is no such file or folder", "a text file or a folder"
            )
        task = cls(texts, tokenizer, context, batch, source=path.name)
        for split in pysource.SPLITS:
            if task.ids(split).numel() < 2 * context:
                raise NetsukeError(
                    f"use {path.name} as data", f"its {split} part has {task.ids(split).numel()} tokens",
                    f"at least {2 * context} in every part (80 % train, 10 % validation, 10 % test)", "a longer text",
                )  # fmt: skip
        return task

    def ids(self, split: Split) -> Tensor:
        """All tokens of one split, (N,)."""
        if split not in self._ids:
            self._ids[split] = torch.tensor(self.tokenizer.encode(self.texts[split]), dtype=torch.long)
        return self._ids[split]

    def windows(self, split: Split) -> Tensor:
        """(W, context + 1) ids. Train windows are dealt in a fixed shuffled order so that any prefix is a fair sample."""
        ids = self.ids(split)
        n = max((len(ids) - 1) // self.context, 0)
        rows = torch.stack([ids[i * self.context : (i + 1) * self.context + 1] for i in range(n)]) if n else ids[None]
        if split == "test":
            return rows
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]

    def batches(self, split: Split, limit: int | None = None) -> Iterator[Tensor]:
        for i, rows in enumerate(self.windows(split).split(self.batch)):
            if limit is not None and i >= limit:
                return
            yield rows

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return token_losses(model, batch).mean()

    @torch.no_grad()
    def mean_loss(self, model: nn.Module, split: Split, limit: int | None = None) -> float:
        """Mean next-token loss in nats."""
        total, count = 0.0, 0
        for rows in self.batches(split, limit):
            losses = token_losses(model, rows)
            total, count = total + float(losses.double().sum()), count + losses.numel()
        return total / count

    def score(self, model: nn.Module, split: Split, limit: int | None = None) -> float:
        """Perplexity per token."""
        return math.exp(min(self.mean_loss(model, split, limit), 80.0))

    def bits_per_byte(self, mean_loss: float, split: Split) -> float:
        """Mean loss in nats per token -> bits per byte of this split's text."""
        return mean_loss * len(self.ids(split)) / math.log(2) / len(self.texts[split].encode())

    def facts(self) -> dict:
        return {
            "source": self.source, "metric": self.metric, "context": self.context,
            "splits": {
                s: {"bytes": len(t.encode()), "tokens": len(self.ids(s)), "sha256": hashlib.sha256(t.encode()).hexdigest()}
                for s, t in self.texts.items()
            },
        }  # fmt: skip


def language_task(loaded: Loaded, data: str | None, context: int | None) -> LanguageModeling:
    """The task on which a loaded model is measured: `data` (a UTF-8 file or folder, "python-library" or "domains"), or the data
    that the model's own manifest names.

    Windows have `context` tokens, by default as many as the model has, at most 512. Raises NetsukeError when the model has
    no tokenizer, or neither the caller nor the manifest names a text.
    """
    if loaded.tokenizer is None:
        raise NetsukeError(
            f"measure {loaded.source}",
            "it has no tokenizer, so no text can be scored",
            "tokenizer.json beside the weights",
        )
    if context is not None and not 8 <= context <= loaded.model.cfg.context:
        raise NetsukeError("use this context", f"{context} tokens", f"8 to {loaded.model.cfg.context}, the model's own")
    context = context or min(512, loaded.model.cfg.context)
    data = data or (loaded.manifest or {}).get("provenance", {}).get("data")
    if data is None:
        raise NetsukeError(
            f"measure {loaded.source}", "no text was named to measure it on", "a UTF-8 file or folder, python-library or domains",
            "--data FILE, with text like what the model will meet",
        )  # fmt: skip
    built_in = {"python-library": LanguageModeling.python_library, "domains": LanguageModeling.built_in_domains}
    if data in built_in:
        return built_in[data](loaded.tokenizer, context)
    return LanguageModeling.from_path(data, loaded.tokenizer, context)


def read_utf8(path: Path) -> str:
    """A file's text. Raises NetsukeError for bytes that are no UTF-8, and for a file that cannot be read."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        raise NetsukeError(
            f"read {path.name} as text", f"byte {e.start} is not UTF-8", "UTF-8 text", f"iconv -t UTF-8 {path.name}"
        ) from None
    except OSError as e:
        raise NetsukeError(f"read {path.name}", e.strerror or str(e), "a readable text file") from None


def _cut_in_order(text: str) -> dict[str, str]:
    if not text.strip():
        raise NetsukeError("use the data", "it holds no text", "a text file or a folder of text files")
    a, b = int(len(text) * 0.8), int(len(text) * 0.9)
    return {"train": text[:a], "validation": text[a:b], "test": text[b:]}
