"""The C kernels of the audio front end give the bits of the reference; sounds become words in C, here and on boards."""

import zlib

import numpy as np
import pytest

from netsuke.devices.board import missing_tools
from netsuke.export.c import write_c
from netsuke.export.c.emulate import run_emulated
from netsuke.graph import Interpreter, QGraph, Tensor
from netsuke.graph.arena import plan_arena
from netsuke.graph.host import HostProgram
from netsuke.graph.lower import scratch
from netsuke.graph.ops.signal import ARITHMETIC, log_table
from netsuke.graph.read.tflite import read_tflite
from tests.graph.test_signal import FOLDER, MICRO, NO_DATA, NOISE, bank, one, samples

needs_board = pytest.mark.skipif(bool(missing_tools()), reason=f"not installed: {missing_tools()}")
EDGES = [0, 1, 2, 3, 4, 7, 8, 255, 256, 65535, 65536, 65537, 2**31 - 1, 2**31, 2**32 - 1]


def same(g: QGraph, *runs: tuple[np.ndarray, ...]) -> None:
    """Runs one after another, so that states live on, with and without outputs in place of inputs."""
    for arena in (None, plan_arena(g, scratch, placements=20)):
        host, reference = HostProgram(g, arena), Interpreter(g)
        for x in runs:
            for a, b in zip(host.run(*x), reference.run(*x), strict=True):
                np.testing.assert_array_equal(np.asarray(a).reshape(-1), np.asarray(b).reshape(-1))


def drawn(dtype: str, n: int, seed: int = 0) -> np.ndarray:
    """Numbers of every size, and the ends of the type."""
    rng, ends = np.random.default_rng(seed), np.iinfo(dtype)
    size = rng.integers(1, ends.bits + 1, n).astype(np.uint64)
    x = (rng.integers(0, 1 << 64, n, np.uint64) >> (64 - size)).astype(dtype)
    x[: min(n, 2)] = [ends.min, ends.max][:n]
    return x


@pytest.mark.parametrize("shift", [0, 12, 31])
def test_window(shift):
    g = one("window", [("int16", (1, 301)), drawn("int16", 301, 1)[None]], [("int16", (1, 301))], shift=shift)
    same(g, (drawn("int16", 301)[None],), (np.full((1, 301), -32768, np.int16),))


