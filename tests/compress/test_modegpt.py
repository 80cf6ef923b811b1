"""MoDeGPT on tiny random models: exact at full width, smaller where it cuts, and sentences where it refuses."""

import copy
import itertools
import warnings
from dataclasses import replace

import msgspec
import pytest
import torch

from netsuke.compress import modegpt
from netsuke.compress.method import from_json
from netsuke.compress.modegpt import MODULES, MoDeGPT
from netsuke.errors import NetsukeError
from netsuke.layers.linear import LinearBase
from netsuke.models.llama import KVCache, Llama, LlamaConfig, random_llama


class Tokens:
    """Rows of random tokens as a task."""

    metric, higher_is_better = "perplexity", False

    def __init__(self, vocab: int, rows: int = 16, length: int = 33):
        self.rows = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(5))

    def batches(self, split, limit=None):
        yield from self.rows.split(4)[:limit]

    def loss(self, model, batch):
        return torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


class Stored(LinearBase):
    """A linear map that is kept in four bits, as far as its spec tells."""

    def spec(self) -> dict:
        return {"kind": "int4"}


def tiny(layers: int = 3, biases: bool = False, kv_heads: int = 2, **rest) -> Llama:
    cfg = LlamaConfig.uniform(
        layers, 48, vocab=61, width=32, heads=4, kv_heads=kv_heads, head_dim=8, context=64,
        qkv_bias=biases, out_bias=rest.pop("out_bias", biases), mlp_bias=biases, **rest,
    )  # fmt: skip
    model = random_llama(cfg, 0, std=0.15)
    rng = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.normal_(0, 0.3, generator=rng)
    return model


IDS = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(9))
TASK = Tokens(61)
FORMS = {
    "grouped": {},
    "single key head": {"kv_heads": 1},
    "one key head each": {"kv_heads": 4},
    "biases": {"biases": True},
    "qkv bias only": {"biases": True, "out_bias": False},
}


def linear_parameters(model: Llama) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith("blocks") and "norm" not in n)


def full_cuts(model: Llama, modules=MODULES) -> Llama:
    """The model re-expressed by decompositions at full width."""
    knobs, stats = MoDeGPT(), modegpt.calibrate(model, TASK, 16)
    layers = range(len(model.blocks))
    cuts = {(i, m): modegpt.cut_module(model, i, m, 0.0, stats[i], knobs) for i in layers for m in modules}
    return modegpt.assemble(model, cuts)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("modules", [("mlp",), ("qk",), ("vo",), MODULES])
def test_full_width_is_exact(form, modules):
    model = tiny(**FORMS[form])
    exact = full_cuts(model, modules)
    tolerance = 1e-4 if "vo" in modules else 1e-6
    torch.testing.assert_close(exact(IDS), model(IDS), rtol=tolerance, atol=tolerance)


def test_nothing_removed_is_the_same_bits_and_needs_no_data():
    model = tiny(biases=True)
    same = MoDeGPT(remove=0).apply(model)
    assert same is not model and same.cfg == model.cfg
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("form", FORMS)
def test_a_cut_shrinks_weights_and_cache_and_runs_both_ways(form):
    model = tiny(**FORMS[form])
    before = copy.deepcopy(model.state_dict())
    small = MoDeGPT(remove=0.3, allocate="uniform").apply(model, TASK)
    achieved = 1 - modegpt.block_parameters(small.cfg) / modegpt.block_parameters(model.cfg)
    assert achieved == pytest.approx(0.3, abs=0.01)
    assert linear_parameters(small) == modegpt.block_parameters(small.cfg)
    assert small.bytes() < model.bytes()
    assert KVCache(small.cfg, 1, 64).bytes() < KVCache(model.cfg, 1, 64).bytes()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert not any(p.requires_grad for p in small.parameters())
    rebuilt = Llama(small.cfg)  # the config alone describes the shapes
    rebuilt.load_state_dict(small.state_dict())
    torch.testing.assert_close(rebuilt(IDS), small(IDS))
    cache = KVCache(small.cfg, 2, 32)
    steps = torch.cat([small(IDS[:, t : t + 1], cache) for t in range(IDS.shape[1])], 1)
    torch.testing.assert_close(steps, small(IDS), rtol=1e-4, atol=1e-4)


