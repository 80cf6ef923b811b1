"""Small `.tflite` models of one int8 operator each, with the real function that each should compute."""

from __future__ import annotations

from math import erf

import numpy as np

from tests.graph.tflite_writer import Step, T

RNG = np.random.default_rng(7)
S = {"scale": 0.05, "zero": 3}


def codes(*shape):
    return RNG.integers(-128, 128, shape).astype(np.int8)


def ints(*values):
    return T((len(values),), "int32", data=np.array(values, np.int32))


def row(scale, zero=0, **kw):
    return T((1, 8), scale=scale, zero=zero, **kw)


def bias(channels):
    return T((channels,), "int32", 0.0005, data=np.zeros(channels, np.int32))


def real(t, q):
    """The real numbers of codes, with the scale as the file holds it."""
    return (q.astype(float) - t.zero) * np.float64(np.float32(t.scale))


def convolved(x, w, groups, stride, pad, dilation=1):
    """torch's convolution of (1, H, W, C) with (O, KH, KW, I) real numbers; pad (top, bottom, left, right)."""
    import torch

    t, b, left, r = pad
    x = torch.from_numpy(np.pad(x, ((0, 0), (t, b), (left, r), (0, 0))).transpose(0, 3, 1, 2).copy())
    w = torch.from_numpy(w.transpose(0, 3, 1, 2).astype(float))
    return (
        torch.nn.functional.conv2d(x, w, stride=stride, dilation=dilation, groups=groups).numpy().transpose(0, 2, 3, 1)
    )


def means(x):
    """2 x 2 means of (1, 5, 6, 4); the last row has one row of elements."""
    return np.nanmean(
        np.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=np.nan).reshape(1, 3, 2, 3, 2, 4), (2, 4)
    )


ROW, IMAGE = row(**S), T((1, 5, 6, 4), **S)
WEIGHT, DEPTH = codes(6, 3, 2, 2), codes(1, 3, 3, 8)
OTHER, JOINED = row(0.04, -9, data=codes(1, 8)), row(0.1, -20, data=codes(1, 8))
POOL = {1: ("i", 2), 2: ("i", 2), 3: ("i", 2), 4: ("i", 2)}

