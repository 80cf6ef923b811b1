"""What a method is: a frozen dataclass, a published technique with its knobs, handed to `apply`."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from netsuke.errors import NetsukeError
from netsuke.tasks.base import Task


@dataclass(frozen=True)
class Method:
    """Base of all methods. Subclasses are frozen dataclasses whose fields are JSON values.

    `apply` returns a new model and leaves its argument untouched; it is deterministic under the method's seed; it keeps
    gradients off unless `trains` says otherwise. `strengths` runs from the identity to the strongest sensible setting.

    saves    what gets less with strength: "bytes" of the stored model, "traffic", the weights read per decoded token, or "loss"
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    trains: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    saves: ClassVar[str] = "bytes"

    def accepts(self, model: nn.Module) -> str | None:
        """None, or the reason why this model cannot be treated, naming the layer."""
        raise NotImplementedError

    def apply(self, model: nn.Module, task: Task | None = None) -> nn.Module:
        raise NotImplementedError

    def strengths(self) -> list[Method]:
        raise NotImplementedError

    def require_whole(self, **least: int) -> None:
        """Raises NetsukeError for the first of the named knobs that is no whole number from its least value on."""
        for knob, lowest in least.items():
            value = getattr(self, knob)
            if type(value) is not int or value < lowest:
                raise NetsukeError(f"build {self.name}", f"{knob}={value!r}", f"a whole number from {lowest}")

    def to_json(self) -> dict[str, Any]:
        return {"method": self.name, **dataclasses.asdict(self)}

    def checked(self, model: nn.Module, task: Task | None) -> nn.Module:
        """A private copy of `model` to work on, after `accepts` and the data have been checked."""
        reason = self.accepts(model)
        if reason:
            raise NetsukeError(f"apply {self.name}", reason)
        if self.needs_data and task is None:
            raise NetsukeError(f"apply {self.name}", "no calibration data was given", "a task", "--data FILE")
        return copy.deepcopy(model)


def registry() -> dict[str, type[Method]]:
    """All methods by name: one row each. A row earns the contract tests of tests/compress/test_contract.py."""
    from netsuke.compress.factorize import Factorize
    from netsuke.compress.inherit import Inherit
    from netsuke.compress.modegpt import MoDeGPT
    from netsuke.compress.quantize import Quantize
    from netsuke.compress.sparsify import Sparsify
    from netsuke.train.heal import Heal
    from netsuke.train.mobilequant import MobileQuant
    from netsuke.train.zeroqat import ZeroQAT

    return {m.name: m for m in (Quantize, MoDeGPT, Factorize, Inherit, Sparsify, ZeroQAT, MobileQuant, Heal)}


def from_json(value: dict[str, Any]) -> Method:
    """The method that `to_json` wrote. Raises NetsukeError for an unknown method or knob, by name."""
    known, value = registry(), dict(value)
    name = value.pop("method", None)
    if name not in known:
        raise NetsukeError("build a method", f"unknown method {name!r}", ", ".join(sorted(known)))
    allowed = {f.name for f in dataclasses.fields(known[name])}
    for key in value:
        if key not in allowed:
            raise NetsukeError(f"build {name}", f"unknown knob {key!r}", ", ".join(sorted(allowed)))
    return known[name](**value)


def parse(text: str) -> Method:
    """A method from "NAME" or "NAME:knob=value,knob=value" (values as JSON, else as text), or from a JSON object."""
    if text.lstrip().startswith("{"):
        try:
            return from_json(json.loads(text))
        except json.JSONDecodeError as e:
            raise NetsukeError("build a method", f"{text[:60]!r} is not JSON ({e.msg})", "NAME:knob=value") from None
    name, _, rest = text.partition(":")
    value: dict[str, Any] = {"method": name}
    for pair in filter(None, rest.split(",")):
        knob, equals, given = pair.partition("=")
        if not equals:
            raise NetsukeError(f"build {name}", f"{pair!r} sets nothing", "knob=value", f"{name}:bits=4")
        try:
            value[knob.strip()] = json.loads(given)
        except json.JSONDecodeError:
            value[knob.strip()] = given.strip()
    return from_json(value)
