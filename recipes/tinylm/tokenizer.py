"""Trains the byte-level BPE tokenizer of the test models, 2,048 pieces, on equal amounts of the five domains' train text."""

from __future__ import annotations

from corpus import TOKENIZER

from netsuke.data.domains import DOMAINS, documents
from netsuke.models.tokenizer_train import train_bpe
from netsuke.tasks.domains import equal_sample

VOCAB = 2048
BYTES = 1_000_000  # of each domain

if __name__ == "__main__":
    tok = train_bpe(equal_sample(BYTES), VOCAB)
    TOKENIZER.write_bytes(tok.to_bytes())
    for domain in DOMAINS:
        text = "\n".join(documents(domain, "validation"))
        ids = tok.encode(text)
        assert tok.decode(ids) == text, "the tokenizer must be lossless"
        print(f"{domain:12} {len(text.encode()) / len(ids):.2f} bytes per token")
