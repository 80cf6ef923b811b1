"""Llama -> GGUF, the file of llama.cpp and its relatives: F16, Q8_0 or Q4_0 weights, float32 norms and biases.

A quantized map whose integers fit a block type exactly (groups of a multiple of 32, code − zero within −8 … 7 or
−128 … 127) keeps its codes and scales bit for bit as long as that takes no more bits than asked for; all other maps are
rounded by the format's own rule:

    Q8_0  d = max|w| / 127,                        q = round(w / d), halves away from zero
    Q4_0  d = (the w of largest magnitude) / −8,   q = floor(w / d + 8.5), at most 15

Rows that are no multiple of 32 wide stay F16, as llama.cpp's own quantizer does. llama.cpp wants the rotary rows of some
architectures interleaved, takes hidden widths per block under the name "deci" only, and knows one width of heads and no
cut rotary pairs: such blocks are refused by name.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from netsuke.errors import NetsukeError
from netsuke.layers.linear import LinearBase
from netsuke.layers.packing import unpack
from netsuke.layers.quantized import QuantLinear
from netsuke.models.gguf import ROPE_FACTORS, interleaved_rows, llama3_factors, rotary_heads, theirs
from netsuke.models.gguf_file import BLOCK, IDS, TYPES, Pending, pack_blocks, write_gguf
from netsuke.models.gguf_tokenizer import to_metadata
from netsuke.models.llama import Llama, LlamaConfig
from netsuke.models.load import Loaded
from netsuke.models.static_sites import standing_grids

BITS = {16: "F16", 8: "Q8_0", 4: "Q4_0"}
FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7}  # llama.cpp's number for a file of mostly this type
ZEROS = {"Q8_0": 128, "Q4_0": 8}
KINDS = ("dense", "quant")


def architecture(cfg: LlamaConfig, asked: str) -> str:
    """The name under which llama.cpp knows such a model. Raises NetsukeError for what it cannot express, by block."""
    if cfg.mixture is not None:
        found = f"block {cfg.mixture} is a mixture of {cfg.blocks[cfg.mixture].experts} experts"
        raise NetsukeError(asked, found, "one feed-forward part a block")
    for i, block in enumerate(cfg.blocks):
        if block.pairs is not None:
            found = f"block {i} has {cfg.pair_count(i)} of {cfg.head_dim // 2} rotary pairs left"
            raise NetsukeError(asked, found, "whole rotary heads in GGUF", "a carving that cuts hidden widths only")
        if block.value_dim != cfg.head_dim:
            found = f"block {i} has value heads of {block.value_dim}, key heads of {cfg.head_dim}"
            raise NetsukeError(asked, found, "equal widths in GGUF", "a carving that cuts hidden widths only")
    s = cfg.rope_scaling
    if s is not None and s.kind == "yarn" and (s.beta_fast, s.beta_slow) != (32.0, 1.0):
        found = f"YaRN with beta_fast {s.beta_fast:g} and beta_slow {s.beta_slow:g}"
        raise NetsukeError(
            asked, found, "32 and 1, which llama.cpp takes for these architectures whatever the file says"
        )
    uneven = next((i for i, block in enumerate(cfg.blocks) if block.hidden != cfg.blocks[0].hidden), None)
    if cfg.qk_norm:
        if cfg.qkv_bias or cfg.out_bias or cfg.mlp_bias:
            raise NetsukeError(asked, "q and k have norms and the linear maps have biases", "one of the two in GGUF")
        if uneven is not None:
            found = f"block {uneven} is {cfg.blocks[uneven].hidden} hidden units wide, block 0 {cfg.blocks[0].hidden}"
            raise NetsukeError(asked, found, "one hidden width in GGUF where q and k have norms")
        return "qwen3"
    if uneven is not None:
        return "deci"
    return "qwen2" if cfg.qkv_bias and not (cfg.out_bias or cfg.mlp_bias) else "llama"


def config_metadata(arch: str, cfg: LlamaConfig) -> tuple[dict[str, Any], list[str]]:
    """The keys of the architecture, and notes on what llama.cpp will do differently."""
    hidden, notes, context = [b.hidden for b in cfg.blocks], [], cfg.context
    if cfg.window is not None and cfg.window < context:
        notes.append(f"llama.cpp has no sliding window here: the context is {cfg.window} instead of {context} tokens")
        context = cfg.window
    own: dict[str, Any] = {
        "block_count": len(hidden), "context_length": context, "embedding_length": cfg.width,
        "feed_forward_length": hidden[0] if len(set(hidden)) == 1 else hidden, "vocab_size": cfg.vocab,
        "attention.head_count": cfg.heads, "attention.head_count_kv": cfg.kv_heads,
        "attention.key_length": cfg.head_dim, "attention.value_length": cfg.head_dim,
        "attention.layer_norm_rms_epsilon": float(cfg.norm_eps),
        "rope.dimension_count": cfg.head_dim, "rope.freq_base": float(cfg.rope_theta),
    }  # fmt: skip
    s = cfg.rope_scaling
    if s is not None and s.kind == "llama3":  # the frequencies themselves go along as a tensor
        own["rope.scaling.original_context_length"] = s.original_context
    elif s is not None:
        own |= {"rope.scaling.type": s.kind, "rope.scaling.factor": float(s.factor)}
        if s.kind == "yarn":
            own["rope.scaling.original_context_length"] = s.original_context
            if s.attention_factor is not None:
                grow = 0.1 * float(torch.tensor(max(s.factor, 1.0), dtype=torch.float64).log()) + 1.0
                own["rope.scaling.attn_factor"] = s.attention_factor / grow  # llama.cpp multiplies by `grow`
    return {f"{arch}.{key}": value for key, value in own.items()}, notes


def block_quantize(w: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """W (O, I) float32 -> codes (O, I) uint8 and scales (O, I/32) float16 by the rule of Q8_0 or Q4_0."""
    blocks = w.reshape(-1, BLOCK)
    if name == "Q8_0":
        d = blocks.abs().amax(1, keepdim=True) / 127
    else:
        d = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    inverse = torch.where(d == 0, 0.0, 1 / d)
    scaled = blocks * inverse
    if name == "Q8_0":
        whole = scaled.abs().floor()
        q = (whole + (scaled.abs() - whole >= 0.5)).copysign(scaled) + 128
    else:
        q = (scaled + 8.5).trunc().clamp(0, 15)
    return q.to(torch.uint8).view(w.shape), d.half().view(w.shape[0], -1)


def exact_blocks(layer: LinearBase, bits: int) -> tuple[str, Tensor, Tensor] | None:
    """Type, codes (O, I) and scales (O, I/32) of the narrowest block type that holds a quantized map exactly in at most
    `bits` bits, or None."""
    if not isinstance(layer, QuantLinear) or layer.ins % BLOCK or layer.group % BLOCK:
        return None
    codes = unpack(layer.codes, layer.bits, layer.ins).to(torch.int16)
    steps = codes - layer.zeros.repeat_interleave(layer.group, 1)[:, : layer.ins].to(torch.int16)
    low, high = int(steps.min()), int(steps.max())
    scales = layer.scales.repeat_interleave(layer.group // BLOCK, 1)[:, : layer.ins // BLOCK]
    for name, zero in sorted(ZEROS.items(), key=lambda item: item[1]):
        if -zero <= low and high < zero and zero.bit_length() <= bits:
            return name, (steps + zero).to(torch.uint8), scales
    return None


def _half(w: Tensor, name: str, asked: str) -> Tensor:
    """W as float16. Raises NetsukeError, with the layer's name, for weights beyond its range."""
    half = w.half()
    if not bool(half.isfinite().all()):
        raise NetsukeError(
            asked, f"weights of layer {name!r} reach {float(w.abs().max()):.3g}", "up to 65504 in F16", "--bits 8"
        )
    return half


