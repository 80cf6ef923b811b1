"""Simulated quantization: the same numbers as the stored codes, zero stays zero, gradients reach what is learned."""

import pytest
import torch

from netsuke.compress.fake_quant import (
    clip_start,
    fake_static,
    fake_weight,
    freeze,
    grid,
    grouped,
    weight_codes,
)
from netsuke.errors import NetsukeError
from netsuke.layers.static import StaticGrid, TokenGrid, levels

RNG = torch.Generator().manual_seed(0)
W = torch.randn(12, 32, generator=RNG) * torch.logspace(-2, 1, 12)[:, None]
X = torch.randn(5, 7, 32, generator=RNG) * 3 + 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per", ["tensor", "row", 8])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_simulation_is_what_is_stored(bits, per, symmetric):
    clip = clip_start(W, per) - torch.rand(clip_start(W, per).shape, generator=RNG) * 3
    fake = fake_weight(W, bits, per, clip, symmetric)
    stored = weight_codes(W, bits, per, clip, symmetric)
    assert torch.equal(stored.layer().to_dense(), fake)
    assert grouped(fake, per).unique(dim=-1).shape[-1] <= 2**bits * 12
    assert int(stored.codes.max()) < 2**bits


@pytest.mark.parametrize("bits", [4, 8])
def test_error_is_at_most_half_a_step_inside_the_range(bits):
    step = (W.abs().amax(1, keepdim=True) / levels(bits)[1]) * 1.001  # scales are rounded to float16
    assert ((fake_weight(W, bits, "row") - W).abs() <= step / 2 + 128 * step * 2**-11).all()


def test_a_clip_narrows_the_range_by_its_sigmoid():
    clip = torch.zeros_like(clip_start(W, "row"))
    assert torch.allclose(fake_weight(W, 8, "row", clip).abs().amax(1), W.abs().amax(1) / 2, rtol=0.01)


def test_zero_is_exact_and_ranges_hold_it():
    for low, high in ((-1.37, 2.9), (0.5, 2.0), (-3.0, -1.0), (0.0, 1.0)):
        for bits in (8, 16):
            site = freeze(low, high, bits)
            assert float(site(torch.zeros(1))) == 0.0
            least, most = site.range
            assert least <= min(low, 0) + site.scale / 2 and most >= max(high, 0) - site.scale / 2


@pytest.mark.parametrize("bits", [8, 16])
def test_a_frozen_range_is_the_learned_one(bits):
    low, high = torch.tensor(-2.5), torch.tensor(4.1)
    site = freeze(low, high, bits)
    assert torch.equal(site(X), fake_static(X, low, high, bits))
    assert site == StaticGrid.from_spec(site.spec())
    codes = site.codes(X)
    assert codes.min() >= levels(bits)[0] and codes.max() <= levels(bits)[1] and torch.equal(codes, codes.round())


def test_gradients_reach_ranges_clips_and_inputs():
    low, high = torch.tensor(-1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    x, clip = X.clone().requires_grad_(True), clip_start(W, "row").requires_grad_(True)
    w = W.clone().requires_grad_(True)
    loss = (fake_static(x, low, high, 8) @ fake_weight(w, 4, "row", clip).T).square().mean()
    for grad in torch.autograd.grad(loss, (low, high, x, clip, w)):
        assert grad.isfinite().all() and grad.abs().sum() > 0


def test_an_open_end_pulls_its_range_outwards():
    """Values beyond `high` are clipped: more room for them must lessen the error, so the gradient is negative."""
    low, high = torch.tensor(-9.0), torch.tensor(2.0, requires_grad=True)
    (fake_static(X, low, high, 8) - X).square().mean().backward()
    assert high.grad < 0


def test_every_token_has_its_own_dynamic_range():
    x = torch.stack((X[0, 0], 1000 * X[0, 0]))
    got = TokenGrid(8)(x)
    assert ((got - x).abs().amax(1) <= (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)) / 255 * 0.51).all()
    static = fake_static(x, x.min(), x.max(), 8)
    assert (static[0] - x[0]).abs().max() > 50 * (got[0] - x[0]).abs().max()


def test_a_range_of_nothing_has_a_scale():
    scale, zero = grid(torch.tensor(0.0), torch.tensor(0.0), 8)
    assert scale > 0 and zero.isfinite()


def test_refusals_name_the_layer_and_the_site():
    with pytest.raises(NetsukeError, match=r"blocks\.1\.down.*groups of 10 for 32 inputs"):
        fake_weight(W, 4, 10, name="blocks.1.down")
    with pytest.raises(NetsukeError, match=r"blocks\.0\.q.*from 0 to 0"):
        freeze(0.0, 0.0, 8, "blocks.0.q")
    with pytest.raises(NetsukeError, match="from nan"):
        freeze(float("nan"), 1.0, 8)


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "static", "scale": 0.0, "zero": 0, "bits": 8}, {"kind": "static", "scale": 1.0, "zero": 200, "bits": 8},
        {"kind": "static", "scale": float("inf"), "zero": 0, "bits": 8}, {"kind": "static", "scale": 1.0, "zero": 5, "bits": 16},
        {"kind": "static", "scale": 1.0, "zero": 0, "bits": 4}, {"kind": "static", "scale": 1.0, "zero": True, "bits": 8},
        {"kind": "else", "scale": 1.0, "zero": 0, "bits": 8}, {"kind": "static", "scale": 1.0, "bits": 8}, None, [1],
    ],
)  # fmt: skip
def test_hostile_grids_are_refused(spec):
    with pytest.raises(NetsukeError, match="cannot build a static grid"):
        StaticGrid.from_spec(spec)
