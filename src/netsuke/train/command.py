"""`netsuke train NETWORK --on mcu --sram 256KB --data FOLDER`: adapt a network as the chip would, inside the chip's memory;
`netsuke train MODEL|new --on here --data TEXT`: train a language model on this machine.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command("train", help="Adapt a network inside a microcontroller's memory, or train a language model here.")
    def command(
        model: Annotated[str, typer.Argument(help="an int8 network; with --on here a language model, or 'new'")],
        data: Annotated[
            str, typer.Option(help="folder or .zip of <class>/<picture>, .npz with x and y; here: UTF-8 text")
        ],
        on: Annotated[str, typer.Option(help="mcu, here")] = "mcu",
        sram: Annotated[str, typer.Option(help="mcu: arena, trained weights and stack together")] = "256KB",
        plan: Annotated[str | None, typer.Option(help="mcu: an update plan; default: searched")] = None,
        epochs: Annotated[int, typer.Option(help="mcu: passes over the training samples")] = 5,
        rate: Annotated[
            float | None,
            typer.Option(help="mcu: of the first step (0.01); here: share of usual rates (new 1, else 0.1)"),
        ] = None,
        seed: Annotated[int, typer.Option(help="of the order and of the rounding")] = 0,
        steps: Annotated[int, typer.Option(help="here: steps of 8 windows")] = 1000,
        minutes: Annotated[float | None, typer.Option(help="here: or so long, whichever ends first")] = None,
        rounds: Annotated[int, typer.Option(help="here: 2 goes once more over the hard batches")] = 1,
        keep: Annotated[float, typer.Option(help="here: share of batches in the second round")] = 0.5,
        temperature: Annotated[float, typer.Option(help="here: of the choice of hard batches")] = 1.0,
        by: Annotated[str, typer.Option(help="here: choose whole batches or single sequences")] = "batch",
        parameters: Annotated[str | None, typer.Option(help="new: in all, e.g. 2M")] = None,
        vocab: Annotated[int, typer.Option(help="new: pieces of its tokenizer")] = 2048,
        min_tps: Annotated[float, typer.Option(help="new: tokens a second in the engine on this machine")] = 0.0,
        context: Annotated[int | None, typer.Option(help="here: tokens per window")] = None,
        out: Annotated[str | None, typer.Option("-o", "--out", help="the artifact to write, NAME.netsuke")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Table

        from netsuke.devices import format_bytes
        from netsuke.train import train

        speed = None
        if min_tps:
            from netsuke.runtime.shape_speed import engine_speed as speed
        note = Console(stderr=True)
        columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=note, transient=True, disable=not note.is_terminal) as bar:
            task = bar.add_task("reading")
            got = train(
                model, data=data, on=on, sram=sram, plan=plan, epochs=epochs, rate=rate, seed=seed, steps=steps,
                minutes=minutes, rounds=rounds, keep=keep, temperature=temperature, by=by, parameters=parameters, vocab=vocab,
                min_tps=min_tps, speed=speed, context=context, out=out,
                on_progress=lambda name, done, total: bar.update(task, description=name, completed=done, total=total or None),
            )  # fmt: skip
        if as_json:
            print(json.dumps(got))
            return
        if on == "here":
            before, after = got["bits_per_byte"]
            table = Table("", "before", "after")
            table.add_row("bits per byte (validation)", f"{before:.4g}", f"{after:.4g}")
            table.add_row("bits per byte (test)", "", f"{got['test']:.4g}")
            table.add_row("tokens seen", "", f"{got['tokens']:,}")
            Console().print(table)
            print(f"artifact  {got['artifact']}")
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
