"""The compiled training graph: gradients against autograd, what is dropped, how codes are updated, memory."""

import numpy as np
import pytest
import torch

from netsuke.errors import NetsukeError
from netsuke.graph import Interpreter, QGraph, Tensor
from netsuke.graph.arena import plan_arena
from netsuke.graph.differentiate import (
    ReferenceTraining,
    UpdateRule,
    drop_dead,
    trained_constants,
    training_graph,
    with_head,
)
from netsuke.graph.host import HostProgram
from netsuke.graph.ops import OPS
from netsuke.graph.ops.train import (
    bias_gradient,
    change,
    conv_weight_gradient,
    depthwise_weight_gradient,
    mix,
    uniform,
)
from netsuke.graph.quantize import quantize
from netsuke.graph.simulate import to_torch
from netsuke.graph.update_plan import UpdatePlan, full, head, kept_channels, last, layers
from tests.graph.small import images, residual_network

PLAN = UpdatePlan(6, {4: 0.5, 5: 0.25, 7: 1.0, 8: 0.5})
RATE = np.array([0.01], np.float32)


def inputs(label: int = 2) -> tuple[np.ndarray, ...]:
    return images(1, seed=3), np.array([label], np.int32), RATE


def gradients(g: QGraph, label: int = 2) -> dict[str, np.ndarray]:
    """By the names of the updates: what each of them sums up."""
    values = {i: t.data for i, t in enumerate(g.tensors) if t.constant} | dict(zip(g.inputs, inputs(label)))
    out = {}

    def note(k, outs):
        op = g.ops[k]
        if op.kind == "bias_update":
            out[op.name] = bias_gradient(values[op.inputs[0]])
        elif op.kind in ("conv_update", "depthwise_update"):
            sums = conv_weight_gradient if op.kind == "conv_update" else depthwise_weight_gradient
            out[op.name] = sums(g, op, values[op.inputs[0]], values[op.inputs[1]])
        else:
            values.update(zip(op.outputs, outs))

    Interpreter(g).run(*inputs(label), on_op=note)
    return out


@pytest.mark.parametrize("plan", [full(residual_network()), PLAN, UpdatePlan(0), last(residual_network(), 4)])
def test_gradients_are_those_of_the_simulation(plan):
    """All layers, with the branch and the sum of a residual block: the compiled gradients are autograd's."""
    net = residual_network()
    found = gradients(training_graph(net, plan, 4))
    m = to_torch(net)
    names = {k: net.ops[k].name for k in (*layers(net), head(net))}
    for k in names:
        m.weight(k).requires_grad_(True)
        m.bias(k).requires_grad_(True)
    torch.nn.functional.cross_entropy(m(torch.from_numpy(inputs()[0])), torch.tensor([2])).backward()
    ratios = {layers(net)[i]: r for i, r in plan.weights.items()} | {head(net): 1.0}
    trained = {f"{names[k]}.weight" for k in ratios}
    biases = {f"{names[k]}.bias" for k in (*layers(net)[len(layers(net)) - plan.n_bias :], head(net))}
    assert set(found) == trained | biases
    for k, name in names.items():
        if f"{name}.bias" in found:
            np.testing.assert_allclose(found[f"{name}.bias"], m.bias(k).grad.numpy(), rtol=2e-4, atol=1e-9)
        if k in ratios:
            want = m.operators[k].layout(m.weight(k).grad.numpy())
            want = want[..., kept_channels(net, net.ops[k], ratios[k])]
            got = found[f"{name}.weight"]
            np.testing.assert_allclose(got.reshape(want.shape), want, rtol=5e-4, atol=1e-5 * np.abs(want).max())


