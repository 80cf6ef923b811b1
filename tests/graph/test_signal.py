"""The integer audio front end: against exact arithmetic, and end to end from sounds to words."""

import math
import wave
import zlib
from pathlib import Path

import numpy as np
import pytest

from netsuke.data.catalogue import data_root
from netsuke.errors import NetsukeError
from netsuke.graph import Interpreter, Op, QGraph, Tensor
from netsuke.graph.ops import OPS, signal
from netsuke.graph.read.tflite import read_tflite

FOLDER = (data_root() or Path("absent")) / "tflm"
NO_DATA = pytest.mark.skipif(not FOLDER.is_dir(), reason="NETSUKE_DATA lacks tflm")
# crc32 of the 49 x 40 int8 features that TensorFlow Lite Micro (0.dev20261023) computes with the same graph
MICRO = {"yes": 2822745722, "no": 3838239830, "noise": 1002278034, "silence": 1792286981}


def one(kind, inputs, outputs, **attrs):
    """A graph of one operator; tensors as (dtype, shape) or constant arrays."""
    g = QGraph("one")
    made = [g.constant("c", t) if isinstance(t, np.ndarray) else g.add(Tensor("x", t[1], t[0])) for t in inputs]
    out = tuple(g.add(Tensor("y", shape, dtype)) for dtype, shape in outputs)
    g.ops.append(Op(kind, tuple(made), out, attrs))
    g.inputs, g.outputs = tuple(i for i in made if not g.tensors[i].constant), out
    return g.check()


def call(g, *values):
    return Interpreter(g).run(*values)


@pytest.mark.parametrize("n", [4, 8, 16, 64, 256, 512, 1024])
def test_rfft_is_the_scaled_transform(n):
    x = np.random.default_rng(n).integers(-20000, 20001, n).astype(np.int16)
    got = signal.rfft16(x).astype(float)
    want = np.fft.rfft(x.astype(float)) / n
    assert np.abs(got[:, 0] + 1j * got[:, 1] - want).max() < 6  # a few roundings of half a unit per stage


def test_rfft_pads_with_zeros_and_finds_a_tone():
    tone = (12000 * np.cos(2 * np.pi * 32 * np.arange(480) / 512)).astype(np.int16)
    g = one("rfft", [("int16", (480,))], [("int16", (514,))], length=512)
    (y,) = call(g, tone)
    power = (y.astype(float).reshape(-1, 2) ** 2).sum(1)
    assert power.argmax() == 32
    (e,) = call(one("energy", [("int16", (514,))], [("uint32", (257,))], start=5, end=241), y)
    assert np.array_equal(e[5:241], power[5:241].astype(np.uint32)) and not e[:5].any() and not e[241:].any()


