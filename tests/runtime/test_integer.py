"""Integer-only execution: operators against their definitions, models against the simulation, code by code."""

import math

import msgspec
import numpy as np
import pytest
import torch

from netsuke.compress.static import WIDE
from netsuke.errors import NetsukeError
from netsuke.layers.static import StaticGrid
from netsuke.models.llama import SITES, BlockShape, Llama
from netsuke.runtime.integer import IntegerModel
from netsuke.runtime.integer_check import agreement, greedy_in_float64
from netsuke.runtime.integer_ops import Norm, Rescale, Softmax, bit_length, root, sigmoid_table
from netsuke.train.mobilequant import MobileQuant
from tests.tiny import tiny_llama, tiny_task

pytestmark = pytest.mark.filterwarnings("ignore:mobilequant")  # grouped queries, on purpose
RNG = np.random.default_rng(0)


def uneven() -> Llama:
    """What another method has carved: own rotary pairs per key head, widths unlike each other."""
    blocks = (BlockShape(80, 12), BlockShape(53, 7, ((0, 2, 5), (1, 2, 3))))
    model = Llama(msgspec.structs.replace(tiny_llama().cfg, blocks=blocks))
    rng = torch.Generator().manual_seed(3)
    for n, p in model.named_parameters():
        if not n.endswith("norm.weight"):
            p.data.normal_(0, 0.2, generator=rng)
    return model


