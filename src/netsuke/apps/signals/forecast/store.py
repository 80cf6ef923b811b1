"""A trained forecaster as a JSON file: settings, about a hundred numbers, and what `update` needs to go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from netsuke.apps.signals.forecast.fold import Array, Shape
from netsuke.apps.signals.forecast.forecaster import LARGEST_N, METHODS, MixLinear, Weights
from netsuke.apps.signals.forecast.moments import Moments
from netsuke.errors import NetsukeError
from netsuke.models.files import read_json, write_atomically

FORMAT, VERSION = "netsuke-forecast", 1
LARGEST = 1 << 22  # rows of a look-back, horizon or period

Count = Annotated[int, msgspec.Meta(ge=1, le=LARGEST)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class _Moments(msgspec.Struct):
    sxx: list[list[float]]
    sxy: list[list[float]]
    syy: float
    weight: float
    tail: list[list[float]]


class _Asked(msgspec.Struct):
    """Settings before `fit` decided: what a backtest of the same data may start from."""

    lookback: int | str
    period: int | str
    alpha: float | str
    lpf: int | str


class _File(msgspec.Struct):
    format: str
    version: int
    horizon: Count
    lookback: Count
    period: Count
    alpha: Share
    lpf: Count
    method: str
    forget: Annotated[float, msgspec.Meta(gt=0, le=1)]
    missing: str
    names: Annotated[list[str], msgspec.Meta(min_length=1, max_length=100_000)]
    notes: list[str]
    scale: list[float]
    a1: list[list[float]]
    a2: list[list[float]]
    w1: list[list[list[float]]]
    w2: list[list[list[float]]]
    kernel: list[float] | None
    moments: _Moments | None
    asked: _Asked | None = None


def save(model: MixLinear, path: Path) -> None:
    """Writes `path` under a temporary name and renames it."""
    s, w, mo = model.shape, model.weights, model.moments
    held: dict[str, Any] | None = None
    if mo is not None:
        held = {"sxx": mo.sxx, "sxy": mo.sxy, "syy": mo.syy, "weight": mo.weight, "tail": mo.tail}
    out = {
        "format": FORMAT, "version": VERSION, "horizon": s.horizon, "lookback": s.lookback, "period": s.period,
        "alpha": model.alpha, "lpf": model.lpf, "method": model.method, "forget": model.forget, "missing": model.missing,
        "names": model.names, "notes": model.notes, "scale": model.scale, "a1": w.a1, "a2": w.a2, "w1": _pairs(w.w1),
        "w2": _pairs(w.w2), "kernel": w.kernel, "moments": held,
        "asked": dict(zip(_Asked.__struct_fields__, (model.lookback, model.period, *model.asked))),
    }  # fmt: skip
    text = json.dumps(out, default=lambda v: np.asarray(v).tolist(), allow_nan=False) + "\n"
    write_atomically(path, lambda f: f.write(text.encode()))


def _pairs(z: Array) -> Array:
    return np.stack([z.real, z.imag], -1)


def load(path: Path) -> MixLinear:
    """The forecaster in a file. Raises NetsukeError for other files, sizes that do not fit, and numbers that are none."""
    asked = f"load the forecaster {path.name}"
    found = read_json(path)
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise NetsukeError(
            asked, f"format {found.get('format')!r}, version {found.get('version')!r}", f"{FORMAT} {VERSION}",
            "netsuke forecast fit data.csv -o model.json",
        )  # fmt: skip
    try:
        f = msgspec.convert(found, _File)
    except msgspec.ValidationError as e:
        raise NetsukeError(asked, str(e), "the file as it was written") from None
    s, channels = Shape(f.lookback, f.horizon, f.period), len(f.names)
    if f.method not in METHODS or f.lookback % f.period or not 2 <= s.n <= LARGEST_N or f.lpf > s.n or s.m > LARGEST:
        raise NetsukeError(asked, "its settings do not fit together", "the file as it was written")
    wanted = f.asked or _Asked(f.lookback, f.period, f.alpha, f.lpf)
    model = MixLinear(
        f.horizon, wanted.lookback, wanted.period, wanted.alpha, wanted.lpf, method=f.method, forget=f.forget,
        missing=f.missing,
    )  # fmt: skip
    model.alpha, model.lpf = f.alpha, f.lpf

    def array(name: str, value: Any, *shape: int) -> Array:
        try:
            out = np.asarray(value, np.float64)
        except ValueError:
            out = np.zeros(0)
        if out.shape != shape or not np.isfinite(out).all():
            raise NetsukeError(asked, f"{name} is no array of {shape} finite numbers", "the file as it was written")
        return out

    w1, w2 = array("w1", f.w1, 2, f.lpf, 2), array("w2", f.w2, s.m, 2, 2)
    kernel = None if f.kernel is None else array("kernel", f.kernel, f.period + 1)
    model.weights = Weights(
        array("a1", f.a1, s.q, s.p), array("a2", f.a2, s.q, s.p), w1 @ [1, 1j], w2 @ [1, 1j], kernel
    )
    model.names, model.notes, model.shape = list(f.names), list(f.notes), s
    model.scale = array("scale", f.scale, channels)
    if not (model.scale > 0).all():
        raise NetsukeError(asked, "a scale is not above 0", "the file as it was written")
    if f.moments is not None:
        mo = model.moments = Moments(s, channels, f.forget)
        mo.sxx, mo.sxy = array("sxx", f.moments.sxx, s.n, s.n), array("sxy", f.moments.sxy, s.n, s.m)
        mo.syy, mo.weight = f.moments.syy, f.moments.weight
        tail = f.moments.tail
        if len(tail) > s.window - 1:
            raise NetsukeError(asked, f"it holds {len(tail)} last rows", f"at most {s.window - 1}")
        mo.tail = array("tail", tail, len(tail), channels) if tail else np.zeros((0, channels))
    return model
