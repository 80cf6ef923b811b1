"""Hugging Face folders -> Llama: config.json, safetensors (one file or shards) and tokenizer.json.

Families by model_type: llama, mistral, qwen2, qwen3. What transformers would compute and we cannot (other activations,
dynamic rope, windows on some layers only, quantized checkpoints) is refused by name, never approximated. Rope settings
are read as transformers 5 writes them (`rope_parameters`) and as version 4 did (`rope_theta` and `rope_scaling`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from netsuke.errors import NetsukeError
from netsuke.models.files import PICKLE, read_json
from netsuke.models.llama import Llama, LlamaConfig, RopeScaling
from netsuke.models.skeleton import LIMITS, check_config, check_float, check_tensors, fill, skeleton
from netsuke.models.tokenizer import Tokenizer, read_tokenizer
from netsuke.models.weights import WeightFile

# What transformers assumes for absent keys: context, window, biases of q/k/v and of o ("asked": by attention_bias).
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"context": 2048, "window": None, "qkv": "asked", "out": "asked", "qk_norm": False},
    "mistral": {"context": 131072, "window": 4096, "qkv": False, "out": False, "qk_norm": False},
    "qwen2": {"context": 32768, "window": 4096, "qkv": True, "out": False, "qk_norm": False},
    "qwen3": {"context": 32768, "window": 4096, "qkv": "asked", "out": "asked", "qk_norm": True},
}
LINEAR_NAMES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
}  # fmt: skip
_NONE = object()


class _Fields:
    """Typed reading of a JSON object; every error names the file and the field."""

    def __init__(self, raw: dict[str, Any], source: Path):
        self.raw, self.source = raw, source

    def refuse(self, found: str, allowed: str = "") -> NetsukeError:
        return NetsukeError(f"load {self.source}", found, allowed)

    def _get(self, key: str, default: Any, kinds: tuple[type, ...], word: str) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is _NONE:
                raise self.refuse(f"{key} is missing", word)
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.refuse(f"{key} is {str(value)[:40]!r}", word)
        return value

    def whole(self, key: str, default: Any = _NONE) -> Any:
        return self._get(key, default, (int,), "a whole number")

    def number(self, key: str, default: Any = _NONE) -> Any:
        value = self._get(key, default, (int, float), "a number")
        if value is not None and not abs(value) < 1e300:  # NaN, infinity, and whole numbers that no float holds
            raise self.refuse(f"{key} is {str(value)[:40]}", "a finite number")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        return self._get(key, default, (bool,), "true or false")

    def text(self, key: str, default: Any = _NONE) -> Any:
        return self._get(key, default, (str,), "a text")

    def part(self, key: str) -> dict[str, Any]:
        return self._get(key, {}, (dict,), "an object")

    def ids(self, key: str, vocab: int) -> tuple[int, ...]:
        """Token ids, one or a list; those outside the vocabulary are left out, as reduced test models carry them."""
        value = self._get(key, (), (int, list), "a token id or a list of them")
        value = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise self.refuse(f"{key} is {str(value)[:40]}", "a token id or a list of them")
        return tuple(v for v in value if 0 <= v < vocab)


def read_config(folder: Path) -> LlamaConfig:
    """The checked LlamaConfig of a Hugging Face folder. Raises NetsukeError naming the field that is wrong or
    unsupported."""
    path = Path(folder) / "config.json"
    f = _Fields(read_json(path), path)
    family = f.text("model_type", None)
    if family not in FAMILIES:
        raise f.refuse(f"model_type {family!r} is unknown", ", ".join(FAMILIES))
    known = FAMILIES[family]
    for key in ("quantization_config", "compression_config"):
        if f.raw.get(key) is not None:
            raise f.refuse(
                f"the checkpoint is quantized already ({key})", "float weights; netsuke quantizes them itself"
            )
    if (act := f.text("hidden_act", "silu")) not in ("silu", "swish"):
        raise f.refuse(f"hidden_act is {act!r}", "silu")
    width, heads, layers = f.whole("hidden_size"), f.whole("num_attention_heads"), f.whole("num_hidden_layers")
    if heads < 1:
        raise f.refuse(f"num_attention_heads is {heads}", f"1 to {LIMITS['heads']}")
    if not 1 <= layers <= LIMITS["layers"]:
        raise f.refuse(f"num_hidden_layers is {layers}", f"1 to {LIMITS['layers']}")
    head_dim = f.whole("head_dim", 128 if family == "qwen3" else None)
    if head_dim is None:
        if width % heads:
            raise f.refuse(f"hidden_size {width} does not divide among {heads} heads", "a multiple, or a head_dim")
        head_dim = width // heads
    vocab, context = f.whole("vocab_size"), f.whole("max_position_embeddings", known["context"])
    asked_bias, bos = f.flag("attention_bias"), f.ids("bos_token_id", vocab)
    if _tokenizer_has_no_bos(folder):
        bos = ()
    theta, scaling = _rope(f, context)
    cfg = LlamaConfig.uniform(
        layers, f.whole("intermediate_size"), vocab=vocab, width=width, heads=heads,
        kv_heads=f.whole("num_key_value_heads", 8 if family == "mistral" else heads), head_dim=head_dim,
        context=context, norm_eps=float(f.number("rms_norm_eps", 1e-6)), rope_theta=theta, rope_scaling=scaling,
        tied=f.flag("tie_word_embeddings"),
        qkv_bias=asked_bias if known["qkv"] == "asked" else known["qkv"],
        out_bias=asked_bias if known["out"] == "asked" else known["out"],
        mlp_bias=f.flag("mlp_bias") if family == "llama" else False,
        qk_norm=known["qk_norm"], window=_window(f, family, layers, context),
        bos=bos[0] if bos else None, eos=f.ids("eos_token_id", vocab),
    )  # fmt: skip
    return check_config(cfg, path)


def _tokenizer_has_no_bos(folder: Path) -> bool:
    """Qwen's config names a bos_token_id that its tokenizer never puts before a text; tokenizer_config.json knows."""
    path = Path(folder) / "tokenizer_config.json"
    return path.is_file() and read_json(path).get("bos_token", "") is None


