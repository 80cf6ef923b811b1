"""Sites of the Llama family: nothing changes while nothing stands there, every one is reached, attention in the open agrees."""

import copy

import pytest
import torch

from netsuke.errors import NetsukeError
from netsuke.models.llama import SITES, KVCache
from tests.tiny import tiny_llama

IDS = torch.arange(24).view(2, 12) % 20


@torch.no_grad()
def logits(model):
    return model(IDS)


def same(x):
    return x.clone()


@pytest.mark.parametrize("knobs", [{}, {"tied": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True}])
def test_identities_at_all_sites_change_nothing(knobs):
    model = tiny_llama(**knobs)
    before = logits(model)
    model.stand({f"blocks.{i}.{s}": same for i in range(len(model.blocks)) for s in SITES})
    assert torch.allclose(logits(model), before, atol=2e-5)
    model.stand({})
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("site", SITES)
def test_every_site_is_reached_and_matters(site):
    model, seen = tiny_llama(), []
    before = logits(model)

    def stretch(x):
        seen.append(x.shape)
        return x * (1 + 0.5 * torch.arange(x.shape[-1]) / x.shape[-1])

    model.stand({f"blocks.1.{site}": stretch})
    assert not torch.allclose(logits(model), before, atol=1e-4)
    assert len(seen) == 1


@torch.no_grad()
def test_sites_while_decoding():
    model = tiny_llama()
    whole = model(IDS)
    model.stand({"blocks.0.scores": same, "blocks.1.probs": same})
    cache = KVCache(model.cfg, 2, 12)
    parts = [model(IDS[:, :5], cache)] + [model(IDS[:, t : t + 1], cache) for t in range(5, 12)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-5)


def test_a_site_that_is_none_is_refused():
    model = tiny_llama()
    for name in ("blocks.9.q", "blocks.0.nothing", "hidden", "blocks.-1.q"):
        with pytest.raises(NetsukeError, match="no block has this site"):
            model.stand({name: same})


def test_a_copy_has_its_own_sites():
    model = tiny_llama()
    model.stand({"blocks.0.hidden": same})
    other = copy.deepcopy(model)
    other.stand({})
    assert model.blocks[0].sites and not other.blocks[0].sites
