"""Factors in place of matrices: ranks, tables, refusals, healing. The contract of all methods is test_contract.py's."""

from dataclasses import replace

import pytest
import torch

from netsuke.compress import decompose
from netsuke.compress.factorize import Factorize, break_even, low_rank_design, rank_for
from netsuke.compress.method import parse
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.layers.lowrank import LowRank
from netsuke.models.encoder import EncoderConfig, random_encoder
from netsuke.models.llama import BlockShape, LlamaConfig, random_llama
from netsuke.tasks.sequences import digits
from tests.tiny import same_state, tiny_llama, tiny_task


@pytest.fixture(scope="module")
def task():
    return tiny_task()


def counted(model):
    return {n: sum(p.numel() for p in m.parameters()) for n, m in model.linears().items()}


def test_break_even_ranks_of_bert():
    assert break_even(768, 768) == 384
    assert int(break_even(768, 3072)) == 614
    assert rank_for(0.5, 768, 768) == 192 and rank_for(64, 768, 768) == 64 and rank_for(1e-6, 768, 768) == 1


def test_the_table_is_what_the_model_becomes(task):
    model = tiny_llama()
    method = Factorize(rank=10, exclude=("*.o",), per_layer={"blocks.1.k": 16, "blocks.1.down": 0.25}, calibration=8)
    rows, after = method.plan(model, task), method.apply(model, task)
    before, now = counted(model), counted(after)
    assert [r.name for r in rows] == [n for n in model.linears() if n != "embed" and not n.endswith(".o")]
    for row in rows:
        layer = after.get_submodule(row.name)
        assert (row.before, row.after) == (before[row.name], now[row.name])
        assert isinstance(layer, LowRank) == (row.rank is not None)
        if row.rank is not None:
            assert layer.rank == row.rank and row.after == row.rank * (row.outs + row.ins)
    skipped = {r.name: r.why for r in rows if r.rank is None}
    assert skipped == {"blocks.1.k": "rank 16 would not pay"}  # 24 by 48: break-even is exactly 16
    assert {r.rank for r in rows if r.name == "blocks.1.down"} == {7}


def test_plain_svd_error_is_that_of_the_weight():
    model = tiny_llama()
    method = Factorize(rank=0.5, solver="svd")
    assert not method.needs_data
    rows, after = method.plan(model), method.apply(model)
    for row in rows:
        w, near = model.get_submodule(row.name).to_dense(), after.get_submodule(row.name).to_dense()
        assert row.error == pytest.approx(float((w - near).norm() / w.norm()), rel=1e-4)
        layer = after.get_submodule(row.name)
        torch.testing.assert_close(layer.first.weight.norm(dim=1), layer.second.weight.norm(dim=0))


def test_whitened_outputs_are_nearer_than_plain_ones(task):
    model = tiny_llama()
    whitened = Factorize(rank=0.5, calibration=16)
    rows = {r.name: r for r in whitened.plan(model, task)}
    near, plain = whitened.apply(model, task), Factorize(rank=0.5, solver="svd").apply(model)
    ids = next(task.batches("train"))[:, :-1]
    x = model.blocks[1].attn_norm(model.blocks[0](model.embed.rows(ids)))  # unspoiled inputs, as calibration sees them
    want = model.blocks[1].q(x)
    errors = [float((want - m.blocks[1].q(x)).norm() / want.norm()) for m in (near, plain)]
    assert errors[0] < errors[1] and errors[0] == pytest.approx(rows["blocks.1.q"].error, rel=0.3)


def test_energy_picks_the_least_rank_that_keeps_it():
    model = tiny_llama()
    w = model.blocks[0].gate.weight.data
    u, _, vt = torch.linalg.svd(w, full_matrices=False)
    model.blocks[0].gate.weight.data = (u * torch.logspace(0, -3, 48)) @ vt
    rows = Factorize(energy=0.95, solver="svd").plan(model)
    row = next(r for r in rows if r.name == "blocks.0.gate")
    s = torch.linalg.svdvals(model.blocks[0].gate.weight.double()).square()
    kept = s.cumsum(0) / s.sum()
    assert kept[row.rank - 1] >= 0.95 > kept[row.rank - 2]
    assert row.error == pytest.approx(float((1 - kept[row.rank - 1]).sqrt()), rel=1e-4)
    flat = next(r for r in rows if r.name == "blocks.0.q")
    assert flat.rank is None and "of the energy takes rank" in flat.why


def test_what_is_factorized_already_is_skipped(task):
    once = Factorize(rank=0.5, solver="svd").apply(tiny_llama())
    rows = Factorize(rank=0.3, solver="svd").plan(once)
    assert all(r.rank is None and "already" in r.why for r in rows)
    assert same_state(Factorize(rank=0.3, solver="svd").apply(once), once)


def test_half_precision_stays():
    model = tiny_llama()
    model.replace("blocks.0.q", Dense(model.blocks[0].q.weight.data.bfloat16()))
    after = Factorize(rank=0.5, solver="svd").apply(model)
    assert after.blocks[0].q.first.weight.dtype == torch.bfloat16
    assert after.blocks[0].k.first.weight.dtype == torch.float32


def test_tables_are_refused_where_tied_and_treated_where_asked():
    tied = tiny_llama()
    with pytest.raises(NetsukeError, match="embed is the output head as well"):
        Factorize(rank=0.5, solver="svd", only=("embed",)).apply(tied)
    untied = tiny_llama(1, tied=False)
    after = Factorize(rank=0.5, solver="svd", only=("head",)).apply(untied)
    assert isinstance(after.head, LowRank) and isinstance(after.blocks[0].q, Dense)
    untied.head.weight = untied.embed.weight
    with pytest.raises(NetsukeError, match="head shares its matrix with embed"):
        Factorize(rank=0.5, solver="svd", only=("head",)).apply(untied)


