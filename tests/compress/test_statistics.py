"""One pass for all: what it collects is what the maps are given, once for maps that share an input."""

import pytest
import torch

from netsuke.compress.modegpt import MoDeGPT
from netsuke.compress.statistics import collect, leader_of
from netsuke.errors import NetsukeError
from tests.models.test_experts import mixture
from tests.tiny import tiny_llama, tiny_task


@torch.no_grad()
def test_grams_are_those_of_the_inputs():
    model, task = tiny_llama(), tiny_task()
    ids = task.windows("train")[:8, :-1]
    seen = collect(model, task, 8)
    x = model.embed.rows(ids)
    normed = model.blocks[0].attn_norm(x).flatten(0, 1).double()
    assert torch.allclose(seen.grams["blocks.0.v"].total, normed.T @ normed, rtol=1e-4, atol=1e-3)
    assert (
        seen.grams["blocks.0.v"] is seen.grams["blocks.0.q"]
        and seen.grams["blocks.1.up"] is seen.grams["blocks.1.gate"]
    )
    out = model.blocks[0].q(model.blocks[0].attn_norm(x)).double().square().sum((0, 1))
    assert torch.allclose(seen.squares["blocks.0.q"].total, out, rtol=1e-4, atol=1e-3)
    assert seen.grams["embed"].rows == ids.numel() and leader_of("blocks.0.experts.3.up") == "blocks.0.experts.3.gate"


def test_experts_are_counted_by_the_tokens_they_get():
    model, task = mixture(active=2, experts=4), tiny_task()
    seen = collect(model, task, 8)
    sent = sum(seen.grams[f"blocks.0.experts.{e}.gate"].rows for e in range(4))
    assert sent == 2 * seen.grams["blocks.0.experts.router"].rows
    cut = MoDeGPT(remove=0.1, modules=("qk", "vo"), calibration=8).apply(model, task)
    assert cut.bytes() < model.bytes()


def test_weights_that_explode_are_named():
    model = tiny_llama()
    model.blocks[1].up.weight.data[0, 0] = torch.inf
    with pytest.raises(NetsukeError, match=r"blocks\.1\.down are not finite"):
        collect(model, tiny_task(), 4)
