"""The bidirectional encoder: attention of both kinds against plain formulas, padding, files."""

import json
import math

import msgspec
import pytest
import torch

from netsuke.compress.factorize import Factorize
from netsuke.errors import NetsukeError
from netsuke.layers.lowrank import LowRank
from netsuke.models.encoder import EncoderConfig, EncoderShape, check_encoder, projections, random_encoder
from netsuke.models.llama import half_precision
from netsuke.models.load import load, load_encoder
from netsuke.models.save import save_artifact
from tests.tiny import same_state, tiny_llama

BASE = {"width": 32, "heads": 4, "context": 24}
KINDS = {
    "full": {},
    "shared": {"attention": "linformer", "project": 6},
    "per head": {"attention": "linformer", "project": 6, "shared": False},
}


def frames(kind="full", seed=0, **rest):
    cfg = EncoderConfig.uniform(2, 48, **(BASE | {"features": 5, "classes": 7} | KINDS[kind] | rest))
    return random_encoder(cfg, seed, std=0.2)


def tokens(kind="full", **rest):
    return random_encoder(EncoderConfig.uniform(2, 48, **(BASE | {"vocab": 50} | KINDS[kind] | rest)), 0, std=0.2)


def batch(rows=3, length=20, features=5, seed=0):
    return torch.randn(rows, length, features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_the_published_formula(kind):
    block, x = frames(kind).blocks[0], batch(features=32)
    T, D = x.shape[1], 8
    q, k, v = (m(x).view(3, T, 4, D) for m in (block.q, block.k, block.v))
    heads = []
    for h in range(4):
        keys, values = k[:, :, h], v[:, :, h]
        if kind != "full":
            E, F = block.squeeze_k, block.squeeze_v
            E, F = (E, F) if kind == "shared" else (E[h], F[h])
            keys, values = E[:, :T] @ keys, F[:, :T] @ values
        weights = (q[:, :, h] @ keys.transpose(1, 2) / math.sqrt(D)).softmax(-1)
        heads.append(weights @ values)
    torch.testing.assert_close(block.attention(x), torch.cat(heads, -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("open_maps", [False, True])
def test_padding_changes_nothing(kind, open_maps):
    """What stands in padded places must not leak, above all not through Linformer's projections."""
    model, x = frames(kind).open_maps(open_maps), batch()
    mask = torch.arange(20)[None] < torch.tensor([20, 11, 3])[:, None]
    spoiled = torch.where(mask[..., None], x, 1e3)
    torch.testing.assert_close(model(x, mask), model(spoiled, mask))
    for row, length in enumerate((20, 11, 3)):
        torch.testing.assert_close(model(x, mask)[row], model(x[row : row + 1, :length])[0], rtol=1e-4, atol=1e-5)


def test_masking_after_the_projection_would_leak():
    """The control: without a mask the padding is part of every summary."""
    model, x = frames("shared"), batch()
    mask = torch.arange(20)[None] < torch.tensor([20, 11, 3])[:, None]
    assert not torch.allclose(model(x, mask)[1], model(x)[1], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_and_open_maps_agree(kind):
    model, x = frames(kind), batch()
    fused = model(x)
    torch.testing.assert_close(model.open_maps()(x), fused)
    torch.testing.assert_close(model.open_maps(False)(x), fused)


def test_every_token_sees_every_other():
    model, ids = tokens(), torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 50
    assert model(ids).shape == (1, 12, 50)
    assert bool(((model(ids) - model(changed)).abs().amax(-1) > 1e-5).all())


def test_linformer_adds_its_projections_and_nothing_else():
    counts = {k: sum(p.numel() for p in frames(k).parameters()) for k in KINDS}
    assert projections(frames("shared")) == counts["shared"] - counts["full"] == 2 * 2 * 24 * 6
    assert counts["per head"] - counts["full"] == 4 * 2 * 2 * 24 * 6


def test_too_many_tokens_are_refused():
    with pytest.raises(NetsukeError, match="25 tokens; allowed: at most 24"):
        frames()(batch(length=25))


@pytest.mark.parametrize(
    "changes,found",
    [
        ({"vocab": 9}, "vocab 9 and features 5"),
        ({"features": 0}, "vocab 0 and features 0"),
        ({"classes": 0}, "frames as inputs and no classes"),
        ({"heads": 5}, "a width of 32 for 5 heads"),
        ({"project": 4}, "project 4 with full attention"),
        ({"attention": "linformer"}, "project is 0"),
        ({"attention": "linformer", "project": 25}, "project is 25"),
        ({"width": 0}, "width is 0"),
        ({"context": 1 << 40}, "context is"),
        ({"blocks": ()}, "the number of layers is 0"),
        ({"blocks": (EncoderShape(0),)}, "hidden of block 0 is 0"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"bos": 3}, "special token 3"),
    ],
)
def test_impossible_configs_are_refused(changes, found):
    with pytest.raises(NetsukeError, match=found):
        check_encoder(msgspec.structs.replace(frames().cfg, **changes))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_gives_the_same_outputs(kind, tmp_path):
    model = half_precision(Factorize(rank=0.5, solver="svd", exclude=("blocks.1.*",)).apply(frames(kind)))
    save_artifact(tmp_path / "small", model, None, {"recipe": "none"}, {})
    again = load_encoder(tmp_path / "small.netsuke")
    assert isinstance(again.model.blocks[0].q, LowRank) and again.model.cfg == model.cfg
    assert same_state(again.model, model)
    assert torch.equal(again.model(batch()), model(batch()))


def test_families_are_not_mixed_up(tmp_path):
    save_artifact(tmp_path / "encoder", tokens(), None, {}, {})
    save_artifact(tmp_path / "decoder", tiny_llama(), None, {}, {})
    with pytest.raises(NetsukeError, match="a bidirectional encoder, no model that writes text"):
        load(tmp_path / "encoder.netsuke")
    with pytest.raises(NetsukeError, match="cannot load"):
        load_encoder(tmp_path / "decoder.netsuke")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m["config"].update(heads=5),
        lambda m: m["config"].update(context=1 << 30),
        lambda m: m["config"].update(attention="sparse"),
        lambda m: m["config"].update(family="llama"),
        lambda m: m.update(sites={"blocks.0.hidden": {}}),
        lambda m: m["layers"].pop("blocks.0.fc1"),
        lambda m: m["config"].update(classes=8),
        lambda m: m["config"].update(surprise=1),
    ],
)
def test_spoiled_manifests_are_refused_in_one_sentence(spoil, tmp_path):
    folder = save_artifact(tmp_path / "e", frames("shared"), None, {}, {})
    manifest = json.loads((folder / "manifest.json").read_text())
    spoil(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(NetsukeError, match="cannot load"):
        load_encoder(folder)
