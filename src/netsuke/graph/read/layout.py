"""What readers of float networks share: a builder that speaks the file's axes and keeps images as (N, H, W, C) inside.

A `Value` is a tensor with the order in which its axes lie. Importing a channels-first network therefore costs one transpose
at its input and none after: transposing is a new order, a flattened image remembers its order so that the next dense layer's
columns are permuted instead, and only an operator that needs another order (or an output) moves elements.
Sequences (N, T, C) are convolved and pooled as images (N, 1, T, C): a window's values then lie side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.ir import QGraph, Tensor
from netsuke.graph.ops.base import axis_of, window
from netsuke.graph.read.tidy import tidy


@dataclass(frozen=True)
class Value:
    """An activation as its file sees it.

    shape   the file's axes; order  axis `order[p]` of the file is axis p of the tensor
    flat    (shape, order) of the image whose elements these features are, when they lie in that order
    """

    index: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    flat: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def lies(self) -> tuple[int, ...]:
        """The tensor's own shape."""
        return tuple(self.shape[a] for a in self.order)


class Builder:
    """Appends float operators to a graph. Methods take the file's axes; `name` is the layer's and stands in errors.

    asked           "read model.onnx": the first part of every refusal
    channels_first  whether the file's images are (N, C, H, W) and its sequences (N, C, T)
    noun            what the file calls its parts: "layer", "operator"
    """

    def __init__(self, name: str, asked: str, channels_first: bool, noun: str = "layer"):
        self.graph, self.asked, self.channels_first, self.noun = QGraph(name), asked, channels_first, noun
        self._names: set[str] = set()
        self._moved: dict[tuple[int, tuple[int, ...]], Value] = {}

    def refuse(self, name: str, found: str, allowed: str = "", attempt: str = "") -> NetsukeError:
        """The error to raise for the layer or operator `name`."""
        return NetsukeError(self.asked, f"the {self.noun} {name!r}: {found}", allowed, attempt)

    def input(self, name: str, shape: Sequence[int]) -> Value:
        index = self.graph.add(Tensor(self._name(name), tuple(map(int, shape)), "float32"))
        self.graph.inputs += (index,)
        return Value(index, self.graph.tensors[index].shape, tuple(range(len(shape))))

    def finish(self, outputs: Sequence[Value], meta: dict[str, Any]) -> QGraph:
        """The checked graph: outputs in the file's order of axes, norms and activations folded (`tidy`)."""
        self.graph.outputs = tuple(self.plain(v).index for v in outputs)
        self.graph.meta = meta
        return tidy(self.graph).check()

    # Linear layers

    def conv(
        self, v: Value, w: np.ndarray, b: np.ndarray | None, name: str, *, depthwise: bool = False, groups: int = 1,
        stride: Sequence[int] = (1, 1), pad: Sequence[int] | str = (0, 0, 0, 0), dilation: Sequence[int] = (1, 1),
    ) -> Value:  # fmt: skip
        """w (O, KH, KW, I) or, depthwise, (KH, KW, C); pad (top, bottom, left, right), "same" or "valid" (TensorFlow's)."""
        x, shape = self._image(v, name)
        kernel = w.shape[:2] if depthwise else w.shape[1:3]
        pad = _padding(pad, shape[1:3], kernel, stride, dilation)
        size = [window(shape[1 + k], kernel[k], stride[k], pad[2 * k], pad[2 * k + 1], dilation[k]) for k in (0, 1)]
        channels = w.shape[2] if depthwise else w.shape[0]
        attrs = {"stride": tuple(stride), "pad": tuple(pad), "dilation": tuple(dilation)}
        if not depthwise:
            attrs["groups"] = groups
        constants = self._weights(name, w, b)
        y = self._emit(
            "depthwise2d" if depthwise else "conv2d", (x, *constants), (shape[0], *size, channels), name, **attrs
        )
        return self._from_image(y, v, (shape[0], *size, channels), name)

    def dense(self, v: Value, w: np.ndarray, b: np.ndarray | None, name: str) -> Value:
        """w (O, I) over the file's last axis."""
        if v.shape[-1] != w.shape[1]:
            raise self.refuse(name, f"weights {w.shape} do not fit the input {v.shape}")
        if v.flat:
            w = w[:, _features(*v.flat)]
        else:
            v = self.plain(v)
        shape = (*v.shape[:-1], w.shape[0])
        y = self._emit("dense", (v.index, *self._weights(name, w, b)), shape, name)
        return Value(y, shape, tuple(range(len(shape))))

    def norm(self, v: Value, gain: np.ndarray, shift: np.ndarray, name: str) -> Value:
        """gain * x + shift per channel, as a 1 x 1 depthwise convolution; `tidy` folds it into a linear layer before it."""
        if v.flat or len(v.shape) == 2:
            if v.flat:
                gain, shift = gain[_features(*v.flat)], shift[_features(*v.flat)]
            as_image = (v.shape[0], 1, 1, v.shape[1])
            x = self._emit("reshape", (v.index,), as_image, f"{name}.in")
            y = self._emit("depthwise2d", (x, *self._weights(name, gain[None, None], shift)), as_image, name)
            return replace(v, index=self._emit("reshape", (y,), v.shape, f"{name}.out"))
        return self.conv(v, gain[None, None], shift, name, depthwise=True)

    def recurrent(self, kind: str, v: Value, parts: Sequence[np.ndarray], name: str, units: int, **attrs: Any) -> Value:
        """v (N, T, I); parts w, u and perhaps b as in `ops/recurrent.py`."""
        v = self.plain(v)
        if len(v.shape) != 3:
            raise self.refuse(name, f"its input has the shape {v.shape}", "(batch, time, features)")
        names = ("weight", "recurrent_weight", "bias")
        constants = [self._constant(f"{name}.{n}", p) for n, p in zip(names, parts)]
        shape = (*v.shape[:2], units) if attrs.get("return_sequences") else (v.shape[0], units)
        return Value(
            self._emit(kind, (v.index, *constants), shape, name, **attrs), shape, tuple(range(len(shape)))
        )  # fmt: skip

    # Elements

    def unary(self, v: Value, function: str, name: str) -> Value:
        return v if function == "linear" else replace(
            v, index=self._emit("unary", (v.index,), v.lies, name, function=function)
        )  # fmt: skip

    def clip(self, v: Value, low: float, high: float, name: str) -> Value:
        """Limits are what linear operators and additions carry: a clip of its own is the addition of zero."""
        attrs = {k: float(x) for k, x in (("low", low), ("high", high)) if math.isfinite(x)}
        zero = self._constant(f"{name}.zero", np.zeros(1, np.float32))
        return replace(v, index=self._emit("add", (v.index, zero), v.lies, name, **attrs)) if attrs else v

    def leaky(self, v: Value, slope: float, name: str) -> Value:
        """x where x > 0, else slope * x: the function of that name, or slope * x + (1 - slope) * relu(x)."""
        if abs(slope - 0.01) < 1e-7:
            return self.unary(v, "leaky_relu", name)
        line = self.binary("mul", v, slope, f"{name}.slope")
        positive = self.binary("mul", self.unary(v, "relu", f"{name}.relu"), 1 - slope, f"{name}.positive")
        return self.binary("add", line, positive, name)

    def binary(self, kind: str, a: Value, b: Value | np.ndarray | float, name: str) -> Value:
        """`add` or `mul`; b broadcasts to a or, of two values, a to b."""
        if isinstance(b, Value) and math.prod(b.shape) > math.prod(a.shape):
            a, b = b, a
        b = b if isinstance(b, Value) else np.asarray(b, np.float64)
        shape = b.shape
        if len(shape) > len(a.shape) or np.broadcast_shapes(a.shape, shape) != a.shape:
            raise self.refuse(name, f"shapes {a.shape} and {shape} do not broadcast to the first", "equal shapes")
        if isinstance(b, np.ndarray):
            if a.flat:
                full = np.ones(a.shape[1]) * b.reshape(-1)
                b = full[_features(*a.flat)] if b.size > 1 else b
            elif b.size > 1:
                b = b.reshape((1,) * (len(a.shape) - b.ndim) + b.shape).transpose(a.order)
            other = self._constant(f"{name}.constant", b.reshape(-1) if b.size == 1 else b)
        else:
            if a.flat != b.flat:
                a, b = self.plain(a), self.plain(b)
            if len(b.shape) < len(a.shape):
                b = self.reshape(b, (1,) * (len(a.shape) - len(b.shape)) + b.shape, name)
            other = self.ordered(b, a.order).index if a.flat is None else b.index
        return replace(a, index=self._emit(kind, (a.index, other), a.lies, name))

    def softmax(self, v: Value, axis: int, name: str, beta: float = 1.0) -> Value:
        axis = axis_of(axis, len(v.shape))
        v = self.plain(v) if v.flat else v
        if v.order[-1] != axis:
            v = self.ordered(v, (*(a for a in v.order if a != axis), axis))
        attrs = {} if beta == 1.0 else {"beta": beta}
        return replace(v, index=self._emit("softmax", (v.index,), v.lies, name, **attrs))

    # Windows

    def pool(
        self, kind: str, v: Value, size: Sequence[int] | None, name: str, stride: Sequence[int] | None = None,
        pad: Sequence[int] | str = (0, 0, 0, 0),
    ) -> Value:  # fmt: skip
        """`avgpool2d` (padding does not count) or `maxpool2d`; size None is the whole image."""
        x, shape = self._image(v, name)
        size = tuple(shape[1:3] if size is None else size)
        stride = size if stride is None else tuple(stride)
        pad = _padding(pad, shape[1:3], size, stride, (1, 1))
        out = [window(shape[1 + k], size[k], stride[k], pad[2 * k], pad[2 * k + 1]) for k in (0, 1)]
        y = self._emit(kind, (x,), (shape[0], *out, shape[3]), name, window=size, stride=stride, pad=tuple(pad))
        return self._from_image(y, v, (shape[0], *out, shape[3]), name)

    def mean(self, v: Value, dims: Sequence[int], keep: bool, name: str) -> Value:
        """The mean over one or two axes, where a batch and one axis of channels are left."""
        dims = sorted(axis_of(d, len(v.shape)) for d in dims)
        rest = [k for k in range(len(v.shape)) if k not in dims]
        if len(dims) not in (1, 2) or len(rest) != 2 or rest[0] != 0:
            raise self.refuse(
                name, f"it is a mean of {v.shape} over the axes {dims}", "means over time or height and width"
            )
        perm = (*rest, *dims) if self.channels_first else (0, *dims, rest[1])
        y = self.pool("avgpool2d", self.transpose(v, perm), None, name)
        shape = [1 if k in dims else n for k, n in enumerate(v.shape)]
        return self.reshape(y, shape if keep else [v.shape[k] for k in rest], f"{name}.out")

    # Moving elements

    def reshape(self, v: Value, shape: Sequence[int], name: str) -> Value:
        """The file's elements in another shape; -1 stands for what is left."""
        shape = tuple(map(int, shape))
        known = math.prod(n for n in shape if n != -1)
        if -1 in shape and known > 0:
            shape = tuple(math.prod(v.shape) // known if n == -1 else n for n in shape)
        if math.prod(shape) != math.prod(v.shape):
            raise self.refuse(name, f"it makes {shape} of {v.shape}")
        if shape == v.shape:
            return v
        flat = (v.shape[0], math.prod(v.shape[1:]))
        if not v.flat and _units_apart(shape) == _units_apart(v.shape):
            order = _same_order(v, shape)
            out = Value(v.index, shape, order)
            return replace(out, index=self._emit("reshape", (v.index,), out.lies, name))
        if shape == flat and not v.flat and not _in_order(v.shape, v.order, range(len(v.order))):
            index = self._emit("reshape", (v.index,), shape, name)
            return Value(index, shape, (0, 1), (v.shape, v.order))
        v = self.plain(v)
        return Value(self._emit("reshape", (v.index,), shape, name), shape, tuple(range(len(shape))))

    def transpose(self, v: Value, perm: Sequence[int]) -> Value:
        v = self.plain(v) if v.flat else v
        perm = [axis_of(p, len(v.shape)) for p in perm]
        return Value(v.index, tuple(v.shape[p] for p in perm), tuple(perm.index(a) for a in v.order))

    def concat(self, parts: Sequence[Value], axis: int, name: str) -> Value:
        head = self.plain(parts[0]) if parts[0].flat else parts[0]
        axis = axis_of(axis, len(head.shape))
        parts = [self.ordered(p, head.order) for p in (head, *parts[1:])]
        rest = {p.shape[:axis] + p.shape[axis + 1 :] for p in parts}
        if len(rest) > 1:
            raise self.refuse(name, f"it joins {[p.shape for p in parts]} along axis {axis}")
        shape = tuple(sum(p.shape[k] for p in parts) if k == axis else n for k, n in enumerate(head.shape))
        out = Value(head.index, shape, head.order)
        index = self._emit("concat", tuple(p.index for p in parts), out.lies, name, axis=head.order.index(axis))
        return replace(out, index=index)

    def pad(self, v: Value, pads: Sequence[tuple[int, int]], name: str) -> Value:
        """Zeros before and after each of the file's axes."""
        v = self.plain(v) if v.flat else v
        out = Value(v.index, tuple(n + a + b for n, (a, b) in zip(v.shape, pads)), v.order)
        lie = tuple(tuple(map(int, pads[a])) for a in v.order)
        return replace(out, index=self._emit("pad", (v.index,), out.lies, name, pads=lie))

    def slice(self, v: Value, begin: Sequence[int], shape: Sequence[int], stride: Sequence[int], name: str) -> Value:
        v = self.plain(v) if v.flat else v
        out = Value(v.index, tuple(shape), v.order)
        begin, stride = (tuple(int(x[a]) for a in v.order) for x in (begin, stride))
        return replace(out, index=self._emit("slice", (v.index,), out.lies, name, begin=begin, stride=stride))

    def plain(self, v: Value) -> Value:
        """The value with its elements in the file's order."""
        if v.flat:
            shape, order = v.flat
            image = Value(v.index, shape, order)
            index = self._emit("reshape", (v.index,), image.lies, f"{self.graph.tensors[v.index].name}.image")
            image = self.plain(replace(image, index=index))
            return self.reshape(image, v.shape, f"{self.graph.tensors[v.index].name}.flat")
        return self.ordered(v, tuple(range(len(v.shape))))

    def ordered(self, v: Value, order: tuple[int, ...]) -> Value:
        """The value with its axes in this order: nothing, a change of shape, or a transpose (once per value)."""
        if v.flat:
            v = self.plain(v)
        if v.order == order:
            return v
        if (v.index, order) not in self._moved:
            out, name = Value(v.index, v.shape, order), f"{self.graph.tensors[v.index].name}.moved"
            perm = tuple(v.order.index(a) for a in order)
            free = _in_order(v.shape, v.order, order)
            index = (
                self._emit("reshape", (v.index,), out.lies, name)
                if free
                else self._emit("transpose", (v.index,), out.lies, name, perm=perm)
            )
            self._moved[v.index, order] = replace(out, index=index)
        return self._moved[v.index, order]

    # Inside

    def _image(self, v: Value, name: str) -> tuple[int, tuple[int, ...]]:
        """(tensor, shape) of the value as (N, H, W, C)."""
        if len(v.shape) not in (3, 4):
            raise self.refuse(name, f"its input has the shape {v.shape}", "an image or a sequence")
        rank = len(v.shape)
        x = self.ordered(v, (0, *range(2, rank), 1) if self.channels_first else tuple(range(rank)))
        if rank == 4:
            return x.index, x.lies
        n, t, c = x.lies
        return self._emit("reshape", (x.index,), (n, 1, t, c), f"{name}.in"), (n, 1, t, c)

    def _from_image(self, y: int, like: Value, shape: tuple[int, ...], name: str) -> Value:
        """An (N, H, W, C) tensor as a value of the rank of `like`, in the file's axes."""
        if len(like.shape) == 3:
            shape = (shape[0], shape[2], shape[3])
            y = self._emit("reshape", (y,), shape, f"{name}.out")
        order = (0, *range(2, len(shape)), 1) if self.channels_first else tuple(range(len(shape)))
        return Value(y, tuple(shape[order.index(a)] for a in range(len(shape))), order)

    def _weights(self, name: str, w: np.ndarray, b: np.ndarray | None) -> tuple[int, ...]:
        weight = self._constant(f"{name}.weight", w)
        return (weight,) if b is None else (weight, self._constant(f"{name}.bias", b))

    def _constant(self, name: str, data: np.ndarray) -> int:
        with np.errstate(over="ignore"):  # infinities are refused by name in QGraph.check
            return self.graph.constant(self._name(name), np.ascontiguousarray(data, np.float32))

    def _emit(self, kind: str, inputs: tuple[int, ...], shape: Sequence[int], name: str, **attrs: Any) -> int:
        shape = tuple(map(int, shape))
        if min(shape, default=1) < 1:
            raise self.refuse(name, f"its result would have the shape {shape}", "a window that fits its input")
        return self.graph.append(kind, inputs, Tensor(self._name(name), shape, "float32"), name, **attrs)

    def _name(self, name: str) -> str:
        unique, k = name, 1
        while unique in self._names:
            k += 1
            unique = f"{name}_{k}"
        self._names.add(unique)
        return unique


def _features(shape: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    """For each feature as it lies, its place in the file's flattened image (the batch is 1)."""
    return np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(-1)


def _units_apart(shape: Sequence[int]) -> list[int]:
    return [n for n in shape if n != 1]


def _in_order(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two orders of axes lay the elements the same way: axes of length 1 do not count."""
    return [k for k in a if shape[k] != 1] == [k for k in b if shape[k] != 1]


def _same_order(v: Value, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The order of `shape`, which differs from the value's by axes of length 1 only, that moves nothing."""
    long = [k for k, n in enumerate(shape) if n != 1]
    partner = dict(zip((k for k, n in enumerate(v.shape) if n != 1), long))
    return (*(k for k, n in enumerate(shape) if n == 1), *(partner[a] for a in v.order if a in partner))


def _padding(
    pad: Sequence[int] | str, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """(top, bottom, left, right); "same" as TensorFlow pads: the odd one at the end."""
    if not isinstance(pad, str):
        return tuple(map(int, pad))
    out: list[int] = []
    for n, k, s, d in zip(size, kernel, stride, dilation):
        missing = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0) if pad == "same" else 0
        out += [missing // 2, missing - missing // 2]
    return tuple(out)