def stored_type(layer: LinearBase, bits: int) -> str:
    """The type that a map gets when at most `bits` bits are asked for."""
    exact = exact_blocks(layer, bits)
    return exact[0] if exact else BITS[bits] if layer.ins % BLOCK == 0 else "F16"


def stored_bytes(layer: LinearBase, name: str, rows: Tensor | None, bits: int, asked: str) -> tuple[Tensor, bool]:
    """A map as `stored_type` says, and whether no weight has changed; `rows` reorders the outputs."""
    exact, kind = exact_blocks(layer, bits), stored_type(layer, bits)
    if exact is not None:
        _, codes, scales = exact
        return pack_blocks(*((codes, scales) if rows is None else (codes[rows], scales[rows])), kind), True
    w = layer.to_dense()
    w = w if rows is None else w[rows]
    if kind == "F16":
        half = _half(w, name, asked)
        return half, bool((half == w).all())
    codes, scales = block_quantize(w, kind)
    return pack_blocks(codes, _half(scales, name, asked), kind), False


def write(loaded: Loaded, out: Path, bits: int) -> dict[str, Any]:
    """Writes `loaded` as a GGUF file with weights of at most `bits` bits (16, 8 or 4).

    Returns {types: maps by type, exact: maps that are stored without any change of a weight, maps, notes}. Raises
    NetsukeError for what GGUF cannot express, by layer; nothing is half-written then.
    """
    model: Llama = loaded.model
    cfg, asked = model.cfg, f"export {loaded.source} to gguf"
    arch = architecture(cfg, asked)
    if standing := standing_grids(model):
        found = f"its activations are quantized to grids (at {next(iter(standing))} and {len(standing) - 1} more sites)"
        raise NetsukeError(asked, found, "activations in floats: llama.cpp would compute something else")
    linears = model.linears()
    for name, layer in linears.items():
        if layer.spec()["kind"] not in KINDS:
            raise NetsukeError(
                asked, f"layer {name!r} is of kind {layer.spec()['kind']!r}", "dense and quantized maps in GGUF",
                "an export of the model before that method",
            )  # fmt: skip
    own, notes = config_metadata(arch, cfg)
    words, more = to_metadata(loaded.tokenizer, cfg.vocab, cfg.bos, cfg.eos, asked)
    notes += more
    types, exact, tensors = Counter(), [], []

    def store(layer: LinearBase, name: str, rows: Tensor | None) -> Tensor:
        data, same = stored_bytes(layer, name, rows, bits, asked)
        exact.append(same)
        return data

    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        heads = rotary_heads(arch, cfg, name)
        if owner not in linears or leaf == "bias":
            rows = None if heads is None else interleaved_rows(len(tensor), heads)
            plain = tensor.float() if rows is None else tensor.float()[rows]
            if not bool(plain.isfinite().all()):
                raise NetsukeError(asked, f"tensor {name!r} holds NaN or infinite numbers", "finite weights")
            tensors.append(Pending(theirs(name), TYPES[IDS["F32"]], tuple(plain.shape), lambda t=plain: t))
        elif leaf in ("weight", "codes"):
            layer = linears[owner]
            rows = None if heads is None else interleaved_rows(layer.outs, heads)
            kind = stored_type(layer, bits)
            types[kind] += 1
            shape = (layer.outs, layer.ins)
            tensors.append(
                Pending(theirs(f"{owner}.weight"), TYPES[IDS[kind]], shape, partial(store, layer, owner, rows))
            )
    if cfg.rope_scaling is not None and cfg.rope_scaling.kind == "llama3":
        factors = llama3_factors(cfg)
        tensors.append(Pending(ROPE_FACTORS, TYPES[IDS["F32"]], tuple(factors.shape), lambda: factors))
    if bits < 16 and types["F16"]:
        notes.append(f"{types['F16']} maps whose rows are no multiple of {BLOCK} wide stay F16")
    mostly = max(types, key=lambda kind: (types[kind], kind))
    general = {
        "general.architecture": arch, "general.name": Path(loaded.source).stem, "general.quantization_version": 2,
        "general.file_type": FILE_TYPES[mostly],
    }  # fmt: skip
    write_gguf(out, general | own | words, tensors)
    return {"types": dict(sorted(types.items())), "exact": sum(exact), "maps": len(linears), "notes": notes}
