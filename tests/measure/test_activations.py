"""Accumulators equal the plain definitions over several batches, and hooks go away."""

import pytest
import torch
from torch import nn

from netsuke.measure.activations import AbsMax, Gram, Influence, QuantileSketch, Range, ScoreSketch, SquareSum, tapped
from tests.tiny import tiny_llama


def test_sums_equal_the_definitions():
    layer, batches = nn.Linear(6, 4), [torch.randn(2, 5, 6), torch.randn(3, 7, 6)]
    gram, squares, turn = Gram(), SquareSum(), Influence()
    same = nn.Sequential(nn.Identity())
    with torch.no_grad(), tapped({layer: gram}, {layer: squares}, {same: turn}):
        for x in batches:
            layer(x)
            same(x)
        layer_out = torch.cat([layer.forward(x).flatten(0, 1) for x in batches])
    rows = torch.cat([x.flatten(0, 1) for x in batches]).double()
    assert gram.rows == len(rows) == squares.rows
    assert torch.allclose(gram.mean(), rows.T @ rows / len(rows), atol=1e-5)
    assert torch.allclose(squares.total, layer_out.double().square().sum(0), atol=1e-4)
    assert abs(turn.value()) < 1e-12


def test_hooks_are_gone_afterwards():
    layer, gram = nn.Linear(3, 3), Gram()
    with tapped({layer: gram}):
        pass
    layer(torch.ones(1, 3))
    assert gram.rows == 0


def test_a_sketch_s_quantiles_are_those_of_the_numbers():
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randn(300, 40, generator=rng).abs() ** 3, torch.rand(7, 11, 13, generator=rng) * 1e-20]
    sketch = QuantileSketch()
    for x in batches:
        sketch.add(x)
    exact = torch.cat([x.flatten() for x in batches]).sort().values
    assert sketch.count == len(exact)
    for share in (0.001, 0.05, 0.3, 0.5, 0.7, 0.95, 0.999, 1.0):
        got = sketch.quantile(share)
        assert got == pytest.approx(float(exact[max(round(share * len(exact)) - 1, 0)]), rel=2e-3)
        assert abs(float((exact > got).float().mean()) - (1 - share)) < 1e-3
    assert sketch.quantile(0.0) == 0


def test_a_sketch_of_zeros_and_of_large_numbers():
    sketch = QuantileSketch()
    sketch.add(torch.tensor([0.0, -0.0, 3e38, 3.4e38]))
    assert 0 < sketch.quantile(0.5) < 1e-35, "above zero, so that zeros are left out"
    assert sketch.quantile(1.0) <= torch.finfo(torch.float32).max
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="negative or not finite"):
            sketch.add(torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match="of nothing"):
        QuantileSketch().quantile(0.5)


def test_scores_leave_the_first_token_of_every_window_out():
    weights, x = torch.tensor([1.0, 10.0, 0.0]), torch.full((2, 4, 3), 2.0)
    x[:, 0] = 1e6
    layer, sketch = nn.Linear(3, 3), ScoreSketch(weights)
    with tapped({layer: sketch}):
        layer(x)
    assert sketch.count == 2 * 3 * 3
    assert sketch.quantile(1.0) == pytest.approx(20, rel=1e-3) and sketch.quantile(0.5) == pytest.approx(2, rel=1e-3)


def test_sites_are_heard_and_left_as_they_were():
    model, ids = tiny_llama(), torch.arange(40).view(2, 20)
    doubled = {"blocks.1.hidden": lambda x: 2 * x}
    model.stand(doubled)
    values, hidden = Range(), AbsMax()
    with torch.no_grad():
        want = model(ids)
        with tapped(sites={(model.blocks[0], "v"): values, (model.blocks[1], "hidden"): hidden}):
            assert torch.equal(model(ids), want), "listening changes nothing"
        block = model.blocks[0]
        v = block.v(block.attn_norm(model.embed.rows(ids)))
    assert (values.low, values.high) == (float(v.min()), float(v.max())) and values.rows == 2 * 20 * 2
    assert hidden.reach.shape == (80,) and hidden.reach.min() > 0
    assert model.blocks[0].sites == {} and model.blocks[1].sites == {"hidden": doubled["blocks.1.hidden"]}


def test_reach_of_two_dimensions_of_channels():
    reach, x = AbsMax(dims=2), torch.randn(3, 5, 4, 6)
    reach.add(x)
    assert torch.equal(reach.reach, x.abs().amax((0, 1)))