MODELS = {
    "w8a8": (tiny_llama, {}),
    "w4a8": (lambda: tiny_llama(1, kv_heads=4), {"scheme": "w4a8"}),
    "biases, untied": (lambda: tiny_llama(1, tied=False, qkv_bias=True, out_bias=True, mlp_bias=True), {"scheme": "w4a8"}),
    "carved, window": (lambda: uneven(), {}),
    "8 bits everywhere": (tiny_llama, {"wide": []}),
    "some sites wider": (tiny_llama, {"wide": [*WIDE, "hidden", "attn_in", "sigmoid"]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def task():
    return tiny_task()


@pytest.fixture(scope="module", params=MODELS)
def model(request, task):
    make, knobs = MODELS[request.param]
    dense = make()
    if "biases" in request.param:
        for n, p in dense.named_parameters():
            if n.endswith("bias"):
                p.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return MobileQuant(calibration=16, learn="off", **knobs).apply(dense, task)


def test_every_operator_gives_the_simulation_s_codes(model, task):
    found, made, wanted = agreement(model, IntegerModel.of_model(model), task.windows("validation")[0, :-1])
    assert found.keys() == set(SITES)
    for site, row in found.items():
        assert row.largest <= 1, site
    narrow = [r for r in found.values() if r.bits == 8]
    assert sum(r.different for r in narrow) <= 1e-3 * sum(r.count for r in narrow)
    assert np.abs(made - wanted).max() < 0.02 * np.abs(wanted).max()


def test_a_wrong_constant_would_be_seen(task):
    """The control: one zero point off by one."""
    model = MobileQuant(calibration=16, learn="off").apply(tiny_llama(), task)
    integer = IntegerModel.of_model(model)
    linear = integer.blocks[1].linear["up"]
    linear.x = StaticGrid(linear.x.scale, linear.x.zero + 1, 8)
    found, *_ = agreement(model, integer, task.windows("validation")[0, :-1])
    assert found["up"].different > 0.01 * found["up"].count
    assert found["q"].different == 0, "and only where it is"


def test_the_same_text_and_a_cache_that_changes_nothing(task):
    model = MobileQuant(calibration=16, learn="off", scheme="w4a8").apply(tiny_llama(), task)
    integer, ids = IntegerModel.of_model(model), [5, 17, 40]
    assert list(integer.generate(ids, 40)) == greedy_in_float64(model, ids, 40)
    ids = task.windows("validation")[1, :-1].numpy()
    cache = integer.cache()
    parts = [integer.forward(part, cache) for part in (ids[:5], ids[5:6], ids[6:])]
    assert np.array_equal(np.concatenate(parts), integer.forward(ids))
    assert all(c[0].dtype == np.int8 for name in ("k", "v") for c in cache[name]), "8-bit keys and values"


def test_nothing_but_small_integers_passes_between_operators(task):
    model = MobileQuant(calibration=16, learn="off").apply(tiny_llama(), task)

    def at(layer, site, codes):
        assert codes.dtype == (np.int16 if site in WIDE else np.int8), site
        return codes

    logits = IntegerModel.of_model(model).forward(np.arange(20), at=at)
    assert logits.dtype == np.int64


def test_a_sliding_window_is_masked(task):
    dense = tiny_llama(window=6)
    model = MobileQuant(calibration=16, learn="off").apply(dense, task)
    ids = task.windows("validation")[0, :-1]
    found, made, wanted = agreement(model, IntegerModel.of_model(model), ids)
    assert found["heads"].largest <= 1 and np.abs(made - wanted).max() < 0.02 * np.abs(wanted).max()


# --- operators ---


def test_root_and_bit_length():
    n = np.concatenate((RNG.integers(1, 1 << 62, 2000), np.arange(1, 40), 1 << np.arange(62), (2 << np.arange(62)) - 1))
    assert root(n).tolist() == [math.isqrt(v) for v in n.tolist()]
    n = np.append(n, 0)
    assert bit_length(n).tolist() == [v.bit_length() for v in n.tolist()]


@pytest.mark.parametrize("size", [1, 300, 32767])
def test_norm_is_the_rounded_definition(size):
    x = RNG.integers(-size, size + 1, (50, 64))
    x[0] = 0
    weight, step, eps = RNG.normal(1, 0.5, 64), 1e-3, 1e-5
    weight[3] = 0.0
    norm = Norm.of(weight, eps, step, 16, 0.02, -5, 8)
    exact = x * step / np.sqrt((x * step) ** 2 @ np.full((64, 1), 1 / 64) + eps) * weight / 0.02 - 5
    got = norm(x)
    assert np.abs(got - np.clip(exact, -128, 127)).max() <= 0.5 + 1e-4


def test_softmax_is_the_rounded_definition():
    scores, seen = RNG.integers(-32768, 32768, (3, 20, 30)), np.tril(np.ones((20, 30), bool), 10)
    grid = StaticGrid(float(np.float32(1 / 32767)), 0, 16)
    for step in (1e-4, 1e-3, 1e-2):
        e = np.where(seen, np.exp((scores - np.where(seen, scores, -(10**9)).max(-1, keepdims=True)) * step), 0)
        exact = e / e.sum(-1, keepdims=True) * 32767
        assert np.abs(Softmax.of(step, grid)(scores, seen) - exact).max() <= 0.5 + 1e-3


def test_sums_of_two_grids_are_rounded_once():
    grid = StaticGrid(0.01, 0, 16)
    a, b = RNG.integers(-32768, 32768, (2, 1000))
    exact = np.clip(np.rint(a * 0.37 + b * 0.0021), -32768, 32767)
    got = Rescale.of(np.array([0.37, 0.0021]), grid).sum(a, b)
    assert np.abs(got - exact).max() <= 1 and (got != exact).mean() < 1e-3


def test_sigmoid_table_has_every_code():
    gate, out = StaticGrid(0.05, 3, 8), StaticGrid(1 / 255, -128, 8)
    table = sigmoid_table(gate, out)
    assert len(table) == 256 and (np.diff(table.astype(int)) >= 0).all()
    assert table[128 + 3] == round(0.5 * 255) - 128


# --- refusals ---


def test_what_is_not_static_is_refused_by_name(task):
    with pytest.raises(NetsukeError, match=r"blocks\.0\.attn_stream has no static grid"):
        IntegerModel.of_model(tiny_llama())
    model = MobileQuant(calibration=8, learn="off").apply(tiny_llama(), task)
    dense = tiny_llama().blocks[1].o
    model.replace("blocks.1.o", dense)
    with pytest.raises(NetsukeError, match=r"blocks\.1\.o is stored as"):
        IntegerModel.of_model(model)
    wide = MobileQuant(calibration=8, learn="off", wide=["gate"]).apply(tiny_llama(), task)
    with pytest.raises(NetsukeError, match=r"blocks\.0\.gate has 16 bits"):
        IntegerModel.of_model(wide)


def test_tokens_and_lengths_are_checked(task):
    integer = IntegerModel.of_model(MobileQuant(calibration=8, learn="off").apply(tiny_llama(), task))
    for ids in ([], [96], [-1], list(range(65))):
        with pytest.raises(NetsukeError, match="run a model in integers"):
            integer.forward(ids)
