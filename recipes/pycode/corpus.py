"""The training text of pycode: the standard library's train split, its prose and tests, and installed packages.

Held-out text must not leak through copies (setuptools carries distutils, typing_extensions carries typing): a training
file that shares more than a tenth of its long lines with the held-out modules is left out, and so are the library's own
tests of held-out modules.
"""

from __future__ import annotations

import random
import re
import site
from pathlib import Path

from netsuke.data import pysource

# Permissively licensed (BSD, MIT, Apache-2.0, PSF) packages that this project's environment installs anyway,
# with the share of each that is read: the largest would otherwise drown the library's own style.
PACKAGES = {
    "numpy": 1.0, "networkx": 1.0, "matplotlib": 0.8, "sklearn": 0.7, "scipy": 0.35, "sympy": 0.25, "torch": 0.15,
    "transformers": 0.06, "fontTools": 0.6, "pygments": 0.1, "mpmath": 1.0, "hypothesis": 1.0, "pydantic": 1.0,
    "_pytest": 1.0, "rich": 1.0, "typer": 1.0, "click": 1.0, "jinja2": 1.0, "huggingface_hub": 0.5, "fsspec": 1.0,
    "tqdm": 1.0, "PIL": 1.0, "joblib": 1.0, "filelock": 1.0, "yaml": 1.0, "dateutil": 1.0, "packaging": 1.0,
    "anyio": 1.0, "msgspec": 1.0, "safetensors": 1.0, "markdown_it": 1.0, "narwhals": 0.3,
}  # fmt: skip
# The evaluation is on the standard library, so its own train split is read more than once; the second phase, in which
# the rate falls, reads little else (a last phase on the target's own kind of text is the usual way to finish).
LIBRARY_EPOCHS = (3, 2)
OTHER_SHARE = (1.0, 0.12)
BAD_PATH = re.compile(r"(_generated|_tables?|_data|lextab|parsetab|unicode_?data|_builtins|emoji_codes|_unicode)")


def long_lines(text: str) -> set[str]:
    return {s for line in text.splitlines() if len(s := line.strip()) >= 30}


def held_out_names() -> set[str]:
    names = set()
    for split in ("validation", "test"):
        for path, _ in pysource.modules(split):
            parts = [p for p in path.removesuffix(".py").split("/") if p != "__init__"]
            names.add(parts[-1].strip("_"))
    return names


def is_table(text: str) -> bool:
    """Long runs of digits and quotes teach nothing about code."""
    letters = sum(c.isalpha() or c.isspace() for c in text[:20000])
    return letters < 0.6 * min(len(text), 20000)


def training_files(seed: int = 0, phase: int = 0) -> tuple[list[str], dict[str, int]]:
    """Texts of one pass of a phase in shuffled order, and bytes per source for the log."""
    rng = random.Random(seed)
    held = set().union(*(long_lines(t) for s in ("validation", "test") for _, t in pysource.modules(s)))
    names, out, seen, bytes_of = held_out_names(), [], set(), {}

    def add(text: str, source: str, times: int = 1, check: bool = True) -> None:
        lines = long_lines(text)
        if check and (not lines or len(lines & held) > 0.1 * len(lines) or is_table(text) or hash(text) in seen):
            return
        seen.add(hash(text))
        out.extend([text] * times)
        bytes_of[source] = bytes_of.get(source, 0) + times * len(text.encode())

    def read(path: Path) -> str:
        return path.read_text(encoding="utf-8", errors="replace")

    for _, text in pysource.modules("train"):
        add(text, "standard library", LIBRARY_EPOCHS[phase])
    root = pysource.library_root()
    for path in sorted((root / "pydoc_data").glob("*.py")):
        add(read(path).encode().decode("unicode_escape", "replace"), "library prose", 2)
    for path in pysource.python_files(root / "test", {"__pycache__"}):
        stem = path.stem.removeprefix("test_").strip("_")
        if not any(stem == n or stem.startswith(n + "_") for n in names):
            add(read(path), "library tests")
    packages = Path(site.getsitepackages()[0])
    for package, share in sorted(PACKAGES.items()):
        for path in pysource.python_files(packages / package, {"__pycache__", "_vendor", "vendor", "tests/data"}):
            in_tests = bool({"tests", "test"} & set(path.relative_to(packages).parts))
            if BAD_PATH.search(path.name) or path.stat().st_size > 200_000:
                continue
            if rng.random() < OTHER_SHARE[phase] * share * (0.4 if in_tests else 1.0):
                add(read(path), package)
    rng.shuffle(out)
    return out, bytes_of
