"""Post-training quantization: a float graph and a few calibration samples become an int8 graph.

One pass over the samples collects a histogram of every activation and the mean input of every layer. Then, per layer:

    activations   real = scale (q - zero), range by least squared error (`ranges.py`)
    weights       one symmetric scale per output channel, 8 or 4 bits, by least squared error
    bias          int32 at scale_x scale_w, after correction: b - sum (W_q - W) E[x]     (Nagel et al., 2019: the mean error
                  that rounded weights make on the calibration data, with E[x] measured window by window, padding included)
    relu, relu6   the lowest and highest code of the operator before them; other functions are tables of 256 codes

Before all that, scale may be moved between the channels of neighbouring layers (`equalize.py`). With one scale per channel in
the weights that helps some networks and harms others (MLPerf Tiny's keyword model, fed noise: error 4 times larger), so by
default both are built and the one whose outputs are nearer to the float network's on the calibration data is taken.

`weights_only` needs no samples: int8 or int4 weights with float activations, for recurrent layers too. `narrow` takes layers
of an int8 graph to 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.calibrate import Observed, observe, rows
from netsuke.graph.equalize import equalize, pairs
from netsuke.graph.interpret import Interpreter
from netsuke.graph.ir import Op, QGraph, Tensor
from netsuke.graph.ops.conv import LINEAR
from netsuke.graph.ops.elementwise import table
from netsuke.graph.ops.recurrent import GATES
from netsuke.graph.ranges import Histogram, spread, weight_scales
from netsuke.graph.read.tidy import compact, has_bias, tidy, writer

MOVES = ("maxpool2d", "reshape", "transpose", "pad", "slice")  # output and input have one scale
FIXED = {"softmax": (1 / 256, -128), "sigmoid": (1 / 256, -128), "hard_sigmoid": (1 / 256, -128),
         "hard_sigmoid6": (1 / 256, -128), "tanh": (1 / 128, 0), "softsign": (1 / 128, 0)}  # fmt: skip
QUANTIZED = {*LINEAR, *MOVES, "add", "mul", "avgpool2d", "concat", "unary", "softmax"}
METHODS = ("range", "minmax")
BIAS_ROOM = 2.0**30  # largest code of a bias: the sum beside it stays below 2^31


def quantize(
    graph: QGraph, calibration: Iterable[np.ndarray] | None, weights: int = 8, method: str = "range", *,
    bits: dict[str, int] | None = None, io: Literal["int8", "float"] = "int8",
    equalized: bool | None = None, corrected: bool = True,
) -> QGraph:  # fmt: skip
    """The int8 graph of a float graph, which is left as it is.

    calibration   float32 inputs (n, …) of the graph's shape, a few dozen to a few hundred samples that are like the real ones;
                  tuples of them for several inputs
    weights, bits 8 or 4 for all layers, and by name of a weight tensor for single ones
    method        "range" (least squared error) or "minmax" (everything seen)
    io            "float": inputs and outputs stay float32, through quantize and dequantize operators
    equalized, corrected   cross-layer equalization (None: if it helps) and bias correction
    Raises NetsukeError without samples, for recurrent layers (by name) and operators without an int8 form.
    """
    asked = f"quantize {graph.name}"
    if calibration is None:
        raise NetsukeError(
            asked, "a float network needs calibration data to find the ranges of its activations", "some real inputs",
            "--data with a few dozen samples, or weights only (int8 weights, float activations)",
        )  # fmt: skip
    if method not in METHODS or io not in ("int8", "float"):
        raise NetsukeError(asked, f"the method {method!r} with {io!r} inputs", f"{', '.join(METHODS)}; int8, float")
    _refuse(graph, asked)
    graph, samples = tidy(_float_weights(graph)), list(calibration)
    chosen = _bits(graph, weights, bits, asked)
    ways = [graph] if not equalized else []
    ways += [equalize(graph)] if equalized or (equalized is None and pairs(graph)) else []
    built = [_Quantizer(g, observe(g, samples, asked), chosen, method, corrected).run(io) for g in ways]
    return built[0] if len(built) == 1 else min(built, key=lambda q: output_error(graph, q, samples))


def output_error(graph: QGraph, quantized: QGraph, samples: Iterable[np.ndarray | tuple[np.ndarray, ...]]) -> float:
    """Mean squared error of the outputs of a quantized graph on float samples, over the float outputs' mean square."""
    a, b = Interpreter(graph), Interpreter(quantized)
    error, power = 0.0, 0.0
    for item in samples:
        parts = [np.asarray(x, np.float32) for x in (item if isinstance(item, tuple) else (item,))]
        parts = [x.reshape(-1, *graph.tensors[i].shape[1:]) for x, i in zip(parts, graph.inputs)]
        for x in rows(graph, parts):
            codes = [quantized.tensors[i].codes(v) for v, i in zip(x, quantized.inputs)]
            for y, q, i in zip(a.run(*x), b.run(*codes), quantized.outputs):
                error += float(((quantized.tensors[i].real(q) - y) ** 2).sum())
                power += float((y.astype(np.float64) ** 2).sum())
    return error / max(power, 1e-300)


