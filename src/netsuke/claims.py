"""Claims: what a published system promises, measured here by calling netsuke's own parts.

A file `systems/<slug>.py` holds a docstring (what the paper gives, which files implement it, what differs, what cannot
be shown) and a list `CLAIMS`. A claim that fails is published as failing; a claim whose data are missing says so.
"""

from __future__ import annotations

import importlib
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from netsuke.errors import NetsukeError

VERDICTS = ("met", "not met", "cannot be shown")


@dataclass(frozen=True)
class Measured:
    """`shown` is the figure in words for the table; `met` is the verdict (None: there is no bar to meet here);
    `values` are the raw numbers; `control` says what the control gave, if one was run."""

    shown: str
    met: bool | None
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """`measure(quick)` returns a Measured; `control(quick)` must come out NOT met (wrong sign, random scores): a control
    that passes turns the claim's verdict into "not met". A claim without `measure` cannot be shown, because of `why`."""

    text: str
    paper: str
    bar: str = ""
    measure: Callable[[bool], Measured] | None = None
    control: Callable[[bool], Measured] | None = None
    needs: tuple[str, ...] = ()  # files below $NETSUKE_DATA
    why: str = ""


def catalogue() -> list[dict[str, str]]:
    """All published systems of the product: slug, title, paper, year, stage. Sorted by slug."""
    text = resources.files("netsuke.systems").joinpath("catalogue.toml").read_text(encoding="utf-8")
    return sorted(tomllib.loads(text)["system"], key=lambda s: s["slug"])


def module_of(slug: str) -> Any:
    """The system's module, or NetsukeError when the slug is unknown or not built yet."""
    import difflib

    known = [s["slug"] for s in catalogue()]
    if slug not in known:
        near = difflib.get_close_matches(slug, known, 3)
        raise NetsukeError(
            f"reproduce {slug!r}", "there is no such system", ", ".join(near or known), "netsuke reproduce --list"
        )
    try:
        return importlib.import_module(f"netsuke.systems.{slug.replace('-', '_')}")
    except ModuleNotFoundError:
        raise NetsukeError(f"reproduce {slug}", "this system is not built yet", ", ".join(implemented())) from None


def implemented() -> list[str]:
    """Slugs whose claims can be run today."""
    folder = resources.files("netsuke.systems")
    return [s["slug"] for s in catalogue() if folder.joinpath(s["slug"].replace("-", "_") + ".py").is_file()]


def run_claim(claim: Claim, quick: bool) -> dict[str, Any]:
    row = {"text": claim.text, "paper": claim.paper, "bar": claim.bar, "measured": "", "values": {}}
    from netsuke.data.catalogue import missing

    absent = missing(claim.needs)
    if claim.measure is None or absent:
        why = claim.why or f"data absent: {', '.join(absent)} (set NETSUKE_DATA)"
        return {**row, "verdict": "cannot be shown", "measured": why}
    begin = time.perf_counter()
    got = claim.measure(quick)
    row |= {"measured": got.shown, "values": got.values, "verdict": "met" if got.met else "not met"}
    if got.met is None:
        row["verdict"] = "cannot be shown"
    if claim.control is not None:
        control = claim.control(quick)
        row["control"] = control.shown
        if control.met:
            row["verdict"] = "not met"
            row["measured"] += f"; but the control passes too: {control.shown}"
    return {**row, "seconds": round(time.perf_counter() - begin, 1)}
