"""`Device`: what a target can hold and do, as a card of numbers in which every number says where it comes from.

Cards are TOML files in `cards/`. `Device.load("pi4")` reads one, `Device.load("mine.toml")` reads yours,
`Device.load("this")` is the machine at hand, measured. Three kinds of source: a data sheet (named), "measured: …", and
"estimated: …" with the sum behind it. Rates are those of the processor cores unless the source names another unit:
an accelerator that none of the homes can reach would only flatter the plan.
"""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path

import msgspec

from netsuke.devices.cost import Cost, Work, roofline
from netsuke.errors import NetsukeError

CARDS = Path(__file__).parent / "cards"
KINDS = ("mcu", "sbc", "phone", "laptop", "browser", "server")
HOMES = ("native", "c", "web", "onnx", "executorch", "gguf")
WIDTHS = ("int8", "f16", "f32")  # narrow to wide: a device without the narrow one computes in the next
LARGEST_CARD = 1 << 20


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One target.

    name, title, kind   "pi4", "Raspberry Pi 4 …", one of KINDS
    ram, ram_total      bytes a model may use (what the system keeps is taken off), bytes there are
    storage             bytes a model may take: the flash of a microcontroller, a sane share of a disk
    ram_bandwidth       bytes/s, sustained read, all cores
    storage_bandwidth   bytes/s, sequential read
    rates               multiply-accumulates/s by width: "f32" always, "f16" and "int8" where they differ
    cores, isa          processor cores, instruction sets worth choosing a kernel by
    overhead_s          seconds to launch one operator or layer
    energy_per_mac      joules by width, above idle; the same keys as `rates`
    energy_per_byte     joules to read one byte of RAM
    idle_power          watts when nothing runs, or None where nobody has said
    homes               what runs there, of HOMES
    sources             where each number is from; dotted for the entries of a table ("rates.int8")

    On microcontrollers whose instructions netsuke can count (an emulated board runs the same C):
    core                    "cortex-m4", "cortex-m7": the processor that the compiler and the board are asked for
    clock                   Hz
    cycles_per_instruction  what one instruction takes in the kernels, flash and its waits included
    """

    name: str
    title: str
    kind: str
    ram: int
    ram_total: int
    storage: int
    ram_bandwidth: float
    storage_bandwidth: float
    rates: dict[str, float]
    cores: int
    isa: tuple[str, ...]
    overhead_s: float
    energy_per_mac: dict[str, float]
    energy_per_byte: float
    homes: tuple[str, ...]
    sources: dict[str, str]
    idle_power: float | None = None
    core: str | None = None
    clock: float | None = None
    cycles_per_instruction: float | None = None

    def __post_init__(self):
        def refuse(found: str, allowed: str, attempt: str = "") -> NetsukeError:
            return NetsukeError(f"use the device card {self.name!r}", found, allowed, attempt)

        if self.kind not in KINDS:
            raise refuse(f"kind is {self.kind!r}", ", ".join(KINDS))
        for home in self.homes:
            if home not in HOMES:
                raise refuse(f"homes has {home!r}", ", ".join(HOMES))
        for table in ("rates", "energy_per_mac"):
            keys = getattr(self, table)
            if "f32" not in keys or not set(keys) <= set(WIDTHS):
                raise refuse(f"{table} has {', '.join(keys) or 'nothing'}", "f32, and where it differs f16 and int8")
        if self.rates.keys() != self.energy_per_mac.keys():
            raise refuse("rates and energy_per_mac differ in their keys", "the same keys in both")
        for field, value in self.numbers().items():
            if not math.isfinite(value) or value < 0 or (value == 0 and field not in ("overhead_s", "idle_power")):
                raise refuse(f"{field} is {value}", "finite numbers above 0")
            if not self.sources.get(field, "").strip():
                raise refuse(
                    f"{field} has no source", "one entry in [sources] for every number",
                    f'"{field}" = "data sheet, section …" or "estimated: …"',
                )  # fmt: skip
        if self.ram > self.ram_total:
            raise refuse(f"ram {self.ram} is more than ram_total {self.ram_total}", "ram at most ram_total")

    def numbers(self) -> dict[str, float]:
        """Every number of the card by its dotted name: the keys that `sources` must have."""
        out = {}
        for field, value in msgspec.structs.asdict(self).items():
            if field in ("rates", "energy_per_mac"):
                out |= {f"{field}.{key}": number for key, number in value.items()}
            elif isinstance(value, int | float):
                out[field] = value
        return out

    @staticmethod
    def names() -> list[str]:
        """The cards that come with the package, sorted."""
        return sorted(path.stem for path in CARDS.glob("*.toml"))

    @classmethod
    def load(cls, name_or_path: str | Path) -> Device:
        """The card of that name, "this" for the machine at hand, or a card file whose path ends in .toml.

        NetsukeError for an unknown name (with the nearest ones), an unknown key, a wrong type, a missing source.
        """
        asked = str(name_or_path)
        if asked == "this":
            return cls.this()
        if asked.endswith(".toml"):
            return read_card(Path(asked))
        names = cls.names()
        if asked not in names:
            near = difflib.get_close_matches(asked.lower(), names, n=3, cutoff=0.4)
            raise NetsukeError(
                f"find the device {asked[:80]!r}", "there is no card of that name",
                f"this, {', '.join(names)}, or a path ending in .toml", " or ".join(near) or "netsuke devices",
            )  # fmt: skip
        return read_card(CARDS / f"{asked}.toml")

    @classmethod
    def this(cls, refresh: bool = False) -> Device:
        """The machine at hand, measured once (10 to 20 s) and kept in the user's cache; `refresh` measures again."""
        from netsuke.devices.probe import cached_probe

        return cached_probe(refresh)

    def _by_width(self, table: dict[str, float], bits: int) -> float:
        first = 0 if bits <= 8 else 1 if bits <= 16 else 2
        return next(table[width] for width in WIDTHS[first:] if width in table)

    def rate(self, bits: int) -> float:
        """Multiply-accumulates/s with weights of `bits` bits: int8 up to 8, f16 up to 16, else f32; a width that the
        device lacks is computed in the next wider one."""
        return self._by_width(self.rates, bits)

    def mac_energy(self, bits: int) -> float:
        """Joules for one multiply-accumulate with weights of `bits` bits."""
        return self._by_width(self.energy_per_mac, bits)

    def seconds(self, instructions: float) -> float | None:
        """How long counted instructions take; None on a device whose clock the card does not give."""
        if self.clock is None or self.cycles_per_instruction is None:
            return None
        return instructions * self.cycles_per_instruction / self.clock

    def cost(self, work: Work) -> Cost:
        """Latency, energy and memory of `work` here, by the roofline of `cost.py`."""
        return roofline(self, work)


def read_card(path: Path) -> Device:
    """A card from a TOML file; NetsukeError names what is wrong with it."""

    def refuse(found: str, allowed: str = "", attempt: str = "") -> NetsukeError:
        return NetsukeError(f"read the device card {path.name}", found, allowed, attempt)

    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_CARD + 1)
    except (OSError, ValueError) as error:
        raise refuse(getattr(error, "strerror", None) or "the path is not usable", "a readable TOML file") from None
    if len(text) > LARGEST_CARD:
        raise refuse("the file is larger than 1 MiB", "a card of a few kilobytes")
    try:
        return msgspec.toml.decode(text.decode("utf-8"), type=Device)
    except msgspec.ValidationError as error:
        unknown = re.search(r"unknown field `([^`]*)`", str(error))
        if unknown:
            near = difflib.get_close_matches(unknown[1], Device.__struct_fields__, n=1)
            raise refuse(
                f"unknown key {unknown[1]!r}", ", ".join(Device.__struct_fields__),
                f"{near[0]!r}" if near else "remove it",
            ) from None  # fmt: skip
        raise refuse(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise refuse(f"not valid TOML ({error})"[:300], "a UTF-8 TOML file") from None
