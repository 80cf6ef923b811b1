"""Closed loops: what is steered, what steers, and what is measured of both.

A plant that equals the controller's model shows that the optimiser works and nothing more: `Perturbed` gives it other weights,
a delay and noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from netsuke.apps.control.arithmetic import Array
from netsuke.apps.control.predictor import Predictor


class Plant(Protocol):
    """What is steered. `output` (p,) is where it truly is, `step` what is measured of it."""

    output: Array

    def reset(self) -> Array:
        """Back to rest; the first measurement (p,)."""

    def step(self, u: Array) -> Array:
        """One tick under the control u (m,); the new measurement (p,)."""


class Steering(Protocol):
    """What steers: it sees a measurement and the outputs wanted at the next ticks."""

    def reset(self, y: Array) -> None:
        """Back to rest at the outputs y (p,)."""

    def step(self, y: Array, reference: Array) -> Array:
        """The control (m,) for this tick; reference (N, p), row 0 is wanted after this tick."""


class NetworkPlant:
    """A network as the plant: it steps through its own predictor, with sensors at zero."""

    def __init__(self, predictor: Predictor, start: Array):
        self.predictor, self.start = predictor, np.asarray(start, predictor.network.dtype)
        self.reset()

    def reset(self) -> Array:
        self.past = self.predictor.rest(self.start, np.zeros(self.predictor.controls))
        self.output = self.start
        return self.output

    def step(self, u: Array) -> Array:
        u = np.asarray(u, self.predictor.network.dtype)
        self.output = self.predictor.roll(u[None, None], self.past, self.predictor.sums(None), 1).outputs[0, 0]
        self.past.measured(self.output)
        self.past.applied(u)
        return self.output


class Perturbed:
    """A plant whose controls arrive `delay` ticks late and whose measurements carry Gaussian noise of `noise`."""

    def __init__(self, plant: Plant, controls: int, delay: int = 0, noise: float = 0.0, seed: int = 0):
        self.plant, self.controls, self.delay, self.noise, self.seed = plant, controls, delay, noise, seed
        self.reset()

    @property
    def output(self) -> Array:
        return self.plant.output

    def reset(self) -> Array:
        self.rng, self.late = np.random.default_rng(self.seed), [np.zeros(self.controls)] * self.delay
        return self._measure(self.plant.reset())

    def step(self, u: Array) -> Array:
        self.late.append(u)
        return self._measure(self.plant.step(self.late.pop(0)))

    def _measure(self, y: Array) -> Array:
        return y + self.rng.normal(0, self.noise, np.shape(y)) if self.noise else y


class WithoutPreview:
    """A controller that does not see what comes: the next wanted row stands for the whole horizon."""

    def __init__(self, steering: Steering):
        self.steering = steering

    def reset(self, y: Array) -> None:
        self.steering.reset(y)

    def step(self, y: Array, reference: Array) -> Array:
        return self.steering.step(y, np.repeat(reference[:1], len(reference), axis=0))


@dataclass
class Trace:
    """outputs (T, p) after every tick, what was wanted of them, controls (T, m)."""

    outputs: Array
    wanted: Array
    controls: Array
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def errors(self) -> Array:
        """Distances (T,), float64."""
        return np.linalg.norm(self.outputs.astype(np.float64) - self.wanted, axis=1)

    @property
    def rms(self) -> float:
        return float(np.sqrt(np.mean(self.errors**2)))

    @property
    def effort(self) -> float:
        """Root mean square of the controls."""
        return float(np.sqrt(np.mean(np.sum(self.controls.astype(np.float64) ** 2, axis=1))))

    def within(self, distance: float) -> float:
        """Share of ticks whose error is at most `distance`."""
        return float(np.mean(self.errors <= distance))


def ahead(path: Array, tick: int, count: int) -> Array:
    """What is wanted after ticks tick, tick + 1, …: `count` rows of path (T, p), the last one held."""
    return path[np.minimum(np.arange(tick, tick + count), len(path) - 1)]


def track(
    plant: Plant, steering: Steering, path: Array, horizon: int, on_tick: Callable[[int, int], None] | None = None
) -> Trace:
    """Steers along path (T, p), whose row n is wanted after tick n; the controller sees `horizon` rows ahead."""
    y = plant.reset()
    steering.reset(y)
    outputs, controls = [], []
    for n in range(len(path)):
        u = steering.step(y, ahead(path, n, horizon))
        y = plant.step(u)
        outputs.append(np.array(plant.output))
        controls.append(np.array(u))
        if on_tick:
            on_tick(n, len(path))
    return Trace(np.array(outputs), np.asarray(path, np.float64), np.array(controls))
