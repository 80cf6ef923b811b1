"""Packing against a bit-by-bit reference written from the layout's description."""

import pytest
import torch

from netsuke.layers.packing import WIDTHS, pack, packed_width, unpack


def reference(row: list[int], bits: int) -> bytes:
    stream = sum(code << (i * bits) for i, code in enumerate(row))
    return stream.to_bytes(packed_width(len(row), bits), "little")


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("ins", [1, 2, 3, 5, 7, 8, 9, 63, 64])
def test_layout_is_the_documented_bit_stream(bits, ins):
    codes = torch.randint(2**bits, (5, ins), dtype=torch.uint8, generator=torch.Generator().manual_seed(ins))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, -(-ins * bits // 8))
    for row, found in zip(codes.tolist(), packed):
        assert bytes(found.tolist()) == reference(row, bits)
    assert torch.equal(unpack(packed, bits, ins), codes)


def test_three_bits_take_three_bytes_for_eight_codes():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    assert pack(codes, 3).tolist() == [[0b11_010_001, 0b0_101_100_0, 0b000_111_11]]


@pytest.mark.parametrize("bits", WIDTHS)
def test_empty_and_extreme(bits):
    assert pack(torch.zeros(0, 9, dtype=torch.uint8), bits).shape == (0, packed_width(9, bits))
    full = torch.full((2, 11), 2**bits - 1, dtype=torch.uint8)
    assert torch.equal(unpack(pack(full, bits), bits, 11), full)


def test_codes_that_do_not_fit_are_not_cut():
    with pytest.raises(ValueError, match="9 does not fit into 3 bits"):
        pack(torch.tensor([[1, 9]], dtype=torch.uint8), 3)