@pytest.mark.parametrize(
    "text,found",
    [
        ("factorize:solver=nmf", "solver='nmf'"),
        ("factorize:rank=0", "rank=0"),
        ("factorize:rank=1.0", "rank=1.0"),
        ("factorize:rank=2.5", "rank=2.5"),
        ("factorize:rank=true", "rank=True"),
        ("factorize:rank=64,energy=0.9", "rank=64 and energy=0.9"),
        ("factorize:energy=1.5", "energy=1.5"),
        ("factorize:finetune=-1", "finetune=-1"),
        ('factorize:per_layer={"blocks.0.q":0}', "per_layer"),
    ],
)
def test_bad_knobs_are_named(text, found):
    with pytest.raises(NetsukeError, match=found.replace("[", r"\[")):
        parse(text)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(NetsukeError, match=r"exclude names 'blocks.9.q'.*blocks\.0\.q"):
        Factorize(exclude=("blocks.9.q",), solver="svd").apply(tiny_llama())
    with pytest.raises(NetsukeError, match="there is no linear map in it"):
        Factorize(solver="svd").apply(torch.nn.ReLU())


def test_healing_lowers_the_loss_and_an_svd_start_beats_a_random_one(task):
    model = tiny_llama()
    losses = {}
    for solver in ("svd", "random"):
        cut = Factorize(rank=0.6, solver=solver)
        losses[solver] = [task.mean_loss(m.apply(model, task), "train") for m in (cut, replace(cut, finetune=20))]
    assert losses["svd"][1] < losses["svd"][0] and losses["random"][1] < losses["random"][0]
    healed = Factorize(rank=0.6, solver="svd", finetune=2).apply(model, task)
    assert not any(p.requires_grad or p.grad is not None for p in healed.parameters())
    with pytest.raises(NetsukeError, match="no calibration data"):
        Factorize(rank=0.6, solver="svd", finetune=2).apply(model)


def test_random_factors_keep_the_deviation_of_the_matrix():
    model = tiny_llama(width=96, head_dim=24)
    design = low_rank_design(model, 0.5)
    for name in ("blocks.0.q", "blocks.1.down"):
        old, new = model.get_submodule(name).to_dense(), design.get_submodule(name).to_dense()
        assert float(new.std() / old.std()) == pytest.approx(1, rel=0.15)
    other = low_rank_design(model, 0.5, seed=1)
    assert not torch.equal(other.blocks[0].q.first.weight, design.blocks[0].q.first.weight)
    assert not torch.equal(design.blocks[0].q.first.weight, design.blocks[1].q.first.weight)


def test_exact_at_a_rank_the_matrix_has():
    """A map of rank 5 is reproduced by 5 terms, and the whitened solver agrees."""
    model, task = tiny_llama(), tiny_task()
    u, s, vt = decompose.svd(model.blocks[0].q.weight, 5)
    model.blocks[0].q.weight.data = ((u * s) @ vt).float()
    for solver in ("svd", "whitened-svd"):
        rows = Factorize(rank=5, solver=solver, only=("blocks.0.q",), calibration=4).plan(model, task)
        assert rows[0].rank == 5 and rows[0].error < 1e-3


@pytest.mark.parametrize("attention", [{}, {"attention": "linformer", "project": 16}])
def test_encoders_are_treated_like_decoders(attention):
    cfg = EncoderConfig.uniform(2, 64, width=32, heads=4, context=64, features=1, classes=10, **attention)
    model, task = random_encoder(cfg, 0, std=0.2), digits()
    rows, after = (f(model, task) for f in (Factorize(rank=0.5, calibration=64).plan, Factorize(rank=0.5).apply))
    assert [r.name for r in rows] == [f"blocks.{i}.{n}" for i in range(2) for n in ("q", "k", "v", "o", "fc1", "fc2")]
    plain = Factorize(rank=0.5, solver="svd").apply(model)
    batch = next(task.batches("validation"))
    errors = [float((m(batch.x) - model(batch.x)).norm()) for m in (after, plain)]
    assert errors[0] < errors[1]
    untouched = [n for n, p in after.named_parameters() if "squeeze" in n or n in ("position", "embed.weight")]
    assert all(torch.equal(after.get_parameter(n), model.get_parameter(n)) for n in untouched)


def test_experts_are_treated_and_routers_stay(task):
    blocks = (BlockShape(24, 12, experts=4, active=2), BlockShape(40, 12))
    shape = {"vocab": 96, "width": 48, "heads": 4, "kv_heads": 2, "head_dim": 12, "context": 64}
    model = random_llama(LlamaConfig(**shape, blocks=blocks), 0, std=0.2)
    rows, after = (f(model, task) for f in (Factorize(rank=0.5, calibration=8).plan, Factorize(rank=0.5).apply))
    treated = {r.name for r in rows if r.rank is not None}
    assert {"blocks.0.experts.3.down", "blocks.1.down"} <= treated and "blocks.0.experts.router" not in {
        r.name for r in rows
    }
    assert torch.equal(after.blocks[0].experts.router.weight, model.blocks[0].experts.router.weight)
    ids = next(task.batches("validation"))[:, :-1]
    assert after(ids).isfinite().all() and after.bytes() < model.bytes()
