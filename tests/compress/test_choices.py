"""Choices: prices are those of what gets built, harm is that of what gets built, methods build what was chosen."""

import pytest
import torch

from netsuke.compress.choices import RANKS, SPARSITIES, PartChoice, map_cost, methods_for, offer, shares_read, untouched
from netsuke.compress.sparse_channels import decoding, total, traffic
from netsuke.devices import Device
from netsuke.layers.lowrank import LowRank
from netsuke.layers.sparse import InputSparse
from tests.tiny import tiny_llama, tiny_task

DEVICE = Device.load("pi-zero-2w")
NAMES = {"mlp": ("gate", "up", "down"), "qk": ("q", "k"), "vo": ("v", "o")}


@pytest.fixture(scope="module")
def offered():
    model, task = tiny_llama(), tiny_task()
    trials = []
    parts = offer(
        model,
        task,
        DEVICE,
        group=16,
        windows=4,
        calibration=8,
        cuts=(0.25,),
        bits=(16, 4, 3),
        sparsities=SPARSITIES,
        on_trial=lambda done, of: trials.append((done, of)),
    )
    return model, task, parts, trials


def test_progress_ends_at_what_was_announced(offered):
    assert offered[3][-1][0] == offered[3][-1][1] == len(offered[3])


def test_every_part_has_every_kind(offered):
    _, _, parts, _ = offered
    assert [p[0].value.part for p in parts[-1:]] == ["embed"] and len(parts) == 7
    for part in parts[:-1]:
        values = [o.value for o in part]
        assert {v.sparsity for v in values} == {0.0, *SPARSITIES} and {v.rank for v in values} == {None, *RANKS}
        assert not any(v.rank and v.sparsity for v in values), "factors are read whole"
        assert untouched(part).harm == 0


def pick(parts, **wanted):
    """The untouched options, but for those of block 1's mlp that are named."""
    out = []
    for part in parts:
        if part[0].value.part == "blocks.1.mlp":
            found = [
                o for o in part
                if set(o.value.bits.values()) == {wanted.get("bits", 16)} and o.value.cut == wanted.get("cut", 0)
                and o.value.rank == wanted.get("rank") and o.value.sparsity == wanted.get("sparsity", 0)
            ]  # fmt: skip
            out.append(found[0])
        else:
            out.append(untouched(part))
    return out


@torch.no_grad()
def built(model, task, picks):
    for method in methods_for([o.value for o in picks], 2, 16, 8):
        model = method.apply(model, task)
    return model


@pytest.mark.filterwarnings("ignore:sparsify")
@pytest.mark.parametrize(
    "wanted",
    [
        {"cut": 0.25},
        {"rank": 0.5},
        {"sparsity": 0.5},
        {"bits": 4},
        {"bits": 4, "rank": 0.75},
        {"bits": 3, "sparsity": 0.3},
    ],
)
def test_what_is_built_costs_and_harms_what_was_said(offered, wanted):
    model, task, parts, _ = offered
    picks = pick(parts, **wanted)
    small = built(model, task, picks)
    option = next(o for o in picks if o.value.part == "blocks.1.mlp")
    maps = [small.get_submodule(f"blocks.1.{n}") for n in NAMES["mlp"]]
    assert all(isinstance(m, LowRank) for m in maps) == ("rank" in wanted)
    assert all(isinstance(m, InputSparse) for m in maps) == ("sparsity" in wanted)
    if "cut" not in wanted and "rank" not in wanted and "sparsity" not in wanted:
        assert sum(m.halved("").bytes() for m in maps) == option.costs["storage"]
    ids = task.windows("validation")[:4, :-1]
    with torch.no_grad(), decoding(small):
        p, q = model(ids).log_softmax(-1), small(ids).log_softmax(-1)
    harm = float((p.exp() * (p - q)).sum(-1).mean())
    assert harm == pytest.approx(option.harm, rel=0.6, abs=0.02)


@pytest.mark.filterwarnings("ignore:sparsify")
def test_a_token_reads_the_share_that_was_said(offered):
    model, task, parts, _ = offered
    picks = pick(parts, sparsity=0.5)
    assert shares_read([o.value for o in picks]) == {f"blocks.1.{n}": 0.5 for n in NAMES["mlp"]}
    small = built(model, task, picks)
    with torch.no_grad(), decoding(small):
        small(task.windows("validation")[:8, :-1])
    rows = [r for r in traffic(small) if r.name.startswith("blocks.1.") and r.name.rpartition(".")[2] in NAMES["mlp"]]
    assert total(rows).sparsity == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("rank, sparsity", [(None, 0.5), (0.5, 0.0)])
def test_cheaper_to_read(rank, sparsity):
    whole = map_cost(512, 512, False, 4, 64, DEVICE)
    less = map_cost(512, 512, False, 4, 64, DEVICE, rank, sparsity)
    assert less["latency"] < 0.7 * whole["latency"]
    assert (less["storage"] < whole["storage"]) == (rank is not None)


def test_methods_come_in_the_documented_order():
    choices = [
        PartChoice("blocks.0.mlp", 0, "mlp", 0.25, {"blocks.0.gate": 4}, None, 0.3),
        PartChoice("blocks.0.vo", 0, "vo", 0.0, {"blocks.0.v": 16}, 0.5),
    ]
    names = [m.name for m in methods_for(choices, 1, 64, 8)]
    assert names == ["modegpt", "factorize", "quantize", "sparsify"]
    assert methods_for([PartChoice("blocks.0.qk", 0, "qk", 0.0, {"blocks.0.q": 16})], 1, 64, 8) == []
