"""Static grids travel with the artifact: same outputs bit for bit, hostile entries refused, engines without them too."""

import json

import pytest
import torch

from netsuke.errors import NetsukeError
from netsuke.export.gguf import write
from netsuke.layers.static import StaticGrid, TokenGrid
from netsuke.models.load import load
from netsuke.models.places import MANIFEST
from netsuke.models.save import save_artifact
from netsuke.models.static_sites import standing_grids, static_sites
from netsuke.runtime.engine import Engine, engine_plan
from tests.tiny import tiny_llama

GRIDS = {"blocks.0.hidden": StaticGrid(0.125, -3, 8), "blocks.1.scores": StaticGrid(2**-9, 0, 16)}
IDS = torch.arange(40).view(2, 20)


@pytest.fixture
def folder(tmp_path):
    model = tiny_llama()
    model.stand({**GRIDS, "blocks.1.up": lambda x: x})
    return save_artifact(tmp_path / "gridded", model, None, {}, {})


@torch.no_grad()
def test_saved_and_loaded_gives_the_same_outputs(folder):
    again, before = load(folder).model, tiny_llama()
    assert static_sites(again) == GRIDS
    plain = before(IDS)
    before.stand(GRIDS)
    assert torch.equal(again(IDS), before(IDS)) and not torch.equal(again(IDS), plain)


@torch.no_grad()
def test_grids_of_single_tokens_travel_too(tmp_path):
    model = tiny_llama()
    model.stand({"blocks.0.attn_in": TokenGrid(4), **GRIDS})
    again = load(save_artifact(tmp_path / "dynamic", model, None, {}, {})).model
    assert standing_grids(again) == {"blocks.0.attn_in": TokenGrid(4), **GRIDS} and static_sites(again) == GRIDS
    assert torch.equal(again(IDS), model(IDS))
    model.stand({})
    assert not torch.equal(again(IDS), model(IDS))


def test_a_model_without_grids_is_saved_as_before(tmp_path):
    assert "sites" not in json.loads((save_artifact(tmp_path / "a", tiny_llama(), None, {}, {}) / MANIFEST).read_text())


def test_the_engine_refuses_what_it_would_compute_otherwise(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    for refused in (lambda: Engine.open(folder), lambda: engine_plan(manifest)):
        with pytest.raises(NetsukeError, match=r"quantized to grids \(at blocks\.0\.hidden and 1 more"):
            refused()


@pytest.mark.parametrize(
    "sites, words",
    [
        ({"blocks.7.hidden": GRIDS["blocks.0.hidden"].spec()}, "no block has this site"),
        ({"blocks.0.hidden": {"kind": "static"}}, "the entry"),
        ({"blocks.0.hidden": GRIDS["blocks.0.hidden"].spec() | {"zero": 1000}}, "zero 1000"),
        ({"blocks.0.hidden": 3}, "manifest.json"),
        ([], "manifest.json"),
    ],
)
def test_hostile_entries_are_refused(folder, sites, words):
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sites": sites}))
    with pytest.raises(NetsukeError, match=words):
        load(folder)


def test_gguf_refuses_what_llama_cpp_would_compute_otherwise(folder, tmp_path):
    with pytest.raises(NetsukeError, match=r"quantized to grids \(at blocks\.0\.hidden and 1 more"):
        write(load(folder), tmp_path / "out.gguf", 8)
    assert not (tmp_path / "out.gguf").exists()
