"""Inheritance: gates equal cuts, scores that find what matters, exact targets, refusals."""

import copy
from dataclasses import replace

import msgspec
import pytest
import torch

from netsuke.compress.inherit import (
    Choice,
    Inherit,
    choose_blocks,
    choose_units,
    cut,
    inherit,
    refusal,
    skip_profile,
    stream_energy,
)
from netsuke.compress.quantize import Quantize
from netsuke.compress.unit_scores import KINDS, Counts, Masks, Units, gate_sites, ones, score_units
from netsuke.errors import NetsukeError
from netsuke.models.llama import BlockShape, LlamaConfig, random_llama
from tests.tiny import same_state, tiny_llama, tiny_task

IDS = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(0))


def target_of(model, layers=2, hidden=40, **changes) -> LlamaConfig:
    cfg = msgspec.structs.replace(model.cfg, **changes)
    return msgspec.structs.replace(
        cfg, blocks=tuple(BlockShape(hidden, b.value_dim) for b in model.cfg.blocks[:layers])
    )


@pytest.fixture(scope="module")
def task():
    return tiny_task()


@pytest.fixture(scope="module")
def biased():
    """Biases, norms and query norms that are no identities."""
    model = tiny_llama(3, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True, tied=False)
    rng = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            p.data.normal_(1 if "norm" in name else 0, 0.3, generator=rng)
    return model


def random_choice(model, target, seed=0) -> Choice:
    return choose_units(model, score_units(model, "random", None, seed=seed), tuple(range(len(target.blocks))), target)


@torch.no_grad()
def test_a_cut_model_is_the_model_with_gates_closed(biased):
    """Units out by gates and units out by slicing are the same, but for the norms' number of channels."""
    target = target_of(biased, hidden=33, heads=2, kv_heads=1)
    choice = random_choice(biased, target)
    gates = ones(biased)
    for block in range(2):
        gates.hidden[block][:] = 0
        gates.hidden[block][choice.hidden[block]] = 1
        gates.heads[block][:] = 0
        gates.heads[block][choice.queries[block]] = 1
    small = cut(biased, choice, target)
    biased.stand(gate_sites(gates))
    assert torch.allclose(small(IDS), biased(IDS), atol=1e-5)
    biased.stand({})
    assert small.cfg == target


@torch.no_grad()
def test_channels_of_one_gate_are_gone_everywhere(biased):
    target = target_of(biased, hidden=80, width=30)
    choice = random_choice(biased, target)
    gates = ones(biased)
    gates.channels[:] = 0
    gates.channels[choice.channels] = 1
    small = cut(biased, choice, target)
    for name, p in small.named_parameters():  # a norm over fewer channels divides by a larger mean
        if name.endswith(("attn_norm.weight", "mlp_norm.weight")) or name == "norm.weight":
            p.mul_((48 / 30) ** 0.5)
    for norm in (m for n, m in small.named_modules() if n.endswith(("attn_norm", "mlp_norm")) or n == "norm"):
        norm.eps *= 48 / 30
    biased.stand(gate_sites(gates))
    assert torch.allclose(small(IDS), biased(IDS), atol=1e-4)
    biased.stand({})


@torch.no_grad()
def test_norms_keep_their_scale_when_channels_go(biased, task):
    """Rescaled by the energy that stays, kept channels leave a norm as large as before, on average."""
    target, private = target_of(biased, hidden=80, width=24), copy.deepcopy(biased)
    private.embed.weight.mul_(
        torch.linspace(0.2, 3, 48)
    )  # channels that go carry more of the stream than those that stay
    energy = stream_energy(private, task, 16)
    choice = replace(random_choice(private, target), channels=torch.arange(24))
    plain, scaled = cut(private, choice, target), cut(private, choice, target, energy)
    stream = private.embed.rows(next(iter(task.batches("train")))[:, :-1])
    want = private.blocks[0].attn_norm(stream)[..., choice.channels].square().mean().sqrt()
    got = [m.blocks[0].attn_norm(stream[..., choice.channels]).square().mean().sqrt() for m in (plain, scaled)]
    assert abs(got[1] / want - 1) < 0.1 < abs(got[0] / want - 1)


def test_dead_units_are_found_by_every_score_that_looks(task):
    model = tiny_llama(5)
    dead = {"hidden": [3, 17, 40], "head": 1, "channels": [0, 9, 30]}
    with torch.no_grad():
        for block in model.blocks:
            for name in ("gate", "up"):
                getattr(block, name).weight[dead["hidden"]] = 0
            block.down.weight[:, dead["hidden"]] = 0
            block.q.weight.view(4, 12, 48)[dead["head"]] = 0
            block.o.weight.view(48, 4, 12)[:, dead["head"]] = 0
            for name in ("q", "k", "v", "gate", "up"):
                getattr(block, name).weight[:, dead["channels"]] = 0
            for name in ("o", "down"):
                getattr(block, name).weight[dead["channels"]] = 0
        model.embed.weight[:, dead["channels"]] = 0
    for kind in ("l1", "l2", "taylor"):
        scores = score_units(model, kind, task, calibration=8)
        for block in range(2):
            assert set(scores.hidden[block].argsort()[:3].tolist()) == set(dead["hidden"]), kind
            assert int(scores.heads[block].argmin()) == dead["head"], kind
        assert set(scores.channels.argsort()[:3].tolist()) == set(dead["channels"]), kind


