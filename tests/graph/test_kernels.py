"""Every kernel against the NumPy reference: integers bit for bit, floats to 1e-5, in place and not."""

import ctypes
import math

import numpy as np
import pytest

from netsuke.devices.board import missing_tools
from netsuke.errors import NetsukeError
from netsuke.export.c import write_c
from netsuke.export.c.emulate import run_emulated
from netsuke.graph import Interpreter, QGraph, Tensor
from netsuke.graph.abi import defined_in, sources, structures
from netsuke.graph.arena import plan_arena
from netsuke.graph.host import HostProgram, library
from netsuke.graph.lower import lower, scratch
from netsuke.graph.ops.elementwise import FUNCTIONS, table


def codes(rng, shape):
    return rng.integers(-128, 128, shape).astype(np.int8)


def tensor(rng, name, shape, dtype="int8"):
    if dtype == "float32":
        return Tensor(name, shape, dtype)
    return Tensor(name, shape, dtype, np.float64(rng.uniform(0.01, 0.05)), int(rng.integers(-128, 128)))


def graph_of(rng, shape, dtype="int8"):
    g = QGraph("trial")
    g.inputs = (g.add(tensor(rng, "x", shape, dtype)),)
    return g


def weights(rng, g, shape, axis, dtype, outs):
    """(weight, bias) tensors: float32, or codes with a scale per output channel."""
    x = g.tensors[g.inputs[0]]
    if dtype == "float32":
        w = g.constant("w", rng.normal(size=shape).astype(np.float32))
    else:
        top = 8 if dtype == "int4" else 128
        data = rng.integers(-top, top, shape).astype(np.int8)
        w = g.constant("w", data, dtype=dtype, scale=rng.uniform(0.001, 0.01, outs), axis=axis)
    if rng.integers(4) == 0:
        return w, -1
    if x.dtype == "int8":
        return w, g.constant("b", rng.integers(-5000, 5000, outs).astype(np.int32))
    return w, g.constant("b", rng.normal(size=outs).astype(np.float32))


def result(g, rng, name, shape, dtype):
    """The output tensor; an int8 one has a scale that fills its range, or one so small that shifts go below 33."""
    t = tensor(rng, name, shape, dtype)
    if dtype == "int8":
        t.scale = np.float64(10.0 ** rng.uniform(-3.5, -0.4))
    return t


def agree(g, rng, batch=1, exact=True):
    """The host's program, built for every kind of vectors and in place, equals the interpreter."""
    g.check()
    inputs = []
    for i in g.inputs:
        t = g.tensors[i]
        shape = (batch * t.shape[0], *t.shape[1:])
        inputs.append(codes(rng, shape) if t.dtype == "int8" else rng.normal(size=shape).astype(np.float32) * 3)
    want = Interpreter(g).run(*inputs)
    apart = plan_arena(g, scratch, in_place=False)
    builds = [(apart, v) for v in range(library(0).ns_host_vectors() + 1)]
    for arena, vectors in [*builds, (plan_arena(g, scratch), None)]:
        for a, b in zip(HostProgram(g, arena, vectors).run(*inputs), want):
            assert a.dtype == b.dtype and a.shape == b.shape
            if exact:
                np.testing.assert_array_equal(a, b)
            else:
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(b).max()))
    return want


