"""From sound to features in integers: the front end of small keyword networks, and plain integer arithmetic.

The operators and their roundings are those of TensorFlow Lite Micro's signal library (its audio preprocessor: window, FFT,
energy, mel filters, noise subtraction, PCAN gain (Wang et al., 2017), logarithm), equal bit for bit. All on the last axis;
i16, u32 … are the widths of what is stored, >> is arithmetic, `msb(x)` the number of bits that x needs.

window          i16 x, i16 w -> i16: sat16((x * w) >> shift)
fft_scale       i16 x -> i16 x << s, i32 s: s = max(0, 15 - msb(max |x|)), 0 for silence
rfft            i16 (L) -> i16 (N + 2), re and im interleaved, N = attrs length, x padded with zeros; `rfft16` has the steps
energy          i16 (2 K) -> u32 (K): re^2 + im^2 for start <= k < end, else 0
filter_bank     u32 (K) -> u64 (C): bands c = 0…C overlap by half: part_c = sum w * x[f + j], rest_c = sum u * x[f + j] for
                j < width_c, w and u from weight_start_c on; out_c = part_(c+1) + rest_c.
                Inputs x, w, u, frequency_start f, weight_start, width (i16 constants, the last three (C + 1))
filter_sqrt     u64 (C), i32 s -> u32 (C): nearest square root (at most 2^16 - 1 for x < 2^32), then >> s
noise_subtract  u32 x, u32 noise -> u32 y, u32 noise': with up = x << smoothing_bits (u32) and Q = subtraction_bits,
                noise' = (up * k + noise * (one - k)) >> Q in u64; even and odd channels have their own (k, one - k);
                y = max((up - min(up, noise')) >> smoothing_bits, (x * least) >> Q); `clamp`: noise' = min(up, noise')
pcan            u32 x, u32 noise, i16 gain table (125) -> u32: g = `wide_gain`(noise), r = u32((x * g) >> snr_shift),
                y = r^2 >> 20 for r < 8192, else (r >> 6) - 64
filter_log      u32 -> i16: u = u32(x << correction), 0 for u < 2, else min(32767, scale * ln u) by `log_scaled`
cast            between integer types, keeping the low bits; to float32
arithmetic      attrs function: add, sub, mul (i32 keeps the low 32 bits), div (i32 towards zero, constant divisor),
                minimum, maximum (also int8 of one scale); i32 or float32; the second input may broadcast
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from netsuke.graph.ops.base import Array, Kind, arity

if TYPE_CHECKING:
    from netsuke.graph.ir import Op, QGraph

WORD = 0xFFFFFFFF
GAINS = 125  # entries of a gain table: 2 exact ones, then 4 for each of the 31 octaves (the last of a group unused)
LOG_STEPS = 128


def msb(x: int) -> int:
    """Bits that a non-negative integer needs."""
    return x.bit_length()


def twiddles(n: int) -> Array:
    """int32 (n, 2): 32767 exp(-2 pi i k / n), each part to the nearest (half up)."""
    phase = -2 * np.pi * np.arange(n) / n
    return np.floor(0.5 + 32767 * np.stack([np.cos(phase), np.sin(phase)], -1)).astype(np.int32)


def end_twiddles(half: int) -> Array:
    """int32 (half / 2, 2) for the last step of a real transform: 32767 exp(-pi i ((k + 1) / half + 1/2))."""
    phase = -np.pi * (np.arange(1, half // 2 + 1) / half + 0.5)
    return np.floor(0.5 + 32767 * np.stack([np.cos(phase), np.sin(phase)], -1)).astype(np.int32)


def _wrap16(x: Array) -> Array:
    return x.astype(np.int16).astype(np.int32)


def _shrink(x: Array, by: int) -> Array:
    """x / by, as (x * (32767 / by) + 2^14) >> 15."""
    return (x * (32767 // by) + (1 << 14)) >> 15


def _times(a: Array, b: Array) -> Array:
    """Complex Q15 product, one rounding for each part."""
    re = a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1]
    im = a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0]
    return _wrap16((np.stack([re, im], -1) + (1 << 14)) >> 15)


def _turn(x: Array) -> Array:
    """-i x."""
    return np.stack([x[..., 1], -x[..., 0]], -1)


def fft16(x: Array, table: Array) -> Array:
    """Complex FFT of int32 (n, 2) with Q15 arithmetic, scaled by 1 / n: decimation in time, radix 4, a last radix 2.

    `table` is that of the whole transform; a part of length n steps through it by len(table) / n.
    """
    n = len(x)
    if n == 1:
        return x
    p = 4 if n % 4 == 0 else 2
    m, step = n // p, len(table) // n
    parts = [_shrink(fft16(x[k::p], table), p) for k in range(p)]
    parts[1:] = [_times(part, table[np.arange(m) * k * step]) for k, part in enumerate(parts[1:], 1)]
    if p == 2:
        return _wrap16(np.concatenate([parts[0] + parts[1], parts[0] - parts[1]]))
    even, odd = parts[0] + parts[2], parts[1] + parts[3]
    across, turned = _wrap16(parts[0] - parts[2]), _turn(_wrap16(parts[1] - parts[3]))
    even, odd = _wrap16(even), _wrap16(odd)
    return _wrap16(np.concatenate([even + odd, across + turned, even - odd, across - turned]))


def rfft16(x: Array) -> Array:
    """int16 (N,), N = 2^k >= 4 -> int16 (N / 2 + 1, 2), scaled by 1 / N: a complex transform of half the length z = x[2k]
    + i x[2k + 1] (`fft16`), halved (`_shrink`); f = z_k + conj z_(h-k), g = (z_k - conj z_(h-k)) * end twiddle;
    out_k = (f + g) >> 1, out_(h-k) = conj (f - g) >> 1; the two ends are re z_0 ± im z_0."""
    half = len(x) // 2
    z = _shrink(fft16(x.astype(np.int32).reshape(half, 2), twiddles(half)), 2)
    out = np.zeros((half + 1, 2), np.int32)
    out[0, 0], out[half, 0] = z[0].sum(), z[0, 0] - z[0, 1]
    k = np.arange(1, half // 2 + 1)
    mirror = z[half - k] * np.array([1, -1], np.int32)
    f = _wrap16(z[k] + mirror)
    g = _times(_wrap16(z[k] - mirror), end_twiddles(half))
    out[half - k] = np.stack([f[:, 0] - g[:, 0], g[:, 1] - f[:, 1]], -1) >> 1
    out[k[:-1]] = ((f + g) >> 1)[:-1]  # the middle is its own mirror, where the line above stands
    return out.astype(np.int16)


def root(x: int) -> int:
    """The nearest integer square root of a 64-bit number; one that needs 17 (33) bits is cut to 16 (32)."""
    r = math.isqrt(x)
    return r + 1 if x - r * r > r and r != (0xFFFF if x <= WORD else WORD) else r


def log_table() -> Array:
    """uint16 (130,): 65536 (log2(1 + k / 128) - k / 128), and a zero for the segment after the last."""
    f = np.arange(LOG_STEPS + 1) / LOG_STEPS
    return np.append(np.rint(65536 * (np.log2(1 + f) - f)), 0).astype(np.uint16)


def log_scaled(x: int, scale: int, table: Array) -> int:
    """scale * ln(x), x >= 2: log2 in Q16 by a table of 128 steps (its interpolation is shifted away: >> 16 where 9 bits of
    a step are meant; so it is in TFLM, and so the features were trained on), ln = (45426 log2 + 2^15) >> 16, then scale."""
    whole = msb(x) - 1
    frac = x - (1 << whole)
    frac = frac << (16 - whole) if whole < 16 else frac >> (whole - 16)
    k = frac >> 9
    low, high = int(table[k]), int(table[k + 1])
    log2 = (whole << 16) + frac + low + (((high - low) * (frac - (k << 9))) >> 16)
    ln = (45426 * log2 + (1 << 15)) >> 16
    return ((scale * ln + (1 << 15)) & WORD) >> 16


def wide_gain(x: int, table: Array) -> int:
    """A function of a u32 by its octave: three entries each, a + ((b << 5) + ((c * f) >> 5)) * f in Q15, f the next 10 bits."""
    if x <= 2:
        return int(table[x])
    bits = msb(x)
    a, b, c = (int(v) for v in table[4 * bits - 6 : 4 * bits - 3])
    f = (x << (11 - bits) if bits < 11 else x >> (bits - 11)) & 0x3FF
    return (((((c * f) >> 5) + (b << 5)) * f + (1 << 14)) >> 15) + a


def window(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    x = (args[0].astype(np.int32) * args[1].astype(np.int32)) >> op.attrs["shift"]
    return (np.clip(x, -32768, 32767).astype(np.int16),)


def fft_scale(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    """-32768 counts as 32768 here; TFLM's 16-bit maximum forgets it and then overflows."""
    largest = int(np.abs(args[0].astype(np.int32)).max())
    s = max(0, 15 - msb(largest)) if largest else 0
    return (args[0].astype(np.int32) << s).astype(np.int16), np.array(s, np.int32)


