"""What the computing operators of a `.tflite` file become. One function per operator, all in `CONVERTERS`.

Fused activations become the clip codes low and high of the output; SAME and VALID become pads; functions of one int8 value
become tables of 256 codes; int8 SUB adds the complement (~q with the zero point -1 - z stands for exactly the negative).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.ir import Tensor
from netsuke.graph.ops.base import axis_of
from netsuke.graph.ops.conv import largest_bias, ratios
from netsuke.graph.ops.elementwise import FUNCTIONS
from netsuke.graph.read import tflite_moves
from netsuke.graph.read.flatbuffer import flexbuffer_map

if TYPE_CHECKING:
    from netsuke.graph.read.tflite import Import, Node

CLIPS = {0: None, 1: (0.0, math.inf), 2: (-1.0, 1.0), 3: (0.0, 6.0)}  # fused: none, RELU, RELU_N1_TO_1, RELU6
REMEDY = "export the model without it, or split the model before it"


def unsupported(m: Import, node: Node) -> NetsukeError:
    return m.refuse(node, "is not supported", ", ".join(sorted(CONVERTERS)), REMEDY)


def data_inputs(node: Node) -> range:
    """Positions of the inputs that carry data: what only says a shape that is known anyway is not needed."""
    return range(1 if node.kind == "RESHAPE" else len(node.inputs))


def clip(m: Import, node: Node, slot: int) -> dict[str, float]:
    """low and high of a fused activation."""
    code = node.option(slot, "b")
    if code not in CLIPS:
        raise m.refuse(node, f"has the fused activation number {code}", "none, RELU, RELU_N1_TO_1, RELU6", REMEDY)
    y, bounds = m.tensor(node.outputs[0]), CLIPS[code]
    if bounds is None:
        return {}
    if y.dtype == "float32":
        return {k: v for k, v in zip(("low", "high"), bounds) if math.isfinite(v)}
    if y.dtype != "int8" or y.scale is None:
        raise m.refuse(node, f"has a fused activation on {y.dtype}", "int8 or float32")
    low, high = (round(v / float(y.scale)) + y.zero if math.isfinite(v) else 127 for v in bounds)
    return {k: min(max(v, -128), 127) for k, v in (("low", low), ("high", high)) if v not in (-128, 127)}


def same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Pads of SAME: as many outputs as strides fit into `size`, the larger half behind."""
    total = max((math.ceil(size / stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def sliding(m: Import, node: Node, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, dict[str, tuple]]:
    """(input, stride, pad and dilation); slots 0 to 2 of convolutions and pools are padding, stride x and y."""
    x, stride = m.file(node, 0), (node.option(2), node.option(1))
    if len(x.shape) != 4 or min(*stride, *dilation) < 1:
        raise m.refuse(node, f"has the input {x.shape}, stride {stride} and dilation {dilation}", "images (1, H, W, C)")
    pads = (0, 0, 0, 0)
    if node.option(0, "b") == 0:
        rows, columns = (same(x.shape[k + 1], kernel[k], stride[k], dilation[k]) for k in (0, 1))
        pads = (*rows, *columns)
    if node.inputs[0] in m.padded:
        source, before = m.padded[node.inputs[0]]
        pads = tuple(a + b for a, b in zip(pads, before))
    else:
        source = m.input(node)
    return source, {"stride": stride, "pad": pads, **({"dilation": dilation} if dilation != (1, 1) else {})}


def weights(m: Import, node: Node, depthwise: bool) -> int:
    """The constant of a layer's weights; integers behind a DEQUANTIZE stay integers (a hybrid layer)."""
    i = m.index(node, 1)
    i = m.stored.get(i, i)
    t = m.tensors[i]
    if t.data is None and i not in m.made:
        raise m.refuse(node, f"has the weights {t.name!r} without data", "constant weights", REMEDY)
    if m.file(node, 0).dtype == "int16":
        raise m.refuse(node, "has activations of 16 bits", "int8 or float32", "convert the model with int8 activations")
    if t.zero != (128 if t.dtype == "uint8" else 0):
        raise m.refuse(node, f"has the weights {t.name!r} with the zero point {t.zero}", "symmetric weights",
                       "convert the model again with a newer converter, which makes weights symmetric")  # fmt: skip
    index = m.value(i)
    w = m.graph.tensors[index]
    if not depthwise:
        return index
    if len(w.shape) == 4 and w.shape[0] == 1:
        w = Tensor(w.name, w.shape[1:], w.dtype, w.scale, w.zero, None if w.axis is None else w.axis - 1, w.data[0])
        m.made[i] = m.graph.add(w)
    elif len(w.shape) != 3:
        raise m.refuse(node, f"has weights of shape {w.shape}", "(1, KH, KW, C)")
    return m.made[i]


def finish(m: Import, node: Node, kind: str, x: int, w: int, **attrs: object) -> None:
    """Appends the layer with its bias, if the file has one."""
    inputs: tuple[int, ...] = (x, w)
    if m.has(node, 2):
        b = m.graph.tensors[m.input(node, 2)]
        b = Tensor(b.name, (b.size,), b.dtype, data=None if b.data is None else b.data.reshape(-1))
        inputs = (x, w, m.graph.add(b))
    y = m.emit(kind, inputs, node.outputs[0], **attrs)
    op = m.graph.ops[-1]
    tx, ty = m.graph.tensors[x], m.graph.tensors[y]
    if len(inputs) == 3 and b.dtype == "int32" and b.constant and tx.scale is not None and ty.scale is not None:
        # Biases of dead channels can stand at the ends of int32, where sums wrap around. Where the output cannot tell, the
        # bias is moved inwards; elsewhere the check refuses
        room = largest_bias(m.graph.tensors[w], kind)
        moved = np.clip(b.data.astype(np.int64), -room, room)
        if np.all(np.abs(moved - b.data) * ratios(m.graph, op) < 0.25):
            b.data = moved.astype(b.data.dtype)


def conv2d(m: Import, node: Node) -> None:
    w = weights(m, node, False)
    shape, channels = m.graph.tensors[w].shape, m.file(node, 0).shape[-1]
    if len(shape) != 4 or channels % shape[3]:
        raise m.refuse(node, f"has weights of shape {shape} for {channels} channels", "(O, KH, KW, channels / groups)")
    x, attrs = sliding(m, node, shape[1:3], (node.option(5, default=1), node.option(4, default=1)))
    groups = {} if channels == shape[3] else {"groups": channels // shape[3]}
    finish(m, node, "conv2d", x, w, **attrs, **groups, **clip(m, node, 3))


def depthwise2d(m: Import, node: Node) -> None:
    w = weights(m, node, True)
    kernel = m.graph.tensors[w].shape[:2]
    x, attrs = sliding(m, node, kernel, (node.option(6, default=1), node.option(5, default=1)))
    finish(m, node, "depthwise2d", x, w, **attrs, **clip(m, node, 4))


def dense(m: Import, node: Node) -> None:
    if node.option(1, "b"):
        raise m.refuse(node, "has shuffled weights", "plain weights", "convert the model again")
    finish(m, node, "dense", m.input(node), weights(m, node, False), **clip(m, node, 0))


def pool(m: Import, node: Node) -> None:
    kernel = (node.option(4), node.option(3))
    if min(kernel) < 1:
        raise m.refuse(node, f"has a window of {kernel}", "1 or more")
    x, attrs = sliding(m, node, kernel, (1, 1))
    kind = "avgpool2d" if node.kind == "AVERAGE_POOL_2D" else "maxpool2d"
    if kind == "maxpool2d":
        x = m.rescaled(x, m.tensor(node.outputs[0]))
    m.emit(kind, (x,), node.outputs[0], window=kernel, **attrs, **clip(m, node, 5))


def reduce(m: Import, node: Node) -> None:
    """MEAN and REDUCE_MAX over neighbouring axes, as pooling of (1, before, reduced, after)."""
    x, y = m.input(node), m.tensor(node.outputs[0])
    shape = m.graph.tensors[x].shape
    axes = sorted({axis_of(a, len(shape)) for a in m.numbers(node, 1)})
    if not axes or axes != list(range(axes[0], axes[-1] + 1)):
        raise m.refuse(node, f"reduces the axes {axes}", "neighbouring axes", REMEDY)
    kind = "avgpool2d" if node.kind == "MEAN" else "maxpool2d"
    window = shape[1:3]
    if len(shape) != 4 or axes != [1, 2]:
        before, within, after = (
            math.prod(p) for p in (shape[: axes[0]], shape[axes[0] : axes[-1] + 1], shape[axes[-1] + 1 :])
        )
        x, window = m.reshaped(x, (1, before, within, after)), (1, within)
    if kind == "maxpool2d":
        x = m.rescaled(x, y)
    _, rows, columns, channels = m.graph.tensors[x].shape
    attrs = {"window": window, "stride": window}
    pooled = (m.graph.tensors[x].shape[0], rows // window[0], columns // window[1], channels)
    if pooled == y.shape:
        m.emit(kind, (x,), node.outputs[0], **attrs)
        return
    x = m.between(kind, (x,), Tensor(y.name, pooled, y.dtype, y.scale, y.zero), "pooled", **attrs)
    m.emit("reshape", (x,), node.outputs[0])


def pair(m: Import, node: Node) -> tuple[int, int]:
    """The two inputs, the one with the output's shape first; a shape that differs only by ones is mended."""
    a, b, y = m.input(node, 0), m.input(node, 1), m.tensor(node.outputs[0])
    shapes = [m.graph.tensors[i].shape for i in (a, b)]
    if shapes[0] != y.shape and shapes[1] == y.shape and node.kind not in ("SUB", "DIV"):
        a, b = b, a
    if m.graph.tensors[a].size == y.size:
        a = m.reshaped(a, y.shape)
    return a, b


def binary(m: Import, node: Node) -> None:
    a, b = pair(m, node)
    y, function, attrs = m.tensor(node.outputs[0]), node.kind.lower(), {}
    if function in ("minimum", "maximum"):
        a, b = m.rescaled(a, y), m.rescaled(b, y)
    else:
        attrs = clip(m, node, 0)
    if function in ("add", "mul") and y.dtype != "int32":
        m.emit(function, (a, b), node.outputs[0], **attrs)
        return
    if attrs or (y.dtype == "int8" and function == "div"):
        raise m.refuse(node, f"of {y.dtype} is not supported" + (" with a fused activation" if attrs else ""),
                       "ADD, MUL, SUB of int8 or float32", REMEDY)  # fmt: skip
    m.emit("arithmetic", (a, b), node.outputs[0], function=function)


def sub(m: Import, node: Node) -> None:
    a, b = pair(m, node)
    t, y = m.graph.tensors[b], m.tensor(node.outputs[0])
    if y.dtype == "float32" and t.data is not None:
        b = m.graph.add(Tensor(f"{t.name}.negative", t.shape, "float32", data=-t.data))
    elif y.dtype == "int8" and t.scale is not None:
        like = Tensor(t.name, t.shape, "int8", t.scale, -1 - t.zero)
        if t.data is not None:
            like.data = ~t.data
            b = m.graph.add(like)
        else:
            b = m.between("lut", (b,), like, "negative", table=~np.arange(-128, 128).astype(np.int8))
    else:
        binary(m, node)
        return
    m.emit("add", (a, b), node.outputs[0], **clip(m, node, 0))


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


UNARY: dict[str, tuple[str | None, Callable[[np.ndarray], np.ndarray]]] = {
    # operator: (float kind in FUNCTIONS or None, the function for int8 tables)
    "RELU": ("relu", FUNCTIONS["relu"]),
    "RELU6": ("relu6", FUNCTIONS["relu6"]),
    "RELU_N1_TO_1": (None, lambda x: np.clip(x, -1, 1)),
    "RELU_0_TO_1": (None, lambda x: np.clip(x, 0, 1)),
    "LOGISTIC": ("sigmoid", FUNCTIONS["sigmoid"]),
    "TANH": ("tanh", FUNCTIONS["tanh"]),
    "HARD_SWISH": ("hard_swish", FUNCTIONS["hard_swish"]),
    "ELU": ("elu", FUNCTIONS["elu"]),
    "EXP": ("exponential", np.exp),
    "ABS": (None, np.abs),
    "NEG": (None, np.negative),
    "SQUARE": (None, np.square),
}


def table(m: Import, node: Node, function: Callable[[np.ndarray], np.ndarray]) -> None:
    x = m.input(node)
    t, y = m.graph.tensors[x], m.tensor(node.outputs[0])
    if t.scale is None or y.scale is None:
        raise m.refuse(node, "has an int8 input or output without a scale", "", "export the model again")
    with np.errstate(over="ignore"):
        codes = y.codes(function(t.real(np.arange(-128, 128))))
    m.emit("lut", (x,), node.outputs[0], table=codes)


def unary(m: Import, node: Node) -> None:
    kind, function = UNARY[node.kind]
    if m.tensor(node.outputs[0]).dtype == "int8":
        table(m, node, function)
    elif kind is None:
        raise m.refuse(node, "is supported for int8 only", ", ".join(k for k, v in UNARY.items() if v[0]), REMEDY)
    else:
        m.emit("unary", (m.input(node),), node.outputs[0], function=kind)


def gelu_op(m: Import, node: Node) -> None:
    tanh = bool(node.option(0, "b"))
    if m.tensor(node.outputs[0]).dtype == "int8":
        table(m, node, FUNCTIONS["gelu"] if tanh else gelu)
    elif tanh:
        m.emit("unary", (m.input(node),), node.outputs[0], function="gelu")
    else:
        raise m.refuse(
            node, "is the exact form in float32", "the tanh form, or int8", "export it with approximate=True"
        )


def leaky(m: Import, node: Node) -> None:
    """LEAKY_RELU and PRELU: in float32 max(x, alpha x), which takes 0 <= alpha <= 1."""
    if node.kind == "PRELU":
        t = m.graph.tensors[m.input(node, 1)]
        alpha = None if t.data is None else t.real(t.data)
    else:
        alpha = np.float64(node.real(0))
    y = m.tensor(node.outputs[0])
    if alpha is None or not np.all(np.isfinite(alpha)) or np.min(alpha) < 0 or np.max(alpha) > 1:
        raise m.refuse(node, f"has the slopes {alpha}", "slopes between 0 and 1", REMEDY)
    if y.dtype == "int8":
        if np.min(alpha) != np.max(alpha):
            raise m.refuse(node, "has different slopes in int8", "one slope", "train it with LeakyReLU")
        table(m, node, lambda v: np.maximum(v, float(np.max(alpha)) * v))
        return
    x = m.input(node)
    slope = m.graph.constant(f"{y.name}.slope", np.asarray(alpha, np.float32).reshape(np.shape(alpha) or (1,)))
    scaled = m.between("mul", (x, slope), y, "scaled")
    m.emit("arithmetic", (x, scaled), node.outputs[0], function="maximum")


def softmax(m: Import, node: Node) -> None:
    m.emit("softmax", (m.input(node),), node.outputs[0], beta=node.real(0))


def quantize(m: Import, node: Node) -> None:
    x, y = m.input(node), m.tensor(node.outputs[0])
    t = m.graph.tensors[x]
    if t.dtype == "int8" and y.dtype == "int8":
        if t.scale is None or y.scale is None:
            raise m.refuse(node, "has an int8 input or output without a scale")
        if (float(t.scale), t.zero) == (float(y.scale), y.zero):
            m.made[node.outputs[0]] = x
        else:
            m.emit("lut", (x,), node.outputs[0], table=y.codes(t.real(np.arange(-128, 128))))
    elif t.data is not None and y.scale is not None and t.dtype == "float32":
        y.data = y.codes(t.data)
        m.made[node.outputs[0]] = m.graph.add(y)
    else:
        m.emit("quantize", (x,), node.outputs[0])


def dequantize(m: Import, node: Node) -> None:
    """Constants become float at once, and remember what they were."""
    i, t = node.inputs[0], m.file(node, 0)
    if t.data is None or i in m.made:
        m.emit("dequantize", (m.input(node),), node.outputs[0])
        return
    y = m.tensor(node.outputs[0])
    if t.dtype in ("int8", "int4"):
        m.stored[node.outputs[0]] = i
        if all(r.kind in LAYERS and r.inputs[1:2] == node.outputs for r in m.readers[node.outputs[0]]):
            return
    y.data = m.tensor(i).real(m.array(i)).astype(np.float32)
    m.made[node.outputs[0]] = m.graph.add(y)


def lstm(m: Import, node: Node) -> None:
    """UNIDIRECTIONAL_SEQUENCE_LSTM with int8 weights and a 16-bit cell. Inputs: x, four W, four U (i, f, g, o), three
    peepholes, four b, projection and its bias, h, c, four layer norms."""
    if len(node.inputs) < 20 or any(m.has(node, p) for p in (9, 10, 11, 16, 17, *range(20, len(node.inputs)))):
        raise m.refuse(node, "has peepholes, a projection or layer norms", "a plain LSTM", REMEDY)
    if not m.has(node, 1) or node.option(0, "b") != 4 or node.option(3, "b"):
        raise m.refuse(node, "couples its gates, is time-major or is not activated by tanh", "a plain LSTM", REMEDY)
    x, y = m.input(node), m.tensor(node.outputs[0])
    if m.graph.tensors[x].dtype != "int8" or any(m.file(node, p).dtype != "int8" for p in range(1, 9)):
        raise m.refuse(node, f"reads {m.graph.tensors[x].dtype}", "int8 with a 16-bit cell",
                       "convert it to int8, or read its Keras file")  # fmt: skip
    names = {1: "kernel", 5: "recurrent", 12: "bias"}
    joined = []
    for start, name in names.items():
        parts = [m.graph.tensors[m.constant(m.index(node, p))] for p in range(start, start + 4)]
        scale = np.concatenate([np.broadcast_to(p.scale, p.shape[:1]) for p in parts]) if start < 12 else None
        if any(p.zero for p in parts) or (start < 12 and any(p.axis not in (None, 0) for p in parts)):
            raise m.refuse(node, "has weights with a zero point", "symmetric weights", "convert the model again")
        data = np.concatenate([p.data for p in parts])
        joined.append(m.graph.constant(f"{y.name}.{name}", data, scale=scale, axis=0 if start < 12 else None))
    states = [m.tensor(m.index(node, p)) for p in (18, 19)]
    h, c = (m.graph.add(t) for t in states)
    m.made.update({m.index(node, 18): h, m.index(node, 19): c})
    written = tuple(m.graph.add(Tensor(f"{t.name}.next", t.shape, t.dtype, t.scale, t.zero)) for t in states)
    largest = node.real(1) / float(states[1].scale) if states[1].scale is not None and node.real(1) > 0 else 32767
    m.emit("lstm_int8", (x, *joined, h, c), node.outputs[0], limit=int(min(largest, 32767)))
    m.graph.ops[-1].outputs += written
    m.graph.states += ((h, written[0]), (c, written[1]))


SIGNAL = {  # custom operator: (kind, attribute: option)
    "SignalWindow": ("window", {"shift": "shift"}),
    "SignalFftAutoScale": ("fft_scale", {}),
    "SignalRfft": ("rfft", {"length": "fft_length"}),
    "SignalEnergy": ("energy", {"start": "start_index", "end": "end_index"}),
    "SignalFilterBank": ("filter_bank", {}),
    "SignalFilterBankSquareRoot": ("filter_sqrt", {}),
    "SignalFilterBankSpectralSubtraction": ("noise_subtract", {
        "smoothing": "smoothing", "one_minus_smoothing": "one_minus_smoothing",
        "alternate_smoothing": "alternate_smoothing", "alternate_one_minus_smoothing": "alternate_one_minus_smoothing",
        "least": "min_signal_remaining", "smoothing_bits": "smoothing_bits",
        "subtraction_bits": "spectral_subtraction_bits", "clamp": "clamping",
    }),
    "SignalPCAN": ("pcan", {"snr_shift": "snr_shift"}),
    "SignalFilterBankLog": ("filter_log", {"correction": "input_correction_bits", "scale": "output_scale"}),
}  # fmt: skip


def signal(m: Import, node: Node) -> None:
    kind, wanted = SIGNAL[node.kind.removeprefix("custom ")]
    options = flexbuffer_map(node.custom, str(m.path)) if wanted else {}
    if missing := [v for v in wanted.values() if v not in options]:
        raise m.refuse(node, f"lacks the option {missing[0]}", "", "export the model again")
    if kind == "rfft" and options.get("T", 7) != 7:
        raise m.refuse(node, f"is of the type number {options['T']}", "int16 (7)")
    inputs = tuple(m.input(node, p) for p in range(len(node.inputs)))
    if kind == "noise_subtract":  # the estimate of the noise lives on from window to window
        t = m.tensor(node.outputs[1])
        inputs = (*inputs, m.graph.add(Tensor(f"{t.name}.last", t.shape, t.dtype)))
    m.emit(kind, inputs, node.outputs[0], **{k: int(options[v]) for k, v in wanted.items()})
    for i in node.outputs[1:]:
        m.made[i] = m.graph.add(m.tensor(i))
        m.graph.ops[-1].outputs += (m.made[i],)
    if kind == "noise_subtract":
        m.graph.states += ((inputs[1], m.made[node.outputs[1]]),)


def cast(m: Import, node: Node) -> None:
    m.emit("cast", (m.input(node),), node.outputs[0])


LAYERS = {"CONV_2D": conv2d, "DEPTHWISE_CONV_2D": depthwise2d, "FULLY_CONNECTED": dense}
CONVERTERS: dict[str, Callable[[Import, Node], None]] = {
    **LAYERS,
    **dict.fromkeys(("AVERAGE_POOL_2D", "MAX_POOL_2D"), pool),
    **dict.fromkeys(("MEAN", "REDUCE_MAX"), reduce),
    **dict.fromkeys(("ADD", "MUL", "DIV", "MINIMUM", "MAXIMUM"), binary),
    **dict.fromkeys(UNARY, unary),
    **dict.fromkeys(("LEAKY_RELU", "PRELU"), leaky),
    "SUB": sub,
    "GELU": gelu_op,
    "SOFTMAX": softmax,
    "QUANTIZE": quantize,
    "DEQUANTIZE": dequantize,
    "CAST": cast,
    "UNIDIRECTIONAL_SEQUENCE_LSTM": lstm,
    **{f"custom {name}": signal for name in SIGNAL},
    **tflite_moves.MOVES,
}
