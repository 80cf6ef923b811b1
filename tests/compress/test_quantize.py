"""Rounding and GPTQ against plain references, the Quantize method on tiny models, and stories260K where it is there."""

import itertools
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from netsuke.compress import quantize, rounding
from netsuke.compress.quantize import Quantize, quantize_linear
from netsuke.compress.rounding import aimed, descend, gptq, inverse_factor, round_to_nearest, search_range
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.layers.lowrank import LowRank
from netsuke.layers.quantized import QuantLinear
from netsuke.measure.activations import Gram
from netsuke.models.llama import KVCache
from netsuke.models.load import load
from netsuke.tasks.language import token_losses
from tests.tiny import same_state, tiny_llama, tiny_task

BITS = (2, 3, 4, 8)


def problem(outs=24, ins=70, rows=400, seed=0):
    """Weights and the second moment of strongly correlated inputs of unequal sizes."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(ins, ins, generator=rng, dtype=torch.float64) * torch.linspace(0.1, 2, ins)
    x = torch.randn(rows, ins, generator=rng, dtype=torch.float64) @ mix
    return torch.randn(outs, ins, generator=rng), x.T @ x / rows


def cost(W, H, codes):
    d = (W - codes.layer().to_dense()).double()
    return float((d @ H * d).sum())


def plain_rounding(W, bits, group):
    """Min-max rounding of each group, the textbook form with float16 scales."""
    out = torch.empty_like(W)
    for a in range(0, W.shape[1], group):
        w = W[:, a : a + group]
        low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).half().float()
        zero = (-low / scale).round()
        out[:, a : a + group] = (((w / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale
    return out


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [16, 64, 100])
def test_the_search_is_at_least_as_good_as_the_full_range(bits, group):
    W, _ = problem()
    plain = (W - plain_rounding(W, bits, group)).square().sum()
    found = (W - round_to_nearest(W, bits, group).layer().to_dense()).square().sum()
    assert found <= plain * (1 + 1e-6)
    if bits == 2:
        assert found < 0.8 * plain  # two bits must give up the tails


@pytest.mark.parametrize("bits", BITS)
def test_representable_weights_come_back_exactly(bits):
    rng = torch.Generator().manual_seed(1)
    codes = torch.randint(2**bits, (6, 32), generator=rng).float()
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1
    W = (codes - 2 ** (bits - 1)) * 0.25
    assert torch.equal(round_to_nearest(W, bits, 32).layer().to_dense(), W)


def test_weights_of_the_search_move_errors_to_where_they_cost_least():
    W, _ = problem(ins=32)
    weights = torch.logspace(-3, 3, 32)
    error = [((W - c.layer().to_dense()).square() * weights).sum() for c in (
        round_to_nearest(W, 3, 32), round_to_nearest(W, 3, 32, weights))]  # fmt: skip
    assert error[1] < 0.7 * error[0]


def test_constant_zero_and_one_sided_groups():
    W = torch.stack([torch.zeros(16), torch.full((16,), 3.0), torch.full((16,), -2.0), torch.linspace(5, 6, 16)])
    back = round_to_nearest(W, 4, 16).layer().to_dense()
    assert torch.equal(back[0], W[0])
    torch.testing.assert_close(back[1:3], W[1:3], rtol=2e-3, atol=0)
    assert (back[3] - W[3]).abs().max() <= 6 / 15


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [16, 32, 70])
def test_gptq_costs_less_than_rounding(bits, group):
    W, H = problem()
    assert cost(W, H, gptq(W, H, bits, group)) < 0.8 * cost(W, H, round_to_nearest(W, bits, group))


def test_gptq_is_optimal_brain_quantization_column_by_column():
    """Against the definition: after each column the inverse Hessian of those left is formed anew."""
    W, H = problem(outs=8, ins=20)
    bits, damp = 3, 0.01
    scale, zero = search_range(W, bits, H.diagonal() + damp * H.diagonal().mean())
    damped, left, want = H + damp * H.diagonal().mean() * torch.eye(20), W.double().clone(), []
    for j in range(20):
        code = ((left[:, 0] / scale).round() + zero).clamp(0, 2**bits - 1)
        want.append(code)
        inverse = torch.linalg.inv(damped[j:, j:])
        error = left[:, 0] - scale * (code - zero)
        left = (left - error[:, None] * inverse[0] / inverse[0, 0])[:, 1:]
    found = gptq(W, H, bits, 20, damp)
    assert torch.equal(found.codes, torch.stack(want, 1).to(torch.uint8))


def test_lazy_updates_change_nothing(monkeypatch):
    W, H = problem(ins=130)
    whole = gptq(W, H, 3, 16)
    monkeypatch.setattr(rounding, "LAZY", 16)
    assert torch.equal(gptq(W, H, 3, 16).codes, whole.codes)


def test_uncorrelated_inputs_leave_plain_rounding():
    W, _ = problem(ins=64)
    found, plain = gptq(W, torch.eye(64, dtype=torch.float64), 4, 16), round_to_nearest(W, 4, 16)
    assert torch.equal(found.codes, plain.codes) and torch.equal(found.scales, plain.scales)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [16, 32, 70])
def test_descent_never_costs_more_and_less_on_few_bits(bits, group):
    W, H = problem()
    damped, start = H + 0.01 * H.diagonal().mean() * torch.eye(70), gptq(W, H, bits, group)
    costs = [cost(W, damped, start)]
    costs += [cost(W, damped, descend(W, H, start, sweeps=n)) for n in range(1, 6)]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(costs))
    assert costs[4] < 0.9 * costs[0]
    assert descend(W, H, start, sweeps=0).codes.equal(start.codes)


def test_descent_ends_where_no_code_and_no_scale_can_be_bettered_alone():
    W, H = problem(outs=5, ins=24)
    bits, group, damp = 2, 8, 0.01
    found = descend(W, H, gptq(W, H, bits, group), damp, sweeps=60)
    damped = H + damp * H.diagonal().mean() * torch.eye(24)
    least = cost(W, damped, found)
    codes, scales = found.codes, found.scales
    for row in range(5):
        for column in range(24):
            for step in (-1, 1):
                if 0 <= int(codes[row, column]) + step < 2**bits:
                    other = codes.clone()
                    other[row, column] = int(codes[row, column]) + step
                    assert cost(W, damped, replace(found, codes=other)) >= least * (1 - 1e-9)
        for g in range(3):
            for by in (0.999, 1.001):
                other = scales.clone()
                other[row, g] *= by
                assert cost(W, damped, replace(found, scales=other)) >= least * (1 - 1e-9)


def test_descent_in_blocks_is_descent(monkeypatch):
    W, H = problem(ins=130)
    start = gptq(W, H, 3, 16)
    whole = descend(W, H, start)
    monkeypatch.setattr(rounding, "LAZY", 16)
    assert torch.equal(descend(W, H, start).codes, whole.codes)


def test_descent_keeps_channels_never_seen_and_rows_of_zeros():
    W, H = problem(ins=64)
    W[0] = 0
    dead = torch.arange(0, 64, 5)
    H[dead], H[:, dead] = 0, 0
    back = descend(W, H, gptq(W, H, 8, 16)).layer().to_dense()
    assert (back - W)[:, dead].abs().max() < 0.1 and not back[0].any()


def drifted(rows=500, ins=20, seed=3):
    """Inputs y as they were, and x as they have become."""
    rng = torch.Generator().manual_seed(seed)
    before = torch.randn(rows, ins, generator=rng) @ torch.randn(ins, ins, generator=rng)
    return before, before @ (torch.eye(ins) + 0.2 * torch.randn(ins, ins, generator=rng)) + 0.1


def test_weights_that_make_good_a_drift_are_least_squares():
    before, now = drifted()
    W, gram = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)), Gram()
    for x, y in zip(now.split(100), before.split(100)):
        gram.add(x, y)
    want = torch.linalg.lstsq(now.double(), before.double() @ W.T.double()).solution.T
    torch.testing.assert_close(aimed(W, gram.mean(), gram.mean_drift(), 1e-9, share=1), want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(aimed(W, gram.mean(), gram.mean_drift(), share=0), W.double())

    def missed(codes):
        return float((before @ W.T - now @ codes.T).square().mean())

    assert missed(aimed(W, gram.mean(), gram.mean_drift(), share=1).float()) < 0.1 * missed(W)
    aiming, plain = (quantize_linear(Dense(W), 4, 20, gram=g).to_dense() for g in (gram, gram_with(gram.mean())))
    assert missed(aiming) < 0.8 * missed(plain)


def test_the_second_factor_is_told_what_the_first_one_gave_before(monkeypatch):
    before, now = drifted()
    rng, gram, grams = torch.Generator().manual_seed(1), Gram(), []
    gram.add(now, before)
    layer = LowRank(Dense(torch.randn(5, 20, generator=rng)), Dense(torch.randn(7, 5, generator=rng)))
    real = quantize.quantize_linear

    def spy(layer, bits, group, solver, gram, name, damp):
        grams.append(gram)
        return real(layer, bits, group, solver, gram, name, damp)

    monkeypatch.setattr(quantize, "quantize_linear", spy)
    made = quantize.quantize_factors(layer, 4, 20, "descent", gram, "a", 0.01)
    want = Gram()
    want.add(made.first(now), layer.first(before))
    torch.testing.assert_close(grams[1].mean(), want.mean(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grams[1].mean_drift(), want.mean_drift(), rtol=1e-4, atol=1e-2)


def test_inverse_factor():
    _, H = problem()
    U = inverse_factor(H, 0.02)
    damped = H + 0.02 * H.diagonal().mean() * torch.eye(70)
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U @ damped, torch.eye(70, dtype=torch.float64), rtol=0, atol=1e-7)


def test_channels_never_seen_are_rounded_to_nearest():
    W, H = problem(ins=64)
    dead = torch.arange(0, 64, 5)
    H[dead], H[:, dead] = 0, 0
    back = gptq(W, H, 8, 16).layer().to_dense()
    assert (back - W)[:, dead].abs().max() < 0.1
    nothing = gptq(W, torch.zeros(64, 64, dtype=torch.float64), 8, 16).layer().to_dense()
    assert (nothing - W).abs().max() < 0.02


def test_damping_is_raised_until_the_factor_exists():
    W, H = problem(rows=10)  # rank 10 of 70
    H -= 0.05 * H.diagonal().mean() * torch.eye(70)  # and indefinite, as sums in low precision can be
    with pytest.raises(RuntimeError):
        torch.linalg.cholesky(H + 0.01 * H.diagonal().mean() * torch.eye(70))
    assert gptq(W, H, 4, 16).layer().to_dense().isfinite().all()


def gram_with(total):
    gram = Gram()
    gram.total, gram.rows = total, 1
    return gram


@pytest.mark.parametrize("spoiled", [float("nan"), -1e30])
def test_statistics_without_a_factor_are_refused_by_the_layer_s_name(spoiled):
    W, H = problem()
    H[3, 4] = H[4, 3] = spoiled
    with pytest.raises(NetsukeError, match=r"blocks\.0\.up have no Cholesky factor"):
        quantize_linear(Dense(W), 4, 16, "gptq", gram_with(H), "blocks.0.up")


@pytest.mark.parametrize("value,words", [(float("nan"), "NaN"), (float("inf"), "infinite"), (3e38, "3e\\+38")])
def test_weights_that_cannot_be_scaled_are_refused_by_name(value, words):
    W = torch.ones(4, 16)
    W[2, 3] = value
    with pytest.raises(NetsukeError, match=rf"quantize blocks\.0\.v to 4 bits.*{words}"):
        quantize_linear(Dense(W), 4, 16, "rtn", name="blocks.0.v")


@pytest.mark.parametrize("gram", [None, Gram(), gram_with(torch.eye(7))])
def test_gptq_without_fitting_statistics(gram):
    with pytest.raises(NetsukeError, match="no statistics of its 16 inputs"):
        quantize_linear(Dense(torch.ones(4, 16)), 4, 16, "gptq", gram)


@pytest.mark.parametrize("knobs,words", [
    ({"bits": 5}, "bits=5"), ({"bits": "4"}, "bits='4'"), ({"embed_bits": 1}, "embed_bits=1"), ({"group": 0}, "group=0"),
    ({"solver": "awq"}, "solver='awq'"), ({"per_layer": {"blocks.0.q": 7}}, r"per_layer\[blocks.0.q\]=7"),
    ({"per_layer": "q:4"}, "per_layer='q:4'"), ({"calibration": 0}, "calibration=0"), ({"group": 6.5}, "group=6.5"),
])  # fmt: skip
def test_knobs_out_of_range(knobs, words):
    with pytest.raises(NetsukeError, match=words):
        Quantize(**knobs)


def test_embedding_gets_eight_bits_unless_told():
    model = tiny_llama()
    assert Quantize(bits=3).plan(model)["embed"] == 8
    assert Quantize(bits=3, embed_bits=4).plan(model)["embed"] == 4
    assert Quantize(bits=16, per_layer={"blocks.0.q": 4}).plan(model)["embed"] == 16
    assert Quantize(bits=3, per_layer={"embed": 2}).plan(model)["embed"] == 2


def test_per_layer_bits_and_what_stays():
    model, task = tiny_llama(), tiny_task()
    small = Quantize(bits=4, group=16, per_layer={"blocks.1.down": 16, "blocks.0.q": 2}, calibration=4).apply(
        model, task
    )
    specs = {n: m.spec() for n, m in small.linears().items()}
    assert specs["blocks.1.down"] == {"kind": "dense", "dtype": "float16"}
    assert torch.equal(small.blocks[1].down.weight, model.blocks[1].down.weight.half())
    assert specs["blocks.0.q"] == {"kind": "quant", "bits": 2, "group": 16}
    assert specs["blocks.0.k"]["bits"] == 4 and specs["embed"]["bits"] == 8


def test_bfloat16_stays_what_it_is():
    model = tiny_llama()
    model.replace("blocks.0.o", Dense(model.blocks[0].o.weight.bfloat16()))
    small = Quantize(bits=4, solver="rtn", per_layer={"blocks.0.o": 16}).apply(model)
    assert small.blocks[0].o.weight.dtype == torch.bfloat16


def test_unknown_names_are_refused_by_name():
    with pytest.raises(NetsukeError, match=r"'blocks\.7\.q', which this model does not have \(it has embed, blocks"):
        Quantize(solver="rtn", per_layer={"blocks.7.q": 4}).apply(tiny_llama())


def test_dense_weights_beyond_float16_are_refused_by_name():
    model = tiny_llama()
    model.blocks[1].up.weight[0, 0] = 1e5
    with pytest.raises(NetsukeError, match=r"store blocks\.1\.up as float16.*1e\+05"):
        Quantize(solver="rtn", per_layer={"blocks.1.up": 16}).apply(model)


def test_rounding_and_identity_ask_for_no_data():
    assert Quantize().needs_data and not Quantize(solver="rtn").needs_data and not Quantize(bits=16).needs_data
    assert Quantize(bits=16, per_layer={"embed": 4}).needs_data


def test_a_task_without_text_is_refused():
    task = tiny_task()
    task.texts["train"] = ""
    with pytest.raises(NetsukeError, match="the train split holds no window"):
        Quantize().apply(tiny_llama(), task)


def test_calibration_counts_windows_and_sees_only_train():
    task = tiny_task()
    seen = []
    task.batches = lambda split, limit=None, real=task.batches: seen.append(split) or real(split, limit)
    assert sum(len(ids) for ids in quantize.calibration_windows(task, 6)) == 6
    Quantize(group=16, calibration=4).apply(tiny_llama(), task)
    assert set(seen) == {"train"}


def test_other_models_are_refused():
    with pytest.raises(NetsukeError, match="Linear is no Llama-style decoder"):
        Quantize(solver="rtn").apply(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("tied", [True, False])
def test_outputs_suffer_less_than_from_rounding(tied):
    model, task = tiny_llama(tied=tied), tiny_task(windows=32)
    ids = task.windows("validation")[:, :-1]
    knobs = {"bits": 3, "embed_bits": 3, "group": 16}
    with torch.no_grad():
        want = model(ids).log_softmax(-1)
        harm = [
            float(
                (want.exp() * (want - Quantize(solver=s, **knobs).apply(model, task)(ids).log_softmax(-1)))
                .sum(-1)
                .mean()
            )
            for s in ("descent", "gptq", "rtn")
        ]
    assert harm[0] < harm[1] < 0.85 * harm[2]


def test_each_map_is_fitted_to_the_inputs_it_will_see(monkeypatch):
    """The Gram of `down` in block 1 comes from the quantized model's own activations, gate and up of its block included."""
    model, task = tiny_llama(), tiny_task()
    grams = {}
    real = quantize.quantize_linear

    def spy(layer, bits, group, solver, gram, name, damp):
        grams[name] = gram
        return real(layer, bits, group, solver, gram, name, damp)

    monkeypatch.setattr(quantize, "quantize_linear", spy)
    small = Quantize(bits=3, group=16, calibration=4).apply(model, task)
    seen = Gram()
    small.blocks[1].down.register_forward_pre_hook(lambda _, args: seen.add(args[0]))
    with torch.no_grad():
        small(next(task.batches("train"))[:, :-1])
    torch.testing.assert_close(seen.mean(), grams["blocks.1.down"].mean(), rtol=1e-4, atol=1e-5)
    assert grams["blocks.0.q"] is grams["blocks.0.v"] and grams["blocks.0.gate"] is grams["blocks.0.up"]


