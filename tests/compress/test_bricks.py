"""Bricks: found where they were planted, cut out for real, put back bit for bit; manifests are checked."""

import json

import pytest
import torch

from netsuke.compress import bricks
from netsuke.compress.bricks import Brick, Manifest
from netsuke.compress.quantize import quantize_linear
from netsuke.errors import NetsukeError
from netsuke.measure.neurons import silence
from netsuke.models.load import load
from netsuke.models.save import save_artifact
from tests.tiny import same_state, tiny_llama

IDS = torch.randint(0, 96, (3, 12), generator=torch.Generator().manual_seed(9))


def instances(count: int = 60, length: int = 10) -> dict[str, torch.Tensor]:
    """Two skills by their letters: low ids and high ids."""
    rng = torch.Generator().manual_seed(0)
    return {
        "low": torch.randint(0, 40, (count, length), generator=rng),
        "high": torch.randint(50, 96, (count, length), generator=rng),
    }


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def found(model):
    return bricks.find(model, instances(), share=0.1)


def test_a_planted_neuron_is_in_its_brick():
    """A neuron whose gate answers to the embeddings of high ids alone."""
    model = tiny_llama(tied=False)
    direction = torch.nn.functional.normalize(torch.randn(48, generator=torch.Generator().manual_seed(3)), dim=0)
    model.embed.weight[50:] += 20 * direction
    model.blocks[0].gate.weight[7] = 3 * direction
    model.blocks[0].up.weight[7] = 3 * direction
    got = bricks.find(model, instances(), share=0.05)
    assert float(got.scores["high"][0][7]) > 0.95 and 7 in got.manifest.brick("high").sites["blocks.0.hidden"]
    chance = got.chance("high", 0)
    assert float(got.scores["high"][0][7]) > chance.best_95 > chance.mean
    assert chance.mean == pytest.approx(0.5, abs=0.05)


@torch.no_grad()
def test_a_cut_is_a_mask_that_takes_no_room(model, found, tmp_path):
    smaller = bricks.remove(model, found.manifest, ["low"], spare=False)
    brick = found.manifest.brick("low")
    assert [b.hidden for b in smaller.cfg.blocks] == [72, 72]
    assert model.bytes() - smaller.bytes() == brick.bytes == 2 * 8 * 3 * 48 * 4
    masked = tiny_llama()
    masked.stand({site: silence(torch.tensor(chosen)) for site, chosen in brick.sites.items()})
    torch.testing.assert_close(smaller(IDS), masked(IDS), rtol=1e-4, atol=1e-4)
    assert same_state(model, tiny_llama())
    back = load(save_artifact(tmp_path / "m", smaller, None, {}, {})).model
    assert torch.equal(back(IDS), smaller(IDS))


@torch.no_grad()
def test_what_is_cut_out_can_be_put_back_bit_for_bit(model, found):
    sites = found.manifest.brick("high").sites
    smaller, parts = bricks.cut(model, sites), bricks.extract(model, sites)
    assert same_state(bricks.graft(smaller, parts, sites), model)
    grown = bricks.graft(model, {"blocks.1.hidden": tuple(p * 0 for p in parts["blocks.1.hidden"])})
    assert grown.cfg.blocks[1].hidden == 88 and grown.cfg.blocks[0].hidden == 80
    torch.testing.assert_close(grown(IDS), model(IDS), rtol=1e-4, atol=1e-4)
    assert torch.equal(grown.blocks[1].gate.weight[:80], model.blocks[1].gate.weight)


def test_harm_is_the_loss_that_a_cut_adds(model, found):
    texts, sites = instances(20), found.manifest.brick("low").sites
    base = {s: bricks.instance_loss(model, ids) for s, ids in texts.items()}
    got, smaller = bricks.harm(model, sites, texts, base), bricks.cut(model, sites)
    logits = smaller(texts["high"][:, :-1])[:, 1:]  # the first token is not counted
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts["high"][:, 2:].flatten())
    assert got["high"] == pytest.approx(float(by_hand) - base["high"], abs=1e-5)
    assert set(got) == {"low", "high"} and bricks.harm(model, {}, texts, base) == {"low": 0.0, "high": 0.0}


def test_levels_are_what_a_brick_answers_to_others_and_to_its_own(model, found):
    for skill, other in (("low", "high"), ("high", "low")):
        heard = {s: bricks.fired(model, found.manifest, ids)[skill] for s, ids in instances().items()}
        others, own = found.manifest.brick(skill).levels
        assert own > others  # a mean over instances here, of all tokens at once there
        assert (others, own) == pytest.approx((heard[other], heard[skill]), rel=0.02)
    assert bricks.find(model, instances(), indicator="output").manifest.brick("low").levels is None


def test_a_prompt_fires_the_bricks_of_its_skill(model, found):
    texts = instances(8)
    low, high = (bricks.fired(model, found.manifest, texts[skill]) for skill in ("low", "high"))
    assert low["low"] > high["low"] and high["high"] > low["high"]
    with pytest.raises(NetsukeError, match="of this manifest: it was made for a base"):
        bricks.fired(tiny_llama(seed=1), found.manifest, IDS)


