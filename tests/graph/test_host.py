"""Whole networks through the C kernels: the bits of the interpreter, batches, states, trained variables, misuse."""

import os
from pathlib import Path

import numpy as np
import pytest

from netsuke.errors import NetsukeError
from netsuke.graph import Interpreter, QGraph, Tensor
from netsuke.graph.arena import plan_arena
from netsuke.graph.host import HostProgram
from netsuke.graph.lower import lower, scratch
from netsuke.graph.read.npz import read_npz

DATA = Path(os.environ.get("NETSUKE_DATA", Path(__file__).parents[3] / "shared/data")) / "tiny-training"
MODELS = ["mcunet-5fps", "proxyless-w0.3", "mbv2-w0.35"]


@pytest.mark.parametrize("name", MODELS)
def test_real_networks_bit_for_bit(name):
    path = DATA / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in NETSUKE_DATA")
    graph = read_npz(path)
    x = np.random.default_rng(0).integers(-128, 128, (2, 128, 128, 3)).astype(np.int8)
    want = Interpreter(graph).run(x)[0]
    for arena in (None, plan_arena(graph, scratch)):
        np.testing.assert_array_equal(HostProgram(graph, arena).run(x)[0], want)


def counter():
    """A graph that adds its input to a state."""
    g = QGraph("counter")
    kw = {"scale": np.float64(1.0), "zero": -3}
    x, old = g.add(Tensor("x", (1, 5), "int8", **kw)), g.add(Tensor("old", (1, 5), "int8", **kw))
    g.inputs = (x,)
    g.outputs = (g.append("add", (x, old), Tensor("new", (1, 5), "int8", **kw)),)
    g.states = ((old, g.outputs[0]),)
    return g.check()


def test_states_live_on_until_reset():
    graph = counter()
    host, reference = HostProgram(graph), Interpreter(graph)
    x = np.arange(5, dtype=np.int8)[None]
    for _ in range(3):
        np.testing.assert_array_equal(host.run(x)[0], reference.run(x)[0])
    host.reset(), reference.reset()
    np.testing.assert_array_equal(host.run(x)[0], reference.run(x)[0])


def test_variables_are_the_programs_memory():
    rng = np.random.default_rng(0)
    g = QGraph("trained")
    g.inputs = (g.add(Tensor("x", (1, 6), "int8", np.float64(0.1), 0)),)
    w = g.constant("w", rng.integers(-9, 9, (3, 6)).astype(np.int8), scale=np.full(3, 0.1), axis=0, variable=True)
    g.outputs = (g.append("dense", (0, w), Tensor("y", (1, 3), "int8", np.float64(0.05), 0)),)
    host, x = HostProgram(g.check()), rng.integers(-9, 9, (1, 6)).astype(np.int8)
    before = host.run(x)[0]
    host.variables()[w][...] = 0
    assert np.any(before != 0) and not host.run(x)[0].any()
    host.reset()
    np.testing.assert_array_equal(host.run(x)[0], before)


def test_a_constant_is_stored_once():
    rng = np.random.default_rng(0)
    g = QGraph("shared")
    x = g.add(Tensor("x", (1, 4), "float32"))
    w = g.constant("w", rng.normal(size=(4, 4)).astype(np.float32))
    y = g.append("dense", (x, w), Tensor("y", (1, 4), "float32"))
    g.inputs, g.outputs = (x,), (g.append("dense", (y, w), Tensor("z", (1, 4), "float32")),)
    program = lower(g.check(), plan_arena(g, scratch))
    assert [t.name for t in program.constants] == ["w"]
    assert [c.op for c in program.calls] == [0, 1]


@pytest.mark.parametrize("bad", [np.zeros((1, 4), np.int8), np.zeros((1, 5), np.float32), np.zeros((2, 5), np.int8)])
def test_inputs_of_another_kind_are_refused(bad):
    with pytest.raises(NetsukeError, match="cannot run counter: the input is"):
        HostProgram(counter()).run(bad)


def test_a_missing_input_is_refused():
    with pytest.raises(NetsukeError, match="0 inputs were given"):
        HostProgram(counter()).run()


def two_inputs():
    g = QGraph("two")
    a, b = (g.add(Tensor(n, (1, 3), "float32")) for n in "ab")
    g.inputs, g.outputs = (a, b), (g.append("add", (a, b), Tensor("y", (1, 3), "float32")),)
    return g.check()


@pytest.mark.parametrize("make", [Interpreter, HostProgram])
def test_several_inputs_are_of_one_length(make):
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(make(two_inputs()).run(rows, rows)[0], 2 * rows)
    for a, b in ((rows, rows[:1]), (rows[:1], rows), (rows, rows[0]), (np.float32(1), rows)):
        with pytest.raises(NetsukeError, match=r"cannot run two: (its inputs have the lengths|the input is)"):
            make(two_inputs()).run(a, b)