def weights_only(graph: QGraph, bits: int | dict[str, int] = 8, method: str = "range") -> QGraph:
    """The float graph with int8 or int4 weights, one scale per output channel or gate row; activations stay float32.

    bits: for all weights, or by name of a weight tensor (others stay float32). No calibration; 1/4 or 1/8 of the flash.
    """
    asked = f"quantize the weights of {graph.name}"
    graph = tidy(graph)
    named = bits if isinstance(bits, dict) else {}
    chosen = _bits(graph, 32 if named else bits, named, asked)
    for op in graph.ops:
        places = (1, 2) if op.kind in GATES else (1,) if op.kind in LINEAR else ()
        for k in places:
            w = graph.tensors[op.inputs[k]]
            if w.constant and w.dtype == "float32" and chosen[w.name] != 32:
                tensor = quantized_weights(w, LINEAR.get(op.kind, 0), chosen[w.name], method)
                op.inputs = (*op.inputs[:k], graph.add(tensor), *op.inputs[k + 1 :])
    compact(graph)
    graph.meta = graph.meta | {"quantized": "weights"}
    return graph.check()


def narrow(graph: QGraph, bits: dict[str, int], method: str = "range") -> QGraph:
    """An int8 graph (or one with int8 weights) whose named weights have 4 bits; biases follow the new scales."""
    asked = f"quantize the weights of {graph.name}"
    graph = graph.copy()
    chosen = _bits(graph, 8, bits, asked)
    for op in graph.ops:
        if op.kind not in LINEAR or not (w := graph.tensors[op.inputs[1]]).constant or chosen[w.name] == 8:
            continue
        if w.dtype != "int8":
            continue
        axis = LINEAR[op.kind]
        real = replace(w, data=w.real(w.data), dtype="float32", scale=None, axis=None)
        new = quantized_weights(real, axis, 4, method, variable=w.variable)
        x, inputs = graph.tensors[op.inputs[0]], [op.inputs[0], graph.add(new), *op.inputs[2:]]
        if x.dtype == "int8" and has_bias(op):
            b = graph.tensors[op.inputs[2]]
            scale = float(x.scale) * new.scale
            old = float(x.scale) * np.broadcast_to(w.scale, new.scale.shape)
            codes = np.clip(np.rint(b.data.astype(np.float64) * old / scale), -BIAS_ROOM, BIAS_ROOM)
            inputs[2] = graph.add(replace(b, data=codes.astype(np.int32), scale=scale, axis=0))
        op.inputs = tuple(inputs)
    compact(graph)
    return graph.check()


def quantized_weights(
    w: Tensor, axis: int, bits: int, method: str = "range", least: np.ndarray | float = 0.0, variable: bool = False
) -> Tensor:
    """Float weights as int8 or int4 codes with one scale per index of `axis`, none below `least`."""
    real = w.data.astype(np.float64)
    rows = np.moveaxis(real, axis, 0).reshape(real.shape[axis], -1)
    scales = np.maximum(weight_scales(rows, bits, method), least)
    top = 2 ** (bits - 1) - 1
    shaped = scales.reshape([-1 if k == axis else 1 for k in range(real.ndim)])
    codes = np.clip(np.rint(real / shaped), -top - (bits == 4), top).astype(np.int8)
    return Tensor(w.name, w.shape, f"int{bits}", scales, 0, axis, codes, variable=variable)


