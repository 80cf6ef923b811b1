"""`netsuke fit MODEL --device pi4 --storage 4MB`: carve a model until it fits, and prove it.

The steps are in carve.py and carve_report.py, for small networks in carve_network.py and network_report.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from netsuke.verb import verb


@verb
def fit(
    model: str, device: str = "this", *, ram: str | None = None, storage: str | None = None, latency: str | None = None,
    energy: str | None = None, max_loss: str | None = None, data: str | None = None, context: int | None = None,
    out: str | None = None, cuts: bool = True, heal: str | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Carves `model` (a language model: artifact, Hugging Face folder, llama2.c file, "pycode"; or a small network: .tflite,
    .onnx, Keras, .npz) until it fits, and writes the artifact and its report beside it.

    device            a card's name, a TOML file, or "this"
    ram … max_loss    limits as text ("512MB", "50ms" and "2mJ" per generated token, "2%" of the metric); RAM and storage
                      default to the device's own. With max_loss alone the smallest model within it is sought
    data              a UTF-8 text file or folder, cut 80/10/10, or "python-library"; default: what the model's own
                      manifest names. For small networks a folder or .zip of <class>/<picture>, or an .npz with x and y
    context           tokens of text per window and of the key/value cache; default: at most 512 of the model's own
    cuts              whether layers may become narrower or factors, or only their bits fewer
    heal              time for what was carved to learn from the model before it ("5min"); two runs then differ, because
                      the number of steps depends on the machine. Language models only

    Returns the report as a dictionary. Raises NetsukeError for unusable input, and with code 1 when no set of choices
    meets the budget; nothing is written then.
    """
    from netsuke.devices import Budget, parse_seconds
    from netsuke.errors import NetsukeError
    from netsuke.graph.read import is_graph
    from netsuke.report import write_report

    budget = Budget.parse(ram, storage, latency, energy, max_loss)
    seconds = parse_seconds(heal) if heal else 0.0
    name = Path(model).name
    plain = (Path(name).stem if is_graph(model) else name.removesuffix(".netsuke").removesuffix(".bin")) or "model"
    target = Path(out or f"{plain}-{Path(device).stem}.netsuke")
    if target.suffix != ".netsuke":
        target = target.with_name(target.name + ".netsuke")
    tell = on_progress or (lambda *_: None)
    if is_graph(model):
        if seconds:
            raise NetsukeError(
                f"heal {model}", "it is a small network", "language models", "netsuke train NETWORK --on mcu"
            )
        from netsuke.carve_network import NetworkCarving
        from netsuke.network_report import report_of

        carving = NetworkCarving(model, device, budget, data, target, cuts, tell)
    else:
        from netsuke.carve import Carving
        from netsuke.carve_report import report_of

        carving = Carving(model, device, budget, data, context, target, cuts, tell, seconds)
    carving.run()
    report = report_of(carving)
    write_report(report, target.with_suffix(".report.html"), target.with_suffix(".report.json"))
    return report


def register(app: typer.Typer) -> None:
    @app.command("fit", help="Carve a model until it fits a device's limits; write the artifact and its report.")
    def command(
        model: Annotated[str, typer.Argument(help="artifact, Hugging Face folder, llama2.c file, or 'pycode'")],
        device: Annotated[str, typer.Option(help="a card's name (netsuke devices), a TOML file, or 'this'")] = "this",
        ram: Annotated[str | None, typer.Option(help="e.g. 512MB")] = None,
        storage: Annotated[str | None, typer.Option(help="e.g. 8MB")] = None,
        latency: Annotated[str | None, typer.Option(help="per generated token, e.g. 50ms")] = None,
        energy: Annotated[str | None, typer.Option(help="per generated token, e.g. 2mJ")] = None,
        max_loss: Annotated[str | None, typer.Option(help="largest acceptable rise of the metric, e.g. 2%")] = None,
        data: Annotated[
            str | None, typer.Option(help="UTF-8 text file or folder (cut 80/10/10), python-library, domains")
        ] = None,
        context: Annotated[int | None, typer.Option(help="tokens per window and in the cache")] = None,
        out: Annotated[str | None, typer.Option("-o", "--out", help="the artifact to write, NAME.netsuke")] = None,
        cuts: Annotated[bool, typer.Option(help="allow narrower layers, or only fewer bits")] = True,
        heal: Annotated[str | None, typer.Option(help="time to learn from the model before, e.g. 5min")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="the report as JSON")] = False,
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        note = Console(stderr=True)
        columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=note, transient=True, disable=not note.is_terminal) as bar:
            task = bar.add_task("reading")
            report = fit(
                model, device, ram=ram, storage=storage, latency=latency, energy=energy, max_loss=max_loss, data=data,
                context=context, out=out, cuts=cuts, heal=heal,
                on_progress=lambda name, done, total: bar.update(task, description=name, completed=done, total=total or None),
            )  # fmt: skip
        if as_json:
            print(json.dumps(report))
            return
        from netsuke.report import summary_table

        Console().print(summary_table(report))
        print(f"artifact  {report['artifact']}\nreport    {report['report']}")
