"""The rival: a PID controller with a filtered derivative and a clamped integral, tuned by grid on training references.

u = clip( kp e + ki ∫e + kd de/dt ),  e = reference - y;   the integral stands still while u is at a limit

Where the reference is known ahead, a PID may use that too: `advance` rows of it, which the tuning chooses with the gains.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from netsuke.apps.control.arithmetic import Array

FILTER = 0.5  # of the derivative: share of the new difference


@dataclass
class PID:
    """Gains may be arrays (G,): then G loops run side by side, as the tuning does. tick: seconds."""

    kp: float | Array
    ki: float | Array
    kd: float | Array
    tick: float
    low: float
    high: float
    advance: int = 0  # the row of the reference that is followed: 0 is wanted after this tick

    def reset(self, y: Array) -> None:
        self.integral, self.rate, self.last = np.zeros_like(y, np.float64), np.zeros_like(y, np.float64), None

    def step(self, y: Array, reference: Array) -> Array:
        """The control for the measurement y (1,) or (G,); reference (N, 1): its first row is wanted next.
        An `advance` beyond its rows follows the last one."""
        error = reference[min(self.advance, len(reference) - 1)] - y
        if self.last is not None:
            self.rate = self.rate + FILTER * ((error - self.last) / self.tick - self.rate)
        self.last = error
        wanted = self.kp * error + self.ki * (self.integral + self.tick * error) + self.kd * self.rate
        u = np.clip(wanted, self.low, self.high)
        self.integral = np.where(u == wanted, self.integral + self.tick * error, self.integral)
        return u


def tune(
    score: Callable[[PID], Array], tick: float, low: float, high: float, advances: Iterable[int] = (0,)
) -> PID:  # fmt: skip
    """The gains and the advance of least score; `score` gets a PID of G loops. Every advance has the same grids of gains: a
    coarse one and finer ones around its best."""
    found: list[tuple[float, PID]] = []
    for advance in advances:
        centre, factor = np.array([3.0, 3.0, 0.3]), 4.0
        for _ in range(3):
            axes = [c * factor ** np.arange(-3.0, 4.0) for c in centre]
            grid = np.array(list(itertools.product(*axes)))
            scores = score(PID(*grid.T, tick, low, high, advance))
            centre, factor = grid[np.argmin(scores)], factor**0.4
        found.append((float(scores.min()), PID(*map(float, centre), tick, low, high, advance)))
    return min(found, key=lambda f: f[0])[1]
