"""`netsuke control fk.h5 --config arm.toml -o fw/`: a trained model and its controller as C for a microcontroller.

The configuration is TOML. [model] says how the network's inputs are laid out; [controller] holds the knobs of `NewtonMPC`:

    [model]
    controls = 6            # first the controls of `control_past` ticks, newest first,
    outputs = 3             # then the outputs of `output_past` ticks, newest first, then sensors
    control_past = 2
    output_past = 2
    sensors = 18
    ranges = { control = 0.5, outputs = [0.008, 0.007, 0.005], sensor = 0.5 }    # only for --weights int8

    [controller]
    q = [3e4, 5e4, 5e4]     # weights of squared errors
    change = [3e-3, 3e-3, 3e-3, 3e-3, 3e-3, 3e-3]
    last = 6                # ticks ahead
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from netsuke.errors import NetsukeError

LARGEST = 1 << 20  # bytes of a configuration
READERS = {".h5": "keras", ".hdf5": "keras", ".keras": "keras", ".onnx": "onnx", ".tflite": "tflite"}


class Ranges(msgspec.Struct, forbid_unknown_fields=True):
    control: float
    outputs: list[float]
    sensor: float = 0.5


class Model(msgspec.Struct, forbid_unknown_fields=True):
    controls: int
    outputs: int
    control_past: int = 1
    output_past: int = 1
    sensors: int = 0
    ranges: Ranges | None = None


class Configuration(msgspec.Struct, forbid_unknown_fields=True):
    model: Model
    controller: dict[str, Any]


def read_configuration(path: Path) -> Configuration:
    """The configuration. NetsukeError names the field that is wrong."""
    asked = f"read {path}"
    try:
        if path.stat().st_size > LARGEST:
            raise NetsukeError(asked, "it is larger than 1 MB", "a configuration in TOML")
        return msgspec.toml.decode(path.read_bytes(), type=Configuration)
    except OSError as e:
        raise NetsukeError(asked, e.strerror or str(e), "a configuration in TOML") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise NetsukeError(asked, str(e), "[model] and [controller] as in the help of netsuke control") from None


def control(
    model: Path, config: Path, output: Path, *, weights: str = "float32", path: Path | None = None,
    emulate: str | None = None, name: str = "controller",
) -> dict[str, Any]:  # fmt: skip
    """Writes the controller of a model file as C into the folder `output` and returns its facts.

    weights  "float32" or "int8" (activations stay float)
    path     .npy of (T, outputs): the self-test follows it, as does an emulated run; None: rest at zero
    emulate  "m4" or "m7": also run the loop, model against itself, on that board; instructions and memory are added

    Raises NetsukeError for files that cannot be read, a network that is no chain of dense layers, settings that do not fit, and
    a board that is unknown or lacks its tools; then nothing is written.
    """
    import numpy as np

    from netsuke.apps.control import firmware, simulate
    from netsuke.apps.control.network import DenseNetwork
    from netsuke.apps.control.predictor import Predictor
    from netsuke.devices.board import EmulatedBoard

    if emulate:
        EmulatedBoard.load(emulate, simulate.FLASH, simulate.RAM)  # refused before anything is written
    settings = read_configuration(config)
    shape = settings.model
    graph = _read(model)
    network = DenseNetwork.from_graph(graph, np.float32)
    predictor = Predictor(
        network, shape.controls, shape.outputs, shape.control_past, shape.output_past, shape.sensors
    )  # fmt: skip
    knobs = _knobs(settings.controller, config)
    plant, wanted = predictor, _path(path, shape.outputs, knobs.last)
    if weights == "int8":
        if shape.ranges is None or len(shape.ranges.outputs) != shape.outputs:
            raise NetsukeError(
                "write int8 weights", "the largest magnitudes of controls and outputs are not given",
                f"model.ranges with {shape.outputs} outputs in {config.name}",
            )  # fmt: skip
        predictor = predictor.quantized(shape.ranges.control, np.array(shape.ranges.outputs), shape.ranges.sensor)
    elif weights != "float32":
        raise NetsukeError(f"write {weights!r} weights", "there is no such type", "float32, int8")
    knobs.controller(predictor)  # refuses what does not fit before anything is written
    out = firmware.write_controller(predictor, knobs, output, name=name, path=wanted, start=wanted[0])
    if emulate:
        run = simulate.on_board(predictor, knobs, wanted, wanted[0], plant, core=emulate)
        out |= {
            "core": emulate, "ticks": len(run.instructions), "worst": int(run.instructions.max()),
            "mean": float(run.instructions.mean()), "stack": run.stack, "rms": run.trace.rms,
            "flash": sum(s.text + s.data for p, s in run.parts.items() if p not in ("board", "loop", "plant")),
        }  # fmt: skip
    return out


def _read(path: Path) -> Any:
    from importlib import import_module

    kind = READERS.get(path.suffix.lower())
    if kind is None:
        raise NetsukeError(f"read {path}", f"{path.suffix or 'no suffix'} is not known", ", ".join(READERS))
    return getattr(import_module(f"netsuke.graph.read.{kind}"), f"read_{kind}")(path)


def _knobs(values: dict[str, Any], config: Path) -> Any:
    from netsuke.apps.control.newton import NewtonMPC

    known = NewtonMPC.__dataclass_fields__
    if unknown := sorted(set(values) - set(known)):
        raise NetsukeError(f"read {config}", f"[controller] has the unknown field {unknown[0]!r}", ", ".join(known))
    try:
        return msgspec.convert(values, NewtonMPC, strict=True)
    except msgspec.ValidationError as e:
        raise NetsukeError(f"read {config}", f"[controller]: {e}", ", ".join(known)) from None


def _path(path: Path | None, outputs: int, horizon: int) -> Any:
    import numpy as np

    if path is None:
        return np.zeros((max(horizon, 20), outputs))
    try:
        wanted = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise NetsukeError(f"read the path {path}", str(e)[:100], "an .npy file") from None
    if not isinstance(wanted, np.ndarray) or wanted.dtype.kind not in "fi" or wanted.ndim != 2:
        raise NetsukeError(f"read the path {path}", "it is no table of numbers", f"(ticks, {outputs})")
    if wanted.shape[1] != outputs or not len(wanted) or not np.all(np.isfinite(wanted)):
        raise NetsukeError(f"read the path {path}", f"it is {wanted.shape}", f"finite numbers (ticks, {outputs})")
    return wanted.astype(np.float64)


def register(app: typer.Typer) -> None:
    @app.command("control", help="A learned model and the controller that steers with it, as C for a microcontroller.")
    def command(
        model: Annotated[Path, typer.Argument(help=f"dense network: {', '.join(READERS)}")],
        config: Annotated[Path, typer.Option(help="TOML with [model] and [controller]")],
        output: Annotated[Path, typer.Option("-o", "--output", help="the folder to write")],
        weights: Annotated[str, typer.Option(help="float32 or int8")] = "float32",
        path: Annotated[Path | None, typer.Option(help=".npy of (ticks, outputs) to follow in tests")] = None,
        emulate: Annotated[str | None, typer.Option(help="m4 or m7: run the loop there and count")] = None,
        name: Annotated[str, typer.Option(help="prefix of the C functions")] = "controller",
        as_json: Annotated[bool, typer.Option("--json", help="the facts as JSON")] = False,
    ) -> None:
        got = control(model, config, output, weights=weights, path=path, emulate=emulate, name=name)
        if as_json:
            print(json.dumps(got))
            return
        print(
            f"{output}: {got['weights']:,} bytes of weights, {got['workspace']:,} of workspace; make -C {output} test"
        )
        if emulate:
            print(
                f"{got['core']}: at most {got['worst']:,} instructions a tick, mean {got['mean']:,.0f}; flash {got['flash']:,} "
                f"bytes, stack {got['stack']:,}; RMS error {got['rms']:.4g} over {got['ticks']} ticks"
            )
