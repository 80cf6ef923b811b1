"""The cost model: a roofline (Williams, Waterman and Patterson, 2009) with a fixed price per layer.

    arithmetic = macs / rate + float_macs / float rate
    latency    = max(arithmetic, bytes_read / ram_bandwidth, bytes_from_storage / storage_bandwidth) + layers * overhead
    energy     = macs * energy_per_mac + float_macs * its own + (bytes_read + bytes_from_storage) * energy_per_byte

Arithmetic, RAM traffic and storage traffic are taken to overlap, so that the slowest of the three is what one waits
for. Energy is what the work adds above the idle draw. On a microcontroller weights stay in flash: count them as
`bytes_from_storage`, not as `bytes_read`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from netsuke.errors import NetsukeError

if TYPE_CHECKING:
    from netsuke.devices.device import Device

BOUNDS = ("memory", "arithmetic", "storage", "overhead")


@dataclass(frozen=True)
class Work:
    """What one inference (one token, one image, one window) asks of a device.

    macs                multiply-accumulates at the rate of `bits`
    float_macs          multiply-accumulates in float32 beside them
    bytes_read          bytes read from RAM: weights, key-value cache
    bits                width of the weights; it picks the arithmetic rate
    bytes_from_storage  bytes that must come from flash or disk each time
    layers              operators launched one after another, each of which pays the device's overhead; a share of one for
                        threads that are awake already
    ram, storage        bytes held at the peak, bytes kept on flash or disk; they pass through into `Cost`
    """

    macs: float
    bytes_read: float
    bits: int = 16
    bytes_from_storage: float = 0
    layers: float = 0
    ram: int = 0
    storage: int = 0
    float_macs: float = 0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0:
                raise NetsukeError(
                    "price a piece of work", f"{field.name} is {value}", "finite numbers that are not negative"
                )


@dataclass(frozen=True)
class Cost:
    """What a piece of work costs on a device: seconds, joules, bytes, and which limit binds ("memory", "arithmetic",
    "storage", or "overhead" when launching the layers takes longer than the work in them)."""

    latency: float
    energy: float
    peak_ram: int
    storage: int
    bound: str


def roofline(device: Device, work: Work) -> Cost:
    """The cost of `work` on `device`; the equations stand at the top of this file."""
    times = {
        "memory": work.bytes_read / device.ram_bandwidth,
        "arithmetic": work.macs / device.rate(work.bits) + work.float_macs / device.rate(32),
        "storage": work.bytes_from_storage / device.storage_bandwidth,
    }
    bound = max(times, key=times.__getitem__)
    busy, overhead = times[bound], work.layers * device.overhead_s
    traffic = work.bytes_read + work.bytes_from_storage
    return Cost(
        latency=busy + overhead,
        energy=work.macs * device.mac_energy(work.bits)
        + work.float_macs * device.mac_energy(32)
        + traffic * device.energy_per_byte,
        peak_ram=work.ram,
        storage=work.storage,
        bound="overhead" if overhead > busy else bound,
    )
