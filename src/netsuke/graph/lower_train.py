"""Kernel calls of the operators of training (`ops/train.py`, `kernels/train.c`)."""

from __future__ import annotations

import numpy as np

from netsuke.graph.ir import Op
from netsuke.graph.lower import Lowering, Rule
from netsuke.graph.lower_ops import _weights
from netsuke.graph.ops.train import geometry, update_geometry

_GEOMETRY = ("h", "w", "c", "oh", "ow", "o", "kh", "kw", "sy", "sx", "top", "left")


def _call(lowering: Lowering, op: Op, params: dict[str, int | float], outputs: bool = True) -> None:
    """The kernel of the operator's name with its inputs, then its outputs unless it updates an input in place."""
    args = [lowering.tensor(i) for i in (*op.inputs, *(op.outputs if outputs else ()))]
    lowering.call(f"ns_{op.kind}", params, *args)


def _clip_mask(lowering: Lowering, op: Op) -> None:
    n = lowering.graph.tensors[op.inputs[0]].size
    _call(lowering, op, {"n": n, "low": op.attrs["low"], "high": op.attrs["high"]})


def _pick_channels(lowering: Lowering, op: Op) -> None:
    x, kept = (lowering.graph.tensors[i] for i in op.inputs)
    _call(lowering, op, {"rows": x.size // x.shape[-1], "c": x.shape[-1], "kept": kept.size})


def _loss_gradient(lowering: Lowering, op: Op) -> None:
    x = lowering.graph.tensors[op.inputs[0]]
    _call(lowering, op, {"n": x.size, "scale": float(np.float32(float(x.scale)))})


def _clip_gradient(lowering: Lowering, op: Op) -> None:
    g, e = (lowering.graph.tensors[op.inputs[k]] for k in (0, 2))
    _call(lowering, op, {"n": g.size, "c": e.size})


def _pool_gradient(lowering: Lowering, op: Op) -> None:
    y = lowering.graph.tensors[op.outputs[0]]
    params = {"rows": y.size // y.shape[-1], "c": y.shape[-1], "factor": float(np.float32(op.attrs["factor"]))}
    _call(lowering, op, params)


def _gradient(lowering: Lowering, op: Op) -> None:
    """The weights are the table that the layer's forward kernel reads: they are in flash once."""
    w, y = (lowering.graph.tensors[i] for i in (op.inputs[1], op.outputs[0]))
    params = dict(zip(_GEOMETRY, geometry(y.shape, w.shape, op.kind == "depthwise_gradient", op)))
    g, out = lowering.tensor(op.inputs[0]), lowering.tensor(op.outputs[0])
    lowering.call(f"ns_{op.kind}", params, g, _weights(lowering, op), out)


def _update(lowering: Lowering, op: Op) -> None:
    g, x = (lowering.graph.tensors[op.inputs[k]] for k in (0, 1))
    params = dict(zip(_GEOMETRY, update_geometry(lowering.graph, op))) | {"zx": x.zero} | _rounding(op)
    if op.kind == "depthwise_update":
        params["row"] = g.shape[-1]
    _call(lowering, op, params, outputs=False)


def _merge_channels(lowering: Lowering, op: Op) -> None:
    w, kept = (lowering.graph.tensors[i] for i in op.inputs[:2])
    _call(lowering, op, {"rows": w.size // w.shape[-1], "c": w.shape[-1], "kept": kept.shape[-1]})


def _bias_update(lowering: Lowering, op: Op) -> None:
    g, b = (lowering.graph.tensors[i] for i in op.inputs[:2])
    params = {"rows": g.size // b.size, "o": b.size, "room": op.attrs["room"]}
    _call(lowering, op, params | _rounding(op), outputs=False)


def _rounding(op: Op) -> dict[str, int]:
    """The key as the int32 of the same bits."""
    key = int(np.uint32(op.attrs["key"]).view(np.int32))
    return {"key": key, "truncate": int(op.attrs.get("truncate", False))}


def _count_step(lowering: Lowering, op: Op) -> None:
    _call(lowering, op, {"by": 1}, outputs=False)


RULES = {
    "clip_mask": Rule(_clip_mask), "pick_channels": Rule(_pick_channels), "loss_gradient": Rule(_loss_gradient),
    "clip_gradient": Rule(_clip_gradient), "pool_gradient": Rule(_pool_gradient), "conv_gradient": Rule(_gradient),
    "depthwise_gradient": Rule(_gradient), "conv_update": Rule(_update), "depthwise_update": Rule(_update),
    "bias_update": Rule(_bias_update), "merge_channels": Rule(_merge_channels), "count_step": Rule(_count_step),
}  # fmt: skip