def _window(f: _Fields, family: str, layers: int, context: int) -> int | None:
    """The sliding window of all layers, or None. Raises NetsukeError when only some layers have one."""
    if "sliding_window" in f.raw and f.raw["sliding_window"] is None:
        return None
    window = f.whole("sliding_window", FAMILIES[family]["window"])
    if family == "llama":
        return None
    if family == "mistral":
        return window
    if not f.flag("use_sliding_window"):
        return None
    first = f.whole("max_window_layers", 28)
    kinds = f.raw.get("layer_types") or ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise f.refuse("layer_types does not list every layer", f"{layers} entries")
    sliding = sum(k == "sliding_attention" for k in kinds)
    if sliding == 0 or window >= context:
        return None
    if sliding < layers:
        raise f.refuse(f"{sliding} of {layers} layers have a sliding window", "a window on all layers or on none")
    return window


def _rope(f: _Fields, context: int) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    key = "rope_scaling" if f.raw.get("rope_scaling") else "rope_parameters"
    r = _Fields(f.part(key), f.source)
    if any(isinstance(v, dict) for v in r.raw.values()):
        raise f.refuse(f"{key} differs between layer types", "one rope for all layers")
    theta = float(r.number("rope_theta", f.number("rope_theta", 10000.0)))
    if r.number("partial_rotary_factor", f.number("partial_rotary_factor", 1.0)) != 1:
        raise f.refuse("partial_rotary_factor is not 1", "rotary positions on whole heads")
    kind = r.text("rope_type", r.text("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        raise f.refuse(f"rope scaling of kind {kind!r}", "default, linear, llama3, yarn")
    original = f.whole("original_max_position_embeddings", r.whole("original_max_position_embeddings", context))
    if original < 1:
        raise f.refuse(f"original_max_position_embeddings is {original}", "at least 1")
    if kind == "linear":
        return theta, RopeScaling("linear", float(r.number("factor")))
    if kind == "llama3":
        low, high = float(r.number("low_freq_factor")), float(r.number("high_freq_factor"))
        return theta, RopeScaling("llama3", float(r.number("factor")), low, high, original)
    if not r.flag("truncate", True):
        raise f.refuse("yarn with truncate false", "truncate true")
    factor = float(r.number("factor", context / original))
    return theta, RopeScaling(
        "yarn", factor, original_context=original, beta_fast=float(r.number("beta_fast", 0) or 32),
        beta_slow=float(r.number("beta_slow", 0) or 1), attention_factor=_yarn_attention(r, factor),
    )  # fmt: skip


def _yarn_attention(r: _Fields, factor: float) -> float | None:
    """The explicit factor on cos and sin, or the ratio that DeepSeek's two mscale settings give, or None (the
    default)."""
    given, one, all_dim = r.number("attention_factor", None), r.number("mscale", 0), r.number("mscale_all_dim", 0)
    if given is not None or not (one and all_dim):
        return given if given is None else float(given)
    grow = 0.1 * math.log(max(factor, 1.0))
    return (grow * one + 1) / (grow * all_dim + 1)


def weight_file(folder: Path) -> WeightFile:
    """The safetensors of a folder, one file or shards. Raises NetsukeError when there are none, or only pickles."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (folder / name).is_file():
            return WeightFile(folder / name)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise NetsukeError(f"load {folder / pickles[0]}", PICKLE, "safetensors files", "convert to safetensors")
    raise NetsukeError(
        f"load {folder}", "the folder has a config.json but no weights", "model.safetensors or its shards"
    )


def theirs(name: str) -> str:
    """The Hugging Face name of one of our tensors ("blocks.0.q.weight" -> "model.layers.0.self_attn.q_proj.weight")."""
    part, _, leaf = name.rpartition(".")
    if part.startswith("blocks."):
        _, layer, own = part.split(".")
        return f"model.layers.{layer}.{LINEAR_NAMES[own]}.{leaf}"
    return {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}[part] + f".{leaf}"


def open_folder(folder: Path) -> tuple[LlamaConfig, Llama, WeightFile]:
    """Config, skeleton and checked weight headers of a folder; no tensor is read.

    Raises NetsukeError for a bad config and for tensors that are missing, unexpected or of another shape, by name.
    """
    cfg = read_config(folder)
    weights, model = weight_file(folder), skeleton(cfg)
    wanted = {theirs(name): tuple(t.shape) for name, t in model.state_dict().items()}
    ignored = {n for n in weights.names() if n.endswith("rotary_emb.inv_freq") or (cfg.tied and n == "lm_head.weight")}
    found = {name: weights.info(name) for name in weights.names() if name not in ignored}
    check_tensors(wanted, found, weights.path)
    for name, info in found.items():
        check_float(name, info, weights.path)
    return cfg, model, weights


def specs(model: Llama, weights: WeightFile) -> dict[str, dict]:
    """The spec of every linear map as it is stored."""
    names = {n: theirs(f"{n}.weight") for n in model.linears()}
    return {n: {"kind": "dense", "dtype": check_float(t, weights.info(t), weights.path)} for n, t in names.items()}


def tokenizer_of(folder: Path, cfg: LlamaConfig) -> Tokenizer | None:
    """The folder's tokenizer.json, or None when it has none. Raises NetsukeError when it does not belong to the
    model."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = read_tokenizer(path, cfg.bos, cfg.eos)
    tokenizer.check_fits(cfg.vocab, path)
    return tokenizer


def load_folder(folder: Path, dtype: str | None = None) -> tuple[Llama, Tokenizer | None]:
    """The model and tokenizer of a Hugging Face folder, weights in their stored dtype unless `dtype` is given."""
    cfg, model, weights = open_folder(folder)
    tokenizer = tokenizer_of(folder, cfg)

    def read(name: str) -> torch.Tensor:
        return weights.get(theirs(name))

    return fill(model, read, dtype, weights.path), tokenizer
