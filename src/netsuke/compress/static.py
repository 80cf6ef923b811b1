"""Which tensor of a decoder gets how many bits, the static ranges of calibration, and the quantized model made of both.

    weights       W8A8: 8 bits, one scale per map; W4A8: 4 bits, one per row; `down` always per row; symmetric
    8-bit sites   norm outputs, q, k, v before and after rotation, heads, gate, sigmoid, silu, up, hidden
    16-bit sites  the residual stream and what is added to it (o, down), attention's logits and weights
    norm weights  16 bits; embedding and head 8 bits per row

Every site is quantized once, where it is produced: what reads it takes it as it is. SiLU is x · sigmoid(x), both parts
quantized. ("MobileQuant", 2024: the map is what makes a decoder run on an NPU.) The result is an ordinary Llama: QuantLinear
maps and a StaticGrid at every site.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from netsuke.compress.equivalent import weights_of
from netsuke.compress.fake_quant import Per, freeze, weight_codes
from netsuke.compress.quantize import quantize_linear
from netsuke.errors import NetsukeError
from netsuke.layers.static import StaticGrid, snap
from netsuke.measure.activations import Range, tapped
from netsuke.models.llama import LINEARS, SITES, Llama
from netsuke.models.static_sites import standing_grids
from netsuke.tasks.base import Task, run_calibration

WIDE = ("attn_stream", "scores", "probs", "o", "mlp_stream", "down")  # the sites that 8 bits break
KNOWN = {"probs": (0.0, 1.0), "sigmoid": (0.0, 1.0)}  # ranges that need no text
SCHEMES = {"w8a8": 8, "w4a8": 4}
Ranges = Mapping[str, tuple[float, float]]  # "blocks.0.hidden" -> low, high


@dataclass(frozen=True)
class BitMap:
    """Bits of weights and sites, the same for every block.

    weights   bits of the seven maps
    per       maps that have one scale for all rows: "tensor"; the others have one per row
    wide      sites of 16 bits; all others have 8
    floats    sites that stay as they are (to measure one site at a time)
    """

    weights: int
    per: Mapping[str, Per] = field(default_factory=dict)
    wide: tuple[str, ...] = WIDE
    floats: tuple[str, ...] = ()

    @classmethod
    def of(cls, scheme: str, wide: Iterable[str] = WIDE) -> BitMap:
        """The map of "w8a8" or "w4a8". Raises NetsukeError for another scheme or for a site that there is none of."""
        if scheme not in SCHEMES:
            raise NetsukeError("quantize to static integers", f"scheme {scheme!r}", ", ".join(SCHEMES))
        for site in wide:
            if site not in SITES:
                raise NetsukeError("give a site 16 bits", f"there is no site {site!r}", ", ".join(SITES))
        whole = {n: "tensor" for n in LINEARS if n != "down"} if scheme == "w8a8" else {}
        return cls(SCHEMES[scheme], whole, tuple(wide))

    def per_of(self, name: str) -> Per:
        return self.per.get(name, "row")

    def sites(self) -> dict[str, int]:
        return {s: 16 if s in self.wide else 8 for s in SITES if s not in self.floats}


def reason_against(model: Any) -> str | None:
    """Why a model cannot be quantized this way, naming the layer, or None."""
    if not isinstance(model, Llama):
        return f"{type(model).__name__} is no Llama-style decoder"
    for i, shape in enumerate(model.cfg.blocks):
        if shape.experts:
            return f"blocks.{i} is a mixture of experts: its router and experts have no static ranges here"
    if model.cfg.qk_norm:
        return "blocks.0.q and blocks.0.k are normed before rotation, for which there is no integer form here"
    for name, layer in model.linears().items():
        if (kind := layer.spec()["kind"]) != "dense":
            return f"{name} is stored as {kind} already: quantize the dense model it came from"
    if standing_grids(model):
        return f"{next(iter(standing_grids(model)))} has a grid already"
    return None


@torch.no_grad()
def calibrate(model: Llama, task: Task, windows: int) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of every site over `windows` rows of the train split.

    Raises NetsukeError that names the first site which saw no token, or one that is not finite.
    """
    seen = {(block, site): Range() for block in model.blocks for site in SITES if site not in KNOWN}
    with tapped(sites=seen):
        run_calibration(model, task, windows)
    out = {}
    for (block, site), values in seen.items():
        name = f"blocks.{block.layer}.{site}"
        if not values.rows:
            raise NetsukeError(
                f"calibrate {name}", "calibration saw 0 tokens for this site", "", "--data with more text"
            )
        if not (math.isfinite(values.low) and math.isfinite(values.high)):
            raise NetsukeError(f"calibrate {name}", f"values from {values.low} to {values.high}", "finite activations")
        out[name] = values.low, values.high
    return out | {f"blocks.{i}.{site}": ends for i in range(len(model.blocks)) for site, ends in KNOWN.items()}


