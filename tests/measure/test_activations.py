"""Accumulators equal the plain definitions over several batches, and hooks go away."""

import torch
from torch import nn

from netsuke.measure.activations import Gram, Influence, SquareSum, tapped


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
