"""`netsuke bench lm [MODEL …]`: the engine beside llama.cpp, PyTorch and transformers, in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from netsuke.bench import bench
from netsuke.errors import NetsukeError

HELP = "The engine beside llama.cpp, PyTorch and transformers: speed, loading, memory, shares of the machine's limits."


def whole(text: str, option: str) -> list[int]:
    """ "128,512" -> [128, 512]. Raises NetsukeError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise NetsukeError(f"read {option}", repr(text), "whole numbers with commas between them") from None


def register(app: typer.Typer) -> None:
    """Add `bench lm` to the command line."""
    verb = typer.Typer(help="Measure beside peers, in one run; all take --json, --quick.", no_args_is_help=True)
    app.add_typer(verb, name="bench")

    @verb.command("lm", help=HELP)
    def command(
        models: Annotated[
            list[str] | None,
            typer.Argument(
                help="shapes of random weights (30M, 1.1B), artifacts, 'pycode'; default: pycode 30M 1.1B. They are made once "
                "and kept in netsuke/bench of the user's cache folder: 8 GB for 1.1B at 4, 8 and 16 bits",
            ),
        ] = None,
        bits: Annotated[str, typer.Option(help="widths of weights: 4, 8, 16")] = "4,8,16",
        prompt: Annotated[str, typer.Option(help="tokens of the prompts")] = "128,512",
        batch: Annotated[str, typer.Option(help="sequences decoded together")] = "1,4",
        peers: Annotated[str, typer.Option(help="llama.cpp, torch, transformers")] = "llama.cpp,torch,transformers",
        threads: Annotated[int | None, typer.Option(help="of every side; default: one per core", min=1)] = None,
        quick: Annotated[bool, typer.Option(help="three short rounds, to see that it works")] = False,
        out: Annotated[Path | None, typer.Option("-o", "--out", help="write the JSON here as well")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        if out and not out.parent.is_dir():
            raise NetsukeError(f"write {out}", f"the folder {out.parent} does not exist", "an existing folder")
        note = Console(stderr=True)
        columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # drawn between measurements only: a thread that redraws it would take its share of a core
        with Progress(
            *columns, console=note, transient=True, disable=not note.is_terminal, auto_refresh=False
        ) as bar:  # fmt: skip
            task = bar.add_task("reading")

            def step(text: str, done: int, total: int) -> None:
                bar.update(task, description=text, completed=done, total=total, refresh=True)

            got = bench(
                "lm", models or (), bits=whole(bits, "--bits"), prompts=whole(prompt, "--prompt"),
                batches=whole(batch, "--batch"), peers=[p for p in peers.split(",") if p], threads=threads, quick=quick,
                on_progress=step,
            )  # fmt: skip
        if out:
            out.write_text(json.dumps(got, indent=1) + "\n")
        for sentence in [*got["warnings"], *got["skipped"]]:
            note.print(f"note: {sentence}", highlight=False, style="bold red" if "UNFAIR" in sentence else None)
        if as_json:
            print(json.dumps(got))
        else:
            show(got)


def show(got: dict[str, Any]) -> None:
    """One table for each model and width, the limits below."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console, limits, settings = Console(), got["limits"], got["settings"]
    for model, bits in dict.fromkeys((r["model"], r["bits"]) for r in got["rows"]):
        table = Table(title=f"{model} at {bits} bits", box=SIMPLE, title_justify="left")
        table.add_column("what", no_wrap=True)
        table.add_column("netsuke", justify="right", no_wrap=True)
        table.add_column("of limit", justify="right", no_wrap=True)
        table.add_column("beside", no_wrap=True)
        table.add_column("peer", justify="right", no_wrap=True)
        table.add_column("ratio", justify="right", no_wrap=True)
        for r in (r for r in got["rows"] if (r["model"], r["bits"]) == (model, bits)):
            what = f"decode x{r['batch']}" if r["what"] == "decode" else r["what"]
            share = "" if r["share_of_limit"] is None else f"{r['share_of_limit']:.0%}"
            ours, theirs = figure(r["what"], r["netsuke"]), figure(r["what"], r["peer"])
            table.add_row(what, ours, share, r["peer_name"], theirs, f"{r['ratio']:.2f}")
        console.print(table)
    print(
        f"ratio above 1: netsuke is better. {settings['threads']} threads each, medians of {settings['rounds']} rounds.\n"
        f"limits here: {limits['read_gbps']:.1f} GB/s read, {limits['vnni_gops']:.0f} G int8 multiply-accumulates/s"
    )


def figure(what: str, value: float) -> str:
    """A value with its unit: "83.1 t/s", "12.4 ms", "61.0 MB"."""
    if what == "peak":
        return f"{value / 1e6:,.1f} MB"
    number = value * 1e3 if what in ("load", "first-token") else value
    return (f"{number:,.0f}" if number >= 100 else f"{number:.3g}") + (" t/s" if number is value else " ms")
