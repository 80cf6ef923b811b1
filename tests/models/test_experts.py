"""Mixtures of experts: the sum of the chosen, saved and loaded, quantized, refused where nothing can treat them."""

import msgspec
import pytest
import torch
from torch.nn import functional as F

from netsuke.compress.method import registry
from netsuke.compress.quantize import Quantize
from netsuke.errors import NetsukeError
from netsuke.models.experts import Experts, balance_loss
from netsuke.models.llama import BlockShape, LlamaConfig, random_llama
from netsuke.models.load import load
from netsuke.models.save import save_artifact
from netsuke.models.skeleton import check_config
from netsuke.runtime.engine import Engine
from netsuke.runtime.memory_plan import linear_layers, uniform_specs
from tests.tiny import same_state, tiny_task


def mixture(active=2, experts=4):
    blocks = (BlockShape(24, 12, experts=experts, active=active), BlockShape(40, 12))
    cfg = LlamaConfig(vocab=96, width=48, heads=4, kv_heads=2, head_dim=12, context=64, blocks=blocks)
    return random_llama(cfg, 0, std=0.2)


def test_a_token_gets_the_weighted_sum_of_its_experts():
    part = mixture().blocks[0].experts
    x = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(1))
    logits = part.router(x)
    for b in range(3):
        for t in range(7):
            best = logits[b, t].topk(2)
            want = sum(
                p * part.get_submodule(str(int(e)))(x[b, t][None])[0]
                for p, e in zip(best.values.softmax(0), best.indices)
            )
            assert torch.allclose(part(x)[b, t], want, atol=1e-5)


def test_all_experts_active_is_the_soft_mixture():
    part = mixture(active=4).blocks[0].experts
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    p = part.router(x).softmax(-1)
    want = sum(p[:, e : e + 1] * part.get_submodule(str(e))(x) for e in range(4))
    assert torch.allclose(part(x), want, atol=1e-5)


def test_balance_is_one_when_even_and_the_count_when_not():
    even = torch.eye(4).repeat(8, 1) * 50
    assert balance_loss(even, 1) == pytest.approx(1, abs=1e-4)
    assert balance_loss(torch.tensor([[50.0, 0, 0, 0]]).repeat(8, 1), 1) == pytest.approx(4, abs=1e-4)


def test_only_the_chosen_get_gradients():
    part = Experts(8, 6, 3, 1).requires_grad_(True)
    with torch.no_grad():
        for p in part.parameters():
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
        part.router.weight.zero_()
        part.router.weight[1] = 1
    part(F.relu(torch.ones(2, 8))).sum().backward()
    assert part.get_submodule("1").up.weight.grad.abs().sum() > 0 and part.get_submodule("0").up.weight.grad is None


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model, ids = mixture(), torch.arange(20)[None]
    folder = save_artifact(tmp_path / "mix", model, None, {}, {})
    again = load(folder).model
    assert same_state(again, model) and torch.equal(again(ids), model(ids))
    assert "blocks.0.experts.router" in again.linears() and "blocks.0.experts.3.down" in again.linears()
    assert list(uniform_specs(model.cfg, {})) == list(model.linears())


@pytest.mark.parametrize("solver", ["gptq", "rtn"])
def test_quantized(solver, tmp_path):
    model, task = mixture(), tiny_task()
    small = Quantize(4, group=12, solver=solver, calibration=16).apply(model, task)
    assert small.linears()["blocks.0.experts.2.down"].spec()["bits"] == 4
    again = load(save_artifact(tmp_path / "q", small, None, {}, {})).model
    assert task.score(again, "validation") == task.score(small, "validation")


def test_second_order_rounding_of_experts_beats_nearest():
    model, task = mixture(), tiny_task()
    ids = task.windows("train")[:16, :-1]
    with torch.no_grad():
        want = model(ids)
        off = {
            s: float(
                (Quantize(3, group=12, solver=s, embed_bits=16, calibration=16).apply(model, task)(ids) - want)
                .square()
                .mean()
            )
            for s in ("gptq", "rtn")
        }
    assert off["gptq"] < off["rtn"]


def test_methods_that_cannot_treat_it_say_why():
    model = mixture()
    for name, kind in registry().items():
        reason = kind().accepts(model)
        assert reason is None or "mixture" in reason, name
    assert "modules=qk,vo" in registry()["modegpt"]().accepts(model)


def test_the_engine_points_to_the_other_runtime():
    with pytest.raises(NetsukeError, match=r"mixture of 4 experts.*--backend torch"):
        Engine.of_model(mixture())


def test_plans_refuse_with_a_sentence():
    cfg = mixture().cfg
    with pytest.raises(NetsukeError, match="block 0 is a mixture of 4 experts"):
        linear_layers(cfg, uniform_specs(cfg, {"kind": "dense", "dtype": "float16"}))


@pytest.mark.parametrize("experts, active", [(4, 0), (4, 5), (0, 2), (-1, 1), (1 << 20, 1)])
def test_hostile_numbers_of_experts(experts, active):
    cfg = mixture().cfg
    bad = msgspec.structs.replace(cfg.blocks[0], experts=experts, active=active)
    with pytest.raises(NetsukeError, match="experts"):
        check_config(msgspec.structs.replace(cfg, blocks=(bad, cfg.blocks[1])), "test")
