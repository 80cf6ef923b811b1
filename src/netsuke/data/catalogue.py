"""Where real data sets are found: the folder named by $NETSUKE_DATA. Third-party data never travels with the package."""

from __future__ import annotations

import os
from pathlib import Path

from netsuke.errors import NetsukeError


def data_root() -> Path | None:
    root = os.environ.get("NETSUKE_DATA")
    return Path(root) if root else None


def missing(needs: tuple[str, ...]) -> list[str]:
    """Those of `needs` (paths below the data root) that are not there."""
    root = data_root()
    return [n for n in needs if root is None or not (root / n).exists()]


def find(name: str) -> Path:
    """The file or folder `name` below the data root. Raises NetsukeError that says what to set."""
    if missing((name,)):
        where = data_root() or "NETSUKE_DATA, which is not set"
        raise NetsukeError(f"find the data {name}", f"it is not below {where}", "", "NETSUKE_DATA=FOLDER netsuke …")
    return data_root() / name
