"""Plugins: thin maps made for one base, attached, merged, subtracted and chosen by what a text looks like.

"Configurable Foundation Models", 2024, section 3, on LoRA bricks (layers/adapter.py). All plugins stand on the same base
tensors, none of which changes; twenty plugins take one base and twenty pairs of thin factors.

    attach   a model that shares every tensor of the base, with plugins beside its maps
    merge    Σ w_i B_i A_i: of the products ("products"; exact at rank Σ r_i, or the nearest of a given rank), or of the factors
             ("factors": Σ √w_i B_i · Σ √w_i A_i, which has cross terms and needs equal ranks; what PEFT calls linear). A negative
             weight subtracts a skill
    burned   one dense model with a plugin inside: keep the plugin, low precision has no way back
    Rack     several plugins on one base and a rule which of them answers: the one whose texts have the nearest mean embedding, in
             the measure of how texts of one kind differ among themselves (coding is wider than mathematics)
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from netsuke.compress.bricks import Brick, check_base, fingerprint
from netsuke.compress.decompose import balanced, safe_cholesky, svd
from netsuke.errors import NetsukeError
from netsuke.layers.adapter import Adapter
from netsuke.layers.linear import Dense, LinearBase
from netsuke.models.llama import Llama
from netsuke.models.skeleton import FLOATS
from netsuke.models.weights import WeightFile, check_finite, read_header, write_safetensors

HOWS = ("products", "factors")
RIDGE = 0.1  # on the mean spread: a few hundred texts do not know all directions
FORMAT = "netsuke-plugin 1"
Thin = dict[str, tuple[Tensor, Tensor]]  # linear map -> first (r, I), second (O, r)


@dataclass(frozen=True)
class Plugin:
    """Thin factors by map name, made for the base with this `fingerprint`. `key` (C,) is the mean embedding of the texts that
    it learned from and `spread` (C, C) the covariance of theirs: by these a Rack finds it."""

    id: str
    base: str
    thin: Thin
    skills: dict[str, float] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    key: Tensor | None = None
    spread: Tensor | None = None

    def bytes(self) -> int:
        return sum(t.nbytes for pair in self.thin.values() for t in pair)

    def brick(self, file: str | None = None, kind: str = "adapter", sha256: str | None = None) -> Brick:
        """The manifest's entry."""
        sites: dict[str, tuple[int, ...]] = dict.fromkeys(self.thin, ())
        return Brick(self.id, kind, sites, self.skills, self.bytes(), self.base, self.parents, file, sha256)

    def write(self, path: Path) -> None:
        """As safetensors. Raises NetsukeError for NaN and for a disk that refuses."""
        tensors = {f"{n}.{part}": t for n, pair in self.thin.items() for part, t in zip(("first", "second"), pair)}
        tensors |= {n: t for n, t in (("key", self.key), ("spread", self.spread)) if t is not None}
        for name, t in tensors.items():
            check_finite(name, t, f"the plugin {self.id}")
        about = {"id": self.id, "base": self.base, "skills": self.skills, "parents": list(self.parents)}
        write_safetensors(path, tensors, {"format": FORMAT, "about": json.dumps(about, sort_keys=True)})


def read_plugin(path: Path) -> Plugin:
    """Raises NetsukeError for files that hold no plugin, factors without their other half, and NaN."""
    asked, meta = f"load {path.name}", read_header(path).metadata
    try:
        about = json.loads(meta.get("about", ""))
        known = {"id": str(about["id"]), "base": str(about["base"]), "parents": tuple(map(str, about["parents"]))}
        skills = {str(k): float(v) for k, v in about["skills"].items()}
        if not all(map(math.isfinite, skills.values())) or len(known["id"]) > 200:
            raise ValueError("a score is no finite number, or the id endless")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise NetsukeError(asked, "it says nothing about a plugin", f"a file of format {FORMAT!r}") from e
    file = WeightFile(path)
    tensors = {name: file.get(name) for name in file.names()}
    for name, t in tensors.items():
        if t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise NetsukeError(asked, f"{name} is stored as {t.dtype}".replace("torch.", ""), ", ".join(FLOATS))
        check_finite(name, t, path)
    key, spread, thin = tensors.pop("key", None), tensors.pop("spread", None), {}
    for name in sorted({n.rpartition(".")[0] for n in tensors}):
        pair = tensors.get(f"{name}.first"), tensors.get(f"{name}.second")
        if any(t is None or t.ndim != 2 for t in pair) or pair[0].shape[0] != pair[1].shape[1]:
            raise NetsukeError(asked, f"{name} has no pair of factors that fit", "first (r, I) and second (O, r)")
        thin[name] = pair
    if (key is None) != (spread is None) or (
        key is not None and (key.ndim != 1 or spread.shape != (len(key), len(key)))
    ):
        raise NetsukeError(asked, "key and spread of its texts do not fit each other", "(C,) and (C, C), or neither")
    return Plugin(thin=thin, skills=skills, key=key, spread=spread, **known)


