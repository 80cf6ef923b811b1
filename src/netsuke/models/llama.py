"""The Llama family: Llama, Mistral, Qwen2, Qwen3 and what is carved from them.

One pre-norm decoder covers them all; what differs is in `LlamaConfig`. Every block has its own widths: the hidden width
of the feed-forward part, the kept rotary pairs of each key head, the width of a value head. Rotary pairs are stored
half-split (dimension j turns with j + r, where r is the number of kept pairs); files with interleaved pairs are
permuted when loaded. Attention keeps the scale 1/sqrt(head_dim) of the uncut model.

Dimension letters: B batch, T tokens, S tokens seen so far, C width, H heads, K key heads, R rotary pairs, F hidden, V
vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense, LinearBase, halved
from netsuke.models.experts import Experts

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
# Where a function may stand in a block's forward pass (`Block.sites`), in order: the residual stream and its norm before
# attention, the projections before and after rotation, attention's logits and weights, the concatenated heads, what is added
# to the stream; then the same for the feed-forward part, whose `hidden` is silu · up.
SITES = (
    "attn_stream", "attn_in", "q", "k", "v", "q_rot", "k_rot", "scores", "probs", "heads", "o",
    "mlp_stream", "mlp_in", "gate", "sigmoid", "silu", "up", "hidden", "down",
)  # fmt: skip
Site = Callable[[Tensor], Tensor]


class BlockShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Widths of one block. `pairs` lists, for each key head, the rotary pairs that are left (None: all of them). With
    `experts`, the feed-forward part is that many, `hidden` units each, of which a token runs `active`."""

    hidden: int
    value_dim: int
    pairs: tuple[tuple[int, ...], ...] | None = None
    experts: int = 0
    active: int = 0


class RopeScaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How rotary frequencies are stretched for long contexts ("linear", "llama3" or "yarn", as Hugging Face names
    them)."""

    kind: str
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


class LlamaConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    vocab: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    blocks: tuple[BlockShape, ...]
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None  # sliding attention window (Mistral); None attends to everything
    bos: int | None = None
    eos: tuple[int, ...] = ()
    family: str = "llama"

    @classmethod
    def uniform(cls, layers: int, hidden: int, **rest) -> LlamaConfig:
        """A config whose blocks are all alike, as every model is before it is carved."""
        return cls(blocks=tuple(BlockShape(hidden, rest["head_dim"]) for _ in range(layers)), **rest)

    @property
    def mixture(self) -> int | None:
        """The first block whose feed-forward part is a mixture of experts."""
        return next((i for i, b in enumerate(self.blocks) if b.experts), None)

    def pair_count(self, layer: int) -> int:
        pairs = self.blocks[layer].pairs
        return self.head_dim // 2 if pairs is None else len(pairs[0])

    def linear_shapes(self, layer: int) -> dict[str, tuple[int, int, bool]]:
        """name -> (O, I, has bias) of the linear maps of a block: seven, or four, a router and three for each expert."""
        b, qk = self.blocks[layer], 2 * self.pair_count(layer)
        attention = {
            "q": (self.heads * qk, self.width, self.qkv_bias),
            "k": (self.kv_heads * qk, self.width, self.qkv_bias),
            "v": (self.kv_heads * b.value_dim, self.width, self.qkv_bias),
            "o": (self.width, self.heads * b.value_dim, self.out_bias),
        }
        feed = {
            "gate": (b.hidden, self.width, self.mlp_bias),
            "up": (b.hidden, self.width, self.mlp_bias),
            "down": (self.width, b.hidden, self.mlp_bias),
        }
        if not b.experts:
            return attention | feed
        each = {f"experts.{e}.{name}": shape for e in range(b.experts) for name, shape in feed.items()}
        return attention | {"experts.router": (b.experts, self.width, False)} | each

    def kv_width(self, layer: int) -> int:
        """Numbers stored per token by this block's key/value cache."""
        return self.kv_heads * (2 * self.pair_count(layer) + self.blocks[layer].value_dim)