def window(rng, h, w):
    """Attributes of a window that fits (h, w), and the size of its output."""
    while True:
        kh, kw = int(rng.integers(1, 6)), int(rng.integers(1, 8))
        stride = tuple(int(v) for v in rng.integers(1, 4, 2))
        dilation = tuple(int(v) for v in (rng.integers(1, 3, 2) if rng.integers(3) == 0 else (1, 1)))
        pad = tuple(int(rng.integers(0, d * (k - 1) + 1)) for d, k in
                    ((dilation[0], kh), (dilation[0], kh), (dilation[1], kw), (dilation[1], kw)))  # fmt: skip
        oh = (h + pad[0] + pad[1] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
        ow = (w + pad[2] + pad[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
        if oh > 0 and ow > 0:
            return kh, kw, {"stride": stride, "pad": pad, "dilation": dilation}, oh, ow


def clip(rng, dtype):
    if rng.integers(2):
        return {}
    return {"low": -100, "high": 90} if dtype == "int8" else {"low": 0.0, "high": 6.0}


TYPES = [("int8", "int8"), ("int8", "int4"), ("float32", "float32"), ("float32", "int8"), ("float32", "int4")]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("dtype", "wtype"), TYPES, ids=lambda v: v)
def test_convolutions_of_any_window(dtype, wtype, seed):
    rng = np.random.default_rng(seed)
    h, w, groups = int(rng.integers(1, 14)), int(rng.integers(1, 14)), int(rng.choice([1, 1, 2, 3]))
    n, o = int(rng.integers(1, 10)) * (4 if rng.integers(2) else 1), int(rng.integers(1, 12)) * groups
    kh, kw, attrs, oh, ow = window(rng, h, w)
    g = graph_of(rng, (1, h, w, n * groups), dtype)
    inputs = (g.inputs[0], *weights(rng, g, (o, kh, kw, n), 0, wtype, o))
    y = result(g, rng, "y", (1, oh, ow, o), dtype)
    g.outputs = (g.append("conv2d", inputs, y, groups=groups, **attrs, **clip(rng, dtype)),)
    agree(g, rng, batch=2, exact=dtype == "int8")


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("dtype", "wtype"), TYPES, ids=lambda v: v)
def test_pointwise_convolutions_in_place(dtype, wtype, seed):
    """Longer and shorter outputs, and numbers of pixels and channels that fill no block."""
    rng = np.random.default_rng(100 + seed)
    h, w, i, o = int(rng.integers(1, 9)), int(rng.integers(1, 6)), int(rng.integers(1, 40)), int(rng.integers(1, 40))
    g = graph_of(rng, (1, h, w, i), dtype)
    inputs = (g.inputs[0], *weights(rng, g, (o, 1, 1, i), 0, wtype, o))
    g.outputs = (g.append("conv2d", inputs, result(g, rng, "y", (1, h, w, o), dtype), **clip(rng, dtype)),)
    if dtype == "int8":
        assert plan_arena(g, scratch).in_place(0) == 0
    agree(g, rng, exact=dtype == "int8")


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize(("dtype", "wtype"), TYPES, ids=lambda v: v)
def test_depthwise_convolutions_of_any_window(dtype, wtype, seed):
    rng = np.random.default_rng(200 + seed)
    h, w = int(rng.integers(1, 24)), int(rng.integers(1, 24))
    c, times = int(rng.choice([1, 2, 3, 8, 17])), int(rng.choice([1, 1, 2, 5]))
    kh, kw, attrs, oh, ow = window(rng, h, w)
    g = graph_of(rng, (1, h, w, c), dtype)
    inputs = (g.inputs[0], *weights(rng, g, (kh, kw, c * times), 2, wtype, c * times))
    y = result(g, rng, "y", (1, oh, ow, c * times), dtype)
    g.outputs = (g.append("depthwise2d", inputs, y, **attrs, **clip(rng, dtype)),)
    agree(g, rng, exact=dtype == "int8")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [3, 5, 7])
@pytest.mark.parametrize("wtype", ["int8", "int4"])
def test_depthwise_convolutions_in_place(wtype, k, stride):
    """The windows that inverted residuals have, on planes of more rows than a strip."""
    rng = np.random.default_rng(k * stride)
    for size in (5, 16, 19):
        g, p = graph_of(rng, (1, size, size, 6)), k // 2
        inputs = (g.inputs[0], *weights(rng, g, (k, k, 6), 2, wtype, 6))
        out = (size - 1) // stride + 1
        y = result(g, rng, "y", (1, out, out, 6), "int8")
        g.outputs = (g.append("depthwise2d", inputs, y, stride=(stride, stride), pad=(p, p, p, p)),)
        assert plan_arena(g, scratch).in_place(0) == 0
        agree(g, rng)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("dtype", "wtype"), TYPES, ids=lambda v: v)
def test_dense_layers(dtype, wtype, seed):
    rng = np.random.default_rng(300 + seed)
    rows, i, o = int(rng.choice([1, 2, 3, 7])), int(rng.integers(1, 150)), int(rng.integers(1, 40))
    g = graph_of(rng, (1, rows, i), dtype)
    inputs = (g.inputs[0], *weights(rng, g, (o, i), 0, wtype, o))
    g.outputs = (g.append("dense", inputs, result(g, rng, "y", (1, rows, o), dtype), **clip(rng, dtype)),)
    agree(g, rng, batch=3, exact=dtype == "int8")


