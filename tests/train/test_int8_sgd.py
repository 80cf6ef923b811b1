"""Training on codes: scaling, three ways to store a step, and the chip's kernels against the simulation."""

import math

import numpy as np
import pytest
import torch

from netsuke.errors import NetsukeError
from netsuke.graph import Interpreter
from netsuke.graph.simulate import features, suffix
from netsuke.graph.update_plan import UpdatePlan, first_op, head, last, layers
from netsuke.train.int8_sgd import Int8SGD, accuracy, factors, module_for, on_chip, schedule, train, wrapped
from tests.graph.small import images, residual_network
from tests.graph.test_lower_train import built

PLAN = UpdatePlan(5, {4: 0.5, 8: 1.0})
COUNT = 48


@pytest.fixture(scope="module")
def case():
    """(network, images at the first trained layer, labels): pictures of four tints."""
    net, rng = residual_network(), np.random.default_rng(3)
    labels = np.arange(COUNT) % 4
    x = images(COUNT, seed=4).astype(np.int64) // 2
    for i, label in enumerate(labels):
        x[i] += np.array([[90, -40, 0], [-40, 90, 0], [0, 0, 110], [-60, -60, -60]])[label]
    x = np.clip(x + rng.integers(-10, 10, x.shape), -128, 127).astype(np.int8)
    return net, features(net, first_op(net, PLAN), x), labels.astype(np.int64)


@pytest.mark.parametrize("head_kind", ["float", "int8"])
@pytest.mark.parametrize("storage", ["copies", "stochastic"])
def test_it_learns(case, storage, head_kind):
    net, cut, labels = case
    knobs = Int8SGD(PLAN, rate=0.01, epochs=15, batch=8, storage=storage, head=head_kind)
    done = train(net, knobs, cut, labels, 4)
    assert done.losses[-1] < 0.5 * done.losses[0]
    assert accuracy(done.module, cut, labels) > 0.8
    if storage == "stochastic":
        body = done.module.body if head_kind == "float" else done.module
        for name, p in body.params.items():
            assert torch.equal(p, p.round()), name
            assert not name.startswith("weight") or p.abs().max() <= 127


def test_steps_below_one_vanish_when_truncated(case):
    net, cut, labels = case
    knobs = Int8SGD(PLAN, rate=1e-6, epochs=2, batch=16, storage="truncate", head="int8")
    m = train(net, knobs, cut, labels, 4).module
    fresh = module_for(net, knobs, 4)
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), fresh.parameters()))


def test_codes_wrap_around():
    assert wrapped(torch.tensor([127.0, 128, -129, 300]), 8).tolist() == [127, -128, 127, 44]


def test_only_the_plan_changes(case):
    net, cut, labels = case
    m = train(net, Int8SGD(PLAN, rate=0.01, epochs=2, batch=16), cut, labels, 4).module.body
    fresh = module_for(net, Int8SGD(PLAN), 4).body
    numbers = layers(net)
    for i in range(4, 9):
        k = numbers[i]
        assert not torch.equal(m.bias(k), fresh.bias(k))
        assert torch.equal(m.weight(k), fresh.weight(k)) == (i not in PLAN.weights)
    changed = (m.weight(numbers[4]) != fresh.weight(numbers[4])).flatten(2).any(2).any(0)
    assert int(changed.sum()) == 4  # half of eight input channels


def test_scaling_is_by_the_square_of_the_scale(case):
    net, *_ = case
    on, off = (factors(net, Int8SGD(PLAN, scaled=s), 4) for s in (True, False))
    k = layers(net)[8]
    scale = net.tensors[net.ops[k].inputs[1]].scale
    x_scale = float(net.tensors[net.ops[k].inputs[0]].scale)
    np.testing.assert_allclose(on[f"weight{k}"][:, 0, 0, 0], scale**-2, rtol=1e-5)
    np.testing.assert_allclose(on[f"bias{k}"], (scale * x_scale) ** -2, rtol=1e-5)
    assert off[f"weight{k}"].unique().tolist() == [1]


def test_scaled_training_does_not_depend_on_the_scale_of_the_codes(case):
    """The same real network with another scale of one layer's codes takes the same steps in real numbers."""
    net, _, labels = case
    k = layers(net)[8]
    fine = residual_network()
    w, b = (fine.tensors[i] for i in fine.ops[k].inputs[1:])
    w.data, w.scale = (w.data // 3).astype(np.int8), w.scale * 3
    b.data = b.data // 3
    coarse = residual_network()
    w2, b2 = (coarse.tensors[i] for i in coarse.ops[k].inputs[1:])
    w2.data, b2.data = w.data * 3, b.data * 3
    knobs = Int8SGD(last(net, 1), rate=0.03, epochs=1, batch=48, warmup=0.0)
    moves = []
    for g in (fine, coarse):
        cut8 = features(g, k, images(COUNT, seed=4))
        a, z = module_for(g, knobs, 4).body, train(g, knobs, cut8, labels, 4).module.body
        real = torch.from_numpy(g.tensors[g.ops[k].inputs[1]].scale)[:, None]
        moves.append(((z.weight(k) - a.weight(k)).detach().flatten(1).double() * real).flatten())
    assert float((moves[0] - moves[1]).norm() / moves[1].norm()) < 1e-3


def test_a_rate_that_is_too_high_is_said_so(case):
    net, cut, labels = case
    with pytest.raises(NetsukeError, match="a rate below 1e"):
        train(net, Int8SGD(PLAN, rate=1e30, epochs=3, batch=16), cut, labels, 4)


def test_the_schedule_rises_and_falls():
    rates = [schedule(t, 0.1) for t in np.linspace(0, 1, 101)]
    assert rates[0] < 0.02
    assert max(rates) == pytest.approx(1, abs=0.02)
    assert rates[-1] == pytest.approx(0)
    assert all(math.isfinite(r) and r >= 0 for r in rates)


@pytest.mark.skipif(not built(), reason="the kernels' library is not built")
def test_the_chips_kernels_learn_the_same_task(case):
    net, cut, labels = case
    done = on_chip(net, PLAN, cut, labels, 4, rate=0.003, epochs=8)
    assert done.losses[-1] < 0.5 * done.losses[0]
    start = first_op(net, PLAN)
    logits = Interpreter(suffix(done.graph, start)).run(*cut)[0]
    assert (logits.argmax(1) == labels).mean() > 0.8
    k = head(done.graph)
    assert np.any(done.graph.tensors[done.graph.ops[k].inputs[1]].data != net.tensors[net.ops[k].inputs[1]].data)
