"""The plan as facts: sums that add up, names that exist, plain values."""

import json

import numpy as np

from netsuke.graph import QGraph
from netsuke.graph.arena import plan_arena
from netsuke.graph.lower import lower, scratch
from netsuke.graph.memory import facts, flash, flash_bytes
from netsuke.graph.patches import patch
from tests.graph.bytes_run import convolve, image
from tests.graph.test_store import small_graph


def wide() -> QGraph:
    """Pointwise to 40 channels, then a depthwise one that needs scratch."""
    rng, g = np.random.default_rng(0), QGraph("wide")
    g.inputs = (g.add(image((1, 8, 8, 8), "picture")),)
    x = convolve(g, g.inputs[0], rng, 40, 1)
    g.outputs = (convolve(g, x, rng, 40, 3, depthwise=True),)
    g.ops[0].name, g.ops[1].name = "expand", ""
    return g.check()


def test_the_facts_are_plain_and_add_up():
    g = wide()
    arena = plan_arena(g, scratch)
    got = json.loads(json.dumps(facts(g, arena)))
    assert got["arena"] == arena.size and got["macs"] == g.macs()
    assert got["peak_operator"] == "depthwise2d 1"
    assert sum(row["bytes"] for row in got["largest"]) == got["lower_bound"]
    assert [row["name"] for row in got["largest"]] == ["conv2d", "scratch"]
    assert got["inputs"] == [{"name": "picture", "shape": [1, 8, 8, 8], "dtype": "int8", "bytes": 512}]


def test_flash_is_what_the_program_holds():
    g = wide()
    arena = plan_arena(g, scratch)
    program, got = lower(g, arena), flash(g, arena)
    constants = sum(t.data.nbytes for t in program.constants)
    parts = got["parts"]
    assert parts["weights"] + parts["biases"] + parts["tables"] == constants
    assert parts["biases"] == 2 * 4 * 40 and parts["weights"] >= 40 * 8 + 40 * 9 and parts["variables"] == 0
    assert got["total"] == sum(parts.values()) == sum(got["by_layer"].values()) == flash_bytes(g) - got["code"]
    assert set(got["by_layer"]) == {"expand", "depthwise2d 1"}


def test_four_bit_weights_take_half_and_variables_are_counted_apart():
    full, half = (flash(small_graph(weights=w))["parts"]["weights"] for w in ("int8", "int4"))
    assert half < full
    g = wide()
    g.tensors[g.ops[0].inputs[1]].variable = True
    assert flash(g)["parts"]["variables"] >= 320


def test_bands_share_their_weights():
    g = wide()
    assert flash(patch(g, 2, 4))["parts"]["weights"] == flash(g)["parts"]["weights"]
