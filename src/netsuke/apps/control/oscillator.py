"""Mass, spring and damper: a plant with known physics, a model of it learned from random excitation, references.

    m x'' + c x' + k x + k3 x³ = u        x is measured at every tick, u held between ticks

The model is a small dense network on the last controls and positions, trained one step ahead. "2-16-1" of the published
comparison reads u(n) and x(n) alone and so cannot know the speed; with two of each (4-16-1) it can. Both are measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from netsuke.apps.control.arithmetic import Array
from netsuke.apps.control.loop import Steering, Trace, ahead, track
from netsuke.apps.control.network import DenseNetwork, Layer
from netsuke.apps.control.newton import NewtonMPC
from netsuke.apps.control.pid import PID
from netsuke.apps.control.predictor import Predictor

LIMIT = 2.0  # of the force, both ways
SUBSTEPS = 4  # Runge-Kutta steps a tick


@dataclass
class MassSpringDamper:
    """Seconds, kilograms, newtons, metres. `loops` plants run side by side when it is above 1."""

    mass: float = 1.0
    damping: float = 3.0
    stiffness: float = 1.0
    cubic: float = 0.0
    tick: float = 0.1
    loops: int = 1

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> Array:
        self.position, self.speed = np.zeros(self.loops), np.zeros(self.loops)
        return self.output

    @property
    def output(self) -> Array:
        return self.position

    def step(self, u: Array) -> Array:
        h, state = self.tick / SUBSTEPS, np.array([self.position, self.speed])
        u = np.clip(u, -LIMIT, LIMIT)
        for _ in range(SUBSTEPS):
            a = self._rate(state, u)
            b = self._rate(state + h / 2 * a, u)
            c = self._rate(state + h / 2 * b, u)
            state = state + h / 6 * (a + 2 * b + 2 * c + self._rate(state + h * c, u))
        self.position, self.speed = state
        return self.output

    def _rate(self, state: Array, u: Array) -> Array:
        x, v = state
        return np.array([v, (u - self.damping * v - self.stiffness * x - self.cubic * x**3) / self.mass])


def excite(plant: MassSpringDamper, ticks: int, seed: int) -> tuple[Array, Array]:
    """(controls, positions before them), (ticks,) each: random forces, each held for 1 to 12 ticks."""
    rng, u = np.random.default_rng(seed), np.empty(0)
    while len(u) < ticks:
        u = np.concatenate([u, np.repeat(rng.uniform(-LIMIT, LIMIT), rng.integers(1, 13))])
    y, out = plant.reset(), []
    for value in u[:ticks]:
        out.append(float(y[0]))
        y = plant.step(np.array([value]))
    return u[:ticks], np.array(out)


def windows(u: Array, y: Array, past: int) -> tuple[Array, Array]:
    """Inputs (T, 2 past), newest first, controls then positions; the next positions (T, 1)."""
    t = np.arange(past - 1, len(y) - 1)
    return np.stack([*(u[t - d] for d in range(past)), *(y[t - d] for d in range(past))], axis=1), y[t + 1, None]


def learn(plant: MassSpringDamper, past: int = 2, hidden: int = 16, ticks: int = 3000, seed: int = 0) -> Predictor:
    """A network 2·past - hidden tanh - 1 of the plant, by L-BFGS on normalised data; the norms are folded into it."""
    import torch

    x, target = windows(*excite(plant, ticks, seed), past)
    centre, spread, middle, width = x.mean(0), x.std(0), target.mean(), target.std()
    generator = torch.Generator().manual_seed(seed)
    shapes = ((hidden, x.shape[1]), (hidden,), (1, hidden), (1,))
    scales = (x.shape[1] ** -0.5, 0.1, hidden**-0.5, 0.0)
    weights = [
        (s * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for s, shape in zip(scales, shapes)
    ]
    inputs, wanted = torch.from_numpy((x - centre) / spread), torch.from_numpy((target - middle) / width)
    optimiser = torch.optim.LBFGS(weights, max_iter=800, history_size=30, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        out = torch.tanh(inputs @ weights[0].T + weights[1]) @ weights[2].T + weights[3]
        value = (out - wanted).square().mean()
        value.backward()
        return value

    optimiser.step(loss)
    w0, b0, w1, b1 = (w.detach().numpy() for w in weights)
    first = Layer("hidden", w0 / spread, b0 - (w0 / spread) @ centre, "tanh")
    last = Layer("position", w1 * width, b1 * width + middle, "linear")
    network = DenseNetwork((first, last)).as_type(np.float64)
    return Predictor(network, controls=1, outputs=1, control_past=past, output_past=past)


def least_squares(plant: MassSpringDamper, past: int = 2, ticks: int = 3000, seed: int = 0) -> Predictor:
    """A linear model on the same data as `learn`, by least squares: what a network must beat to be of use."""
    x, target = windows(*excite(plant, ticks, seed), past)
    found = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), target, rcond=None)[0].T
    network = DenseNetwork((Layer("position", found[:, :-1], found[:, -1], "linear"),)).as_type(np.float64)
    return Predictor(network, controls=1, outputs=1, control_past=past, output_past=past)


def references(seed: int, ticks: int = 300) -> list[Array]:
    """Three paths (ticks, 1): random steps, a sum of sines, ramps between random points. Other seeds are other paths."""
    rng, t = np.random.default_rng(seed), np.arange(ticks)
    steps = np.repeat(rng.uniform(-1, 1, ticks // 50 + 1), 50)[:ticks]
    sines = sum(
        rng.uniform(0.2, 0.5) * np.sin(2 * np.pi * t / rng.uniform(40, 150) + rng.uniform(0, 6)) for _ in range(3)
    )
    knots = np.concatenate([[0], rng.uniform(-1, 1, ticks // 30 + 1)])
    ramps = np.interp(t, 30 * np.arange(len(knots)), knots)
    return [path[:, None] for path in (steps, sines, ramps)]


def run(plant: MassSpringDamper, steering: Steering, paths: list[Array], horizon: int = 1) -> list[Trace]:
    return [track(plant, steering, path, horizon) for path in paths]


def rms(traces: list[Trace]) -> float:
    """Root mean square of the error over all paths."""
    return float(np.sqrt(np.mean([t.rms**2 for t in traces])))


CHANGE = 0.01  # weight of squared changes of the force, the same in the MPC's cost and in the PID's tuning


def pid_score(like: MassSpringDamper, paths: list[Array], pid: PID) -> Array:
    """The cost (G,) of G settings of gains, in loops side by side: squared errors and changes as in the MPC's cost.
    Without the changes the grid ends at gains that throw the force from limit to limit at every tick."""
    plant = replace(like, loops=len(pid.kp))
    total = np.zeros(plant.loops)
    for path in paths:
        y, last = plant.reset(), np.zeros(plant.loops)
        pid.reset(y)
        for n in range(len(path)):
            u = pid.step(y, ahead(path, n, pid.advance + 1))
            y = plant.step(u)
            total += (y - path[n]) ** 2 + CHANGE * (u - last) ** 2
            last = u
    return np.where(np.isfinite(total), total, np.inf)


def mpc(model: Predictor) -> NewtonMPC:
    """The settings of the comparison: ten ticks ahead, three moves."""
    change = (CHANGE,) * model.controls
    return NewtonMPC(q=(1.0,), change=change, last=10, moves=3, starts=1, low=-LIMIT, high=LIMIT)


def overshoot(trace: Trace, step: int = 50) -> float:
    """The largest overshoot after a step of a path of steps, as a share of that step."""
    worst, before = 0.0, 0.0
    for start in range(0, len(trace.wanted), step):
        target = float(trace.wanted[start, 0])
        beyond = (trace.outputs[start : start + step, 0] - target) * np.sign(target - before)
        if abs(target - before) > 0.2:
            worst = max(worst, float(beyond.max()) / abs(target - before))
        before = target
    return max(worst, 0.0)
