"""The adviser's formulas against what hooks count, its crossings against algebra, its picks and refusals."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from netsuke.compress import advise as a
from netsuke.compress.factorize import low_rank_design
from netsuke.devices import Device
from netsuke.errors import NetsukeError
from netsuke.measure.saved import saved_ledger
from netsuke.models.encoder import EncoderConfig, random_encoder

N, SHAPE = 40, a.Shape(64, 4, 192, rank=8, project=10)


def block_of(kind: str, open_maps: bool = True):
    extra = {"attention": "linformer", "project": SHAPE.P(N)} if kind == "linformer" else {}
    cfg = EncoderConfig.uniform(1, SHAPE.f, width=SHAPE.d, heads=SHAPE.heads, context=N, features=1, classes=2, **extra)
    model = random_encoder(cfg, 0)
    if kind == "lrt":
        model = low_rank_design(model, SHAPE.r)
    return model.open_maps(open_maps).blocks[0]


@pytest.mark.parametrize("kind", a.KINDS)
def test_parameters_and_multiply_adds_are_those_counted(kind):
    block = block_of(kind)
    assert sum(p.numel() for p in block.parameters()) == a.parameters(kind, SHAPE, N)
    with FlopCounterMode(display=False) as counted:
        block(torch.randn(1, N, SHAPE.d))
    assert counted.get_total_flops() == 2 * a.macs(kind, SHAPE, N)


@pytest.mark.parametrize("kind", a.KINDS)
@pytest.mark.parametrize("fused", [False, True])
def test_what_autograd_keeps_is_foretold(kind, fused):
    block, x = block_of(kind, not fused).requires_grad_(True), torch.randn(2, N, SHAPE.d, requires_grad=True)
    with saved_ledger(block) as ledger:
        block(x)
    assert ledger.total() == 4 * 2 * a.saved_floats(kind, SHAPE, N, fused)


@pytest.mark.parametrize("d,rank,project", [(768, 128, 128), (768, 64, 128), (768, 32, 256), (256, 16, 64)])
def test_crossing_of_multiply_adds_is_the_formula(d, rank, project):
    at = a.crossing("time", a.Shape(d, 8, rank=rank, project=project))
    assert at == a.formula_crossing(d, rank, project)


def test_bert_base_as_the_card_says():
    assert a.formula_crossing(768, 128, 128) == 3712
    memory = a.crossing("memory", a.Shape(768, 12, rank=64, project=128))
    assert 200 < memory < 2048
    assert a.crossing("memory", a.Shape(768, 12, rank=64, project=128), fused=True) is None
    assert a.crossing("size", a.Shape(768, 12)) is None


def test_open_maps_make_time_cross_earlier():
    device, shape = Device.load("pi4"), a.Shape(768, 12, rank=64, project=128)
    slow = a.crossing("time", shape, device=device)
    assert slow < a.formula_crossing(768, 64, 128)
    assert a.crossing("time", shape, device=device, fused=True) == a.formula_crossing(768, 64, 128)


@pytest.mark.parametrize("target", a.TARGETS)
def test_short_inputs_want_low_rank_and_long_ones_linformer(target):
    short = a.advise(768, 12, 64, target, rank=64, project=128)
    long = a.advise(768, 12, 16384, target, rank=64, project=128)
    assert short.pick == "lrt"
    assert long.pick == ("lrt" if target == "size" else "linformer")
    assert short.why.startswith("64 tokens") and "saves" in short.why
    assert long.costs["linformer"].parameters > long.costs["dense"].parameters > long.costs["lrt"].parameters


def test_a_model_that_writes_gets_no_linformer():
    got = a.advise(768, 12, 16384, "memory", rank=64, causal=True)
    assert set(got.costs) == {"dense", "lrt"} and "cannot be causal" in got.why and not got.crossings


def test_small_savings_are_not_worth_it():
    got = a.advise(64, 4, 4096, "time", rank=40, project=4000)
    assert got.pick == "dense" and "too little" in got.why


@pytest.mark.parametrize(
    "changes,found",
    [
        ({"d": 0}, "d=0"),
        ({"heads": 7}, "a width of 768 for 7 heads"),
        ({"n": 0}, "n=0"),
        ({"target": "money"}, "target='money'"),
        ({"rank": -1}, "rank=-1"),
        ({"tokens": 1 << 40}, "tokens="),
    ],
)
def test_impossible_questions_are_refused(changes, found):
    with pytest.raises(NetsukeError, match=found):
        a.advise(**({"d": 768, "heads": 12, "n": 128} | changes))
