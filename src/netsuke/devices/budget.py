"""Budgets: the limits a model must respect, and the words in which people write sizes, times and energies.

Units: "KB", "MB", "GB" are decimal (thousands), "KiB", "MiB", "GiB" binary (1024s); the letter B may be left out
("512M", "64Ki") and case does not matter. Microcontroller vendors write "256 KB" and mean 262144 bytes: here it stays
256000, so that a budget copied from a data sheet errs on the side that still fits; write "256KiB" for all of it.
Times are "ns", "us", "µs", "ms", "s", "min"; energies "nJ", "uJ", "µJ", "mJ", "J", "kJ" (case matters: mJ is not MJ).
Plain numbers are bytes, seconds, joules, and for a loss a fraction.
"""

from __future__ import annotations

import decimal
import re
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING

from netsuke.errors import NetsukeError

if TYPE_CHECKING:
    from netsuke.devices.device import Device

BYTES = {
    "": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
    "ki": 2**10, "kib": 2**10, "mi": 2**20, "mib": 2**20, "gi": 2**30, "gib": 2**30, "ti": 2**40, "tib": 2**40,
}  # fmt: skip
# the Greek mu (U+03BC) and the micro sign (U+00B5) are two characters: keyboards give either
SECONDS = {"": "1", "ns": "1e-9", "us": "1e-6", "µs": "1e-6", "μs": "1e-6", "ms": "1e-3", "s": "1", "min": "60"}
JOULES = {"": "1", "nJ": "1e-9", "uJ": "1e-6", "µJ": "1e-6", "μJ": "1e-6", "mJ": "1e-3", "J": "1", "kJ": "1e3"}
FRACTIONS = {"": "1", "%": "0.01"}
COUNTS = {"": "1", "k": "1e3", "m": "1e6", "b": "1e9"}

NUMBER = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,3})?\s*([a-zµμ%]*)\s*", re.IGNORECASE)
LARGEST = Decimal(2**63 - 1)  # more than any file or address: refused before it becomes an integer of megabytes

Quantity = str | int | float


def _number(value: Quantity, units: dict, option: str, allowed: str, attempt: str) -> Decimal:
    """`value` in base units, above 0; NetsukeError that names `option` for anything else."""

    def refuse(found: str) -> NetsukeError:
        return NetsukeError(f"read {option}", found, allowed, attempt)

    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise refuse(f"{value!r} is neither a text nor a number")
    match = NUMBER.fullmatch(str(value))
    if match is None:
        raise refuse(f"{str(value)[:60]!r} is not a positive number with a unit")
    digits, exponent, unit = match.group(1), match.group(2) or "", match.group(3)
    if unit not in units:
        raise refuse(f"the unit {unit[:20]!r} in {str(value)[:60]!r} is not known")
    with decimal.localcontext(decimal.Context(prec=60)):
        number = Decimal(digits + exponent) * Decimal(units[unit])
    if not number > 0:
        raise refuse(f"{str(value)[:60]!r} leaves nothing")
    if number > LARGEST:
        raise refuse(f"{str(value)[:60]!r} is larger than any device")
    return number


def parse_bytes(text: Quantity, option: str = "a size") -> int:
    """Bytes in "512MB" (decimal), "256KiB" (binary) or a plain number. NetsukeError names `option`."""
    lower = text.lower() if isinstance(text, str) else text
    number = _number(lower, BYTES, option, 'sizes such as "512MB" (decimal) or "256KiB" (binary)', "512MB")
    if number < 1:
        raise NetsukeError(f"read {option}", f"{text!r} is less than one byte", "one byte or more", "8MB")
    return round(number)


def parse_seconds(text: Quantity, option: str = "a time") -> float:
    """Seconds in "50ms", "20us", "1.5 s" or a plain number. NetsukeError names `option`."""
    return float(_number(text, SECONDS, option, 'times such as "50ms", "20us" or "1.5s"', "50ms"))


