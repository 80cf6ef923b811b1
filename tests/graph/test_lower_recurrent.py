"""The C kernels of recurrent layers against the reference: floats, codes with scales, the 8-bit LSTM, real networks, boards."""

from pathlib import Path

import numpy as np
import pytest

from netsuke.data.catalogue import data_root
from netsuke.devices.board import missing_tools
from netsuke.errors import NetsukeError
from netsuke.export.c import write_c
from netsuke.export.c.emulate import run_emulated
from netsuke.graph import Interpreter, QGraph, Tensor
from netsuke.graph.arena import plan_arena
from netsuke.graph.host import VECTORS, HostProgram, library
from netsuke.graph.lower import scratch
from netsuke.graph.ops.elementwise import FUNCTIONS
from netsuke.graph.ops.recurrent import GATES
from netsuke.graph.quantize import weights_only
from netsuke.graph.read.tflite import read_tflite
from tests.graph.test_lstm_int8 import network

ROOT = data_root() or Path("absent")
needs_board = pytest.mark.skipif(bool(missing_tools()), reason=f"not installed: {missing_tools()}")
KERAS = [
    "fk_gru10_jan_10_2022", "fk_gru5_jul_4_2021", "hasel_fk_jan_10_2022", "hasel_fk_jun_6_2022", "hasel_fk_mar_18_2022",
    "layer_Conv1d_pooling", "layer_GRU", "layer_LSTM", "layer_simpleRNN", "layer_weights.best",
    "signals_gru100_jun_21_2021", "tendon_sys_id",
]  # fmt: skip


def layer(kind: str, dtypes=("float32", "float32"), bias=1, steps=4, inputs=7, units=5, batch=1, **attrs) -> QGraph:
    """One recurrent layer with random weights; bias: how many rows of it."""
    rng, g, rows = np.random.default_rng(len(kind) + steps + bias), QGraph(kind), GATES[kind] * units
    at = [g.add(Tensor("x", (batch, steps, inputs), "float32"))]
    for name, dtype, n in (("w", dtypes[0], inputs), ("u", dtypes[1], units)):
        if dtype == "float32":
            at.append(g.constant(name, rng.normal(0, 0.5, (rows, n)).astype(np.float32)))
            continue
        top = 7 if dtype == "int4" else 127
        codes, scale = rng.integers(-top, top + 1, (rows, n)).astype(np.int8), rng.uniform(0.5, 1.5, rows) / top
        at.append(g.constant(name, codes, dtype=dtype, scale=scale, axis=0))
    if bias:
        at.append(g.constant("b", rng.normal(0, 0.5, (2, rows) if bias == 2 else rows).astype(np.float32)))
    shape = (batch, steps, units) if attrs.get("return_sequences") else (batch, units)
    g.inputs = (at[0],)
    g.outputs = (g.append(kind, tuple(at), Tensor("y", shape, "float32"), **attrs),)
    return g.check()


def on_device(g: QGraph, vectors: int | None = None) -> HostProgram:
    """The calls as a device makes them, in one arena whose bytes are shared; not the smallest one."""
    return HostProgram(g, plan_arena(g, scratch, placements=20), vectors)


