"""Static quantization learned end to end: planted outliers come back, learning helps, failures name the site."""

import math
import warnings

import pytest
import torch

from netsuke.compress.equivalent import fold
from netsuke.compress.static import WIDE, BitMap, calibrate, quantized, sensitivity
from netsuke.errors import NetsukeError
from netsuke.layers.quantized import QuantLinear
from netsuke.models.llama import LINEARS, SITES
from netsuke.models.static_sites import static_sites
from netsuke.train.mobilequant import BlockLearner, MobileQuant, learn
from tests.tiny import tiny_llama, tiny_task

pytestmark = pytest.mark.filterwarnings("ignore:mobilequant")  # grouped queries, on purpose
OFF = {"learn": "off", "calibration": 8}


@pytest.fixture(scope="module")
def task():
    return tiny_task()


def drift(model, other, task):
    """Mean squared change of the logits on validation text, over their variance."""
    ids = task.windows("validation")[:8, :-1]
    with torch.no_grad():
        want = model(ids)
        return float((other(ids) - want).square().mean() / want.var())


def planted(model, factor=40.0):
    """The same function with two norm channels per site `factor` times larger, and smaller where they are read."""
    rng, scales = torch.Generator().manual_seed(0), {}
    for i in range(len(model.blocks)):
        for pair in ("attn_in", "mlp_in"):
            s = torch.ones(model.cfg.width)
            s[torch.randperm(model.cfg.width, generator=rng)[:2]] = 1 / factor
            scales[f"blocks.{i}.{pair}"] = s
    return fold(model, scales)


def test_planted_outliers_break_static_ranges_and_smoothing_mends_them(task):
    model = tiny_llama()
    clean = drift(model, MobileQuant(smooth=None, **OFF).apply(model, task), task)
    spoiled = planted(model)
    assert drift(model, spoiled, task) < 1e-8
    broken = drift(model, MobileQuant(smooth=None, **OFF).apply(spoiled, task), task)
    mended = drift(model, MobileQuant(**OFF).apply(spoiled, task), task)
    assert broken > 20 * clean and mended < 2 * clean


@pytest.mark.parametrize("how", ["e2e", "blockwise"])
def test_learning_beats_rounding(how, task):
    model = tiny_llama()
    knobs = {"scheme": "w4a8", "calibration": 16, "batch": 4}
    rough = drift(model, MobileQuant(learn="off", smooth=None, **knobs).apply(model, task), task)
    method = MobileQuant(learn=how, epochs=6, lwc_rate=0.1, let_rate=0.01, lrl_rate=1e-3, **knobs)
    assert drift(model, method.apply(model, task), task) < 0.9 * rough


@pytest.mark.parametrize("scheme, bits", [("w8a8", 8), ("w4a8", 4)])
def test_formats_are_those_of_the_paper(scheme, bits, task):
    model = MobileQuant(scheme=scheme, **OFF).apply(tiny_llama(), task)
    grids = static_sites(model)
    assert len(grids) == 2 * len(SITES)
    for name, grid in grids.items():
        site = name.rpartition(".")[2]
        assert grid.bits == (16 if site in WIDE else 8)
        assert grid.zero == 0 or grid.bits == 8
    for block in model.blocks:
        for name in LINEARS:
            layer = getattr(block, name)
            assert isinstance(layer, QuantLinear) and layer.bits == bits
            assert (layer.zeros == 1 << (bits - 1)).all(), "symmetric"
            assert layer.scales.shape == (layer.outs, 1)
            assert (len(layer.scales.unique()) == 1) == (scheme == "w8a8" and name != "down")


def test_every_sixteen_bit_exception_is_a_switch(task):
    model = tiny_llama()
    narrow = MobileQuant(wide=["scores", "probs"], **OFF).apply(model, task)
    assert {n.rpartition(".")[2] for n, g in static_sites(narrow).items() if g.bits == 16} == {"scores", "probs"}
    assert drift(model, narrow, task) > drift(model, MobileQuant(**OFF).apply(model, task), task)


