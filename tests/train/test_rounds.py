"""The second round: what is drawn, how sharply, and that training on it goes on where the first round ended."""

import math

import pytest
import torch

from netsuke.errors import NetsukeError
from netsuke.tasks.language import token_losses
from netsuke.train.loop import LoopKnobs
from netsuke.train.rounds import Rounds, draw, effective_share, gentler, losses_of, second_round, train_rounds
from tests.tiny import tiny_llama


def batch_at(step: int) -> torch.Tensor:
    return torch.randint(96, (4, 17), generator=torch.Generator().manual_seed(step))


def loss(model, ids):
    return token_losses(model, ids).mean()


def test_first_draws_follow_the_softmax():
    losses, rng = torch.tensor([0.0, 0.5, 1.0]), torch.Generator().manual_seed(0)
    first = torch.stack([draw(losses, 1, 0.5, rng)[0] for _ in range(4000)])
    want = (losses / 0.5).softmax(0)
    got = torch.bincount(first, minlength=3) / 4000
    assert torch.allclose(got.double(), want.double(), atol=0.03)


def test_later_draws_are_renormalised_over_what_is_left():
    losses, rng = torch.tensor([0.0, 1.0, 2.0]), torch.Generator().manual_seed(0)
    pairs = torch.stack([draw(losses, 2, 1.0, rng) for _ in range(4000)])
    after_last = pairs[pairs[:, 0] == 2, 1]
    assert float((after_last == 1).float().mean()) == pytest.approx(math.e / (1 + math.e), abs=0.03)


def test_a_peaked_draw_still_gives_as_many_as_asked():
    losses = torch.tensor([100.0] + [0.0] * 9)
    got = draw(losses, 7, 0.01, torch.Generator().manual_seed(0))
    assert len(set(got.tolist())) == 7 and 0 in got.tolist()


def test_the_effective_share_tells_uniform_from_peaked():
    flat, apart = torch.full((50,), 3.0), torch.linspace(0, 5, 50)
    assert effective_share(flat, 1.0) == pytest.approx(1) and effective_share(apart, math.inf) == pytest.approx(1)
    assert effective_share(apart, 0.05) < 0.05 < effective_share(apart, 1.0) < 0.5


def test_losses_are_those_of_the_frozen_model():
    model, rows = tiny_llama(), torch.cat([batch_at(s) for s in range(10)])
    got = losses_of(model, rows)
    assert got.shape == (40,) and float(got[:4].mean()) == pytest.approx(float(loss(model, batch_at(0))), rel=1e-5)


@pytest.mark.parametrize("by", ["batch", "sequence"])
def test_hard_ones_are_drawn_and_seeds_repeat(by):
    model, batches = tiny_llama(), [batch_at(s) for s in range(24)]
    got = second_round(model, batches, Rounds(temperature=0.01, by=by))
    assert len(got.batches) == 12 and all(b.shape == (4, 17) for b in got.batches)
    assert got.drawn_loss > got.mean_loss and got.effective_share < 0.9
    again = second_round(model, batches, Rounds(temperature=0.01, by=by))
    assert all(torch.equal(a, b) for a, b in zip(got.batches, again.batches))
    other = second_round(model, batches, Rounds(temperature=0.01, by=by, seed=1))
    assert not all(torch.equal(a, b) for a, b in zip(got.batches, other.batches))


def test_sequences_are_sharper_than_their_batches():
    model, batches = tiny_llama(), [batch_at(s) for s in range(24)]
    one, whole = (second_round(model, batches, Rounds(by=by)).effective_share for by in ("sequence", "batch"))
    assert one < whole < 1


def test_every_part_gives_its_share():
    model, batches = tiny_llama(), [batch_at(s) for s in range(24)]
    got = second_round(model, batches, Rounds(temperature=0.01, parts=4))
    ids = {b.data_ptr() for b in got.batches}
    assert [sum(b.data_ptr() in ids for b in batches[i : i + 6]) for i in range(0, 24, 6)] == [3, 3, 3, 3]


def test_two_rounds_train_on_what_was_drawn():
    model, seen = tiny_llama().requires_grad_(True), []
    first, second, drawn = train_rounds(
        model, lambda step: batch_at(step % 6), loss, LoopKnobs(steps=30), Rounds(keep=0.5), on_draw=seen.append
    )
    assert (len(first.steps), len(second.steps)) == (30, 15) and seen == [drawn]
    assert sum(second.losses) / 15 < sum(first.losses) / 30
    assert gentler(LoopKnobs(steps=1)).muon_lr == pytest.approx(0.02 / 3)


@pytest.mark.parametrize("knobs", [{"keep": 0}, {"keep": 1.2}, {"temperature": 0}, {"by": "token"}, {"parts": 0}])
def test_impossible_rounds_are_refused(knobs):
    with pytest.raises(NetsukeError, match=next(iter(knobs))):
        Rounds(**knobs)


def test_parts_without_batches_are_refused():
    with pytest.raises(NetsukeError, match="3 batches in 4 parts"):
        second_round(tiny_llama(), [batch_at(s) for s in range(3)], Rounds(parts=4))
