"""A small dense network with its exact Jacobian and second derivatives: the model inside the predictive controller.

float32 mode follows csrc/ns_dense.c operation by operation (see arithmetic.py); float64 mode is the same formulas.
Shapes: B batch, I inputs, O outputs, D directions. Layer: y = f(W x + b); with codes, y = f(s (Q (c x)) + b), Q int8, s per
output, and in the first layer c per input: positions in metres and controls of order 1 share a row of codes only in units in
which both are of like size (without c the published network's int8 form is 1 mm off in one tick, with it 0.05 mm).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from netsuke.apps.control.arithmetic import ACTIVATIONS, Array, activate, curvature, fold, slope
from netsuke.errors import NetsukeError
from netsuke.graph.ir import Op, QGraph

REMEDY = "a chain of dense layers, each with one of these activations"


@dataclass(frozen=True)
class Layer:
    """weight (O, I): reals, or int8 codes when `scale` (O,) is there; bias (O,); unit (I,) or None multiplies the inputs."""

    name: str
    weight: Array
    bias: Array
    activation: str
    scale: Array | None = None
    unit: Array | None = None

    def real(self) -> Array:
        """The weights as reals, float64."""
        weight = self.weight.astype(np.float64)
        weight = weight if self.scale is None else weight * self.scale.astype(np.float64)[:, None]
        return weight if self.unit is None else weight * self.unit.astype(np.float64)

    def measure(self, x: Array, start: int = 0) -> Array:
        """Inputs (…, n) from number `start` on in the layer's units."""
        return x if self.unit is None else x * self.unit[start : start + x.shape[-1]]

    def finish(self, total: Array) -> Array:
        """From the products' sum (B, O) to the output."""
        scaled = total if self.scale is None else total * self.scale
        return activate(self.activation, scaled + self.bias)


