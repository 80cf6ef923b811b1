"""A small inverted-residual int8 network with random weights whose activations fill their ranges."""

import numpy as np

from netsuke.graph import Interpreter, Op, QGraph, Tensor


def images(n: int, size: int = 12, seed: int = 0) -> np.ndarray:
    """Smooth random int8 images (n, size, size, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, 45, (n, size // 4, size // 4, 3))
    return np.clip(np.rint(coarse.repeat(4, 1).repeat(4, 2) + rng.normal(0, 15, (n, size, size, 3))), -128, 127).astype(
        np.int8
    )


def _layer(
    g: QGraph, x: int, rng, name: str, outs: int, kernel: int, stride: int = 1, relu=False, depthwise=False
) -> int:
    """Appends a layer whose output scale is chosen so that a few percent of the values are clipped."""
    source = g.tensors[x]
    ins = source.shape[3]
    shape = (kernel, kernel, ins) if depthwise else (outs, kernel, kernel, ins)
    fan_in = kernel * kernel * (1 if depthwise else ins)
    scales = rng.uniform(0.5, 1.5, outs) * (7 / fan_in) ** 0.5 / 52  # activations keep their size from layer to layer
    w = g.constant(
        f"{name}.weight",
        rng.integers(-90, 91, shape).astype(np.int8),
        scale=scales,
        axis=len(shape) - 1 if depthwise else 0,
    )
    b = g.constant(f"{name}.bias", rng.integers(-300, 300, outs).astype(np.int32))
    p = (kernel - 1) // 2
    side = (source.shape[1] + 2 * p - kernel) // stride + 1
    y = Tensor(name, (1, side, side, outs), "int8", np.float64(1.0), -128 if relu else 3)
    attrs = {"stride": (stride, stride), "pad": (p, p, p, p)} | ({} if depthwise else {"groups": 1})
    out = g.append("depthwise2d" if depthwise else "conv2d", (x, w, b), y, name, **attrs)
    probe = g.copy()
    real = QGraph("probe", probe.tensors, probe.ops, g.inputs, (out,))
    for scale in 2.0 ** np.arange(-10, 4, 0.25):  # the smallest scale at which under 8 % are clipped above
        probe.tensors[out].scale = np.float64(scale)
        if np.mean(Interpreter(real).run(images(4, g.tensors[g.inputs[0]].shape[1], seed=9))[0] == 127) < 0.08:
            break
    y.scale = np.float64(scale)
    return out


def residual_network(classes: int = 4, seed: int = 0, side: int = 12) -> QGraph:
    """Nine layers with numbers 0 to 8 and a head; layers 4, 5, 6 lie under a residual addition."""
    rng = np.random.default_rng(seed)
    g = QGraph("small")
    x = g.add(Tensor("image", (1, side, side, 3), "int8", np.float64(2 / 255), 0))
    g.inputs = (x,)
    x = _layer(g, x, rng, "first", 8, 3, 2, relu=True)
    x = _layer(g, x, rng, "a.pw1", 16, 1, relu=True)
    x = _layer(g, x, rng, "a.dw", 16, 3, relu=True, depthwise=True)
    start = x = _layer(g, x, rng, "a.pw2", 8, 1)
    x = _layer(g, x, rng, "b.pw1", 24, 1, relu=True)
    x = _layer(g, x, rng, "b.dw", 24, 5, relu=True, depthwise=True)
    x = _layer(g, x, rng, "b.pw2", 8, 1)
    ends = g.tensors[x]
    y = Tensor("b.sum", ends.shape, "int8", np.float64(1.3 * max(float(ends.scale), float(g.tensors[start].scale))), -4)
    x = g.append("add", (x, start), y)
    x = _layer(g, x, rng, "c.dw", 8, 3, 2, relu=True, depthwise=True)
    x = _layer(g, x, rng, "c.pw", 16, 1)
    t = g.tensors[x]
    x = g.append("avgpool2d", (x,), Tensor("pooled", (1, 1, 1, 16), "int8", t.scale, t.zero), window=t.shape[1:3])
    x = _layer(g, x, rng, "classifier", classes, 1)
    t = g.tensors[x]
    y = g.add(Tensor("logits", (1, classes), "int8", t.scale, t.zero))
    g.ops.append(Op("reshape", (x,), (y,), {}, "logits"))
    g.outputs = (y,)
    return g.check()
