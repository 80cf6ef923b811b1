"""`netsuke compress MODEL --method quantize:bits=4 -o out.netsuke`: one method, or several in order."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command("compress", help="Apply methods in order, without a budget.")
    def command(
        model: Annotated[str, typer.Argument(help="artifact, Hugging Face folder, llama2.c file, or 'pycode'")],
        method: Annotated[list[str], typer.Option(help="NAME or NAME:knob=value,knob=value; repeatable, in order")],
        out: Annotated[str, typer.Option("-o", "--out", help="the artifact to write, NAME.netsuke")],
        data: Annotated[str | None, typer.Option(help="UTF-8 text file or folder, or python-library")] = None,
        context: Annotated[int | None, typer.Option(help="tokens per window")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    ) -> None:
        from rich.console import Console
        from rich.table import Table

        from netsuke.compress import compress
        from netsuke.devices import format_bytes

        note = Console(stderr=True)
        with note.status("reading") as status:
            got = compress(
                model, method, out=out, data=data, context=context, on_progress=lambda name, *_: status.update(name)
            )
        if as_json:
            print(json.dumps(got))
            return
        table = Table("", "before", "after")
        table.add_row("bytes", format_bytes(got["bytes_before"]), format_bytes(got["bytes_after"]))
        table.add_row(
            "read per decoded token, blocks", format_bytes(got["traffic_before"]), format_bytes(got["traffic_after"])
        )
        table.add_row(f"{got['metric']} (validation)", f"{got['before']:.4g}", f"{got['after']:.4g}")
        Console().print(table)
        print(f"artifact  {got['artifact']}")
