"""Bands of rows: the same integers as without them, within fewer bytes; what cannot be cut says why."""

import os
from pathlib import Path

import numpy as np
import pytest

from netsuke.errors import NetsukeError
from netsuke.graph import Interpreter, QGraph
from netsuke.graph.arena import plan_arena
from netsuke.graph.host import HostProgram
from netsuke.graph.patches import best_patching, patch
from netsuke.graph.read.npz import read_npz
from tests.graph.bytes_run import convolve, image, inputs_of, run_in_bytes

DATA = Path(os.environ.get("NETSUKE_DATA", "")) / "tiny-training"


def same(a: QGraph, b: QGraph, seed: int = 0) -> None:
    """`b` gives what `a` gives: interpreted, and in one array of bytes."""
    xs = inputs_of(a, seed)
    want = Interpreter(a).run(*xs)
    for got in (Interpreter(b).run(*xs), run_in_bytes(b, plan_arena(b, placements=0), *xs)):
        for g, w in zip(got, want):
            np.testing.assert_array_equal(g, w)


def network(seed: int, height: int = 19, width: int = 10) -> QGraph:
    """Convolutions, poolings, tables and residual sums in a random order, then a head that reads the whole image."""
    rng, g = np.random.default_rng(seed), QGraph(f"network {seed}")
    x = g.add(image((1, height, width, 3)))
    g.inputs = (x,)
    for _ in range(6):
        shape, kind = g.tensors[x].shape, int(rng.integers(0, 6))
        kernel, stride = int(rng.choice([1, 3, 5])), int(rng.integers(1, 3)) if shape[1] > 8 else 1
        if kind == 0:
            x = convolve(g, x, rng, int(rng.integers(2, 9)), kernel, stride)
        elif kind == 1:
            x = convolve(g, x, rng, shape[3], kernel, stride, depthwise=True)
        elif kind == 2:
            y = convolve(g, convolve(g, x, rng, 2 * shape[3], 1), rng, 2 * shape[3], kernel, 1, depthwise=True)
            x = g.append("add", (convolve(g, y, rng, shape[3], 1), x), image(shape, "sum"))
        elif kind == 3:
            pooled = (1, (shape[1] + 2 - 3) // 2 + 1, (shape[2] + 2 - 3) // 2 + 1, shape[3])
            attrs = {"window": (3, 3), "stride": (2, 2), "pad": (1, 1, 1, 1)}
            x = g.append(str(rng.choice(["avgpool2d", "maxpool2d"])), (x,), image(pooled, "pool"), **attrs)
        elif kind == 4:
            x = g.append("lut", (x,), image(shape, "lut"), table=rng.integers(-128, 128, 256).astype(np.int8))
        else:  # unequal padding, as other programs have it
            pads = (0, 2, 0, 1)
            x = convolve(g, x, rng, 4, 3)
            g.ops[-1].attrs["pad"] = pads
            out = g.tensors[x]
            out.shape = (1, shape[1], shape[2] - 1, 4)
    _, h, w, c = g.tensors[x].shape
    g.meta["stage"] = len(g.ops)
    x = g.append("transpose", (x,), image((1, w, h, c), "turned"), perm=(0, 2, 1, 3))
    g.outputs = (x,)
    return g.check()


def test_bands_give_the_same_integers():
    tried = 0
    for seed in range(20):
        g = network(seed)
        for until in (g.meta["stage"], g.meta["stage"] // 2 + 1):
            for bands in (2, 7):
                try:
                    banded = patch(g, until, bands)
                except NetsukeError:  # half a residual block, or fewer rows than bands
                    continue
                tried += 1
                same(g, banded, seed)
    assert tried > 50


def inverted_residual(side: int = 32, wide: int = 48) -> QGraph:
    """What bands are for: small, wide, small."""
    rng, g = np.random.default_rng(0), QGraph("inverted")
    x = g.add(image((1, side, side, 3)))
    g.inputs = (x,)
    x = convolve(g, x, rng, 4, 3)
    x = convolve(g, x, rng, wide, 1)
    x = convolve(g, x, rng, wide, 3, 2, depthwise=True)
    x = convolve(g, x, rng, 4, 1)
    x = convolve(g, x, rng, 8, 3, 2)
    g.outputs = (x,)
    return g.check()


def test_the_best_bands_lower_the_arena_and_are_counted():
    g = inverted_residual()
    banded, facts = best_patching(g)
    same(g, banded)
    assert facts["arena_before"] == plan_arena(g).size and facts["arena"] == plan_arena(banded).size
    assert facts["arena"] < 0.25 * facts["arena_before"]
    assert facts["macs_before"] == g.macs() < facts["macs"] == banded.macs() <= 1.25 * g.macs()
    assert any(op.name.endswith(f"[{facts['bands'] - 1}]") for op in banded.ops)
    assert best_patching(g, most_macs=1.0)[1]["macs"] == g.macs()


def test_a_stage_after_operators_that_need_the_whole_image():
    rng, g = np.random.default_rng(1), QGraph("turned first")
    x = g.add(image((1, 3, 32, 32)))
    g.inputs = (x,)
    x = g.append("transpose", (x,), image((1, 32, 32, 3), "turned"), perm=(0, 2, 3, 1))
    for outs, stride, depthwise in ((4, 1, False), (48, 1, False), (48, 2, True), (4, 1, False)):
        x = convolve(g, x, rng, outs, 3, stride, depthwise)
    g.outputs = (x,)
    banded, facts = best_patching(g.check())
    same(g, banded)
    assert facts["start"] == 1 and facts["arena"] < 0.5 * facts["arena_before"]


def test_the_kernels_in_c_give_the_same_integers():
    g = inverted_residual()
    (x,) = inputs_of(g)
    np.testing.assert_array_equal(HostProgram(best_patching(g)[0]).run(x)[0], Interpreter(g).run(x)[0])


def test_bands_that_gain_nothing_are_not_made():
    rng, g = np.random.default_rng(0), QGraph("narrow")
    x = g.add(image((1, 8, 8, 16)))
    g.inputs = (x,)
    g.outputs = (convolve(g, convolve(g, x, rng, 4, 1), rng, 4, 3),)
    banded, facts = best_patching(g.check())
    assert (
        banded is g
        and facts["bands"] == 1
        and facts["arena"] == facts["arena_before"]
        and facts["macs"] == facts["macs_before"]
    )


def test_the_graph_that_was_given_is_left_as_it_was():
    g = inverted_residual()
    before = (len(g.tensors), [op.name for op in g.ops], [dict(op.attrs) for op in g.ops])
    patch(g, 4, 3)
    assert before == (len(g.tensors), [op.name for op in g.ops], [dict(op.attrs) for op in g.ops])


def test_what_cannot_be_cut_says_why():
    g = inverted_residual()
    for until, bands, words in ((9, 2, "5 operators"), (4, 17, "16 rows"), (4, 0, "16 rows")):
        with pytest.raises(NetsukeError, match=words):
            patch(g, until, bands)
    g.ops[1].name = "expand"
    g.tensors[g.ops[1].inputs[1]].variable = True
    with pytest.raises(NetsukeError, match="'expand' has weights that change"):
        patch(g, 4, 2)
    g = inverted_residual()
    g.outputs = (*g.outputs, g.ops[0].outputs[0])
    with pytest.raises(NetsukeError, match="more than one of its results"):
        patch(g, 4, 2)
    g = network(0)
    with pytest.raises(NetsukeError, match="'turned' is transpose, which needs the whole image"):
        patch(g, len(g.ops), 2)


@pytest.mark.skipif(not DATA.is_dir(), reason="NETSUKE_DATA holds no tiny-training/")
@pytest.mark.parametrize("name", ["mcunet-5fps", "mbv2-w0.35", "proxyless-w0.3"])
def test_real_networks_halve_their_arena(name):
    g = read_npz(DATA / f"{name}.npz")
    banded, facts = best_patching(g)
    arena = plan_arena(banded)
    assert facts["arena"] == arena.size <= 1.05 * arena.lower_bound
    assert facts["arena"] <= 0.6 * facts["arena_before"]
    same(g, banded)