def test_shared_neurons_are_spared_unless_asked(model):
    base = bricks.fingerprint(model)
    manifest = Manifest(base).plus(
        Brick("a", "neurons", {"blocks.0.hidden": (1, 2, 3)}, {"a": 1.0}, 0, base),
        Brick("b", "neurons", {"blocks.0.hidden": (3, 4)}, {"b": 1.0}, 0, base),
    )
    assert bricks.leaving(manifest, ["a"]) == {"blocks.0.hidden": {1, 2}}
    assert bricks.remove(model, manifest, ["a"]).cfg.blocks[0].hidden == 78
    assert bricks.remove(model, manifest, ["a"], spare=False).cfg.blocks[0].hidden == 77
    assert bricks.keep_only(model, manifest, ["b"]).cfg.blocks[0].hidden == 78
    assert bricks.keep_only(model, manifest, ["a", "b"]).cfg == model.cfg
    smaller = bricks.remove(model, manifest, ["a"])
    left = bricks.after_removal(manifest, smaller, ["a"])
    assert left.base == bricks.fingerprint(smaller) and left.brick("b").parents == (base,)
    one, other = bricks.extract(model, manifest.brick("b").sites), bricks.extract(smaller, left.brick("b").sites)
    assert all(torch.equal(p, q) for p, q in zip(one["blocks.0.hidden"], other["blocks.0.hidden"]))


def test_manifests_are_kept_and_checked(found, tmp_path):
    path = tmp_path / "bricks.json"
    found.manifest.write(path)
    assert bricks.read_manifest(path) == found.manifest
    first = path.read_bytes()
    found.manifest.write(path)
    assert path.read_bytes() == first
    good = json.loads(first)
    for change, words in (
        ({"version": 9}, "version 9"), ({"format": "x"}, "format 'x'"), ({"bricks": [{"id": "a"}]}, "kind"),
        ({"bricks": good["bricks"] * 2}, "has one of this id"), ({"base": "0" * 64}, "another model|made for a base"),
        ({"bricks": [good["bricks"][0] | {"kind": "spell"}]}, "of kind 'spell'"), ({"extra": 1}, "extra"),
        ({"bricks": [good["bricks"][0] | {"skills": {"low": float("inf")}}]}, "no finite number"),
    ):  # fmt: skip
        path.write_text(json.dumps(good | change))
        with pytest.raises(NetsukeError, match=words):
            bricks.read_manifest(path)


def test_misuse_is_refused_in_a_sentence(model, found):
    few = {"a": IDS[:, :10].repeat(20, 1), "b": IDS[:2, :10]}
    with pytest.raises(NetsukeError, match="'b' has 2 instances; allowed: 50 or more"):
        bricks.find(model, few)
    with pytest.raises(NetsukeError, match="two or more"):
        bricks.find(model, {"a": few["a"]})
    with pytest.raises(NetsukeError, match=r"instances of \[9, 10\] tokens"):
        bricks.find(model, {"a": few["a"], "b": few["a"][:, :9]})
    packed = tiny_llama()
    packed.replace("blocks.0.gate", quantize_linear(packed.blocks[0].gate, 8, 16, "rtn"))
    with pytest.raises(NetsukeError, match=r"blocks\.0\.gate is stored as quant"):
        bricks.find(packed, instances())
    with pytest.raises(NetsukeError, match="made for a base with sha256"):
        bricks.remove(tiny_llama(seed=1), found.manifest, ["low"])
    with pytest.raises(NetsukeError, match="no such brick; allowed: low, high"):
        bricks.remove(model, found.manifest, ["music"])
    with pytest.raises(NetsukeError, match="no brick has it; allowed: high, low"):
        found.manifest.of_skills(["music"])
    with pytest.raises(NetsukeError, match=r"all 80 of blocks\.0 would go"):
        bricks.cut(model, {"blocks.0.hidden": range(80)})
    with pytest.raises(NetsukeError, match="neurons 3 to 80"):
        bricks.cut(model, {"blocks.0.hidden": (3, 80)})
    with pytest.raises(NetsukeError, match=r"neurons -1 to 1000"):
        bricks.cut(model, {"blocks.0.hidden": (10**30, -1)})
    for site in ("blocks.2.hidden", f"blocks.{'9' * 5000}.hidden"):
        with pytest.raises(NetsukeError, match="no block has it"):
            bricks.cut(model, {site: (3,)})
    parts = bricks.extract(model, {"blocks.0.hidden": (1, 2)})
    with pytest.raises(NetsukeError, match="1 places for 2 neurons"):
        bricks.graft(model, parts, {"blocks.0.hidden": (5,)})
    with pytest.raises(NetsukeError, match="rows of shapes"):
        bricks.graft(tiny_llama(width=24, head_dim=6), parts)
    plugin = Brick("p", "adapter", {"blocks.0.q": ()}, {}, 0, found.manifest.base)
    with pytest.raises(NetsukeError, match="take a plugin off"):
        bricks.leaving(found.manifest.plus(plugin), ["p"])
