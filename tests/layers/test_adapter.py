"""Adapter: a thin map beside a base that it shares and never changes."""

import pytest
import torch

from netsuke.compress.quantize import quantize_linear
from netsuke.errors import NetsukeError
from netsuke.layers.adapter import Adapter
from netsuke.layers.linear import Dense, halved
from netsuke.layers.lowrank import LowRank
from netsuke.layers.registry import layer_bytes, layer_from_spec
from netsuke.models.llama import Llama
from netsuke.models.load import load
from netsuke.models.save import save_artifact
from netsuke.runtime.engine import Engine
from netsuke.runtime.memory_plan import inference_plan, linear_layers
from tests.tiny import same_state, tiny_llama

O, I, R = 40, 56, 4  # noqa: E741  the house's letters: outputs, inputs, rank


def made(bits: int | None = None, bias: bool = True) -> Adapter:
    rng = torch.Generator().manual_seed(2)
    base = Dense(torch.randn(O, I, generator=rng), torch.randn(O, generator=rng) if bias else None)
    first, second = Dense(torch.randn(R, I, generator=rng)), Dense(torch.randn(O, R, generator=rng))
    return Adapter(base if bits is None else quantize_linear(base, bits, 16, "rtn"), first, second)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_sum_of_base_and_factors(bits, bias):
    layer = made(bits, bias)
    W = layer.base.to_dense() + layer.second.to_dense() @ layer.first.to_dense()
    x = torch.randn(2, 3, I, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, W, layer.bias), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.to_dense(), W)
    ids = torch.tensor([[0, O - 1], [3, 3]])
    torch.testing.assert_close(layer.rows(ids), W[ids])
    assert layer.macs() == O * I + R * (O + I)
    assert layer.bytes() == layer.base.bytes() + layer.own_bytes() and layer.own_bytes() == 4 * R * (O + I)


def test_merged_answers_alike_and_the_base_is_untouched():
    layer = made()
    before = layer.base.weight.clone()
    x = torch.randn(5, I, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer.merged()(x), layer(x), rtol=1e-5, atol=1e-5)
    assert isinstance(layer.merged(), Dense) and torch.equal(layer.base.weight, before)


@pytest.mark.parametrize("bits", [None, 4])
def test_spec_rebuilds_the_layer(bits):
    layer = made(bits)
    spec = layer.spec()
    again = layer_from_spec(spec, O, I, True)
    assert again.spec() == spec and again.bytes() == layer.bytes() == layer_bytes(spec, O, I, True)
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again.to_dense(), layer.to_dense())


def test_halved_is_half_throughout():
    small = halved(made(), "q")
    assert {p.weight.dtype for p in (small.base, small.first, small.second)} == {torch.float16}
    assert 2 * small.bytes() == made().bytes()


def test_refused_where_it_cannot_be():
    layer = made()
    with pytest.raises(NetsukeError, match="base is a Adapter"):
        Adapter(layer, layer.first, layer.second)
    with pytest.raises(NetsukeError, match="factors of a map of 40 by 55"):
        Adapter(layer.base, Dense(torch.zeros(R, I - 1)), layer.second)
    with pytest.raises(NetsukeError, match="and a bias"):
        Adapter(layer.base, layer.first, Dense(layer.second.weight, torch.zeros(O)))
    spec = layer.spec()
    for change, words in (
        ({"base": spec}, "base is of kind 'adapter'"), ({"rank": 400}, "rank 400"), ({"alpha": 3}, "unknown setting"),
        ({"base": None}, "base is of kind 'None'"), ({"first": {"kind": "sparse"}}, "first factor is of kind"),
    ):  # fmt: skip
        with pytest.raises(NetsukeError, match=words):
            layer_from_spec(spec | change, O, I, True)
    with pytest.raises(NetsukeError, match="first factor is a LowRank"):
        Adapter(layer.base, LowRank(Dense(torch.zeros(2, I)), Dense(torch.zeros(R, 2))), layer.second)


def with_adapters(names: tuple[str, ...] = ("blocks.0.q", "blocks.1.down", "embed"), **shape) -> Llama:
    """A tiny model with thin maps beside some of its own, one of them quantized."""
    model = tiny_llama(**shape)
    model.replace("blocks.1.down", quantize_linear(model.blocks[1].down, 8, 16, "rtn"))
    rng = torch.Generator().manual_seed(4)
    for name in names:
        base = model.linears()[name]
        thin = Dense(torch.randn(3, base.ins, generator=rng)), Dense(torch.randn(base.outs, 3, generator=rng))
        model.replace(name, Adapter(base, *thin))
    return model


@torch.no_grad()
def test_a_model_with_adapters_is_saved_and_loaded(tmp_path):
    model = with_adapters()
    assert len(model.linears()) == len(tiny_llama().linears())
    back = load(save_artifact(tmp_path / "m", model, None, {}, {})).model
    ids = torch.arange(8)[None]
    assert same_state(back, model) and torch.equal(back(ids), model(ids))


def test_a_plan_counts_adapters():
    model = with_adapters()
    specs = {name: layer.spec() for name, layer in model.linears().items()}
    maps = linear_layers(model.cfg, specs)
    for name, layer in model.linears().items():
        assert (maps[name].bytes, maps[name].macs) == (layer.bytes(), layer.macs()), name
    plan = inference_plan(model.cfg, specs, context=64)
    assert plan.weights == model.bytes() + sum(b.freq.numel() * 4 for b in model.blocks)
    plain = tiny_llama()
    without = inference_plan(plain.cfg, {n: m.spec() for n, m in plain.linears().items()}, context=64)
    assert plan.activations + plan.buffers >= without.activations + without.buffers


def test_the_engine_refuses_adapters_in_a_sentence(tmp_path):
    path = save_artifact(tmp_path / "m", with_adapters(("blocks.0.q",)), None, {}, {})
    with pytest.raises(NetsukeError, match=r"blocks\.0\.q") as e:
        Engine.open(path)
    assert str(e.value).count("\n") == 0
