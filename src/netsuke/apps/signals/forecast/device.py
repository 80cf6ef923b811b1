"""A forecaster as a folder of C99 for a microcontroller, and its run on the emulated board.

    src/NAME.h, NAME.c          NAME_run(x, y); with updating NAME_push, NAME_refit, NAME_predict
    src/ns_forecast.*           the forecast and the moments, as in this package
    test/NAME_test.c            known forecasts of the reference: `make test`
    Makefile, forecast.json

Weights lie in flash: float32 as the folded matrix or as its factors, whichever is smaller, or int8 codes of the folded matrix
with one scale; activations are float32. RAM is the look-back and the forecast and nothing else, 4 (S + H) bytes a channel. The
networks of `export --home c` would need a second copy of the look-back for the smoothing: hence a kernel of its own.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netsuke.apps.signals.forecast import fold
from netsuke.apps.signals.forecast.fold import Array
from netsuke.errors import NetsukeError
from netsuke.models.artifact import check_folder, write_texts
from netsuke.models.files import read_json

if TYPE_CHECKING:
    from netsuke.apps.signals.forecast.forecaster import MixLinear
    from netsuke.devices.board import EmulatedBoard

SOURCES = Path(__file__).parent / "csrc"
CORE = ("ns_forecast.h", "ns_forecast.c")
FORMAT, FACTS = "netsuke-forecast-c", "forecast.json"
KINDS = ("float32", "int8")
TOLERANCE = 1e-4  # of a forecast of values of unit deviation
RUNS = 2  # of the self-test
LARGEST_P = 16  # ns_forecast.h
SWEEPS = 3  # of a refit in tests and measurements


@dataclass(frozen=True)
class Table:
    """An array of the C file: a field of ns_forecast; variables live in RAM."""

    field: str
    data: Array
    variable: bool = False


def tables(model: MixLinear, weights: str, updating: bool) -> tuple[list[Table], float, int]:
    """(arrays, scale of the codes, rank of the frequency path's factors)"""
    s, w = model.shape, model.weights
    kernel = [] if w.kernel is None else [Table("kernel", w.kernel.astype(np.float32))]
    time, frequency = w.paths(model.alpha, s)
    if weights == "int8":
        scale = float(np.abs(time + frequency).max()) / 127 or 1.0
        return [*kernel, Table("codes", np.rint((time + frequency) / scale).astype(np.int8))], scale, 0
    u, size, v = np.linalg.svd(frequency, full_matrices=False)
    rank = int(np.sum(size > 1e-7 * max(np.linalg.norm(time + frequency, 2), 1e-30)))
    factors = []
    if model.alpha > 0:
        factors = [Table("across", model.alpha * w.a2, updating), Table("inside", w.a1, updating)]
    if rank:
        root = np.sqrt(size[:rank])
        factors += [Table("left", u[:, :rank] * root), Table("right", root[:, None] * v[:rank])]
    if not updating and sum(t.data.size for t in factors) >= time.size:
        factors, rank = [Table("matrix", time + frequency)], 0
    return [*kernel, *(Table(t.field, t.data.astype(np.float32), t.variable) for t in factors)], 1.0, rank


def values_of(parts: list[Table], scale: float, model: MixLinear) -> tuple[Array, Array | None]:
    """(matrix, kernel) in double precision that the arrays stand for: the reference of the C."""
    by = {t.field: t.data.astype(np.float64) for t in parts}
    matrix = np.zeros((model.shape.m, model.shape.n)) + by.get("matrix", 0.0)
    if "codes" in by:
        matrix = np.float64(np.float32(scale)) * by["codes"]
    if "across" in by:
        matrix = matrix + fold.time_matrix(by["inside"], by["across"], model.shape)
    if "left" in by:
        matrix = matrix + by["left"] @ by["right"]
    return matrix, by.get("kernel")


def render(template: str, **view: Any) -> str:
    """A template of csrc/ with the C home's filters for numbers and names."""
    from netsuke.export.c.source import environment

    return environment().from_string((SOURCES / template).read_text()).render(view)


def write_forecaster(
    model: MixLinear, out: Path, *, name: str = "forecast", weights: str = "float32", updating: bool = False
) -> dict[str, Any]:
    """Writes the folder `out` and returns its forecast.json: bytes of weights, of RAM, and the multiply-accumulates.

    updating   with NAME_push and NAME_refit: the time path is learned on from new rows, beginning with the moments of `fit`
               (in flash and in RAM); alpha must be 1, without smoothing
    The folder is complete or not there; one written before is replaced. Raises NetsukeError for names that C does not take,
    for anything else at `out`, and for forecasters that the chip cannot update.
    """
    asked = f"write the forecaster to {out.name}"
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name) or name[:3] == "ns_" or name in ("all", "clean", "test", "lib"):
        raise NetsukeError(asked, f"the name {name!r} is no prefix of C functions", "lower-case letters, digits, _")
    if weights not in KINDS:
        raise NetsukeError(asked, f"weights of the kind {weights!r}", ", ".join(KINDS))
    plain = model.moments is not None and model.weights.kernel is None
    if updating and (model.alpha != 1 or not plain or weights != "float32"):
        raise NetsukeError(
            asked, f"alpha is {model.alpha:g}, weights are {weights}, the method is {model.method!r}",
            "alpha 1, float32 and moments where the chip learns: it refines the time path only", "fit with --alpha 1",
        )  # fmt: skip
    if updating and model.shape.p > LARGEST_P:
        raise NetsukeError(asked, f"the look-back has {model.shape.n} periods", f"at most {LARGEST_P**2}")
    out = check_folder(out, asked, FACTS, FORMAT)
    view, facts = _view(model, name, weights, updating)
    files = {f"src/{name}.h": render("forecast.h.j2", **view), f"src/{name}.c": render("forecast.c.j2", **view)}
    files |= {f"src/{part}": (SOURCES / part).read_text() for part in CORE}
    files |= {f"test/{name}_test.c": render("test.c.j2", **view), "Makefile": render("Makefile.j2", **view)}
    files[FACTS] = json.dumps(facts, indent=1) + "\n"
    write_texts(out, files, asked)
    return facts


