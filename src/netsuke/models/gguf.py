"""GGUF files (llama.cpp) -> Llama: architectures llama, deci, qwen2 and qwen3, and the names that both directions share.

Float tensors become dense maps in their stored dtype; Q8_0 and Q4_0 become quantized maps of 8 and 4 bits in groups of 32
with the very same codes and scales. Files of the architectures llama and deci hold the rows of q and k with interleaved rotary
pairs; they become half-split here. What llama.cpp would compute and we cannot is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from netsuke.errors import NetsukeError
from netsuke.models.gguf_file import BLOCK, FLOATS, GGUFHeader, read_gguf, unpack_blocks
from netsuke.models.gguf_tokenizer import from_metadata, special_ids
from netsuke.models.llama import BlockShape, Llama, LlamaConfig, RopeScaling, rope_frequencies
from netsuke.models.skeleton import LIMITS, check_config, check_tensors, fill, skeleton
from netsuke.models.tokenizer import Tokenizer

ARCHITECTURES = ("llama", "deci", "qwen2", "qwen3")
INTERLEAVED = ("llama", "deci")  # deci is llama.cpp's Llama with widths per block
NAMES = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up",
    "down": "ffn_down", "attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3 divides its rotary frequencies by, one factor per pair
CODE_BITS = {"Q4_0": 4, "Q8_0": 8}
REFUSED = ("expert_count", "attention.scale", "logit_scale", "attention.max_alibi_bias", "attention.clamp_kqv")


def theirs(name: str) -> str:
    """The GGUF name of one of our tensors ("blocks.0.q.weight" -> "blk.0.attn_q.weight")."""
    part, _, leaf = name.rpartition(".")
    if part.startswith("blocks."):
        _, layer, own = part.split(".")
        return f"blk.{layer}.{NAMES[own]}.{leaf}"
    return {"embed": "token_embd", "norm": "output_norm", "head": "output"}[part] + f".{leaf}"


def interleaved_rows(outs: int, heads: int) -> Tensor:
    """Which half-split row stands at each place of the interleaved order: w[rows] is what llama.cpp wants."""
    return torch.arange(outs).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def half_split_rows(outs: int, heads: int) -> Tensor:
    """The inverse of `interleaved_rows`."""
    return torch.arange(outs).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def rotary_heads(arch: str, cfg: LlamaConfig, name: str) -> int | None:
    """How many heads the rows of a tensor divide into when `arch` wants them interleaved, else None."""
    own = name.split(".")[-2]
    return {"q": cfg.heads, "k": cfg.kv_heads}.get(own) if arch in INTERLEAVED else None


class _Keys:
    """Typed reading of the metadata of one architecture; every error names the key."""

    def __init__(self, header: GGUFHeader, arch: str):
        self.meta, self.arch, self.path = header.metadata, arch, header.path

    def refuse(self, found: str, allowed: str = "") -> NetsukeError:
        return NetsukeError(f"load {self.path}", found, allowed)

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.meta.get(f"{self.arch}.{key}", default)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()  # one number per layer, all alike
        if type(value) is not int or not 0 <= value < 1 << 62:
            found = "missing" if value is None else str(value)[:40]
            raise self.refuse(f"{self.arch}.{key} is {found}", "a whole number, the same for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.meta.get(f"{self.arch}.{key}", default)
        if type(value) not in (int, float) or not abs(value) < 1e300:
            found = "missing" if value is None else str(value)[:40]
            raise self.refuse(f"{self.arch}.{key} is {found}", "a finite number")
        return float(value)

    def per_layer(self, key: str, layers: int) -> list[int]:
        value = self.meta.get(f"{self.arch}.{key}")
        if not isinstance(value, np.ndarray):
            return [self.whole(key)] * layers
        if value.dtype.kind not in "iu" or len(value) != layers:
            raise self.refuse(f"{self.arch}.{key} has {len(value)} entries for {layers} layers", "one for each layer")
        return value.tolist()


def config_of(header: GGUFHeader) -> tuple[str, LlamaConfig]:
    """Architecture and checked config of a file. Raises NetsukeError naming the key that is wrong or unsupported."""
    arch, tensors = header.metadata.get("general.architecture"), header.tensors
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        found = f"the architecture {str(arch)[:40]!r}" if arch is not None else "no general.architecture"
        raise NetsukeError(f"load {header.path}", found, ", ".join(ARCHITECTURES))
    k = _Keys(header, arch)
    for key in REFUSED:
        if k.meta.get(f"{arch}.{key}"):
            raise k.refuse(f"{arch}.{key} is {str(k.meta[f'{arch}.{key}'])[:40]}", "models without it")
    if k.meta.get("split.count", 0) not in (0, 1):
        raise k.refuse("the file is one part of a split model", "one file", "llama-gguf-split --merge")
    layers, heads, width = k.whole("block_count"), k.whole("attention.head_count"), k.whole("embedding_length")
    if not 1 <= layers <= LIMITS["layers"] or f"blk.{layers - 1}.attn_norm.weight" not in tensors:
        raise k.refuse(
            f"{arch}.block_count is {layers}, which the tensors do not show", "one block of tensors per layer"
        )
    if not 1 <= heads <= LIMITS["heads"]:
        raise k.refuse(f"{arch}.attention.head_count is {heads}", f"1 to {LIMITS['heads']}")
    if "token_embd.weight" not in tensors:
        raise k.refuse("tensor 'token_embd.weight' is missing", "a file with weights")
    head_dim = k.whole("attention.key_length", width // heads)
    if k.whole("rope.dimension_count", head_dim) != head_dim:
        raise k.refuse(f"{arch}.rope.dimension_count is not {head_dim}", "rotary positions on whole heads")
    value_dim, vocab = k.whole("attention.value_length", head_dim), tensors["token_embd.weight"].shape[0]
    bos, eos = special_ids(k.meta, vocab, header.path)
    window = k.whole("attention.sliding_window", 0) or None
    context, theta = k.whole("context_length"), k.number("rope.freq_base", 10000.0)
    cfg = LlamaConfig(
        blocks=tuple(BlockShape(hidden, value_dim) for hidden in k.per_layer("feed_forward_length", layers)),
        vocab=vocab, width=width, heads=heads, kv_heads=k.whole("attention.head_count_kv", heads), head_dim=head_dim,
        context=context, norm_eps=_single(k.number("attention.layer_norm_rms_epsilon")), rope_theta=_single(theta),
        tied="output.weight" not in tensors, qkv_bias="blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors, mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors, window=window if window and window < context else None,
        bos=bos, eos=eos, rope_scaling=_scaling(k, context),
    )  # fmt: skip
    if ROPE_FACTORS in tensors:
        cfg = _with_factors(check_config(cfg, header.path), header, k)
    return arch, check_config(cfg, header.path)


def _single(value: float) -> float:
    """The shortest decimal that is this float32: 1e-5 comes back as 1e-5, not as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _scaling(k: _Keys, context: int) -> RopeScaling | None:
    kind = k.meta.get(f"{k.arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise k.refuse(f"{k.arch}.rope.scaling.type is {str(kind)[:40]!r}", "none, linear, yarn")
    factor = _single(k.number("rope.scaling.factor"))
    if kind == "linear":
        return RopeScaling("linear", factor)
    if not 0 < factor < 1e30:
        raise k.refuse(f"{k.arch}.rope.scaling.factor is {factor}", "a finite number above 0")
    grow = 0.1 * np.log(max(factor, 1.0)) + 1.0  # llama.cpp multiplies this by its own factor, we name the product
    own = k.number("rope.scaling.attn_factor", 1.0)
    return RopeScaling(
        "yarn", factor, original_context=k.whole("rope.scaling.original_context_length", context),
        attention_factor=None if own == 1 else _single(own * grow),
    )  # fmt: skip


def llama3_factors(cfg: LlamaConfig) -> Tensor:
    """What "llama3" scaling divides each rotary frequency by, (head_dim/2,), float32."""
    plain, _ = rope_frequencies(msgspec.structs.replace(cfg, rope_scaling=None))
    return plain / rope_frequencies(cfg)[0]


def _with_factors(cfg: LlamaConfig, header: GGUFHeader, k: _Keys) -> LlamaConfig:
    """The config with the "llama3" scaling that the file's factors came from: the largest factor is the scaling's own, and
    only the published settings (1, 4, 8192 or the file's original context) are tried. Raises NetsukeError for others."""
    shape = header.tensors[ROPE_FACTORS].shape
    if shape != (cfg.head_dim // 2,):
        raise k.refuse(f"tensor {ROPE_FACTORS!r} has shape {list(shape)}", f"[{cfg.head_dim // 2}]")
    found = header.floats(ROPE_FACTORS).float()
    original = k.whole("rope.scaling.original_context_length", 8192)
    factor = _single(float(found.max()))
    if cfg.rope_scaling is None and 0 < factor < 1e6 and original:
        guess = msgspec.structs.replace(
            cfg, rope_scaling=RopeScaling("llama3", factor, 1.0, 4.0, original_context=original)
        )
        if torch.allclose(llama3_factors(guess), found, rtol=1e-3):
            return guess
    raise k.refuse(f"tensor {ROPE_FACTORS!r} holds factors of an unknown rule", "Llama 3's rope scaling, or none")


@dataclass(frozen=True)
class OpenGGUF:
    """A checked file: its header, architecture, config and the skeleton that its tensors fit."""

    header: GGUFHeader
    arch: str
    config: LlamaConfig
    model: Llama
    specs: dict[str, dict]

    def read(self, name: str) -> Tensor:
        """A fresh copy of one tensor of our state ("blocks.0.q.codes" too), rotary rows half-split."""
        owner, _, leaf = name.rpartition(".")
        if leaf in ("codes", "scales", "zeros"):
            t = self._packed(f"{owner}.weight", leaf)
        else:
            t = self.header.floats(theirs(name))
        heads = rotary_heads(self.arch, self.config, name)
        return t if heads is None else t[half_split_rows(t.shape[0], heads)]

    def _packed(self, weight: str, leaf: str) -> Tensor:
        from netsuke.layers.packing import pack

        info = self.header.tensors[theirs(weight)]
        bits, rows = CODE_BITS[info.kind.name], info.shape[0]
        if leaf == "zeros":
            return torch.full((rows, info.shape[1] // BLOCK), 1 << (bits - 1), dtype=torch.uint8)
        codes, scales = unpack_blocks(self.header.raw(theirs(weight)), info.kind, rows)
        return pack(codes, bits) if leaf == "codes" else scales

    def tokenizer(self) -> Tokenizer | None:
        """The file's tokenizer. Raises NetsukeError when it is of an unknown kind or does not belong to the model."""
        cfg, path = self.config, self.header.path
        tok = from_metadata(self.header.metadata, cfg.bos, cfg.eos, path)
        if tok is not None:
            tok.check_fits(cfg.vocab, path)
        return tok


def open_file(path: Path) -> OpenGGUF:
    """Config, skeleton and checked tensor headers; no weights are read.

    Raises NetsukeError for a bad header or config and for tensors that are missing, unexpected or of another shape.
    """
    header = read_gguf(path)
    arch, cfg = config_of(header)
    plain = skeleton(cfg)
    found = {n: info for n, info in header.tensors.items() if n != ROPE_FACTORS}
    check_tensors({theirs(n): tuple(t.shape) for n, t in plain.state_dict().items()}, found, path)
    specs, linears = {}, plain.linears()
    for name, layer in linears.items():
        kind = found[theirs(f"{name}.weight")].kind.name
        if kind in FLOATS:
            specs[name] = {"kind": "dense", "dtype": str(FLOATS[kind]).removeprefix("torch.")}
            continue
        specs[name] = {"kind": "quant", "bits": CODE_BITS[kind], "group": BLOCK}
        if layer.bias is not None:
            stored: Any = FLOATS.get(found[theirs(f"{name}.bias")].kind.name, torch.float32)
            specs[name] |= {} if stored == torch.float32 else {"bias": str(stored).removeprefix("torch.")}
    for name in plain.state_dict():  # norms and biases, which no block type may hold
        owner, _, leaf = name.rpartition(".")
        kind = found[theirs(name)].kind.name
        if kind not in FLOATS and (owner not in linears or leaf == "bias"):
            raise NetsukeError(f"load {path}", f"tensor {theirs(name)!r} is stored as {kind}", ", ".join(FLOATS))
    return OpenGGUF(header, arch, cfg, skeleton(cfg, specs, path), specs)


def load_file(path: Path, dtype: str | None = None) -> tuple[Llama, Tokenizer | None]:
    """The model and tokenizer of a GGUF file, weights in their stored form unless `dtype` is given for float ones."""
    opened = open_file(path)
    tokenizer = opened.tokenizer()
    return fill(opened.model, opened.read, dtype, path), tokenizer