def norm_on_grid(weight: Tensor) -> Tensor:
    """A norm's weights on a symmetric 16-bit grid."""
    return snap(weight, (weight.abs().amax() / 32767).clamp(min=1e-30), 0, 16)


def grids(ranges: Ranges, bits: BitMap, blocks: int) -> dict[str, StaticGrid]:
    """The grids of all sites. Raises NetsukeError, with the site's name, for a missing or an empty range."""
    out = {}
    for i in range(blocks):
        for site, b in bits.sites().items():
            name = f"blocks.{i}.{site}"
            if name not in ranges:
                raise NetsukeError("quantize to static ranges", f"no range is given for {name}", "one for every site")
            out[name] = freeze(*ranges[name], b, name)
    return out


@torch.no_grad()
def quantized(
    model: Llama, ranges: Ranges, bits: BitMap, weights: list[dict[str, Tensor]] | None = None,
    clips: list[dict[str, Tensor]] | None = None,
) -> Llama:  # fmt: skip
    """A copy of `model` with integer weights and static grids.

    weights   of every block by state name (compress/equivalent.py), default the model's own
    clips     of every block by map, as `fake_quant.clip_start` makes them
    """
    out = copy.deepcopy(model)
    sites = grids(ranges, bits, len(out.blocks))
    for i, block in enumerate(out.blocks):
        w = weights[i] if weights else weights_of(block)
        for norm in ("attn_norm", "mlp_norm"):
            getattr(block, norm).weight.copy_(norm_on_grid(w[f"{norm}.weight"]))
        for name in LINEARS:
            clip = clips[i].get(name) if clips else None
            codes = weight_codes(w[f"{name}.weight"], bits.weights, bits.per_of(name), clip, name=f"blocks.{i}.{name}")
            bias = w.get(f"{name}.bias")
            setattr(block, name, codes.layer(None if bias is None else bias.clone()))
    for name in ("embed", "head"):
        if (table := getattr(out, name)) is not None:
            out.replace(name, quantize_linear(table, 8, table.ins, "rtn", name=name))
    out.stand(sites)
    return out


@torch.no_grad()
def sensitivity(
    model: Llama, task: Task, ranges: Ranges, split: str = "validation", limit: int | None = None
) -> list[dict[str, Any]]:
    """What each kind of site costs on its own: [{site, nats at 8 bits, nats at 16 bits}], worst first; weights stay float.

    Answers "which tensor needs 16 bits?". The nats are mean losses of `task` over those of the model as it is.
    """
    probe, base = copy.deepcopy(model), math.log(task.score(model, split, limit))
    rows = []
    for site in SITES:
        row: dict[str, Any] = {"site": site}
        for b in (8, 16):
            probe.stand({
                f"blocks.{i}.{site}": freeze(*ranges[f"blocks.{i}.{site}"], b) for i in range(len(probe.blocks))
            })  # fmt: skip
            row[f"nats_{b}"] = math.log(task.score(probe, split, limit)) - base
        rows.append(row)
    return sorted(rows, key=lambda r: -r["nats_8"])
