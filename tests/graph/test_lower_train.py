"""The C kernels of training give the bits of the NumPy reference: gradients, masks, and weights after many steps."""

import numpy as np
import pytest

from netsuke.errors import NetsukeError
from netsuke.graph import Interpreter, Op, QGraph, Tensor
from netsuke.graph.differentiate import ReferenceTraining, UpdateRule, training_graph
from netsuke.graph.host import HostProgram, library
from netsuke.graph.update_plan import UpdatePlan, full
from tests.graph.small import images, residual_network


def built() -> bool:
    try:
        return hasattr(library(), "ns_merge_channels")
    except NetsukeError:
        return False


pytestmark = pytest.mark.skipif(not built(), reason="the kernels' library is not built")


def host_steps(g: QGraph, x: np.ndarray, rate: float) -> tuple[HostProgram, list]:
    host, seen = HostProgram(g), []
    for i, image in enumerate(x):
        seen.append(host.run(image[None], np.array([i % 4], np.int32), np.array([rate], np.float32)))
    return host, seen


@pytest.mark.parametrize("rule", [UpdateRule(), UpdateRule(truncate=True), UpdateRule(scaled=False, seed=5)])
@pytest.mark.parametrize("plan", [full(residual_network()), UpdatePlan(6, {4: 0.5, 5: 0.25, 6: 1.0, 7: 0.5, 8: 0.125})])
def test_weights_are_the_same_after_many_steps(plan, rule):
    g, x = training_graph(residual_network(), plan, 4, rule), images(30)
    rate = 0.004 if rule.scaled else 20.0
    host, seen = host_steps(g, x, rate)
    reference = ReferenceTraining(g)
    for i, image in enumerate(x):
        logits, chance = reference.step(image, label=i % 4, rate=rate)
        np.testing.assert_array_equal(seen[i][0], logits)
        assert seen[i][1][0] == np.float32(chance)
    moved = 0
    for index, values in host.variables().items():
        t = reference.graph.tensors[index]
        np.testing.assert_array_equal(values, t.data, err_msg=t.name)
        moved += int(np.sum(values != g.tensors[index].data))
    assert moved > 50


def program(kind: str, arrays: dict[str, np.ndarray | None], out: Tensor, **attrs) -> tuple[QGraph, list[np.ndarray]]:
    """A graph of one operator; a name that ends in "=" is a constant, None an absent input."""
    g, inputs, given = QGraph(kind), [], []
    for name, data in arrays.items():
        if data is None:
            inputs.append(-1)
        elif name.endswith("="):
            inputs.append(g.constant(name, data))
        else:
            scale = np.float64(0.1) if data.dtype == np.int8 else None
            inputs.append(g.add(Tensor(name, data.shape, str(data.dtype), scale)))
            given.append(data)
    g.inputs = tuple(i for i in inputs if i >= 0 and not g.tensors[i].constant)
    y = g.add(out)
    g.ops.append(Op(kind, tuple(inputs), (y,), attrs, kind))
    g.outputs = (y,)
    return g.check(), given


def same(g: QGraph, given: list[np.ndarray]) -> None:
    for a, b in zip(HostProgram(g).run(*given), Interpreter(g).run(*given)):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


SHAPES = [(5, 7, 3, 1, 1, 0), (4, 4, 8, 1, 1, 0), (6, 5, 4, 3, 1, 1), (7, 6, 5, 3, 2, 1), (9, 8, 2, 5, 2, 2), (3, 3, 6, 7, 1, 3),
          (6, 6, 3, 1, 2, 0)]  # fmt: skip


@pytest.mark.parametrize("h, wide, c, k, s, p", SHAPES)
@pytest.mark.parametrize("kind", ["conv_gradient", "depthwise_gradient"])
def test_gradients_of_inputs(kind, h, wide, c, k, s, p):
    rng = np.random.default_rng(h * k)
    o = c if kind == "depthwise_gradient" else 6
    oh, ow = (h + 2 * p - k) // s + 1, (wide + 2 * p - k) // s + 1
    g = (rng.normal(size=(1, oh, ow, o)) * (rng.random((1, oh, ow, o)) < 0.7)).astype(np.float32)
    w = rng.integers(-127, 128, (k, k, c) if kind == "depthwise_gradient" else (o, k, k, c)).astype(np.int8)
    out = Tensor("y", (1, h, wide, c), "float32")
    same(*program(kind, {"g": g, "w=": w}, out, stride=(s, s), pad=(p, p, p, p)))


@pytest.mark.parametrize("n", [1, 8, 23])
def test_masks(n):
    x = np.random.default_rng(n).integers(-128, 128, (1, n)).astype(np.int8)
    x[0, 0] = -128
    same(*program("clip_mask", {"x": x}, Tensor("bits", (1, -(-n // 8)), "uint8"), low=-128, high=100))


@pytest.mark.parametrize("factors", [1, 5])
@pytest.mark.parametrize("masked", [True, False])
def test_clipped_gradients(factors, masked):
    rng = np.random.default_rng(factors)
    g, e = rng.normal(size=(1, 3, 3, 5)).astype(np.float32), rng.random(factors).astype(np.float32)
    bits = np.packbits(rng.integers(0, 2, (1, 45)), axis=1) if masked else None
    same(*program("clip_gradient", {"g": g, "bits": bits, "e=": e}, Tensor("y", g.shape, "float32")))


@pytest.mark.parametrize("label", [0, 4, 5, -1])
def test_the_loss(label):
    x = np.array([[-100, 20, 127, 126, -128]], np.int8)
    exps = np.exp(-0.1 * np.arange(256)).astype(np.float32)
    g, given = program(
        "loss_gradient", {"x": x, "label": np.array([label], np.int32), "exps=": exps}, Tensor("g", (1, 5), "float32")
    )
    chance = g.add(Tensor("chance", (1,), "float32"))
    g.ops[0].outputs = (*g.ops[0].outputs, chance)
    g.outputs = g.ops[0].outputs
    same(g, given)


def test_picked_channels_and_pools():
    x = np.random.default_rng(0).integers(-128, 128, (1, 3, 4, 6)).astype(np.int8)
    kept = np.array([1, 4, 5], np.int32)
    same(*program("pick_channels", {"x": x, "k=": kept}, Tensor("y", (1, 3, 4, 3), "int8", np.float64(0.1))))
    g = np.random.default_rng(1).normal(size=(1, 1, 1, 6)).astype(np.float32)
    same(*program("pool_gradient", {"g": g}, Tensor("y", (1, 3, 4, 6), "float32"), factor=1 / 12))
