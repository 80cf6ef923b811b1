"""Post-training quantization: what it costs on a real network, and that each of its parts does what it is for."""

import numpy as np
import pytest

from netsuke.errors import NetsukeError
from netsuke.graph import Interpreter, QGraph, Tensor
from netsuke.graph.equalize import equalize, pairs
from netsuke.graph.quantize import narrow, output_error, quantize, weights_only
from netsuke.graph.ranges import Histogram, spread, weight_scales

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def the_same_numbers_in_any_order_of_tests():
    global RNG
    RNG = np.random.default_rng(0)


def weights(*shape, scale=0.3):
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def layer(graph, kind, x, w, name, shape, b=None, **attrs):
    inputs = (x, graph.constant(f"{name}.weight", w))
    bias = weights(len(w) if kind != "depthwise2d" else w.shape[-1], scale=0.1) if b is None else b
    inputs += (graph.constant(f"{name}.bias", bias),)
    return graph.append(kind, inputs, Tensor(name, shape, "float32"), name, **attrs)


def small(end="softmax"):
    """conv relu, depthwise relu6, pointwise, a residual sum, pool, concat with its sigmoid, dense."""
    g = QGraph("small")
    g.inputs = (x := g.add(Tensor("x", (1, 8, 8, 2), "float32")),)
    a = layer(g, "conv2d", x, weights(6, 3, 3, 2), "conv", (1, 8, 8, 6), pad=(1, 1, 1, 1), low=0.0)
    b = layer(g, "depthwise2d", a, weights(3, 3, 6), "depth", (1, 8, 8, 6), pad=(1, 1, 1, 1), low=0.0, high=6.0)
    b = layer(g, "conv2d", b, weights(6, 1, 1, 6), "point", (1, 8, 8, 6))
    s = g.append("add", (a, b), Tensor("sum", (1, 8, 8, 6), "float32"))
    p = g.append("maxpool2d", (s,), Tensor("pool", (1, 2, 2, 6), "float32"), window=(4, 4), stride=(4, 4))
    q = g.append("unary", (p,), Tensor("gate", (1, 2, 2, 6), "float32"), function="sigmoid")
    c = g.append("concat", (p, q), Tensor("both", (1, 2, 2, 12), "float32"), axis=3)
    c = g.append(
        "mul", (c, g.constant("half", np.full(1, 0.5, np.float32))), Tensor("halved", (1, 2, 2, 12), "float32")
    )
    f = g.append("reshape", (c,), Tensor("flat", (1, 48), "float32"))
    y = layer(g, "dense", f, weights(5, 48), "dense", (1, 5))
    g.outputs = (g.append("softmax", (y,), Tensor("p", (1, 5), "float32")) if end == "softmax" else y,)
    return g.check()


def images(n=24):
    return RNG.standard_normal((n, 8, 8, 2)).astype(np.float32)


def relative(graph, quantized, x):
    return output_error(graph, quantized, [x]) ** 0.5


def test_every_operator_gets_an_integer_form_near_the_float_one():
    graph, x = small(), images()
    for io in ("int8", "float"):
        q = quantize(graph, [x[:8], x[8:16]], io=io)
        assert relative(graph, q, x[16:]) < 0.05
        inner = {t.dtype for t in q.tensors if not t.constant}
        assert inner == ({"int8"} if io == "int8" else {"int8", "float32"})
        assert (q.ops[0].kind, q.ops[-1].kind) == (
            ("conv2d", "softmax") if io == "int8" else ("quantize", "dequantize")
        )
    conv, depth = (next(o for o in q.ops if o.name == n) for n in ("conv", "depth"))
    y = q.tensors[depth.outputs[0]]
    assert conv.attrs["low"] == q.tensors[conv.outputs[0]].zero == -128
    assert depth.attrs["high"] == min(127, round(6 / float(y.scale)) - 128)
    assert graph.tensors[graph.inputs[0]].dtype == "float32"  # the float graph is as it was


