"""Newton-Raphson model-predictive control over a learned model (neural generalised predictive control).

Soloway & Haley 1996; Aguasvivas Manzano et al. 2022. At every tick the planned controls U (moves Nu, controls m) minimise

    J = Σ_{j=N1..N2} e_jᵀ Q e_j + Σ_{j=1..Nu} Δu_jᵀ Λ Δu_j + Σ [ s/(u + r/2 - b) + s/(r/2 + b - u) - 4/r ],   e = y_ref - ŷ

by U ← clip(U - t H⁻¹ g), with g = ∂J/∂U through the recursion of the roll-out. What is added to the published method, because
plain Newton steps stick on the plateaus of rectified units: several starts (the last plan, then random ones), step lengths t = 1,
f, f², … until the cost falls, and controls at a limit that the gradient pushes outwards are left out of the solve.

float32 is what csrc/ns_mpc.c computes, bit for bit; float64 the same formulas. Use it for small smooth or rectified models with
known limits; where a linear controller does, it is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from netsuke.apps.control.arithmetic import Array, fold
from netsuke.apps.control.predictor import History, Predictor, Roll
from netsuke.errors import NetsukeError

LARGEST = 1000  # of every count: a tick of the largest settings takes seconds here, and more is a slip
PIVOT = 1e-6  # of the largest diagonal entry: smaller pivots belong to directions without effect


TINY = 1e-30  # what is divided by must not become 0 in float32
NUMBERS = (
    "q", "change", "factor", "enough", "correction", "low", "high", "sharpness", "range", "centre", "epsilon",
)  # fmt: skip


@dataclass(frozen=True)
class NewtonMPC:
    """The knobs. Controls and outputs are in the network's own units."""

    q: tuple[float, ...]  # weights of squared errors, one an output; only their ratio to `change` matters
    change: tuple[float, ...]  # Λ, weights of squared changes, one a control; above 0, it keeps H regular
    first: int = 1  # N1
    last: int = 6  # N2: a longer horizon leaves plateaus sooner; costs grow with it in proportion
    moves: int = 1  # Nu
    iterations: int = 4  # Newton steps a start
    levels: int = 5  # step lengths tried; 1 is plain Newton, where a step that raises the cost ends the start
    factor: float = 0.5
    starts: int = 3  # 1 sticks on plateaus, 2 already leaves them
    enough: float = 0.0  # a plan of at most this cost needs no further start
    correction: float = 0.0  # share of a prediction's error that later ones take up; for plants unlike their model
    low: float = -0.5
    high: float = 0.5
    sharpness: float = 0.0  # s of the barrier; the published 1e-20 does nothing, clipping does the work
    range: float = 1.0  # r
    centre: float = 0.0  # b
    derivatives: Literal["exact", "differences", "hessian"] = "exact"  # "exact": Gauss-Newton, "hessian": with ∇²y
    epsilon: float = 0.008  # of central differences; the paper's 2/250
    seed: int = 1

    def __post_init__(self) -> None:
        asked = "set up the controller"
        for name in ("first", "moves", "iterations", "levels", "starts"):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise NetsukeError(asked, f"{name} is {getattr(self, name)}", f"1 to {LARGEST}")
        if not self.first <= self.last <= LARGEST or self.moves > self.last:
            raise NetsukeError(
                asked, f"the horizons are N1 {self.first}, N2 {self.last}, Nu {self.moves}",
                f"N1 <= N2 <= {LARGEST} and Nu <= N2",
            )  # fmt: skip
        for name in NUMBERS:
            if not np.all(np.abs(getattr(self, name)) <= np.finfo(np.float32).max):
                raise NetsukeError(
                    asked, f"{name} is {getattr(self, name)}: not a number of 32 bits", "finite numbers"
                )  # fmt: skip
        if min(*self.q, *self.change, self.sharpness, self.enough) < 0:
            raise NetsukeError(
                asked, f"q {self.q}, change {self.change}, sharpness {self.sharpness}, enough {self.enough}: one is negative",
                "0 or more",
            )  # fmt: skip
        if not self.low < self.high or not 0 < self.factor < 1 or min(self.epsilon, self.range) < TINY:
            raise NetsukeError(
                asked, f"limits {self.low} to {self.high}, factor {self.factor}, epsilon {self.epsilon}, range {self.range}",
                f"low < high, 0 < factor < 1, epsilon and range from {TINY:g}",
            )  # fmt: skip
        if not 0 <= self.correction <= 1:
            raise NetsukeError(asked, f"correction is {self.correction}", "a share from 0 to 1")
        if self.sharpness > 0 and not (
            self.centre - self.range / 2 < self.low and self.high < self.centre + self.range / 2
        ):
            raise NetsukeError(
                asked, f"the barrier at {self.centre} ± {self.range / 2} does not lie outside {self.low} to {self.high}",
                "a barrier around the limits", "a larger range, or sharpness 0",
            )  # fmt: skip
        if not 0 < self.seed < 1 << 32:
            raise NetsukeError(asked, f"the seed is {self.seed}", "1 to 4294967295")
        if self.derivatives not in ("exact", "differences", "hessian"):
            raise NetsukeError(asked, f"derivatives are {self.derivatives!r}", "exact, differences or hessian")

    def controller(self, predictor: Predictor, y: Array | None = None) -> Controller:
        """A controller at rest at the outputs y (zeros when None), in the predictor's type of number."""
        return Controller(self, predictor, y)


