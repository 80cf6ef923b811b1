"""Graphs as artifacts: what is saved is what is loaded, the same bytes each time, and damage is one sentence."""

import json

import numpy as np
import pytest

from netsuke.errors import NetsukeError
from netsuke.graph import Interpreter, Op, QGraph, Tensor
from netsuke.graph.read import is_graph, load_graph
from netsuke.graph.store import pack4, save_graph, unpack4


def small_graph(seed: int = 0, weights: str = "int8") -> QGraph:
    """An int8 convolution, a depthwise one, a table and a head."""
    rng, g = np.random.default_rng(seed), QGraph("small")
    low, high = (-8, 8) if weights == "int4" else (-127, 128)
    x = g.add(Tensor("x", (1, 6, 5, 3), "int8", np.float64(0.02), 3))
    g.inputs = (x,)
    w = g.constant(
        "w",
        rng.integers(low, high, (4, 3, 3, 3)).astype(np.int8),
        dtype=weights,
        scale=rng.uniform(1e-3, 2e-3, 4),
        axis=0,
    )
    b = g.constant("b", rng.integers(-500, 500, 4).astype(np.int32))
    y = g.append(
        "conv2d", (x, w, b), Tensor("y", (1, 3, 3, 4), "int8", np.float64(0.05), -7), stride=(2, 2), pad=(1, 1, 1, 1)
    )
    d = g.constant("d", rng.integers(-127, 128, (3, 3, 4)).astype(np.int8), scale=rng.uniform(1e-3, 2e-3, 4), axis=2)
    z = g.append(
        "depthwise2d", (y, d), Tensor("z", (1, 3, 3, 4), "int8", np.float64(0.01), 0), pad=(1, 1, 1, 1), low=-20
    )
    t = g.append(
        "lut",
        (z,),
        Tensor("t", (1, 3, 3, 4), "int8", np.float64(0.02), 1),
        table=rng.integers(-128, 128, 256).astype(np.int8),
    )
    flat = g.add(Tensor("flat", (1, 36), "int8", np.float64(0.02), 1))
    g.ops.append(Op("reshape", (t,), (flat,), {}, "flat"))
    h = g.constant("h", rng.integers(-127, 128, (5, 36)).astype(np.int8), scale=np.full(5, 2e-3), axis=0)
    g.outputs = (g.append("dense", (flat, h), Tensor("out", (1, 5), "int8", np.float64(0.03), 2)),)
    return g.check()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_saved_and_loaded_graphs_compute_the_same(tmp_path, weights):
    graph = small_graph(weights=weights)
    path = tmp_path / "a.netsuke"
    save_graph(path, graph, {}, {})
    save_graph(tmp_path / "b.netsuke", small_graph(weights=weights), {}, {})
    for name in ("manifest.json", "weights.safetensors"):
        assert (path / name).read_bytes() == (tmp_path / "b.netsuke" / name).read_bytes()
    again = load_graph(path)
    x = np.random.default_rng(1).integers(-128, 128, (7, 6, 5, 3)).astype(np.int8)
    assert np.array_equal(Interpreter(graph).run(x)[0], Interpreter(again).run(x)[0])
    assert again.weight_bytes() == graph.weight_bytes()
    assert is_graph(path) and not is_graph(tmp_path)


def test_four_bits_take_half_a_byte():
    values = np.random.default_rng(0).integers(-8, 8, (5, 7)).astype(np.int8)
    assert pack4(values).shape == (5, 4) and np.array_equal(unpack4(pack4(values), 7), values)
    eight, four = small_graph(), small_graph(weights="int4")
    assert eight.weight_bytes() - four.weight_bytes() == 4 * 27 // 2


def change(path, edit) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda m: m["graph"]["ops"][0].update(kind="conv9d"), "unknown kind"),
        (lambda m: m["graph"]["ops"][0].update(inputs=[0, 99, 2]), "does not exist"),
        (lambda m: m["graph"]["ops"].reverse(), "before it is written"),
        (lambda m: m["graph"]["tensors"][0].update(shape=[1, 0, 5, 3]), "fixed sizes"),
        (lambda m: m["graph"]["tensors"][1].update(shape=[4, 3, 3, 2]), "weights 'w'"),
        (lambda m: m["graph"].update(inputs=[77]), "tensor 77"),
        (lambda m: m["graph"].pop("ops"), "ops"),
        (lambda m: m["graph"]["ops"][0]["attrs"].update(stride=[0, 0]), "do not fit"),
        (lambda m: m.update(version=9), "version 1"),
        (lambda m: m.update(files=[]), "manifest"),
    ],
)
def test_hostile_manifests_are_refused_in_a_sentence(tmp_path, edit, sentence):
    path = tmp_path / "a.netsuke"
    save_graph(path, small_graph(), {}, {})
    change(path, edit)
    with pytest.raises(NetsukeError, match=sentence):
        load_graph(path)


def test_damaged_weights_are_seen(tmp_path):
    path = tmp_path / "a.netsuke"
    save_graph(path, small_graph(), {}, {})
    data = bytearray((path / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "weights.safetensors").write_bytes(data)
    with pytest.raises(NetsukeError, match="sha256"):
        load_graph(path)