def test_a_mask_ends_with_exactly_the_units_asked_for_and_leaves_the_weights(task):
    model = tiny_llama(2)
    counts = Counts((20, 20), (2, 2), 24)
    masks = Masks(model, score_units(model, "l1", None), counts, steps=10)
    for step, wanted in ((0, [80, 80, 4, 4, 48]), (10, counts.flat())):
        masks.step = step
        assert [int(m.detach().sum().round()) for m in masks.masks()] == wanted
    learned = score_units(model, "mask", task, counts=counts, calibration=8, steps=6)
    assert same_state(model, tiny_llama(2)) and not any(p.requires_grad for p in model.parameters())
    start = score_units(model, "taylor", task, calibration=8)
    assert any(not torch.equal(a.argsort(), b.argsort()) for a, b in zip(learned.flat(), start.flat()))


def test_a_learned_mask_beats_the_order_that_it_started_from(task):
    """On the train text that it learns from, at the same count: the loss of the masked model goes down."""
    model, counts = tiny_llama(2), Counts((20, 20), (2, 2), 40)

    def loss(scores: Units) -> float:
        gates = [
            torch.zeros_like(s, dtype=torch.float32).index_fill(0, s.topk(n).indices, 1)
            for s, n in zip(scores.flat(), counts.flat())
        ]
        model.stand(gate_sites(Units.of(gates)))
        with torch.no_grad():
            got = sum(float(task.loss(model, b)) for b in task.batches("train", 4))
        model.stand({})
        return got

    start = score_units(model, "taylor", task, calibration=16)
    assert loss(score_units(model, "mask", task, counts=counts, calibration=16, steps=80)) < loss(start)


def test_the_profile_tells_which_block_matters(task):
    model = tiny_llama(0, layers=4)
    with torch.no_grad():
        model.blocks[2].o.weight.zero_()
        model.blocks[2].down.weight.zero_()
    profile = skip_profile(model, task)
    assert profile[2] == pytest.approx(0, abs=1e-6) and min(abs(p) for i, p in enumerate(profile) if i != 2) > 1e-3
    assert len(skip_profile(model, task, together=2)) == 3


def test_beginning_and_end_stay_and_the_middle_is_thinned():
    profile = [0.1, 0.1, 0.5, 0.9, 0.2, 0.1]
    assert choose_blocks(profile, 4) == (0, 1, 3, 5)
    assert choose_blocks(profile, 2) == (0, 5) and choose_blocks(profile, 1) == (5,)
    assert choose_blocks(profile, 6) == tuple(range(6))


@pytest.mark.parametrize("score", KINDS)
def test_every_score_gives_the_target(score, task):
    model = tiny_llama(1, layers=3)
    target = target_of(model, width=32, heads=2, kv_heads=1)
    got = inherit(model, target, task, score, calibration=8, steps=3)
    assert got.cfg == target and got(IDS).isfinite().all() and same_state(model, tiny_llama(1, layers=3))


def test_nothing_cut_changes_nothing(task):
    model = tiny_llama(1)
    assert same_state(inherit(model, model.cfg, task), model)


def test_sizes_of_the_method(task):
    got = Inherit(layers=1, kv_heads=1, hidden=24, width=40, calibration=8).apply(tiny_llama(), task).cfg
    assert (len(got.blocks), got.kv_heads, got.heads, got.blocks[0].hidden, got.width) == (1, 1, 2, 24, 40)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"width": 64}, "width is 64, wider than the larger model's 48"), ({"vocab": 50}, "trim the vocabulary first"),
        ({"head_dim": 8}, "cut heads"), ({"heads": 3}, "3 heads on 2 key heads"), ({"hidden": 100}, "100 hidden units"),
        ({"heads": 4, "kv_heads": 1}, "do not come from"),
    ],
)  # fmt: skip
def test_targets_that_are_no_part_are_refused(changes, words, task):
    with pytest.raises(NetsukeError, match=words):
        inherit(tiny_llama(), target_of(tiny_llama(), **changes), task)


def test_deeper_quantized_and_mixed_models_are_refused(task):
    deeper = target_of(tiny_llama(layers=3), layers=3)
    assert "3 blocks" in refusal(tiny_llama(), deeper)
    quantized = Quantize(bits=8, group=16, calibration=8).apply(tiny_llama(), task)
    assert "is stored as quant" in Inherit().accepts(quantized)
    mixed = msgspec.structs.replace(tiny_llama().cfg, blocks=(BlockShape(16, 12, experts=2, active=1),) * 2)
    assert "blocks.0.experts" in Inherit().accepts(random_llama(mixed, 0))
    assert "Linear" in Inherit().accepts(torch.nn.Linear(2, 2))
    for knobs in ({"keep": 0.0}, {"score": "best"}, {"layers": 0}):
        with pytest.raises(NetsukeError):
            Inherit(**knobs)
