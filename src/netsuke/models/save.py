"""Saves a language model or an encoder as an artifact: a folder `NAME.netsuke/`, the same bytes for the same model.

weights.safetensors   every tensor under its name in the model's state
tokenizer.json|.bin   when the model has a tokenizer
manifest.json         format, version, config, spec of each linear map, grids of sites where activations are quantized, sha256
                      of each file, provenance, budget, facts
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from netsuke.models.artifact import check_writable, write_artifact, write_file
from netsuke.models.encoder import Encoder
from netsuke.models.llama import Llama
from netsuke.models.places import WEIGHTS
from netsuke.models.static_sites import standing_grids
from netsuke.models.tokenizer import Tokenizer
from netsuke.models.weights import check_finite, write_safetensors


def save_artifact(
    folder: Path,
    model: Llama | Encoder,
    tokenizer: Tokenizer | None,
    provenance: dict[str, Any],
    facts: dict[str, Any],
    budget: dict[str, Any] | None = None,
    verify: Callable[[Path], None] | None = None,
) -> Path:
    """Writes the artifact and returns its folder; `verify`, replacing and errors are those of `write_artifact`.

    Raises NetsukeError as well when a weight is NaN or infinite.
    """
    folder = check_writable(folder)
    state = model.state_dict()
    for name, tensor in state.items():
        check_finite(name, tensor, "the model to save")
    manifest = {
        "family": model.cfg.family, "config": msgspec.to_builtins(model.cfg),
        "layers": {name: layer.spec() for name, layer in model.linears().items()},
        "provenance": provenance, "budget": budget, "facts": facts,
    }  # fmt: skip

    if isinstance(model, Llama) and (sites := {name: grid.spec() for name, grid in standing_grids(model).items()}):
        manifest["sites"] = sites

    def fill(part: Path) -> None:
        write_safetensors(part / WEIGHTS, state, {"format": "pt"})
        if tokenizer is not None:
            write_file(part / tokenizer.file, tokenizer.to_bytes())

    return write_artifact(folder, manifest, fill, verify)
