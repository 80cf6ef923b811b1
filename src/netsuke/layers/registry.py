"""Kinds of linear maps by name: rebuilds an empty layer from the spec it wrote, before its tensors are loaded."""

from __future__ import annotations

from typing import Any

from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense, LinearBase


def kinds() -> dict[str, type[LinearBase]]:
    """kind -> class with `from_spec(spec, outs, ins, bias)`."""
    from netsuke.layers.adapter import Adapter
    from netsuke.layers.lowrank import LowRank
    from netsuke.layers.quantized import QuantLinear
    from netsuke.layers.sparse import InputSparse

    return {"dense": Dense, "quant": QuantLinear, "lowrank": LowRank, "sparse": InputSparse, "adapter": Adapter}


def layer_from_spec(spec: Any, outs: int, ins: int, bias: bool) -> LinearBase:
    """The empty (outs, ins) layer that `layer.spec()` described.

    Raises NetsukeError for an unknown kind and for settings that the kind does not have.
    """
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if kind == "dense":  # the common kind must not need the modules of the others
        return Dense.from_spec(spec, outs, ins, bias)
    known = kinds()
    if not isinstance(kind, str) or kind not in known:
        raise NetsukeError("build a layer", f"unknown kind {kind!r}", ", ".join(sorted(known)))
    try:
        return known[kind].from_spec(spec, outs, ins, bias)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as e:
        found = f"settings {str(spec)[:200]} ({str(e)[:200]})"
        raise NetsukeError(f"build a {kind} layer", found, f"the settings of {kind}") from e


def layer_bytes(spec: dict, outs: int, ins: int, bias: bool) -> int:
    """Bytes of the layer that `spec` describes, without allocating it."""
    import torch

    with torch.device("meta"):
        return layer_from_spec(spec, outs, ins, bias).bytes()