def test_selected_pairs_keep_their_frequencies():
    model = tiny()
    small = MoDeGPT(per_block=((0, 0.5, 0),) * 3).apply(model, TASK)
    for block, shape in zip(small.blocks, small.cfg.blocks):
        assert len(shape.pairs) == 2 and all(len(p) == 2 for p in shape.pairs)
        torch.testing.assert_close(block.freq, model.blocks[0].freq[0][torch.tensor(shape.pairs)])
        h, j = 1, shape.pairs[1][0]  # first kept pair of key head 1: its two rows come from rows j and j + 4
        torch.testing.assert_close(block.k.weight[h * 4], model.blocks[block.layer].k.weight[h * 8 + j])
        torch.testing.assert_close(block.k.weight[h * 4 + 2], model.blocks[block.layer].k.weight[h * 8 + j + 4])
        torch.testing.assert_close(block.q.weight[3 * 4], model.blocks[block.layer].q.weight[3 * 8 + j])


def test_dropping_silent_parts_changes_nothing():
    """Hidden units that never fire, a rotary pair without weights and a value channel that nobody reads go first."""
    model = tiny()
    for block in model.blocks:
        block.up.weight[::2] = 0
        for rows in (block.q.weight.view(4, 8, 32), block.k.weight.view(2, 8, 32)):
            rows[:, [1, 5]] = 0
        block.o.weight.view(32, 4, 8)[..., 3] = 0
    small = MoDeGPT(per_block=((0.5, 0.25, 0.125),) * 3).apply(model, TASK)
    assert small.cfg.blocks[0].hidden == 24 and small.cfg.blocks[0].pairs == ((0, 2, 3),) * 2
    torch.testing.assert_close(small(IDS), model(IDS), rtol=1e-4, atol=1e-4)
    stats = modegpt.calibrate(model, TASK, 16)
    for module, share in zip(MODULES, (0.5, 0.25, 0.125)):
        assert modegpt.module_error(model, 0, module, share, stats[0], MoDeGPT()) < 1e-9


def test_compensation_beats_plain_selection_of_the_same_units():
    model, knobs = tiny(), MoDeGPT()
    stats = modegpt.calibrate(model, TASK, 16)
    (_, linears), block = modegpt.cut_module(model, 0, "mlp", 0.4, stats[0], knobs), model.blocks[0]
    rows = [int((block.up.weight == row).all(1).nonzero()) for row in linears["up"].weight]
    assert torch.equal(linears["gate"].weight, block.gate.weight[rows])  # up and gate lose the same units
    plain = block.down.weight.clone()
    plain[:, rows] = 0
    gram = stats[0].hidden.float()
    lost = ((plain @ gram) * plain).sum() / ((block.down.weight @ gram) * block.down.weight).sum()
    assert modegpt.module_error(model, 0, "mlp", 0.4, stats[0], knobs) < 0.9 * float(lost)


def test_errors_grow_with_the_share():
    model = tiny()
    stats = modegpt.calibrate(model, TASK, 16)
    for module in MODULES:
        errors = [modegpt.module_error(model, 1, module, f, stats[1], MoDeGPT()) for f in (0, 0.25, 0.5, 0.75)]
        assert errors == sorted(errors) and errors[0] < 1e-12 < errors[1] and errors[3] <= 1


def test_cutting_twice_counts_pairs_from_the_original():
    once = MoDeGPT(per_block=((0, 0.25, 0.25),) * 3).apply(tiny(), TASK)
    twice = MoDeGPT(per_block=((0.25, 0.34, 0.34),) * 3).apply(once, TASK)
    for a, b in zip(once.cfg.blocks, twice.cfg.blocks):
        assert all(set(new) < set(old) for new, old in zip(b.pairs, a.pairs)) and b.value_dim == 4 and b.hidden == 36
    assert twice(IDS).isfinite().all()


def test_deterministic_and_in_the_stored_dtype():
    model = tiny().to(torch.bfloat16)
    first, second = (MoDeGPT(remove=0.3).apply(model, TASK) for _ in range(2))
    assert first.cfg == second.cfg
    for a, b in zip(first.state_dict().values(), second.state_dict().values()):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b)


def test_stronger_is_smaller():
    model = tiny()
    sizes = [m.apply(model, TASK).bytes() for m in MoDeGPT().strengths()]
    assert sizes[0] == model.bytes() and all(a > b for a, b in itertools.pairwise(sizes))