class Controller:
    """One loop's controller: `step` at every tick."""

    def __init__(self, knobs: NewtonMPC, predictor: Predictor, y: Array | None = None):
        asked, p, m = "control with this network", predictor.outputs, predictor.controls
        if len(knobs.q) != p or len(knobs.change) != m:
            raise NetsukeError(
                asked, f"{len(knobs.q)} weights of errors and {len(knobs.change)} of changes",
                f"{p} and {m}: one an output, one a control",
            )  # fmt: skip
        if dead := [i for i in predictor.without_effect() if knobs.change[i] == 0]:
            raise NetsukeError(
                asked, f"H is singular: control {dead[0]} has no effect on the network and no weight of changes",
                "inputs that the network uses", f"change above 0, or a model without control {dead[0]}",
            )  # fmt: skip
        self.knobs, self.predictor, self.dtype = knobs, predictor, predictor.network.dtype
        self.q, self.change = np.asarray(knobs.q, self.dtype), np.asarray(knobs.change, self.dtype)
        self.reset(np.zeros(p) if y is None else y)

    def reset(self, y: Array) -> None:
        """Rest: all controls zero (or the nearest allowed), all outputs y (p,)."""
        zero = np.clip(np.zeros(self.predictor.controls, self.dtype), self.knobs.low, self.knobs.high)
        self.past: History = self.predictor.rest(y, zero)
        self.kept = np.tile(zero, (self.knobs.moves, 1)).astype(self.dtype)
        self.foreseen, self.bias = np.asarray(y, self.dtype), np.zeros(self.predictor.outputs, self.dtype)
        self.random, self.halved, self.cost = self.knobs.seed, 0, 0.0

    def step(self, y: Array, reference: Array, sensors: Array | None = None) -> Array:
        """The control (m,) to apply now. y (p,): outputs just measured; reference (N2, p): wanted at the next ticks."""
        k, y = self.knobs, np.asarray(y, self.dtype)
        self.past.measured(y)
        error = np.where(np.isfinite(y), y - self.foreseen, self.dtype(0))
        self.bias = self.bias + self.dtype(k.correction) * error
        self.sums = self.predictor.sums(sensors)
        self.reference = np.asarray(reference, self.dtype)[None]
        shifted = np.concatenate([self.kept[1:], self.kept[-1:]])
        plans, costs, halved = self.descend(shifted[None])
        best, cost = plans[0], costs[0]
        if k.starts > 1 and not cost <= k.enough:
            drawn, states = [], []
            for _ in range(1, k.starts):
                drawn.append(self._draw())
                states.append(self.random)
            plans, costs, also = self.descend(np.stack(drawn))
            for plan, found, state, flag in zip(plans, costs, states, also):
                halved, self.random = [*halved, flag], state
                if found < cost:
                    best, cost = plan, found
                if cost <= k.enough:
                    break
        self.halved += bool(np.any(halved))
        self.kept, self.cost = best, float(cost)
        self.foreseen = self.foresee(best[None], 1).outputs[0, 0]
        self.past.applied(best[0])
        return best[0]

    def foresee(self, plans: Array, last: int) -> Roll:
        """What plans (B, Nu, m) lead to over `last` ticks from here."""
        return self.predictor.roll(plans, self.past, self.sums, last, self.bias)

    def _draw(self) -> Array:
        """A random plan, the same control at every tick. Marsaglia's xorshift of 32 bits; the upper 24 make the number."""
        k, f, out = self.knobs, self.dtype, []
        for _ in range(self.predictor.controls):
            x = self.random
            x ^= x << 13 & 0xFFFFFFFF
            x ^= x >> 17
            x ^= x << 5 & 0xFFFFFFFF
            self.random = x
            out.append(f(k.low) + (f(k.high) - f(k.low)) * (f(x >> 8) * f(2.0**-24)))
        return np.tile(np.array(out, f), (k.moves, 1))

    def descend(self, plans: Array) -> tuple[Array, Array, Array]:
        """Damped Newton steps from plans (B, Nu, m): better ones, their costs, whether a step length was refused."""
        k, B = self.knobs, len(plans)
        plans, costs = plans.copy(), np.zeros(B, self.dtype)
        alive, halved = np.arange(B), np.zeros(B, bool)
        for _ in range(k.iterations):
            step, now = self.newton_step(plans[alive])
            costs[alive] = now
            waiting, length = np.arange(len(alive)), self.dtype(1)
            for _ in range(k.levels):
                trial = np.clip(
                    plans[alive[waiting]] - length * step[waiting], self.dtype(k.low), self.dtype(k.high)
                )  # fmt: skip
                then = self.cost_of(trial, self.foresee(trial, k.last).outputs)
                lower = then < now[waiting]
                plans[alive[waiting[lower]]] = trial[lower]
                costs[alive[waiting[lower]]] = then[lower]
                halved[alive[waiting[~lower]]] = True
                waiting, length = waiting[~lower], length * self.dtype(k.factor)
                if not len(waiting):
                    break
            alive = np.delete(alive, waiting)
            if not len(alive):
                break
        return plans, costs, halved

    def newton_step(self, plans: Array) -> tuple[Array, Array]:
        """H⁻¹ g (B, Nu, m) and the cost (B,) at plans."""
        foreseen, half_gradient, half_hessian = self.derivatives_at(plans)
        step = solve(half_hessian, half_gradient, self._held(plans, half_gradient))
        return step.reshape(plans.shape), self.cost_of(plans, foreseen)

    def _held(self, plans: Array, gradient: Array) -> Array:
        flat = plans.reshape(len(plans), -1)
        low, high = self.dtype(self.knobs.low), self.dtype(self.knobs.high)
        return ((flat <= low) & (gradient > 0)) | ((flat >= high) & (gradient < 0))

    def _changes(self, plans: Array) -> Array:
        before = np.concatenate([np.tile(self.kept[:1], (len(plans), 1, 1)), plans[:, :-1]], axis=1)
        return plans - before

    def cost_of(self, plans: Array, outputs: Array) -> Array:
        """J (B,) of plans (B, Nu, m) whose foreseen outputs are (B, N2, p)."""
        k, B = self.knobs, len(plans)
        e = (self.reference - outputs)[:, k.first - 1 :]
        d = self._changes(plans)
        terms = np.concatenate([(self.q * e * e).reshape(B, -1), (self.change * d * d).reshape(B, -1)], axis=1)
        if k.sharpness > 0:
            s, half, b = self.dtype(k.sharpness), self.dtype(0.5) * self.dtype(k.range), self.dtype(k.centre)
            u = plans.reshape(B, -1)
            barrier = s / (u + half - b) + s / (half + b - u) - self.dtype(4) / self.dtype(k.range)
            terms = np.concatenate([terms, barrier], axis=1)
        return fold(self.dtype(0), terms.T)

    def derivatives_at(self, plans: Array) -> tuple[Array, Array, Array]:
        """(foreseen outputs, half the gradient (B, M), half the Hessian (B, M, M))."""
        k, p, (B, moves, m) = self.knobs, self.predictor, plans.shape
        roll = self.foresee(plans, k.last)
        slopes = self._differences(plans) if k.derivatives == "differences" else p.slopes(roll, moves)
        keep = slice(k.first - 1, None)
        e, s = (self.reference - roll.outputs)[:, keep], slopes[:, keep]
        pull = (self.q * e)[..., None]
        by_row = np.moveaxis(s.reshape(B, -1, moves * m), 1, 0)  # (N p, B, M), summed in this order
        gradient = fold(self.dtype(0), -np.moveaxis((pull * s).reshape(B, -1, moves * m), 1, 0))
        weighted = np.moveaxis((self.q[:, None] * s).reshape(B, -1, moves * m), 1, 0)
        hessian = fold(self.dtype(0), weighted[..., :, None] * by_row[..., None, :])
        if k.derivatives == "hessian":
            hessian = hessian - np.einsum("bjk,bjkde->bde", pull[..., 0], p.bends(roll, slopes, moves)[:, keep])
        changes, M = self.change * self._changes(plans), moves * m
        for j in range(moves):
            for i in range(m):
                a = j * m + i
                gradient[:, a] += changes[:, j, i]
                hessian[:, a, a] += self.change[i]
                if j:
                    gradient[:, a - m] -= changes[:, j, i]
                    hessian[:, a - m, a - m] += self.change[i]
                    hessian[:, a, a - m] -= self.change[i]
                    hessian[:, a - m, a] -= self.change[i]
        if k.sharpness > 0:
            one, half = self.dtype(1), self.dtype(0.5)
            s, reach, b, u = (
                self.dtype(k.sharpness),
                half * self.dtype(k.range),
                self.dtype(k.centre),
                plans.reshape(B, M),
            )
            below, above = one / (u + reach - b), one / (reach + b - u)
            gradient += half * s * (above * above - below * below)
            hessian[:, range(M), range(M)] += s * (below * below * below + above * above * above)
        return roll.outputs, gradient, hessian

    def _differences(self, plans: Array) -> Array:
        """Slopes (B, N2, p, M) by central differences of the whole roll-out."""
        (B, moves, m), k = plans.shape, self.knobs
        eps, nudge = self.dtype(k.epsilon), np.eye(moves * m, dtype=bool).reshape(1, -1, moves, m)
        sides = []
        for shifted in (plans + eps, plans - eps):
            nudged = np.where(nudge, shifted[:, None], plans[:, None]).reshape(-1, moves, m)
            outputs = self.foresee(nudged, k.last).outputs
            sides.append(np.moveaxis(outputs.reshape(B, moves * m, k.last, -1), 1, -1))
        return (sides[0] - sides[1]) / (self.dtype(2) * eps)