def own_network(limited: bool = False):
    """A float network that netsuke quantizes itself: a convolution with ReLU, a mean over all pixels, a head."""
    rng, g = np.random.default_rng(0), QGraph("own")
    g.inputs = (x := g.add(Tensor("image", (1, 12, 12, 3), "float32")),)

    def layer(kind, x, name, shape, out, **attrs):
        w = g.constant(f"{name}.weight", (rng.normal(size=shape) * np.prod(shape[1:]) ** -0.5).astype(np.float32))
        b = g.constant(f"{name}.bias", rng.normal(0, 0.1, shape[0]).astype(np.float32))
        return g.append(kind, (x, w, b), Tensor(name, out, "float32"), **attrs)

    x = layer("conv2d", x, "first", (8, 3, 3, 3), (1, 6, 6, 8), pad=(1, 1, 1, 1), stride=(2, 2), low=0.0)
    x = layer("conv2d", x, "second", (16, 1, 1, 8), (1, 6, 6, 16))
    limits = {"low": 0.0, "high": 0.3} if limited else {}
    x = g.append("avgpool2d", (x,), Tensor("pooled", (1, 1, 1, 16), "float32"), window=(6, 6), **limits)
    x = g.append("reshape", (x,), Tensor("flat", (1, 16), "float32"))
    g.outputs = (layer("dense", x, "classifier", (4, 16), (1, 4)),)
    return quantize(g.check(), [images(16, seed=7).astype(np.float32) / 64])


@pytest.mark.parametrize("limited", [False, True])
def test_a_network_quantized_here_is_trained_below_its_pool(limited):
    """The pool has two scales: what it clips has no gradient, the rest is that of the simulation, in C as well."""
    net, x = own_network(limited), images(8, seed=5)
    pool = next(op for op in net.ops if op.kind == "avgpool2d")
    assert net.tensors[pool.inputs[0]].scale > 1.5 * net.tensors[pool.outputs[0]].scale
    m = to_torch(net)
    np.testing.assert_array_equal(m.codes(torch.from_numpy(x)), Interpreter(net).run(x)[0])
    found = gradients(training_graph(net, full(net), 4))
    for k in (*layers(net), head(net)):
        m.weight(k).requires_grad_(True)
    torch.nn.functional.cross_entropy(m(torch.from_numpy(inputs()[0])), torch.tensor([2])).backward()
    for k in (*layers(net), head(net)):
        want = m.operators[k].layout(m.weight(k).grad.numpy())
        got = found[f"{net.ops[k].name}.weight"].reshape(want.shape)
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(got, want, rtol=5e-4, atol=1e-5 * np.abs(want).max())
    step = training_graph(net, full(net), 4)
    run, host = ReferenceTraining(step), HostProgram(step)
    chances = []
    for k in range(400):
        i = k % 8
        chances.append(run.step(x[i], label=i % 4, rate=0.05)[1])
        host.run(x[i : i + 1], np.array([i % 4], np.int32), np.array([0.05], np.float32))
    assert np.mean(-np.log(chances[-8:])) < np.mean(-np.log(chances[:8]))
    start = {t.name: t.data for t in net.tensors}
    assert not any(np.array_equal(run.variables()[f"{n}.weight"], start[f"{n}.weight"]) for n in ("first", "second"))
    for index, values in host.variables().items():
        np.testing.assert_array_equal(values, run.graph.tensors[index].data)


def test_a_pool_over_a_part_of_the_image_is_named():
    net = own_network()
    pool = next(op for op in net.ops if op.kind == "avgpool2d")
    pool.attrs |= {"window": (4, 4), "stride": (3, 3)}  # still 1 x 1, the mean of 16 of 36 pixels
    with pytest.raises(NetsukeError, match="the pool 'pooled' maps"):
        training_graph(net.check(), full(net), 4)


def test_dead_code_is_dropped():
    """No gradient below the first trained layer, no mask there, no saved input of a layer with fixed weights."""
    net = residual_network()
    g = training_graph(net, UpdatePlan(2, {8: 0.5}), 4)
    kinds = [op.kind for op in g.ops]
    assert kinds.count("conv_gradient") == 2  # of the head and of c.pw; the input of c.dw needs none
    assert kinds.count("depthwise_gradient") == 0
    assert kinds.count("clip_mask") == 3
    assert kinds.count("pick_channels") == 1
    assert kinds.count("bias_update") == 3
    whole = [op.kind for op in training_graph(net, full(net), 4).ops]
    assert whole.count("conv_gradient") + whole.count("depthwise_gradient") == 9
    assert whole.count("add") == 2  # one of the network, one sum of two gradients


def test_dropping_keeps_what_changes_variables():
    g = training_graph(residual_network(), PLAN, 4)
    assert len(drop_dead(g).ops) == len(g.ops)
    g.append("clip_mask", g.outputs[:1], Tensor("unused", (1, 1), "uint8"), low=-128, high=127)
    assert len(drop_dead(g).ops) == len(g.ops) - 1


