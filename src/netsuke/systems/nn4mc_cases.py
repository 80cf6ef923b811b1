"""What the claims of nn4mc are measured on: generated code as a function, the published compiler's, the loops, the rivals."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from netsuke.apps.control import hasel, oscillator, simulate
from netsuke.apps.control.loop import NetworkPlant, Perturbed, Trace, WithoutPreview, track
from netsuke.apps.control.newton import NewtonMPC
from netsuke.apps.control.oscillator import MassSpringDamper
from netsuke.apps.control.pid import PID, tune
from netsuke.apps.control.predictor import Predictor
from netsuke.errors import NetsukeError
from netsuke.export.c import write_c
from netsuke.graph.interpret import Interpreter
from netsuke.graph.ir import QGraph

FILES = tuple(
    f"nn4mc/{name}.hdf5"
    for name in (
        "hasel_fk_mar_18_2022", "hasel_fk_jan_10_2022", "hasel_fk_jun_6_2022", "fk_gru5_jul_4_2021",
        "fk_gru10_jan_10_2022", "tendon_sys_id", "signals_gru100_jun_21_2021", "layer_Conv1d_pooling", "layer_GRU",
        "layer_LSTM", "layer_simpleRNN", "layer_weights.best",
    )
)  # fmt: skip
PEERS = "NETSUKE_PEERS"  # names a Python in which the published compiler, nn4mc 0.3.0, is installed
QUICK_TICKS = 150
FAST = slice(2600, 3200)  # ticks of the path's fast part: its first quarter is almost at rest
ROUGH = ("gauss_newton", "at_zero")  # of `errors_at`: what is expected to be wrong
Function = Callable[[np.ndarray], np.ndarray]


def _compile(asked: str, compiler: str, sources: list[Path], include: list[Path], to: Path) -> ctypes.CDLL:
    if shutil.which(compiler) is None:
        raise NetsukeError(asked, f"there is no {compiler}", "a C compiler", "sudo apt-get install gcc g++")
    flags = ["-w", "-O2", "-ffp-contract=off", "-shared", "-fPIC", *(f"-I{i}" for i in include)]
    done = subprocess.run([compiler, *flags, *map(str, sources), "-lm", "-o", str(to)], capture_output=True, text=True)
    if done.returncode:
        raise NetsukeError(asked, next((m for m in re.findall(r"error: (.*)", done.stderr)), "the compiler failed"))
    return ctypes.CDLL(str(to))


@contextmanager
def generated(graph: QGraph) -> Iterator[Function]:
    """The network as C of `export --home c`, compiled here and called."""
    with tempfile.TemporaryDirectory(prefix="netsuke-nn4mc-") as folder:
        here = Path(folder) / "model"
        write_c(graph, here, name="model")
        library = _compile("run generated C", "cc", sorted(here.rglob("src/**/*.c")), [here / "src"], here / "model.so")

        def run(x: np.ndarray) -> np.ndarray:
            y = np.empty(graph.tensors[graph.outputs[0]].shape, np.float32)
            library.model_run(x.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p))
            return y

        yield run


@contextmanager
def published(path: Path, size: int) -> Iterator[Function]:
    """The network as C++ of nn4mc 0.3.0, run by the Python that NETSUKE_PEERS names.

    Its dense layers get their input size printed as a Python list ("[64]") or a float: both are mended before compiling.
    """
    python = os.environ.get(PEERS)
    if not python:
        raise NetsukeError("compare with nn4mc 0.3.0", f"{PEERS} is not set", f"{PEERS}=/path/to/python that has it")
    with tempfile.TemporaryDirectory(prefix="netsuke-nn4mc-") as folder:
        here = Path(folder)
        call = (
            "import sys; from nn4mc.translator.translator import translate; translate(sys.argv[1], 'hdf5', sys.argv[2])"
        )
        done = subprocess.run([python, "-c", call, str(path), str(here)], capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["it failed"])[-1]
            raise NetsukeError(f"compile {path.name} with nn4mc 0.3.0", why[:120])
        for source in here.rglob("nn4mc.cpp"):
            text = re.sub(r"(?<=, )\[(\d+)\](?=, )", r"\1", source.read_text())
            source.write_text(re.sub(r"(?<=, )(\d+)\.0(?=, )", r"\1", text) + _ENTRY)
        include = [here / "nn4mc" / "include", here / "nn4mc" / "include" / "layers"]
        library = _compile("run nn4mc's code", "g++", sorted(here.rglob("*.cpp")), include, here / "peer.so")

        def run(x: np.ndarray) -> np.ndarray:
            y = np.empty(size, np.float32)
            library.peer(x.ctypes.data_as(ctypes.c_void_p), x.nbytes, y.ctypes.data_as(ctypes.c_void_p), y.nbytes)
            return y

        yield run


# The first layer frees the caller's buffer, so it must come from malloc.
_ENTRY = """
#include <string.h>
extern "C" void peer(const float *x, int in, float *y, int out) {
  float *data = (float *)malloc(in);
  memcpy(data, x, in);
  buildLayers();
  memcpy(y, fwdNN(data), out);
}
"""


def numbers(graph: QGraph, runs: int) -> list[np.ndarray]:
    """Normal inputs, float32, seeded."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=graph.tensors[graph.inputs[0]].shape).astype(np.float32) for _ in range(runs)]


