"""A model without memory, to be filled tensor by tensor: how every loader builds a Llama from a file it does not trust.

`check_config` bounds every size first, `skeleton` builds the modules on the meta device (shapes, no storage), `fill`
replaces one parameter or buffer after the other. Peak memory is what the model keeps plus one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense, LinearBase
from netsuke.layers.registry import layer_from_spec
from netsuke.models.encoder import Encoder, EncoderConfig
from netsuke.models.llama import Llama, LlamaConfig, rope_table
from netsuke.models.weights import TensorInfo, check_finite

FLOATS = ("float32", "float16", "bfloat16")
# Several times the largest published Llama-family model: beyond these a number is a mistake or an attack.
LIMITS = {
    "vocab": 1 << 22, "width": 1 << 17, "heads": 1 << 12, "kv_heads": 1 << 12, "head_dim": 1 << 12, "context": 1 << 28,
    "layers": 1 << 11, "hidden": 1 << 20, "value_dim": 1 << 12, "experts": 1 << 10,
}  # fmt: skip


def check_config(cfg: LlamaConfig, source: str | Path) -> LlamaConfig:
    """The config itself. Raises NetsukeError naming the first field that no Llama can have."""
    asked = f"load {source}"

    def bound(name: str, value: int, label: str) -> None:
        if not 1 <= value <= LIMITS[name]:
            raise NetsukeError(asked, f"{label} is {value}", f"1 to {LIMITS[name]}")

    for name in ("vocab", "width", "heads", "kv_heads", "head_dim", "context"):
        bound(name, getattr(cfg, name), name)
    bound("layers", len(cfg.blocks), "the number of layers")
    if cfg.heads % cfg.kv_heads:
        found = f"{cfg.heads} attention heads do not divide among {cfg.kv_heads} key/value heads"
        raise NetsukeError(asked, found, "a number of heads that is a multiple of the key/value heads")
    if cfg.head_dim % 2:
        raise NetsukeError(asked, f"head_dim is {cfg.head_dim}", "an even number: rotary dimensions come in pairs")
    if not 0 <= cfg.norm_eps < 1:
        raise NetsukeError(asked, f"norm_eps is {cfg.norm_eps}", "0 to 1")
    if not 1 < cfg.rope_theta < float("inf"):
        raise NetsukeError(asked, f"rope_theta is {cfg.rope_theta}", "a finite number above 1")
    if cfg.window is not None and cfg.window < 1:
        raise NetsukeError(asked, f"the sliding window is {cfg.window}", "at least 1")
    for token in (cfg.bos, *cfg.eos):
        if token is not None and not 0 <= token < cfg.vocab:
            raise NetsukeError(asked, f"special token {token} is outside the vocabulary", f"0 to {cfg.vocab - 1}")
    for i, block in enumerate(cfg.blocks):
        bound("hidden", block.hidden, f"hidden of block {i}")
        bound("value_dim", block.value_dim, f"value_dim of block {i}")
        if block.experts or block.active:
            bound("experts", block.experts, f"experts of block {i}")
            if not 1 <= block.active <= block.experts:
                raise NetsukeError(
                    asked, f"block {i} runs {block.active} of {block.experts} experts", "1 to all of them"
                )
        if block.pairs is not None:
            _check_pairs(cfg, i, asked)
    if cfg.rope_scaling is not None:
        _check_scaling(cfg, asked)
    return cfg


def _check_pairs(cfg: LlamaConfig, layer: int, asked: str) -> None:
    pairs, half = cfg.blocks[layer].pairs, cfg.head_dim // 2
    if len(pairs) != cfg.kv_heads or len({len(p) for p in pairs}) != 1:
        raise NetsukeError(asked, f"the pairs of block {layer} are uneven", f"{cfg.kv_heads} lists of one length")
    for p in pairs:
        if not p or len(set(p)) != len(p) or not all(0 <= j < half for j in p):
            raise NetsukeError(asked, f"the pairs of block {layer} are {p}", f"distinct numbers from 0 to {half - 1}")


def _check_scaling(cfg: LlamaConfig, asked: str) -> None:
    s, where = cfg.rope_scaling, "rope scaling"
    if s.kind not in ("linear", "llama3", "yarn"):
        raise NetsukeError(asked, f"{where} of kind {s.kind!r}", "default, linear, llama3, yarn")
    positive = {"factor": s.factor, "original_context": s.original_context}
    if s.kind == "yarn":
        positive |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
        if s.attention_factor is not None:
            positive["attention_factor"] = s.attention_factor
    for name, value in positive.items():
        if not 0 < value < float("inf"):
            raise NetsukeError(asked, f"{where}: {name} is {value}", "a finite number above 0")
    if s.kind == "llama3" and not 0 < s.low < s.high < float("inf"):
        raise NetsukeError(asked, f"{where}: frequency factors {s.low} and {s.high}", "0 < low < high")


def skeleton(
    cfg: LlamaConfig | EncoderConfig, specs: Mapping[str, dict] | None = None, source: str | Path = "model"
) -> Llama | Encoder:
    """A model whose tensors have shapes and no memory (rotary tables are real); `specs` gives kinds of linear maps.

    Raises NetsukeError when `specs` is not exactly one spec for each linear map, and for a spec that no map can have.
    """
    with torch.device("meta"):
        model = Encoder(cfg) if isinstance(cfg, EncoderConfig) else Llama(cfg)
    if isinstance(model, Llama):
        for i, block in enumerate(model.blocks):
            block.freq, block.rope_scale = rope_table(cfg, i)
    if specs is not None:
        linears = model.linears()
        for name in sorted(linears.keys() ^ specs.keys()):
            found = f"layer {name!r} is " + ("missing" if name in linears else "not part of this model")
            raise NetsukeError(f"load {source}", found, "one entry for each linear map")
        for name, old in linears.items():
            try:
                with torch.device("meta"):
                    model.replace(name, layer_from_spec(specs[name], old.outs, old.ins, old.bias is not None))
            except NetsukeError as e:
                raise NetsukeError(f"load {source}", f"layer {name!r}: {e.found}", e.allowed, e.attempt) from e
    return model.requires_grad_(False).eval()


def check_tensors(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorInfo], source: str | Path) -> None:
    """Raises NetsukeError that names the first tensor that is missing, unexpected or of another shape, and counts the
    rest."""
    asked = f"load {source}"

    def refuse(names: list[str], what: str, allowed: str) -> None:
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise NetsukeError(asked, f"tensor {names[0]!r} {what}{more}", allowed)

    refuse(sorted(wanted.keys() - found.keys()), "is missing", "all tensors of the config's model")
    refuse(sorted(found.keys() - wanted.keys()), "is unexpected", "only tensors of the config's model")
    for name, shape in wanted.items():
        if found[name].shape != tuple(shape):
            refuse([name], f"has shape {list(found[name].shape)}", f"{list(shape)}, as the config says")


def check_float(name: str, info: TensorInfo, source: str | Path) -> str:
    """The dtype of a stored float tensor as a word. Raises NetsukeError when it is no float that models compute
    with."""
    word = str(info.dtype).removeprefix("torch.")
    if word not in FLOATS:
        raise NetsukeError(f"load {source}", f"tensor {name!r} is stored as {word}", ", ".join(FLOATS))
    return word


def place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor where `name` ("blocks.0.q.weight") points, as a parameter or buffer like the one it replaces."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent) if parent else module
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def fill(model: Llama, read: Callable[[str], Tensor], dtype: str | None, source: str | Path) -> Llama:
    """Fills a skeleton with `read(name)` for every name of its state; `dtype` converts dense maps, dense factors and
    norms; maps that are stored otherwise keep what they are.

    The shapes must have been checked against the file's header before. Raises NetsukeError for NaN and infinity, by
    name.
    """
    packed = {n for n, m in model.named_modules() if isinstance(m, LinearBase) and not isinstance(m, Dense)}
    for name in list(model.state_dict()):
        tensor = read(name)
        check_finite(name, tensor, source)
        if dtype is not None and name.rpartition(".")[0] not in packed:
            tensor = tensor.to(getattr(torch, dtype))
        place(model, name, tensor)
    return model
