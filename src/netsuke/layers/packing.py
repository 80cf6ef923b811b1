"""Small integers packed into bytes, the way the C engine reads them.

Layout: a row of I codes of b bits is one little-endian bit stream. Code i fills bits i·b … i·b + b − 1 of the stream, and
bit n of the stream is bit n mod 8 (least significant first) of byte n div 8. Every row starts on a byte; the last byte of a
row is filled up with zero bits. So b = 4 puts code 0 into the low nibble of byte 0, and b = 3 puts eight codes into three
bytes, some of them across a byte border.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 8)
# The shortest run of codes that ends on a byte border: codes per run, bytes per run.
RUNS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}


def packed_width(ins: int, bits: int) -> int:
    """Bytes of one packed row of `ins` codes."""
    return (ins * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (O, I) uint8, each below 2^bits -> (O, ceil(I·bits/8)) uint8. Raises ValueError for codes out of range."""
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    if bits == 8:
        return codes.contiguous()
    (outs, ins), (run, size) = codes.shape, RUNS[bits]
    padded = codes.new_zeros(outs, -(-ins // run) * run, dtype=torch.int32)
    padded[:, :ins] = codes
    word = padded[:, 0::run].clone()
    for i in range(1, run):
        word |= padded[:, i::run] << (i * bits)
    out = torch.stack([(word >> (8 * j)) & 255 for j in range(size)], dim=-1).to(torch.uint8)
    return out.flatten(1)[:, : packed_width(ins, bits)].contiguous()


def unpack(packed: Tensor, bits: int, ins: int) -> Tensor:
    """The inverse of `pack`: (O, ceil(ins·bits/8)) uint8 -> (O, ins) uint8."""
    if bits == 8:
        return packed
    outs, (run, size) = packed.shape[0], RUNS[bits]
    if packed.shape[1] % size:  # a cut last run (3 bits only) gets its missing bytes back
        packed = torch.nn.functional.pad(packed, (0, size - packed.shape[1] % size))
    out = packed.new_empty(outs, packed.shape[1] // size, run)
    if size == 1:
        mask = (1 << bits) - 1
        for i in range(run):
            out[..., i] = (packed >> (i * bits)) & mask
    else:
        b0, b1, b2 = packed[:, 0::3], packed[:, 1::3], packed[:, 2::3]
        # Bytes, not 24-bit words: uint8 shifts drop what leaves the byte, and are four times narrower than int32.
        shifted = (
            b0, b0 >> 3, (b0 >> 6) | (b1 << 2), b1 >> 1, b1 >> 4, (b1 >> 7) | (b2 << 1), b2 >> 2, b2 >> 5,
        )  # fmt: skip
        for i, value in enumerate(shifted):
            out[..., i] = value & 7
    return out.flatten(1)[:, :ins]
