"""QuantLinear against the formula in its file: scale · (code − zero), any group, ragged tails, all bit widths."""

import pytest
import torch
import torch.nn.functional as F

from netsuke.layers import quantized
from netsuke.layers.packing import WIDTHS
from netsuke.layers.quantized import QuantLinear
from netsuke.layers.registry import layer_from_spec


def random_layer(bits, ins=50, outs=7, group=16, bias=None, seed=0):
    rng = torch.Generator().manual_seed(seed)
    groups = -(-ins // group)
    codes = torch.randint(2**bits, (outs, ins), dtype=torch.uint8, generator=rng)
    zeros = torch.randint(2**bits, (outs, groups), dtype=torch.uint8, generator=rng)
    scales = torch.rand(outs, groups, generator=rng).half()
    layer = QuantLinear.from_codes(codes, scales, zeros, bits, group, bias)
    columns = torch.arange(ins) // group
    W = scales.float()[:, columns] * (codes.float() - zeros.float()[:, columns])
    return layer, W


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("ins,group", [(50, 16), (64, 64), (48, 64), (5, 1), (33, 32)])
def test_weight_is_the_formula_exactly(bits, ins, group):
    layer, W = random_layer(bits, ins=ins, group=group)
    assert torch.equal(layer.to_dense(), W)
    assert torch.equal(layer.weight_for(torch.bfloat16), W.bfloat16())
    assert torch.equal(layer.weight_rows(2, 5, torch.float32), W[2:5])


def test_rows_in_any_shape():
    layer, W = random_layer(3)
    ids = torch.tensor([[0, 6, 6], [3, 1, 0]])
    assert torch.equal(layer.rows(ids), W[ids])


def test_rows_leave_the_rest_packed(monkeypatch):
    layer, _ = random_layer(4, outs=5000)
    seen = []
    real = quantized.unpack
    monkeypatch.setattr(quantized, "unpack", lambda packed, *rest: seen.append(len(packed)) or real(packed, *rest))
    layer.rows(torch.tensor([4, 4711]))
    assert seen == [2]


def test_chunked_like_whole(monkeypatch):
    layer, W = random_layer(3, outs=23)
    monkeypatch.setattr(quantized, "CHUNK", 4 * layer.ins)
    assert torch.equal(layer.to_dense(), W)
    assert torch.equal(layer.weight_for(torch.float16), W.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_a_linear_map(dtype):
    bias = torch.linspace(-1, 1, 7)
    layer, W = random_layer(4, bias=bias)
    x = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.linear(x, W.to(dtype), bias.to(dtype)))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("bias", [None, torch.float32, torch.float16])
def test_spec_rebuilds_the_layer(bits, bias):
    layer, W = random_layer(bits, bias=None if bias is None else torch.ones(7, dtype=bias))
    again = layer_from_spec(layer.spec(), layer.outs, layer.ins, layer.bias is not None)
    assert again.bytes() == layer.bytes() and again.spec() == layer.spec()
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again.to_dense(), W)
    assert bias is None or again.bias.dtype == bias


def test_bytes_are_those_of_packed_storage():
    layer, _ = random_layer(3, ins=50, outs=7, group=16)
    assert layer.bytes() == 7 * (19 + 4 * 2 + 4)  # 150 bits, 4 float16 scales, 4 one-byte zero points per row
