"""Devices: what a target can hold and do, the budget to respect, and the cost of a piece of work there."""

from __future__ import annotations

import msgspec

from netsuke.devices.budget import Budget, format_bytes, format_seconds, parse_bytes, parse_count, parse_seconds
from netsuke.devices.cost import Cost, Work
from netsuke.devices.device import Device
from netsuke.verb import verb

__all__ = [
    "Budget",
    "Cost",
    "Device",
    "Work",
    "devices",
    "format_bytes",
    "format_seconds",
    "parse_bytes",
    "parse_count",
    "parse_seconds",
]


@verb
def devices(name: str | None = None, refresh: bool = False) -> list[dict] | dict:
    """All cards as plain dictionaries, or one with its sources; "this" is the machine at hand, measured once and again
    with `refresh`.

    NetsukeError for a name that is no card.
    """
    if name is None:
        return [devices(card) for card in Device.names()]
    device = Device.this(refresh) if name == "this" else Device.load(name)
    return msgspec.json.decode(msgspec.json.encode(device))  # lists, not tuples: exactly what --json prints
