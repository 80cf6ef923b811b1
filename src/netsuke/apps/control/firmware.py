"""The controller as a folder of C99: weights in flash, one static workspace, no malloc, the bits of the Python reference.

    src/NAME.h, NAME.c          NAME_reset(y), NAME_step(y, sensors, reference, u); weights and settings as constants
    src/ns_mpc.*, ns_dense.*    the controller and the network with its Jacobian, as in this package
    test/NAME_test.c            known ticks of the reference: `make test`
    Makefile, control.json

The network is not the code that `export --home c` prints: the controller needs its Jacobian and sensors apart from histories.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.apps.control.arithmetic import Array
from netsuke.apps.control.loop import NetworkPlant, ahead
from netsuke.apps.control.newton import NewtonMPC
from netsuke.apps.control.predictor import Predictor
from netsuke.errors import NetsukeError
from netsuke.export.c.source import environment
from netsuke.models.artifact import check_folder, write_texts

SOURCES = Path(__file__).parent / "csrc"
CORE = ("ns_dense.h", "ns_dense.c", "ns_mpc.h", "ns_mpc.c")
FORMAT, FACTS = "netsuke-control-c", "control.json"
TEST_TICKS = 60
TOLERANCE = 1e-4  # of a control in the self-test


def render(template: str, **view: Any) -> str:
    """A template of csrc/ with the C home's filters for numbers and names."""
    return environment().from_string((SOURCES / template).read_text()).render(view)


def floats(predictor: Predictor, knobs: NewtonMPC) -> int:
    """Floats of the workspace: what ns_mpc_floats says."""
    m, p, n = predictor.controls, predictor.outputs, predictor.controls * knobs.moves
    outs = [len(layer.weight) for layer in predictor.network.layers]
    histories = (predictor.control_past - 1 + knobs.last) * m + (predictor.output_past + knobs.last) * p
    network = 2 * outs[0] + knobs.last * sum(outs) + 2 * p * max(predictor.moving, *outs)
    network += max(predictor.moving, predictor.sensors)
    return histories + network + 2 * knobs.last * p * n + n * n + 6 * n + 3 * p


def controller_c(predictor: Predictor, knobs: NewtonMPC, name: str) -> dict[str, str]:
    """File name -> text of the sources that go into a firmware. Raises NetsukeError for settings that C does not have."""
    if knobs.derivatives == "hessian":
        raise NetsukeError(
            "print the controller as C", "derivatives are 'hessian', which only Python has", "exact or differences"
        )
    model, f = predictor.as_type(np.float32), environment().filters["number"]
    settings = {
        "net": "&network", "controls": model.controls, "outputs": model.outputs, "control_past": model.control_past,
        "output_past": model.output_past, "sensors": model.sensors, "first": knobs.first, "last": knobs.last,
        "moves": knobs.moves, "starts": knobs.starts, "iterations": knobs.iterations, "levels": knobs.levels,
        "differences": int(knobs.derivatives == "differences"), "factor": f(float(knobs.factor)),
        "epsilon": f(float(knobs.epsilon)), "enough": f(float(knobs.enough)),
        "correction": f(float(knobs.correction)), "low": f(float(knobs.low)),
        "high": f(float(knobs.high)), "sharpness": f(float(knobs.sharpness)), "range": f(float(knobs.range)),
        "centre": f(float(knobs.centre)), "q": "q", "lambda": "lambda", "seed": f"{knobs.seed}u",
    }  # fmt: skip
    view = {
        "name": name, "title": name, "predictor": model, "knobs": knobs, "settings": settings,
        "floats": floats(model, knobs), "network": render("network.j2", network=model.network, prefix=name),
        "q": np.float32(knobs.q), "lambda": np.float32(knobs.change),
    }  # fmt: skip
    own = {f"{name}.h": render("controller.h.j2", **view), f"{name}.c": render("controller.c.j2", **view)}
    return own | {part: (SOURCES / part).read_text() for part in CORE}


def plant_c(predictor: Predictor, title: str) -> str:
    """The C of a network as the plant of a simulated loop."""
    model = predictor.as_type(np.float32)
    widest = sum(len(layer.weight) for layer in model.network.layers)
    network = render("network.j2", network=model.network, prefix="plant")
    return render("plant.c.j2", title=title, predictor=model, network=network, widest=widest)


def facts(predictor: Predictor, knobs: NewtonMPC) -> dict[str, Any]:
    """Bytes of constants and of RAM that the controller takes, without code."""
    layers = predictor.network.as_type(np.float32).layers
    weights = sum(a.nbytes for n in layers for a in (n.weight, n.bias, n.scale, n.unit) if a is not None)
    return {"weights": weights, "workspace": 4 * floats(predictor, knobs)}


def write_controller(
    predictor: Predictor, knobs: NewtonMPC, out: Path, *, name: str = "controller", path: Array, start: Array
) -> dict[str, Any]:
    """Writes the folder `out` and returns the facts of its control.json.

    path (T, p) and start (p,): the self-test follows its first TEST_TICKS ticks. The folder is complete or not there; one
    written before is replaced. Raises NetsukeError for names that C does not take and for anything else at `out`.
    """
    asked = f"write the controller to {out.name}"
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name) or name[:3] == "ns_" or name == "plant":
        raise NetsukeError(asked, f"the name {name!r} is no prefix of C functions", "lower-case letters, digits, _")
    out = check_folder(out, asked, FACTS, FORMAT)
    files = {f"src/{part}": text for part, text in controller_c(predictor, knobs, name).items()}
    view = _known_ticks(predictor, knobs, path, start) | {"name": name, "title": name, "tolerance": TOLERANCE}
    files |= {f"test/{name}_test.c": render("test.c.j2", **view), "Makefile": render("Makefile.j2", **view)}
    found = {"format": FORMAT, "version": 1, "name": name, **facts(predictor, knobs)}
    files[FACTS] = json.dumps(found, indent=1) + "\n"
    write_texts(out, files, asked)
    return found


def _known_ticks(predictor: Predictor, knobs: NewtonMPC, path: Array, start: Array) -> dict[str, Any]:
    """Measurements, references and controls of the reference's first ticks, the network being the plant."""
    model = predictor.as_type(np.float32)
    plant, steering = NetworkPlant(model, start), knobs.controller(model, start)
    rows: dict[str, list[Array]] = {"measured": [], "wanted": [], "controls": []}
    y = plant.reset()
    for n in range(min(TEST_TICKS, len(path))):
        wanted = ahead(np.asarray(path, np.float32), n, knobs.last)
        u = steering.step(y, wanted)
        for key, value in (("measured", y), ("wanted", wanted.reshape(-1)), ("controls", u)):
            rows[key].append(value)
        y = plant.step(u)
    return {"predictor": model, "start": np.float32(start), **rows}
