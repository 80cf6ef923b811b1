"""`netsuke compress MODEL --method quantize:bits=4 -o out.netsuke`: one method, or several in order."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from netsuke.errors import NetsukeError


def register(app: typer.Typer) -> None:
    @app.command("compress", help="Apply methods in order, without a budget.")
    def command(
        model: Annotated[str, typer.Argument(help="artifact, Hugging Face folder, llama2.c file, or 'pycode'")],
        out: Annotated[str, typer.Option("-o", "--out", help="the artifact to write, NAME.netsuke")],
        method: Annotated[
            list[str] | None,
            typer.Option(help="NAME or NAME:knob=value,knob=value; repeatable, in order (netsuke methods)"),
        ] = None,
        vocab: Annotated[int | None, typer.Option(help="instead: keep so many pieces of the tokenizer")] = None,
        rule: Annotated[str, typer.Option(help="of --vocab: closed (every piece reachable) or frequency")] = "closed",
        data: Annotated[str | None, typer.Option(help="UTF-8 text file or folder, python-library, domains")] = None,
        context: Annotated[int | None, typer.Option(help="tokens per window")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    ) -> None:
        from rich.console import Console
        from rich.table import Table

        from netsuke.compress import compress
        from netsuke.devices import format_bytes

        if not method and vocab is None:
            raise NetsukeError(
                f"compress {model}", "no method was named", "--method NAME (netsuke methods), or --vocab N"
            )
        note = Console(stderr=True)
        with note.status("reading") as status:
            got = compress(
                model,
                method or [],
                out=out,
                data=data,
                context=context,
                vocab=vocab,
                rule=rule,
                on_progress=lambda name, *_: status.update(name),
            )
        if as_json:
            print(json.dumps(got))
            return
        table = Table("", "before", "after")
        if vocab is not None:
            table.add_row("pieces", *map(str, got["pieces"]))
            table.add_row("bytes of weights", *map(format_bytes, got["bytes"]))
            table.add_row("bits per byte (validation)", *(f"{b:.4g}" for b in got["bits_per_byte"]))
            Console().print(table)
            print(f"artifact  {got['artifact']}")
            return
        table.add_row("bytes", format_bytes(got["bytes_before"]), format_bytes(got["bytes_after"]))
        table.add_row(
            "read per decoded token, blocks", format_bytes(got["traffic_before"]), format_bytes(got["traffic_after"])
        )
        table.add_row(f"{got['metric']} (validation)", f"{got['before']:.4g}", f"{got['after']:.4g}")
        Console().print(table)
        print(f"artifact  {got['artifact']}")
