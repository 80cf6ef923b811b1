"""`netsuke methods`: the published techniques that can be handed to a verb, with their knobs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from netsuke.verb import verb


@verb
def methods() -> list[dict[str, Any]]:
    """One row per method: name, paper, whether it trains, whether it needs data, knobs with their defaults."""
    from netsuke.compress.method import registry

    return [
        {"name": name, "paper": kind.paper, "trains": kind.trains, "needs_data": kind.needs_data,
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

        table = Table("method", "paper", "needs data", "knobs")
        for row in rows:
            knobs = ", ".join(f"{k}={v}" for k, v in row["knobs"].items())
            table.add_row(row["name"], row["paper"], "yes" if row["needs_data"] else "no", knobs)
        Console().print(table)
