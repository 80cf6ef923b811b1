"""Predicted instructions: features count what the loops do, and the table says what the emulated board counts."""

import json
import math

import numpy as np
import pytest
from benchmarks import instructions as bench

from netsuke.devices.board import missing_tools
from netsuke.graph import Op, QGraph, Tensor
from netsuke.graph.instructions import (
    OTHER,
    TABLE,
    code_bytes,
    features,
    instructions,
    kernel_class,
    per_operator,
    predicted,
    table,
)
from tests.graph.small import residual_network

NO_BOARD = pytest.mark.skipif(bool(missing_tools()), reason=f"not installed: {missing_tools()}")


def operator(kind: str, shape: tuple, weights: tuple, out: tuple, dtype: str = "int8", **attrs) -> tuple[QGraph, Op]:
    """A graph of one linear operator with weights of `dtype` on int8 activations."""
    g = QGraph("one")
    x = g.add(Tensor("x", shape, "int8", np.float64(0.02), 3))
    axis = len(weights) - 1 if kind == "depthwise2d" else 0
    scale = np.full(weights[axis], 0.01)
    w = g.constant("w", np.ones(weights, np.int8), dtype=dtype, scale=scale, axis=axis)
    b = g.constant("b", np.zeros(weights[axis], np.int32))
    g.inputs = (x,)
    g.outputs = (g.append(kind, (x, w, b), Tensor("y", out, "int8", np.float64(0.5), 0), **attrs),)
    return g.check(), g.ops[0]


def test_classes_follow_the_inner_loop():
    same = {"pad": (1, 1, 1, 1)}
    for want, case in (
        ("dense int8", operator("conv2d", (1, 4, 4, 8), (6, 1, 1, 8), (1, 4, 4, 6))),
        ("conv2d int4", operator("conv2d", (1, 4, 4, 8), (6, 3, 3, 8), (1, 4, 4, 6), "int4", **same)),
        ("depthwise2d/3x3s1 int8", operator("depthwise2d", (1, 4, 4, 8), (3, 3, 8), (1, 4, 4, 8), **same)),
        ("depthwise2d/any int8", operator("depthwise2d", (1, 4, 4, 8), (4, 2, 8), (1, 1, 3, 8))),
        ("conv2d int8", operator("depthwise2d", (1, 4, 4, 1), (3, 3, 8), (1, 4, 4, 8), **same)),
    ):
        assert kernel_class(*case) == want
        assert want in table()["classes"]


def test_features_count_rows_in_fours():
    five, eight = (features(*operator("dense", (rows, 8), (6, 8), (rows, 6))) for rows in (5, 8))
    blocks = np.array([1.0, 2.0])
    assert np.array_equal([five[5], eight[5]], blocks * 6) and np.array_equal([five[6], eight[6]], blocks * 12)
    assert five[7] == 6 and eight[7] == 0  # the fifth row alone


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_more_work_is_predicted_to_take_longer(dtype):
    counts = [
        instructions(operator("conv2d", (1, n, n, c), (o, 3, 3, c), (1, n, n, o), dtype, pad=(1, 1, 1, 1))[0])
        for n, c, o in ((4, 8, 8), (8, 8, 8), (8, 16, 8), (8, 16, 32), (16, 16, 32))
    ]
    assert counts == sorted(counts) and 30 < counts[-1] / counts[0] < 500


def test_every_kind_is_predicted_even_if_it_was_never_counted():
    graph, op = operator("conv2d", (1, 4, 4, 8), (6, 3, 3, 8), (1, 4, 4, 6), pad=(1, 1, 1, 1))
    x = features(graph, op)
    near = {"conv2d float32": [1.0] * len(x), "conv2d int4": [2.0] * len(x), OTHER: [9.0, 0.0, 0.0, 0.0]}
    assert predicted(near, graph, op) == 2 * x.sum()  # the dearest of its kind
    assert predicted({OTHER: [9.0, 0.0, 2.0, 0.0]}, graph, op) == 9 + 2 * graph.macs()


def test_a_reshape_costs_nothing_and_float_costs_more():
    graph = residual_network()
    costs = dict(zip((op.name for op in graph.ops), per_operator(graph)))
    assert costs["logits"] == 0 and min(v for k, v in costs.items() if k != "logits") > 100
    assert instructions(graph) == pytest.approx(sum(costs.values()))


