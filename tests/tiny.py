"""Small models and a small language task for tests: random weights, seconds on one core, no files needed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

from netsuke.models.llama import Llama, LlamaConfig, random_llama
from netsuke.tasks.language import LanguageModeling


class Letters:
    """One token per byte, folded into a small vocabulary: enough structure for statistics, nothing to download."""

    def __init__(self, vocab: int = 96):
        self.vocab, self.bos, self.eos = vocab, None, ()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return [b % self.vocab for b in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(32 + i % 96 for i in ids).decode()


def tiny_llama(seed: int = 0, **overrides) -> Llama:
    """A random model with grouped-query attention: 2 blocks, width 48, 4 heads on 2 key heads, about 60 thousand weights."""
    shape = {
        "vocab": 96,
        "width": 48,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 12,
        "context": 64,
        "layers": 2,
        "hidden": 80,
    }
    # Ten times the usual deviation: activations of random weights must differ enough for statistics to matter.
    return random_llama(LlamaConfig.uniform(**shape | overrides), seed, std=0.2)


def tiny_task(context: int = 32, windows: int = 16, vocab: int = 96) -> LanguageModeling:
    """Next-token prediction on the source of a standard module, three disjoint parts of `windows` windows each."""
    size = context * windows + 1
    text = Path(textwrap.__file__).read_text(encoding="ascii")[: 3 * size]
    parts = {s: text[i * size : (i + 1) * size] for i, s in enumerate(("train", "validation", "test"))}
    return LanguageModeling(parts, Letters(vocab), context, batch=4, source="textwrap")


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models hold the same tensors, bit by bit and dtype by dtype."""
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(x[n].dtype == y[n].dtype and torch.equal(x[n], y[n]) for n in x)
