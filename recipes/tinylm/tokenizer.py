"""Trains the byte-level BPE tokenizer of the test models, 2,048 pieces, on equal amounts of the five domains' train text."""

from __future__ import annotations

import random

from corpus import TOKENIZER
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from netsuke.data.domains import DOMAINS, documents

VOCAB = 2048
BYTES = 1_000_000  # of each domain
# Runs of spaces and newlines stay whole (indentation is one token), single digits (arithmetic), words carry one space.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+ *|\s+(?!\S)|\s+"""


def sample() -> list[str]:
    texts = []
    for domain in DOMAINS:
        own = list(documents(domain, "train"))
        random.Random(0).shuffle(own)
        left = BYTES
        while left > 0 and own:
            texts.append(own.pop()[:left])
            left -= len(texts[-1].encode())
    return texts


def train(vocab: int = VOCAB) -> Tokenizer:
    tok = Tokenizer(models.BPE(byte_fallback=False))
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|text|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tok.train_from_iterator(sample(), trainer)
    return tok


if __name__ == "__main__":
    tok = train()
    TOKENIZER.write_text(tok.to_str(), encoding="utf-8")
    for domain in DOMAINS:
        text = "\n".join(documents(domain, "validation"))
        ids = tok.encode(text).ids
        assert tok.decode(ids) == text, "the tokenizer must be lossless"
        print(f"{domain:12} {len(text.encode()) / len(ids):.2f} bytes per token")