def parse_joules(text: Quantity, option: str = "an energy") -> float:
    """Joules in "2mJ", "40uJ" or a plain number. NetsukeError names `option`."""
    return float(_number(text, JOULES, option, 'energies such as "2mJ", "40uJ" or "1J"', "2mJ"))


def parse_fraction(text: Quantity, option: str = "a fraction") -> float:
    """0.02 from "2%" or 0.02; above 1 refused, since a bare 2 may mean 2 % or 200 %. NetsukeError names `option`."""
    number = float(_number(text, FRACTIONS, option, 'a share such as "2%" or 0.02', "2%"))
    if number > 1:
        raise NetsukeError(f"read {option}", f"{text!r} is more than the whole", 'a share such as "2%" or 0.02', "2%")
    return number


def parse_count(text: Quantity, option: str = "a number") -> int:
    """2000000 from "2M", "2000K" or a plain number. NetsukeError names `option`."""
    lower = text.lower() if isinstance(text, str) else text
    number = _number(lower, COUNTS, option, 'numbers such as "2M", "500K" or "1.5B"', "2M")
    if number < 1:
        raise NetsukeError(f"read {option}", f"{text!r} is less than one", "one or more", "2M")
    return round(number)


def _scaled(value: float, steps: list[tuple[float, str]]) -> str:
    """`value` in the first step that it reaches, three significant digits."""
    size, unit = next(((s, u) for s, u in steps if abs(value) >= 0.9995 * s), steps[-1])
    scaled = value / size
    places = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
    return f"{scaled:.{places}f} {unit}"


def format_bytes(n: float) -> str:
    """ "8.00 MB": decimal units, three significant digits; whole bytes below a thousand."""
    if abs(n) < 1000:
        return f"{round(n)} B"
    return _scaled(n, [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")])


def format_seconds(s: float) -> str:
    """ "50.0 ms": three significant digits."""
    return "0 s" if s == 0 else _scaled(s, [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")])


@dataclass(frozen=True)
class Budget:
    """The limits to respect; None is no limit. Bytes, bytes, seconds, joules, and a fraction of the quality."""

    ram: int | None = None
    storage: int | None = None
    latency: float | None = None
    energy: float | None = None
    max_loss: float | None = None

    @classmethod
    def parse(
        cls,
        ram: Quantity | None = None,
        storage: Quantity | None = None,
        latency: Quantity | None = None,
        energy: Quantity | None = None,
        max_loss: Quantity | None = None,
    ) -> Budget:
        """A budget from what a user wrote: `Budget.parse(ram="512MB", latency="50ms", max_loss="2%")`.

        Zero, negative numbers and what cannot be read raise NetsukeError with the option's name.
        """
        return cls(
            ram=None if ram is None else parse_bytes(ram, "--ram"),
            storage=None if storage is None else parse_bytes(storage, "--storage"),
            latency=None if latency is None else parse_seconds(latency, "--latency"),
            energy=None if energy is None else parse_joules(energy, "--energy"),
            max_loss=None if max_loss is None else parse_fraction(max_loss, "--max-loss"),
        )

    @classmethod
    def for_device(cls, device: Device, parsed: Budget) -> Budget:
        """`parsed` with RAM and storage filled in from the device where no limit was given.

        A limit above what the device has raises NetsukeError. For RAM that is all of it (`ram_total`): somebody who
        knows the machine may claim more than the card's careful `ram`.
        """
        for option, limit, has in (("ram", parsed.ram, device.ram_total), ("storage", parsed.storage, device.storage)):
            if limit is not None and limit > has:
                raise NetsukeError(
                    f"plan for {device.name} with --{option} {format_bytes(limit)}",
                    f"it has {format_bytes(has)} ({has} bytes)", f"at most {has} bytes",
                    f"leave --{option} out, or choose a larger device",
                )  # fmt: skip
        return replace(
            parsed,
            ram=device.ram if parsed.ram is None else parsed.ram,
            storage=device.storage if parsed.storage is None else parsed.storage,
        )
