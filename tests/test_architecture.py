"""The tree is the architecture: imports go one way, starting is quick, files stay readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/netsuke"
TIERS = [
    {"errors", "verb", "allocate"}, {"devices", "data", "layers", "measure"}, {"tasks", "models", "graph"},
    {"compress", "train", "protect"},
    {"runtime", "export", "fleet"}, {"apps"}, {"systems"},
]  # fmt: skip
VERB_TIER = 4.5  # files directly below netsuke/


def tier(module: str) -> float | None:
    parts = module.split(".")
    if parts[0] != "netsuke" or len(parts) == 1:
        return None
    for level, names in enumerate(TIERS):
        if parts[1] in names:
            return level
    return VERB_TIER


def imported(path: Path) -> set[str]:
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            out.add(node.module)
    return out


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_imports_go_one_way(path):
    own = tier(".".join(("netsuke", *path.relative_to(SOURCE).with_suffix("").parts)))
    if path.name == "command.py":  # the command of a verb that shares its name with a folder, or of an application
        own = max(own, VERB_TIER)
    upward = sorted(m for m in imported(path) if own is not None and (tier(m) or 0) > own)
    assert not upward, f"{path.name} imports upwards: {upward}"


def test_a_known_upward_import_would_be_seen(tmp_path):
    (tmp_path / "x.py").write_text("from netsuke.systems import modegpt\n")
    assert any(tier(m) == len(TIERS) - 1 for m in imported(tmp_path / "x.py"))


@pytest.mark.parametrize("module", ["netsuke", "netsuke.cli", "netsuke.devices"])
def test_starting_loads_nothing_heavy(module):
    code = f"import {module}, sys; print([m for m in ('torch', 'scipy', 'matplotlib', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_long_files_give_their_reason():
    for path in SOURCE.rglob("*.py"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 500 or "long because" in "\n".join(lines[:15]), f"{path.name} has {len(lines)} lines"
