"""Dense networks: derivatives against differences, own functions against NumPy's, graphs in, refusals."""

import numpy as np
import pytest

from netsuke.apps.control import arithmetic
from netsuke.apps.control.network import DenseNetwork
from netsuke.errors import NetsukeError
from netsuke.graph.interpret import Interpreter
from netsuke.graph.ir import QGraph, Tensor
from tests.apps.control.cases import model, network


def graph_of(function: str = "tanh", **attrs) -> QGraph:
    rng, graph = np.random.default_rng(1), QGraph("small")
    x = graph.add(Tensor("x", (1, 1, 4), "float32"))
    graph.inputs = (x,)
    x = graph.append("reshape", (x,), Tensor("flat", (1, 4), "float32"))
    w, b = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    x = graph.append(
        "dense", (x, graph.constant("w", w), graph.constant("b", b)), Tensor("h", (1, 6), "float32"), low=0.0
    )
    w = rng.normal(size=(3, 6)).astype(np.float32)
    x = graph.append("dense", (x, graph.constant("v", w)), Tensor("y", (1, 3), "float32"), **attrs)
    x = graph.append("unary", (x,), Tensor("z", (1, 3), "float32"), function=function)
    graph.outputs = (x,)
    return graph.check()


def test_a_graph_becomes_the_same_function():
    graph, x = graph_of(), np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    want = Interpreter(graph).run(x.reshape(5, 1, 4))[0]
    for dtype in (np.float32, np.float64):
        assert np.allclose(DenseNetwork.from_graph(graph, dtype).forward(x.astype(dtype))[-1], want, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda g: g.ops[-1].attrs.update(function="gelu"), "gelu"),
        (lambda g: g.ops[2].attrs.update(high=1.0), "y"),
        (lambda g: g.ops.insert(2, g.ops.pop(2)) or setattr(g.ops[2], "kind", "softmax"), "softmax"),
        (lambda g: setattr(g, "ops", g.ops[:1]) or setattr(g, "outputs", g.ops[0].outputs), "no dense layer"),
    ],
)
def test_other_graphs_are_refused_by_name(change, named):
    graph = graph_of()
    change(graph)
    with pytest.raises(NetsukeError, match=named):
        DenseNetwork.from_graph(graph)


def test_own_exponential_and_tangent_are_exact_to_the_last_bits():
    x = np.linspace(-86, 87, 40001).astype(np.float32)
    assert np.max(np.abs(arithmetic.exp(x) / np.exp(x.astype(np.float64)) - 1)) < 3e-7
    x = np.linspace(-12, 12, 40000).astype(np.float32)  # without 0
    assert np.max(np.abs(arithmetic.tanh(x) / np.tanh(x.astype(np.float64)) - 1)) < 4e-7
    assert np.array_equal(arithmetic.tanh(np.float32([0, 50, -50])), [0, 1, -1])


def test_sums_run_in_order_in_float32():
    terms = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    want = np.float32([1, 2, 3])
    for term in terms:
        want = want + term
    assert np.array_equal(arithmetic.fold(np.float32([1, 2, 3]), terms), want)


@pytest.mark.parametrize("activation", arithmetic.ACTIVATIONS)
def test_first_and_second_derivatives(activation):
    net = network(4, 5, 3, activations=(activation, "tanh"), dtype=np.float64, seed=3)
    x, eps = np.random.default_rng(2).normal(size=(1, 4)), 1e-5
    values = net.forward(x)
    jacobian = net.jacobian(values, 4)[0]
    tangent, bend = net.second(values, np.eye(4)[None], np.zeros((1, 4, 4, 4)))
    assert np.allclose(jacobian, tangent[0], atol=1e-12)
    for i in range(4):
        up, down = net.forward(x + eps * np.eye(4)[i]), net.forward(x - eps * np.eye(4)[i])
        assert np.allclose((up[-1] - down[-1])[0] / (2 * eps), jacobian[:, i], atol=1e-8)
        bends = (net.jacobian(up, 4) - net.jacobian(down, 4))[0] / (2 * eps)
        assert np.allclose(bends, bend[0, :, :, i], atol=1e-6)


def test_frozen_inputs_are_added_up_once():
    net, x = network(7, 5, 2, dtype=np.float64), np.random.default_rng(0).normal(size=(1, 7))
    split = net.forward(x[:, :4], net.frozen(x[0, 4:], 4))[-1]
    assert np.allclose(split, net.forward(x)[-1], atol=1e-12)


def test_int8_weights_need_units_of_like_size():
    net, ranges = network(6, 8, 2, dtype=np.float64), np.array([1, 1, 1, 1e-3, 1e-3, 1e-3])
    first = net.layers[0]
    first.weight[:, 3:] *= 300  # inputs in other units: small numbers, large weights
    x = np.random.default_rng(0).uniform(-1, 1, (200, 6)) * ranges
    want = net.forward(x)[-1]
    balanced, plain = net.quantized(ranges), net.quantized(np.abs(first.weight).max(axis=0))
    error, other = (float(np.abs(n.forward(x)[-1] - want).max()) for n in (balanced, plain))
    assert balanced.layers[0].weight.dtype == np.int8 and error < 0.02 < other
    assert np.allclose(balanced.jacobian(balanced.forward(x), 6), net.jacobian(net.forward(x), 6), atol=0.5 * 300)


def test_a_predictor_says_what_does_not_fit():
    with pytest.raises(NetsukeError, match=r"maps 11 inputs.*make 12"):
        model().__class__(model().network, 2, 2, 2, 2, 4)
    with pytest.raises(NetsukeError, match="control_past is 0"):
        model().__class__(model().network, 2, 2, 0, 2, 3)
