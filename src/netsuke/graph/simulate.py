"""`to_torch`: a `QGraph` as a PyTorch module that computes the same integers and has gradients.

Forward, every value is the exact integer of the interpreter: sums are integers below 2^24 in float32 (else float64), and
rescaling is done in int64. Backward is that of MCUNetV3 (Lin et al., NeurIPS 2022): rounding is straight-through, the clip
lets gradients pass where the output is strictly inside its range. (There, a value that just reaches an end still passes; here
it does not, so that the mask follows from the int8 output and no kernel on the chip has to report it.)

    g_conv = g_y * mask * e      e = s_x s_w / s_y per output channel
    dL/db = sum g_conv           dL/dw = correlation of x - z_x with g_conv         dL/dx = transposed convolution

Weights and biases are parameters in units of codes, rounded in the forward pass: they may be integers (updated in place, as
on the chip) or the float copies that the released simulation keeps. `start` cuts the graph: what lies before the first trained
layer is the same in every epoch, so `features` computes it once per image.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from netsuke.errors import NetsukeError
from netsuke.graph.differentiate import clips, mean_factor
from netsuke.graph.interpret import Interpreter
from netsuke.graph.ir import Op, QGraph
from netsuke.graph.ops.base import limits
from netsuke.graph.ops.conv import LARGEST_SUM, ratios
from netsuke.graph.ops.shape import one_scale, pool_multipliers
from netsuke.graph.requant import multipliers, sum_multipliers

EXACT = float(1 << 24)  # integers below are exact in float32, whatever the order of a sum


def frontier(graph: QGraph, start: int) -> list[int]:
    """Tensors that operators from index `start` on read and earlier ones (or the caller) write."""
    made = {i for op in graph.ops[start:] for i in op.outputs}
    wanted = [i for op in graph.ops[start:] for i in op.inputs if i >= 0]
    return sorted({i for i in wanted if i not in made and not graph.tensors[i].constant})


def prefix(graph: QGraph, start: int) -> QGraph:
    """The operators before `start`, with the frontier as outputs."""
    out = graph.copy()
    out.ops, out.outputs = out.ops[:start], tuple(frontier(graph, start))
    return out


def suffix(graph: QGraph, start: int) -> QGraph:
    """The operators from `start` on, with the frontier as inputs."""
    out = graph.copy()
    out.ops, out.inputs = out.ops[start:], tuple(frontier(graph, start))
    return out


def features(graph: QGraph, start: int, images: np.ndarray, batch: int = 16) -> list[np.ndarray]:
    """The frontier's codes for images (N, H, W, C), one array (N, …) per tensor."""
    if start == 0:
        return [images]
    run = Interpreter(prefix(graph, start)).run
    parts = [run(images[k : k + batch]) for k in range(0, len(images), batch)]
    return [np.concatenate(column) for column in zip(*parts)]


def to_torch(graph: QGraph, start: int = 0) -> Simulation:
    """The operators from `start` on as a module. Raises NetsukeError that names an operator it cannot simulate."""
    return Simulation(graph, start)


