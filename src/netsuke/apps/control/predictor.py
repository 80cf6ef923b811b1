"""A network's place in the loop: which histories it reads, and what it foresees for a plan of controls.

    y(n+1) = net( u(n), …, u(n-nd+1),  y(n), …, y(n-dd+1),  sensors )        newest first; u(n) is the control to choose

The order is part of the model: in the loop of hasel.py the same weights read oldest first track 1.7 times worse (RMS), and 18
times where the plant reads them newest first (`netsuke reproduce nn4mc`, "history read oldest first"). Aguasvivas Manzano et
al. (2022) train with the oldest first and shift the newest to the front on the chip; here one order holds everywhere, and C
has it too.

Letters: B plans side by side, N horizon, m controls, p outputs, M = moves * m planned controls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from netsuke.apps.control.arithmetic import Array, fold
from netsuke.apps.control.network import DenseNetwork
from netsuke.errors import NetsukeError


@dataclass(frozen=True)
class Predictor:
    """control_past nd and output_past dd count ticks, the present one included; sensors stay as measured in a tick."""

    network: DenseNetwork
    controls: int
    outputs: int
    control_past: int = 1
    output_past: int = 1
    sensors: int = 0

    def __post_init__(self) -> None:
        asked = "predict with this network"
        for name in ("controls", "outputs", "control_past", "output_past"):
            if getattr(self, name) < 1:
                raise NetsukeError(asked, f"{name} is {getattr(self, name)}", "1 or more")
        want = self.moving + self.sensors
        if self.sensors < 0 or self.network.ins != want or self.network.outs != self.outputs:
            raise NetsukeError(
                asked,
                f"it maps {self.network.ins} inputs to {self.network.outs} outputs; {self.control_past} x {self.controls} "
                f"controls, {self.output_past} x {self.outputs} outputs and {self.sensors} sensors make {want}, and "
                f"{self.outputs} come out",
                "histories that add up to the network's inputs", "other control_past, output_past or sensors",
            )  # fmt: skip

    def quantized(self, control: float, outputs: Array, sensor: float = 0.5) -> Predictor:
        """The same with int8 weights; the largest magnitudes of a control, of every output (p,) and of a sensor. Raises
        NetsukeError when one is not above 0 and finite."""
        given = {"control": control, "outputs": np.asarray(outputs, np.float64), "sensor": sensor}
        for name, value in given.items():
            if not np.all(np.greater(value, 0) & np.isfinite(value)):
                raise NetsukeError(
                    "round this network's weights to int8", f"the range of {name} is {np.asarray(value).tolist()}",
                    "the largest magnitudes that occur, above 0",
                )  # fmt: skip
        past, sensors = [control] * self.control_past * self.controls, [sensor] * self.sensors
        return self.with_network(
            self.network.quantized(np.array([*past, *np.tile(outputs, self.output_past), *sensors]))
        )

    @property
    def moving(self) -> int:
        """Inputs that change within a horizon: the histories."""
        return self.control_past * self.controls + self.output_past * self.outputs

    def as_type(self, dtype: type) -> Predictor:
        return self.with_network(self.network.as_type(dtype))

    def with_network(self, network: DenseNetwork) -> Predictor:
        return Predictor(
            network, self.controls, self.outputs, self.control_past, self.output_past, self.sensors
        )  # fmt: skip

    def without_effect(self) -> list[int]:
        """Controls whose weights in the first layer are all zero: no plan can use them."""
        w = self.network.layers[0].real()[:, : self.control_past * self.controls]
        seen = np.abs(w).reshape(len(w), self.control_past, self.controls).max(axis=(0, 1))
        return [int(i) for i in np.flatnonzero(seen == 0)]

    def rest(self, y: Array, u: Array) -> History:
        """The history of a system that has stood at y (p,) under u (m,)."""
        dtype = self.network.dtype
        u, y = np.asarray(u, dtype), np.asarray(y, dtype)
        return History(np.tile(u, (self.control_past - 1, 1)), np.tile(y, (self.output_past, 1)))

    def sums(self, sensors: Array | None) -> Array:
        """The sensors' part of the first layer, (H,), the same for a whole tick."""
        if sensors is None:
            return np.zeros(len(self.network.layers[0].weight), self.network.dtype)
        return self.network.frozen(sensors, self.moving)

    def roll(self, plans: Array, past: History, sums: Array, last: int, bias: Array | float = 0.0) -> Roll:
        """Outputs foreseen for plans (B, moves, m) over `last` ticks; the last planned control is held. `bias` (p,) is
        added to the network's output at every tick, and fed back."""
        ahead, passes = [], []
        for j in range(1, last + 1):
            values = self.network.forward(self._inputs(plans, past, ahead, j), sums)
            passes.append(values)
            ahead.append(values[-1] + np.asarray(bias, self.network.dtype))
        return Roll(np.stack(ahead, axis=1), passes)

    def _inputs(self, plans: Array, past: History, ahead: list[Array], j: int) -> Array:
        parts, B = [], len(plans)
        for d in range(self.control_past):
            ago = past.controls[d - j] if d >= j else None
            parts.append(plans[:, min(j - d, plans.shape[1]) - 1] if ago is None else np.tile(ago, (B, 1)))
        for d in range(self.output_past):
            parts.append(ahead[j - 2 - d] if d < j - 1 else np.tile(past.outputs[d - (j - 1)], (B, 1)))
        return np.concatenate(parts, axis=1)

    def slopes(self, roll: Roll, moves: int) -> Array:
        """d outputs / d plan, (B, N, p, M), by the chain rule through the recursion."""
        m, p, held = self.controls, self.outputs, self.control_past * self.controls
        out: list[Array] = []
        for j in range(1, len(roll.passes) + 1):
            a = self.network.jacobian(roll.passes[j - 1], self.moving)
            s = np.zeros((len(a), p, moves * m), a.dtype)
            for d in range(min(self.control_past, j)):
                at = (min(j - d, moves) - 1) * m
                s[:, :, at : at + m] += a[:, :, d * m : (d + 1) * m]
            for d in range(min(self.output_past, j - 1)):
                before = np.moveaxis(out[j - 2 - d], 1, 0)  # (p, B, M)
                by = np.moveaxis(a[:, :, held + d * p : held + (d + 1) * p], 2, 0)  # (p, B, p)
                s = fold(s, by[..., None] * before[:, :, None, :])
            out.append(s)
        return np.stack(out, axis=1)

    def bends(self, roll: Roll, slopes: Array, moves: int) -> Array:
        """d² outputs / d plan², (B, N, p, M, M): what the Gauss-Newton Hessian leaves out."""
        m, (B, N, p, M) = self.controls, slopes.shape
        eye, out = np.eye(M), np.zeros((B, N, p, M, M))
        for j in range(1, N + 1):
            tangent, bend = np.zeros((B, self.moving, M)), np.zeros((B, self.moving, M, M))
            for d in range(min(self.control_past, j)):
                at = (min(j - d, moves) - 1) * m
                tangent[:, d * m : (d + 1) * m] = eye[at : at + m]
            for d in range(min(self.output_past, j - 1)):
                at = self.control_past * m + d * p
                tangent[:, at : at + p], bend[:, at : at + p] = slopes[:, j - 2 - d], out[:, j - 2 - d]
            out[:, j - 1] = self.network.second(roll.passes[j - 1], tangent, bend)[1]
        return out


@dataclass
class History:
    """What the network remembers, newest first: controls (nd - 1, m) already applied, outputs (dd, p) measured."""

    controls: Array
    outputs: Array

    def measured(self, y: Array) -> None:
        """A new output. What is not finite was lost: the one before stands in."""
        y = np.asarray(y, self.outputs.dtype)
        y = np.where(np.isfinite(y), y, self.outputs[0])
        self.outputs = np.concatenate([y[None], self.outputs[:-1]])

    def applied(self, u: Array) -> None:
        u = np.asarray(u, self.controls.dtype)
        self.controls = np.concatenate([u[None], self.controls])[: len(self.controls)]


@dataclass
class Roll:
    """outputs (B, N, p), and every layer's values per tick."""

    outputs: Array
    passes: list[list[Array]]
