"""The 8-bit LSTM against a float one, its state, and what it refuses."""

import numpy as np
import pytest

from netsuke.errors import NetsukeError
from netsuke.graph import Interpreter, QGraph, Tensor
from netsuke.graph.ops.lstm import curve, look_up

SX, SH, SC = 1 / 64, 1 / 128, 2.0**-11


def network(steps=1, inputs=6, units=5, seed=0, weight=0.02, cell=SC, limit=20480, zero=-4):
    """An LSTM as a graph, with its real weights."""
    rng, g = np.random.default_rng(seed), QGraph("lstm")
    w, u = (rng.integers(-127, 128, (4 * units, n)).astype(np.int8) for n in (inputs, units))
    b = rng.integers(-2000, 2000, 4 * units).astype(np.int32)
    x = g.add(Tensor("x", (1, steps, inputs), "int8", np.float64(SX), 3))
    parts = [g.constant(n, v, scale=np.full(4 * units, weight), axis=0) for n, v in (("w", w), ("u", u))]
    parts.append(g.constant("b", b))
    like = {"h": ("int8", SH, zero), "c": ("int16", cell, 0)}
    h, c, h2, c2 = (
        g.add(Tensor(n, (1, units), d, np.float64(s), z)) for n in ("", "next") for d, s, z in like.values()
    )
    y = g.append(
        "lstm_int8", (x, *parts, h, c), Tensor("y", (1, steps, units), "int8", np.float64(SH), zero), limit=limit
    )
    g.ops[-1].outputs = (y, h2, c2)
    g.inputs, g.outputs, g.states = (x,), (y,), ((h, h2), (c, c2))
    return g.check(), (w * weight, u * weight, b * weight * SX)


def in_floats(x, w, u, b, units):
    h = c = np.zeros(units)
    out = []
    for row in x:
        i, f, g, o = np.split(w @ row + u @ h + b, 4)
        i, f, o = (1 / (1 + np.exp(-v)) for v in (i, f, o))
        c = f * c + i * np.tanh(g)
        h = o * np.tanh(c)
        out.append(h)
    return np.array(out)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cell", [2.0**-11, 2.0**-13])
def test_it_follows_a_float_lstm(seed, cell):
    g, (w, u, b) = network(steps=20, seed=seed, weight=0.005, cell=cell, limit=32767)
    x = np.random.default_rng(seed).integers(-128, 128, (1, 20, 6)).astype(np.int8)
    y = (Interpreter(g).run(x)[0][0].astype(float) + 4) * SH
    assert np.abs(y - in_floats((x[0].astype(float) - 3) * SX, w, u, b, 5)).max() < 2.5 * SH


def test_the_state_lives_on_between_runs():
    x = np.random.default_rng(1).integers(-128, 128, (1, 8, 6)).astype(np.int8)
    whole = Interpreter(network(steps=8)[0]).run(x)[0][0]
    it = Interpreter(network(steps=1)[0])
    steps = [it.run(x[:, t : t + 1])[0][0, 0] for t in range(8)]
    assert np.array_equal(whole, steps)
    it.reset()
    assert np.array_equal(it.run(x[:, :1])[0][0, 0], steps[0])


def test_the_curves_are_within_four_units_of_16_bits():
    a = np.arange(-32768, 32768)
    for name, f in (("sigmoid", lambda v: 1 / (1 + np.exp(-v))), ("tanh", np.tanh)):
        assert np.abs(look_up(curve(name), a) - 32768 * f(a / 4096)).max() < 4


def test_the_cell_is_clipped():
    g, _ = network(steps=30, limit=300, weight=0.02)
    it = Interpreter(g)
    it.run(np.full((1, 30, 6), 127, np.int8))
    assert np.abs(it.states[g.states[1][0]]).max() == 300


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"cell": 0.001}, "no power of two"), ({"cell": 2.0**-4}, "2\\^-15 to 2\\^-9"), ({"limit": 0}, "limit is 0")],
)
def test_wrong_layers_are_refused(wrong, words):
    with pytest.raises(NetsukeError, match=words):
        network(**wrong)
