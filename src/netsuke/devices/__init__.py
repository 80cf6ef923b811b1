"""Devices: what a target can hold and do, the budget to respect, and the cost of a piece of work there."""

from __future__ import annotations

import msgspec

from netsuke.devices.budget import Budget, format_bytes, format_seconds, parse_bytes
from netsuke.devices.cost import Cost, Work
from netsuke.devices.device import Device

__all__ = ["Budget", "Cost", "Device", "Work", "devices", "format_bytes", "format_seconds", "parse_bytes"]


def devices(name: str | None = None) -> list[dict] | dict:
    """All cards as plain dictionaries, or one with its sources; "this" measures the machine at hand.

    NetsukeError for a name that is no card.
    """
    if name is None:
        return [devices(card) for card in Device.names()]
    return msgspec.json.decode(msgspec.json.encode(Device.load(name)))  # lists, not tuples: exactly what --json prints
