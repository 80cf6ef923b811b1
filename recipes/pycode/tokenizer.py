"""Trains pycode's byte-level BPE tokenizer on the standard library's train split. Under a minute."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from netsuke.data import pysource

VOCAB = 3072
# Runs of spaces and newlines stay whole (indentation is one token), digits go in threes, words carry one space.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+ *|\s+(?!\S)|\s+"""


def train(out: Path) -> None:
    tok = Tokenizer(models.BPE(byte_fallback=False))
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|file|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tok.train_from_iterator((body for _, body in pysource.modules("train")), trainer)
    out.write_text(tok.to_str(), encoding="utf-8")
    sample = pysource.text("validation")
    ids = tok.encode(sample).ids
    assert tok.decode(ids) == sample, "the tokenizer must be lossless"
    print(f"{tok.get_vocab_size()} tokens, {len(sample.encode()) / len(ids):.3f} bytes per token on validation modules")


if __name__ == "__main__":
    train(Path(__file__).parent / "tokenizer.json")
