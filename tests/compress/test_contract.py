"""The contract that all methods keep (DESIGN.md, section 6): every registered method against every check.

A new method earns these tests by being registered and by one row in SAMPLES: knobs that change something.
"""

import contextlib
import json

import msgspec
import pytest
import torch

from netsuke.compress.method import from_json, registry
from netsuke.compress.quantize import Quantize, quantize_linear
from netsuke.compress.sparse_channels import decoding, total, traffic
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.layers.lowrank import LowRank
from netsuke.models.llama import BlockShape
from netsuke.models.load import load
from netsuke.models.save import save_artifact
from netsuke.models.weights import read_header, write_safetensors
from tests.tiny import same_state, tiny_llama, tiny_task

SAMPLES = {
    "quantize": [
        {"bits": 4, "group": 16, "calibration": 8},
        {"bits": 3, "group": 20, "solver": "rtn", "embed_bits": 16, "per_layer": {"blocks.1.o": 16}},
    ],
    "modegpt": [{"remove": 0.2, "calibration": 8}],
    "factorize": [
        {"rank": 0.5, "calibration": 8},
        {"rank": 6, "calibration": 8, "per_layer": {"blocks.1.o": 0.3}, "exclude": ["blocks.0.q"]},
    ],
    "inherit": [{"calibration": 8, "multiple": 4}, {"keep": 0.6, "layers": 2, "score": "l2", "calibration": 8}],
    "sparsify": [
        {"sparsity": 0.4, "narrowest": 40, "calibration": 8},
        {"sparsity": 0.5, "rho": 0.7, "narrowest": 60, "score": "released", "per_layer": {"blocks.1.o": [0.3, 0.5]}},
    ],
    "heal": [{"steps": 10, "batch": 4}, {"steps": 5, "parts": ["norms", "dense"], "seed": 3}],
    # without its warm start, which back-propagates through one block, it keeps the rule of no gradients as well
    "zeroqat": [{"w": 4, "group": 16, "steps": 3, "batch": 4, "rate": 1e-3, "warm": 0, "every": 2, "validation": 1}],
    "mobilequant": [
        {"calibration": 8, "learn": "off"},
        {"scheme": "w4a8", "calibration": 8, "epochs": 1, "grouped": True},
    ],
}
LEARNS = {
    "mobilequant",
    "heal",
    "inherit",
}  # methods that say they train and do it by gradients, unless their knob `learn` is off
TAKES_ALL = {"heal"}  # whatever the maps are stored as
TAKES_CODES = {"sparsify"}  # methods that treat quantized maps: quantize first
UNEVEN = (BlockShape(80, 12), BlockShape(53, 7, ((0, 2, 5), (1, 2, 3))))
MODELS = {
    "tied": lambda: tiny_llama(),
    "untied with biases": lambda: tiny_llama(1, tied=False, qkv_bias=True, out_bias=True, mlp_bias=True),
}
CASES = [
    pytest.param(name, knobs, model, id=f"{name}-{i}-{model}")
    for name, rows in SAMPLES.items()
    for i, knobs in enumerate(rows)
    for model in MODELS
]
pytestmark = pytest.mark.filterwarnings(
    "ignore:(sparsify|modegpt|mobilequant)"
)  # little text is their warning, and all there is here
matrix = pytest.mark.parametrize("name,knobs,model", CASES)


@pytest.fixture(scope="module")
def task():
    return tiny_task()


@pytest.fixture(scope="module")
def carve(task):
    """method, model before, model after: applied once for all checks that only look."""
    done = {}

    def get(name, knobs, kind):
        key = json.dumps([name, knobs, kind])
        if key not in done:
            method, model = registry()[name](**knobs), MODELS[kind]()
            done[key] = method, model, method.apply(model, task)
        return done[key]

    return get


def saved(method, model, task):
    """What the method promises to make less of."""
    if method.saves == "loss":
        return task.mean_loss(model, "validation")
    if method.saves == "bytes":
        return sum(m.bytes() for m in model.linears().values())
    with decoding(model):
        outputs(model, task)
    return total(traffic(model)).weights


def outputs(model, task):
    with torch.no_grad():
        return model(task.windows("validation")[:4, :-1])


def test_every_registered_method_has_a_row():
    assert SAMPLES.keys() == registry().keys()


@matrix
def test_changes_the_model_and_leaves_its_argument(name, knobs, model, carve):
    _, before, after = carve(name, knobs, model)
    assert same_state(before, MODELS[model]())
    assert not same_state(before, after)
    shared = {t.data_ptr() for t in before.state_dict().values()} & {t.data_ptr() for t in after.state_dict().values()}
    assert not shared, "a change to one model would change the other"


@matrix
def test_deterministic(name, knobs, model, carve, task):
    method, before, after = carve(name, knobs, model)
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    assert same_state(method.apply(before, task), after)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are his own"


@matrix
def test_identity_at_zero_strength(name, knobs, model, carve, task):
    method, before, _ = carve(name, knobs, model)
    same = method.strengths()[0].apply(before, task)
    assert same_state(same, before) and same.cfg == before.cfg


