"""`netsuke plan MODEL --device pi4`: memory and speed before any weight is loaded, for inference and for training."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from netsuke.verb import verb


@verb
def plan(
    model: str, device: str = "this", *, context: int | None = None, batch: int = 1, prompt: int | None = None,
    train: str | None = None, tokens: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The plan of running (and, with `train`, of training) a model on a device, from its headers alone.

    context  tokens in the key/value cache (default: the model's, at most 2048)
    prompt   tokens given at once (default: all of the context but one)
    train    "full" or "last-K": which blocks learn; `tokens` per window, `batch` windows

    Returns {model, device, context, batch, memory, largest, storage, fits, binding, latency, training?}. Raises NetsukeError
    for an unusable model, device or size.
    """
    from netsuke.devices import Device
    from netsuke.errors import NetsukeError
    from netsuke.models.load import describe
    from netsuke.runtime.memory_plan import inference_plan, work_of
    from netsuke.runtime.training_plan import training_plan

    found, target = describe(model), Device.load(device)
    cfg, layers = found.config, found.layers
    context = context or min(cfg.context, 2048)
    if context > cfg.context:
        raise NetsukeError(f"plan {model}", f"a context of {context} tokens", f"at most {cfg.context}, the model's own")
    memory = inference_plan(cfg, layers, context=context, batch=batch, prompt=prompt)
    asked = prompt or max(context - 1, 1)
    first = target.cost(work_of(cfg, layers, context=context, tokens=asked, batch=batch))
    step = target.cost(work_of(cfg, layers, context=context, tokens=1, batch=batch))
    peak, training = memory.peak, None
    if train is not None:
        planned = training_plan(cfg, layers, tokens=tokens or min(context, 256), batch=batch, scope=train)
        training, peak = {"scope": train, **planned.as_dict()}, max(peak, planned.peak)
    over = {"ram": peak / target.ram, "storage": found.bytes_on_disk / target.storage}
    binding = max(over, key=over.__getitem__)
    return {
        "model": model, "device": target.name, "context": context, "batch": batch, "prompt": asked,
        "memory": memory.as_dict(), "largest": [{"name": n, "bytes": b} for n, b in memory.largest()],
        "storage": found.bytes_on_disk, "limits": {"ram": target.ram, "storage": target.storage},
        "fits": all(v <= 1 for v in over.values()), "binding": binding if over[binding] > 1 else None,
        "latency": {
            "first_token": first.latency, "tokens_per_second": batch / step.latency, "bound": step.bound,
            "energy_per_token": step.energy / batch, "how": f"predicted by the card of {target.name}, not measured",
        },
        "training": training,
    }  # fmt: skip


def register(app: typer.Typer) -> None:
    @app.command("plan", help="Memory and speed of a model on a device, before anything is loaded.")
    def command(
        model: Annotated[str, typer.Argument(help="artifact, Hugging Face folder, llama2.c file, or 'pycode'")],
        device: Annotated[str, typer.Option(help="a card's name (netsuke devices), a TOML file, or 'this'")] = "this",
        context: Annotated[int | None, typer.Option(help="tokens in the key/value cache")] = None,
        batch: Annotated[int, typer.Option(help="sequences at once")] = 1,
        prompt: Annotated[int | None, typer.Option(help="tokens given at once; default: the context less one")] = None,
        train: Annotated[str | None, typer.Option(help="plan training too: full or last-K")] = None,
        tokens: Annotated[int | None, typer.Option(help="tokens per training window")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    ) -> int:
        got = plan(model, device, context=context, batch=batch, prompt=prompt, train=train, tokens=tokens)
        print(json.dumps(got)) if as_json else show(got)
        return 0 if got["fits"] else 1


def show(got: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from netsuke.devices import format_bytes, format_seconds

    print(f"{got['model']} on {got['device']}, context {got['context']}, batch {got['batch']}")
    table = Table("", "bytes")
    table.columns[1].justify = "right"
    for name, size in got["memory"].items():
        table.add_row(name.replace("_", " ").replace("kv", "key/value"), format_bytes(size), end_section=name == "runtime")
    for name, size in (got["training"] or {}).items():
        if name != "scope":
            table.add_row(f"training {got['training']['scope']}: {name}", format_bytes(size))
    Console().print(table)
    largest = ", ".join(f"{row['name']} {format_bytes(row['bytes'])}" for row in got["largest"])
    latency, limits = got["latency"], got["limits"]
    print(f"largest        {largest}")
    disk = f"{format_bytes(got['storage'])} of {format_bytes(limits['storage'])}"
    print(f"on disk        {disk}; RAM {format_bytes(limits['ram'])}")
    print(
        f"speed          first token of {got['prompt']} after {format_seconds(latency['first_token'])}, then "
        f"{latency['tokens_per_second']:.3g} tokens/s, bound by {latency['bound']} ({latency['how']})"
    )
    print("fits           yes" if got["fits"] else f"fits           no: {got['binding']} is exceeded")