class Simulation(nn.Module):
    """Takes int8 codes (B, H, W, C), one tensor per `frontier`, and returns real numbers: (codes - zero) * scale.

    `weight(layer)`/`bias(layer)` are the parameters by operator index, in codes; weights are (O, I, KH, KW). No gradients
    are asked for until someone sets `requires_grad`.
    """

    def __init__(self, graph: QGraph, start: int):
        super().__init__()
        self.graph, self.start = graph, start
        self.inputs = frontier(graph, start)
        self.params = nn.ParameterDict()
        self.operators = nn.ModuleList()
        for k in range(start, len(graph.ops)):
            op = graph.ops[k]
            if op.kind not in BUILDERS or graph.tensors[op.outputs[0]].dtype != "int8":
                raise NetsukeError(
                    f"train {graph.name}", f"the operator {op.name!r} ({op.kind}) has no gradient", ", ".join(BUILDERS),
                    "train only layers behind it",
                )  # fmt: skip
            self.operators.append(BUILDERS[op.kind](graph, op))
            if isinstance(self.operators[-1], _Linear):
                for name, value in self.operators[-1].start_values().items():
                    self.params[f"{name}{k}"] = nn.Parameter(value, requires_grad=False)

    def weight(self, op: int) -> nn.Parameter:
        return self.params[f"weight{op}"]

    def bias(self, op: int) -> nn.Parameter:
        return self.params[f"bias{op}"]

    def forward(self, *inputs: Tensor) -> Tensor:
        graph, values = self.graph, {}
        for i, x in zip(self.inputs, inputs):
            values[i] = x.float().permute(0, 3, 1, 2) if x.ndim == 4 else x.float()
        for k, (op, module) in enumerate(zip(graph.ops[self.start :], self.operators), self.start):
            args = [values[i] for i in op.inputs if i in values]
            if isinstance(module, _Linear):
                args += [self.weight(k), self.bias(k)]
            values[op.outputs[0]] = module(*args)
        y = graph.tensors[graph.outputs[0]]
        out = values[graph.outputs[0]]
        out = out.permute(0, 2, 3, 1) if out.ndim == 4 else out
        return (out - y.zero) * float(y.scale)

    def codes(self, *inputs: Tensor) -> np.ndarray:
        """The int8 output, as the interpreter gives it."""
        y = self.graph.tensors[self.graph.outputs[0]]
        with torch.no_grad():
            real = self(*inputs).double()
        return (real / float(y.scale) + y.zero).round().to(torch.int8).numpy()

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self.params.items() if p.requires_grad)

    def write_back(self) -> QGraph:
        """The graph with the parameters' rounded values as its constants."""
        out = self.graph.copy()
        for k, module in enumerate(self.operators, self.start):
            if isinstance(module, _Linear):
                w, b = (self.params[f"{n}{k}"].detach().numpy() for n in ("weight", "bias"))
                op = out.ops[k]
                out.tensors[op.inputs[1]].data = module.layout(np.clip(np.rint(w), -127, 127).astype(np.int8))
                if len(op.inputs) > 2:
                    out.tensors[op.inputs[2]].data = np.clip(np.rint(b), -LARGEST_SUM, LARGEST_SUM).astype(np.int32)
        return out


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, b: Tensor, layer: _Linear) -> Tensor:
        q = w.round().clamp(-127, 127)
        centred = x - layer.zero_x
        largest = float(q.abs().flatten(1).sum(1).max()) * 255
        kind = torch.float32 if largest < EXACT else torch.float64
        total = layer.product(centred.to(kind), q.to(kind)).to(torch.int64) + _column(b.round().long(), x)
        y = ((total * _column(layer.m, x) + (1 << (layer.shift - 1))) >> layer.shift) + layer.zero_y
        y = y.clamp(layer.low, layer.high).float()
        ctx.save_for_backward(centred, q, (y > layer.low) & (y < layer.high))
        ctx.layer = layer
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        x, w, mask = ctx.saved_tensors
        layer: _Linear = ctx.layer
        g = g * mask * _column(layer.ratio, g)
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        bias = g.sum([k for k in range(g.ndim) if k != 1]) if ctx.needs_input_grad[2] else None
        if g.ndim == 2:
            return g @ w if wanted[0] else None, g.T @ x if wanted[1] else None, bias, None
        gx, gw = None, None
        if any(wanted):
            gx, gw, _ = torch.ops.aten.convolution_backward(
                g, x, w, None, layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups, wanted
            )
        return gx, gw, bias, None


def _column(v: Tensor, like: Tensor) -> Tensor:
    return v.reshape(1, -1, 1, 1) if like.ndim == 4 else v.reshape(1, -1)