def test_bits_may_differ_by_layer():
    graph, x = small("dense"), images()
    q = quantize(graph, [x], bits={"dense.weight": 4})
    kinds = {t.name: t.dtype for t in q.tensors if t.constant and t.name.endswith("weight")}
    assert kinds == {"conv.weight": "int8", "depth.weight": "int8", "point.weight": "int8", "dense.weight": "int4"}
    later = narrow(quantize(graph, [x]), {"dense.weight": 4})
    w = next(t for t in later.tensors if t.name == "dense.weight")
    assert w.dtype == "int4" and w.data.min() >= -8 and w.data.max() <= 7
    errors = [relative(graph, g, x) for g in (quantize(graph, [x]), q, later, quantize(graph, [x], 4))]
    assert errors[0] < min(errors[1:]) and max(errors) < 0.2


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_only_keeps_activations_float(bits):
    graph, x = small("dense"), images()
    hybrid = weights_only(graph, bits)
    assert {t.dtype for t in hybrid.tensors if t.constant and t.name.endswith("weight")} == {f"int{bits}"}
    assert relative(graph, hybrid, x) < (0.02 if bits == 8 else 0.3)
    assert hybrid.weight_bytes() < graph.weight_bytes() / (2.5 if bits == 8 else 4)
    again = quantize(hybrid, [x])  # its codes stand for numbers, which are quantized anew
    assert relative(hybrid, again, x) < 0.05


def recurrent():
    g = QGraph("r")
    g.inputs = (g.add(Tensor("x", (1, 5, 3), "float32")),)
    parts = (g.constant("gru.weight", weights(12, 3)), g.constant("gru.recurrent_weight", weights(12, 4)))
    y = g.append("gru", (*g.inputs, *parts), Tensor("h", (1, 4), "float32"), "gru", reset_after=True)
    g.outputs = (y,)
    return g.check()


def test_recurrent_layers_are_quantized_in_their_weights_only():
    graph, x = recurrent(), RNG.standard_normal((6, 5, 3)).astype(np.float32)
    with pytest.raises(NetsukeError, match=r"'gru'.*weights_only"):
        quantize(graph, [x])
    hybrid = weights_only(graph, {"gru.weight": 8, "gru.recurrent_weight": 4})
    assert [t.dtype for t in hybrid.tensors if t.constant] == ["int8", "int4"]
    assert 0 < relative(graph, hybrid, x) < 0.2


def uneven():
    """Two layers whose inner channels differ by 10^4 in size, which cancels."""
    g = QGraph("uneven")
    g.inputs = (x := g.add(Tensor("x", (1, 4, 4, 3), "float32")),)
    size = np.logspace(-2, 2, 8).astype(np.float32)
    a = layer(g, "conv2d", x, weights(8, 1, 1, 3) * size[:, None, None, None], "a", (1, 4, 4, 8), 0.1 * size, low=0.0)
    p = g.append("avgpool2d", (a,), Tensor("p", (1, 2, 2, 8), "float32"), window=(2, 2), stride=(2, 2))
    f = g.append("reshape", (p,), Tensor("f", (1, 32), "float32"))
    g.outputs = (layer(g, "dense", f, weights(4, 32) / np.tile(size, 4), "b", (1, 4)),)
    return g.check()


def test_equalization_evens_channels_and_changes_no_result():
    graph, x = uneven(), RNG.standard_normal((16, 4, 4, 3)).astype(np.float32)
    even = equalize(graph)
    assert len(pairs(graph)) == 1 and np.allclose(Interpreter(graph).run(x)[0], Interpreter(even).run(x)[0], atol=1e-5)
    rows = np.abs(even.tensors[even.ops[0].inputs[1]].data).reshape(8, -1).max(1)
    assert rows.max() / rows.min() < 100 < 1e3 < 10**4  # before: the sizes above
    without, chosen = (quantize(graph, [x], equalized=e) for e in (False, None))
    assert relative(graph, chosen, x) < 0.1 * relative(graph, without, x)


def test_a_dead_channel_is_not_blown_up():
    graph = uneven()
    w = graph.tensors[graph.ops[0].inputs[1]]
    w.data = w.data.copy()
    w.data[2] = 1e-30
    x = RNG.standard_normal((16, 4, 4, 3)).astype(np.float32)
    even = equalize(graph)
    assert max(np.abs(t.data).max() for t in even.tensors if t.constant) < 1e3
    assert relative(graph, quantize(graph, [x]), x) < 0.05


def test_a_limit_above_stops_equalization():
    graph = uneven()
    graph.ops[0].attrs["high"] = 6.0
    assert pairs(graph) == []


