"""`netsuke train` on small networks: memory is refused before training, the head alone is a choice, a collapse is a sentence."""

import json
from pathlib import Path

import numpy as np
import pytest

from netsuke.errors import NetsukeError
from netsuke.graph import Interpreter, Op, QGraph, Tensor
from netsuke.graph.read import load_graph
from netsuke.graph.store import save_graph
from netsuke.graph.update_plan import UpdatePlan, layers
from netsuke.train import train
from netsuke.train.on_mcu import STACK, training_memory
from netsuke.train.sparse_update import Contributions, contributions, search
from tests.graph.small import images, residual_network
from tests.graph.test_lower_train import built

BUILT = pytest.mark.skipif(not built(), reason="the kernels' library is not built")
SAMPLES = 160


def one_layer(inputs: int = 12, classes: int = 3) -> QGraph:
    """A dense head and nothing else."""
    rng = np.random.default_rng(1)
    g = QGraph("one")
    g.inputs = (g.add(Tensor("x", (1, inputs), "int8", np.float64(0.02), 0)),)
    w = g.constant(
        "head.weight", rng.integers(-60, 61, (classes, inputs)).astype(np.int8), scale=np.full(classes, 0.01), axis=0
    )
    b = g.constant("head.bias", np.zeros(classes, np.int32))
    y = g.add(Tensor("logits", (1, classes), "int8", np.float64(0.05), 0))
    g.ops.append(Op("dense", (*g.inputs, w, b), (y,), {}, "head"))
    g.outputs = (y,)
    return g.check()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two networks, and for each samples that its head can learn."""
    path = tmp_path_factory.mktemp("mcu")
    rng = np.random.default_rng(5)
    save_graph(path / "one.netsuke", one_layer(), {}, {})
    y = rng.integers(0, 3, SAMPLES)
    x = np.clip(rng.normal(0, 12, (SAMPLES, 12)) + 70 * (np.arange(12)[None] % 3 == y[:, None]), -128, 127)
    np.savez(path / "one.npz", x=np.rint(x).astype(np.int8), y=y)
    net = residual_network()
    save_graph(path / "net.netsuke", net, {}, {})
    x = images(SAMPLES, seed=3)
    np.savez(path / "net.npz", x=x, y=Interpreter(net).run(x)[0].argmax(1))
    return path


@BUILT
def test_a_network_of_one_layer_trains_its_head(place):
    assert layers(one_layer()) == []
    got = train(str(place / "one.netsuke"), data=str(place / "one.npz"), sram="8KB", epochs=6, out=str(place / "done"))
    assert json.loads(got["plan"])["n_bias"] == 0
    assert got["before"] == got["after"] > 0.9 > got["floor"]
    arena, variables, _ = training_memory(one_layer(), UpdatePlan(0), 3)
    assert got["memory"] == {
        "arena": arena.size, "trained": variables, "stack": STACK, "total": arena.size + variables + STACK, "limit": 8000,
    }  # fmt: skip
    start, adapted = load_graph(place / "one.netsuke"), load_graph(place / "done.netsuke")
    assert any(not np.array_equal(t.data, s.data) for t, s in zip(adapted.tensors, start.tensors) if t.constant)


@BUILT
def test_memory_for_the_head_alone_gives_the_head_alone(place):
    """Every plan with a layer below the head needs more than the head: just enough for the head must end in the head."""
    arena, variables, _ = training_memory(residual_network(), UpdatePlan(0), 4)
    least = arena.size + variables + STACK
    got = train(
        str(place / "net.netsuke"), data=str(place / "net.npz"), sram=f"{least}B", epochs=1, rate=0.001,
        out=str(place / "head"),
    )  # fmt: skip
    assert json.loads(got["plan"])["n_bias"] == 0 and got["memory"]["total"] == least


def test_too_little_memory_is_said_before_anything_is_trained(place, monkeypatch):
    monkeypatch.setattr("netsuke.train.on_mcu.on_chip", lambda *_, **__: pytest.fail("it trained"))
    for name in ("one", "net"):
        with pytest.raises(
            NetsukeError, match=r"within 2\.10 KB.*head alone needs.*--sram \d+, or a smaller network"
        ) as e:
            train(str(place / f"{name}.netsuke"), data=str(place / f"{name}.npz"), sram="2100B", out=str(place / "no"))
        assert e.value.code == 1
    assert not (place / "no.netsuke").exists()


@BUILT
def test_a_rate_at_which_training_collapses_is_said_so(place):
    (place / "deep.json").write_text(UpdatePlan(9, {8: 1.0}).to_json())
    with pytest.raises(NetsukeError, match=r"at the rate 1000: every sample gets the answer \d.*a rate below 1000"):
        train(
            str(place / "net.netsuke"), data=str(place / "net.npz"), plan=str(place / "deep.json"), epochs=1, rate=1000,
            sram="64KB", out=str(place / "collapsed"),
        )  # fmt: skip
    assert not (place / "collapsed.netsuke").exists()


def test_without_layers_to_choose_nothing_is_measured():
    def never(plan: UpdatePlan) -> float:
        raise AssertionError(f"{plan} was trained")

    got = contributions(one_layer(), never, (), ())
    assert got == Contributions({0: 0.0}, {})
    assert search(one_layer(), got, 12) == UpdatePlan(0, {}, "search-0")


def test_harmful_updates_leave_the_head_alone():
    worse = Contributions({0: 0.0, 2: -0.1, 5: -0.02}, {(8, 1.0): 0.01})
    assert search(residual_network(), worse, 1 << 20).n_bias == 0