def test_an_early_update_needs_less_memory():
    net = residual_network()
    early, late = (plan_arena(training_graph(net, full(net), 4, early=e)).size for e in (True, False))
    assert early < 0.7 * late


def test_each_update_follows_its_gradient():
    g = training_graph(residual_network(), PLAN, 4)
    written = {i: k for k, op in enumerate(g.ops) for i in op.outputs}
    gaps = [k - written[op.inputs[0]] for k, op in enumerate(g.ops) if op.kind.endswith("_update")]
    assert max(gaps) <= 5  # merged weights, the input's gradient, a sum at most, the two updates


def test_training_lowers_the_loss():
    net, x = residual_network(), images(8, seed=5)
    run = ReferenceTraining(training_graph(net, PLAN, 4))
    start = run.variables()
    chances = [[run.step(x[i], label=i % 4, rate=0.003)[1] for i in range(8)] for _ in range(8)]
    assert np.mean(-np.log(chances[-1])) < 0.3 * np.mean(-np.log(chances[0]))
    assert run.variables()["step"][0] == 64
    moved = {n for n, v in run.variables().items() if not np.array_equal(v, start[n])}
    assert {"c.pw.weight.kept", "b.pw1.weight.kept", "c.dw.weight", "classifier.weight", "c.pw.bias"} <= moved


def test_only_kept_channels_are_in_ram_and_change():
    net, x = residual_network(), images(8, seed=5)
    g = training_graph(net, PLAN, 4)
    k, d = layers(net)[4], layers(net)[5]
    before, kept = (net.tensors[net.ops[k].inputs[1]].data, kept_channels(net, net.ops[k], 0.5))
    sizes = {t.name: t.size for t in g.tensors if t.variable}
    assert sizes["b.pw1.weight.kept"] == before.size // 2
    assert sizes["b.dw.weight.kept"] == net.tensors[net.ops[d].inputs[1]].size // 4
    assert "b.pw1.weight" not in sizes
    run = ReferenceTraining(g)
    for i in range(8):
        run.step(x[i], label=i % 4, rate=0.05)
    found = trained_constants(g, {i: t.data for i, t in enumerate(run.graph.tensors) if t.variable})
    after = found[net.ops[k].inputs[1]]
    changed = np.any(after != before, axis=(0, 1, 2))
    assert set(np.flatnonzero(changed)) <= set(kept)
    assert changed.any()


def test_the_network_behaves_as_its_training_graph_ends():
    """Weights merged on the chip are those that are written back into the network."""
    net, x = residual_network(), images(6, seed=5)
    g = training_graph(net, PLAN, 4)
    run = ReferenceTraining(g)
    for i in range(6):
        run.step(x[i], label=i % 4, rate=0.01)
    back = net.copy()
    for index, data in trained_constants(g, {i: t.data for i, t in enumerate(run.graph.tensors) if t.variable}).items():
        if index < len(back.tensors):
            back.tensors[index].data = data
    np.testing.assert_array_equal(run.step(x[3], label=0, rate=0.0)[0], Interpreter(back).run(x[3:4])[0])


def test_steps_repeat_under_a_seed():
    net, x = residual_network(), images(2)

    def after(rule):
        run = ReferenceTraining(training_graph(net, PLAN, 4, rule))
        for i in range(2):
            run.step(x[i], label=i, rate=0.02)
        return run.variables()["b.pw1.weight.kept"]

    np.testing.assert_array_equal(after(UpdateRule()), after(UpdateRule()))
    assert np.any(after(UpdateRule()) != after(UpdateRule(seed=1)))


def update_op(**attrs):
    g = training_graph(residual_network(), PLAN, 4)
    op = next(op for op in g.ops if op.kind == "bias_update")
    op.attrs |= attrs
    return g, op


def test_stochastic_rounding_is_unbiased():
    _, op = update_op()
    step, ones = np.array([7], np.uint32), np.ones(200_000, np.float32)
    for value in (0.3, -0.3, 2.01, 0.0):
        v = change(op, ones * np.float32(value), ones, np.ones(1, np.float32), step)
        assert v.mean() == pytest.approx(value, abs=0.005)
        assert set(np.unique(v)) <= {np.floor(value), np.floor(value) + 1}