def _view(model: MixLinear, name: str, weights: str, updating: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the templates show, facts)"""
    s = model.shape
    parts, scale, rank = tables(model, weights, updating)
    matrix, kernel = values_of(parts, scale, model)
    rng = np.random.default_rng(0)
    phase = np.sin(2 * np.pi * np.arange(s.lookback) / s.period)
    golden = []
    for _ in range(RUNS):
        x = (phase + 0.3 * rng.normal(size=s.lookback)).astype(np.float32)
        golden.append((x, fold.forecast(x.astype(np.float64), matrix, kernel, s).astype(np.float32)))
    view = {
        "name": name, "title": f"MixLinear {name}", "shape": s, "tables": parts, "rank": rank, "scale": np.float32(scale),
        "golden": golden, "tolerance": TOLERANCE, "updating": updating, "channels": len(model.names), "sweeps": SWEEPS,
        "forget": float(model.forget), "inverse": (1 / model.scale).astype(np.float32),
    }  # fmt: skip
    facts = {
        "format": FORMAT, "version": 1, "name": name, "lookback": s.lookback, "horizon": s.horizon, "period": s.period,
        "kind": weights, "updating": updating, "channels": len(model.names),
        "weights": sum(t.data.nbytes for t in parts) + (4 if weights == "int8" else 0),
        "form": "codes" if weights == "int8" else "folded" if parts[-1].field == "matrix" else "factors",
        "ram_per_channel": 4 * (s.lookback + s.horizon), "macs": fold.macs(s, kernel is not None),
    }  # fmt: skip
    if updating:
        sxx, sxy = model.moments.sxx[np.tril_indices(s.n)], model.moments.sxy
        view |= {"sxx": sxx.astype(np.float32), "sxy": sxy.astype(np.float32)}
        facts |= state_bytes(s, len(model.names))
    return view, facts


def state_bytes(shape: fold.Shape, channels: int) -> dict[str, Any]:
    """RAM of firmware that learns: the shared sums `moments`, `window_per_channel` (last rows, and how many there are), `state`
    by number of channels (sums, windows and the factors that are refined), and `scratch` of one forecast."""
    n, m = shape.n, shape.m
    moments, window, factors = 4 * (n * (n + 1) // 2 + n * m), 4 * shape.window + 4, 8 * shape.q * shape.p
    state = {str(c): moments + factors + c * window for c in sorted({1, channels})}
    return {"moments": moments, "window_per_channel": window, "state": state, "scratch": 4 * shape.lookback}


def run_on_board(
    folder: Path,
    core: EmulatedBoard | str,
    x: Array,
    rows: Array | None = None,
    *,
    every: int = 0,
    optimise: str = "-O2",
) -> dict[str, Any]:
    """Builds a folder for a board ("m4", "m7") and forecasts from look-backs x (n, lookback); with `rows` (T, channels) a
    folder with updating then learns from them, refits and forecasts every channel.

    Returns {outputs (n, horizon), instructions (per forecast), stack_peak, flash and ram (bytes of the forecaster
    and its look-back and forecast, without the board's start-up code and the C library)}, and with rows {forecasts (channels,
    horizon), state: [sxx, sxy, across, inside], push, refit: instructions}. With `every` it refits after that many rows, again
    and again, and there is {factors (refits, 2, q, p): across and inside after each}; push then holds its share of them.
    """
    from netsuke.devices.board import EmulatedBoard
    from netsuke.export.c.emulate import ROOM

    facts = read_json(folder / FACTS)
    if facts.get("format") != FORMAT:
        raise NetsukeError(f"run {folder.name} on a board", f"it is no folder of the format {FORMAT}")
    board = EmulatedBoard.load(core, **ROOM) if isinstance(core, str) else core
    shape = fold.Shape(facts["lookback"], facts["horizon"], facts["period"])
    name, updating = facts["name"], facts["updating"]
    with tempfile.TemporaryDirectory(prefix="netsuke-forecast-") as temporary:
        main = Path(temporary) / "board_main.c"
        main.write_text(render("board_main.c.j2", name=name, shape=shape, updating=updating,
                               channels=facts["channels"], sweeps=SWEEPS, every=every))  # fmt: skip
        sources = [main, folder / f"src/{name}.c", folder / "src/ns_forecast.c"]
        firmware = board.build(sources, Path(temporary) / "out", include=[folder / "src"], optimise=optimise)
        own = [p for part, p in firmware.parts.items() if part in ("board_main", name, "ns_forecast")]
        given = {"input.bin": np.ascontiguousarray(x, np.float32).tobytes()}
        if updating:
            given["rows.bin"] = np.ascontiguousarray(np.zeros((0, 1)) if rows is None else rows, np.float32).tobytes()
        run = firmware.run(files=given, seconds=600)
        y = np.frombuffer(run.files["output.bin"], np.float32).reshape(-1, shape.horizon)
        counts = {k: [int(line.split()[1]) for line in run.text.splitlines() if line.startswith(f"{k} ")]
                  for k in ("run", "push", "refit")}  # fmt: skip
        out = {
            "outputs": y[: len(x)], "instructions": int(np.median(counts["run"])) if counts["run"] else 0,
            "stack_peak": run.stack_peak, "flash": sum(p.text + p.data for p in own), "ram": sum(p.data + p.bss for p in own),
            "weights": sum(size for symbol, size in firmware.symbols().items() if symbol.startswith(f"{name}_")
                           and symbol.removeprefix(f"{name}_") in _FIELDS),
        }  # fmt: skip
        if rows is not None and updating:
            n, m, factor = shape.n, shape.m, (shape.q, shape.p)
            ends = np.cumsum([n * (n + 1) // 2, n * m, shape.q * shape.p])
            sxx, sxy, across, inside = np.split(np.frombuffer(run.files["state.bin"], np.float32), ends)
            state = [sxx, sxy.reshape(n, m), across.reshape(factor), inside.reshape(factor)]
            if every:
                out["factors"] = np.frombuffer(run.files["factors.bin"], np.float32).reshape(-1, 2, *factor)
            out |= {"forecasts": y[len(x) :], "push": counts["push"][0], "refit": counts["refit"][0], "state": state}
    return out


_FIELDS = ("kernel", "matrix", "codes", "across", "inside", "left", "right")
