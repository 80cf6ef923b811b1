"""The commands of docs/microcontrollers.md do what the page says, in its order."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from netsuke.devices.board import missing_tools

PAGE = Path(__file__).parents[1] / "docs/microcontrollers.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder in which the page's Python has run."""
    folder = tmp_path_factory.mktemp("page")
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)[1].replace("range(40)", "range(12)")
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    return folder


def test_the_page_from_a_module_to_a_board(place):
    commands = re.findall(r"^\$ (.*)$", PAGE.read_text(), re.M)
    assert len(commands) == 5
    for line in commands:
        words = shlex.split(line)
        if "--emulate" in words and missing_tools():
            pytest.skip(f"needs {missing_tools()}")
        words = [sys.executable, "-m", "netsuke", *words[1:]] if words[0] == "netsuke" else words
        done = subprocess.run(words, cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert "passed" in done.stdout