def rope_frequencies(cfg: LlamaConfig) -> tuple[Tensor, float]:
    """Angular frequency of every rotary pair, (head_dim/2,), and the factor on cos and sin (1 except for YaRN)."""
    dim = cfg.head_dim
    # on the CPU whatever the default device: arange on "meta" imports torch's compiler, 75 MB and a second
    freq = cfg.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    s = cfg.rope_scaling
    if s is None:
        return freq.float(), 1.0
    if s.kind == "linear":
        return (freq / s.factor).float(), 1.0
    if s.kind == "llama3":  # long waves are slowed, short ones kept, a ramp between (Llama 3.1 model card, 2024)
        wave = 2 * math.pi / freq
        ramp = ((s.original_context / wave - s.low) / (s.high - s.low)).clamp(0, 1)
        return ((1 - ramp) * freq / s.factor + ramp * freq).float(), 1.0
    if s.kind == "yarn":  # "YaRN: Efficient Context Window Extension", 2023

        def turns_to_dim(turns: float) -> float:
            return dim * math.log(s.original_context / (turns * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

        low = max(math.floor(turns_to_dim(s.beta_fast)), 0)
        high = min(math.ceil(turns_to_dim(s.beta_slow)), dim - 1)
        ramp = ((torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / ((high - low) or 1e-3)).clamp(0, 1)
        scale = s.attention_factor if s.attention_factor is not None else 0.1 * math.log(max(s.factor, 1.0)) + 1.0
        return (freq / s.factor * ramp + freq * (1 - ramp)).float(), scale
    raise ValueError(f"rope scaling {s.kind!r}")  # load.py has refused it by name before


def rope_table(cfg: LlamaConfig, layer: int) -> tuple[Tensor, float]:
    """Frequencies of the rotary pairs that a block kept, (1 or K, R), and the factor on cos and sin."""
    freq, scale = rope_frequencies(cfg)
    pairs = cfg.blocks[layer].pairs
    return (freq[None] if pairs is None else freq[torch.tensor(pairs, device="cpu")]), scale


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class KVCache:
    """Keys and values of all blocks, allocated once: K (B, K, context, 2R), V (B, K, context, value_dim) per block."""

    def __init__(self, cfg: LlamaConfig, batch: int, context: int, dtype: torch.dtype = torch.float32):
        self.length, self.context = 0, context
        shape = (batch, cfg.kv_heads, context)
        self.k = [torch.zeros(*shape, 2 * cfg.pair_count(i), dtype=dtype) for i in range(len(cfg.blocks))]
        self.v = [torch.zeros(*shape, b.value_dim, dtype=dtype) for b in cfg.blocks]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends T tokens to one block and returns all it holds; `length` moves when the last block is done."""
        end = self.length + k.shape[2]
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        if layer == len(self.k) - 1:
            self.length = end
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.k + self.v)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns every pair (x_j, x_{j+R}); x (B, heads, T, 2R), cos and sin (1 or heads, T, R)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def causal_mask(T: int, S: int, window: int | None, device: torch.device) -> Tensor:
    """(T, S): which of S tokens each of the last T may see."""
    rows, cols = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)[None]
    return (cols <= rows) if window is None else (cols <= rows) & (cols > rows - window)


def attend_openly(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, at: Callable) -> Tensor:
    """`attend` with logits and weights in sight: `at("scores", ·)` before the mask, `at("probs", ·)` after the softmax."""
    (H, T), (K, S) = q.shape[1:3], k.shape[1:3]
    group = H // K
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = at("scores", (q @ k.transpose(-1, -2)) * scale)
    seen = causal_mask(T, S, window, q.device)
    return at("probs", scores.masked_fill(~seen, -torch.inf).softmax(-1)) @ v


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention of the last T of S tokens. q (B, H, T, 2R), k (B, K, S, 2R), v (B, K, S, D) -> (B, H, T, D).

    Unequal key and value widths are padded with zeros to the wider one: this changes no result and keeps PyTorch's
    fused kernel, whose memory does not grow with T·S.
    """
    (B, H, T, qk), (K, S, vd) = q.shape, v.shape[1:]
    if T == 1 and (window is None or window >= S):  # decoding: the queries of one group are rows of one product
        scores = (q.reshape(B, K, H // K, qk) @ k.transpose(-1, -2)) * scale
        return (scores.softmax(-1) @ v).reshape(B, H, 1, vd)
    if qk < vd:
        q, k = F.pad(q, (0, vd - qk)), F.pad(k, (0, vd - qk))
    elif vd < qk:
        v = F.pad(v, (0, qk - vd))
    if H != K:  # the queries of one key head see it through a stride of 0: a repeated copy would grow with S
        q = q.reshape(B * K, H // K, T, -1)
        k, v = (x.reshape(B * K, 1, S, -1).expand(-1, H // K, -1, -1) for x in (k, v))
    mask = None
    if S != T or (window is not None and window < S):
        mask = causal_mask(T, S, window, q.device)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return y.reshape(B, H, T, -1)[..., :vd]


class Block(nn.Module):
    """x + attention(norm(x)), then x + down(silu(gate) · up)(norm(x)). Linear maps are swapped in place by methods.

    `sites` maps names of SITES to functions that stand there: quantizers of activations, masks of neurons, listeners. They
    are no parameters and are not stored with the weights.
    """

    q: LinearBase
    k: LinearBase
    v: LinearBase
    o: LinearBase
    gate: LinearBase
    up: LinearBase
    down: LinearBase

    def __init__(self, cfg: LlamaConfig, layer: int, dtype: str = "float32"):
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.sites: dict[str, Site] = {}
        for name, (outs, ins, bias) in cfg.linear_shapes(layer).items():
            if "." not in name:
                setattr(self, name, Dense.empty(outs, ins, bias, dtype))
        shape = cfg.blocks[layer]
        if shape.experts:
            self.experts = Experts(cfg.width, shape.hidden, shape.experts, shape.active, cfg.mlp_bias, dtype)
        self.attn_norm, self.mlp_norm = RMSNorm(cfg.width, cfg.norm_eps), RMSNorm(cfg.width, cfg.norm_eps)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps), RMSNorm(cfg.head_dim, cfg.norm_eps)
        table, self.rope_scale = rope_table(cfg, layer)
        self.register_buffer("freq", table, persistent=False)

    def at(self, site: str, x: Tensor) -> Tensor:
        """What stands at a site, applied to x; x itself where nothing does."""
        return self.sites[site](x) if site in self.sites else x

    def rope(self, start: int, T: int) -> tuple[Tensor, Tensor]:
        """cos and sin, (1 or K, T, R), for positions start … start+T-1."""
        angle = torch.arange(start, start + T, device=self.freq.device).float()[None, :, None] * self.freq[:, None]
        return angle.cos() * self.rope_scale, angle.sin() * self.rope_scale

    def project_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed input (B, T, C) -> q (B, H, T, 2R), k (B, K, T, 2R), v (B, K, T, D), before rotation."""
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.cfg.heads, -1)
        k = self.k(x).view(B, T, self.cfg.kv_heads, -1)
        v = self.v(x).view(B, T, self.cfg.kv_heads, -1)
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = self.at("q", q), self.at("k", k), self.at("v", v)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attention(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Normed input (B, T, C) -> concatenated heads (B, T, H·D), the input of `o`."""
        q, k, v = self.project_qkv(x)
        cos, sin = self.rope(cache.length if cache else 0, x.shape[1])
        group = self.cfg.heads // self.cfg.kv_heads
        k = rotate(k, cos.to(k.dtype), sin.to(k.dtype))
        if cos.shape[0] > 1:  # each key head has its own pairs: repeat its table for the queries that share it
            cos, sin = cos.repeat_interleave(group, 0), sin.repeat_interleave(group, 0)
        q = self.at("q_rot", rotate(q, cos.to(q.dtype), sin.to(q.dtype)))
        k = self.at("k_rot", k)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
            k, v = k.to(q.dtype), v.to(q.dtype)
        scale = 1 / math.sqrt(self.cfg.head_dim)
        if "scores" in self.sites or "probs" in self.sites:
            y = attend_openly(q, k, v, scale, self.cfg.window, self.at)
        else:
            y = attend(q, k, v, scale, self.cfg.window)
        return self.at("heads", y.transpose(1, 2).flatten(2))

    def mlp_inner(self, x: Tensor) -> Tensor:
        """Normed input (B, T, C) -> hidden activations (B, T, F), the input of `down`."""
        gate, up = self.at("gate", self.gate(x)), self.at("up", self.up(x))
        if "sigmoid" in self.sites:
            gate = gate * self.at("sigmoid", gate.sigmoid())
        else:
            gate = F.silu(gate)
        return self.at("hidden", self.at("silu", gate) * up)

    def feed(self, x: Tensor) -> Tensor:
        """Normed input (B, T, C) -> what the feed-forward part adds to the stream."""
        return self.experts(x) if self.cfg.blocks[self.layer].experts else self.down(self.mlp_inner(x))

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = self.at("attn_stream", x)
        x = x + self.at("o", self.o(self.attention(self.at("attn_in", self.attn_norm(x)), cache)))
        x = self.at("mlp_stream", x)
        return x + self.at("down", self.feed(self.at("mlp_in", self.mlp_norm(x))))


class Llama(nn.Module):
    """ids (B, T) -> logits (B, T, V). `embed` is the table; with tied weights it is the output head as well."""

    def __init__(self, cfg: LlamaConfig, dtype: str = "float32"):
        super().__init__()
        self.cfg = cfg
        self.embed: LinearBase = Dense.empty(cfg.vocab, cfg.width, False, dtype)
        self.blocks = nn.ModuleList(Block(cfg, i, dtype) for i in range(len(cfg.blocks)))
        self.norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.head: LinearBase | None = None if cfg.tied else Dense.empty(cfg.vocab, cfg.width, False, dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Residual stream (B, T, C) -> logits (B, T, V)."""
        return (self.head or self.embed)(self.norm(x))

    def forward(self, ids: Tensor, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        x = self.embed.rows(ids)
        for block in self.blocks:
            x = block(x, cache)
        return self.logits(x[:, -1:] if last_only else x)

    def linears(self) -> dict[str, LinearBase]:
        """All linear maps by name ("embed", "blocks.0.q", …, "head"), in the order of the forward pass. The factors that
        a map is stored as are part of it, not maps of their own."""
        out: dict[str, LinearBase] = {}
        inside = "."  # no name starts so
        for name, module in self.named_modules():  # a map comes right before its factors
            if isinstance(module, LinearBase) and not name.startswith(inside):
                out[name], inside = module, f"{name}."
        return out

    def replace(self, name: str, layer: LinearBase) -> None:
        """Swaps the linear map called `name`."""
        parent, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(parent) if parent else self, leaf, layer)

    def stand(self, sites: dict[str, Site]) -> None:
        """Puts functions at sites ("blocks.0.hidden") in place of all that stood there. Raises NetsukeError for a site that
        no block has."""
        for block in self.blocks:
            block.sites = {}
        for name, function in sites.items():
            parent, _, site = name.rpartition(".")
            index = parent.removeprefix("blocks.")
            if site not in SITES or not index.isdigit() or int(index) >= len(self.blocks):
                raise NetsukeError(
                    f"put a function at {name}",
                    "no block has this site",
                    f"blocks.N.SITE, SITE one of {', '.join(SITES)}",
                )
            self.blocks[int(index)].sites[site] = function

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())


def random_llama(cfg: LlamaConfig, seed: int, std: float = 0.02) -> Llama:
    """A freshly initialised model: one constant standard deviation for all layers (PanGu-π Pro, 2024)."""
    model = Llama(cfg)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("norm.weight"):
                p.zero_() if name.endswith("bias") else p.normal_(0, std, generator=rng)
    return model


def half_precision(model: Llama) -> Llama:
    """A copy whose linear maps are stored in 16 bits; norms stay as they are. Raises NetsukeError as `halved`."""
    out = copy.deepcopy(model)
    for name, layer in out.linears().items():
        out.replace(name, halved(layer, name))
    return out
