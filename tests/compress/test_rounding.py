"""Rounding to nearest, GPTQ and descent of single matrices against plain references and their own optimality."""

import itertools
from dataclasses import replace

import pytest
import torch

from netsuke.compress import rounding
from netsuke.compress.quantize import quantize_linear
from netsuke.compress.rounding import aimed, descend, gptq, inverse_factor, round_to_nearest, search_range
from netsuke.layers.linear import Dense
from netsuke.measure.activations import Gram

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
    still = Gram()
    still.add(now)
    aiming, plain = (quantize_linear(Dense(W), 4, 20, gram=g).to_dense() for g in (gram, still))
    assert missed(aiming) < 0.8 * missed(plain)


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