def close(g: QGraph) -> None:
    x = np.random.default_rng(0).normal(size=g.tensors[g.inputs[0]].shape).astype(np.float32)
    want = Interpreter(g).run(x)[0]
    assert np.abs(want).max() > 0.05
    for host in (HostProgram(g), on_device(g)):
        np.testing.assert_allclose(host.run(x)[0], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("bias", [0, 1])
@pytest.mark.parametrize("kind", ["rnn", "lstm"])
def test_rnn_and_lstm(kind, bias, steps, sequences, dtype):
    close(layer(kind, (dtype, dtype), bias, steps, return_sequences=sequences))


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize(("after", "bias"), [(True, 0), (True, 1), (True, 2), (False, 0), (False, 1)])
def test_gru(after, bias, steps, sequences, dtype):
    close(layer("gru", (dtype, dtype), bias, steps, return_sequences=sequences, reset_after=after))


@pytest.mark.parametrize("function", sorted(set(FUNCTIONS) - {"exponential"}))
def test_every_activation(function):
    """exponential grows without bound in three steps."""
    close(layer("rnn", activation=function, steps=3))
    close(layer("gru", activation="tanh", recurrent_activation=function, steps=2))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_recurrent_matrix_of_a_single_step_is_not_stored(dtype):
    """The state before it is zero."""
    for steps, stored in ((1, False), (2, True)):
        program = on_device(layer("gru", (dtype, dtype), steps=steps)).program
        assert any(t.name.startswith("u") for t in program.constants) == stored


@pytest.mark.parametrize("bits", [8, 4])
def test_networks_of_keras_with_weights_in_few_bits(bits):
    close(weights_only(keras("signals_gru100_jun_21_2021"), bits))


def test_what_the_kernels_do_not_take():
    with pytest.raises(NetsukeError, match="both matrices of one type"):
        HostProgram(layer("gru", ("int8", "float32")))
    with pytest.raises(NetsukeError, match="holds 3 sequences"):
        HostProgram(layer("lstm", batch=3))


@pytest.mark.parametrize("vectors", range(len(VECTORS)))
@pytest.mark.parametrize("shape", [(1, 6, 5), (7, 9, 3), (3, 4, 8), (2, 1, 1)])
@pytest.mark.parametrize("cell", [2.0**-9, 2.0**-12, 2.0**-13, 2.0**-15])
def test_lstm_of_8_bits_with_its_states(shape, cell, vectors):
    """Four runs after each other: the states live on; weights from small to gates at both ends."""
    if vectors > library().ns_host_vectors():
        pytest.skip("this processor has no such vectors")
    for weight in (0.002, 0.02, 0.3):
        g, _ = network(*shape, weight=weight, cell=cell, limit=32767, seed=shape[1])
        g.outputs = (*g.outputs, *(new for _, new in g.states))
        host, reference = on_device(g.check(), vectors), Interpreter(g)
        for seed in range(4):
            x = np.random.default_rng(seed).integers(-128, 128, (1, *shape[:2])).astype(np.int8)
            for a, b in zip(host.run(x), reference.run(x)):
                np.testing.assert_array_equal(a, b)
        host.reset()
        np.testing.assert_array_equal(host.run(x)[0], Interpreter(g).run(x)[0])


@pytest.mark.parametrize("name", KERAS)
def test_networks_of_keras_on_this_machine(name):
    g = keras(name)
    x = np.random.default_rng(1).uniform(-1, 1, (20, *g.tensors[g.inputs[0]].shape[1:])).astype(np.float32)
    want = Interpreter(g).run(x)[0]
    np.testing.assert_allclose(on_device(g).run(x)[0], want, rtol=1e-5, atol=1e-5)


def keras(name: str) -> QGraph:
    pytest.importorskip("h5py", reason="h5py is not installed (extra mcu)")
    path = ROOT / "nn4mc" / f"{name}.hdf5"
    if not path.exists():
        pytest.skip(f"{path.name} is not in NETSUKE_DATA")
    from netsuke.graph.read.keras import read_keras

    return read_keras(path)


def denoiser() -> QGraph:
    path = ROOT / "tflm/dtln_noise_suppression.tflite"
    if not path.exists():
        pytest.skip(f"{path.name} is not in NETSUKE_DATA")
    return read_tflite(path)


def test_a_denoiser_of_speech_keeps_its_state_and_stores_its_curves_once():
    g = denoiser()
    host, reference, seen = on_device(g), Interpreter(g), []
    for seed in range(10):
        x = np.random.default_rng(seed).integers(-128, 128, (1, 1, 257)).astype(np.int8)
        seen.append(host.run(x)[0])
        np.testing.assert_array_equal(seen[-1], reference.run(x)[0])
    host.reset()
    assert np.any(host.run(x)[0] != seen[-1])  # the same input, another past
    names = [t.name for t in host.program.constants]
    assert sum(n.endswith(".curves") for n in names) == 1


@needs_board
@pytest.mark.parametrize(
    ("name", "core"),
    [("layer_simpleRNN", "m4"), ("layer_LSTM", "m7"), ("layer_GRU", "m4"), ("fk_gru5_jul_4_2021", "m7")],
)
def test_networks_of_keras_on_boards(name, core, tmp_path):
    write_c(keras(name), tmp_path / "fw", name="net")
    assert run_emulated(tmp_path / "fw", core)["passed"]


@needs_board
@pytest.mark.parametrize("dsp", [True, False])
def test_lstm_of_8_bits_on_boards(dsp, tmp_path):
    g, _ = network(3, 10, 7, weight=0.05)
    write_c(g, tmp_path / "fw", name="net")
    x = np.random.default_rng(0).integers(-128, 128, (3, 3, 10)).astype(np.int8)
    got, reference = run_emulated(tmp_path / "fw", "m4", [x], dsp=dsp), Interpreter(g)
    assert got["passed"]
    np.testing.assert_array_equal(got["outputs"][0], np.concatenate([reference.run(v[None])[0] for v in x]))


@needs_board
def test_a_denoiser_of_speech_on_a_board(tmp_path):
    write_c(denoiser(), tmp_path / "fw", name="net")
    assert run_emulated(tmp_path / "fw", "m4")["passed"]