def test_the_generator_is_the_one_that_is_documented():
    assert [int(v) for v in mix(np.array([0, 1, 0xFFFFFFFF], np.uint32))] == [0, 0x514E28B7, 0x81F16F39]
    u = uniform(123, np.array([4], np.uint32), 100_000)
    assert u.min() >= 0
    assert u.max() < 1
    assert np.histogram(u, 16)[0].std() < 200
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01


def test_updates_saturate_and_released_ones_wrap_around():
    g, op = update_op(room=1000)
    n = g.tensors[op.inputs[1]].size
    b = np.linspace(-990, 990, n).astype(np.int32)
    grad = np.full((1, 1, 1, n), -30, np.float32)
    args = [grad, b, np.ones(n, np.float32), np.ones(1, np.float32), np.zeros(1, np.uint32)]
    assert OPS["bias_update"].run(g, op, args)[0].max() == 1000
    op.attrs["truncate"] = True
    np.testing.assert_array_equal(OPS["bias_update"].run(g, op, args)[0], b + 30)
    args[0] = np.full((1, 1, 1, n), 0.9, np.float32)
    np.testing.assert_array_equal(OPS["bias_update"].run(g, op, args)[0], b)
    wide = next(op for op in g.ops if op.kind == "conv_update")
    w = np.full(g.tensors[wide.inputs[2]].shape, 120, np.int8)
    x, gr = (g.tensors[wide.inputs[k]] for k in (1, 0))
    args = [
        np.full(gr.shape, -50, np.float32), np.full(x.shape, 1 + x.zero, np.int8), w,
        np.ones(w.shape[0], np.float32), np.ones(1, np.float32), np.zeros(1, np.uint32),
    ]  # fmt: skip
    assert OPS["conv_update"].run(g, wide, args)[0].max() == 127
    wide.attrs["truncate"] = True
    assert OPS["conv_update"].run(g, wide, args)[0].max() < 0  # 170 wraps to -86


def test_gradients_that_are_no_numbers_do_no_harm():
    g, op = update_op()
    n = g.tensors[op.inputs[1]].size
    args = [
        np.full((1, 1, 1, n), np.inf, np.float32), np.zeros(n, np.int32), np.zeros(n, np.float32),
        np.ones(1, np.float32), np.zeros(1, np.uint32),
    ]  # fmt: skip
    out = OPS["bias_update"].run(g, op, args)[0]
    assert np.abs(out.astype(np.int64)).max() <= 1 << 24


def test_a_label_outside_the_classes_names_none():
    g = training_graph(residual_network(), UpdatePlan(0), 4)
    logits, chance = Interpreter(g).run(*inputs(label=9))
    assert chance[0] == 0
    assert logits.shape == (1, 4)


@pytest.mark.parametrize("classes", [1, 5])
def test_heads_that_are_not_there(classes):
    with pytest.raises(NetsukeError, match=r"'classifier' has 4 rows"):
        with_head(residual_network(), classes)


def test_a_smaller_head_is_the_first_rows():
    net = residual_network()
    np.testing.assert_array_equal(
        Interpreter(with_head(net, 3)).run(inputs()[0])[0], Interpreter(net).run(inputs()[0])[0][:, :3]
    )


def test_operators_without_gradient_are_named():
    net = residual_network()
    net.ops[5].kind = "maxpool2d"
    with pytest.raises(NetsukeError, match=r"'b\.dw' \(maxpool2d\) has no gradient.*train only layers behind it"):
        training_graph(net, UpdatePlan(5), 4)
    net = residual_network()
    net.ops[10].attrs["window"] = (1, 1)
    net.tensors[net.ops[10].outputs[0]].shape = (1, 3, 3, 16)
    with pytest.raises(NetsukeError, match=r"the pool 'pooled' maps"):
        training_graph(net, UpdatePlan(1), 4)


def test_a_layer_without_bias_is_named():
    net = residual_network()
    net.ops[4].inputs = net.ops[4].inputs[:2]
    with pytest.raises(NetsukeError, match=r"'b\.pw1' has no bias"):
        training_graph(net, UpdatePlan(5), 4)