def shared(model: Llama) -> Llama:
    """A model of its own modules around the very same tensors and linear maps."""
    kept = [*model.linears().values(), *model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in kept})


def attach(model: Llama, plugin: Plugin, base: str | None = None) -> Llama:
    """`model` with a plugin beside its maps; nothing of it is copied or changed. `base` is its fingerprint, if it is known.

    Raises NetsukeError for a plugin of another base, for maps that the model does not have, and as `Adapter`.
    """
    check_base(repr(plugin.id), plugin.base, fingerprint(model) if base is None else base)
    out, maps = shared(model), model.linears()
    for name, (first, second) in plugin.thin.items():
        if name not in maps:
            raise NetsukeError(
                f"attach {plugin.id!r}", f"it stands beside {name[:60]!r}, which the model lacks", "its own base"
            )
        out.replace(name, Adapter(maps[name], Dense(first), Dense(second)))
    return out


def thin_of(model: Llama) -> Thin:
    """Copies of the factors of all adapters in a model."""
    maps = {n: m for n, m in model.linears().items() if isinstance(m, Adapter)}
    return {n: (m.first.to_dense().detach().clone(), m.second.to_dense().detach().clone()) for n, m in maps.items()}


def burned(model: Llama, plugin: Plugin) -> Llama:
    """A dense float32 model that answers as `attach` does, to rounding; maps without a plugin are the base's own."""
    out = attach(model, plugin)
    for name, layer in out.linears().items():
        if isinstance(layer, Adapter):
            out.replace(name, layer.merged())
    return out


def merge(
    plugins: Sequence[Plugin], weights: Sequence[float], name: str, how: str = "products", rank: int | None = None
) -> Plugin:
    """Σ w_i · plugin_i of one base (see above). `rank` cuts the sum of products to the nearest maps of that rank.

    Raises NetsukeError for plugins of different bases or maps of different shapes, unequal ranks where factors are averaged,
    and as many weights as there are plugins.
    """
    asked = f"merge {' and '.join(p.id for p in plugins)}"
    if how not in HOWS:
        raise NetsukeError(asked, f"how={how!r}", ", ".join(HOWS))
    if not plugins or len(plugins) != len(weights) or not all(map(math.isfinite, weights)):
        raise NetsukeError(asked, f"{len(plugins)} plugins and weights {list(weights)}", "one finite weight for each")
    if rank is not None and (rank < 1 or how == "factors"):
        raise NetsukeError(asked, f"rank {rank} with how={how!r}", "1 or more, for products")
    for p in plugins[1:]:
        check_base(repr(p.id), p.base, plugins[0].base)
    thin: Thin = {}
    for n in dict.fromkeys(n for p in plugins for n in p.thin):
        pairs = [(w, *p.thin[n]) for p, w in zip(plugins, weights) if n in p.thin]
        shapes = {(b.shape[0], a.shape[1]) for _, a, b in pairs}
        if len(shapes) > 1:
            raise NetsukeError(
                asked, f"{n} is {' and '.join(f'{o} by {i}' for o, i in sorted(shapes))}", "maps of one shape"
            )
        thin[n] = _averaged(pairs, asked, n) if how == "factors" else _stacked(pairs, rank)
    kept = [p for p in plugins if p.key is not None and p.spread is not None]
    found = {
        n: torch.stack([getattr(p, n) for p in kept]).mean(0) for n in ("key", "spread") if len(kept) == len(plugins)
    }
    skills = {s: v for p, w in zip(plugins, weights) if w > 0 for s, v in p.skills.items()}
    return Plugin(name, plugins[0].base, thin, skills, tuple(p.id for p in plugins), **found)


def _averaged(pairs: list[tuple[float, Tensor, Tensor]], asked: str, name: str) -> tuple[Tensor, Tensor]:
    ranks = [len(a) for _, a, _ in pairs]
    if len(set(ranks)) > 1:
        raise NetsukeError(asked, f"ranks {ranks} at {name}", "one rank where factors are averaged", "how='products'")
    first = sum(math.copysign(math.sqrt(abs(w)), w) * a for w, a, _ in pairs)  # the sign on one side only
    return first, sum(math.sqrt(abs(w)) * b for w, _, b in pairs)