@pytest.mark.parametrize("x", [0, 1, 2, 3, 6, 7, 65535**2, 2**32 - 1, 2**32, 2**40 + 12345, 2**64 - 1])
def test_root_is_the_nearest(x):
    r = signal.root(x)
    exact = math.isqrt(4 * x)  # floor(2 sqrt x): its last bit says on which side of the half it is
    top = 0xFFFF if x < 2**32 else 0xFFFFFFFF
    assert r == min((exact + 1) // 2, top)


def test_logarithm_is_within_a_unit():
    table, xs = signal.log_table(), [2, 3, 5, 100, 4097, 65535, 65536, 1 << 20, (1 << 32) - 1]
    got = [signal.log_scaled(x, 512, table) for x in xs]
    assert np.allclose(got, [512 * math.log(x) for x in xs], rtol=0, atol=1)


def test_fft_scale_uses_all_bits_and_keeps_the_extremes():
    g = one("fft_scale", [("int16", (4,))], [("int16", (4,)), ("int32", ())])
    for x, s in (
        ([0, 0, 0, 0], 0),
        ([1, -1, 0, 0], 14),
        ([100, -300, 5, 0], 6),
        ([-32768, 5, 0, 0], 0),
        ([32767, 0, 0, 1], 0),
    ):
        y, bits = call(g, np.array(x, np.int16))
        assert bits == s and np.array_equal(y, np.array(x) << s)


def test_window_saturates():
    g = one("window", [("int16", (1, 2)), np.array([8192, 8192], np.int16)], [("int16", (1, 2))], shift=12)
    assert call(g, np.array([[20000, -20000]], np.int16))[0].tolist() == [[32767, -32768]]


def bank(width=3, start=1, weight=5):
    i16 = [np.array(v, np.int16) for v in ([weight] * 6, [7] * 6, [0, start, 2], [0, 3, 0], [2, width, 3])]
    return one("filter_bank", [("uint32", (5,)), *i16], [("uint64", (2,))])


def test_filter_bank_overlaps_by_half():
    x = np.array([1, 10, 100, 1000, 4_000_000_000], np.uint32)
    (y,) = call(bank(), x)
    assert y.tolist() == [5 * 1110 + 7 * 11, 5 * 4_000_001_100 + 7 * 1110]


@pytest.mark.parametrize("wrong", [{"width": 4}, {"start": 3}, {"weight": -1}, {"start": -1}])
def test_a_bank_that_reaches_outside_is_refused(wrong):
    with pytest.raises(NetsukeError, match=r"outside|channels"):
        bank(**wrong)


NOISE = {"smoothing": 400, "one_minus_smoothing": 15984, "alternate_smoothing": 1000, "alternate_one_minus_smoothing": 15384,
         "least": 819, "smoothing_bits": 10, "subtraction_bits": 14}  # fmt: skip


def test_noise_is_learnt_and_subtracted_but_never_all():
    g = one("noise_subtract", [("uint32", (2,)), ("uint32", (2,))], [("uint32", (2,)), ("uint32", (2,))], **NOISE)
    g.states, g.inputs, g.outputs = ((1, 3),), (0,), (2,)
    it, x, seen = Interpreter(g.check()), np.array([1000, 1000], np.uint32), []
    for _ in range(200):
        seen.append(it.run(x)[0].tolist())
    assert seen[0][0] > 970 and seen[-1] == [49, 49]  # 819 / 2^14 of 1000 stays
    assert seen[20][1] < seen[20][0]  # odd channels learn faster
    it.reset()
    assert it.run(x)[0].tolist() == seen[0]


def test_arithmetic_wraps_and_divides_towards_zero():
    def binary(function, a, b):
        g = one("arithmetic", [("int32", (2,)), np.array(b, np.int32)], [("int32", (2,))], function=function)
        return call(g, np.array(a, np.int32))[0].tolist()

    assert binary("div", [-7, 7], [2, -2]) == [-3, -3]
    assert binary("mul", [1 << 30, 3], [4, 5]) == [0, 15]
    assert binary("add", [2**31 - 1, 0], [1, -1]) == [-(2**31), -1]
    with pytest.raises(NetsukeError, match="may be 0"):
        binary("div", [1, 2], [0, 1])


@pytest.mark.parametrize(
    ("kind", "inputs", "outputs", "attrs", "words"),
    [
        ("window", ["int8", "int16"], ["int16"], {"shift": 12}, "it maps int8"),
        ("window", ["int16", "int16"], ["int16"], {"shift": 99}, "shift is 99"),
        ("rfft", ["int16"], ["int16"], {"length": 6}, "length 6"),
        ("energy", ["int16"], ["uint32"], {"start": 0, "end": 9}, "end is 9"),
        ("pcan", ["uint32", "uint32", "int16"], ["uint32"], {"snr_shift": 6}, "125 entries"),
        ("filter_log", ["uint32"], ["int16"], {"correction": 3}, "scale is None"),
        ("cast", ["float32"], ["int8"], {}, "float32 to int8"),
        ("arithmetic", ["int16", "int16"], ["int16"], {"function": "add"}, "int16"),
    ],
)
def test_wrong_operators_are_refused(kind, inputs, outputs, attrs, words):
    with pytest.raises(NetsukeError, match=words):
        one(kind, [(d, (4,)) for d in inputs], [(d, (4,)) for d in outputs], **attrs)
    assert kind in OPS


def samples(name):
    with wave.open(str(FOLDER / f"{name}_1000ms.wav")) as f:
        assert (f.getframerate(), f.getnchannels()) == (16000, 1)
        return np.frombuffer(f.readframes(16000), "<i2")


def features(name):
    """49 windows of 30 ms, 20 ms apart, through the preprocessor: (49, 40) int8."""
    front, x = Interpreter(read_tflite(FOLDER / "audio_preprocessor_int8.tflite")), samples(name)
    return np.array([front.run(x[k : k + 480][None])[0] for k in range(0, 16000 - 480 + 1, 320)])


@NO_DATA
@pytest.mark.parametrize("name", ["yes", "no", "noise", "silence"])
def test_sounds_become_words(name):
    f = features(name)
    assert f.shape == (49, 40) and zlib.crc32(f.tobytes()) == MICRO[name]
    (scores,) = Interpreter(read_tflite(FOLDER / "micro_speech_quantized.tflite")).run(f.reshape(1, 1960))
    word = ("silence", "unknown", "yes", "no")[int(scores.argmax())]
    assert word == name if name in ("yes", "no") else word in ("silence", "unknown")