UNLIKE_LITERT = {"join"}  # it takes only inputs of the output's scale
# name: tensors (the last is the output, the first the input), operator, the real function of the real input
SINGLE = {
    "relu": ([ROW, row(0.03, -128)], Step("RELU", (0,), (1,)), lambda x: np.maximum(x, 0)),
    "relu6": ([ROW, row(0.024, -128)], Step("RELU6", (0,), (1,)), lambda x: np.clip(x, 0, 6)),
    "logistic": ([ROW, row(1 / 256, -128)], Step("LOGISTIC", (0,), (1,)), lambda x: 1 / (1 + np.exp(-x))),
    "tanh": ([ROW, row(1 / 128)], Step("TANH", (0,), (1,)), np.tanh),
    "hard_swish": ([ROW, row(0.05, -110)], Step("HARD_SWISH", (0,), (1,)), lambda x: x * np.clip(x + 3, 0, 6) / 6),
    "leaky": ([ROW, row(0.05, 0)], Step("LEAKY_RELU", (0,), (1,), {0: ("f", 0.25)}), lambda x: np.maximum(x, x / 4)),
    "gelu": ([ROW, row(0.05, -100)], Step("GELU", (0,), (1,)), lambda x: x * 0.5 * (1 + np.vectorize(erf)(x / 2**0.5))),
    "abs": ([ROW, row(0.06, -128)], Step("ABS", (0,), (1,)), np.abs),
    "quantize": ([ROW, row(0.08, -7)], Step("QUANTIZE", (0,), (1,)), lambda x: x),
    "transpose": ([IMAGE, ints(0, 3, 1, 2), T((1, 4, 5, 6), **S)], Step("TRANSPOSE", (0, 1), (2,)),
                  lambda x: x.transpose(0, 3, 1, 2)),
    "mean": ([IMAGE, ints(1, 2), T((1, 1, 1, 4), scale=0.02, zero=9)], Step("MEAN", (0, 1), (2,), {0: ("b", 1)}),
             lambda x: x.mean((1, 2), keepdims=True)),
    "mean of channels": ([IMAGE, ints(3), T((1, 5, 6), scale=0.05, zero=3)], Step("MEAN", (0, 1), (2,)), lambda x: x.mean(3)),
    "largest": ([IMAGE, ints(1, 2), T((1, 4), **S)], Step("REDUCE_MAX", (0, 1), (2,)), lambda x: x.max((1, 2))),
    "strided": ([IMAGE, ints(0, 1, 0, -2), ints(1, 5, 6, 4), ints(1, 2, 3, 1), T((1, 2, 2, 2), **S)],
                Step("STRIDED_SLICE", (0, 1, 2, 3), (4,)), lambda x: x[:, 1:5:2, ::3, -2:]),
    "shrinking": ([IMAGE, ints(0, -1, 0, 1), ints(0, 0, 0, 4), ints(1, 1, 1, 1), T((1, 6, 3), **S)],
                  Step("STRIDED_SLICE", (0, 1, 2, 3), (4,), {0: ("i", 5), 1: ("i", 5), 4: ("i", 2)}), lambda x: x[:, -1, :, 1:]),
    "slice": ([IMAGE, ints(0, 1, 2, 0), ints(1, 3, -1, 2), T((1, 3, 4, 2), **S)], Step("SLICE", (0, 1, 2), (3,)),
              lambda x: x[:, 1:4, 2:, :2]),
    "pad": ([IMAGE, T((4, 2), "int32", data=np.array([[0, 0], [1, 2], [0, 1], [0, 0]], np.int32)), T((1, 8, 7, 4), **S)],
            Step("PAD", (0, 1), (2,)), lambda x: np.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)))),
    "average": ([IMAGE, T((1, 3, 3, 4), **S)],
                Step("AVERAGE_POOL_2D", (0,), (1,), {0: ("b", 0), **POOL}), means),
    "maximum": ([IMAGE, T((1, 2, 3, 4), **S)],
                Step("MAX_POOL_2D", (0,), (1,), {0: ("b", 1), **POOL}),
                lambda x: x[:, :4].reshape(1, 2, 2, 3, 2, 4).max((2, 4))),
    "groups": ([IMAGE, T((6, 3, 2, 2), scale=[0.01] * 6, data=WEIGHT), bias(6), T((1, 5, 6, 6), scale=0.2, zero=-20)],
               Step("CONV_2D", (0, 1, 2), (3,), {0: ("b", 0), 1: ("i", 1), 2: ("i", 1), 3: ("b", 3)}),
               lambda x: np.clip(convolved(x, 0.01 * WEIGHT, 2, 1, (1, 1, 0, 1)), 0, 6)),
    "multiplier": ([IMAGE, T((1, 3, 3, 8), scale=[0.01] * 8, axis=3, data=DEPTH), bias(8), T((1, 2, 2, 8), scale=0.2, zero=-20)],
                   Step("DEPTHWISE_CONV_2D", (0, 1, 2), (3,), {0: ("b", 1), 1: ("i", 3), 2: ("i", 2), 3: ("i", 2)}),
                   lambda x: convolved(x, 0.01 * DEPTH.transpose(3, 1, 2, 0), 4, (2, 3), (0, 0, 0, 0))),
    "dilated": ([IMAGE, T((1, 3, 3, 4), scale=0.01, data=DEPTH[..., :4]), bias(4), T((1, 5, 6, 4), scale=0.2, zero=-20)],
                Step("DEPTHWISE_CONV_2D", (0, 1, 2), (3,),
                     {0: ("b", 0), **dict.fromkeys((1, 2, 3), ("i", 1)), 5: ("i", 2), 6: ("i", 2)}),
                lambda x: convolved(x, 0.01 * DEPTH[..., :4].transpose(3, 1, 2, 0), 4, 1, (2, 2, 2, 2), 2)),
    "difference": ([ROW, OTHER, row(0.1, 1)],
                   Step("SUB", (0, 1), (2,)), lambda x: x - real(OTHER, OTHER.data)),
    "double": ([ROW, row(0.1, 1)], Step("ADD", (0, 0), (1,)), lambda x: 2 * x),
    "nothing": ([ROW, row(0.1, 1)], Step("SUB", (0, 0), (1,)), lambda x: 0 * x),
    "square": ([ROW, row(0.2, -128)], Step("MUL", (0, 0), (1,), {0: ("b", 1)}), lambda x: x * x),
    "least": ([ROW, T((1,), **S, data=np.array([20], np.int8)), T((1, 8), **S)], Step("MINIMUM", (0, 1), (2,)),
              lambda x: np.minimum(x, 0.85)),
    "join": ([ROW, JOINED, T((1, 16), scale=0.1, zero=-20)],
             Step("CONCATENATION", (0, 1), (2,), {0: ("i", -1)}),
             lambda x: np.concatenate([x, real(JOINED, JOINED.data)], 1)),
    "stack": ([ROW, T((2, 1, 8), **S)], Step("PACK", (0, 0), (1,), {0: ("i", 2), 1: ("i", 0)}), lambda x: np.stack([x, x])),
    "softmax": ([ROW, row(1 / 256, -128)], Step("SOFTMAX", (0,), (1,), {0: ("f", 1.0)}),
                lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)),
}  # fmt: skip
