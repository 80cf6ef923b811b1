"""The static ranges and the bit map of a quantized model as JSON: what a vendor's converter takes as encodings.

    act_ranges.json   {module: {input: [low, high], input2: …, output: …}}; what a module reads was quantized where it was made
    bitmap.json       {format, weights: {map: {bits, group}}, activations: {module: {input: bits, …}}}

Modules are the maps and norms of a block and what stands between them: rotations (q_turn, k_turn), the two products of
attention (scores, mix), softmax, the two parts of SiLU (sigmoid, silu), gated (silu · up), and the sums of the residual
stream (attn_add, mlp_add). The last block's mlp_add has no range of its output: the final norm reads it as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from netsuke.errors import NetsukeError
from netsuke.layers.static import StaticGrid
from netsuke.models.artifact import check_folder, write_texts
from netsuke.models.llama import Llama
from netsuke.models.load import Loaded
from netsuke.models.static_sites import static_sites

MODULES = {  # what each module reads and makes, by site; "next.…" is of the block after
    "attn_norm": ("attn_stream", "attn_in"),
    "q": ("attn_in", "q"), "k": ("attn_in", "k"), "v": ("attn_in", "v"),
    "q_turn": ("q", "q_rot"), "k_turn": ("k", "k_rot"),
    "scores": ("q_rot", "k_rot", "scores"), "softmax": ("scores", "probs"), "mix": ("probs", "v", "heads"),
    "o": ("heads", "o"), "attn_add": ("attn_stream", "o", "mlp_stream"),
    "mlp_norm": ("mlp_stream", "mlp_in"),
    "gate": ("mlp_in", "gate"), "up": ("mlp_in", "up"),
    "sigmoid": ("gate", "sigmoid"), "silu": ("gate", "sigmoid", "silu"), "gated": ("silu", "up", "hidden"),
    "down": ("hidden", "down"), "mlp_add": ("mlp_stream", "down", "next.attn_stream"),
}  # fmt: skip
FORMAT = "netsuke.ranges"


def modules_of(model: Llama) -> dict[str, dict[str, StaticGrid]]:
    """The grids of every module's inputs and output, for those sites that have one."""
    found, out = static_sites(model), {}
    for i in range(len(model.blocks)):
        for module, (*reads, makes) in MODULES.items():
            ends = {"input" if n == 0 else f"input{n + 1}": site for n, site in enumerate(reads)} | {"output": makes}
            grids = {}
            for end, site in ends.items():
                block = i + 1 if site.startswith("next.") else i
                if (grid := found.get(f"blocks.{block}.{site.removeprefix('next.')}")) is not None:
                    grids[end] = grid
            if grids:
                out[f"blocks.{i}.{module}"] = grids
    return out


def texts(model: Llama, asked: str = "export static ranges") -> dict[str, str]:
    """The two files by name. Raises NetsukeError for a model without static grids."""
    modules = modules_of(model)
    if not modules:
        raise NetsukeError(
            asked, "the model has none: its activations are floats", "a model quantized to static integers",
            "netsuke compress MODEL --method mobilequant --data TEXT -o NAME.netsuke",
        )  # fmt: skip
    specs = {name: m.spec() for name, m in model.linears().items()}
    weights = {
        name: {"bits": s["bits"], "group": s["group"]} if s["kind"] == "quant" else s for name, s in specs.items()
    }
    values: dict[str, Any] = {
        "act_ranges.json": {m: {end: list(g.range) for end, g in grids.items()} for m, grids in modules.items()},
        "bitmap.json": {
            "format": FORMAT, "weights": weights,
            "activations": {m: {end: g.bits for end, g in grids.items()} for m, grids in modules.items()},
        },
    }  # fmt: skip
    return {name: json.dumps(value, indent=1) + "\n" for name, value in values.items()}


def write(loaded: Loaded, out: Path) -> dict[str, Any]:
    """Writes the folder `out`, complete or not at all; one that this wrote before is replaced.

    Returns {folder, modules, ranges, bits: how many ranges have how many bits}. Raises NetsukeError for a model without
    static grids and for a place where something else is.
    """
    asked = f"export {loaded.source} as ranges"
    out, files = check_folder(out, asked, "bitmap.json", FORMAT), texts(loaded.model, asked)
    write_texts(out, files, asked)
    grids = [g for ends in modules_of(loaded.model).values() for g in ends.values()]
    counts = {f"{bits} bits": sum(g.bits == bits for g in grids) for bits in (8, 16)}
    return {"modules": len(modules_of(loaded.model)), "ranges": len(grids), "bits": counts}
