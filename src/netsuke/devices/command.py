"""`netsuke devices`: the cards as one table; `netsuke devices show NAME`: one card, every figure with its source."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from netsuke.devices import Device, devices, format_bytes

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
UNITS = {
    "ram": "B", "ram_total": "B", "storage": "B", "ram_bandwidth": "B/s", "storage_bandwidth": "B/s", "rates": "MAC/s",
    "overhead_s": "s", "energy_per_mac": "J", "energy_per_byte": "J", "idle_power": "W",
}  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add `devices` and `devices show` to the command line."""
    verb = typer.Typer(help="What targets can hold and do; every number with its source.")
    verb.callback(invoke_without_command=True)(table)
    verb.command("show")(show)
    app.add_typer(verb, name="devices")


def table(context: typer.Context, as_json: AsJson = False) -> None:
    """All device cards: memory, storage, read bandwidth, 8-bit arithmetic. `this` is the machine at hand."""
    if context.invoked_subcommand is not None:
        return
    if as_json:
        typer.echo(json.dumps(devices(), indent=2))
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    out = Table(
        title="Devices",
        box=SIMPLE,
        caption="netsuke devices show NAME tells where each figure is from; NAME may be this",
    )
    out.add_column("name", no_wrap=True)
    console = Console()
    # the other columns and the gaps take 66: on a narrow terminal the chip is cut short, never a name or a number
    out.add_column("chip", no_wrap=True, overflow="ellipsis", max_width=max(8, console.width - 66))
    for heading in ("RAM", "storage", "read/s", "int8 MAC/s"):
        out.add_column(heading, justify="right", no_wrap=True)
    for device in map(Device.load, Device.names()):
        sizes = [format_bytes(n) for n in (device.ram, device.storage, device.ram_bandwidth)]
        out.add_row(device.name, device.title, *sizes, format_rate(device.rate(8)))
    console.print(out)


def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help='A card, "this", or a path ending in .toml.')],
    as_json: AsJson = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure this machine again.")] = False,
) -> None:
    """One device: every figure, and where it is from."""
    if as_json or (context.parent is not None and context.parent.params.get("as_json")):
        typer.echo(json.dumps(devices(name, refresh), indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    device = Device.this(refresh) if name == "this" else Device.load(name)
    words = f"{device.kind}; {', '.join(device.isa) or 'no instruction sets named'}; runs {', '.join(device.homes)}"
    out = Table(title=Text(f"{device.name}: {device.title}"), caption=Text(words))
    out.add_column("figure", no_wrap=True)
    out.add_column("value", justify="right", no_wrap=True)
    out.add_column("source")
    for field, value in device.numbers().items():
        unit = UNITS.get(field.split(".")[0], "")
        out.add_row(field, f"{value:.6g} {unit}".strip(), Text(device.sources[field]))
    Console().print(out)


def format_rate(rate: float) -> str:
    """ "67.2 M": multiply-accumulates per second in words short enough for a table."""
    for size, unit in ((1e12, "T"), (1e9, "G")):
        if rate >= size:
            return f"{rate / size:.3g} {unit}"
    return f"{rate / 1e6:.3g} M"
