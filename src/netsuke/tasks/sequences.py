"""Sequences for a bidirectional encoder: small real sets to classify, and hidden tokens to guess.

    digits          scikit-learn's 1,797 images as 64 tokens, one pixel each. Cut in the order of the file, where the writers
                    follow one another, so that hardly a writer is in two splits: 1,257 / 180 / 360
    mnist           10,000 images of MNIST's test set as 784 tokens, 7,000 / 1,000 / 2,000 by a fixed shuffle; the file has no
                    writers. Not the official split
    spoken_digits   900 recordings as up to 64 log-mel frames, by speaker: four train, one validates, one tests
    MaskedTokens    rows of ids; 15 % of the tokens are to be guessed, of which 80 % are hidden, 10 % replaced by a random
                    token and 10 % left alone (BERT, 2018)

Batches can be sliced by rows, so calibration (`run_calibration`) takes parts of them.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import exp

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netsuke.data import catalogue, spoken
from netsuke.errors import NetsukeError
from netsuke.tasks.base import Split

MNIST = ("edgefd/mnist10k-images-idx3-ubyte.gz", "edgefd/mnist10k-labels-idx1-ubyte.gz")
UNSEEN = -100  # a label that counts for nothing
FRAMES = 64  # log-mel frames kept of a recording: 95 % of them are shorter


@dataclass(frozen=True)
class SequenceBatch:
    """x: ids (B, T) or frames (B, T, I); mask (B, T), what is real (None: all); labels (B,) or, per token, (B, T)."""

    x: Tensor
    mask: Tensor | None
    labels: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | Tensor) -> SequenceBatch:
        return SequenceBatch(self.x[rows], None if self.mask is None else self.mask[rows], self.labels[rows])


@dataclass
class SequenceTask:
    """Labelled sequences in three disjoint parts. `metric` is the accuracy, 0 to 1."""

    parts: dict[str, SequenceBatch]
    batch: int = 32
    source: str = ""
    metric: str = "accuracy"
    higher_is_better: bool = True

    def batches(self, split: Split, limit: int | None = None) -> Iterator[SequenceBatch]:
        """In order, the train split in a fixed shuffled order, so that any prefix is a fair sample."""
        part = self.parts[split]
        order = torch.arange(len(part))
        if split == "train":
            order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
        for i, rows in enumerate(order.split(self.batch)):
            if limit is not None and i >= limit:
                return
            yield part[rows]

    def batch_at(self, step: int, seed: int = 0) -> SequenceBatch:
        """The batch of a training step: a new shuffle every epoch, given by step and seed alone."""
        part = self.parts["train"]
        epoch, place = divmod(step, max(len(part) // self.batch, 1))
        rng = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(part), generator=rng)
        return part[order[place * self.batch : (place + 1) * self.batch]]

    def loss(self, model: nn.Module, batch: SequenceBatch) -> Tensor:
        logits = model(batch.x, batch.mask)
        return F.cross_entropy(logits.flatten(0, -2).float(), batch.labels.flatten(), ignore_index=UNSEEN)

    @torch.no_grad()
    def score(self, model: nn.Module, split: Split, limit: int | None = None) -> float:
        right = count = 0
        for batch in self.batches(split, limit):
            right += int((model(batch.x, batch.mask).argmax(-1) == batch.labels).sum())
            count += len(batch)
        return right / count

    @torch.no_grad()
    def mean_loss(self, model: nn.Module, split: Split, limit: int | None = None) -> float:
        """Mean loss in nats per label."""
        total = count = 0.0
        for batch in self.batches(split, limit):
            seen = int((batch.labels != UNSEEN).sum())
            total, count = total + float(self.loss(model, batch)) * seen, count + seen
        return total / max(count, 1)

    def facts(self) -> dict:
        return {
            "source": self.source, "metric": self.metric,
            "splits": {
                s: {"sequences": len(p), "tokens": p.x.shape[1], "sha256": hashlib.sha256(p.x.numpy().tobytes()).hexdigest()}
                for s, p in self.parts.items()
            },
        }  # fmt: skip


class MaskedTokens(SequenceTask):
    """Rows of ids (N, T) per split; `hide` is the id that stands for a hidden token. The metric is the perplexity of the
    tokens to be guessed. Which ones these are is fixed for validation and test, and drawn anew by step in training."""

    def __init__(
        self, rows: dict[str, Tensor], vocab: int, hide: int, batch: int = 32, share: float = 0.15, source: str = ""
    ):
        self.vocab, self.hide, self.share, self.rows = vocab, hide, share, rows
        parts = {s: self.hidden(ids, i) for i, (s, ids) in enumerate(rows.items())}
        super().__init__(parts, batch, source, metric="perplexity", higher_is_better=False)

    def hidden(self, ids: Tensor, seed: int) -> SequenceBatch:
        """ids (B, T) with a share of them hidden; labels are the ids there and `UNSEEN` elsewhere."""
        rng = torch.Generator().manual_seed(seed)
        chosen = torch.rand(ids.shape, generator=rng) < self.share
        fate = torch.rand(ids.shape, generator=rng)
        strange = torch.randint(0, self.vocab, ids.shape, generator=rng)
        shown = torch.where(chosen & (fate < 0.8), torch.full_like(ids, self.hide), ids)
        shown = torch.where(chosen & (fate >= 0.9), strange, shown)
        return SequenceBatch(shown, None, torch.where(chosen, ids, torch.full_like(ids, UNSEEN)))

    def batch_at(self, step: int, seed: int = 0) -> SequenceBatch:
        rng = torch.Generator().manual_seed(1_000_003 * seed + step)
        rows = self.rows["train"]
        return self.hidden(rows[torch.randint(0, len(rows), (self.batch,), generator=rng)], 7 + 1_000_003 * seed + step)

    def score(self, model: nn.Module, split: Split, limit: int | None = None) -> float:
        return exp(min(self.mean_loss(model, split, limit), 80.0))


def cut(x: np.ndarray, labels: np.ndarray, ends: tuple[int, int], order: np.ndarray | None = None) -> dict:
    """Train, validation and test parts of pixels (N, T): the first `ends[0]`, up to `ends[1]`, the rest."""
    order = np.arange(len(x)) if order is None else order
    places = dict(zip(("train", "validation", "test"), np.split(order, ends)))
    return {
        s: SequenceBatch(torch.from_numpy(x[w]).float()[..., None], None, torch.from_numpy(labels[w]).long())
        for s, w in places.items()
    }


@cache
def digits() -> SequenceTask:
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = (found.data / 8 - 1).astype(np.float32)  # 0 … 16 -> -1 … 1
    return SequenceTask(cut(pixels, found.target, (1257, 1437)), source="scikit-learn digits, cut in order")


def read_idx(name: str) -> np.ndarray:
    """A gzipped IDX file of uint8 below the data root. Raises NetsukeError for anything else."""
    try:
        raw = gzip.decompress(catalogue.find(name).read_bytes())
        kind, axes = raw[2], raw[3]
        shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes))
        if raw[:2] != b"\0\0" or kind != 8:
            raise ValueError("not an IDX file of bytes")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (ValueError, IndexError, EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise NetsukeError(f"read {name}", f"it is spoiled ({str(e)[:80]})", "a gzipped IDX file") from None


@cache
def mnist() -> SequenceTask:
    images, labels = (read_idx(name) for name in MNIST)
    pixels = images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1
    order = np.random.default_rng(0).permutation(len(pixels))
    parts = cut(pixels, labels, (7000, 8000), order)
    return SequenceTask(parts, source="MNIST's 10,000 test images, split by a fixed shuffle: not the official split")


@cache
def spoken_digits(fold: int = 0) -> SequenceTask:
    """Speakers in alphabetical order: number `fold` tests, the next one validates, the other four train."""
    all_of = spoken.recordings()
    people = sorted({r.speaker for r in all_of})
    test, validation = people[fold % len(people)], people[(fold + 1) % len(people)]
    groups: dict[str, list] = {"train": [], "validation": [], "test": []}
    for r in all_of:
        groups["test" if r.speaker == test else "validation" if r.speaker == validation else "train"].append(r)
    source = f"spoken digits; {test} tests, {validation} validates"
    return SequenceTask({s: _frames(rows) for s, rows in groups.items()}, source=source)


def _frames(rows: list[spoken.Recording]) -> SequenceBatch:
    x = torch.zeros(len(rows), FRAMES, spoken.FILTERS)
    mask = torch.zeros(len(rows), FRAMES, dtype=torch.bool)
    for i, r in enumerate(rows):
        mel = torch.from_numpy(spoken.log_mel(r.samples))[:FRAMES]
        x[i, : len(mel)], mask[i, : len(mel)] = mel, True
    return SequenceBatch(x, mask, torch.tensor([r.digit for r in rows]))
