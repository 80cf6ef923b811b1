"""The cases behind the tiny-training claims, on a small network; the claims that take seconds, on the real one."""

import numpy as np
import pytest
import torch

from netsuke.data.catalogue import missing
from netsuke.graph import Interpreter
from netsuke.systems import tiny_training
from netsuke.systems.tiny_training_cases import MODELS, FloatNetwork, plans, widened
from netsuke.train.int8_sgd import Diverged
from netsuke.train.sparse_update import PUBLISHED
from tests.graph.small import images, residual_network

needs_models = pytest.mark.skipif(bool(missing(MODELS)), reason="tiny-training's networks are not below NETSUKE_DATA")


def test_the_float_network_is_the_int8_one_without_rounding():
    net, x = residual_network(), images(16)
    y = net.tensors[net.outputs[0]]
    want = y.real(Interpreter(net).run(x)[0])
    with torch.no_grad():
        got = FloatNetwork(net)(torch.from_numpy(x)).numpy()
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.95
    assert got.max() <= float(y.real(np.int8(127))) + 1e-6


def test_its_parameters_are_all_trained():
    net = residual_network()
    m = FloatNetwork(net)
    m(torch.from_numpy(images(2))).sum().backward()
    assert len(list(m.parameters())) == 20
    assert all(p.grad is not None for p in m.parameters())


@needs_models
@pytest.mark.parametrize("measure", [tiny_training.memory_rule, tiny_training.arena])
def test_claims_that_take_seconds(measure):
    assert measure(True).met


@needs_models
def test_five_plans_fit_and_none_of_them_with_late_updates():
    early, late = tiny_training.arena(True).values, tiny_training.arena(True, early=False).values
    assert list(early) == [f"plan {k}" for k in PUBLISHED]
    assert all(v["total"] == v["arena"] + v["variables"] + v["stack"] <= 256 << 10 for v in early.values())
    assert all(v["total"] > 256 << 10 for v in late.values())


def test_a_grid_goes_on_while_its_best_is_at_an_end():
    def peak(at):
        return lambda rate: -abs(np.log(rate / at))

    assert list(widened((1.0, 2.0, 4.0), peak(2))[1]) == [1, 2, 4]
    best, found = widened((1.0, 2.0, 4.0), peak(16))
    assert best == 16 and max(found) == 32
    best, found = widened((1.0, 2.0, 4.0), peak(0.25))
    assert best == 0.25 and min(found) == 0.125


def test_a_rate_at_which_training_diverges_counts_nothing():
    def measured(rate):
        if rate > 2:
            raise Diverged("train", "the loss became nan")
        return 0.5 + rate / 10

    assert widened((1.0, 2.0, 4.0), measured) == (2.0, {1.0: 0.6, 2.0: 0.7, 4.0: 0.0})


@needs_models
def test_plans_have_the_published_ones():
    assert plans()["plan 49"] == PUBLISHED[49]
    assert plans()["last 12"].n_bias == 12


def test_every_claim_has_a_bar_or_a_reason():
    assert all(bool(c.bar) != bool(c.why) for c in tiny_training.CLAIMS)
