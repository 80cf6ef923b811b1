"""Which executor runs a model, and its opening: the engine in C, the integer-only decoder, or PyTorch.

native    the engine (runtime/engine.py); for an artifact whose activations stand on static grids, the integer-only decoder:
          the engine computes between its maps in floats, which would be another model
integer   the integer-only decoder (runtime/integer_engine.py), and nothing else
torch     the reference runtime
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from netsuke.errors import NetsukeError
from netsuke.models.files import read_json
from netsuke.models.places import MANIFEST
from netsuke.runtime.engine import Engine, check_cache, check_runs, find_artifact

if TYPE_CHECKING:
    from netsuke.runtime.integer_engine import IntegerEngine

BACKENDS = ("native", "integer", "torch")


def has_static_grids(model: str | Path) -> bool:
    """Whether a model is an artifact with static grids at sites of its activations. Without PyTorch."""
    folder = find_artifact(model)
    return folder is not None and _static(read_json(folder / MANIFEST))


def _static(manifest: dict[str, Any]) -> bool:
    sites = manifest.get("sites")
    return isinstance(sites, dict) and any(isinstance(s, dict) and s.get("kind") == "static" for s in sites.values())


def executor_of(model: str | Path, backend: str = "native") -> str:
    """What runs `model` under --backend `backend`: "native" (the engine), "integer" or "torch".

    Raises NetsukeError for an unknown backend, for "integer" and a model without static grids, and for "native" and an
    artifact that only the PyTorch runtime runs.
    """
    if backend not in BACKENDS:
        raise NetsukeError(f"run with the backend {backend!r}", "there is no such backend", ", ".join(BACKENDS))
    if backend == "torch":
        return backend
    folder = find_artifact(model)
    manifest = read_json(folder / MANIFEST) if folder else {}
    if _static(manifest):
        return "integer"
    if backend == "native":
        check_runs(manifest, f"run {model}")
        return backend
    from netsuke.models.load import find

    find(model)  # what is not there at all is refused as such
    raise NetsukeError(
        f"run {model} in integers", "its activations have no static grids", "an artifact of the method mobilequant",
        f"netsuke compress {model} --method mobilequant --data TEXT -o NAME.netsuke",
    )  # fmt: skip


def open_executor(
    model: str | Path, backend: str = "native", *, context: int | None = None, slots: int = 1,
    threads: int | None = None, kv: str = "float16",
) -> Engine | IntegerEngine:  # fmt: skip
    """`model` opened by the engine or by the integer-only decoder, as `executor_of` says ("torch" is neither). The decoder has
    one thread and int8 keys and values, whatever `threads` and `kv` say. Raises NetsukeError as both do."""
    if executor_of(model, backend) == "native":
        return Engine.load(model, context=context, slots=slots, threads=threads, kv=kv)
    from netsuke.runtime.integer_engine import IntegerEngine

    check_cache(kv)
    return IntegerEngine.load(model, context=context, slots=slots)
