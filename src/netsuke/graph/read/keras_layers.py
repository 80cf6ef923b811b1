"""What each kind of Keras layer becomes in a graph: one function per layer, and the table LAYERS of those that are imported.

A function takes the reader, the layer's name and configuration, the values that come in and the layer's weights. The attribute
"activation", which many layers have, is applied behind them by the reader; recurrent layers apply theirs themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from netsuke.graph.read.layout import Value

if TYPE_CHECKING:
    from netsuke.graph.read.keras import Reader

Weights = list[np.ndarray]
Layer = Callable[["Reader", str, dict[str, Any], list[Value], Weights], Value]


def _pair(value: Any, axes: int) -> tuple[int, int]:
    """A size over images: 1-D ones lie along the second axis."""
    value = [value] * axes if isinstance(value, int) else list(value)
    return (1, int(value[0])) if axes == 1 else (int(value[0]), int(value[1]))


def _axes(v: Value) -> int:
    return len(v.shape) - 2


def dense(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
    w, *b = r.take(name, weights, 2, *([1] if c.get("use_bias", True) else []))
    return r.b.dense(values[0], w.T, b[0] if b else None, name)


def _conv_attrs(v: Value, c: dict[str, Any]) -> dict[str, Any]:
    axes = _axes(v)
    stride, dilation = _pair(c.get("strides", 1), axes), _pair(c.get("dilation_rate", 1), axes)
    pad = c.get("padding", "valid")
    if pad == "causal":
        pad = (0, 0, dilation[1] * (_pair(c["kernel_size"], axes)[1] - 1), 0)
    return {"stride": stride, "dilation": dilation, "pad": pad}


def _as_image(w: np.ndarray, axes: int) -> np.ndarray:
    return w[None] if axes == 1 else w


def conv(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
    v, axes = values[0], _axes(values[0])
    w, *b = r.take(name, weights, axes + 2, *([1] if c.get("use_bias", True) else []))
    w = _as_image(w, axes).transpose(3, 0, 1, 2)
    return r.b.conv(v, w, b[0] if b else None, name, groups=c.get("groups", 1), **_conv_attrs(v, c))


def _depthwise(
    r: Reader, name: str, c: dict[str, Any], v: Value, w: np.ndarray, b: np.ndarray | None
) -> Value:  # fmt: skip
    w = _as_image(w, _axes(v))
    return r.b.conv(v, w.reshape(*w.shape[:2], -1), b, name, depthwise=True, **_conv_attrs(v, c))


def depthwise(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
    w, *b = r.take(name, weights, _axes(values[0]) + 2, *([1] if c.get("use_bias", True) else []))
    return _depthwise(r, name, c, values[0], w, b[0] if b else None)


def separable(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
    axes = _axes(values[0])
    d, p, *b = r.take(name, weights, axes + 2, axes + 2, *([1] if c.get("use_bias", True) else []))
    v = _depthwise(r, f"{name}.depthwise", c, values[0], d, None)
    return r.b.conv(v, _as_image(p, axes).transpose(3, 0, 1, 2), b[0] if b else None, name)


def _pool(kind: str) -> Layer:
    def layer(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
        size = _pair(c["pool_size"], _axes(values[0]))
        stride = size if c.get("strides") is None else _pair(c["strides"], _axes(values[0]))
        return r.b.pool(kind, values[0], size, name, stride, c.get("padding", "valid"))

    return layer


def _global(kind: str) -> Layer:
    def layer(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
        v = r.b.pool(kind, values[0], None, name)
        return v if c.get("keepdims") else r.b.reshape(v, (1, v.shape[-1]), f"{name}.out")

    return layer


def flatten(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
    return r.b.reshape(values[0], (1, -1), name)


def reshape(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
    return r.b.reshape(values[0], (1, *c["target_shape"]), name)


def permute(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
    return r.b.plain(r.b.transpose(values[0], (0, *c["dims"])))


def activation(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
    return values[0]  # `_apply` reads the attribute "activation" of every layer


def softmax(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
    axis = c.get("axis", -1)
    return r.b.softmax(values[0], axis[0] if isinstance(axis, list) else axis, name)


def relu(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
    high, slope = c.get("max_value"), float(c.get("negative_slope") or 0.0)
    if c.get("threshold") or (slope and high is not None):
        raise r.b.refuse(name, "it has a threshold, or a slope and a largest value", "one of them")
    if slope:
        return r.b.leaky(values[0], slope, name)
    return r.b.clip(values[0], 0.0, float("inf") if high is None else float(high), name)


def leaky(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
    return r.b.leaky(values[0], float(c.get("negative_slope", c.get("alpha", 0.3))), name)


def elu(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
    if float(c.get("alpha", 1.0)) != 1.0:
        raise r.b.refuse(name, f"its alpha is {c['alpha']}", "1")
    return r.b.unary(values[0], "elu", name)


def norm(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
    axis, rank = c.get("axis", -1), len(values[0].shape)
    if (axis if isinstance(axis, list) else [axis]) not in ([-1], [rank - 1]):
        raise r.b.refuse(name, f"it normalizes axis {axis}", "the last axis, the channels")
    found = iter(r.take(name, weights, *[1] * (2 + bool(c.get("scale", True)) + bool(c.get("center", True)))))
    gamma = next(found).astype(np.float64) if c.get("scale", True) else 1.0
    beta = next(found).astype(np.float64) if c.get("center", True) else 0.0
    mean, variance = (x.astype(np.float64) for x in found)
    with np.errstate(invalid="ignore", divide="ignore"):  # what is not finite is refused by name in QGraph.check
        gain = gamma / np.sqrt(variance + float(c.get("epsilon", 1e-3)))
    return r.b.norm(values[0], gain, beta - mean * gain, name)


def zero_padding(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
    pads = c["padding"]
    pads = [pads] if _axes(values[0]) == 1 else [[p, p] if isinstance(p, int) else p for p in pads]
    return r.b.pad(values[0], [(0, 0), *map(tuple, pads), (0, 0)], name)


def rescaling(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
    v = r.b.binary("mul", values[0], c["scale"], f"{name}.scale")
    return r.b.binary("add", v, c.get("offset", 0.0), name)


def _merge(kind: str) -> Layer:
    def layer(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
        out = values[0]
        for v in values[1:]:
            out = r.b.binary(kind, out, v, name)
        return out

    return layer


def concatenate(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
    return r.b.concat(values, c.get("axis", -1), name)


def _recurrent(kind: str) -> Layer:
    def layer(r: Reader, name: str, c: dict[str, Any], values: list[Value], weights: Weights) -> Value:
        for flag, why in FLAGS.items():
            if c.get(flag):
                raise r.b.refuse(name, f"{flag} is set: {why}", f"{flag}=False")
        after = bool(kind == "gru" and c.get("reset_after", False))
        bias = ([2] if after else [1]) if c.get("use_bias", True) else []
        w, u, *b = r.take(name, weights, 2, 2, *bias)
        attrs: dict[str, Any] = {
            "activation": r.function(c.get("activation", "tanh"), name),
            "return_sequences": bool(c.get("return_sequences")),
        }
        if kind != "rnn":
            default = "sigmoid" if r.version > 2 else "hard_sigmoid"
            attrs["recurrent_activation"] = r.function(c.get("recurrent_activation", default), name)
        if kind == "gru":
            attrs["reset_after"] = after
        return r.b.recurrent(kind, values[0], (w.T, u.T, *b), name, u.shape[0], **attrs)

    return layer


FLAGS = {
    "stateful": "the state would live on between runs, here it is zero at the start of each",
    "go_backwards": "the sequence would be read from its end",
    "return_state": "the state would be a second output",
    "time_major": "the time would be the first axis",
}
RECURRENT = {"SimpleRNN": _recurrent("rnn"), "LSTM": _recurrent("lstm"), "GRU": _recurrent("gru")}
LAYERS: dict[str, Layer] = {
    "Dense": dense, "Conv1D": conv, "Conv2D": conv, "Convolution1D": conv, "Convolution2D": conv,
    "DepthwiseConv1D": depthwise, "DepthwiseConv2D": depthwise,
    "SeparableConv1D": separable, "SeparableConv2D": separable,
    "MaxPooling1D": _pool("maxpool2d"), "MaxPooling2D": _pool("maxpool2d"),
    "AveragePooling1D": _pool("avgpool2d"), "AveragePooling2D": _pool("avgpool2d"),
    "GlobalAveragePooling1D": _global("avgpool2d"), "GlobalAveragePooling2D": _global("avgpool2d"),
    "GlobalMaxPooling1D": _global("maxpool2d"), "GlobalMaxPooling2D": _global("maxpool2d"),
    "Flatten": flatten, "Reshape": reshape, "Permute": permute, "Activation": activation, "Softmax": softmax,
    "ReLU": relu, "LeakyReLU": leaky, "ELU": elu, "BatchNormalization": norm, "BatchNormalizationV1": norm,
    "ZeroPadding1D": zero_padding, "ZeroPadding2D": zero_padding, "Rescaling": rescaling,
    "Add": _merge("add"), "Multiply": _merge("mul"), "Concatenate": concatenate, **RECURRENT,
}  # fmt: skip