def rfft(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    y = graph.tensors[op.outputs[0]]
    padded = np.zeros(op.attrs["length"], np.int16)
    padded[: args[0].size] = args[0].reshape(-1)
    return (rfft16(padded).reshape(y.shape),)


def energy(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    z = args[0].reshape(-1, 2).astype(np.int64)
    out = (z * z).sum(1)
    out[: op.attrs["start"]] = 0
    out[op.attrs["end"] :] = 0
    return (out.astype(np.uint32),)


def filter_bank(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    x, w, u, starts, weight_starts, widths = (a.astype(np.uint64) for a in args)
    out, rest = [], np.uint64(0)
    for at, f, n in zip(weight_starts.astype(int), starts.astype(int), widths.astype(int)):
        out.append(rest + (w[at : at + n] * x[f : f + n]).sum(dtype=np.uint64))
        rest = (u[at : at + n] * x[f : f + n]).sum(dtype=np.uint64)
    return (np.array(out[1:], np.uint64),)


def filter_sqrt(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    return (np.array([root(int(v)) >> int(args[1]) for v in args[0]], np.uint32),)


def noise_subtract(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    a, x, bits = op.attrs, args[0].astype(np.uint64), np.uint64(op.attrs["subtraction_bits"])
    odd = np.arange(x.size) % 2
    keep = np.array([a["one_minus_smoothing"], a["alternate_one_minus_smoothing"]], np.uint64)[odd]
    take = np.array([a["smoothing"], a["alternate_smoothing"]], np.uint64)[odd]
    up = (x << np.uint64(a["smoothing_bits"])) & np.uint64(WORD)
    noise = ((up * take + args[1].astype(np.uint64) * keep) >> bits) & np.uint64(WORD)
    below = np.minimum(up, noise)
    floor = (x * np.uint64(a["least"])) >> bits
    y = np.maximum((up - below) >> np.uint64(a["smoothing_bits"]), floor)
    return y.astype(np.uint32), (below if a.get("clamp") else noise).astype(np.uint32)


def pcan(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    out = []
    for x, noise in zip(args[0].tolist(), args[1].tolist()):
        r = ((x * (wide_gain(noise, args[2]) & WORD)) >> op.attrs["snr_shift"]) & WORD
        out.append((r * r) >> 20 if r < 8192 else (r >> 6) - 64)
    return (np.array(out, np.uint32),)


def filter_log(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    table, a = log_table(), op.attrs
    ups = [(x << a["correction"]) & WORD for x in args[0].tolist()]
    return (np.array([min(32767, log_scaled(u, a["scale"], table)) if u > 1 else 0 for u in ups], np.int16),)


def cast(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    return (args[0].astype(graph.tensors[op.outputs[0]].dtype),)


def _div(a: Array, b: Array) -> Array:
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _div, "minimum": np.minimum, "maximum": np.maximum,
}  # fmt: skip


def arithmetic(graph: QGraph, op: Op, args: list[Array | None]) -> tuple[Array, ...]:
    a, b = args
    if a.dtype == np.float32:
        return ((a / b if op.attrs["function"] == "div" else ARITHMETIC[op.attrs["function"]](a, b)),)
    return (ARITHMETIC[op.attrs["function"]](a.astype(np.int64), b.astype(np.int64)).astype(a.dtype),)


# Checks: types and lengths first, then the attributes whose wrong values would read outside of an array


def _types(graph: QGraph, op: Op, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> str | None:
    wrong = arity(graph, op, len(inputs))
    if wrong:
        return wrong
    found = [tuple(graph.tensors[i].dtype for i in side) for side in (op.inputs, op.outputs)]
    if found != [inputs, outputs]:
        return f"it maps {', '.join(found[0])} to {', '.join(found[1])}; it maps {', '.join(inputs)} to {', '.join(outputs)}"
    return None


def _whole(op: Op, **ranges: tuple[int, int]) -> str | None:
    for key, (low, high) in ranges.items():
        value = op.attrs.get(key)
        if not isinstance(value, int) or not low <= value <= high:
            return f"its {key.replace('_', ' ')} is {value}; it may be {low} to {high}"
    return None


def _sizes(graph: QGraph, op: Op) -> tuple[list[int], list[int]]:
    return [graph.tensors[i].size for i in op.inputs], [graph.tensors[i].size for i in op.outputs]


def _window(graph: QGraph, op: Op) -> str | None:
    wrong = _types(graph, op, ("int16", "int16"), ("int16",)) or _whole(op, shift=(0, 31))
    sizes = _sizes(graph, op)
    return wrong or (None if sizes[0] == [sizes[1][0]] * 2 else f"{sizes[0]} values give {sizes[1]}")


def _fft_scale(graph: QGraph, op: Op) -> str | None:
    wrong = _types(graph, op, ("int16",), ("int16", "int32"))
    sizes = _sizes(graph, op)
    return wrong or (None if sizes[1] == [sizes[0][0], 1] else f"{sizes[0]} values give {sizes[1]}")


def _rfft(graph: QGraph, op: Op) -> str | None:
    wrong = _types(graph, op, ("int16",), ("int16",)) or _whole(op, length=(4, 1 << 15))
    if wrong:
        return wrong
    n, (x,), (y,) = op.attrs["length"], *_sizes(graph, op)
    return None if n & (n - 1) == 0 and x <= n and y == n + 2 else f"{x} samples, length {n}, give {y} values"


def _energy(graph: QGraph, op: Op) -> str | None:
    wrong = _types(graph, op, ("int16",), ("uint32",))
    if wrong:
        return wrong
    (x,), (y,) = _sizes(graph, op)
    return _whole(op, start=(0, y), end=(0, y)) or (None if x == 2 * y else f"{x} values give {y} energies")


def _filter_bank(graph: QGraph, op: Op) -> str | None:
    wrong = _types(graph, op, ("uint32",) + ("int16",) * 5, ("uint64",))
    if wrong:
        return wrong
    if any(not graph.tensors[i].constant for i in op.inputs[1:]):
        return "its filters are not constants"
    (x, w, u, *bands), (y,) = _sizes(graph, op)
    start, at, width = (graph.tensors[i].data.reshape(-1).astype(int) for i in op.inputs[3:])
    if bands != [y + 1] * 3 or w != u or min(at.min(), start.min(), width.min()) < 0:
        return f"{bands} bands do not give {y} channels"
    if (
        (at + width).max() > w
        or (start + width).max() > x
        or min(graph.tensors[i].data.min() for i in op.inputs[1:3]) < 0
    ):
        return "its bands reach outside the spectrum, or have weights below 0"
    return None


def _filter_sqrt(graph: QGraph, op: Op) -> str | None:
    wrong = _types(graph, op, ("uint64", "int32"), ("uint32",))
    sizes = _sizes(graph, op)
    return wrong or (None if sizes[0] == [sizes[1][0], 1] else f"{sizes[0]} values give {sizes[1]}")


def _noise_subtract(graph: QGraph, op: Op) -> str | None:
    names = ("smoothing", "one_minus_smoothing", "alternate_smoothing", "alternate_one_minus_smoothing", "least")
    wrong = _types(graph, op, ("uint32",) * 2, ("uint32",) * 2) or _whole(
        op, smoothing_bits=(0, 31), subtraction_bits=(0, 31), **dict.fromkeys(names, (0, 1 << 16))
    )
    sizes = _sizes(graph, op)
    return wrong or (None if sizes[0] == sizes[1] and len(set(sizes[0])) == 1 else f"{sizes[0]} values give {sizes[1]}")


def _pcan(graph: QGraph, op: Op) -> str | None:
    wrong = _types(graph, op, ("uint32", "uint32", "int16"), ("uint32",)) or _whole(op, snr_shift=(0, 63))
    sizes = _sizes(graph, op)
    fits = sizes[0][:2] == sizes[1] * 2 and sizes[0][2] >= GAINS if not wrong else True
    return wrong or (None if fits else f"{sizes[0]} values give {sizes[1]}; the gain table has {GAINS} entries")


def _filter_log(graph: QGraph, op: Op) -> str | None:
    wrong = _types(graph, op, ("uint32",), ("int16",)) or _whole(op, correction=(0, 31), scale=(1, 1 << 15))
    sizes = _sizes(graph, op)
    return wrong or (None if sizes[0] == sizes[1] else f"{sizes[0]} values give {sizes[1]}")


def _cast(graph: QGraph, op: Op) -> str | None:
    wrong = arity(graph, op, 1)
    if wrong:
        return wrong
    x, y = (graph.tensors[i] for i in (op.inputs[0], op.outputs[0]))
    if x.dtype in ("float32", "int4") or y.dtype == "int4":
        return f"it maps {x.dtype} to {y.dtype}; it maps integers to integers or float32"
    return None if x.shape == y.shape else f"it maps {x.shape} to {y.shape}"


def _arithmetic(graph: QGraph, op: Op) -> str | None:
    wrong = arity(graph, op, 2)
    if wrong:
        return wrong
    (a, b), y = (graph.tensors[i] for i in op.inputs), graph.tensors[op.outputs[0]]
    function = op.attrs.get("function")
    codes = function in ("minimum", "maximum") and y.scale is not None
    if function not in ARITHMETIC or {a.dtype, b.dtype, y.dtype} not in (
        {"int32"},
        {"float32"},
        {"int8"} if codes else {""},
    ):
        return f"{function} maps {a.dtype} and {b.dtype} to {y.dtype}; known are {', '.join(ARITHMETIC)} of int32 or float32"
    if y.dtype == "int8" and any(
        t.scale is None or (float(t.scale), t.zero) != (float(y.scale), y.zero) for t in (a, b)
    ):
        return "its inputs and output have different scales"
    if function == "div" and y.dtype == "int32" and (b.data is None or not np.all(b.data)):
        return "it divides by a number that may be 0"
    try:
        fits = np.broadcast_shapes(a.shape, b.shape) == y.shape == a.shape
    except ValueError:
        fits = False
    return None if fits else f"shapes {a.shape} and {b.shape} do not give {y.shape}"


def _first(graph: QGraph, op: Op) -> tuple[int, ...]:
    return (0,)


def _size(graph: QGraph, op: Op) -> int:
    return graph.tensors[op.outputs[0]].size


def _rfft_macs(graph: QGraph, op: Op) -> int:
    """Four for a complex product: three products in each butterfly of four, one a pair at the end."""
    half = op.attrs["length"] // 2
    return 12 * (half // 4) * math.ceil(math.log(half, 4)) + 4 * (half // 2)


def _bank_macs(graph: QGraph, op: Op) -> int:
    return 2 * int(graph.tensors[op.inputs[5]].data.astype(int).sum())


KINDS = {
    "window": Kind(window, _window, _size, _first),
    "fft_scale": Kind(fft_scale, _fft_scale, inplace=_first),
    "rfft": Kind(rfft, _rfft, _rfft_macs),
    "energy": Kind(energy, _energy, _size, _first),
    "filter_bank": Kind(filter_bank, _filter_bank, _bank_macs),
    "filter_sqrt": Kind(filter_sqrt, _filter_sqrt),
    "noise_subtract": Kind(noise_subtract, _noise_subtract, inplace=_first),
    "pcan": Kind(pcan, _pcan, inplace=_first),
    "filter_log": Kind(filter_log, _filter_log, inplace=_first),
    "cast": Kind(cast, _cast),
    "arithmetic": Kind(arithmetic, _arithmetic, inplace=_first),
}
