"""A master map answers with what it is packed to, perturbed without being written to, block of rows by block of rows."""

import pytest
import torch

from netsuke.layers.linear import WIDENED
from netsuke.layers.quantized import QuantLinear
from netsuke.train.masters import MasterLinear, clip_logits, fake_quantized
from netsuke.train.zeroth_order import Perturbation


def master(outs=70, ins=50, bits=3, group=16, seed=0, bias=True) -> MasterLinear:
    rng = torch.Generator().manual_seed(seed)
    clip = clip_logits(outs, ins, group) + torch.randn(2, outs, -(-ins // group), generator=rng) / 4
    b = torch.randn(outs, generator=rng) if bias else None
    return MasterLinear("m", torch.randn(outs, ins, generator=rng) / 7, b, clip, bits, group)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ins,group", [(64, 16), (50, 16), (53, 53), (9, 16)])
def test_packed_is_what_was_trained(bits, ins, group):
    layer = master(70, ins, bits, group)
    packed, x = layer.pack(), torch.randn(5, ins, generator=torch.Generator().manual_seed(1))
    assert isinstance(packed, QuantLinear) and packed.bits == bits and packed.group == group
    assert torch.equal(packed.to_dense(), layer.to_dense())
    with torch.no_grad():
        assert torch.allclose(packed(x), layer(x), rtol=0, atol=1e-6)


def test_perturbed_in_parts_is_perturbed_as_a_whole():
    layer = master(3 * WIDENED // 512 + 7, 512, 4, 64, bias=False)
    before, p = layer.weight.clone(), Perturbation(0, 5, 0, 1e-2)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(2))
    still = layer.to_dense()
    layer.perturbation = p
    moved = fake_quantized(p.rows("m.weight", layer.weight, 0, layer.outs), layer.clip, 4, 64)
    with torch.no_grad():
        assert torch.allclose(layer(x), x @ moved.T, atol=1e-5)
    assert torch.equal(layer.to_dense(), moved) and not torch.equal(moved, still)
    assert torch.equal(layer.weight, before)
    layer.perturbation = None
    assert torch.equal(layer.to_dense(), still)


def test_clips_shrink_the_range_and_take_gradients():
    layer = master(8, 32, 3, 16, bias=False)
    wide = fake_quantized(layer.weight, torch.full((2, 8, 2), 20.0), 3, 16)
    tight = fake_quantized(layer.weight, torch.full((2, 8, 2), 0.0), 3, 16)
    assert float(tight.abs().max()) < 0.7 * float(wide.abs().max())
    layer.requires_grad_(True)
    layer(torch.ones(1, 32)).sum().backward()
    assert layer.clip.grad.abs().sum() > 0 and layer.weight.grad.abs().sum() > 0


def test_a_fixed_grid_stays_while_weights_move():
    layer = master(40, 50, 3, 16)
    before = layer.pack()
    layer.fix_grid()
    assert torch.equal(layer.to_dense(), before.to_dense())
    Perturbation(0, 0, 0, 0.05).shift_({"m.weight": layer.weight})
    after, x = layer.pack(), torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(after.scales, before.scales) and torch.equal(after.zeros, before.zeros)
    assert not torch.equal(after.codes, before.codes)
    with torch.no_grad():
        assert torch.equal(after.to_dense(), layer.to_dense()) and torch.allclose(after(x), layer(x), atol=1e-6)
    layer.fixed = None
    assert not torch.equal(layer.pack().scales, before.scales)
