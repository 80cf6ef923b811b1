"""Plugins on one base: attached without a copy, merged by products, taken off without a trace, found by their texts."""

import json
from dataclasses import replace

import pytest
import torch

from netsuke.compress import adapters
from netsuke.compress.adapters import Plugin, Rack, attach, burned, merge
from netsuke.compress.bricks import Manifest, fingerprint
from netsuke.errors import NetsukeError
from netsuke.models.weights import write_safetensors
from tests.tiny import same_state, tiny_llama

IDS = torch.randint(0, 96, (3, 12), generator=torch.Generator().manual_seed(9))
MAPS = ("blocks.0.q", "blocks.1.down")


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def plugin(model, name: str, seed: int, rank: int = 3, maps=MAPS, texts=None) -> Plugin:
    rng, linears = torch.Generator().manual_seed(seed), model.linears()
    thin = {
        n: (torch.randn(rank, linears[n].ins, generator=rng), 0.1 * torch.randn(linears[n].outs, rank, generator=rng))
        for n in maps
    }
    found = {} if texts is None else adapters.text_key(model, texts)
    return Plugin(name, fingerprint(model), thin, {name: 0.9}, (), **found)


def product(p: Plugin, name: str) -> torch.Tensor:
    first, second = p.thin[name]
    return second.double() @ first.double()


@torch.no_grad()
def test_attached_plugins_share_the_base_and_leave_no_trace(model):
    before, one = model(IDS), plugin(model, "a", 1)
    with_one = attach(model, one)
    assert not torch.equal(with_one(IDS), before) and torch.equal(model(IDS), before)
    assert same_state(model, tiny_llama())
    theirs = {t.data_ptr() for t in with_one.state_dict().values()}
    assert all(t.data_ptr() in theirs for t in model.state_dict().values())
    assert with_one.bytes() == model.bytes() + one.bytes()
    torch.testing.assert_close(burned(model, one)(IDS), with_one(IDS), rtol=1e-3, atol=1e-3)
    assert type(burned(model, one).blocks[0].q).__name__ == "Dense"


