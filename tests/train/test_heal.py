"""Healing: the size stays, codes stay, validation never worsens, and a model before it is learned from."""

import pytest
import torch

from netsuke.compress.modegpt import MoDeGPT
from netsuke.compress.quantize import Quantize
from netsuke.errors import NetsukeError
from netsuke.layers.quantized import QuantLinear
from netsuke.train.heal import Heal, ScaledCodes
from tests.tiny import same_state, tiny_llama, tiny_task


@pytest.fixture(scope="module")
def task():
    return tiny_task()


@pytest.fixture(scope="module")
def carved(task):
    model = tiny_llama()
    return model, Quantize(bits=2, group=16, solver="rtn", embed_bits=16).apply(model, task)


def divergence(a, b, task):
    with torch.no_grad():
        ids = task.windows("validation")[:, :-1]
        p, q = a(ids).log_softmax(-1), b(ids).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())


def test_scaled_codes_start_as_the_map(carved):
    layer = carved[1].blocks[0].down
    x = torch.randn(3, layer.ins, generator=torch.Generator().manual_seed(0))
    learns = ScaledCodes(layer)
    assert torch.allclose(learns(x), layer(x), atol=1e-5) and same_state(learns.learned(), layer)


@pytest.mark.parametrize("parts", [("scales", "norms"), ("scales",), ("scales", "norms", "dense")])
def test_comes_closer_to_the_model_before_and_keeps_its_size(carved, task, parts):
    before, model = carved
    healed = Heal(steps=40, parts=parts, rate=1e-2).apply(model, task, before)
    assert divergence(before, healed, task) < 0.95 * divergence(before, model, task)
    assert healed.bytes() == model.bytes() and healed.cfg == model.cfg
    for name, layer in healed.linears().items():
        old = model.linears()[name]
        assert layer.spec() == old.spec()
        if isinstance(layer, QuantLinear):
            assert torch.equal(layer.codes, old.codes) and torch.equal(layer.zeros, old.zeros)


def test_validation_never_worsens(carved, task):
    _, model = carved
    wild = Heal(steps=8, rate=0.9, dense=0.9).apply(model, task)
    assert task.mean_loss(wild, "validation", 8) <= task.mean_loss(model, "validation", 8)


def test_learns_from_text_alone_after_a_cut(task):
    cut = MoDeGPT(remove=0.3, calibration=8).apply(tiny_llama(), task)
    healed = Heal(steps=30).apply(cut, task)
    assert task.mean_loss(healed, "validation") < task.mean_loss(cut, "validation")


def test_contract(carved, task):
    before, model = carved
    method, kept = Heal(steps=6), {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two = method.apply(model, task, before), method.apply(model, task, before)
    assert same_state(one, two) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for p in one.parameters())
    assert same_state(method.strengths()[0].apply(model, task), model)
    assert Heal(**{k: v for k, v in method.to_json().items() if k != "method"}) == method


def test_nothing_to_learn_is_said(task):
    with pytest.raises(NetsukeError, match="nothing in the model is scales"):
        Heal(steps=2, parts=("scales",)).apply(tiny_llama(), task)


@pytest.mark.parametrize("knobs", [{"parts": ("all",)}, {"parts": ()}, {"steps": -1}, {"rate": 0}, {"batch": 0}])
def test_bad_knobs(knobs):
    with pytest.raises(NetsukeError, match="build heal"):
        Heal(**knobs)
