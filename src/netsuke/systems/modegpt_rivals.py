"""Rivals of MoDeGPT at equal parameters, for its claims.

The method is compress/modegpt.py, its mathematics compress/decompose.py. Rivals here are deliberately plain: the same
cuts chosen by weight norms and not compensated, and every matrix on its own replaced by a truncated SVD, of the weight
or of the weight whitened by its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from netsuke.compress import modegpt
from netsuke.compress.factorize import Factorize
from netsuke.layers.linear import Dense
from netsuke.models.llama import Llama
from netsuke.tasks.base import Task


def pruned_by_norm(model: Llama, per_block: Sequence[modegpt.Fractions]) -> Llama:
    """MoDeGPT's widths, but what stays is what has the largest weights, and nothing makes up for the rest."""
    return modegpt.assemble(
        model,
        {
            (layer, module): _norm_cut(model, layer, module, fraction)
            for layer, row in enumerate(per_block)
            for module, fraction in zip(modegpt.MODULES, row)
            if modegpt.widths_for(model.cfg, layer, module, fraction) < modegpt.full_width(model.cfg, layer, module)
        },
    )


def _norm_cut(model: Llama, layer: int, module: str, fraction: float) -> modegpt.Cut:
    block, cfg = model.blocks[layer], model.cfg
    width = modegpt.widths_for(cfg, layer, module, fraction)
    K, group = cfg.kv_heads, cfg.heads // cfg.kv_heads

    def taken(old: Dense, keep: Tensor, dim: int) -> Dense:
        bias = old.bias[keep] if dim == 0 and old.bias is not None else old.bias
        return Dense(old.weight.index_select(dim, keep).clone(), None if bias is None else bias.detach().clone())

    if module == "mlp":
        energy = block.gate.weight.square().sum(1) + block.up.weight.square().sum(1) + block.down.weight.square().sum(0)
        keep = energy.topk(width).indices.sort().values
        return {"hidden": width}, {n: taken(getattr(block, n), keep, int(n == "down")) for n in ("gate", "up", "down")}
    if module == "vo":
        D = block.v.outs // K
        out = block.o.weight.view(cfg.width, K, group, D).square().sum((0, 2))
        keep = (block.v.weight.square().sum(1).view(K, D) * out).topk(width, dim=1).indices.sort(dim=1).values
        rows, columns = _flat(keep, D, 1), _flat(keep, D, group)
        return {"value_dim": width}, {"v": taken(block.v, rows, 0), "o": taken(block.o, columns, 1)}
    R = block.q.outs // (2 * cfg.heads)
    energy_q = block.q.weight.square().sum(1).view(K, group, 2, R).sum((1, 2))
    energy_k = block.k.weight.square().sum(1).view(K, 2, R).sum(1)
    keep = (energy_q * energy_k).topk(width, dim=1).indices.sort(dim=1).values
    both = torch.cat((keep, keep + R), 1)
    linears = {"q": taken(block.q, _flat(both, 2 * R, group), 0), "k": taken(block.k, _flat(both, 2 * R, 1), 0)}
    return {"pairs": tuple(map(tuple, keep.tolist()))}, linears


def _flat(keep: Tensor, width: int, group: int) -> Tensor:
    """Columns kept per key head (K, r) -> row numbers of a matrix with `group` heads of `width` rows per key head."""
    starts = torch.arange(len(keep) * group) * width
    return (keep.repeat_interleave(group, 0) + starts[:, None]).flatten()


def svd_each(model: Llama, remove: float, task: Task | None = None, windows: int = 32) -> Llama:
    """Every matrix of the blocks as two factors with (1 − remove) of its parameters; with `task` the SVD is whitened by the
    inputs of that matrix on `windows` rows of the train split."""
    solver = "svd" if task is None else "whitened-svd"
    return Factorize(rank=1 - remove, solver=solver, only=("blocks.*",), calibration=windows).apply(model, task)
