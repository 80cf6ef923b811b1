"""`netsuke methods`: the published techniques that can be handed to a verb, with their knobs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from netsuke.verb import verb

GIVES = {"bytes": "fewer bytes", "traffic": "fewer bytes read per token", "loss": "less loss at the same size"}


@verb
def methods() -> list[dict[str, Any]]:
    """One row per method, in the order of the registry: name, paper, what it needs (data, training steps), what it gives
    (fewer "bytes", less "traffic" per decoded token, less "loss"), knobs with their defaults."""
    from netsuke.compress.method import registry

    return [
        {"name": name, "paper": kind.paper, "trains": kind.trains, "needs_data": kind.needs_data, "saves": kind.saves,
         "knobs": {k: v for k, v in kind().to_json().items() if k != "method"},
         "about": (kind.__doc__ or "").strip().splitlines()[0]}
        for name, kind in registry().items()
    ]  # fmt: skip


def register(app: typer.Typer) -> None:
    @app.command("methods", help="List the methods and their knobs.")
    def command(as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False) -> None:
        rows = methods()
        if as_json:
            print(json.dumps(rows))
            return
        from rich.console import Console
        from rich.table import Table

        table = Table("method", "needs", "gives", "paper", "knobs")
        for row in rows:
            knobs = ", ".join(f"{k}={v}" for k, v in row["knobs"].items())
            needs = [n for n, yes in (("text", row["needs_data"]), ("steps of training", row["trains"])) if yes]
            table.add_row(row["name"], ", ".join(needs) or "nothing", GIVES[row["saves"]], row["paper"], knobs)
        Console().print(table)