def test_allocation_meets_the_mean_under_the_cap_and_spares_what_turns_the_stream():
    influence, sizes = [0.9, 0.1, 0.1, 0.3], [100, 100, 200, 100]
    shares = modegpt.allocate_shares(influence, sizes, 0.5, 0.3, 0.75)
    assert sum(a * b for a, b in zip(shares, sizes)) == pytest.approx(250)
    assert max(shares) <= 0.75 + 1e-12 and shares[0] == min(shares) and shares[1] == shares[2] == pytest.approx(0.75)
    flat = modegpt.allocate_shares(influence, sizes, 0.5, 1e6, 0.8)
    assert flat == pytest.approx([0.5] * 4, abs=1e-4)


@pytest.mark.parametrize("multiple", [8, 16])
def test_widths_on_request_are_multiples_and_the_target_is_still_met(multiple):
    cfg = LlamaConfig.uniform(8, 512, vocab=61, width=128, heads=4, kv_heads=2, head_dim=64, context=64)
    for remove in (0.1, 0.25, 0.4):
        knobs = MoDeGPT(remove=remove, multiple=multiple)
        rows = modegpt.plan_cuts(cfg, [0.4, 0.1, 0.2, 0.1, 0.1, 0.2, 0.1, 0.3], knobs)
        gone = 0
        for layer, row in enumerate(rows):
            for module, share in zip(MODULES, row):
                width = modegpt.widths_for(cfg, layer, module, share, multiple)
                full = modegpt.full_width(cfg, layer, module)
                assert width % (multiple // 2 if module == "qk" else multiple) == 0
                gone += (full - width) * modegpt.unit_size(cfg, module)
        assert gone / modegpt.block_parameters(cfg) == pytest.approx(remove, abs=0.01)


def test_short_calibration_warns_with_numbers():
    with pytest.warns(UserWarning, match="32 calibration tokens for 48 hidden units"):
        MoDeGPT(remove=0.2, calibration=1).apply(tiny(), TASK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoDeGPT(remove=0.2, calibration=2).apply(tiny(), TASK)


def test_json_round_trip():
    for method in (MoDeGPT(remove=0.1, modules=("vo",)), MoDeGPT(per_block=((0.1, 0, 0.5), (0, 0.25, 0)))):
        assert from_json(msgspec.json.decode(msgspec.json.encode(method.to_json()))) == method


def test_refusals_name_the_layer_and_the_way_out():
    model = tiny()
    assert "Linear is no Llama" in MoDeGPT().accepts(torch.nn.Linear(2, 2))
    assert "modules=mlp,vo" in MoDeGPT().accepts(tiny(qk_norm=True))
    assert MoDeGPT(modules=("mlp", "vo"), remove=0.2).accepts(tiny(qk_norm=True)) is None
    assert "1 rows, the model has 3 blocks" in MoDeGPT(per_block=((0, 0, 0),)).accepts(model)
    assert "can give: 0.1" in MoDeGPT(modules=("vo",), remove=0.5).accepts(model)
    shared = tiny()
    shared.blocks[2].up.weight = shared.blocks[0].up.weight
    assert "blocks.2.up shares its matrix with blocks.0.up" in MoDeGPT().accepts(shared)

    stored = tiny()
    stored.replace("blocks.1.down", Stored())
    assert "blocks.1.down is stored as int4" in MoDeGPT().accepts(stored)
    assert MoDeGPT(modules=("vo",), remove=0.05).accepts(stored) is None
    with pytest.raises(NetsukeError, match="no calibration data"):
        MoDeGPT().apply(model)
    broken = tiny()
    broken.blocks[1].up.weight[0, 0] = torch.nan
    with pytest.raises(NetsukeError, match=r"inputs of blocks\.1\.down are not finite"):
        MoDeGPT().apply(broken, TASK)


@pytest.mark.parametrize(
    "knobs",
    [{"remove": 1.0}, {"remove": float("nan")}, {"modules": ("qkv",)}, {"modules": ()}, {"allocate": "fair"},
     {"epsilon": 0}, {"multiple": 0}, {"calibration": 0}, {"per_block": ((0.1, 0.2),)}, {"cap": 2}],
)  # fmt: skip
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(NetsukeError, match="cannot build modegpt"):
        replace(MoDeGPT(), **knobs)