def _stacked(pairs: list[tuple[float, Tensor, Tensor]], rank: int | None) -> tuple[Tensor, Tensor]:
    first, second = torch.cat([a for _, a, _ in pairs]), torch.cat([w * b for w, _, b in pairs], 1)
    if rank is None or rank >= len(first):
        return first, second
    left, right = torch.linalg.qr(second.double()), torch.linalg.qr(first.double().T)
    u, s, vt = svd(left.R @ right.R.T, rank)  # no larger than the ranks: the SVD of the whole product
    return tuple(t.float().contiguous() for t in balanced(s[:, None] * vt @ right.Q.T, left.Q @ u))


@torch.no_grad()
def mean_embedding(model: Llama, ids: Tensor) -> Tensor:
    """Mean row of the embedding table over the tokens of texts (N, T), each text normed to length 1: (N, C)."""
    return F.normalize(model.embed.rows(ids).double().mean(1), dim=-1).float()


def text_key(model: Llama, ids: Tensor) -> dict[str, Tensor]:
    """The `key` and `spread` of texts (N, T)."""
    rows = mean_embedding(model, ids).double()
    off = rows - rows.mean(0)
    return {"key": rows.mean(0).float(), "spread": (off.T @ off / len(rows)).float()}


class Rack:
    """Plugins on one base. `choose` names the plugin whose key is nearest, with the mean of all spreads as measure (the rule of
    linear discriminants, Fisher 1936). `trace` lists what answered, in order.

    Raises NetsukeError for plugins without a key, of another base or of one id.
    """

    def __init__(self, base: Llama, plugins: Sequence[Plugin]):
        self.base, self.trace = base, []
        sha = fingerprint(base)
        self.models: dict[str, Llama] = {}
        for p in plugins:
            if p.key is None or p.spread is None:
                raise NetsukeError(
                    f"rack {p.id!r}", "it has no key", "plugins trained with texts", "text_key(base, texts)"
                )
            if (p.key.shape, p.spread.shape) != ((base.cfg.width,), (base.cfg.width, base.cfg.width)):
                found = f"its key is of {list(p.key.shape)} numbers, its spread of {list(p.spread.shape)}"
                raise NetsukeError(f"rack {p.id!r}", found, f"the base's width, {base.cfg.width}")
            if p.id in self.models:
                raise NetsukeError(f"rack {p.id!r}", "two plugins have this id", "ids of their own")
            self.models[p.id] = attach(base, p, sha)
        self.root, _ = safe_cholesky(torch.stack([p.spread.double() for p in plugins]).mean(0), RIDGE)
        self.keys = self.even(torch.stack([p.key for p in plugins]))

    def even(self, rows: Tensor) -> Tensor:
        """Embeddings (N, C) in the measure of the spreads, float64."""
        return torch.linalg.solve_triangular(self.root, rows.double().T, upper=False).T

    def distance(self, ids: Tensor) -> Tensor:
        """From texts (N, T) to every plugin's key: (N, plugins)."""
        return torch.cdist(self.even(mean_embedding(self.base, ids)), self.keys)

    def choose(self, ids: Tensor) -> list[str]:
        """For each text of (N, T) the id of its plugin."""
        names = list(self.models)
        return [names[i] for i in self.distance(ids).argmin(1).tolist()]

    @torch.no_grad()
    def __call__(self, ids: Tensor, prompt: int | None = None) -> Tensor:
        """Logits (N, T, V), each text by the plugin that its first `prompt` tokens (default: all) choose."""
        chosen = self.choose(ids[:, :prompt])
        self.trace += chosen
        out = None
        for name in dict.fromkeys(chosen):
            rows = torch.tensor([i for i, c in enumerate(chosen) if c == name])
            part = self.models[name](ids[rows])
            out = part.new_empty(len(ids), *part.shape[1:]) if out is None else out
            out[rows] = part
        return out

    def bytes(self) -> int:
        """Bytes of the base and of all thin factors, every shared tensor counted once."""
        tensors = {t.data_ptr(): t.nbytes for m in (self.base, *self.models.values()) for t in m.state_dict().values()}
        return sum(tensors.values())


def adapted(model: Llama, names: Mapping[str, LinearBase], rank: int, seed: int) -> Llama:
    """A shared model with fresh thin factors at these maps: first from N(0, 1/I), second zero, so that it answers as before."""
    out, rng = shared(model), torch.Generator().manual_seed(seed)
    for name, base in names.items():
        first = torch.randn(rank, base.ins, generator=rng) / math.sqrt(base.ins)
        out.replace(name, Adapter(base, Dense(first), Dense(torch.zeros(base.outs, rank))))
    return out
