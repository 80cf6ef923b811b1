"""Tests marked `slow` (builds for other processors) run with `-m slow` or NETSUKE_SLOW=1."""

from __future__ import annotations

import os

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    asked = "slow" in item.config.option.markexpr or os.environ.get("NETSUKE_SLOW") == "1"
    if item.get_closest_marker("slow") and not asked:
        pytest.skip("takes a minute: -m slow or NETSUKE_SLOW=1")