def test_ratios_of_scales_of_any_size():
    """Shifts from 1 to 62: sums far below one code, and far above the range."""
    rng = np.random.default_rng(7)
    for ratio in (2.0**-31, 1e-7, 1e-4, 0.02, 0.7, 30.0, 2.0**20, 2.0**28):
        for kind, shape in (("dense", (5, 9)), ("depthwise2d", (3, 3, 9))):
            g = graph_of(rng, (1, 4, 4, 9) if kind == "depthwise2d" else (1, 9))
            w = g.constant(
                "w",
                codes(rng, shape),
                scale=np.full(5 if kind == "dense" else 9, 0.01),
                axis=0 if kind == "dense" else 2,
            )
            b = g.constant("b", rng.integers(-(1 << 30), 1 << 30, 5 if kind == "dense" else 9).astype(np.int32))
            x = g.tensors[0]
            y = Tensor("y", (1, 2, 2, 9) if kind == "depthwise2d" else (1, 5), "int8", x.scale * 0.01 / ratio, 127)
            g.outputs = (g.append(kind, (0, w, b), y),)
            agree(g, rng)


SHAPES = [((1, 5, 6, 7), (1, 5, 6, 7)), ((1, 5, 6, 7), (1, 1, 1, 7)), ((1, 5, 6, 7), (1, 5, 1, 7)), ((1, 5, 6, 7), (1, 1, 6, 1)),
          ((1, 5, 6, 7), (1, 1, 1, 1)), ((1, 3, 5), (5,)), ((1, 9), (1, 9))]  # fmt: skip


@pytest.mark.parametrize("kind", ["add", "mul"])
@pytest.mark.parametrize("dtype", ["int8", "float32"])
@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_sums_and_products(kind, dtype, a, b):
    rng = np.random.default_rng(len(a) + sum(b))
    g = graph_of(rng, a, dtype)
    if len(b) == len(a):
        second = g.add(tensor(rng, "b", b, dtype))
        g.inputs += (second,)
    else:
        data = codes(rng, b) if dtype == "int8" else rng.normal(size=b).astype(np.float32)
        second = g.add(tensor(rng, "b", b, dtype))
        g.tensors[second].data = data
    y = tensor(rng, "y", a, dtype)
    if dtype == "int8" and kind == "mul":
        y.scale = g.tensors[0].scale
    g.outputs = (g.append(kind, (0, second), y, **clip(rng, dtype)),)
    agree(g, rng, exact=dtype == "int8")


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_activations(function):
    rng = np.random.default_rng(1)
    g = graph_of(rng, (1, 333), "float32")
    g.outputs = (g.append("unary", (0,), Tensor("y", (1, 333), "float32"), function=function),)
    agree(g, rng, exact=False)
    g = graph_of(rng, (1, 77))
    x, y = g.tensors[0], tensor(rng, "y", (1, 77))
    g.outputs = (g.append("lut", (0,), y, table=table(function, x.scale, x.zero, y.scale, y.zero)),)
    agree(g, rng)


@pytest.mark.parametrize("dtype", ["int8", "float32"])
@pytest.mark.parametrize("shape", [(1, 2), (1, 10), (1, 3, 1000), (1, 5000)])
def test_softmax(shape, dtype):
    rng = np.random.default_rng(shape[-1])
    g = graph_of(rng, shape, dtype)
    y = Tensor("y", shape, dtype, np.float64(1 / 256), -128) if dtype == "int8" else Tensor("y", shape, dtype)
    g.outputs = (g.append("softmax", (0,), y, beta=1.5),)
    agree(g, rng, exact=dtype == "int8")


def test_softmax_of_equal_codes():
    """The sum of a flat row passes 32 bits."""
    g = graph_of(np.random.default_rng(0), (1, 5000))
    g.outputs = (g.append("softmax", (0,), Tensor("y", (1, 5000), "int8", np.float64(1 / 256), -128)),)
    x = np.full((1, 5000), 3, np.int8)
    np.testing.assert_array_equal(HostProgram(g.check()).run(x)[0], Interpreter(g).run(x)[0])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["avgpool2d", "maxpool2d"])
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_pools(kind, dtype, seed):
    rng = np.random.default_rng(400 + seed)
    h, w, c = int(rng.integers(1, 12)), int(rng.integers(1, 12)), int(rng.integers(1, 40))
    while True:
        kh, kw, attrs, oh, ow = window(rng, h, w)
        if attrs.pop("dilation") == (1, 1):
            break
    g = graph_of(rng, (1, h, w, c), dtype)
    y = tensor(rng, "y", (1, oh, ow, c), dtype)
    if kind == "maxpool2d" or seed % 2:
        y.scale, y.zero = g.tensors[0].scale, g.tensors[0].zero
    g.outputs = (g.append(kind, (0,), y, window=(kh, kw), **attrs, **clip(rng, dtype)),)
    agree(g, rng, batch=2, exact=dtype == "int8")


