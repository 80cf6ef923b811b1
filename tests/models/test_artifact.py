"""Artifacts: what is saved is what is loaded, byte for byte the same each time, and never half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from netsuke.errors import NetsukeError
from netsuke.layers.quantized import QuantLinear
from netsuke.models import artifact as artifact_module
from netsuke.models import save
from netsuke.models.llama import BlockShape, KVCache, LlamaConfig, RopeScaling, random_llama
from netsuke.models.load import describe, find, load
from netsuke.models.save import save_artifact
from tests.models.hostile import artifact, hf_folder, llama2c_file, tiny_config, tiny_model, tiny_tokenizer

IDS = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(0))


def quantize(layer, bits: int, group: int) -> QuantLinear:
    """Random codes of the layer's shape: what matters here is that they come back."""
    rng = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (layer.outs, layer.ins), generator=rng, dtype=torch.uint8)
    groups = -(-layer.ins // group)
    scales = torch.rand(layer.outs, groups, generator=rng) * 0.05
    zeros = torch.randint(0, 2**bits, (layer.outs, groups), generator=rng, dtype=torch.uint8)
    return QuantLinear.from_codes(codes, scales, zeros, bits, group, layer.bias)


def carved():
    """A model with everything an artifact must carry: uneven blocks, kept pairs, biases, packed and half layers."""
    cfg = LlamaConfig(
        vocab=300, width=16, heads=4, kv_heads=2, head_dim=8, context=64, tied=False, qkv_bias=True, window=9, bos=0,
        blocks=(BlockShape(24, 8), BlockShape(20, 6, ((0, 2), (1, 3)))), eos=(0, 5),
        rope_scaling=RopeScaling("yarn", 2.0, original_context=32),
    )  # fmt: skip
    model = random_llama(cfg, 3, std=0.3)
    for name, layer in list(model.linears().items()):
        if name.endswith(("gate", "down", "q", "embed")):
            model.replace(name, quantize(layer, {"gate": 2, "down": 3, "q": 4}.get(name.split(".")[-1], 8), 6))
    model.head.to(torch.bfloat16)
    return model


@pytest.mark.parametrize("build", [tiny_model, carved])
@torch.no_grad()
def test_saved_and_loaded_outputs_are_equal(build, tmp_path):
    model = build()
    path = artifact(tmp_path, model)
    back = load(path)
    assert back.model.cfg == model.cfg and back.kind == "artifact"
    assert {n: m.spec() for n, m in back.model.linears().items()} == {n: m.spec() for n, m in model.linears().items()}
    for (name, a), b in zip(model.state_dict().items(), back.model.state_dict().values()):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert torch.equal(model(IDS), back.model(IDS))
    cache = KVCache(back.model.cfg, 2, 20)
    steps = torch.cat([back.model(IDS[:, i : i + 1], cache) for i in range(20)], 1)
    assert (steps - model(IDS)).abs().max() < 1e-4
    assert back.tokenizer.encode("héllo") == tiny_tokenizer().encode("héllo")
    assert back.tokenizer.eos == tuple(e for e in model.cfg.eos if e < 257)
    assert not any(p.requires_grad for p in back.model.parameters()) and not back.model.training


def test_description_reads_no_weights(tmp_path):
    model = carved()
    path = artifact(tmp_path, model)
    told = describe(path)
    assert told.config == model.cfg
    assert told.layers == {n: m.spec() for n, m in model.linears().items()}
    assert told.bytes_on_disk == sum(p.stat().st_size for p in path.iterdir())
    assert told.tokenizer_bytes == (path / "tokenizer.json").stat().st_size
    weights = path / "weights.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-500:] = b"\xff" * 500  # NaN everywhere: a plan from headers does not look, loading does
    weights.write_bytes(raw)
    assert describe(path) == told
    with pytest.raises(NetsukeError, match="sha256"):
        load(path)


def test_dtype_converts_dense_maps_and_leaves_codes(tmp_path):
    wide = load(artifact(tmp_path, carved()), dtype="float32").model
    assert wide.head.weight.dtype == torch.float32 and wide.embed.codes.dtype == torch.uint8
    assert wide.embed.scales.dtype == torch.float16
    half = load(tmp_path / "tiny.netsuke", dtype="float16").model
    assert half.head.spec() == {"kind": "dense", "dtype": "float16"}
    with pytest.raises(NetsukeError, match="int3"):
        load(tmp_path / "tiny.netsuke", dtype="int3")


def test_equal_input_gives_equal_bytes(tmp_path):
    a, b = artifact(tmp_path / "a"), artifact(tmp_path / "b")
    assert sorted(os.listdir(a)) == ["manifest.json", "tokenizer.json", "weights.safetensors"]
    for name in os.listdir(a):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    back = load(a)
    save_artifact(
        tmp_path / "c.netsuke", back.model, back.tokenizer, back.manifest["provenance"], back.manifest["facts"]
    )
    for name in os.listdir(a):
        assert (a / name).read_bytes() == (tmp_path / "c.netsuke" / name).read_bytes(), name


def test_replacing_and_the_suffix(tmp_path):
    first = save_artifact(tmp_path / "m", tiny_model(1), None, {}, {})
    assert first.name == "m.netsuke" and load(first).tokenizer is None
    second = save_artifact(tmp_path / "m.netsuke", tiny_model(2), tiny_tokenizer(), {}, {}, {"ram": 5})
    assert second == first and load(first).manifest["budget"] == {"ram": 5}
    assert torch.equal(load(first).model.embed.weight, tiny_model(2).embed.weight)
    assert os.listdir(tmp_path) == ["m.netsuke"]


@pytest.mark.parametrize("what", ["folder", "empty folder", "file", "dangling link"])
def test_what_is_no_artifact_is_never_overwritten(what, tmp_path):
    target = tmp_path / "m.netsuke"
    if what == "file":
        target.write_text("dear diary")
    elif what == "dangling link":
        target.symlink_to(target)
    else:
        target.mkdir()
        if what == "folder":
            (target / "thesis.txt").write_text("dear diary")
    with pytest.raises(NetsukeError, match=r"m\.netsuke"):
        save_artifact(target, tiny_model(), None, {}, {})
    assert os.listdir(tmp_path) == ["m.netsuke"]
    if what == "folder":
        assert (target / "thesis.txt").read_text() == "dear diary"


@pytest.mark.parametrize("moment", ["write_safetensors", "write_file", "_flush_folder", "replace"])
def test_a_failure_at_any_moment_leaves_the_old_artifact(moment, tmp_path, monkeypatch):
    old = artifact(tmp_path)
    before = {p.name: p.read_bytes() for p in old.iterdir()}

    def fail(*_args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save if moment == "write_safetensors" else artifact_module, moment, fail)
    with pytest.raises(NetsukeError, match="No space left"):
        artifact(tmp_path, tiny_model(9))
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before
    assert os.listdir(tmp_path) == [old.name]


def test_a_failed_rename_puts_the_old_artifact_back(tmp_path, monkeypatch):
    old, rename, calls = artifact(tmp_path), os.rename, []

    def second_fails(a, b) -> None:
        calls.append(b)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(NetsukeError, match="Input/output"):
        artifact(tmp_path, tiny_model(9))
    assert torch.equal(load(old).model.embed.weight, tiny_model(0).embed.weight)
    assert os.listdir(tmp_path) == [old.name]


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    stale, other = tmp_path / f".tiny.netsuke.part-{dead.stdout.strip()}", tmp_path / ".big.netsuke.part-1x"
    living = tmp_path / f".tiny.netsuke.part-{os.getppid()}"
    for folder in (stale, other, living):
        folder.mkdir()
    artifact(tmp_path)
    assert not stale.exists() and living.exists() and other.exists()


def test_a_folder_that_cannot_be_written_to(tmp_path):
    with pytest.raises(NetsukeError, match="does not exist"):
        save_artifact(tmp_path / "absent" / "m.netsuke", tiny_model(), None, {}, {})
    if os.geteuid() == 0:
        target = "/proc/m.netsuke"  # the administrator may write everywhere but here
    else:
        tmp_path.chmod(0o555)
        target = tmp_path / "m.netsuke"
    with pytest.raises(NetsukeError, match="save"):
        save_artifact(target, tiny_model(), None, {}, {})


def test_a_broken_model_and_facts_that_are_no_json_are_not_saved(tmp_path):
    model = tiny_model()
    with pytest.raises(NetsukeError, match="JSON"):
        save_artifact(tmp_path / "m", model, None, {}, {"loss": float("nan")})
    model.norm.weight[0] = float("nan")
    with pytest.raises(NetsukeError, match=r"norm\.weight"):
        save_artifact(tmp_path / "m", model, None, {}, {})
    assert os.listdir(tmp_path) == []


def test_every_kind_becomes_an_artifact(tmp_path):
    for source in (hf_folder(tmp_path / "hf"), llama2c_file(tmp_path / "c")):
        found = load(source)
        path = save_artifact(tmp_path / found.kind, found.model, found.tokenizer, {"from": found.source}, {})
        with torch.no_grad():
            assert torch.equal(load(path).model(IDS), found.model(IDS))


def test_the_manifest(tmp_path):
    manifest = json.loads((artifact(tmp_path) / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["family"]) == ("netsuke", 1, "llama")
    assert manifest["config"]["vocab"] == tiny_config().vocab and manifest["facts"] == {"loss": 1.5}
    assert sorted(manifest["files"]) == ["tokenizer.json", "weights.safetensors"]


def test_a_shipped_name_without_its_weights(tmp_path, monkeypatch):
    from netsuke.models import load as module

    (tmp_path / "early.netsuke").mkdir()
    artifact(tmp_path)
    monkeypatch.setattr(module, "SHIPPED", tmp_path)
    assert find("tiny") == (tmp_path / "tiny.netsuke", "artifact")
    with pytest.raises(NetsukeError, match="lacks the weights"):
        load("early")
