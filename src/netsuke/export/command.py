"""`netsuke export MODEL --home gguf --bits 8 -o out.gguf`: a model in the form that another program runs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from netsuke.export import HOMES, export

HOMES_HELP = "; ".join(f"{name}: {home.what}" for name, home in HOMES.items())


def register(app: typer.Typer) -> None:
    @app.command("export", help="Write a model in the form that another program runs.")
    def command(
        model: Annotated[str, typer.Argument(help="a language model, or a small network (c)")],
        home: Annotated[str, typer.Option(help=HOMES_HELP)],
        bits: Annotated[int | None, typer.Option(help="widest weights to store; default: the home's widest")] = None,
        out: Annotated[str | None, typer.Option("-o", "--out", help="what to write; default: MODEL's name")] = None,
        name: Annotated[str, typer.Option(help="c: prefix of functions and files")] = "model",
        patches: Annotated[bool, typer.Option(help="c: first layers band by band, for less RAM")] = False,
        train: Annotated[str | None, typer.Option(help="c: an update plan (JSON): C that trains on the chip")] = None,
        classes: Annotated[int | None, typer.Option(help="c: classes of the head that is trained")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    ) -> None:
        from rich.console import Console
        from rich.table import Table

        from netsuke.devices import format_bytes

        note = Console(stderr=True)
        with note.status(f"writing for {home}"):
            got = export(model, home, out=out, bits=bits, name=name, patches=patches, train=train, classes=classes)
        if as_json:
            print(json.dumps(got))
            return
        if home == "c":
            table = Table("folder", "arena", "flash: weights, tables", "multiply-accumulates")
            table.add_row(
                got["file"],
                format_bytes(got["arena"]),
                format_bytes(got["flash"]["constants"] + got["flash"]["parameters"]),
                f"{got['macs']:,}",
            )
            Console().print(table)
            print(f"make -C {got['file']} test        the self-test, on this machine")
            print(f"netsuke run {got['file']} --emulate m4")
            for sentence in got["notes"]:
                note.print(f"note: {sentence}", highlight=False)
            return
        if home == "ranges":
            table = Table("folder", "bytes", "modules", *(f"ranges of {bits}" for bits in got["bits"]))
            table.add_row(got["file"], format_bytes(got["bytes"]), str(got["modules"]), *map(str, got["bits"].values()))
            Console().print(table)
            return
        table = Table("file", "bytes", *got["types"], "unchanged maps")
        counts = [str(n) for n in got["types"].values()]
        table.add_row(got["file"], format_bytes(got["bytes"]), *counts, f"{got['exact']} of {got['maps']}")
        Console().print(table)
        for sentence in got["notes"]:
            note.print(f"note: {sentence}", highlight=False)
