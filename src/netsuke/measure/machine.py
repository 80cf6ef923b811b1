"""What a measurement ran on: processor, versions, commit. Every report and result file carries it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from netsuke import __version__


def provenance() -> dict[str, Any]:
    """{netsuke, commit, python, torch, numpy, cpu, cores, date}; commit is None outside a checkout."""
    root = Path(__file__).parents[3]
    try:
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        commit = head.stdout.strip() or None
    except OSError:
        commit = None
    return {
        "netsuke": __version__, "commit": commit, "python": platform.python_version(), "torch": version("torch"),
        "numpy": version("numpy"), "cpu": cpu_name(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
