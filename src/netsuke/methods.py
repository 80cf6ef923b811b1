"""`netsuke methods`: the published techniques that can be handed to a verb, with their knobs. `--block WIDTHxHEADS --tokens N`
asks another question: whether an encoder block of that shape gains from thin factors or from Linformer attention.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from netsuke.errors import NetsukeError
from netsuke.verb import verb

STEP = 4096  # tokens of a training step, all sequences together; a longer sequence is a step of its own
GIVES = {"bytes": "fewer bytes", "traffic": "fewer bytes read per token", "loss": "less loss at the same size"}
ASKED = "advise on a block"
NAMES = {"dense": "dense", "lrt": "low-rank (LRT)", "linformer": "Linformer"}


@verb
def methods() -> list[dict[str, Any]]:
    """One row per method, in the order of the registry: name, paper, what it needs (data, training steps), what it gives
    (fewer "bytes", less "traffic" per decoded token, less "loss"), knobs with their defaults."""
    from netsuke.compress.method import registry

    return [
        {"name": name, "paper": kind.paper, "trains": kind.trains, "needs_data": kind.needs_data, "saves": kind.saves,
         "knobs": {k: v for k, v in kind().to_json().items() if k != "method"},
         "about": (sys.modules[kind.__module__].__doc__ or "").strip().splitlines()[0]}
        for name, kind in registry().items()
    ]  # fmt: skip


def block_of(text: str) -> tuple[int, int]:
    """ "768x12" -> width 768, 12 heads. Raises NetsukeError for anything else."""
    found = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text.strip().lower())
    if found is None:
        raise NetsukeError(ASKED, f"--block {text[:40]!r}", "WIDTHxHEADS, such as 768x12")
    return int(found[1]), int(found[2])


def advice(
    block: str, tokens: int, target: str = "time", *, rank: int | None = None, project: int | None = None,
    device: str | None = None, fused: bool = False, causal: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Costs of a block "WIDTHxHEADS" on sequences of so many tokens, dense, low-rank and with Linformer attention, and the
    choice (compress/advise.py, where the formulas and what the words mean are).

    Returns {block, tokens, step_tokens, target, device, pick, why, costs: {kind: {macs, parameters, training_bytes, seconds}},
    crossings: {target: tokens from which Linformer costs no more than low-rank, or None}}.
    Raises NetsukeError for a shape that no block has, an unknown target or device, and Linformer knobs for a causal block.
    """
    from netsuke.compress.advise import advise
    from netsuke.devices import Device

    width, heads = block_of(block)
    if causal and project is not None:
        raise NetsukeError(ASKED, "--project with --causal", "Linformer cannot be causal", "without --project")
    card = None if device is None else Device.load(device)
    got = advise(
        width, heads, tokens, target, rank=rank, project=project, tokens=STEP, device=card, fused=fused, causal=causal
    )
    return {
        "block": {"width": width, "heads": heads}, "tokens": tokens, "step_tokens": max(STEP // tokens, 1) * tokens,
        "target": target, "device": device,
        "pick": got.pick, "why": got.why, "costs": {kind: asdict(cost) for kind, cost in got.costs.items()},
        "crossings": got.crossings,
    }  # fmt: skip


def register(app: typer.Typer) -> None:
    @app.command(
        "methods", help="List the methods and their knobs; with --block, which one an encoder block gains from."
    )
    def command(
        block: Annotated[str | None, typer.Option(help="an encoder block, WIDTHxHEADS")] = None,
        tokens: Annotated[int | None, typer.Option(help="block: of one sequence")] = None,
        target: Annotated[
            str | None, typer.Option(help="block: time, memory (of training), size; default time")
        ] = None,
        rank: Annotated[int | None, typer.Option(help="block: of low-rank maps; default width / 8")] = None,
        project: Annotated[int | None, typer.Option(help="block: summaries of Linformer; default 128")] = None,
        device: Annotated[str | None, typer.Option(help="block: a card that prices time; default: count")] = None,
        fused: Annotated[bool, typer.Option("--fused", help="block: attention in a fused kernel, no open map")] = False,
        causal: Annotated[bool, typer.Option("--causal", help="block: of a model that writes")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    ) -> None:
        given = {"tokens": tokens, "target": target, "rank": rank, "project": project, "device": device,
                 "fused": fused or None, "causal": causal or None}  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        if block is None and given:
            raise NetsukeError(ASKED, f"--{next(iter(given))} without --block", "--block WIDTHxHEADS --tokens N")
        if block is not None and tokens is None:
            raise NetsukeError(ASKED, "--block without --tokens", "--block WIDTHxHEADS --tokens N")
        if block is not None:
            got = advice(block, **given)
            print(json.dumps(got)) if as_json else show_advice(got)
            return
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


def show_advice(got: dict[str, Any]) -> None:
    """The three costs beside each other, and the sentence that says why."""
    from rich.console import Console
    from rich.table import Table

    from netsuke.devices import format_bytes, format_seconds

    costs = got["costs"]
    step = f"a training step of {got['step_tokens']:,} tokens"
    table = Table("one block", *(NAMES[k] + (" ←" if k == got["pick"] else "") for k in costs))
    table.add_row("multiply-accumulates of a sequence", *(f"{c['macs']:,}" for c in costs.values()))
    table.add_row("parameters", *(f"{c['parameters']:,}" for c in costs.values()))
    table.add_row(f"memory of {step}", *(format_bytes(c["training_bytes"]) for c in costs.values()))
    if got["device"] is not None:
        table.add_row(f"{step} on {got['device']}", *(format_seconds(c["seconds"]) for c in costs.values()))
    Console().print(table)
    print(f"choice    {NAMES[got['pick']]}: {got['why']}")
    for target, at in got["crossings"].items():
        when = f"at {at:,} tokens" if at else "never"
        print(f"{target:9} Linformer passes low-rank {when}")