def test_the_table_is_what_a_run_of_the_benchmark_writes():
    written = json.loads(TABLE.read_text())
    assert set(written) == {"classes", "errors", "whole", "code", "run"}
    assert all(c >= 0 and math.isfinite(c) for row in written["classes"].values() for c in row)
    seen = [e["held_out_median"] for e in written["errors"].values() if "held_out_median" in e]
    assert len(seen) > 25 and max(seen) < 0.08 and np.median(seen) < 0.03


def row(network: str, k: int, held_out: bool, factor: float = 3.0) -> bench.Row:
    graph, op = operator("dense", (1, 8 * k), (4 * k, 8 * k), (1, 4 * k))
    return bench.Row(network, graph, op, round(200 + factor * 32 * k * k), held_out)


def test_a_network_is_predicted_without_itself_and_held_out_rows_are_not_fitted():
    sweep = [row("sweep", k, k % 4 == 0) for k in range(1, 13)]
    odd = [row("odd", k, False, 9.0) for k in (3, 7)]  # a network three times as dear as everything else
    said, count = bench.left_out(sweep + odd, "odd")
    assert count == sum(r.count for r in odd)
    assert said == pytest.approx(sweep[2].count + sweep[6].count, rel=0.02)
    seen = [r for r in sweep if not r.held_out]
    classes, errors = bench.fitted(sweep)
    assert classes == bench.coefficients(seen) != bench.coefficients([r._replace(count=r.count * 2) for r in seen])
    assert "fitted_only" not in errors["dense int8"] and errors["dense int8"]["held_out_median"] < 0.02
    assert bench.fitted(seen)[1]["dense int8"]["fitted_only"] is True


def test_the_shipped_table_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "data_root", lambda: None)
    monkeypatch.setattr("sys.argv", ["instructions.py"])
    before = TABLE.read_bytes()
    with pytest.raises(SystemExit, match="stays as it is"):
        bench.main()
    assert TABLE.read_bytes() == before
    assert bench.vanished(TABLE, table()["classes"]) == [] == bench.vanished(tmp_path / "none.json", [])
    assert "dense int8" in bench.vanished(TABLE, [])


def test_code_of_shared_parts_counts_once():
    one, both = code_bytes({"ns_dense"}, 1), code_bytes({"ns_dense", "ns_dense_w4"}, 1)
    assert 500 < one < both < 8000
    assert code_bytes(["ns_dense", "ns_dense"], 1) == one < code_bytes({"ns_dense"}, 9) < one + 8 * 60
    soft = code_bytes({"ns_unary_f32", "ns_softmax_f32"}, 1)
    alone = code_bytes({"ns_unary_f32"}, 1) + code_bytes({"ns_softmax_f32"}, 1) - code_bytes(set(), 1)
    assert soft < alone  # expf is linked once


@NO_BOARD
def test_prediction_is_near_the_count_on_the_board(tmp_path):
    from netsuke.export.c import write_c
    from netsuke.export.c.emulate import count_calls, run_emulated
    from netsuke.graph.arena import plan_arena
    from netsuke.graph.lower import lower, scratch

    graph, _ = operator("dense", (5, 24), (40, 24), (5, 40))
    graph.outputs = (
        graph.append(
            "lut", graph.outputs, Tensor("z", (5, 40), "int8", np.float64(0.5), 0), table=np.arange(-128, 128)
        ),
    )
    flash = write_c(graph, tmp_path / "c")["flash"]
    run, calls = run_emulated(tmp_path / "c", "m4"), count_calls(tmp_path / "c")
    assert abs(sum(calls) / run["instructions"] - 1) < 0.03
    assert abs(instructions(graph) / run["instructions"] - 1) < 0.1
    program = lower(graph, plan_arena(graph, scratch))
    code = code_bytes({c.function for c in program.calls}, len(program.calls))
    linked = sum(sum(run["parts"][name][:2]) for name in ("model", "dense", "elementwise"))
    known = flash["constants"] + flash["parameters"]
    assert 0.9 < (code + known) / linked < 1.1