@torch.no_grad()
def test_merging_adds_products_not_factors(model):
    a, b = plugin(model, "a", 1), plugin(model, "b", 2, rank=2, maps=(*MAPS, "blocks.0.up"))
    both = merge([a, b], [0.7, -0.3], "both")
    for n in MAPS:
        torch.testing.assert_close(product(both, n), 0.7 * product(a, n) - 0.3 * product(b, n), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(product(both, "blocks.0.up"), -0.3 * product(b, "blocks.0.up"), rtol=1e-5, atol=1e-6)
    assert both.parents == ("a", "b") and both.skills == {"a": 0.9}
    cut = merge([a, b], [0.7, -0.3], "cut", rank=2)
    whole = product(both, MAPS[0])
    u, s, vt = torch.linalg.svd(whole)
    torch.testing.assert_close(product(cut, MAPS[0]), u[:, :2] * s[:2] @ vt[:2], rtol=1e-4, atol=1e-5)
    c = plugin(model, "c", 3)
    naive = merge([a, c], [0.5, 0.5], "naive", how="factors")
    cross = product(naive, MAPS[0]) - 0.5 * product(a, MAPS[0]) - 0.5 * product(c, MAPS[0])
    assert float(cross.norm()) > 0.3 * float(product(a, MAPS[0]).norm())  # the cross terms that products do not have
    keyed = [plugin(model, n, i, texts=IDS[i : i + 2]) for i, n in enumerate("ab")]
    torch.testing.assert_close(merge(keyed, [1, 1], "x").key, (keyed[0].key + keyed[1].key) / 2)
    assert both.key is None and merge([keyed[0], b], [1, 1], "x").spread is None
    gone = merge([both, a, b], [1.0, -0.7, 0.3], "nothing")
    torch.testing.assert_close(attach(model, gone)(IDS), model(IDS), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_rack_finds_the_plugin_of_a_text_and_shares_the_base(model):
    rng = torch.Generator().manual_seed(5)
    texts = {n: torch.randint(a, a + 30, (104, 10), generator=rng) for n, a in (("low", 0), ("mid", 32), ("high", 64))}
    made = [plugin(model, n, i, texts=t[:100]) for i, (n, t) in enumerate(texts.items())]
    rack = Rack(model, made)
    mixed = torch.cat([t[100:] for t in texts.values()])
    wide = Rack(model, [replace(p, spread=torch.eye(48)) for p in made])  # no direction counts more than another
    near = torch.cdist(adapters.mean_embedding(model, mixed), torch.stack([p.key for p in made]))
    assert wide.choose(mixed) == [list(texts)[i] for i in near.argmin(1).tolist()]
    assert rack.choose(mixed) == ["low"] * 4 + ["mid"] * 4 + ["high"] * 4
    got = rack(mixed, prompt=6)
    assert rack.trace == rack.choose(mixed[:, :6]) and rack.bytes() == model.bytes() + 3 * made[0].bytes()
    for i, name in enumerate(rack.trace):
        torch.testing.assert_close(got[i : i + 1], rack.models[name](mixed[i : i + 1]), rtol=1e-4, atol=1e-4)


def test_files_are_kept_and_checked(model, tmp_path):
    path, one = tmp_path / "a.safetensors", plugin(model, "a", 1, texts=IDS)
    one.write(path)
    back = adapters.read_plugin(path)
    assert (back.id, back.base, back.skills, back.parents) == (one.id, one.base, one.skills, one.parents)
    assert torch.equal(back.key, one.key) and torch.equal(back.spread, one.spread)
    assert all(torch.equal(x, y) for n in MAPS for x, y in zip(back.thin[n], one.thin[n]))
    entry = one.brick("a.safetensors")
    assert entry.bytes == one.bytes() and Manifest(one.base).plus(entry).brick("a").kind == "adapter"
    about = {"about": json.dumps({"id": "x", "base": "y", "skills": {}, "parents": []})}
    good = one.thin[MAPS[0]]
    for tensors, meta, words in (
        ({"q.first": good[0], "q.second": good[1]}, {}, "says nothing about a plugin"),
        ({"q.first": good[0]}, about, "q has no pair of factors"),
        ({"q.first": good[0][:2], "q.second": good[1]}, about, "q has no pair of factors"),
        ({"q.first": good[0] / 0, "q.second": good[1]}, about, "NaN or infinite"),
        ({"q.first": good[0].double(), "q.second": good[1]}, about, "stored as float64"),
        ({"q.first": good[0], "q.second": good[1], "key": good[0][0]}, about, "do not fit each other"),
        ({"q.first": good[0], "q.second": good[1]}, {"about": "[" * 100_000}, "says nothing about a plugin"),
        (
            {"q.first": good[0], "q.second": good[1]},
            {"about": about["about"].replace("{}", '{"s": NaN}')},
            "says nothing",
        ),
        (
            {"q.first": good[0], "q.second": good[1]},
            {"about": about["about"].replace("x", "x" * 999)},
            "says nothing",
        ),
    ):
        write_safetensors(path, tensors, meta)
        with pytest.raises(NetsukeError, match=words):
            adapters.read_plugin(path)


def test_misuse_is_refused_in_a_sentence(model):
    a, b, other = plugin(model, "a", 1), plugin(model, "b", 2, rank=2), plugin(tiny_llama(seed=1), "o", 1)
    with pytest.raises(NetsukeError, match="'o': it was made for a base with sha256"):
        attach(model, other)
    with pytest.raises(NetsukeError, match="'o': it was made for a base"):
        merge([a, other], [1, 1], "x")
    with pytest.raises(NetsukeError, match=r"ranks \[3, 2\] at blocks\.0\.q.*how='products'"):
        merge([a, b], [1, 1], "x", how="factors")
    with pytest.raises(NetsukeError, match="one finite weight for each"):
        merge([a, b], [1], "x")
    with pytest.raises(NetsukeError, match="how='sum'"):
        merge([a, b], [1, 1], "x", how="sum")
    with pytest.raises(NetsukeError, match="rank 0"):
        merge([a, b], [1, 1], "x", rank=0)
    with pytest.raises(NetsukeError, match="which the model lacks"):
        attach(model, Plugin("p", a.base, {"blocks.9.q": a.thin[MAPS[0]]}))
    with pytest.raises(NetsukeError, match="factors of a map of 48 by 80"):
        attach(model, Plugin("p", a.base, {"blocks.0.q": a.thin[MAPS[1]]}))
    wrong = Plugin("w", a.base, {MAPS[0]: a.thin[MAPS[1]]})
    with pytest.raises(NetsukeError, match=r"blocks\.0\.q is 48 by 48 and 48 by 80"):
        merge([a, wrong], [1, 1], "x")
    with pytest.raises(NetsukeError, match="it has no key"):
        Rack(model, [a])
    keyed = plugin(model, "a", 1, texts=IDS)
    with pytest.raises(NetsukeError, match="its key is of \\[3\\] numbers"):
        Rack(model, [replace(keyed, key=keyed.key[:3])])
    with pytest.raises(NetsukeError, match="two plugins have this id"):
        Rack(model, [keyed, keyed])
