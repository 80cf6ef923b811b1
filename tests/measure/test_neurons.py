"""Neurons: indicators, average precision as scikit-learn has it, baselines of chance, masks that leave the rest alone."""

import itertools

import pytest
import torch
from sklearn.metrics import average_precision_score

from netsuke.measure import neurons
from netsuke.measure.neurons import Activity, InstanceMeans, Ranking
from tests.tiny import tiny_llama

IDS = torch.randint(0, 96, (6, 20), generator=torch.Generator().manual_seed(0))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_scikit_learn_s(ties):
    scores = torch.randn(90, 7, generator=rng())
    scores = (scores * 2).round() if ties else scores
    labels = torch.rand(90, generator=rng(1)) < 0.3
    want = [average_precision_score(labels.numpy(), scores[:, i].numpy()) for i in range(7)]
    assert Ranking(scores).precision(labels).tolist() == pytest.approx(want, abs=1e-12)
    with pytest.raises(ValueError, match="no instance"):
        Ranking(scores).precision(torch.zeros(90, dtype=torch.bool))


def test_a_planted_neuron_is_found_and_chance_explains_the_best_of_many():
    scores = torch.rand(200, 400, generator=rng())
    labels = torch.arange(200) < 40
    scores[:40, 17] += 2
    ranking = Ranking(scores)
    got, chance = ranking.precision(labels), ranking.by_chance(labels)
    assert int(got.argmax()) == 17 and float(got[17]) == 1.0
    assert chance.mean == pytest.approx(neurons.random_baseline(labels), abs=0.03)
    rest = got[torch.arange(400) != 17]
    # the best of 399 that know nothing is far above the share of positives, and not above what chance gives
    assert chance.best > 1.3 * chance.mean and float(rest.max()) == pytest.approx(chance.best, abs=0.08)
    assert chance.best_95 >= chance.best and ranking.by_chance(labels) == chance


@torch.no_grad()
def test_means_and_indicators_are_those_of_the_forward_pass():
    model = tiny_llama()
    norms = [neurons.weights_of("output", b.down) for b in model.blocks]
    plain, weighted = [InstanceMeans() for _ in norms], [InstanceMeans(n) for n in norms]
    neurons.listen(model, plain, IDS.split(4))
    neurons.listen(model, weighted, [IDS])
    x = model.embed.rows(IDS)
    for block, a, b in zip(model.blocks, plain, weighted):
        hidden = block.mlp_inner(block.mlp_norm(x + block.o(block.attention(block.attn_norm(x)))))
        torch.testing.assert_close(a.rows(), hidden.abs().mean(1))
        torch.testing.assert_close(b.rows(), hidden.abs().mean(1) * block.down.weight.norm(dim=0))
        x = block(x)
    assert all(not b.sites for b in model.blocks)
    with pytest.raises(ValueError, match="indicator 'loudness'"):
        neurons.weights_of("loudness", model.blocks[0].down)


def test_activity_counts_tokens():
    heard = Activity()
    heard.add(torch.tensor([[[3.0, -1.0, 0.1, 0.1], [0.0, 8.0, 1.0, 1.0]]]))
    assert heard.share().tolist() == [0.5, 1.0, 0.0, 0.0]
    assert heard.low_share() == pytest.approx(5 / 8)


def test_every_second_token_is_kept():
    heard = neurons.TokenIndicators(torch.tensor([1.0, 2.0]), every=2)
    heard.add(torch.tensor([[[3.0, -1.0], [0.0, 8.0], [-1.0, 1.0]]]))
    assert heard.rows().tolist() == [[3.0, 2.0], [1.0, 2.0]]


def test_masks_zero_what_they_should():
    x = torch.tensor([[[3.0, -1.0, 0.5, 2.0]]])
    assert neurons.silence_lowest(0.5)(x).tolist() == [[[3.0, 0.0, 0.0, 2.0]]]
    norms = torch.tensor([1.0, 9.0, 1.0, 1.0])
    assert neurons.silence_lowest(0.5, norms)(x).tolist() == [[[3.0, -1.0, 0.0, 0.0]]]
    assert torch.equal(neurons.silence_lowest(0.0)(x), x)
    assert neurons.silence(torch.tensor([0, 3]))(x).tolist() == [[[0.0, -1.0, 0.5, 0.0]]]


def test_top_shares_and_overlap():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.2])
    assert neurons.top(scores, 0.4).tolist() == [1, 3]
    allowed = torch.tensor([True, False, True, True, True])
    assert neurons.top(scores, 0.4, allowed).tolist() == [2, 3]
    assert neurons.top(scores, 0.0).tolist() == [1]
    assert neurons.overlap(torch.tensor([1, 2, 3, 4]), torch.tensor([3, 4, 5, 6])) == 0.5
    draws = [torch.randperm(400, generator=rng(s))[:20] for s in range(60)]
    chance = sum(neurons.overlap(a, b) for a, b in itertools.pairwise(draws)) / 59
    assert chance == pytest.approx(0.05, abs=0.02)
