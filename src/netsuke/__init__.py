"""netsuke: carve a neural network until it fits the device you carry.

`from netsuke import fit` gives the verb as a function; the same verbs are commands (`netsuke fit`, `python -m netsuke fit`).
Importing this package loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

VERBS = ("fit", "plan", "compress", "train", "run", "serve", "export", "bench", "reproduce", "devices", "methods")


def __getattr__(name: str) -> Any:
    if name in VERBS:
        return importlib.import_module(f"netsuke.{name}")
    raise AttributeError(f"module 'netsuke' has no attribute {name!r}")