def test_halves_of_a_mean_go_away_from_zero():
    """Where input and output have one scale; with padding, windows of 1, 2 and 4 elements."""
    g = graph_of(np.random.default_rng(0), (1, 2, 2, 4))
    y = Tensor("y", (1, 3, 3, 4), "int8", g.tensors[0].scale, g.tensors[0].zero)
    g.outputs = (g.append("avgpool2d", (0,), y, window=(2, 2), pad=(1, 1, 1, 1)),)
    x = np.array([[3, -3, 127, -128], [4, -4, 127, -128], [3, -3, 126, -127], [4, -4, 126, -127]], np.int8)
    for program in (Interpreter(g.check()), HostProgram(g)):
        out = program.run(x.reshape(1, 2, 2, 4))[0]
        np.testing.assert_array_equal(out[0, 1, 1], [4, -4, 127, -128])
        np.testing.assert_array_equal(out[0, 0, 1], [4, -4, 127, -128])
        np.testing.assert_array_equal(out[0, 0, 0], x[0])


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_operators_that_move(dtype):
    rng = np.random.default_rng(5)
    for _ in range(12):
        shape = tuple(int(v) for v in rng.integers(1, 6, 4))
        for kind in ("pad", "transpose", "concat", "slice", "reshape"):
            g = graph_of(rng, shape, dtype)
            x = g.tensors[0]

            def like(out, x=x):
                return Tensor("y", tuple(int(v) for v in out), dtype, x.scale, x.zero)

            if kind == "pad":
                pads = [tuple(int(v) for v in rng.integers(0, 3, 2)) for _ in shape]
                out = g.append("pad", (0,), like(n + a + b for n, (a, b) in zip(shape, pads)), pads=pads)
            elif kind == "transpose":
                perm = [int(v) for v in rng.permutation(4)]
                out = g.append("transpose", (0,), like(shape[p] for p in perm), perm=perm)
            elif kind == "concat":
                axis, other = int(rng.integers(4)), list(shape)
                other[axis] = int(rng.integers(1, 5))
                second = g.add(like(other))
                g.inputs += (second,)
                both = list(shape)
                both[axis] += other[axis]
                out = g.append("concat", (0, second), like(both), axis=axis)
            elif kind == "slice":
                begin = [int(rng.integers(n)) for n in shape]
                stride = [int(v) for v in rng.integers(1, 3, 4)]
                out = g.append("slice", (0,), like(-(-(n - b) // s) for n, b, s in zip(shape, begin, stride)),
                               begin=begin, stride=stride)  # fmt: skip
            else:
                out = g.append("reshape", (0,), like((1, math.prod(shape))))
            g.outputs = (out,)
            agree(g, rng)


def test_to_codes_and_back():
    """Ties round to even, what lies outside saturates."""
    rng = np.random.default_rng(3)
    g = graph_of(rng, (1, 4000), "float32")
    q = g.append("quantize", (0,), Tensor("q", (1, 4000), "int8", np.float64(0.5), 3))
    g.outputs = (q, g.append("dequantize", (q,), Tensor("y", (1, 4000), "float32")))
    x = np.concatenate([np.arange(-1000, 1000) / 4, [1e30, -1e30, 1e9, -0.0], rng.normal(size=1996) * 40])
    x = x.astype(np.float32)[None]
    for a, b in zip(HostProgram(g.check()).run(x), Interpreter(g).run(x)):
        np.testing.assert_array_equal(a, b)


def layers_of_all_shapes(rng, count):
    """One graph with many layers side by side, each on a copy of the input of its own, which it may overwrite."""
    g = graph_of(rng, (1, 11, 9, 8))
    outputs = []
    for k in range(count):
        x = g.tensors[0]
        copied = g.append("lut", (0,), Tensor(f"copy{k}", x.shape, "int8", x.scale, x.zero), table=np.arange(-128, 128))
        wtype, kind = ("int8", "int8", "int4")[k // 4 % 3], ("conv2d", "pointwise", "depthwise2d", "square")[k % 4]
        kh, kw, attrs, oh, ow = window(rng, 11, 9)
        if kind == "square":
            kh = kw = (3, 5, 7)[k // 8 % 3]
            p, s = kh // 2, k // 4 % 2 + 1
            attrs, oh, ow = {"stride": (s, s), "pad": (p, p, p, p)}, 10 // s + 1, 8 // s + 1
        elif kind == "pointwise":
            kh, kw, attrs, oh, ow = 1, 1, {}, 11, 9
        o = int(rng.integers(1, 20)) if kind in ("conv2d", "pointwise") else 8 * (1 + k % 3 // 2)
        shape = (o, kh, kw, 8) if kind in ("conv2d", "pointwise") else (kh, kw, o)
        inputs = (copied, *weights(rng, g, shape, 0 if len(shape) == 4 else 2, wtype, o))
        name = "conv2d" if len(shape) == 4 else "depthwise2d"
        y = result(g, rng, f"y{k}", (1, oh, ow, o), "int8")
        outputs.append(g.append(name, inputs, y, **attrs, **(clip(rng, "int8") if k % 5 == 0 else {})))
    g.outputs = tuple(outputs)
    return g.check()


@pytest.mark.parametrize(("core", "dsp"), [("m4", True), ("m7", True), ("m4", False)])
def test_the_boards_give_the_same_bits(core, dsp, tmp_path):
    """The assembly for Cortex-M, through every loop it has, and portable C."""
    if missing := missing_tools():
        pytest.skip(missing)
    rng = np.random.default_rng(11)
    graph = layers_of_all_shapes(rng, 48)
    x = codes(rng, graph.tensors[0].shape)
    write_c(graph, tmp_path / "layers", name="layers")
    got = run_emulated(tmp_path / "layers", core, [x], dsp=dsp)
    assert got["passed"]
    for a, b in zip(got["outputs"], Interpreter(graph).run(x)):
        np.testing.assert_array_equal(a, b)


def test_parts_of_constants_and_of_trained_tensors():
    """A view of a constant is a table of its own; one of a tensor that training changes has no fixed bytes."""
    rng = np.random.default_rng(2)
    g = graph_of(rng, (1, 6), "float32")
    whole = g.constant("whole", rng.normal(size=(2, 6)).astype(np.float32))
    part = g.add(Tensor("part", (1, 6), "float32", view=(whole, 24)))
    g.outputs = (g.append("add", (0, part), Tensor("y", (1, 6), "float32"), name="sum"),)
    x = rng.normal(size=(1, 6)).astype(np.float32)
    np.testing.assert_allclose(HostProgram(g).run(x)[0], x + g.tensors[whole].data[1:], rtol=1e-6)
    g.tensors[whole].variable = True
    with pytest.raises(NetsukeError, match="'part' is a part of the trained tensor 'whole'"):
        lower(g, plan_arena(g, scratch))


def test_every_structure_has_its_function_and_size():
    """What Python reads from the headers is what the compiler saw."""
    assert set(structures()) == set(defined_in())
    for name, structure in structures().items():
        assert hasattr(library(), name)
        assert ctypes.sizeof(structure) == 4 * len(structure._fields_)


def test_sources_follow_includes():
    found = sources({"ns_dense"})
    assert {"dense.c", "ns.h", "ns_rows.h"} <= set(found) and [f for f in found if f.endswith(".c")] == ["dense.c"]
    assert "host.c" not in sources(set(structures()))


def test_refusals_name_the_operator():
    rng = np.random.default_rng(0)
    g = graph_of(rng, (2, 4, 4, 3))
    w = g.constant("w", codes(rng, (3, 3, 3, 3)), scale=np.full(3, 0.01), axis=0)
    g.outputs = (g.append("conv2d", (0, w), tensor(rng, "y", (2, 2, 2, 3)), name="stem"),)
    with pytest.raises(NetsukeError, match=r"stem \(conv2d\).*2 images"):
        lower(g, plan_arena(g, scratch))
    g = graph_of(rng, (1, 4))
    g.outputs = (g.append("warp", (0,), tensor(rng, "y", (1, 4)), name="odd"),)
    with pytest.raises(NetsukeError, match="odd is of the kind 'warp', which has no kernel"):
        lower(g, plan_arena(QGraph("empty")))
