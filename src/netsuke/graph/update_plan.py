"""`UpdatePlan`: which biases and weights of a graph are trained, as MCUNetV3 writes it (Lin et al., NeurIPS 2022).

A plan is (n, {layer: ratio}): the biases of the last n layers are trained, and for some of these layers the weights of a
share of their input channels, those of the largest norm. Layers are convolutions and fully connected layers, numbered from
the input; the last one of the graph is the head, which is always trained and has no number in a plan.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.ir import Op, QGraph
from netsuke.graph.ops.conv import LINEAR
from netsuke.models.files import read_json

RATIOS = (1.0, 0.5, 0.25, 0.125)


@dataclass(frozen=True)
class UpdatePlan:
    """`n_bias` last layers train their biases; `weights` maps layers to the trained share of their input channels."""

    n_bias: int
    weights: dict[int, float] = field(default_factory=dict)
    name: str = ""

    def to_json(self) -> str:
        rows = {str(k): v for k, v in sorted(self.weights.items())}
        return json.dumps(
            {"format": "netsuke-update-plan-1", "name": self.name, "n_bias": self.n_bias, "weights": rows}
        )

    @classmethod
    def from_json(cls, path: Path) -> UpdatePlan:
        """Raises NetsukeError for a file that holds no plan. Whether it suits a graph is said by `check`."""
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, d: dict[str, Any], where: str = "the plan") -> UpdatePlan:
        try:
            weights = {int(k): float(v) for k, v in d.get("weights", {}).items()}
            return cls(int(d["n_bias"]), weights, str(d.get("name", "")))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise NetsukeError(
                f"read {where}", f"it is no update plan ({e})", '{"n_bias": 20, "weights": {"24": 0.25, "27": 0.5}}'
            ) from None

    def check(self, graph: QGraph) -> UpdatePlan:
        """This plan. Raises NetsukeError that names the layer when it does not suit `graph`."""
        ops = layers(graph)
        n, asked = len(ops), f"train {graph.name} by the plan {self.name or self.to_json()}"
        if not 0 <= self.n_bias <= n:
            raise NetsukeError(asked, f"{self.n_bias} layers are to train their biases", f"0 to {n}")
        for layer, ratio in self.weights.items():
            if not 0 <= layer < n:
                raise NetsukeError(asked, f"there is no layer {layer}", f"0 to {n - 1}, and the head is always trained")
            name = f"layer {layer} ({graph.ops[ops[layer]].name})"
            if layer < n - self.n_bias:
                raise NetsukeError(
                    asked, f"the weights of {name} are to be trained, but gradients end at layer {n - self.n_bias}",
                    f"layers {n - self.n_bias} to {n - 1}", f"n_bias of {n - layer} or more",
                )  # fmt: skip
            channels = inputs_of(graph, graph.ops[ops[layer]])
            if ratio not in RATIOS or channels * ratio != int(channels * ratio):
                fits = [r for r in RATIOS if channels * r == int(channels * r)]
                raise NetsukeError(
                    asked, f"{name} has {channels} input channels and the ratio {ratio:g}",
                    " or ".join(f"{r:g}" for r in fits),
                )  # fmt: skip
        return self


def full(graph: QGraph) -> UpdatePlan:
    """Everything is trained."""
    return last(graph, len(layers(graph)))


def last(graph: QGraph, k: int) -> UpdatePlan:
    """Biases and all weights of the last k layers before the head."""
    n = len(layers(graph))
    return UpdatePlan(k, {i: 1.0 for i in range(n - k, n)}, f"last-{k}")


def layers(graph: QGraph) -> list[int]:
    """Indices of the operators that a plan numbers: layers with weights from the input on, without the head."""
    return [k for k, op in enumerate(graph.ops) if op.kind in LINEAR][:-1]


def head(graph: QGraph) -> int:
    """Index of the operator that is the head. Raises NetsukeError in a graph without layers."""
    found = [k for k, op in enumerate(graph.ops) if op.kind in LINEAR]
    if not found:
        raise NetsukeError(f"train {graph.name}", "it has no layer with weights", "convolutions or dense layers")
    return found[-1]


def first_op(graph: QGraph, plan: UpdatePlan) -> int:
    """Index of the first operator whose parameters change; what comes before is the same for ever."""
    return (layers(graph)[-plan.n_bias :] if plan.n_bias else [head(graph)])[0]


def inputs_of(graph: QGraph, op: Op) -> int:
    """Channels along which a ratio selects: inputs, which for a depthwise layer are its channels."""
    w = graph.tensors[op.inputs[1]]
    return w.shape[-1]


def kept_channels(graph: QGraph, op: Op, ratio: float) -> np.ndarray:
    """int32, ascending: the share `ratio` of input channels whose weight codes have the largest norm."""
    w = graph.tensors[op.inputs[1]].data.astype(np.float64)
    norm = np.sqrt((w.reshape(-1, w.shape[-1]) ** 2).sum(0))
    return np.sort(np.argsort(-norm, kind="stable")[: int(len(norm) * ratio)]).astype(np.int32)


def qas(graph: QGraph, op: Op) -> tuple[np.ndarray, np.ndarray]:
    """Quantization-aware scaling: float64 factors per output channel for gradients by weight and bias codes.

    A real weight is s_w q, so a step of size r along dL/dW changes q by r dL/dq / s_w^2; a bias code counts s_w s_x. Empty
    channels (their scale is next to nothing) get 0: they would be divided by 1e-17.
    """
    w, x = graph.tensors[op.inputs[1]], graph.tensors[op.inputs[0]]
    outs = w.shape[-1] if op.kind == "depthwise2d" else w.shape[0]
    scale = np.broadcast_to(np.asarray(w.scale, np.float64), (outs,))
    alive = scale > 1e-5 * scale.max()
    weight = np.where(alive, 1 / np.where(alive, scale, 1) ** 2, 0.0)
    return weight, weight / float(x.scale) ** 2
