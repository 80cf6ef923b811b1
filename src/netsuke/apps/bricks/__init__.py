"""Bricks: which neurons of a language model do which job; run, cut out, plug in, merge, edit and trace them.

    from netsuke.apps import bricks
    bricks.find("model.netsuke", skills="skills/")      texts of each skill name the neurons that answer to it
    bricks.run("model.netsuke", "2 + 2 =", only=["math"])

store.py       a model with its manifest and the plugin files beside it
texts.py       what skills are found and judged on, what edits must leave alone
neurons.py     find, list, run, prune, trace
plugins.py     add, merge, edit
command.py     `netsuke bricks …`

Each command is a function of the same name here and returns what `--json` prints. Nothing heavy is imported before one is used.
"""

from __future__ import annotations

import importlib
from typing import Any

COMMANDS = {
    "find": "neurons.find", "list": "neurons.list_bricks", "run": "neurons.run", "prune": "neurons.prune",
    "trace": "neurons.trace", "add": "plugins.add", "merge": "plugins.merge_bricks", "edit": "plugins.edit",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in COMMANDS:
        module, _, function = COMMANDS[name].partition(".")
        return getattr(importlib.import_module(f"netsuke.apps.bricks.{module}"), function)
    raise AttributeError(f"module 'netsuke.apps.bricks' has no attribute {name!r}")