class _Linear(nn.Module):
    """conv2d, depthwise2d or dense, with NCHW weights."""

    def __init__(self, graph: QGraph, op: Op):
        super().__init__()
        x, w, y = (graph.tensors[i] for i in (op.inputs[0], op.inputs[1], op.outputs[0]))
        self.graph, self.op, self.kind = graph, op, op.kind
        self.zero_x, self.zero_y = x.zero, y.zero
        self.low, self.high = (int(v) for v in limits(graph, op))
        e = ratios(graph, op)
        m, self.shift = multipliers(e)
        self.register_buffer("m", torch.from_numpy(m.astype(np.int64)))
        self.register_buffer("ratio", torch.from_numpy(e).float())
        self.stride, self.dilation = op.attrs.get("stride", (1, 1)), op.attrs.get("dilation", (1, 1))
        top, bottom, left, right = op.attrs.get("pad", (0, 0, 0, 0))
        if (top, left) != (bottom, right):
            raise NetsukeError(
                f"train {graph.name}", f"the layer {op.name!r} is padded by {top, bottom, left, right}",
                "the same padding on both sides", "train only layers behind it",
            )  # fmt: skip
        self.padding = (top, left)
        self.groups = x.shape[-1] if op.kind == "depthwise2d" else op.attrs.get("groups", 1)
        self.outs = w.shape[-1] if op.kind == "depthwise2d" else w.shape[0]

    def start_values(self) -> dict[str, Tensor]:
        w = self.graph.tensors[self.op.inputs[1]].data
        b = self.graph.tensors[self.op.inputs[2]].data if len(self.op.inputs) > 2 else np.zeros(self.outs)
        if self.kind == "depthwise2d":
            w = w.transpose(2, 0, 1)[:, None]
        elif self.kind == "conv2d":
            w = w.transpose(0, 3, 1, 2)
        return {"weight": torch.from_numpy(np.ascontiguousarray(w)).float(), "bias": torch.from_numpy(b).double()}

    def layout(self, w: np.ndarray) -> np.ndarray:
        """From NCHW back to the graph's order of axes."""
        if self.kind == "depthwise2d":
            return np.ascontiguousarray(w[:, 0].transpose(1, 2, 0))
        return np.ascontiguousarray(w.transpose(0, 2, 3, 1)) if self.kind == "conv2d" else w

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        if self.kind == "dense":
            return x @ w.T
        return torch.nn.functional.conv2d(x, w, None, self.stride, self.padding, self.dilation, self.groups)

    def forward(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if self.kind == "dense":
            x = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
            x = x.reshape(len(x), -1)
        return _LinearFunction.apply(x, w, b, self)


class _AddFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, p: _Add) -> Tensor:
        total = (a.long() - p.za) * p.ma + (b.long() - p.zb) * p.mb
        y = (((total + (1 << (p.shift - 1))) >> p.shift) + p.zy).clamp(p.low, p.high).float()
        ctx.save_for_backward((y > p.low) & (y < p.high))
        ctx.p = p
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        g = g * ctx.saved_tensors[0]
        return g * ctx.p.ea, g * ctx.p.eb, None


class _Add(nn.Module):
    def __init__(self, graph: QGraph, op: Op):
        super().__init__()
        a, b = (graph.tensors[i] for i in op.inputs)
        y = graph.tensors[op.outputs[0]]
        if a.shape != b.shape or a.constant or b.constant:
            raise NetsukeError(
                f"train {graph.name}", f"the addition {op.name!r} joins {a.shape} and {b.shape}",
                "two computed tensors of one shape", "train only layers behind it",
            )  # fmt: skip
        self.za, self.zb, self.zy = a.zero, b.zero, y.zero
        self.ea, self.eb = float(a.scale / y.scale), float(b.scale / y.scale)
        self.ma, self.mb, self.shift = sum_multipliers(self.ea, self.eb)
        self.low, self.high = (int(v) for v in limits(graph, op))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return _AddFunction.apply(a, b, self)


class _PoolFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: _Pool) -> Tensor:
        if p.m is None:
            total = x.long().sum((2, 3), keepdim=True)
            mean = total.sign() * ((total.abs() + p.count // 2) // p.count)
        else:
            total = (x.long() - p.zx).sum((2, 3), keepdim=True)
            mean = ((total * p.m + (1 << (p.shift - 1))) >> p.shift) + p.zy
        y = mean.clamp(p.low, p.high).float()
        ctx.save_for_backward(((y > p.low) & (y < p.high)) | (not p.clips))
        ctx.p, ctx.shape = p, x.shape
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        return (g * ctx.saved_tensors[0] * (ctx.p.e / ctx.p.count)).expand(ctx.shape), None


class _Pool(nn.Module):
    """The mean over all pixels. At one scale and without limits nothing is ever clipped."""

    def __init__(self, graph: QGraph, op: Op):
        super().__init__()
        x, y = graph.tensors[op.inputs[0]], graph.tensors[op.outputs[0]]
        self.count, self.clips = round(1 / mean_factor(graph, op)), clips(graph, op)
        self.zx, self.zy, self.e = x.zero, y.zero, float(x.scale / y.scale)
        self.low, self.high = (int(v) for v in limits(graph, op))
        self.m = None
        if not one_scale(graph, op):
            m, self.shift = pool_multipliers(graph, op)
            self.m = int(m[self.count])

    def forward(self, x: Tensor) -> Tensor:
        return _PoolFunction.apply(x, self)


class _Reshape(nn.Module):
    def __init__(self, graph: QGraph, op: Op):
        super().__init__()
        self.shape = graph.tensors[op.outputs[0]].shape[1:]

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
        x = x.reshape(len(x), *self.shape)
        return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


BUILDERS = {
    "conv2d": _Linear, "depthwise2d": _Linear, "dense": _Linear, "add": _Add, "avgpool2d": _Pool, "reshape": _Reshape,
}  # fmt: skip
