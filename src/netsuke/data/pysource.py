"""The Python standard library as a text corpus: real, on every machine, and split so that anybody can check a figure.

A module belongs to a split by the sha256 of its path below the library's root (`json/decoder.py`), so the split is the
same on every machine and in every Python version: 5 % test, 5 % validation, the rest train. Left out: test packages
(many systems do not install them), generated tables (`encodings`, `lib2to3`'s grammars, build configuration).
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

from netsuke.errors import NetsukeError

SKIP = {
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data",
    "lib2to3", "idlelib", "msilib", "turtledemo", "ensurepip", "lib-dynload",
}  # fmt: skip
SPLITS = ("train", "validation", "test")


def library_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def split_of(module_path: str) -> str:
    """The split of a module by its path relative to the library ("json/decoder.py")."""
    bucket = int(hashlib.sha256(module_path.encode()).hexdigest(), 16) % 100
    return "test" if bucket < 5 else "validation" if bucket < 10 else "train"


def python_files(root: Path, skip: set[str] = SKIP) -> list[Path]:
    """All .py files below `root`, sorted by path, without the folders named in `skip` and build configuration."""

    def wanted(p: Path) -> bool:
        folders = p.relative_to(root).parts[:-1]
        generated = p.name.startswith("_sysconfigdata") or any(f.startswith("config-") for f in folders)
        return not generated and not skip.intersection(folders)

    return sorted(p for p in root.rglob("*.py") if wanted(p))


def modules(split: str) -> list[tuple[str, str]]:
    """(path, text) of the standard library's modules of one split, sorted by path.

    Raises NetsukeError when this interpreter carries no source files (a frozen or zipped library).
    """
    root, out = library_root(), []
    for path in python_files(root):
        name = path.relative_to(root).as_posix()
        if split_of(name) == split:
            out.append((name, path.read_text(encoding="utf-8", errors="replace")))
    if not out:
        raise NetsukeError(
            "read the standard library as text", f"no .py files of the {split} split below {root}",
            "an interpreter that has its library as source files", "another Python, or --data with your own text",
        )  # fmt: skip
    return out


def text(split: str) -> str:
    """All modules of one split as one text."""
    return "\n".join(body for _, body in modules(split))
