"""A statically quantized Llama run with integers only: what an NPU or a chip without floats computes.

`IntegerModel.of_model` takes a Llama whose maps are symmetric integers and whose every site has a static grid
(compress/static.py) and keeps integers: int8 weights, int32 multipliers, int64 biases, tables. `forward` then touches int8 and
int16 codes, int32 and int64 sums, and nothing else; the key/value cache holds int8 codes. Keys are stored rotated.

It agrees with the simulation in floats (the model itself, run in float64) except where a sum falls within 2^-20 or so of the
border between two codes. One such flip is a rounding error like any other, and it moves what comes after it by as much: to hold
operators against the simulation, each gets the simulation's codes as its inputs (`at`).

Beyond the sites, which end with the last block: the stream that leaves it is kept in 25 bits, what the final norm gives in up
to 22, as int32, and logits are int64 in steps of 2^-16.

    from netsuke.runtime.integer import IntegerModel
    model = IntegerModel.of_model(load("small-w8a8.netsuke").model)
    list(model.generate(ids, 64))
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from netsuke.errors import NetsukeError
from netsuke.layers.static import StaticGrid
from netsuke.models.llama import SITES, Block, Llama, LlamaConfig
from netsuke.runtime.integer_ops import Codes, Norm, Rescale, Softmax, centred, sigmoid_table, signed_multipliers

ASKED = "run a model in integers"
INSTEAD = "netsuke compress MODEL --method mobilequant, or --backend torch"
STREAM_BITS = 24  # sizes of what leaves the last block are below 2^24
LOGIT_STEP = 2.0**-16
At = Callable[[int, str, Codes], Codes]


def _as_they_are(layer: int, site: str, codes: Codes) -> Codes:
    return codes


class IntegerLinear:
    """codes of y from codes of x: Σ w (x − z) + b, rescaled per row. w int8 (O, I)."""

    def __init__(self, layer: Any, name: str, x: StaticGrid, y: StaticGrid):
        check_map(name, layer.spec(), layer.ins)
        self.half = 1 << (layer.bits - 1)
        if not bool((layer.zeros == self.half).all()):
            raise NetsukeError(ASKED, f"{name} has zero points", "symmetric weights", INSTEAD)
        self.layer, self.x, self.bits = layer, x, layer.bits
        bias = None if layer.bias is None else layer.bias.double().numpy() / y.scale
        self.rescale = Rescale.of(x.scale * layer.scales.double().numpy()[:, 0] / y.scale, y, bias)
        # 8 by 8 bits stay inside int32 up to 131,072 inputs, 16 by 8 bits only up to 256
        self.sum = np.int32 if x.bits == 8 and layer.ins <= 1 << 16 else np.int64

    def unpacked(self, rows: slice = slice(None)) -> np.ndarray:
        """Rows of w, made anew from the stored codes w + half."""
        from netsuke.layers.packing import unpack

        codes = unpack(self.layer.codes[rows], self.bits, self.layer.ins).numpy()
        return (codes - np.uint8(self.half)).view(np.int8)  # modulo 256

    def row_sums(self) -> np.ndarray:
        """Σ w of every row, int64; a few rows at a time, so that no large hole stays in the heap."""
        parts = (self.unpacked(slice(at, at + 32)) for at in range(0, self.layer.outs, 32))
        return np.concatenate([part.sum(1, dtype=np.int64) for part in parts])

    @functools.cached_property
    def w(self) -> np.ndarray:
        return self.unpacked()

    def __call__(self, codes: Codes) -> Codes:
        total = centred(codes, self.x).astype(self.sum) @ self.w.T.astype(self.sum)
        return self.rescale(total)


def check_map(name: str, spec: dict[str, Any], ins: int) -> None:
    """Raises NetsukeError, by name, for a map of `ins` inputs that is not stored as the integers this needs."""
    if spec["kind"] != "quant" or spec["group"] != ins:
        raise NetsukeError(ASKED, f"{name} is stored as {spec}", "quantized maps with one scale per row", INSTEAD)


def check_table(name: str, spec: dict[str, Any], ins: int) -> None:
    """The same for the embedding and the output head."""
    if spec["kind"] != "quant" or spec["bits"] != 8 or spec["group"] < ins:
        raise NetsukeError(ASKED, f"{name} is stored as {spec}", "8 bits with one scale per row", INSTEAD)


def static_grids(block: Block) -> dict[str, StaticGrid]:
    """The grids of a block by site. Raises NetsukeError for the first site that has none, or one that is too wide."""
    i, grids = block.layer, {s: g for s, g in block.sites.items() if isinstance(g, StaticGrid)}
    for site in SITES:
        if site not in grids:
            raise NetsukeError(ASKED, f"blocks.{i}.{site} has no static grid", "a grid at every site", INSTEAD)
    if grids["gate"].bits != 8:
        found = f"blocks.{i}.gate has 16 bits"
        raise NetsukeError(ASKED, found, "8 bits: its sigmoid is a table of 256 entries", "--backend torch")
    return grids


class IntegerBlock:
    def __init__(self, block: Block, context: int):
        cfg, i = block.cfg, block.layer
        self.layer, self.heads, self.kv_heads, self.window = i, cfg.heads, cfg.kv_heads, cfg.window
        self.grids = g = static_grids(block)
        reads = {
            "q": "attn_in",
            "k": "attn_in",
            "v": "attn_in",
            "o": "heads",
            "gate": "mlp_in",
            "up": "mlp_in",
            "down": "hidden",
        }
        self.linear = {
            n: IntegerLinear(getattr(block, n), f"blocks.{i}.{n}", g[x], g[n]) for n, x in reads.items()
        }  # fmt: skip
        self.attn_norm, self.mlp_norm = (
            Norm.of(norm.weight.double().numpy(), norm.eps, g[x].scale, g[x].bits, g[y].scale, g[y].zero, g[y].bits)
            for norm, x, y in (
                (block.attn_norm, "attn_stream", "attn_in"),
                (block.mlp_norm, "mlp_stream", "mlp_in"),
            )
        )
        self.turn = {n: Rescale.of(g[n].scale / g[f"{n}_rot"].scale, g[f"{n}_rot"]) for n in ("q", "k")}
        cos, sin = (t.double().numpy() for t in block.rope(0, context))  # (1 or K, context, R)
        self.table = {
            n: tuple(np.rint(t * float(r.m[0])).astype(np.int64) for t in (cos, sin)) for n, r in self.turn.items()
        }
        unit = g["q_rot"].scale * g["k_rot"].scale / math.sqrt(cfg.head_dim)
        self.score = Rescale.of(unit / g["scores"].scale, g["scores"])
        self.softmax = Softmax.of(g["scores"].scale, g["probs"])
        self.mix = Rescale.of(g["probs"].scale * g["v"].scale / g["heads"].scale, g["heads"])
        self.middle = Rescale.of(
            np.array([g["attn_stream"].scale, g["o"].scale]) / g["mlp_stream"].scale, g["mlp_stream"]
        )
        self.sigmoid = sigmoid_table(g["gate"], g["sigmoid"])
        self.silu = Rescale.of(g["gate"].scale * g["sigmoid"].scale / g["silu"].scale, g["silu"])
        self.gated = Rescale.of(g["silu"].scale * g["up"].scale / g["hidden"].scale, g["hidden"])

    def rotate(self, name: str, x: Codes, start: int) -> Codes:
        """codes (T, heads, 2R) of q or k -> rotated codes (heads, T, 2R)."""
        x = centred(x, self.grids[name]).astype(np.int64).transpose(1, 0, 2)
        cos, sin = (t[:, start : start + x.shape[1]] for t in self.table[name])
        if len(cos) > 1:  # every key head has its own pairs
            cos, sin = (np.repeat(t, len(x) // len(t), 0) for t in (cos, sin))
        a, b = np.split(x, 2, -1)
        total = np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)
        scale = self.turn[name]  # its multiplier is in the table already
        return Rescale(scale.grid, np.ones(1, np.int64), scale.shift)(total)

    def __call__(self, x: Codes, cache: dict[str, list[Codes]], start: int, at: At) -> tuple[Codes, Codes]:
        """Codes of the stream (T, C) at `attn_stream` -> codes at `mlp_stream` and of `down`, whose sum is the block's output."""
        g, i, T = self.grids, self.layer, len(x)
        n = at(i, "attn_in", self.attn_norm(centred(x, g["attn_stream"])))
        q, k, v = (
            at(i, name, self.linear[name](n).reshape(T, heads, -1))
            for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
        )
        q = at(i, "q_rot", self.rotate("q", q, start))
        cache["k"][i].append(at(i, "k_rot", self.rotate("k", k, start)))
        cache["v"][i].append(v.transpose(1, 0, 2))
        k, v = (np.concatenate(cache[name][i], 1) for name in ("k", "v"))
        cache["k"][i], cache["v"][i] = [k], [v]
        k, v = (np.repeat(centred(t, g[s]), self.heads // self.kv_heads, 0) for t, s in ((k, "k_rot"), (v, "v")))
        scores = at(i, "scores", self.score(centred(q, g["q_rot"]) @ k.transpose(0, 2, 1)))
        S = scores.shape[-1]
        rows, columns = np.arange(S - T, S)[:, None], np.arange(S)[None]
        seen = columns <= rows if self.window is None else (columns <= rows) & (columns > rows - self.window)
        probs = at(i, "probs", self.softmax(scores, seen))
        mixed = self.mix(centred(probs, g["probs"]) @ v)  # weights sum to 1: 32,767 · 255 at most, far inside int32
        heads = at(i, "heads", mixed.transpose(1, 0, 2).reshape(T, -1))
        o = at(i, "o", self.linear["o"](heads))
        x = at(i, "mlp_stream", self.middle.sum(centred(x, g["attn_stream"]), centred(o, g["o"])))
        n = at(i, "mlp_in", self.mlp_norm(centred(x, g["mlp_stream"])))
        gate = at(i, "gate", self.linear["gate"](n))
        up = at(i, "up", self.linear["up"](n))
        open_ = at(i, "sigmoid", self.sigmoid[gate.astype(np.int32) + 128])
        silu = at(i, "silu", self.silu(centred(gate, g["gate"]) * centred(open_, g["sigmoid"])))
        hidden = at(i, "hidden", self.gated(centred(silu, g["silu"]) * centred(up, g["up"])))
        return x, at(i, "down", self.linear["down"](hidden))


class IntegerModel:
    """A model in integers. `bytes` of its constants; `forward` and `generate` run it, one sequence at a time."""

    def __init__(self, model: Llama, context: int | None = None):
        self.cfg = model.cfg if context is None else msgspec.structs.replace(model.cfg, context=context)
        self.blocks = [IntegerBlock(b, self.cfg.context) for b in model.blocks]
        first, last = self.blocks[0].grids["attn_stream"], self.blocks[-1].grids
        self.table, table_zeros, scales = _per_row(model.embed, "embed")
        self.table_zeros = table_zeros
        self.entry = Rescale.of(scales / first.scale, first)
        self.joints = [
            Rescale.of(
                np.array([a.grids["mlp_stream"].scale, a.grids["down"].scale]) / b.grids["attn_stream"].scale,
                b.grids["attn_stream"],
            )
            for a, b in zip(self.blocks, self.blocks[1:])
        ]
        sizes = np.array([last["mlp_stream"].scale, last["down"].scale])
        step = float(sizes.sum()) * (1 << 16) / (1 << STREAM_BITS)
        self.exit, self.exit_shift = signed_multipliers(sizes / step)
        weight = model.norm.weight.double().numpy()
        # |x| / rms <= sqrt(C) needs no calibration; sums with 8-bit weights times 22-bit multipliers stay inside int64
        bits = min(22, 33 - math.ceil(math.log2(len(weight))))
        scale = math.sqrt(len(weight)) * np.abs(weight).max() / ((1 << (bits - 1)) - 1)
        self.norm = Norm.of(weight, model.norm.eps, step, STREAM_BITS, scale, bits=bits)
        if model.head is None:
            self.head, self.head_zeros = self.table, table_zeros
        else:
            self.head, self.head_zeros, scales = _per_row(model.head, "head")
        m, shift = signed_multipliers(scale * scales / LOGIT_STEP)
        self.head_m, self.head_shift = (m.astype(np.int64) + 256) >> 9, shift - 9

    @classmethod
    def of_model(cls, model: Llama, context: int | None = None) -> IntegerModel:
        """For sequences of up to `context` tokens (default and most: the model's). Raises NetsukeError, naming the map or
        site, for anything that is not a static integer, and for another context."""
        check_context(context, model.cfg)
        try:
            return cls(model, context)
        except ValueError as e:
            raise NetsukeError(ASKED, f"the scales of two neighbouring grids are too far apart ({e})") from e

    def cache(self) -> dict[str, list[list[Codes]]]:
        return {name: [[] for _ in self.blocks] for name in ("k", "v")}

    def forward(
        self, ids: Sequence[int], cache: dict[str, list[list[Codes]]] | None = None, at: At = _as_they_are
    ) -> np.ndarray:
        """ids (T,) after what the cache holds -> logits (T, V), int64 in steps of 2^-16.

        at    sees (block, site, codes) and returns the codes to go on with
        """
        cache = self.cache() if cache is None else cache
        start = cache["k"][0][0].shape[1] if cache["k"][0] else 0
        ids = check_tokens(ids, self.cfg, start)
        rows = self.table[ids].astype(np.int32) - self.table_zeros[ids, None]
        entry = Rescale(self.entry.grid, self.entry.m[ids, None], self.entry.shift)
        x = at(0, "attn_stream", entry(rows))
        for i, block in enumerate(self.blocks):
            x, down = block(x, cache, start, at)
            terms = centred(x, block.grids["mlp_stream"]), centred(down, block.grids["down"])
            if i + 1 < len(self.blocks):
                x = at(i + 1, "attn_stream", self.joints[i].sum(*terms))
        total = sum(t.astype(np.int64) * int(m) for t, m in zip(terms, self.exit))
        x = self.norm((total + (1 << (self.exit_shift - 1))) >> self.exit_shift)
        sums = x.astype(np.int64) @ (self.head.astype(np.int64) - self.head_zeros[:, None]).T
        return (sums * self.head_m + (1 << (self.head_shift - 1))) >> self.head_shift

    def generate(self, ids: Sequence[int], new_tokens: int) -> Iterator[int]:
        """The most likely tokens after a prompt (the first of equals)."""
        cache, step = self.cache(), list(ids)
        for _ in range(new_tokens):
            token = int(self.forward(step, cache)[-1].argmax())
            yield token
            step = [token]


def check_context(context: int | None, cfg: LlamaConfig) -> None:
    """Raises NetsukeError for a context that the model does not have."""
    if context is not None and not 1 <= context <= cfg.context:
        raise NetsukeError(ASKED, f"a context of {context} tokens", f"1 to the model's {cfg.context}")


def check_tokens(ids: Sequence[int], cfg: LlamaConfig, held: int) -> np.ndarray:
    """The tokens as int64. Raises NetsukeError for none, for those outside the vocabulary and for too many."""
    out = np.asarray(ids, np.int64)
    if not out.size or out.min() < 0 or out.max() >= cfg.vocab or held + len(out) > cfg.context:
        raise NetsukeError(
            ASKED, f"{out.size} tokens after {held}, from {out.min(initial=0)} to {out.max(initial=0)}",
            f"tokens below {cfg.vocab}, {cfg.context} in all",
        )  # fmt: skip
    return out


def _per_row(layer: Any, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 codes (O, I), zero points and scales of every row. Raises NetsukeError for another format."""
    check_table(name, layer.spec(), layer.ins)
    return layer.codes.numpy(), layer.zeros.numpy()[:, 0].astype(np.int32), layer.scales.double().numpy()[:, 0]
