"""Trains a byte-level BPE tokenizer, split into words alike at all sizes: small ones compare with trimmed ones."""

from __future__ import annotations

from collections.abc import Iterable

from netsuke.errors import NetsukeError
from netsuke.models.tokenizer import HFTokenizer

OPENING = "<|text|>"  # opens and ends a text; id 0
# Runs of spaces and newlines stay whole (indentation is one token), single digits (arithmetic), words carry one space.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+ *|\s+(?!\S)|\s+"""


def train_bpe(texts: Iterable[str], vocab: int) -> HFTokenizer:
    """`vocab` pieces: the opening token, all 256 bytes, and the most frequent merges (Sennrich et al., 2016).

    Raises NetsukeError when `vocab` does not hold the bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab < 257:
        raise NetsukeError("train a tokenizer", f"{vocab} pieces", "at least 257: all bytes and the opening token")
    tok = Tokenizer(models.BPE(byte_fallback=False))
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[OPENING], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tok.train_from_iterator(texts, trainer)
    return HFTokenizer(tok.to_str().encode(), bos=0, eos=(0,))
