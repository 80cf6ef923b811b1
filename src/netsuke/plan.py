"""`netsuke plan MODEL --device pi4`: memory, speed and whether it fits, from headers alone, before anything is loaded.

Small networks for microcontrollers are planned in network_plan.py.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netsuke.devices import Device, format_bytes, format_seconds
from netsuke.errors import NetsukeError
from netsuke.verb import verb

if TYPE_CHECKING:
    from netsuke.devices.cost import Cost
    from netsuke.models.load import Described
    from netsuke.runtime.memory_plan import MemoryPlan

CONTEXT = 2048  # planned unless asked otherwise: many models advertise 128k, few are run so
PROMPT = 128  # tokens of the prompt whose first answer is timed, unless asked otherwise
LARGEST = 5


@verb
def plan(
    model: str, device: str = "this", *, context: int | None = None, batch: int = 1, prompt: int | None = None,
    train: str | None = None, tokens: int = 256, optimizer: str = "loop", backend: str = "native", kv: str = "float16",
) -> dict[str, Any]:  # fmt: skip
    """What `model` takes on `device`, from its headers: {model, device, backend, context, batch, prompt, memory, storage, fits,
    binding, remedy, latency, training}; bytes and seconds.

    context   tokens the key/value cache is allocated for; default: the model's own, at most 2048
    prompt    tokens given at once; default: memory for all the context, time to the first token for 128
    train     "full" or "last-K": plan one training step on `batch` windows of `tokens` tokens as well

    backend   what runs it: "native" (the engine; `kv` keeps keys and values as "float16" or "int8"), "torch", or "integer",
              the integer-only decoder, which is meant by "native" for a model with static grids

    RAM is the process' (Python, where the device runs it) plus the model's peak; training always runs in PyTorch. Times
    come from the device's figures, not from a run. Raises NetsukeError for an unusable model, device or size.
    """
    for option, value in (("--context", context), ("--batch", batch), ("--prompt", prompt), ("--tokens", tokens)):
        if value is not None and not 1 <= value <= 1 << 28:
            raise NetsukeError(f"plan with {option} {value}", "that is no number of tokens or windows", "1 or more")
    from netsuke.graph.read import is_graph

    if is_graph(model):
        from netsuke.network_plan import plan_network

        return plan_network(model, device, train)
    card = Device.load(device)
    from netsuke.models.load import describe
    from netsuke.runtime import integer_plan, memory_plan, native_plan
    from netsuke.runtime.engine import check_cache
    from netsuke.runtime.executors import executor_of

    backend = executor_of(model, backend)
    check_cache(kv)
    facts = describe(model)
    cfg = facts.config
    context = min(context or CONTEXT, cfg.context)
    if prompt is not None and prompt >= context:
        raise NetsukeError(f"plan with --prompt {prompt}", f"the context is {context}", f"at most {context - 1}")
    python, native = "native" in card.homes, backend == "native"
    process = (native_plan.PROCESS if native else memory_plan.PROCESS["torch"]) if python else 0
    headers = integer_plan.headers_of(model) if backend == "integer" else None

    def planned(length: int) -> MemoryPlan:
        if headers is not None:
            return integer_plan.integer_plan(headers, context=length, batch=batch)
        sizes = {"context": length, "batch": batch, "threads": card.cores}
        if native:
            return native_plan.native_plan(cfg, facts.layers, kv=kv, **sizes)
        return memory_plan.inference_plan(cfg, facts.layers, prompt=min(prompt, length) if prompt else None, **sizes)

    def memory_at(length: int) -> int:
        return process + planned(length).peak

    def cost(tokens: int) -> Cost:
        asked = {"context": context, "batch": batch, "tokens": tokens}
        if headers is not None:
            return integer_plan.integer_cost(card, headers, **asked)
        if native:
            return card.cost(native_plan.native_work(cfg, facts.layers, kv=kv, **asked))
        return card.cost(memory_plan.work_of(cfg, facts.layers, **asked))

    running = planned(context)
    total = process + running.peak
    timed = min(prompt or PROMPT, max(context - 1, 1))
    first, token = cost(timed), cost(1)
    out: dict[str, Any] = {
        "model": model, "device": card.name, "backend": backend, "context": context, "batch": batch, "prompt": prompt,
        "memory": {**running.as_dict(), "process": process, "total": total, "limit": card.ram, "moment": running.moment},
        "storage": {"bytes": facts.bytes_on_disk, "limit": card.storage},
        "largest": [{"part": name, "bytes": size} for name, size in running.largest(LARGEST)],
        "latency": {
            "first_token": first.latency, "prompt_tokens": timed, "tokens_per_second": batch / token.latency,
            "bound": token.bound, "energy_per_token": token.energy / batch,
            "how": "predicted from this machine's probe, not measured" if card.name == "this" or device == "this"
            else f"predicted from the figures of {card.name} (model, not measured)",
        },
    }  # fmt: skip
    notes = []
    if headers is not None:
        notes.append("its activations stand on static grids: the integer-only decoder runs it, on one core")
    if not python:
        notes.append(
            f"{card.name} runs {', '.join(card.homes)}, not Python: the memory of its own runtime is not counted"
        )
    if notes:
        out["note"] = "; ".join(notes)
    binding = [
        name for name, over in (("ram", total > card.ram), ("storage", facts.bytes_on_disk > card.storage)) if over
    ]
    if train is not None:
        out["training"] = step = _training(
            facts, train, tokens, batch, optimizer, card.cores, memory_plan.PROCESS["torch"] if python else 0
        )
        if step["total"] > card.ram:
            binding.append("ram for training")
    out["fits"], out["binding"] = not binding, binding
    out["remedy"] = _remedy(binding, memory_at, context, card) if binding else None
    return out


def _training(
    facts: Described, scope: str, tokens: int, batch: int, optimizer: str, threads: int, process: int
) -> dict:
    from netsuke.runtime.training_plan import training_plan

    step = training_plan(
        facts.config, facts.layers, tokens=tokens, batch=batch, scope=scope, optimizer=optimizer, threads=threads
    )
    return {
        "scope": scope, "tokens": tokens, "batch": batch, "optimizer": optimizer, **step.as_dict(),
        "process": process, "total": process + step.peak, "moment": step.moment,
    }  # fmt: skip


def _remedy(binding: list[str], memory_at: Any, context: int, card: Device) -> str:
    """The nearest thing that would fit."""
    if binding == ["ram"] and memory_at(1) <= card.ram:
        low, high = 1, context  # memory grows with the context: bisect
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if memory_at(middle) <= card.ram else (low, middle)
        return f"--context {low}"
    if binding == ["ram for training"]:
        return "--train last-1, fewer --tokens or a smaller --batch"
    return f"netsuke fit MODEL --device {card.name}"


def register(app: typer.Typer) -> None:
    @app.command("plan", help="Memory, speed and whether a model fits a device, before anything is loaded.")
    def command(
        model: Annotated[str, typer.Argument(help="a language model (or 'pycode'), or a small network")],
        device: Annotated[str, typer.Option(help="a card's name (netsuke devices), a TOML file, or 'this'")] = "this",
        context: Annotated[
            int | None, typer.Option(help="tokens of context; default: the model's, at most 2048")
        ] = None,
        batch: Annotated[int, typer.Option(help="sequences at once; windows per training step")] = 1,
        prompt: Annotated[int | None, typer.Option(help="tokens of the prompt")] = None,
        train: Annotated[
            str | None, typer.Option(help="plan training too: full or last-K; small networks: plan.json")
        ] = None,
        tokens: Annotated[int, typer.Option(help="tokens per training window")] = 256,
        backend: Annotated[str, typer.Option(help="native (the engine, or in integers), integer, torch")] = "native",
        kv: Annotated[str, typer.Option(help="keys and values as float16 or int8 (native)")] = "float16",
        as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    ) -> None:
        got = plan(
            model,
            device,
            context=context,
            batch=batch,
            prompt=prompt,
            train=train,
            tokens=tokens,
            backend=backend,
            kv=kv,
        )
        if as_json:
            print(json.dumps(got))
        elif got.get("kind") == "network":
            from netsuke.network_plan import show as show_network

            show_network(got)
        else:
            show(got)
        raise typer.Exit(0 if got["fits"] else 1)


def show(got: dict[str, Any]) -> None:
    """The plan as tables."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, memory, latency = Console(), got["memory"], got["latency"]

    def sizes(title: str, parts: dict[str, Any], names: dict[str, str]) -> Table:
        table = Table("", title=Text(title), title_justify="left")
        table.add_column("bytes", justify="right")
        for key, name in names.items():
            if parts[key]:
                table.add_row(name, format_bytes(parts[key]))
        table.add_section()
        table.add_row("in all", format_bytes(parts["total"]))
        table.caption = Text(f"the peak: {parts['moment']}")
        return table

    title = f"{got['model']} on {got['device']}: {got['context']} tokens of context, batch {got['batch']}"
    running = {
        "weights": "weights", "kv_cache": "key/value cache", "activations": "activations", "buffers": "buffers",
        "runtime": "libraries, heap", "process": "Python, idle",
    }  # fmt: skip
    console.print(sizes(title, memory, running))
    if "training" in got:
        step = got["training"]
        names = {
            "weights": "weights",
            "optimizer": "optimizer states",
            "gradients": "gradients",
            "saved": "saved tensors",
        }
        names |= {"buffers": "buffers", "runtime": running["runtime"], "process": "Python and torch, idle"}
        console.print(
            sizes(f"training {step['scope']}: {step['batch']} windows of {step['tokens']} tokens", step, names)
        )
    largest = ", ".join(f"{row['part']} {format_bytes(row['bytes'])}" for row in got["largest"])
    stored = got["storage"]
    lines = [
        ("largest", largest),
        ("RAM", f"{format_bytes(memory['total'])} of {format_bytes(memory['limit'])}"),
        ("storage", f"{format_bytes(stored['bytes'])} of {format_bytes(stored['limit'])}"),
        (
            "first token",
            f"{format_seconds(latency['first_token'])} after a prompt of {latency['prompt_tokens']} tokens",
        ),
        ("then", f"{latency['tokens_per_second']:.3g} tokens/s, bound by {latency['bound']}"),
        ("", latency["how"]),
    ]
    facts = Table.grid(padding=(0, 2))
    for name, value in lines:
        facts.add_row(name, Text(value))
    console.print(facts)
    if "note" in got:
        console.print(Text(got["note"]))
    if got["fits"]:
        console.print("[green]fits[/]")
    else:
        console.print(
            Text(f"does not fit: {' and '.join(got['binding'])} too small; try: {got['remedy']}", style="red")
        )
