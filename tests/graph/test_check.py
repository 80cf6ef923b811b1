"""Graphs that are not sound end in one sentence, whatever a file put into them; what passes can be run and lowered."""

import json

import numpy as np
import pytest

from netsuke.errors import NetsukeError
from netsuke.graph import Interpreter, Op, QGraph, Tensor
from netsuke.graph.arena import plan_arena
from netsuke.graph.host import HostProgram
from netsuke.graph.lower import scratch
from tests.graph.small import residual_network
from tests.graph.test_store import small_graph


def quantized(name: str, shape: tuple[int, ...], view: tuple[int, int] | None = None) -> Tensor:
    return Tensor(name, shape, "int8", np.float64(0.1), 0, view=view)


def copied(read: Tensor, whole: Tensor) -> QGraph:
    """A reshape of `read`, which may be a view of the input `whole`."""
    g = QGraph("views", [whole])
    g.inputs = (0,)
    x = g.add(read)
    y = g.add(Tensor("y", read.shape, read.dtype, read.scale, read.zero))
    g.ops, g.outputs = [Op("reshape", (x,), (y,))], (y,)
    return g


def test_a_view_inside_its_tensor_is_sound():
    g = copied(quantized("part", (1, 4), (0, 4)), quantized("x", (1, 8))).check()
    assert Interpreter(g).run(np.arange(8, dtype=np.int8)[None])[0].tolist() == [[4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("view", "dtype", "says"),
    [
        ((0, 5), "int8", "4 bytes from byte 5"),
        ((0, 1 << 40), "int8", "from byte"),
        ((0, -1), "int8", "view of nothing"),
        ((9, 0), "int8", "view of nothing"),
        ((1, 0), "int8", "circle"),
        ((2, 0), "int8", "circle"),  # tensor 2 is a view of it
        ((0, 2), "float32", "from byte 2 on"),
    ],
)
def test_views_that_look_elsewhere_are_refused(view, dtype, says):
    shape = (1, 1) if dtype == "float32" else (1, 4)
    part = Tensor("part", shape, dtype, None if dtype == "float32" else np.float64(0.1), view=view)
    g = copied(part, quantized("x", (1, 8)))
    if view[0] == 2:
        g.tensors[2].view = (1, 0)
    with pytest.raises(NetsukeError, match=says):
        g.check()


@pytest.mark.parametrize(
    ("view", "says"),
    [((0, 4), "reads, or into an input"), ((2, 0), "writes to a constant"), ((4, 2), "reads, or into an input")],
)
def test_an_operator_writes_into_nothing_that_it_reads(view, says):
    tensors = [quantized("x", (1, 8)), quantized("copy", (1, 8)), quantized("c", (1, 8)), quantized("y", (1, 4), view)]
    tensors += [quantized("room", (1, 8)), quantized("part", (1, 4), (4, 0))]
    tensors[2].data = np.zeros((1, 8), np.int8)
    g = QGraph("writes", tensors, [], (0,), (3,))
    g.ops = [Op("reshape", (0,), (4,)), Op("reshape", (5,), (3,))]
    with pytest.raises(NetsukeError, match=says):
        g.check()
    tensors[3].view = (4, 4)
    assert Interpreter(g.check()).run(np.arange(8, dtype=np.int8)[None])[0].tolist() == [[0, 1, 2, 3]]


def change(tensor: str, **fields) -> QGraph:
    g = small_graph()
    for key, value in fields.items():
        setattr(next(t for t in g.tensors if t.name == tensor), key, value)
    return g


@pytest.mark.parametrize(
    ("graph", "says"),
    [
        (lambda: change("b", view=(0, 0)), "view and has data"),
        (lambda: change("w", data=np.zeros((4, 3, 3, 3), np.int16)), "'w' has data of int16"),
        (lambda: change("w", dtype="int4", data=np.full((4, 3, 3, 3), 8, np.int8)), "from 8 to 8"),
        (lambda: change("y", dtype="int4"), "int4 and no constant"),
        (lambda: change("w", axis=4), "axis 4"),
        (lambda: change("w", axis=-4), "axis -4"),
        (lambda: change("x", scale=np.float64(np.nan)), "scale that is not a positive"),
        (lambda: change("x", scale=np.array(True)), "scale that is not a positive"),
        (lambda: change("b", scale=np.float64(1), zero=1 << 80), "zero point"),
    ],
)
def test_tensors_that_contradict_themselves_are_refused(graph, says):
    with pytest.raises(NetsukeError, match=says):
        graph().check()


def states(shape: tuple[int, ...], dtype: str) -> QGraph:
    g = copied(quantized("x", (1, 8)), quantized("unused", (1, 8)))
    g.tensors.append(Tensor("kept", shape, dtype, np.float64(0.1)))
    g.inputs, g.states = (0, 1), ((3, 2),)
    return g


def test_a_state_is_kept_in_a_tensor_like_itself():
    states((1, 8), "int8").check()
    for shape, dtype in (((1, 80), "int8"), ((1, 8), "float32")):
        with pytest.raises(NetsukeError, match="the state 'kept'"):
            states(shape, dtype).check()


@pytest.mark.parametrize(
    ("op", "attrs", "says"),
    [
        (0, {"stride": [1.0, 1.0]}, "whole numbers"),
        (0, {"pad": [[1], [2, 3]]}, "cannot use"),
        (0, {"stride": 2}, "cannot use"),
        (0, {"groups": 0}, "cannot use|do not fit"),
        (0, {"groups": "two"}, "whole numbers"),
        (0, {"dilation": [1 << 70, 1]}, "whole numbers|cannot use"),
        (1, {"low": 20, "high": -20}, "clipped from 20 to -20"),
        (1, {"low": float("nan")}, "clipped from nan"),
        (1, {"high": float("inf")}, "cannot use|no codes"),
        (1, {"low": "all"}, "cannot use"),
        (2, {"table": [999] * 256}, "256 entries"),
        (2, {"table": {"a": 1}}, "256 entries"),
    ],
)
def test_attributes_of_any_kind_end_in_a_sentence(op, attrs, says):
    g = small_graph()
    g.ops[op].attrs |= attrs
    with pytest.raises(NetsukeError, match=f"{g.ops[op].kind}.*({says})"):
        g.check()


@pytest.mark.parametrize("axis", [-1, 7, "1", None, [1]])
def test_an_axis_out_of_range_is_refused(axis):
    g = QGraph("joined", [quantized(n, s) for n, s in (("a", (1, 2)), ("b", (1, 3)), ("y", (1, 5)))])
    g.inputs, g.outputs = (0, 1), (2,)
    g.ops = [Op("concat", (0, 1), (2,), {"axis": 1})]
    g.check()
    g.ops[0].attrs["axis"] = axis
    with pytest.raises(NetsukeError, match="concat"):
        g.check()


STRANGE = (0, -1, 1, 2, 3, 7, 127, 128, 1 << 20, 1 << 33, 0.5, float("nan"), float("inf"), None, "x", [], [1], [0, 0], [1, 1],
           [-1, -1], [1, 1, 1, 1], [3, 3, 3, 3], {}, True)  # fmt: skip


def bent(graph: QGraph, rng: np.random.Generator) -> QGraph:
    """The graph with one field of an operator or tensor replaced."""
    g = graph.copy()
    value = STRANGE[rng.integers(len(STRANGE))]
    op, t = g.ops[rng.integers(len(g.ops))], g.tensors[rng.integers(len(g.tensors))]
    kind = rng.integers(5)
    if kind == 0:
        op.attrs[str(rng.choice(["stride", "pad", "window", "groups", "dilation", "low", "high", "table", "beta"]))] = (
            value
        )
    elif kind == 1:
        ends = list(op.inputs)
        ends[rng.integers(len(ends))] = int(rng.integers(-1, len(g.tensors)))
        op.inputs = tuple(ends)
    elif kind == 2:
        t.view = (int(rng.integers(len(g.tensors))), int(rng.integers(0, 40)))
    elif kind == 3:
        shape = list(t.shape)
        shape[rng.integers(len(shape))] = int(rng.integers(1, 20))
        t.shape = tuple(shape)
    else:
        t.axis, t.dtype = rng.choice([None, 0, 3, 9]), str(rng.choice(["int8", "int4", "float32", "int32"]))
    return g


def test_what_passes_the_check_runs_and_is_lowered():
    """600 graphs with one thing wrong: refused in a sentence, or the reference and the C give the same bits."""
    rng, passed = np.random.default_rng(0), 0
    for graph in (small_graph(), residual_network()):
        for _ in range(300):
            g = bent(graph, rng)
            try:
                g.check()
                program = HostProgram(g, plan_arena(g, scratch))
            except NetsukeError as e:
                assert "cannot" in str(e) and len(str(e)) < 700
                continue
            passed += 1
            t = g.tensors[g.inputs[0]]
            x = rng.integers(-128, 128, t.shape).astype(t.dtype)
            for a, b in zip(Interpreter(g).run(x), program.run(x), strict=True):
                assert np.array_equal(a, b), json.dumps([(o.kind, str(o.attrs)) for o in g.ops])
    assert passed > 20
