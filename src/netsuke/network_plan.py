"""What a small network takes on a microcontroller, before anything is built: for `netsuke plan`, and as a cost for `fit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from netsuke.devices import Device, format_seconds
from netsuke.graph.ir import QGraph

STACK = 1024  # bytes: kernels use under 300, a caller's own frames are the rest


@dataclass(frozen=True)
class NetworkCost:
    """Bytes, seconds, joules of one run; `live` names the tensors at the peak, largest first. Latency and energy are None on a
    device without a clock."""

    storage: int
    ram: int
    arena: int
    latency: float | None
    energy: float | None
    live: tuple[str, ...] = ()


def network_cost(graph: QGraph, device: Device, arena: bool = True) -> NetworkCost:
    """The cost of one run on `device`; without `arena` RAM is left at 0, which is much quicker."""
    from netsuke.graph.instructions import instructions
    from netsuke.graph.memory import flash_bytes

    seconds = device.seconds(instructions(graph))
    energy = None if seconds is None else seconds * device.rate(8) * device.mac_energy(8)  # power of the running core
    size, live = 0, ()
    if arena:
        from netsuke.graph.arena import plan_arena
        from netsuke.graph.lower import scratch

        planned = plan_arena(graph, scratch)
        size = planned.size
        live = tuple(graph.tensors[i].name for i, _ in planned.live(planned.peak_op) if i >= 0)
    variables = sum(t.bytes for t in graph.tensors if t.variable)
    return NetworkCost(flash_bytes(graph), size + variables + STACK if arena else 0, size, seconds, energy, live)


def plan_network(model: str, device: str, train: str | None = None) -> dict[str, Any]:
    """Arena, the largest live tensors, flash by part, time, and whether it fits, as plain values; with `train`, the path of an
    update plan (JSON), the same for one training step.

    Raises NetsukeError for an unusable network, plan or device.
    """
    from netsuke.graph.arena import plan_arena
    from netsuke.graph.instructions import instructions
    from netsuke.graph.lower import scratch
    from netsuke.graph.memory import facts
    from netsuke.graph.patches import best_patching
    from netsuke.graph.read import load_graph

    card, graph = Device.load(device), load_graph(model)
    arena = plan_arena(graph, scratch)
    got, whole = facts(graph, arena), network_cost(graph, card)
    ram = whole.ram
    out: dict[str, Any] = {
        "model": model, "device": card.name, "kind": "network", "dtype": graph.tensors[graph.inputs[0]].dtype, **got,
        "ram": {"arena": arena.size, "variables": ram - arena.size - STACK, "stack": STACK, "total": ram, "limit": card.ram},
        "storage": {"bytes": whole.storage, "limit": card.storage},
        "latency": {"seconds": whole.latency, "instructions": round(instructions(graph)), "energy": whole.energy,
                    "how": f"instructions counted per kernel on an emulated board x {card.cycles_per_instruction} cycles"
                    if card.clock else f"the card of {card.name} gives no clock"},
    }  # fmt: skip
    binding = [name for name, over in (("ram", ram > card.ram), ("storage", whole.storage > card.storage)) if over]
    if train is not None:
        out["training"] = step = _training(graph, train)
        if step["total"] > card.ram:
            binding.append("ram for training")
    out["fits"], out["binding"] = not binding, binding
    if "ram" in binding:
        patched, out["patches"] = best_patching(graph, scratch)
    if binding == ["ram"] and plan_arena(patched, scratch).size + ram - arena.size <= card.ram:
        out["remedy"] = f"netsuke export {model} --home c --patches, which fits"
    elif binding == ["ram for training"]:
        out["remedy"] = f"netsuke train {model} --sram {card.ram} --data …, which searches a plan that fits"
    elif binding:
        out["remedy"] = f"netsuke fit {model} --device {card.name} --data …"
    return out


def _training(graph: QGraph, path: str) -> dict[str, Any]:
    from pathlib import Path

    from netsuke.graph.memory import facts
    from netsuke.graph.update_plan import UpdatePlan
    from netsuke.train.on_mcu import STACK as TRAINING_STACK
    from netsuke.train.on_mcu import training_memory

    plan = UpdatePlan.from_json(Path(path))
    arena, variables, step = training_memory(graph, plan)
    total = arena.size + variables + TRAINING_STACK
    return {
        **facts(step, arena),
        "variables": variables,
        "stack": TRAINING_STACK,
        "total": total,
        "plan": plan.to_json(),
    }


def _peak(got: dict[str, Any], of: str) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "live at the peak", "shape", title=Text(f"the peak{of}: operator {got['peak_operator']}"), title_justify="left"
    )
    table.add_column("bytes", justify="right")
    for row in got["largest"]:
        table.add_row(Text(row["name"]), "x".join(map(str, row["shape"])), f"{row['bytes']:,}")
    return table


def show(got: dict[str, Any]) -> None:
    """The plan as tables."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    ram, flash = got["ram"], got["flash"]
    table = Table("", title=Text(f"{got['model']} on {got['device']}"), title_justify="left")
    table.add_column("bytes", justify="right")
    for name in ("arena", "variables", "stack"):
        if ram[name]:
            table.add_row(f"RAM: {name}", f"{ram[name]:,}")
    table.add_row("RAM in all", f"{ram['total']:,} of {ram['limit']:,}")
    table.add_section()
    for name, size in (*flash["parts"].items(), ("code, about", flash["code"])):
        if size:
            table.add_row(f"flash: {name}", f"{size:,}")
    table.add_row("flash in all", f"{got['storage']['bytes']:,} of {got['storage']['limit']:,}")
    console.print(table)
    console.print(_peak(got, ""))
    if "training" in got:
        step = got["training"]
        console.print(_peak(step, " of a training step"))
        console.print(
            f"a training step: arena {step['arena']:,} + trained weights {step['variables']:,} + stack {step['stack']:,} = "
            f"{step['total']:,} bytes of RAM; {step['flash']['total'] + step['flash']['code']:,} of flash"
        )
    latency = got["latency"]
    if latency["seconds"] is not None:
        console.print(
            f"{format_seconds(latency['seconds'])} a run ({latency['instructions']:,} instructions); {latency['how']}"
        )
    console.print(
        f"{got['macs']:,} multiply-accumulates; arena {got['arena'] / max(got['lower_bound'], 1):.2f} x the live bytes"
    )
    if got["fits"]:
        console.print("[green]fits[/]")
        return
    console.print(Text(f"does not fit: {' and '.join(got['binding'])} too small; try: {got['remedy']}", style="red"))
