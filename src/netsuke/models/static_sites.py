"""Grids of activations at a model's sites: what an artifact keeps of them, and how they come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from netsuke.errors import NetsukeError
from netsuke.layers.static import StaticGrid, TokenGrid, grid_from_spec
from netsuke.models.llama import Llama


def standing_grids(model: Llama) -> dict[str, StaticGrid | TokenGrid]:
    """The grids that stand in a model, by site ("blocks.0.hidden"). Masks and listeners are none and are not stored."""
    return {
        f"blocks.{i}.{site}": function
        for i, block in enumerate(model.blocks)
        for site, function in block.sites.items()
        if isinstance(function, StaticGrid | TokenGrid)
    }


def static_sites(model: Llama) -> dict[str, StaticGrid]:
    """The static ones among them, which integer-only execution is made of."""
    return {name: grid for name, grid in standing_grids(model).items() if isinstance(grid, StaticGrid)}


def stand_static(model: Llama, specs: dict[str, Any], source: str | Path) -> None:
    """Puts the grids that `specs` describes into the model. Raises NetsukeError for a site or a grid that cannot be."""
    try:
        model.stand({name: grid_from_spec(spec) for name, spec in specs.items()})
    except NetsukeError as e:
        raise NetsukeError(f"load {source}", f"sites: {e.found}", e.allowed, e.attempt) from e