def test_what_is_learned_is_what_is_stored(task):
    """The simulation of a block under learned scales, clips and ranges, and the block that is built from them."""
    model, bits = tiny_llama(), BitMap.of("w4a8")
    knobs = MobileQuant(scheme="w4a8", calibration=8, epochs=1, grouped=True)
    ranges = calibrate(model, task, 8)
    learners = learn(model, [task.windows("train")[:8, :-1]], ranges, bits, knobs)
    final = learners[0].found() | learners[1].found()
    with torch.no_grad():
        built = quantized(model, final, bits, [m.transformed() for m in learners], [dict(m.clip) for m in learners])
        x = model.embed.rows(task.windows("train")[:2, :-1])
        for block, learner in zip(built.blocks, learners):
            for kind, start in ((learner.let, 1.0), (learner.clip, 4.0), (learner.span, 0.0)):
                assert kind and all(bool((p != start).any()) for p in kind.values()), "all of it is learned"
            y = learner(x)
            grids, block.sites = block.sites, {s: f for s, f in block.sites.items() if s not in WIDE}
            assert torch.allclose(block(x), y, atol=1e-4), "all 8-bit parts"
            block.sites = grids
            assert float((block(x) - y).square().mean() / y.var()) < 1e-3, "16 bits are left out while learning"
            x = block(x)


def test_ranges_follow_their_parameters(task):
    model, bits = tiny_llama(), BitMap.of("w8a8")
    ranges = calibrate(model, task, 8)
    low, high = ranges["blocks.0.hidden"]
    for how, moved in (("log", (2 * low, 2 * high)), ("raw", None)):
        one = BlockLearner(model.blocks[0], ranges, bits, MobileQuant(ranges=how))
        start = one.found()["blocks.0.hidden"]
        assert start == pytest.approx((low, high), abs=(high - low) / 255)
        if moved:
            one.span["hidden"].data.fill_(math.log(2))
            assert one.found()["blocks.0.hidden"] == pytest.approx(moved, rel=1e-5)
    fixed = BlockLearner(model.blocks[0], ranges, bits, MobileQuant(ranges="off"))
    assert not fixed.span


def test_a_loss_that_is_not_finite_names_the_site(task, monkeypatch):
    def broken(self, x):
        return BlockLearner.transformed(self)["down.weight"].sum() * x * math.nan

    monkeypatch.setattr(BlockLearner, "forward", broken)
    with pytest.raises(NetsukeError, match=r"loss became nan at step 1; the largest step is .*blocks\.\d\.\w+"):
        MobileQuant(calibration=8, epochs=1).apply(tiny_llama(), task)


def test_sensitivity_ranks_sites_by_harm(task):
    model = tiny_llama()
    rows = sensitivity(model, task, calibrate(model, task, 8), limit=1)
    assert {r["site"] for r in rows} == set(SITES)
    assert [r["nats_8"] for r in rows] == sorted((r["nats_8"] for r in rows), reverse=True)
    assert sum(abs(r["nats_16"]) for r in rows) < sum(abs(r["nats_8"]) for r in rows) / 4
    assert not static_sites(model)


@pytest.mark.parametrize(
    "knobs, words",
    [
        ({"scheme": "w3a8"}, "scheme='w3a8'"), ({"wide": ["hiden"]}, "wide names 'hiden'"), ({"epochs": 0}, "epochs=0"),
        ({"lwc_rate": 2.0}, "lwc_rate"), ({"smooth": 1.5}, "smooth"), ({"ranges": "lin"}, "ranges='lin'"),
    ],
)  # fmt: skip
def test_wrong_knobs_are_refused(knobs, words):
    with pytest.raises(NetsukeError, match=words):
        MobileQuant(**knobs)


def test_pairs_that_are_left_out_are_said(task):
    with pytest.warns(UserWarning, match="v_o is left out: 2 key/value heads feed 4 query heads"):
        MobileQuant(**OFF).apply(tiny_llama(), task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MobileQuant(grouped=True, **OFF).apply(tiny_llama(), task)


def test_models_that_cannot_be_static_are_refused_by_the_layer(task):
    assert "blocks.0.q" in MobileQuant().accepts(tiny_llama(qk_norm=True))
    done = MobileQuant(**OFF).apply(tiny_llama(), task)
    assert "embed is stored as quant" in MobileQuant().accepts(done)
    model = tiny_llama()
    with pytest.raises(NetsukeError, match=r"no range is given for blocks\.0\.attn_stream"):
        quantized(model, {}, BitMap.of("w8a8"))
