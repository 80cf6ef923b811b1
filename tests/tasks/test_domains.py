"""Domains: batches that depend on the step alone, and bits per byte of the same bytes under every tokenizer."""

import math

import pytest
import torch

from netsuke.errors import NetsukeError
from netsuke.models.tokenizer_train import train_bpe
from netsuke.tasks.domains import DomainModeling
from tests.tiny import tiny_llama

WORDS = {"song": "la la lo li ", "count": "one two three four "}


def documents(domain: str, split: str) -> tuple[str, ...]:
    return tuple(WORDS[domain] * 20 + f"{split} {i}é\n" for i in range(6))


def task(vocab: int = 270, **knobs) -> DomainModeling:
    texts = [t for d in WORDS for t in documents(d, "train")]
    knobs = {"context": 16, "batch": 4, "scored_bytes": 700, "share": {"song": 0.3, "count": 0.7}} | knobs
    return DomainModeling(train_bpe(texts, vocab), documents=documents, **knobs)


class Uniform(torch.nn.Module):
    """Every token as likely as any other."""

    def __init__(self, vocab: int):
        super().__init__()
        self.vocab = vocab

    def forward(self, ids):
        return torch.zeros(*ids.shape, self.vocab)


def test_a_step_always_draws_the_same_windows_and_seeds_differ():
    one, other = task(), task()
    assert torch.equal(one.batch_at(5), other.batch_at(5)) and one.batch_at(5).shape == (4, 17)
    assert not torch.equal(one.batch_at(5), one.batch_at(6))
    assert not torch.equal(one.batch_at(5), one.batch_at(5, seed=1))
    assert torch.equal(one.batch_at(5, seed=1), task(seed=1).batch_at(5))


def test_domains_are_drawn_by_share():
    drawn = task(vocab=290, batch=400).batch_at(0)
    la, two = (task(vocab=290).tokenizer.encode(w)[0] for w in (" la", " two"))
    share = float((drawn == two).any(1).sum()) / float(((drawn == two).any(1) | (drawn == la).any(1)).sum())
    assert share == pytest.approx(0.7, abs=0.07)


@pytest.mark.parametrize("vocab", [257, 280])
def test_all_bytes_are_scored_under_every_tokenizer(vocab):
    given = task(vocab)
    got = given.bits_per_byte(Uniform(vocab), "validation")
    for domain in WORDS:
        rows, size = given.scored(domain, "validation")
        tokens = sum(len(r) - 1 for r in rows)
        assert size in (699, 700), "the limit falls into a character at most"
        assert got[domain] == pytest.approx(tokens * math.log2(vocab) / size)
    assert got["all"] == pytest.approx(sum(got[d] for d in WORDS) / 2)
    assert given.score(Uniform(vocab), "validation") == got["all"]


def test_a_part_is_scored_by_the_bytes_that_it_holds():
    given = task()
    whole, part = (given.bits_per_byte(Uniform(270), "test", limit)["all"] for limit in (None, 1))
    assert part == pytest.approx(whole)


def test_batches_deal_domains_in_turn():
    held = list(task().batches("validation"))
    assert all(len(b) == 4 for b in held[:-1])
    first = held[0]
    la = task().tokenizer.encode(" la")[0]
    assert [bool((row == la).any()) for row in first] == [True, False, True, False]
    assert len(list(task().batches("train", 3))) == 3 and float(task().loss(tiny_llama(vocab=270), first)) > 0


def test_facts_name_every_split_of_every_domain():
    facts = task().facts()["splits"]
    assert facts["train"]["song"]["sha256"] != facts["test"]["song"]["sha256"]
    assert facts["validation"]["count"]["bytes"] == len("\0".join(documents("count", "validation")).encode())


def test_text_too_short_is_refused():
    with pytest.raises(NetsukeError, match="train text of"):
        task(context=5000).batch_at(0)
    with pytest.raises(NetsukeError, match="empty"):
        DomainModeling(task().tokenizer, share={"song": 1.0}, documents=lambda d, s: ()).score(Uniform(270), "test")


def test_a_tokenizer_needs_room_for_all_bytes():
    with pytest.raises(NetsukeError, match="257"):
        train_bpe(["a"], 256)
