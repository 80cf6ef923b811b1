"""Plugins learn their texts, leave the base as it is, and stand on quantized bases too."""

import pytest
import torch

from netsuke.compress.adapters import attach
from netsuke.compress.quantize import quantize_linear
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.layers.lowrank import LowRank
from netsuke.tasks.language import token_losses
from netsuke.train.lora import Lora, train_plugin
from tests.tiny import same_state, tiny_llama

# Texts that count upwards: a rule that a random model does not know.
TEXTS = (torch.arange(17)[None] + torch.arange(40)[:, None]) % 96


def loss(model) -> float:
    with torch.no_grad():
        return float(token_losses(model, TEXTS[::3]).mean())


def test_a_plugin_learns_and_the_base_stays():
    model, state = tiny_llama(), torch.get_rng_state()
    made, losses = train_plugin(model, TEXTS, Lora(steps=30, rate=1e-2), "count", {"counting": 1.0})
    assert same_state(model, tiny_llama()) and not any(p.requires_grad for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert len(losses) == 30 and losses[0] == pytest.approx(loss(model), rel=0.2)
    assert loss(attach(model, made)) < 0.7 * loss(model)
    assert made.bytes() == sum(4 * 4 * (m.outs + m.ins) for n, m in model.linears().items() if n != "embed")
    again, _ = train_plugin(model, TEXTS, Lora(steps=30, rate=1e-2), "count")
    assert all(torch.equal(a, b) for n in made.thin for a, b in zip(made.thin[n], again.thin[n]))


def test_a_quantized_base_bears_plugins():
    model = tiny_llama()
    for name in ("blocks.0.gate", "blocks.1.down"):
        model.replace(name, quantize_linear(model.linears()[name], 8, 16, "rtn"))
    made, _ = train_plugin(model, TEXTS, Lora(steps=20, rate=1e-2, targets=("gate", "down")), "count")
    assert set(made.thin) == {f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("gate", "down")}
    assert loss(attach(model, made)) < loss(model)


def test_misuse_is_refused_in_a_sentence():
    model = tiny_llama()
    for knobs, words in (
        ({"targets": ("embed",)}, "targets embed"), ({"rank": 0}, "rank=0"), ({"steps": 1.5}, "steps=1.5"),
        ({"rate": 2}, "rate=2"),
    ):  # fmt: skip
        with pytest.raises(NetsukeError, match=words):
            Lora(**knobs)
    with pytest.raises(NetsukeError, match=r"texts of shape \[40, 1\]"):
        train_plugin(model, TEXTS[:, :1], Lora(), "x")
    with pytest.raises(NetsukeError, match=r"beside blocks\.0\.q: rank 48"):
        train_plugin(model, TEXTS, Lora(rank=48), "x")
    model.replace("blocks.0.q", LowRank(Dense(torch.zeros(2, 48)), Dense(torch.zeros(48, 2))))
    with pytest.raises(NetsukeError, match=r"beside blocks\.0\.q: it is stored as lowrank"):
        train_plugin(model, TEXTS, Lora(), "x")
