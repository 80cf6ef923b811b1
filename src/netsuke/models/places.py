"""Names and versions of what an artifact holds, and where shipped models lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

FORMAT, VERSION, SUFFIX = "netsuke", 1, ".netsuke"
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
SHIPPED = Path(__file__).parents[1] / "weights"


def digest(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