@matrix
def test_stronger_is_smaller(name, knobs, model, carve, task):
    method, before, _ = carve(name, knobs, model)
    sizes = [saved(s, s.apply(before, task), task) for s in method.strengths()]
    assert sizes == sorted(set(sizes), reverse=True), sizes


@matrix
def test_bytes_are_those_written(name, knobs, model, carve, tmp_path):
    _, _, after = carve(name, knobs, model)
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, after.state_dict())
    with path.open("rb") as f:
        header = int.from_bytes(f.read(8), "little")
    assert after.bytes() == path.stat().st_size - 8 - header
    assert read_header(path).tensors.keys() == after.state_dict().keys()


@matrix
def test_saved_and_loaded_gives_the_same_outputs(name, knobs, model, carve, task, tmp_path):
    method, _, after = carve(name, knobs, model)
    save_artifact(tmp_path / "carved", after, None, {"methods": [method.to_json()]}, {})
    again = load(tmp_path / "carved.netsuke").model
    assert same_state(again, after)
    assert torch.equal(outputs(again, task), outputs(after, task))


@matrix
def test_composes_with_quantization(name, knobs, model, carve, task):
    _, _, after = carve(name, knobs, model)
    dense = {n: 4 for n, m in after.linears().items() if isinstance(m, Dense | LowRank)}
    small = Quantize(bits=16, group=16, per_layer=dense, calibration=4).apply(after, task)
    for name in dense:
        layer = small.get_submodule(name)
        parts = (layer.first, layer.second) if isinstance(layer, LowRank) else (layer,)
        assert all(p.spec()["kind"] == "quant" for p in parts), name
    assert outputs(small, task).isfinite().all()
    if dense:
        assert small.bytes() < after.bytes()


@matrix
def test_refuses_by_the_layer_s_name(name, knobs, model, carve, task):
    method, _, _ = carve(name, knobs, model)
    if name in TAKES_ALL:
        assert "torch" not in (method.accepts(torch.nn.Linear(2, 2)) or "torch")
        return
    packed = MODELS[model]()
    kind, layer = "quant", quantize_linear(packed.blocks[1].down, 4, 16, "rtn")
    if name in TAKES_CODES:
        kind, layer = "lowrank", LowRank(Dense(torch.zeros(3, 80)), Dense(torch.zeros(48, 3)))
    packed.replace("blocks.1.down", layer)
    assert "blocks.1.down" in method.accepts(packed)
    with pytest.raises(NetsukeError, match=rf"blocks\.1\.down is stored as {kind}"):
        method.apply(packed, task)


@matrix
def test_no_gradients(name, knobs, model, carve, task):
    method, before, after = carve(name, knobs, model)
    assert not any(p.requires_grad for p in after.parameters())
    learns = name in LEARNS and knobs.get("learn") != "off"
    with contextlib.nullcontext() if learns else forbidden_autograd():
        method.apply(MODELS[model]().requires_grad_(True), task)
    assert all(p.grad is None for p in before.parameters())


def forbidden_autograd():
    def refuse(tensor):
        raise AssertionError("autograd kept a tensor")

    return torch.autograd.graph.saved_tensors_hooks(refuse, refuse)


def test_recorded_gradients_would_be_seen(task):
    model = tiny_llama().requires_grad_(True)
    with pytest.raises(AssertionError, match="autograd kept"), forbidden_autograd():
        task.loss(model, next(task.batches("train")))


@matrix
def test_json_round_trip(name, knobs, model, carve):
    method, _, _ = carve(name, knobs, model)
    for m in (method, *method.strengths()):
        assert from_json(json.loads(json.dumps(m.to_json()))) == m


@pytest.mark.parametrize("name", SAMPLES)
def test_unknown_knobs_are_refused_by_name(name):
    with pytest.raises(NetsukeError, match="unknown knob 'strenght'"):
        from_json({"method": name, "strenght": 1})


@pytest.mark.parametrize("name", SAMPLES)
def test_asks_for_data_only_where_it_needs_them(name):
    method, model = registry()[name](**SAMPLES[name][0]), tiny_llama()
    assert method.needs_data
    with pytest.raises(NetsukeError, match="no calibration data"):
        method.apply(model)
    assert same_state(method.strengths()[0].apply(model), model)


@pytest.mark.parametrize("name", SAMPLES)
def test_blocks_of_unequal_widths(name, task):
    """What another method has carved is an ordinary model: uneven widths, value heads unlike key heads."""
    cfg = msgspec.structs.replace(tiny_llama().cfg, blocks=UNEVEN)
    model = type(tiny_llama())(cfg)
    rng = torch.Generator().manual_seed(3)
    for n, p in model.named_parameters():
        if not n.endswith("norm.weight"):
            p.data.normal_(0, 0.2, generator=rng)
    method = registry()[name](**SAMPLES[name][0])
    after = method.apply(model, task)
    assert saved(method, after, task) < saved(method, model, task) and outputs(after, task).isfinite().all()