def solve(hessian: Array, gradient: Array, held: Array) -> Array:
    """H⁻¹ g (B, M) by LDLᵀ; entries that are `held` get 0. Pivots below PIVOT of the largest diagonal entry are raised
    to it, so directions without effect or of negative curvature give a descent direction and no division by zero."""
    h, n, zero = hessian.copy(), gradient.shape[1], gradient.dtype.type(0)
    off = (held[:, :, None] | held[:, None, :]) & ~np.eye(n, dtype=bool)
    h[off] = zero
    x = np.where(held, zero, gradient)
    least = np.maximum(h[:, range(n), range(n)].max(axis=1), zero) * gradient.dtype.type(PIVOT)
    least = np.where(least > 0, least, gradient.dtype.type(1))
    for b in range(n):
        known = np.moveaxis(h[:, b:, :b] * h[:, b : b + 1, :b] * h[:, range(b), range(b)][:, None], 2, 0)
        column = fold(h[:, b:, b], -known)
        pivot = np.where(column[:, 0] > least, column[:, 0], least)
        h[:, b, b], h[:, b + 1 :, b] = pivot, column[:, 1:] / pivot[:, None]
    for a in range(n):
        x[:, a] = fold(x[:, a], -(h[:, a, :a] * x[:, :a]).T)
    x = x / h[:, range(n), range(n)]
    for a in range(n - 1, -1, -1):
        x[:, a] = fold(x[:, a], -(h[:, a + 1 :, a] * x[:, a + 1 :]).T)
    return x
