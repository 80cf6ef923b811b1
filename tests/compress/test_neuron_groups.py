"""Groups of neurons: equal, alike in direction, chosen by routers, and run for real with the same result as the mask."""

import pytest
import torch

from netsuke.compress import neuron_groups as ng
from netsuke.compress.quantize import quantize_linear
from netsuke.errors import NetsukeError
from netsuke.train.group_router import RouterKnobs, train_routers
from tests.tiny import same_state, tiny_llama, tiny_task

IDS = next(tiny_task().batches("validation"))[:, :-1]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def groups(model):
    return ng.partition(model, 8)


def test_planted_clusters_are_found_in_equal_groups():
    rng = torch.Generator().manual_seed(0)
    truth = torch.randperm(60, generator=rng) % 5
    centres = torch.nn.functional.normalize(torch.randn(5, 24, generator=rng), dim=1)
    rows = (centres[truth] + 0.05 * torch.randn(60, 24, generator=rng)) * torch.rand(60, 1, generator=rng).add(0.1)
    got = ng.balanced_kmeans(rows, 5)
    assert got.members.shape == (5, 12) and got.members.flatten().sort().values.tolist() == list(range(60))
    assert all(len(set(truth[m].tolist())) == 1 for m in got.members)
    assert torch.equal(ng.balanced_kmeans(rows, 5).members, got.members)
    assert torch.equal(got.owner()[got.members], torch.arange(5)[:, None].expand(5, 12))
    assert torch.equal(got.total(torch.ones(2, 60)), torch.full((2, 5), 12.0))


def test_uneven_groups_are_refused_with_what_divides(model):
    with pytest.raises(NetsukeError, match="80 neurons do not divide among them; allowed: 4, 5, 8, 10"):
        ng.partition(model, 7)
    with pytest.raises(NetsukeError, match="more than 0, at most 1"):
        ng.kept_of(0.0, 8)
    packed = tiny_llama()
    packed.replace("blocks.1.up", quantize_linear(packed.blocks[1].up, 8, 16, "rtn"))
    with pytest.raises(NetsukeError, match=r"blocks\.1\.up is stored as quant"):
        ng.partition(packed, 8)
    with pytest.raises(NetsukeError, match="up is no dense map"):
        ng.GroupedMLP(packed.blocks[1], ng.random_groups(80, 8), lambda x: x, 0.5)


@torch.no_grad()
def harm(model, sites) -> float:
    """Mean squared change of the logits."""
    plain = model(IDS)
    model.stand(sites)
    got = model(IDS)
    model.stand({})
    return float((got - plain).square().mean())


@torch.no_grad()
def test_all_groups_change_nothing_and_the_oracle_is_best(model, groups):
    routers = [ng.similarity(b, g) for b, g in zip(model.blocks, groups)]
    assert harm(model, ng.gated(model, groups, 1.0, routers)) == 0
    oracle, near = harm(model, ng.gated(model, groups, 0.5)), harm(model, ng.gated(model, groups, 0.5, routers))
    backwards = [lambda x, r=r: -r(x) for r in routers]
    assert 0 < oracle < near < harm(model, ng.gated(model, groups, 0.5, backwards))
    assert same_state(model, tiny_llama())


def test_both_ways_of_grouping_beat_chance(model, groups):
    texts = [ids[:, :-1] for ids in tiny_task().batches("train")]
    together = ng.partition(model, 8, texts)
    assert [g.members.shape for g in together] == [(8, 10)] * 2
    chance = [ng.random_groups(80, 8, i) for i in range(2)]
    got = [harm(model, ng.gated(model, g, 0.5)) for g in (together, groups, chance)]
    assert max(got[:2]) < 0.95 * got[2]


def test_trained_routers_come_close_to_the_oracle(model, groups):
    state = torch.get_rng_state()
    texts = [ids[:, :-1] for ids in tiny_task().batches("train")]
    routers = train_routers(model, groups, texts, RouterKnobs(hidden=32, steps=150, batch=64))
    assert torch.equal(state, torch.get_rng_state()) and not any(p.requires_grad for p in routers[0].parameters())
    plain = [ng.similarity(b, g) for b, g in zip(model.blocks, groups)]
    oracle = harm(model, ng.gated(model, groups, 0.5))
    trained, near = (harm(model, ng.gated(model, groups, 0.5, r)) for r in (routers, plain))
    assert oracle < trained < near


@torch.no_grad()
@pytest.mark.parametrize("share", [0.125, 0.5, 1.0])
def test_running_the_groups_alone_gives_what_the_mask_gives(model, groups, share):
    block, g = model.blocks[0], groups[0]
    router = ng.similarity(block, g)
    real = ng.GroupedMLP(block, g, router, share)
    for x in torch.randn(5, 1, 1, 48, generator=torch.Generator().manual_seed(1)):
        mask = ng.chosen(router(x), ng.kept_of(share, g.count))[..., g.owner()]
        torch.testing.assert_close(real(x), block.down(block.mlp_inner(x) * mask), rtol=1e-4, atol=1e-4)