def test_bias_correction_removes_the_mean_error():
    graph, x = small("dense"), images(64)
    real = Interpreter(graph).run(x)[0]

    def mean_error(corrected):
        q = quantize(graph, [x], 4, equalized=False, corrected=corrected)
        y = q.tensors[q.outputs[0]].real(Interpreter(q).run(q.tensors[q.inputs[0]].codes(x))[0])
        return np.abs((y - real).mean(0)).max()

    assert mean_error(True) < 0.4 * mean_error(False)


def test_the_range_search_cuts_outliers_off():
    values = np.concatenate((RNG.standard_normal(100_000), [40.0, -60.0]))
    h = Histogram()
    for part in np.array_split(values, 7):
        h.add(part)
    assert h.range("minmax") == (-60.0, 40.0) and h.counts.sum() == len(values)

    def error(low, high):
        t = Tensor("t", (1,), "int8", *spread(low, high))
        return ((t.real(t.codes(values)) - values) ** 2).sum()

    found, shares = error(*h.range("range")), np.linspace(0.02, 1, 50)
    assert found < 0.85 * error(-60, 40)
    assert found < 1.05 * min(error(-60 * a, 40 * b) for a in shares for b in shares)


def test_histograms_merge_as_if_counted_together():
    a, b, both = Histogram(), Histogram(), Histogram()
    small_values, large = RNG.standard_normal(500) * 1e-3, RNG.standard_normal(500) * 50
    a.add(small_values)
    b.add(large)
    for v in (small_values, large):
        both.add(v)
    a.merge(b)
    assert np.array_equal(a.counts, both.counts) and (a.low, a.high, a.reach) == (both.low, both.high, both.reach)


def test_weight_scales_are_never_worse_than_the_largest_value():
    rows = np.concatenate((weights(6, 200), np.zeros((1, 200))))
    for bits in (8, 4):
        top = 2 ** (bits - 1) - 1

        def error(scales, top=top, bits=bits):
            codes = np.clip(np.rint(rows / scales[:, None]), -top - (bits == 4), top)
            return ((codes * scales[:, None] - rows) ** 2).sum(1)

        found, plain = weight_scales(rows, bits, "range"), weight_scales(rows, bits, "minmax")
        assert np.all(error(found) <= error(plain) + 1e-12) and np.all(found > 0)
    assert error(found)[:6].sum() < 0.9 * error(plain)[:6].sum()  # at 4 bits it matters


@pytest.mark.parametrize(
    "change, says",
    [
        ({"calibration": None}, "--data"),
        ({"calibration": []}, "empty.*--data"),
        ({"calibration": [np.zeros((2, 8, 8, 3), np.float32)]}, r"shape \(2, 8, 8, 3\)"),
        ({"calibration": [np.full((1, 8, 8, 2), np.nan, np.float32)]}, "NaN or infinity"),
        ({"calibration": [(images(1), images(1))]}, "2 inputs"),
        ({"weights": 3}, "3 bits"),
        ({"bits": {"dense.weight": 2}}, "2 bits"),
        ({"bits": {"nothing": 4}}, "'nothing'.*conv.weight"),
        ({"method": "guess"}, "'guess'"),
    ],
)
def test_misuse_ends_in_a_sentence(change, says):
    with pytest.raises(NetsukeError, match=says):
        quantize(small(), **({"calibration": [images(4)]} | change))


def test_an_integer_graph_is_refused():
    with pytest.raises(NetsukeError, match="quantized already"):
        quantize(quantize(small(), [images(4)]), [images(4)])


def test_a_trained_network_keeps_its_accuracy():
    """A depthwise network on scikit-learn's digits: 8 bits cost nothing, 4-bit weights about half a point."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    from netsuke.graph.read.module import from_torch

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = (digits.images / 16).astype(np.float32)[order, None], digits.target[order]
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 4, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(12):
        for i in torch.randperm(1000).split(50):
            loss = nn.functional.cross_entropy(net(torch.tensor(x[i])), torch.tensor(y[i]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    graph = from_torch(net, torch.tensor(x[:1]), "digits")

    def accuracy(g):
        return (Interpreter(g).run(g.tensors[g.inputs[0]].codes(x[1000:]))[0].argmax(1) == y[1000:]).mean()

    full, eight, four = (accuracy(g) for g in (graph, *(quantize(graph, [x[:128]], bits) for bits in (8, 4))))
    assert full > 0.96 and eight > full - 0.005 and four > full - 0.02
    assert accuracy(weights_only(graph, 4)) > full - 0.02
