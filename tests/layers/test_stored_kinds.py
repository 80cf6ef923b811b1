"""Low-rank and input-sparse maps inside a model: artifacts, plans, and the model's own list of its maps."""

import itertools
import json
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from netsuke.compress.quantize import quantize_linear
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense, LinearBase
from netsuke.layers.lowrank import LowRank
from netsuke.layers.sparse import InputSparse
from netsuke.models.llama import KVCache, Llama, LlamaConfig, half_precision, random_llama
from netsuke.models.load import describe, load
from netsuke.models.places import digest
from netsuke.models.save import save_artifact
from netsuke.models.weights import WeightFile, write_safetensors
from netsuke.runtime.generate import generate
from netsuke.runtime.memory_plan import inference_plan, linear_layers, panels, small_tensors, work_of

IDS = torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(0))


def svd(layer: LinearBase, rank: int, bias: bool) -> tuple[Dense, Dense]:
    U, S, V = torch.linalg.svd(layer.to_dense().double(), full_matrices=False)
    second = (U[:, :rank] * S[:rank]).float()
    return Dense(V[:rank].float().contiguous()), Dense(second, layer.bias if bias else None)


def carve(model: Llama, group: int = 16, threshold: float = 0.5) -> Llama:
    """Every kind of storage somewhere: thin pairs in q, k, v and the embedding, channels in gate, up, down, o, head."""
    for name, layer in list(model.linears().items()):
        leaf = name.rpartition(".")[2]
        if leaf in ("q", "k", "v", "embed"):
            first, second = svd(layer, min(layer.outs, layer.ins) // 3, True)
            if leaf != "k":
                second = quantize_linear(second, 8, group, "rtn")
            if leaf == "v":
                first = quantize_linear(first, 4, group, "rtn")
            model.replace(name, LowRank(first, second))
        elif leaf in ("gate", "head"):
            model.replace(name, InputSparse.from_dense(layer, threshold, *svd(layer, 5, False)))
        elif leaf == "o":
            model.replace(name, InputSparse.from_dense(Dense(layer.weight.half(), layer.bias), threshold))
        else:
            factors = [quantize_linear(f, 8, group, "rtn") for f in svd(layer, 5, False)] if leaf == "up" else ()
            packed = quantize_linear(layer, {"up": 3, "down": 4}[leaf], group, "rtn")
            model.replace(name, InputSparse.from_quant(packed, threshold, *factors))
    return model


def tiny(**changes) -> Llama:
    shape = {"vocab": 96, "width": 48, "heads": 4, "kv_heads": 2, "head_dim": 12, "context": 64, "tied": False}
    return random_llama(LlamaConfig.uniform(2, 80, **shape | {"qkv_bias": True} | changes), 0, std=0.2)


def specs_of(model: Llama) -> dict[str, dict]:
    return {name: layer.spec() for name, layer in model.linears().items()}


def test_factors_are_no_maps_of_their_own():
    plain = list(tiny().linears())
    model = carve(tiny())
    assert list(model.linears()) == plain
    assert {type(m) for m in model.linears().values()} == {LowRank, InputSparse}
    assert list(half_precision(model).linears()) == plain
    assert half_precision(model).blocks[0].k.first.weight.dtype == torch.float16


@torch.no_grad()
def test_saved_and_loaded_outputs_are_equal(tmp_path):
    model = carve(tiny())
    path = save_artifact(tmp_path / "m", model, None, {}, {})
    back = load(path).model
    assert specs_of(back) == specs_of(model) == describe(path).layers
    for (name, a), b in zip(model.state_dict().items(), back.state_dict().values()):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert torch.equal(model(IDS), back(IDS))
    caches = KVCache(model.cfg, 1, 12), KVCache(model.cfg, 1, 12)
    for i in range(12):
        step = IDS[:, i : i + 1]
        assert torch.equal(model(step, caches[0]), back(step, caches[1]))
    assert json.loads((path / "manifest.json").read_text())["layers"]["blocks.0.up"]["bits"] == 3
    again = save_artifact(tmp_path / "n", back, None, {}, {})
    assert (again / "weights.safetensors").read_bytes() == (path / "weights.safetensors").read_bytes()


def test_dtype_converts_dense_factors_and_nothing_packed(tmp_path):
    model = carve(tiny())
    half = load(save_artifact(tmp_path / "m", model, None, {}, {}), dtype="float16").model
    assert half.blocks[0].q.first.weight.dtype == half.blocks[0].gate.second.weight.dtype == torch.float16
    for mine, theirs in ((half.blocks[1].v, model.blocks[1].v), (half.blocks[1].up, model.blocks[1].up)):
        assert mine.spec() == theirs.spec()
        assert all(a.dtype == b.dtype for a, b in zip(mine.state_dict().values(), theirs.state_dict().values()))
    assert half.blocks[0].gate.spec()["dtype"] == "float32"  # stored by channels: not a dense map any more


def respec(path, name: str, **changes) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["layers"][name] |= changes
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("blocks.0.q", {"rank": 0}, "layer 'blocks.0.q': rank 0"),
        ("blocks.0.q", {"rank": 48}, "layer 'blocks.0.q': rank 48"),
        ("blocks.0.q", {"rank": 15}, r"tensor 'blocks\.0\.q\.first\.weight' has shape"),
        ("blocks.0.q", {"first": {"kind": "dense", "dtype": "float16"}}, r"blocks\.0\.q\.first\.weight' is stored as float32"),
        ("blocks.0.q", {"first": {"kind": "lowrank"}}, "layer 'blocks.0.q': the first factor is of kind 'lowrank'"),
        ("blocks.1.v", {"first": {"kind": "quant", "bits": 2, "group": 16}}, r"blocks\.1\.v\.first\.codes' has shape"),
        ("blocks.1.up", {"threshold": -1}, "layer 'blocks.1.up': threshold -1"),
        ("blocks.1.up", {"threshold": math.nan}, "layer 'blocks.1.up': threshold nan"),
        ("blocks.1.up", {"bits": 4}, r"blocks\.1\.up\.codes' has shape"),
        ("blocks.1.up", {"group": 48}, r"blocks\.1\.up\.scales' has shape"),
        ("blocks.1.up", {"rank": 48}, "layer 'blocks.1.up': rank 48"),
        ("blocks.0.gate", {"dtype": "float16"}, r"blocks\.0\.gate\.weight' is stored as float32"),
        ("blocks.0.gate", {"dtype": "int8"}, "layer 'blocks.0.gate': dtype 'int8'"),
        ("blocks.0.o", {"rank": 3, "first": {"kind": "dense"}, "second": {"kind": "dense"}}, "layer 'blocks.0.o': dtype None"),
    ],
)  # fmt: skip
def test_an_artifact_with_a_wrong_spec_is_refused_by_name(name, changes, words, tmp_path):
    path = save_artifact(tmp_path / "m", carve(tiny()), None, {}, {})
    respec(path, name, **changes)
    for ask in (load, describe):
        with pytest.raises(NetsukeError, match=words) as e:
            ask(path)
        assert str(e.value).count("\n") == 0 and len(str(e.value)) < 500