def test_quantized_layers_stay_at_sixteen_bits():
    packed = Quantize(solver="rtn").apply(tiny_llama())
    assert same_state(Quantize(bits=16).apply(packed), packed)
    assert all(isinstance(m, QuantLinear) for m in packed.linears().values())


# --- a real model: stories260K, calibrated on its own stories ------------------------------------------------------


class Sampled:
    """Stories that the model tells itself, from different seeds: 16 windows to calibrate, 32 to judge."""

    def __init__(self, model):
        self.rows = {"train": tell(model, 16, 0), "validation": tell(model, 32, 1)}

    def batches(self, split, limit=None):
        yield from self.rows[split].split(8)

    def perplexity(self, model):
        with torch.no_grad():
            losses = [token_losses(model, rows) for rows in self.batches("validation")]
        return math.exp(torch.cat(losses).double().mean())


@torch.no_grad()
def tell(model, stories, seed, length=160):
    rng = torch.Generator().manual_seed(seed)
    cache, ids = KVCache(model.cfg, stories, length + 1), torch.ones(stories, 1, dtype=torch.long)
    for _ in range(length):
        chances = model(ids[:, -1:], cache, last_only=True)[:, -1].softmax(-1)
        ids = torch.cat((ids, torch.multinomial(chances, 1, generator=rng)), 1)
    return ids


@pytest.fixture(scope="module")
def stories():
    path = Path(os.environ.get("NETSUKE_DATA", "")) / "modegpt/stories260K.bin"
    if not os.environ.get("NETSUKE_DATA") or not path.is_file():
        pytest.skip("NETSUKE_DATA does not hold modegpt/stories260K.bin")
    model = load(path).model
    task = Sampled(model)
    return model, task, task.perplexity(model)


@pytest.mark.parametrize("bits,most", [(4, 1.10), (3, 1.55), (2, 12.0)])
def test_stories260k(stories, bits, most):
    """Measured: 1.064, 1.37 and 7.5 for descent, 1.065, 1.42 and 8.8 for GPTQ, 1.12, 1.71 and 26 for rounding."""
    model, task, base = stories
    ratio = {
        s: task.perplexity(Quantize(bits=bits, solver=s, calibration=16).apply(model, task)) / base
        for s in ("descent", "gptq", "rtn")
    }
    assert ratio["descent"] < ratio["gptq"] < ratio["rtn"] and ratio["gptq"] < most


def test_stories260k_eight_bits_are_free(stories):
    model, task, base = stories
    assert task.perplexity(Quantize(bits=8, solver="rtn").apply(model)) / base == pytest.approx(1, abs=0.003)
