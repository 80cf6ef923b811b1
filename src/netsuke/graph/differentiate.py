"""Reverse-mode differentiation of a `QGraph` before it runs: one static graph that infers, differentiates and updates.

The same operators run forward in int8; then come the gradient of the loss by the int8 logits and the operators of
`ops/train.py` in float32, which follow MCUNetV3's training engine (Lin et al., NeurIPS 2022):

    1. every operator from the first trained layer on gets its gradient operators; a tensor with two readers gets the sum
    2. what no update needs is dropped: masks, gradients below the first trained layer, weight gradients outside the plan
    3. of a layer's saved input only the channels that the plan trains are copied; masks are one bit per element; only the
       trained channels of its weights are in RAM, and are merged into those in flash when the layer is run
    4. an update follows its gradient at once, so that no gradient outlives the layer below it

Inputs: those of the network, label (int32), rate (float32): the learning rate may change from step to step without a new build.
Outputs: the logits of the forward pass, and the probability that it gave to the label. Biases and weights of the plan, and
the step counter that drives the stochastic rounding, are variables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.interpret import Interpreter
from netsuke.graph.ir import Op, QGraph, Tensor
from netsuke.graph.ops.base import limits
from netsuke.graph.ops.conv import LINEAR, largest_bias, ratios
from netsuke.graph.ops.shape import one_scale
from netsuke.graph.ops.train import mix
from netsuke.graph.update_plan import UpdatePlan, first_op, head, kept_channels, layers, qas

DIFFERENTIABLE = (*LINEAR, "add", "avgpool2d", "reshape")


@dataclass(frozen=True)
class UpdateRule:
    """How codes are changed.

    scaled     quantization-aware scaling; without it gradients by codes are used as they are
    truncate   the released kernels' way: cut toward zero, wrap around; else round stochastically and saturate
    seed       of the rounding
    """

    scaled: bool = True
    truncate: bool = False
    seed: int = 0


def with_head(graph: QGraph, classes: int | None = None) -> QGraph:
    """The graph with a head for `classes` classes, ending in its logits: the first rows of the old head, as in MCUNetV3.

    Softmax and dequantization behind the head are dropped: the loss has its own. Raises NetsukeError when the head has
    fewer rows, or when something else stands behind it.
    """
    out, k = graph.copy(), head(graph)
    op = out.ops[k]
    w, y = out.tensors[op.inputs[1]], out.tensors[op.outputs[0]]
    asked = f"give {graph.name} a head for {classes} classes"
    for later in out.ops[k + 1 :]:
        if later.kind not in ("reshape", "softmax", "dequantize"):
            raise NetsukeError(
                asked, f"{later.name!r} ({later.kind}) stands behind the head {op.name!r}", "a plain head"
            )
    n = classes or w.shape[0]
    if op.kind == "depthwise2d" or y.size != w.shape[0] or not 2 <= n <= w.shape[0]:
        raise NetsukeError(asked, f"the head {op.name!r} has {w.shape[0]} rows", f"2 to {w.shape[0]} classes")
    if n == w.shape[0] and all(later.kind == "reshape" for later in out.ops[k + 1 :]) and (
        out.tensors[out.outputs[0]].shape == (1, n)
    ):  # fmt: skip
        return out  # it is as it should be, and its tensors keep their numbers
    inputs = [op.inputs[0], out.constant(w.name, w.data[:n], scale=_rows(w.scale, n), axis=0)]
    if len(op.inputs) > 2 and op.inputs[2] >= 0:
        b = out.tensors[op.inputs[2]]
        inputs.append(out.constant(b.name, b.data[:n]))
    made = out.add(Tensor(y.name, (*y.shape[:-1], n), "int8", y.scale, y.zero))
    out.ops[k:] = [Op(op.kind, tuple(inputs), (made,), dict(op.attrs), op.name)]
    if len(y.shape) != 2:
        logits = out.add(Tensor("logits", (1, n), "int8", y.scale, y.zero))
        out.ops.append(Op("reshape", (made,), (logits,), {}, "logits"))
        made = logits
    out.outputs = (made,)
    return out


def _rows(scale: np.ndarray, n: int) -> np.ndarray:
    return scale[:n] if scale.ndim else scale


def training_graph(
    graph: QGraph,
    plan: UpdatePlan,
    classes: int | None = None,
    rule: UpdateRule = UpdateRule(),
    early: bool = True,
) -> QGraph:
    """`graph` with the head `with_head` gives it, trained by `plan`, one image per run.

    early   updates directly follow their gradients; False keeps them all to the end (for comparison)

    Raises NetsukeError for a plan that does not suit the graph, and names an operator that has no gradient.
    """
    base = with_head(graph, classes)
    plan.check(base)
    if base.states:
        raise NetsukeError(f"train {graph.name}", "it has a state between runs", "a network without memory")
    return _Builder(base, plan, rule, early).build()


@dataclass
class _Builder:
    base: QGraph
    plan: UpdatePlan
    rule: UpdateRule
    early: bool
    masks: dict[int, int] = field(default_factory=dict)  # operator -> bits
    saved: dict[int, tuple[int, int, int]] = field(
        default_factory=dict
    )  # operator -> (input, variable, channels or -1)
    gradients: dict[int, int] = field(default_factory=dict)  # tensor -> gradient by its codes
    late: list[Op] = field(default_factory=list)
    salt: int = 0

    def build(self) -> QGraph:
        base = self.base
        g = self.g = QGraph(
            f"{base.name}.train", base.copy().tensors, [], base.inputs, meta=dict(base.meta)
        )  # fmt: skip
        numbers = layers(base)
        self.first = first_op(base, self.plan)
        self.ratio = {numbers[i]: r for i, r in self.plan.weights.items()} | {head(base): 1.0}
        label = g.add(Tensor("label", (1,), "int32"))
        self.rate = g.add(Tensor("rate", (1,), "float32"))
        self.step = g.constant("step", np.zeros(1, np.uint32), variable=True)
        for k, op in enumerate(base.ops):
            self._forward(k, op)
        logits = base.outputs[0]
        scale = float(g.tensors[logits].scale)
        exps = g.constant("exps", np.exp(-scale * np.arange(256)).astype(np.float32))
        chance = g.add(Tensor("chance", (1,), "float32"))
        first = g.add(Tensor("d.logits", g.tensors[logits].shape, "float32"))
        g.ops.append(Op("loss_gradient", (logits, label, exps), (first, chance), {}, "loss"))
        self.gradients[logits] = first
        for k in range(len(base.ops) - 1, self.first - 1, -1):
            self._backward(k, base.ops[k])
        g.ops += self.late
        g.ops.append(Op("count_step", (self.step,), (self.step,), {}, "step"))
        g.inputs, g.outputs = (*base.inputs, label, self.rate), (logits, chance)
        g.meta |= {
            "trains": True,
            "plan": {"n_bias": self.plan.n_bias, "weights": {str(k): v for k, v in self.plan.weights.items()}},
        }
        g.meta["merged"] = {
            str(v): [self.base.ops[k].inputs[1], kept] for k, (_, v, kept) in self.saved.items() if kept >= 0
        }
        return drop_dead(g).check()

    def _forward(self, k: int, op: Op) -> None:
        """The operator, with what its gradient will need saved beside it."""
        g = self.g
        if k >= self.first:
            if op.kind not in DIFFERENTIABLE:
                raise NetsukeError(
                    f"train {self.base.name}", f"the operator {op.name!r} ({op.kind}) has no gradient",
                    ", ".join(DIFFERENTIABLE), "train only layers behind it",
                )  # fmt: skip
            if op.kind in LINEAR:
                self._make_variable(k, op)
                op = replace(op, inputs=(op.inputs[0], self._weights(k, op), op.inputs[2]))
        g.ops.append(op)
        if k < self.first or op.kind == "reshape" or (op.kind == "avgpool2d" and not clips(g, op)):
            return
        y = g.tensors[op.outputs[0]]
        low, high = (int(v) for v in limits(g, op))
        bits = Tensor(f"{y.name}.mask", (1, -(-y.size // 8)), "uint8")
        self.masks[k] = g.append("clip_mask", (op.outputs[0],), bits, low=low, high=high)

    def _make_variable(self, k: int, op: Op) -> None:
        g = self.g
        w, x = g.tensors[op.inputs[1]], g.tensors[op.inputs[0]]
        groups = op.attrs.get("groups", 1)
        if w.dtype != "int8" or groups != 1 or tuple(op.attrs.get("dilation", (1, 1))) != (1, 1) or (
            op.kind == "depthwise2d" and w.shape[-1] != x.shape[-1]
        ):  # fmt: skip
            raise NetsukeError(
                f"train {self.base.name}", f"the layer {op.name!r} has {w.dtype} weights, {groups} groups or dilation",
                "int8, one group or depthwise", "train only layers behind it",
            )  # fmt: skip
        if len(op.inputs) < 3 or op.inputs[2] < 0:
            raise NetsukeError(
                f"train {self.base.name}", f"the layer {op.name!r} has no bias", "a bias", "add one of zeros"
            )
        room = int(np.min(largest_bias(Tensor("", w.shape, variable=True), op.kind)))
        b = g.tensors[op.inputs[2]]
        b.variable, b.data = True, np.clip(b.data.astype(np.int64), -room, room).astype(np.int32)
        if (ratio := self.ratio.get(k, 0.0)) == 0:
            return
        if ratio == 1:
            w.variable = True
            self.saved[k] = op.inputs[0], op.inputs[1], -1
            return
        if w.shape[-1] != x.shape[-1]:
            raise NetsukeError(
                f"train {self.base.name}", f"the layer {op.name!r} flattens {x.shape}, so its inputs are no channels",
                "the ratio 1 for it",
            )  # fmt: skip
        channels = kept_channels(self.base, op, ratio)
        kept = g.constant(f"{op.name}.kept", channels)
        scale = w.scale[channels] if w.scale.ndim and w.axis == len(w.shape) - 1 else w.scale
        trained = replace(w, name=f"{w.name}.kept", data=w.data[..., channels].copy(), scale=scale, variable=True)
        trained.shape = trained.data.shape
        picked = Tensor(f"{x.name}.kept", (*x.shape[:-1], len(channels)), "int8", x.scale, x.zero)
        seen = g.append("pick_channels", (op.inputs[0], kept), picked)
        self.saved[k] = seen, g.add(trained), kept

    def _weights(self, k: int, op: Op) -> int:
        """The weights that a layer reads. Merged ones have four bytes to spare behind them, as constants have."""
        g, w = self.g, op.inputs[1]
        if k not in self.saved or (channels := self.saved[k][2]) < 0:
            return w
        t = g.tensors[w]
        room = g.add(Tensor(f"{t.name}.room", (t.size + 4,), "int8"))
        merged = replace(t, name=f"{t.name}.merged", data=None, view=(room, 0))
        return g.append("merge_channels", (w, self.saved[k][1], channels), merged)

    def _backward(self, k: int, op: Op) -> None:
        g = self.g
        if op.outputs[0] not in self.gradients:
            raise NetsukeError(
                f"train {self.base.name}", f"the output of {op.name!r} does not reach the logits", "one head"
            )
        dy = self.gradients.pop(op.outputs[0])
        x = g.tensors[op.inputs[0]]
        if op.kind == "reshape":
            self._collect(op.inputs[0], g.append("reshape", (dy,), _like(x)))
        elif op.kind == "avgpool2d":
            if k in self.masks:
                dy = self._clipped(k, op, dy, op.inputs[0])
            self._collect(op.inputs[0], g.append("pool_gradient", (dy,), _like(x), factor=mean_factor(g, op)))
        elif op.kind == "add":
            y = g.tensors[op.outputs[0]]
            if any(g.tensors[i].shape != y.shape or g.tensors[i].constant for i in op.inputs):
                raise NetsukeError(
                    f"train {self.base.name}", f"the addition {op.name!r} broadcasts", "two tensors of one shape",
                    "train only layers behind it",
                )  # fmt: skip
            for i in op.inputs:
                self._collect(i, self._clipped(k, op, dy, i))
        else:
            self._layer(k, op, dy, x)

    def _clipped(self, k: int, op: Op, dy: int, source: int) -> int:
        """The gradient of an output by its codes as one by those of `source`, 0 where the output was clipped."""
        g, y = self.g, self.g.tensors[op.outputs[0]]
        e = g.constant(f"{op.name}.e", np.array([g.tensors[source].scale / y.scale], np.float32))
        return g.append("clip_gradient", (dy, self.masks[k], e), _like(y))

    def _layer(self, k: int, op: Op, dy: int, x: Tensor) -> None:
        g = self.g
        y = g.tensors[op.outputs[0]]
        e = g.constant(f"{op.name}.e", ratios(self.base, op).astype(np.float32))
        conv = g.append("clip_gradient", (dy, self.masks[k], e), Tensor(f"d.{op.name}", y.shape, "float32"))
        geo = {"stride": op.attrs.get("stride", (1, 1)), "pad": op.attrs.get("pad", (0, 0, 0, 0))}
        depthwise = op.kind == "depthwise2d"
        kind = "depthwise_gradient" if depthwise else "conv_gradient"
        self._collect(op.inputs[0], g.append(kind, (conv, self._weights(k, op)), _like(x), **geo))
        updates = self.late if not self.early else g.ops
        w_factor, b_factor = (f.astype(np.float32) for f in qas(self.base, op))
        if not self.rule.scaled:
            w_factor = b_factor = np.ones_like(w_factor)
        if k in self.saved:
            seen, trained, kept = self.saved[k]
            if depthwise and kept >= 0:
                w_factor = w_factor[g.tensors[kept].data]
            s = g.constant(f"{op.name}.weight.s", w_factor)
            channels = (kept,) if depthwise else ()
            inputs = (conv, seen, trained, *channels, s, self.rate, self.step)
            kind = "depthwise_update" if depthwise else "conv_update"
            updates.append(Op(kind, inputs, (trained,), geo | self._rounding(), f"{op.name}.weight"))
        s = g.constant(f"{op.name}.bias.s", b_factor)
        room = int(np.min(largest_bias(Tensor("", g.tensors[op.inputs[1]].shape, variable=True), op.kind)))
        attrs = {"room": room} | self._rounding()
        inputs = (conv, op.inputs[2], s, self.rate, self.step)
        updates.append(Op("bias_update", inputs, (op.inputs[2],), attrs, f"{op.name}.bias"))

    def _rounding(self) -> dict[str, int | bool]:
        """Attributes of an update; every one has a key of its own, so that no two share their random numbers."""
        self.salt += 1
        key = int(mix(np.array([self.rule.seed * 1009 + self.salt], np.uint64).astype(np.uint32))[0])
        return {"key": key, "truncate": self.rule.truncate}

    def _collect(self, tensor: int, gradient: int) -> None:
        """Adds to the gradient of a tensor that has another reader."""
        if (before := self.gradients.get(tensor)) is not None:
            gradient = self.g.append("add", (gradient, before), _like(self.g.tensors[tensor]))
        self.gradients[tensor] = gradient


def clips(graph: QGraph, op: Op) -> bool:
    """Whether an int8 pool may clip what it averages: at one scale a mean lies among the codes that it is the mean of."""
    return not one_scale(graph, op) or bool({"low", "high"} & set(op.attrs))


def mean_factor(graph: QGraph, op: Op) -> float:
    """What a pooled element's gradient is multiplied by for each of its pixels.

    Raises NetsukeError unless the pool is one mean over all pixels.
    """
    x, y = graph.tensors[op.inputs[0]], graph.tensors[op.outputs[0]]
    if y.shape[1:3] != (1, 1) or tuple(op.attrs["window"]) != x.shape[1:3] or any(op.attrs.get("pad", ())):
        raise NetsukeError(
            f"train {graph.name}", f"the pool {op.name!r} maps {x.shape} to {y.shape}",
            "the mean over all pixels", "train only layers behind it",
        )  # fmt: skip
    return 1.0 / math.prod(x.shape[1:3])


def _like(t: Tensor) -> Tensor:
    return Tensor(f"d.{t.name}", t.shape, "float32")


def drop_dead(graph: QGraph) -> QGraph:
    """The graph without operators that neither reach an output nor change a variable."""
    out = graph.copy()
    wanted, kept = {graph.root(i) for i in graph.outputs}, []
    for op in reversed(graph.ops):
        if any(graph.root(i) in wanted or graph.tensors[i].variable for i in op.outputs):
            wanted |= {graph.root(i) for i in op.inputs if i >= 0}
            kept.append(op)
    out.ops = kept[::-1]
    return out


def trained_constants(graph: QGraph, variables: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Variables of a training graph, by tensor, as values of the constants of the network that it was made from."""
    out = {}
    for index, values in variables.items():
        if (merged := graph.meta["merged"].get(str(index))) is None:
            out[index] = values.copy()
            continue
        weights, kept = merged
        out[weights] = graph.tensors[weights].data.copy()
        out[weights][..., graph.tensors[kept].data] = values
    return out


class ReferenceTraining:
    """Runs a training graph in NumPy and keeps its variables between the steps."""

    def __init__(self, graph: QGraph):
        self.graph = graph.copy()
        self._interpreter = Interpreter(self.graph)

    def step(self, *sample: np.ndarray, label: int, rate: float) -> tuple[np.ndarray, float]:
        """One sample, int8 (H, W, C): (its logits before the update, int8 (1, K); the probability of its label)."""
        g = self.graph

        def keep(k: int, outs: tuple[np.ndarray, ...]) -> None:
            for i, out in zip(g.ops[k].outputs, outs):
                if g.tensors[i].variable:
                    g.tensors[i].data = out

        inputs = np.array([label], np.int32), np.array([rate], np.float32)
        logits, chance = self._interpreter.run(*(x[None] for x in sample), *inputs, on_op=keep)
        return logits, float(chance[0])

    def variables(self) -> dict[str, np.ndarray]:
        """By name; the trained channels of a layer's weights end in ".kept"."""
        return {t.name: t.data for t in self.graph.tensors if t.variable}