@pytest.mark.parametrize("largest", [0, 1, -1, 2, 300, -300, 16383, 16384, -16385, 32767, -32768])
def test_fft_scale(largest):
    g = one("fft_scale", [("int16", (1, 5))], [("int16", (1, 5)), ("int32", (1,))])
    same(g, (np.array([[0, largest // 3, largest, largest // 2, 0]], np.int16),))


@pytest.mark.parametrize(
    ("n", "length"), [(4, 4), (3, 8), (16, 16), (1, 32), (64, 64), (480, 512), (1024, 1024), (2000, 2048)]
)
def test_rfft(n, length):
    g = one("rfft", [("int16", (1, n))], [("int16", (1, length + 2))], length=length)
    rng = np.random.default_rng(n)
    loud = rng.choice([-32768, 32767], (1, n)).astype(np.int16)
    tone = (32767 * np.sin(np.arange(n) * 0.7)).astype(np.int16)[None]
    same(g, (rng.integers(-32768, 32768, (1, n)).astype(np.int16),), (loud,), (tone,), (np.full_like(loud, -32768),))


@pytest.mark.parametrize(("start", "end"), [(0, 33), (5, 30), (33, 33), (7, 7)])
def test_energy(start, end):
    g = one("energy", [("int16", (1, 66))], [("uint32", (1, 33))], start=start, end=end)
    same(g, (drawn("int16", 66)[None],), (np.full((1, 66), -32768, np.int16),))


def test_filter_bank():
    for g in (bank(), bank(weight=32767)):
        same(g, *((np.array(x, np.uint32),) for x in ([1, 10, 100, 1000, 4_000_000_000], [2**32 - 1] * 5)))


@pytest.mark.parametrize("shift", [0, 3, 31, 32])
def test_filter_sqrt(shift):
    near = [v * v + d for v in (1, 2, 255, 65535, 65536, 10**6, 2**32 - 1) for d in (-1, 0, 1, v - 1, v, v + 1, 2 * v)]
    x = np.array([v for v in [*EDGES, *near, 2**63, 2**64 - 1] if v < 2**64], np.uint64)
    x = np.concatenate([x, drawn("uint64", 300)])
    same(one("filter_sqrt", [("uint64", x.shape), np.array(shift, np.int32)], [("uint32", x.shape)]), (x,))


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("changed", [{}, {"subtraction_bits": 0}, {"smoothing_bits": 31, "least": 65536}])
def test_noise_subtract_keeps_its_estimate(changed, clamp):
    g = one("noise_subtract", [("uint32", (31,))] * 2, [("uint32", (31,))] * 2, **NOISE | changed, clamp=clamp)
    g.states, g.inputs = ((1, 3),), (0,)
    same(g.check(), *((drawn("uint32", 31, seed),) for seed in range(6)))


@pytest.mark.parametrize("shift", [0, 6, 32, 63])
def test_pcan(shift):
    x, noise = (
        drawn("uint32", 400, 1),
        np.concatenate([drawn("uint32", 400 - len(EDGES), 2), np.array(EDGES, np.uint32)]),
    )
    gains = np.random.default_rng(0).integers(-32768, 32768, 125).astype(np.int16)
    for table in (gains, np.full(125, 32767, np.int16), np.full(125, -32768, np.int16)):
        g = one("pcan", [("uint32", (400,)), ("uint32", (400,)), table], [("uint32", (400,))], snr_shift=shift)
        same(g, (x, noise))


@pytest.mark.parametrize(("correction", "scale"), [(0, 1), (3, 64), (31, 32768), (0, 32768)])
def test_filter_log(correction, scale):
    x = np.concatenate([drawn("uint32", 400), np.array(EDGES, np.uint32)])
    g = one("filter_log", [("uint32", x.shape)], [("int16", x.shape)], correction=correction, scale=scale)
    same(g, (x,))
    assert log_table().size == 130


INTEGERS = ("int8", "int16", "int32", "uint8", "uint32", "uint64")


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", [*INTEGERS, "float32"])
def test_cast(source, target):
    same(one("cast", [(source, (9, 7))], [(target, (9, 7))]), (drawn(source, 63).reshape(9, 7),))


@pytest.mark.parametrize("shape", [(), (4,), (3, 1), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["int32", "float32", "int8"])
@pytest.mark.parametrize("function", list(ARITHMETIC))
def test_arithmetic(function, dtype, shape):
    if dtype == "int8" and function not in ("minimum", "maximum"):
        pytest.skip("8-bit codes are only compared")
    n = int(np.prod(shape))
    if dtype == "float32":
        a, b = (np.random.default_rng(seed).normal(size=k).astype(dtype) for seed, k in enumerate((24, n)))
    else:
        a, b = drawn(dtype, 24), drawn(dtype, n, 1)
        b[b == 0] = -1
    a, b = a.reshape(2, 3, 4), b.reshape(shape)
    g = QGraph(function)
    kw = {"scale": np.float64(0.5), "zero": 3} if dtype == "int8" else {}
    g.inputs = (g.add(Tensor("a", a.shape, dtype, **kw)),)
    y = g.append("arithmetic", (0, g.constant("b", b, **kw)), Tensor("y", a.shape, dtype, **kw), function=function)
    g.outputs = (y,)
    same(g.check(), (a,))


def test_the_smallest_number_divided_by_minus_one_wraps():
    g = one("arithmetic", [("int32", (2,)), np.array([-1, 2], np.int32)], [("int32", (2,))], function="div")
    assert HostProgram(g).run(np.array([-(2**31), -7], np.int32))[0].tolist() == [-(2**31), -3]


@NO_DATA
@pytest.mark.parametrize("name", sorted(MICRO))
def test_sounds_become_words_in_c(name):
    front = read_tflite(FOLDER / "audio_preprocessor_int8.tflite")
    front, x = HostProgram(front, plan_arena(front, scratch)), samples(name)
    features = np.array([front.run(x[k : k + 480][None])[0] for k in range(0, 16000 - 480 + 1, 320)])
    assert features.shape == (49, 40) and zlib.crc32(features.tobytes()) == MICRO[name]
    network = read_tflite(FOLDER / "micro_speech_quantized.tflite")
    (scores,) = HostProgram(network, plan_arena(network, scratch)).run(features.reshape(1, 1960))
    np.testing.assert_array_equal(scores, Interpreter(network).run(features.reshape(1, 1960))[0])
    word = ("silence", "unknown", "yes", "no")[int(scores.argmax())]
    assert word == name if name in ("yes", "no") else word in ("silence", "unknown")


@NO_DATA
@needs_board
@pytest.mark.parametrize("core", ["m4", "m7"])
def test_the_front_end_on_boards(core, tmp_path):
    """Three windows of a spoken word one after another: the noise estimate lives on."""
    g, x = read_tflite(FOLDER / "audio_preprocessor_int8.tflite"), samples("yes")
    write_c(g, tmp_path / "fw", name="front")
    windows, reference = np.stack([x[k : k + 480] for k in (6400, 6720, 7040)]), Interpreter(g)
    got = run_emulated(tmp_path / "fw", core, [windows])
    assert got["passed"] and got["heap_peak"] == 0
    np.testing.assert_array_equal(got["outputs"][0], np.stack([reference.run(w[None])[0] for w in windows]).reshape(-1))
