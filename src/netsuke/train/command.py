"""`netsuke train NETWORK --on mcu --sram 256KB --data FOLDER`: adapt a network as the chip would, inside the chip's memory."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command("train", help="Adapt a small network to your own classes, inside a microcontroller's memory.")
    def command(
        model: Annotated[str, typer.Argument(help="an int8 network: .tflite, .npz, artifact")],
        data: Annotated[str, typer.Option(help="folder or .zip of <class>/<picture>, or .npz with x and y")],
        on: Annotated[str, typer.Option(help="mcu")] = "mcu",
        sram: Annotated[str, typer.Option(help="arena, trained weights and stack together")] = "256KB",
        plan: Annotated[str | None, typer.Option(help="an update plan; default: searched")] = None,
        epochs: Annotated[int, typer.Option(help="passes over the training samples")] = 5,
        rate: Annotated[float, typer.Option(help="learning rate of the first step, one sample each")] = 0.01,
        seed: Annotated[int, typer.Option(help="of the order and of the rounding")] = 0,
        out: Annotated[str | None, typer.Option("-o", "--out", help="the artifact to write, NAME.netsuke")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Table

        from netsuke.devices import format_bytes
        from netsuke.train import train

        note = Console(stderr=True)
        columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=note, transient=True, disable=not note.is_terminal) as bar:
            task = bar.add_task("reading")
            got = train(
                model, data=data, on=on, sram=sram, plan=plan, epochs=epochs, rate=rate, seed=seed, out=out,
                on_progress=lambda name, done, total: bar.update(task, description=name, completed=done, total=total or None),
            )  # fmt: skip
        if as_json:
            print(json.dumps(got))
            return
        memory, table = got["memory"], Table("", "value")
        table.add_row("accuracy on test data, one answer for all", f"{got['floor']:.1%}")
        table.add_row("accuracy on test data, head alone", f"{got['before']:.1%}")
        table.add_row("accuracy on test data, by the plan", f"{got['after']:.1%}")
        table.add_row("arena", format_bytes(memory["arena"]))
        table.add_row("trained weights in RAM", format_bytes(memory["trained"]))
        table.add_row("RAM in all", f"{format_bytes(memory['total'])} of {format_bytes(memory['limit'])}")
        Console().print(table)
        print(f"artifact  {got['artifact']}\nplan      {got['plan_file']}")