def _refuse(graph: QGraph, asked: str) -> None:
    for op in graph.ops:
        where = f"the operator {op.name or op.kind!r}"
        if op.kind in GATES:
            raise NetsukeError(
                asked, f"{where} is a recurrent layer ({op.kind}), whose activations stay float32", "feed-forward layers",
                "weights_only(graph, 8): int8 weights with float activations",
            )  # fmt: skip
        if any(graph.tensors[i].dtype != "float32" for i in (op.inputs[0], *op.outputs)):
            raise NetsukeError(asked, f"{where} is not float32: the network is quantized already", "a float network")
        if op.kind not in QUANTIZED:
            raise NetsukeError(asked, f"{where} ({op.kind}) has no int8 form", ", ".join(sorted(QUANTIZED)))
        if op.kind == "pad" and op.attrs.get("value", 0.0) != 0:
            raise NetsukeError(asked, f"{where} pads with {op.attrs['value']}", "zeros")


def _float_weights(graph: QGraph) -> QGraph:
    """The graph with weights that are codes under float activations as the numbers they stand for."""
    graph = graph.copy()
    for t in graph.tensors:
        if t.constant and t.scale is not None:
            t.data, t.dtype, t.scale, t.axis = t.real(t.data).astype(np.float32), "float32", None, None
    return graph


def _bits(graph: QGraph, default: int, named: dict[str, int] | None, asked: str) -> dict[str, int]:
    """Bits of every weight tensor by name."""
    names = {
        graph.tensors[i].name
        for op in graph.ops
        for i in (op.inputs[1:3] if op.kind in GATES else op.inputs[1:2] if op.kind in LINEAR else ())
    }
    named = named or {}
    unknown = sorted(set(named) - names)
    if unknown:
        raise NetsukeError(asked, f"no layer has weights named {unknown[0]!r}", ", ".join(sorted(names)))
    wrong = [b for b in (*named.values(), default) if b not in (4, 8) and (b != 32 or b in named.values())]
    if wrong:
        raise NetsukeError(asked, f"weights of {wrong[0]} bits", "8 or 4")
    return dict.fromkeys(names, default) | named