def difference(graph: QGraph, run: Function, runs: int) -> float:
    """The largest difference of an output between `run` and the reference interpreter."""
    reference = Interpreter(graph)
    return max(float(np.abs(reference.run(x)[0].reshape(-1) - run(x).reshape(-1)).max()) for x in numbers(graph, runs))


@cache
def float_model() -> Predictor:
    return hasel.predictor(dtype=np.float32)


@cache
def int8_model() -> Predictor:
    return float_model().quantized(0.5, np.abs(hasel.samples()).max(axis=0))


@cache
def whole_path(quick: bool) -> np.ndarray:
    """The whole path, or a stretch of its fast part."""
    return hasel.whole()[FAST][:QUICK_TICKS] if quick else hasel.whole()


def backwards() -> np.ndarray:
    """The whole path from its end to its beginning: the same places, other motions. No setting was chosen on it."""
    return hasel.whole()[::-1]


def standing(path: np.ndarray) -> tuple[Trace, Trace]:
    """Two floors along path (T, p): the network with all controls at zero, and a tip that stays at the path's mean."""
    plant, rest = NetworkPlant(float_model(), path[0]), np.zeros((len(path), float_model().controls))
    plant.reset()
    idle = np.array([plant.step(u) for u in rest])
    return Trace(idle, path, rest), Trace(np.tile(path.mean(axis=0), (len(path), 1)), path, rest)


def start(quick: bool) -> np.ndarray:
    return whole_path(quick)[0] if quick else hasel.samples()[0]


def in_c(model: Predictor, knobs: NewtonMPC, quick: bool, plant: Predictor | None = None) -> Trace:
    return simulate.on_host(model, knobs, whole_path(quick), start(quick), plant)


def in_python(model: Predictor, knobs: NewtonMPC, quick: bool, delay: int = 0, noise: float = 0.0) -> Trace:
    plant = NetworkPlant(model, start(quick))
    controller = knobs.controller(model)
    shaken = Perturbed(plant, model.controls, delay, noise) if delay or noise else plant
    trace = track(shaken, controller, whole_path(quick), knobs.last)
    trace.facts["halved"] = controller.halved
    return trace


@cache
def on_board(quick: bool) -> simulate.Emulated:
    return simulate.on_board(float_model(), hasel.SETTINGS, whole_path(quick), start(quick))


@dataclass(frozen=True)
class Duel:
    """MPC against PID on held-out references: root mean square errors, overshoot and effort of each."""

    plant: str
    network: str
    mpc: float
    blind: float  # MPC without preview
    linear: float  # MPC with a linear model by least squares instead of the network
    pid: float  # sees the reference ahead, too
    advance: int  # rows ahead that its tuning chose
    pid_blind: float  # tuned without any advance
    overshoots: tuple[float, float]
    efforts: tuple[float, float]

    @property
    def ratio(self) -> float:
        return self.mpc / self.pid

    def __str__(self) -> str:
        return (
            f"{self.plant}, {self.network}: {self.ratio:.2f}x ({self.mpc:.3f} against {self.pid:.3f} of a PID that sees "
            f"{self.advance + 1} ticks ahead; least squares in the MPC {self.linear:.3f}; neither sees ahead: "
            f"{self.blind:.3f} against {self.pid_blind:.3f}; overshoot {self.overshoots[0]:.0%} against "
            f"{self.overshoots[1]:.0%}, effort {self.efforts[0]:.2f} against {self.efforts[1]:.2f})"
        )


