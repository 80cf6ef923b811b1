"""Generation: greedy equals the plain forward pass, sampling follows its distribution, limits hold."""

import pytest
import torch

from netsuke.errors import NetsukeError
from netsuke.models.llama import random_llama
from netsuke.runtime import generate as module
from netsuke.runtime.generate import generate, pick
from netsuke.runtime.timings import Timings
from tests.models.hostile import tiny_config


@pytest.fixture(scope="module")
def model():
    return random_llama(tiny_config(eos=()), 3, std=0.3)


def test_greedy_equals_recomputing_everything(model):
    ids = [5, 9, 200]
    made = list(generate(model, ids, 12))
    for token in made:
        assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)


def test_chunked_prefill_changes_nothing(model, monkeypatch):
    prompt = list(range(1, 20))
    whole = list(generate(model, prompt, 8))
    monkeypatch.setattr(module, "PREFILL_CHUNK", 5)
    assert list(generate(model, prompt, 8)) == whole


def test_it_stops_at_the_end_token_and_at_the_context(model):
    first = next(generate(model, [1], 1))
    timings = Timings()
    assert list(generate(model, [1], 8, stop=(first,), timings=timings)) == []
    assert len(list(generate(model, [1] * 28, 100))) == 32 - 28 + 1  # 4 more fit the cache; the last needs no place


def test_nucleus_keeps_the_smallest_set():
    rng = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = {pick(logits, 1.0, 0.7, rng) for _ in range(200)}
    assert drawn == {0, 1}
    counts = torch.bincount(torch.tensor([pick(logits, 1.0, 1.0, rng) for _ in range(4000)]), minlength=4) / 4000
    assert torch.allclose(counts, logits.exp(), atol=0.03)


@pytest.mark.parametrize(("ids", "culprit"), [([], "empty"), ([300], "vocabulary"), ([1] * 40, "context")])
def test_unusable_prompts_are_refused(model, ids, culprit):
    with pytest.raises(NetsukeError, match=culprit):
        next(generate(model, ids))