@pytest.mark.parametrize(
    "tensor, change, words",
    [
        ("blocks.1.up.norms", lambda t: t[:-1], r"up\.norms' has shape \[47\]"),
        ("blocks.1.up.norms", lambda t: t.half(), r"up\.norms' is stored as float16"),
        ("blocks.1.up.codes", lambda t: t.T, r"up\.codes' has shape"),
        ("blocks.1.up.zeros", lambda t: t.to(torch.int8), r"up\.zeros' is stored as int8"),
        ("blocks.0.q.second.codes", lambda t: t.to(torch.int8), r"second\.codes' is stored as int8"),
        ("blocks.0.q.second.scales", lambda t: t * math.nan, r"second\.scales' holds NaN"),
    ],
)
def test_an_artifact_with_a_wrong_tensor_is_refused_by_name(tensor, change, words, tmp_path):
    path = save_artifact(tmp_path / "m", carve(tiny()), None, {}, {})
    file, weights = path / "weights.safetensors", WeightFile(path / "weights.safetensors")
    tensors = {name: weights.get(name) for name in weights.names()}
    write_safetensors(file, tensors | {tensor: change(tensors[tensor])})
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": digest(file)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(NetsukeError, match=words):
        load(path)


def test_a_plan_counts_the_bytes_and_the_work_of_each_map():
    model = carve(tiny())
    maps = linear_layers(model.cfg, specs_of(model))
    for name, layer in model.linears().items():
        assert (maps[name].bytes, maps[name].macs) == (layer.bytes(), layer.macs()), name
    plan = inference_plan(model.cfg, specs_of(model), context=64)
    assert plan.weights == model.bytes() + sum(b.freq.numel() * 4 for b in model.blocks)
    work = work_of(model.cfg, specs_of(model), context=8, tokens=1)
    assert work.storage == sum(m.bytes() for m in model.linears().values()) + small_tensors(model.cfg)


@pytest.mark.parametrize("context, prompt", [(400, 300), (40, 1)])
def test_running_allocates_no_more_than_was_planned(context, prompt):
    """Traced tensors of a run against its plan: at most 2 % above it, at most 10 % below."""
    cfg = LlamaConfig.uniform(2, 500, vocab=1500, width=192, heads=6, kv_heads=2, head_dim=32, context=2048, tied=False)
    model = carve(random_llama(cfg, 0), group=64, threshold=0.01)
    plan = inference_plan(cfg, specs_of(model), context=context, prompt=prompt, threads=1)
    planned = plan.kv_cache + plan.activations + plan.buffers
    if prompt > 2:
        planned -= panels(linear_layers(cfg, specs_of(model)), 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            steps = generate(model, [1] * prompt, context - prompt, context=context)
            for _ in range(3):
                next(steps)
    finally:
        torch.set_num_threads(before)
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    measured = max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    assert 0.9 * planned < measured <= 1.02 * planned