@cache
def rivals(damping: float, cubic: float, last: int, quick: bool) -> tuple[PID, PID]:
    """Two PIDs tuned on training references: one that sees up to `last` rows of them ahead, as the MPC does, and one
    that sees the next row alone."""
    plant, seeds, ticks = MassSpringDamper(damping=damping, cubic=cubic), (1,) if quick else (1, 3, 5), 300
    train = [p for seed in seeds for p in oscillator.references(seed, ticks // 3 if quick else ticks)]

    def tuned(advances: range) -> PID:
        limit = oscillator.LIMIT
        return tune(lambda pid: oscillator.pid_score(plant, train, pid), plant.tick, -limit, limit, advances)

    return tuned(range(last)), tuned(range(1))


@cache
def duel(damping: float, cubic: float, past: int, quick: bool) -> Duel:
    """Learns the model from random excitation and runs MPC and tuned PID on references that neither has seen."""
    plant, ticks = MassSpringDamper(damping=damping, cubic=cubic), 1000 if quick else 3000
    test = oscillator.references(2, 150) if quick else [*oscillator.references(2), *oscillator.references(4)]
    model, linear = (make(plant, past, ticks=ticks) for make in (oscillator.learn, oscillator.least_squares))
    knobs = oscillator.mpc(model)
    pid, pid_blind = rivals(damping, cubic, knobs.last, quick)
    ours = oscillator.run(plant, knobs.controller(model), test, knobs.last)
    blind = oscillator.run(plant, WithoutPreview(knobs.controller(model)), test, knobs.last)
    floor = oscillator.run(plant, knobs.controller(linear), test, knobs.last)
    theirs = oscillator.run(plant, pid, test, knobs.last)

    def effort(traces: list[Trace]) -> float:
        return float(np.mean([t.effort for t in traces]))

    return Duel(
        f"damping {damping:g}, k3 {cubic:g}", f"{2 * past}-16-1", oscillator.rms(ours), oscillator.rms(blind),
        oscillator.rms(floor), oscillator.rms(theirs), pid.advance, oscillator.rms(oscillator.run(plant, pid_blind, test)),
        (oscillator.overshoot(ours[0]), oscillator.overshoot(theirs[0])),
        (effort(ours), effort(theirs)),
    )  # fmt: skip


def gradient_errors(knobs: NewtonMPC, states: int) -> dict[str, float]:
    """`errors_at` on the published network: the median over random plans along the path (a kink of a rectified unit within
    the differences' width spoils single ones)."""
    path = hasel.whole()
    found = [errors_at(knobs, hasel.predictor(), path, 0.8, seed) for seed in range(states)]
    return {k: float(np.median([f[k] for f in found])) for k in found[0]}


def curved_errors(states: int) -> dict[str, float]:
    """`errors_at` on a network of tanh units, where the Hessian is more than Gauss-Newton's part: the largest of all plans,
    of the rough ones the smallest."""
    model, path = oscillator.learn(MassSpringDamper()), np.concatenate(oscillator.references(2))
    found = [errors_at(oscillator.mpc(model), model, path, 0.8, seed) for seed in range(states)]
    return {k: (min if k in ROUGH else max)(f[k] for f in found) for k in found[0]}


def errors_at(knobs: NewtonMPC, model: Predictor, path: np.ndarray, share: float, seed: int) -> dict[str, float]:
    """Relative errors of gradient and Hessian of the cost against central differences of the cost, float64, at a random
    tick of path (T, p) and a random plan within `share` of the limits: "gradient" and "hessian" by the chain rule, the
    gradient by "differences" and "at_zero" (at a plan of zeros), the Hessian of "gauss_newton"."""
    rng, kinds = np.random.default_rng(seed), ("exact", "hessian", "differences")
    n = rng.integers(0, len(path) - knobs.last)
    plan = share * rng.uniform(knobs.low, knobs.high, (1, knobs.moves, model.controls))
    controller = knobs.controller(model, path[n])
    controller.step(path[n], path[n : n + knobs.last])
    slope, bend = _differences(controller, plan, 1e-6), _bends(controller, plan, 1e-5)
    found = {}
    for k in kinds:  # of one controller: after a step with other derivatives the histories would differ
        controller.knobs = replace(knobs, derivatives=k)
        found[k] = [2 * part[0] for part in controller.derivatives_at(plan)[1:]]
    at_zero = 2 * controller.derivatives_at(np.zeros_like(plan))[1][0]

    def off(have: np.ndarray, want: np.ndarray) -> float:
        return float(np.abs(have - want).max() / np.abs(want).max())

    return {
        "gradient": off(found["exact"][0], slope), "at_zero": off(at_zero, slope),
        "differences": off(found["differences"][0], slope), "hessian": off(found["hessian"][1], bend),
        "gauss_newton": off(found["exact"][1], bend),
    }  # fmt: skip


def _differences(controller, plan: np.ndarray, eps: float) -> np.ndarray:
    """Gradient (M,) of the cost by central differences."""
    out = []
    for a in np.eye(plan.size).reshape(-1, *plan.shape[1:]):
        sides = np.concatenate([plan + eps * a, plan - eps * a])
        costs = controller.cost_of(sides, controller.foresee(sides, controller.knobs.last).outputs)
        out.append((costs[0] - costs[1]) / (2 * eps))
    return np.array(out)


def _bends(controller, plan: np.ndarray, eps: float) -> np.ndarray:
    """Hessian (M, M) by central differences of the exact gradient."""
    out = []
    for a in np.eye(plan.size).reshape(-1, *plan.shape[1:]):
        up, down = (2 * controller.derivatives_at(plan + s * eps * a)[1][0] for s in (1, -1))
        out.append((up - down) / (2 * eps))
    return np.array(out)