class _Quantizer:
    """Builds the int8 graph beside the float one: `made[i]` is the new index of the float tensor i."""

    def __init__(self, graph: QGraph, observed: Observed, bits: dict[str, int], method: str, corrected: bool):
        self.g, self.observed, self.bits, self.method, self.corrected = graph, observed, bits, method, corrected
        self.out = QGraph(graph.name, meta=graph.meta | {"quantized": "int8"})
        self.made: dict[int, int] = {}
        self.scales = self._scales()

    def run(self, io: str) -> QGraph:
        g, out = self.g, self.out
        for i in g.inputs:
            if io == "float":
                outer = out.add(replace(g.tensors[i]))
                inner = self._tensor(i, f"{g.tensors[i].name}.int8")
                self.made[i] = out.append("quantize", (outer,), inner, f"{g.tensors[i].name}.quantize")
                out.inputs += (outer,)
            else:
                self.made[i] = out.add(self._tensor(i))
                out.inputs += (self.made[i],)
        for k, op in enumerate(g.ops):
            self.made[op.outputs[0]] = self._append(k, op)
        ends = [self.made[i] for i in g.outputs]
        if io == "float":
            tensors = [replace(g.tensors[i], name=f"{g.tensors[i].name}.float") for i in g.outputs]
            ends = [out.append("dequantize", (e,), t, t.name) for e, t in zip(ends, tensors)]
        out.outputs = tuple(ends)
        compact(out)
        return out.check()

    # Scales

    def _scales(self) -> dict[int, tuple[np.float64, int]]:
        """(scale, zero point) per activation: one for all tensors that only move each other's elements."""
        g = self.g
        leader = {i: i for i in range(len(g.tensors))}

        def find(i: int) -> int:
            while leader[i] != i:
                i = leader[i]
            return i

        fixed: dict[int, tuple[np.float64, int]] = {}
        for op in g.ops:
            if op.kind in MOVES:
                leader[op.outputs[0]] = find(op.inputs[0])
            key = op.attrs.get("function") if op.kind == "unary" else op.kind
            if key in FIXED:
                fixed[op.outputs[0]] = (np.float64(FIXED[key][0]), FIXED[key][1])
        for op in g.ops:
            if op.kind == "concat":
                for i in op.inputs:
                    if find(i) not in fixed and find(i) != find(op.outputs[0]):
                        leader[find(i)] = find(op.outputs[0])
        joined: dict[int, Histogram] = {}
        for i, histogram in self.observed.histograms.items():
            source = writer(g, i)
            known = source is not None and (source.kind in MOVES or source.kind == "concat") and all(
                j in self.observed.histograms and find(j) == find(i) for j in source.inputs
            )  # fmt: skip
            if not known:  # else its elements were counted with the tensors that they come from
                joined.setdefault(find(i), Histogram()).merge(histogram)
        found = {k: spread(*h.range(self.method)) for k, h in joined.items()} | fixed
        return {i: found[find(i)] for i in self.observed.histograms}

    def _tensor(self, i: int, name: str = "") -> Tensor:
        scale, zero = self.scales[i]
        return Tensor(name or self.g.tensors[i].name, self.g.tensors[i].shape, "int8", scale, zero)

    # Operators

    def _append(self, k: int, op: Op) -> int:
        x, y = self.made[op.inputs[0]], self._tensor(op.outputs[0])
        attrs = {n: v for n, v in op.attrs.items() if n not in ("low", "high", "value", "function")}
        for end, best in (("low", max), ("high", min)):
            if end in op.attrs:
                attrs[end] = int(best(np.rint(op.attrs[end] / y.scale) + y.zero, -128 if end == "low" else 127))
        if op.kind in LINEAR:
            return self.out.append(op.kind, (x, *self._weights(k, op)), y, op.name, **attrs)
        if op.kind == "unary":
            source = self.out.tensors[x]
            codes = table(op.attrs["function"], float(source.scale), source.zero, float(y.scale), y.zero)
            return self.out.append("lut", (x,), y, op.name, table=codes)
        inputs = tuple(self._operand(i, op) for i in op.inputs)
        if op.kind == "concat":
            inputs = tuple(self._rescaled(i, y) for i in inputs)
        return self.out.append(op.kind, inputs, y, op.name, **attrs)

    def _rescaled(self, i: int, like: Tensor) -> int:
        """The tensor at the scale of `like`."""
        x = self.out.tensors[i]
        if (float(x.scale), x.zero) == (float(like.scale), like.zero):
            return i
        codes = table("linear", float(x.scale), x.zero, float(like.scale), like.zero)
        y = Tensor(f"{x.name}.rescaled", x.shape, "int8", like.scale, like.zero)
        return self.out.append("lut", (i,), y, y.name, table=codes)

    def _operand(self, i: int, op: Op) -> int:
        """An activation, or a constant of an addition or product: symmetric codes, a single one as 127."""
        if i in self.made:
            return self.made[i]
        c = self.g.tensors[i]
        largest = float(np.abs(c.data).max())
        scale = np.float64(largest / 127) if largest else self.scales[op.inputs[0]][0]
        tensor = Tensor(c.name, c.shape, "int8", scale, 0)
        self.made[i] = self.out.add(replace(tensor, data=tensor.codes(c.data)))
        return self.made[i]

    def _weights(self, k: int, op: Op) -> tuple[int, ...]:
        """Weights and bias of a linear layer, the bias corrected by the mean error of the rounded weights."""
        g, axis = self.g, LINEAR[op.kind]
        w, x_scale = g.tensors[op.inputs[1]], float(self.scales[op.inputs[0]][0])
        bias = g.tensors[op.inputs[2]].data.astype(np.float64) if has_bias(op) else np.zeros(w.shape[axis])
        least = np.abs(bias) / (x_scale * BIAS_ROOM)  # a dead channel's bias needs a scale that can hold it
        codes = quantized_weights(w, axis, self.bits[w.name], self.method, least)
        if self.corrected:
            error = codes.real(codes.data) - w.data
            bias = bias - mean_output(op, error, self.observed.means[k])
        scale = x_scale * codes.scale
        rounded = np.clip(np.rint(bias / scale), -BIAS_ROOM, BIAS_ROOM).astype(np.int32)
        name = w.name.removesuffix(".weight") + ".bias"
        return self.out.add(codes), self.out.constant(name, rounded, scale=scale, axis=0)


def mean_output(op: Op, w: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """What weights add on average to each output channel, given the mean window of the input (KH, KW, I) or (I,)."""
    if op.kind == "depthwise2d":
        return (w * np.repeat(mean, w.shape[2] // mean.shape[2], axis=2)).sum((0, 1))
    if op.kind == "dense":
        return w @ mean
    outs, width = w.shape[0], w.shape[3]
    groups = mean.shape[2] // width
    return np.array(
        [np.vdot(w[o], mean[..., (g := o * groups // outs) * width : (g + 1) * width]) for o in range(outs)]
    )
