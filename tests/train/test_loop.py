"""The training loop learns, anneals, stops, and resumes where it was."""

import pytest
import torch

from netsuke.errors import NetsukeError
from netsuke.models.llama import random_llama
from netsuke.tasks.language import token_losses
from netsuke.train.loop import LoopKnobs, rate_at, train
from tests.models.hostile import tiny_config


def batch_at(step: int) -> torch.Tensor:
    """A counting language: each token is the one before plus one."""
    start = torch.randint(0, 200, (8, 1), generator=torch.Generator().manual_seed(step))
    return start + torch.arange(17)


def loss(model, ids):
    return token_losses(model, ids).mean()


def fresh():
    return random_llama(tiny_config(), 0).requires_grad_(True)


def test_it_learns_to_count():
    history = train(fresh(), batch_at, loss, LoopKnobs(steps=120))
    assert history.losses[0] == pytest.approx(5.7, abs=0.2)
    assert history.losses[-1] < 3.5
    assert history.steps == list(range(1, 121))


def test_frozen_parameters_stay():
    model = fresh()
    model.blocks[0].requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    train(model, batch_at, loss, LoopKnobs(steps=5))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("blocks.0."), name


def test_resuming_gives_the_same_weights(tmp_path):
    whole, halves = fresh(), fresh()
    train(whole, batch_at, loss, LoopKnobs(steps=20))

    def stop(step, *_):
        if step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            halves,
            batch_at,
            loss,
            LoopKnobs(steps=20),
            checkpoint=tmp_path / "a.ckpt",
            checkpoint_seconds=-1,
            on_step=stop,
        )
    # the interrupted step was not saved yet: the checkpoint holds nine, the tenth is done again
    resumed = fresh()
    history = train(resumed, batch_at, loss, LoopKnobs(steps=20), checkpoint=tmp_path / "a.ckpt")
    assert history.steps == list(range(1, 21))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters()):
        assert torch.equal(a, b), name


def test_the_rate_rises_stays_and_falls():
    knobs = LoopKnobs(steps=100, warmup=0.1, decay=0.5)
    assert rate_at(0.05, knobs) == pytest.approx(0.5)
    assert rate_at(0.3, knobs) == 1.0
    assert rate_at(0.75, knobs) == pytest.approx(0.5)
    assert rate_at(1.0, knobs) == 0.0


def test_by_epochs_the_rate_holds_for_three_and_then_falls_by_a_fifth_each():
    knobs = LoopKnobs(steps=300, epoch=10)
    rates = [rate_at(step / 300, knobs) for step in range(300)]
    assert rates[:30] == [1.0] * 30  # three epochs, no warm-up
    assert all(len(set(rates[e : e + 10])) == 1 for e in range(0, 300, 10))
    assert rates[30:300:10] == pytest.approx([0.8**k for k in range(1, 28)])
    assert rates[-1] == pytest.approx(0.0024, abs=1e-4)


def test_a_cosine_ends_at_its_floor():
    knobs = LoopKnobs(steps=100, warmup=0.0, floor=0.1)
    assert [rate_at(p, knobs) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.55, 0.1])


def test_given_optimizers_are_stepped_at_their_own_rates():
    model = fresh()
    chosen, before = [p for n, p in model.named_parameters() if "norm" in n], [p.clone() for p in model.parameters()]
    train(model, batch_at, loss, LoopKnobs(steps=2), stepped=[(torch.optim.SGD(chosen, lr=0.1), 0.1)])
    moved = {n for (n, p), old in zip(model.named_parameters(), before) if not torch.equal(p, old)}
    assert moved and all("norm" in n for n in moved)


def test_epochs_within_minutes_are_refused():
    with pytest.raises(NetsukeError, match="epoch or minutes"):
        LoopKnobs(steps=100, epoch=10, minutes=1.0)


def test_time_ends_a_run():
    history = train(fresh(), batch_at, loss, LoopKnobs(steps=10**9, minutes=0.01))
    assert 1 <= len(history.steps) < 10**6


def test_a_loss_that_is_no_number_stops_the_run():
    with pytest.raises(FloatingPointError, match="step 1"):
        train(fresh(), batch_at, lambda m, ids: loss(m, ids) * float("nan"), LoopKnobs(steps=3))
