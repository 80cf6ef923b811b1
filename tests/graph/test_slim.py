"""Narrower layers and smaller pictures: exact where nothing of worth is dropped, and refused where the network cannot follow."""

from dataclasses import replace

import numpy as np
import pytest

from netsuke.errors import NetsukeError
from netsuke.graph import Interpreter
from netsuke.graph.resolution import at_resolution
from netsuke.graph.slim import importance, observe, seams, slim
from tests.graph.small import images, residual_network
from tests.graph.test_store import small_graph


def test_seams_are_the_insides_of_blocks():
    found = seams(residual_network())
    assert [(name, s.channels) for name, s in found.items() if ".pw1" in name] == [("a.pw1", 16), ("b.pw1", 24)]
    assert "a.pw2" not in found, "its output is read twice: by the next block and by the addition"


def test_dead_channels_cost_nothing():
    """Channels that are constant are dropped first, and what they added stays in the reader's bias."""
    g = residual_network()
    op = next(o for o in g.ops if o.name == "b.pw1")
    dead = [1, 4, 9, 13, 20, 22, 2, 7]
    w = g.tensors[op.inputs[1]]
    data = w.data.copy()
    data[dead] = 0
    g.tensors[op.inputs[1]] = replace(w, data=data)
    # a depthwise layer of a constant input is constant away from the border only: one that looks at single pixels
    dw = next(o for o in g.ops if o.name == "b.dw")
    taps = g.tensors[dw.inputs[1]]
    only = np.zeros_like(taps.data)
    only[2, 2] = taps.data[2, 2]
    g.tensors[dw.inputs[1]] = replace(taps, data=only)
    x = images(16)
    statistics = observe(g, {"b.pw1": seams(g)["b.pw1"]}, [x[:8], x[8:]])
    assert set(np.flatnonzero(statistics["b.pw1"].variance == 0)) >= set(dead)
    assert np.all(importance(g, seams(g)["b.pw1"], statistics["b.pw1"])[dead] == 0)
    less = slim(g, {"b.pw1": 1 / 3}, statistics)
    assert less.weight_bytes() < g.weight_bytes() and less.macs() < g.macs()
    assert np.array_equal(Interpreter(less).run(x)[0], Interpreter(g).run(x)[0])
    assert g.tensors[op.inputs[1]].shape[0] == 24, "the argument is left as it was"


def test_the_score_beats_dropping_the_most_important():
    g, x = residual_network(), images(48)
    found = {"b.pw1": seams(g)["b.pw1"]}
    statistics = observe(g, found, [x[:24]])
    worst = {"b.pw1": replace(statistics["b.pw1"], variance=1 / (1e-9 + statistics["b.pw1"].variance))}
    want = Interpreter(g).run(x[24:])[0].astype(int)

    def error(s) -> float:
        return float(((Interpreter(slim(g, {"b.pw1": 0.5}, s)).run(x[24:])[0] - want) ** 2).mean())

    assert error(statistics) < 0.8 * error(worst)


def test_without_compensation_the_mean_moves():
    g, x = residual_network(), images(48)
    found = {"b.pw1": seams(g)["b.pw1"]}
    statistics = observe(g, found, [x])
    bare = {"b.pw1": replace(statistics["b.pw1"], mean=np.zeros(24))}
    seen: dict[str, np.ndarray] = {}

    def mean_of(graph) -> np.ndarray:
        at = next(k for k, o in enumerate(graph.ops) if o.name == "b.pw2")
        Interpreter(graph).run(x, on_op=lambda k, outs: seen.update(y=outs[0]) if k == at else None)
        return seen["y"].astype(float).mean((0, 1, 2))

    want = mean_of(g)
    moved = [np.abs(mean_of(slim(g, {"b.pw1": 0.5}, s)) - want).mean() for s in (statistics, bare)]
    assert moved[0] < 0.5 * moved[1]


def test_a_smaller_picture_is_the_network_built_for_it():
    g = residual_network()
    small = at_resolution(g, 8, 8)
    assert small.tensors[small.inputs[0]].shape == (1, 8, 8, 3) and small.macs() < g.macs() * 0.6
    pooled = next(o for o in small.ops if o.kind == "avgpool2d")
    assert tuple(pooled.attrs["window"]) == small.tensors[pooled.inputs[0]].shape[1:3]
    assert Interpreter(small).run(images(3, 8))[0].shape == (3, 4)
    assert g.tensors[g.inputs[0]].shape == (1, 12, 12, 3), "the argument is left as it was"
    same = at_resolution(g, 12, 12)
    assert np.array_equal(Interpreter(same).run(images(2))[0], Interpreter(g).run(images(2))[0])


def test_what_depends_on_the_size_is_named():
    with pytest.raises(NetsukeError, match="flat"):
        at_resolution(small_graph(), 12, 10)
    with pytest.raises(NetsukeError, match="8 x 8"):
        at_resolution(replace(residual_network(), inputs=()), 8, 8)