@dataclass(frozen=True)
class DenseNetwork:
    """Layers in a type of number: float32 as the chip computes, or float64."""

    layers: tuple[Layer, ...]
    dtype: type = np.float64

    @classmethod
    def from_graph(cls, graph: QGraph, dtype: type = np.float64) -> DenseNetwork:
        """The network of a float graph of dense layers and activations, with float or int8 weights.

        Raises NetsukeError that names the first operator that is none of these.
        """
        asked, known, layers = f"control with the network {graph.name}", {graph.inputs[0]}, []
        for op in graph.ops:
            if len(graph.inputs) != 1 or len(graph.outputs) != 1 or op.inputs[0] not in known:
                raise NetsukeError(asked, f"the operator {op.name!r} makes it more than a chain", REMEDY)
            if op.kind == "dense":
                layers.append(_dense(graph, op, asked))
            elif op.kind == "unary" and layers and layers[-1].activation == "linear":
                layers[-1] = replace(layers[-1], activation=_known(op.attrs["function"], op, asked))
            elif op.kind != "reshape":
                raise NetsukeError(
                    asked, f"the operator {op.name!r} is of the kind {op.kind!r}", f"{REMEDY}: {', '.join(ACTIVATIONS)}",
                    "a dense model for the loop; other networks run through export --home c",
                )  # fmt: skip
            known = {op.outputs[0]}
        if not layers or graph.outputs[0] not in known:
            raise NetsukeError(asked, "it has no dense layer at its end", REMEDY)
        return cls(tuple(layers)).as_type(dtype)

    @property
    def ins(self) -> int:
        return self.layers[0].weight.shape[1]

    @property
    def outs(self) -> int:
        return self.layers[-1].weight.shape[0]

    def as_type(self, dtype: type) -> DenseNetwork:
        cast = [
            replace(
                n, weight=n.weight if n.scale is not None else n.weight.astype(dtype), bias=n.bias.astype(dtype),
                scale=None if n.scale is None else n.scale.astype(dtype),
                unit=None if n.unit is None else n.unit.astype(dtype),
            )
            for n in self.layers
        ]  # fmt: skip
        return DenseNetwork(tuple(cast), dtype)

    def frozen(self, x: Array, start: int) -> Array:
        """What inputs from `start` on (their values x) add to the first layer's sums, (O,)."""
        w = self.layers[0].weight[:, start:].astype(self.dtype)
        return fold(np.zeros(len(w), self.dtype), (w * self.layers[0].measure(np.asarray(x, self.dtype), start)).T)

    def forward(self, x: Array, sums: Array | None = None) -> list[Array]:
        """Every layer's output (B, O) for x (B, I); with `sums` from `frozen`, x are the inputs before those."""
        out, total = [], np.zeros(len(self.layers[0].weight), self.dtype) if sums is None else sums
        for layer in self.layers:
            w, x = layer.weight[:, : x.shape[1]].astype(self.dtype), layer.measure(x)
            x = layer.finish(fold(total, x.T[:, :, None] * w.T[:, None, :]))
            out.append(x)
            total = self.dtype(0)
        return out

    def jacobian(self, values: list[Array], ins: int) -> Array:
        """d outputs / d the first `ins` inputs, (B, O, ins), at the pass that gave `values`."""
        back = None
        for n in range(len(self.layers) - 1, -1, -1):
            layer = self.layers[n]
            d = slope(layer.activation, values[n])
            w = layer.weight[:, : ins if n == 0 else None].astype(self.dtype)
            t = np.broadcast_to(d[:, :, None], (*d.shape, 1)) if back is None else d[:, None, :] * back
            if layer.scale is not None:
                t = t * (layer.scale[:, None] if back is None else layer.scale)
            if back is None:
                back = t * w
            else:  # (K, B, O, I) terms, summed over K in order
                back = fold(self.dtype(0), np.moveaxis(t, 2, 0)[..., None] * w[:, None, None, :])
        return back if self.layers[0].unit is None else back * self.layers[0].unit[:ins]

    def second(self, values: list[Array], tangent: Array, bend: Array) -> tuple[Array, Array]:
        """Pushes first (B, I, D) and second derivatives (B, I, D, D) of the inputs through: those of the outputs."""
        for layer, y in zip(self.layers, values):
            w = layer.real()[:, : tangent.shape[1]]
            d, dd = slope(layer.activation, y)[..., None], curvature(layer.activation, y)[..., None, None]
            tangent, bend = np.einsum("oi,bid->bod", w, tangent), np.einsum("oi,bide->bode", w, bend)
            bend = dd * tangent[..., :, None] * tangent[..., None, :] + d[..., None] * bend
            tangent = d * tangent
        return tangent, bend

    def varied(self, by: float, seed: int) -> DenseNetwork:
        """Every weight and bias times its own factor in 1 ± by: a plant that differs from its model."""
        rng = np.random.default_rng(seed)

        def vary(a: Array) -> Array:
            return a * (1 + rng.uniform(-by, by, a.shape))

        layers = [replace(n, weight=vary(n.real()), bias=vary(n.bias), scale=None, unit=None) for n in self.layers]
        return DenseNetwork(tuple(layers)).as_type(self.dtype)

    def quantized(self, ranges: Array) -> DenseNetwork:
        """int8 weights, symmetric, one scale per output; biases and activations stay float. ranges (I,): largest magnitude
        of every input. An input's unit balances its weights' size against its range, half each (Lin et al. 2024)."""
        layers = []
        for number, n in enumerate(self.layers):
            weight, unit = n.real(), None
            if number == 0:
                unit = np.sqrt(np.maximum(np.abs(weight).max(axis=0), 1e-9) / np.asarray(ranges, np.float64))
                weight = weight / unit
            scale = np.maximum(np.abs(weight).max(axis=1) / 127, 1e-12)
            codes = np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8)
            layers.append(replace(n, weight=codes, scale=scale, unit=unit))
        return DenseNetwork(tuple(layers)).as_type(self.dtype)


def _known(function: str, op: Op, asked: str) -> str:
    if function not in ACTIVATIONS:
        raise NetsukeError(asked, f"the activation of {op.name!r} is {function!r}", ", ".join(ACTIVATIONS))
    return function


def _dense(graph: QGraph, op: Op, asked: str) -> Layer:
    weight = graph.tensors[op.inputs[1]]
    bias = graph.tensors[op.inputs[2]].data if len(op.inputs) > 2 and op.inputs[2] >= 0 else np.zeros(weight.shape[0])
    limits = (op.attrs.get("low", -math.inf), op.attrs.get("high", math.inf))
    if limits not in ((-math.inf, math.inf), (0, math.inf)) or graph.tensors[op.inputs[0]].dtype != "float32":
        raise NetsukeError(
            asked, f"the layer {op.name!r} has integer activations or is clipped to {limits}", "float activations",
            "the float model; weights alone may be int8",
        )  # fmt: skip
    scale = None if weight.scale is None else np.broadcast_to(weight.scale, weight.shape[:1])
    return Layer(op.name, weight.data, bias, "relu" if limits[0] == 0 else "linear", scale)
