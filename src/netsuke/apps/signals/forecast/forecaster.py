"""`MixLinear(horizon).fit(x).predict(tail)`: the forecaster for users of numbers, in their own units.

    model = MixLinear(96).fit(x)            # (T,) or (T, channels), NaN where missing; period and look-back are found
    model.predict(x)                        # (96, channels), from the last rows of x
    model.update(rows)                      # new rows: exact, without the old data
    model.n_parameters(), model.save(path), MixLinear.load(path), model.to_c(folder)

method "moments" (default) needs one pass and no gradients; "adam" starts there, adds the smoothing convolution of the paper and
trains as it does, with the last fifth of the rows for early stopping: minutes, often 1 to 3 % better.
alpha and lpf, when "auto", are chosen on the last fifth of the rows; then everything is fitted again on all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.apps.signals.forecast import fold
from netsuke.apps.signals.forecast.fold import Array, Shape
from netsuke.apps.signals.forecast.moments import Moments, fit_both, fit_frequency, fit_time
from netsuke.apps.signals.forecast.period import find_period
from netsuke.apps.signals.forecast.series import Series, filled, from_array
from netsuke.errors import NetsukeError

METHODS = ("moments", "adam")
PERIODS = 30  # of the look-back, where there are rows enough: what the paper uses
LARGEST_N = 256
ALPHAS = (0.0, 0.5, 0.95, 1.0)
VALIDATION = 0.2  # share of the rows


@dataclass
class Weights:
    """a1, a2 (q, p); w1 (2, lpf), w2 (m, 2) complex; kernel (period + 1) or None."""

    a1: Array
    a2: Array
    w1: Array
    w2: Array
    kernel: Array | None = None

    def matrix(self, alpha: float, shape: Shape) -> Array:
        """Both paths folded, (m, n)."""
        time, frequency = self.paths(alpha, shape)
        return time + frequency

    def paths(self, alpha: float, shape: Shape) -> tuple[Array, Array]:
        """What each path adds to the folded matrix."""
        return (
            alpha * fold.time_matrix(self.a1, self.a2, shape),
            (1 - alpha) * fold.frequency_matrix(self.w1, self.w2, shape),
        )


@dataclass
class MixLinear:
    """horizon   rows to forecast; lookback rows to look at (a multiple of the period, else it is rounded down and noted)
    alpha     share of the time path, 0 to 1; lpf bins that the frequency path keeps, 1 to lookback / period
    forget    factor per row with which old windows fade in `update` and `fit`, 1: never ("moments" only)
    missing   "fill" or "error" (series.filled says how)
    """

    horizon: int
    lookback: int | str = "auto"
    period: int | str = "auto"
    alpha: float | str = "auto"
    lpf: int | str = "auto"
    method: str = "moments"
    forget: float = 1.0
    missing: str = "fill"
    seed: int = 0
    epochs: int = 30
    rate: float = 0.01
    asked: tuple[float | str, int | str] = field(init=False, repr=False)  # alpha and lpf before fit decided
    names: list[str] = field(default_factory=list, init=False)
    notes: list[str] = field(default_factory=list, init=False)
    shape: Shape | None = field(default=None, init=False)
    scale: Array | None = field(default=None, init=False, repr=False)
    weights: Weights | None = field(default=None, init=False, repr=False)
    moments: Moments | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        asked, self.asked = "forecast with these settings", (self.alpha, self.lpf)
        if not _whole(self.horizon) or self.horizon < 1:
            raise NetsukeError(asked, f"the horizon is {self.horizon!r}", "a whole number of rows, 1 or more")
        for name, least in (("lookback", 2), ("period", 1), ("lpf", 1)):
            value = getattr(self, name)
            if value != "auto" and (not _whole(value) or value < least):
                raise NetsukeError(asked, f"{name} is {value!r}", f'"auto" or a whole number from {least} on')
        if self.alpha != "auto" and not (isinstance(self.alpha, int | float) and 0 <= self.alpha <= 1):
            raise NetsukeError(asked, f"alpha is {self.alpha!r}", '"auto" or 0 (frequency only) to 1 (time only)')
        if self.method not in METHODS:
            raise NetsukeError(asked, f"the method is {self.method!r}", ", ".join(METHODS))
        if not 0 < self.forget <= 1:
            raise NetsukeError(
                asked, f"forget is {self.forget:g}", "above 0, at most 1 (nothing fades); 0.9999 is slow"
            )
        if self.forget < 1 and self.method == "adam":
            raise NetsukeError(asked, "Adam weighs all rows alike", "forget 1 with it", 'method "moments"')

    def fit(self, x: Array | Series, on_step: Callable[[int, int], None] | None = None) -> MixLinear:
        """Learns from (T,) or (T, channels), or a Series. Returns itself; `notes` says what was decided. NetsukeError for
        series that are too short, constant, mostly missing, or do not fit the settings."""
        series = x if isinstance(x, Series) else from_array(x)
        self.names, self.notes = list(series.names), list(series.notes)
        period = self._period(series)
        values, count = filled(series, self.missing, period)
        if count:
            self.notes.append(f"{count} missing values were filled")
        flat = [n for n, s in zip(series.names, values.std(0)) if not s > 1e-12 * max(1.0, float(np.abs(values).max()))]
        if flat:
            raise NetsukeError(f"forecast {flat[0]!r}", "it is constant", "channels that vary", "leave the column out")
        self.shape = self._shape(len(values), period)
        self.scale = values.std(0)
        scaled = values / self.scale
        cut = len(scaled) - max(int(VALIDATION * len(scaled)), self.shape.m * self.shape.period)
        alpha, lpf = self._chosen(scaled, cut)
        self._settle(scaled, alpha, lpf)
        if self.method == "adam":
            self._polish(scaled, cut, on_step)
        return self

    def _period(self, series: Series) -> int:
        if self.period != "auto":
            return int(self.period)
        rough, _ = filled(series, self.missing, None)
        found = find_period(rough)
        self.notes.append(f"period {found} found" if found else "no period found: the last values alone are used")
        return found or 1

    def _shape(self, rows: int, w: int) -> Shape:
        h, asked = self.horizon, f"forecast {self.horizon} rows"
        if h < w:
            raise NetsukeError(
                asked, f"the period is {w}", f"a horizon of one period or more ({w})",
                f"horizon {w}, of which the first {h} rows are used; or a shorter period",
            )  # fmt: skip
        m = -(-h // w)
        if self.lookback == "auto":
            n = max(2, min(PERIODS, (rows // 2) // w - m))
        else:
            n = int(self.lookback) // w
            if n < 2:
                raise NetsukeError(
                    asked, f"the look-back of {self.lookback} has {n} periods of {w}", f"{2 * w} or more"
                )
            if n * w != self.lookback:
                self.notes.append(f"the look-back was rounded down to {n * w}, {n} periods of {w}")
        if n > LARGEST_N:
            raise NetsukeError(asked, f"the look-back has {n} periods", f"at most {LARGEST_N}", "a shorter look-back")
        need = (n + m) * w
        if rows < need + m * w:
            raise NetsukeError(
                asked, f"there are {rows} rows",
                f"{need + m * w} or more: look-back {n * w}, horizon {m * w} and as much to validate on",
                "a shorter look-back or horizon",
            )  # fmt: skip
        if self.asked[1] != "auto" and self.asked[1] > n:
            raise NetsukeError(asked, f"lpf is {self.asked[1]}", f"1 to {n}, the periods of the look-back")
        return Shape(n * w, h, w)

    def _chosen(self, scaled: Array, cut: int) -> tuple[float, int]:
        """alpha and lpf: the given ones, or those of the least error on the rows behind `cut`."""
        n = self.shape.n
        alpha, lpf = self.asked
        alphas = ALPHAS if alpha == "auto" else (float(alpha),)
        bins = sorted({1, *(max(1, round(n * k)) for k in (0.1, 0.2, 0.35, 0.51))}) if lpf == "auto" else (lpf,)
        if len(alphas) * len(bins) == 1:
            return alphas[0], int(bins[0])
        seen, later = (Moments(self.shape, scaled.shape[1], f) for f in (self.forget, 1.0))
        windows = seen.update(scaled[:cut])
        later.update(scaled[max(0, cut - self.shape.lookback) :])
        if not windows:
            return alphas[-1], int(bins[-1])
        a1, a2 = fit_time(seen.sxx, seen.sxy, self.shape, seed=self.seed)
        time, tried = fold.time_matrix(a1, a2, self.shape), {}
        for lpf in bins:
            frequency = fold.frequency_matrix(*fit_frequency(seen.sxx, seen.sxy, self.shape, int(lpf)), self.shape)
            for alpha in alphas:
                tried[alpha, int(lpf)] = later.mse(alpha * time + (1 - alpha) * frequency)
        best = min(tried, key=tried.get)
        self.notes.append(f"alpha {best[0]:g} and lpf {best[1]} chosen on the last {len(scaled) - cut} rows")
        return best

    def _settle(self, scaled: Array, alpha: float, lpf: int) -> None:
        self.alpha, self.lpf = alpha, lpf
        self.moments = Moments(self.shape, scaled.shape[1], self.forget)
        self.moments.update(scaled)
        self.weights = Weights(*fit_both(self.moments, alpha, lpf, self.seed))

    def _polish(self, scaled: Array, cut: int, on_step: Callable[[int, int], None] | None) -> None:
        from netsuke.apps.signals.forecast.models import MixLinearNet
        from netsuke.apps.signals.forecast.training import Plan, fit

        early = Moments(self.shape, scaled.shape[1])
        early.update(scaled[:cut])
        net = MixLinearNet(self.shape, self.alpha, self.lpf)
        net.set(*fit_both(early, self.alpha, self.lpf, self.seed))
        plan = Plan(rate=self.rate, epochs=self.epochs, seed=self.seed)
        done = fit(net, scaled[:cut], scaled[cut - self.shape.lookback :], self.shape, plan, on_step)
        self.notes.append(f"trained for {done['epochs']} epochs, the last {len(scaled) - cut} rows for early stopping")
        self.weights, self.moments = Weights(*net.arrays()), None

    def predict(self, tail: Array | Series) -> Array:
        """(horizon, channels) from the last `lookback` rows of (T,) or (T, channels). NetsukeError when they are too few."""
        self._fitted("predict")
        series = tail if isinstance(tail, Series) else from_array(tail)
        s, asked = self.shape, "predict"
        if series.values.shape[1] != len(self.names):
            raise NetsukeError(
                asked, f"the rows have {series.values.shape[1]} channels", f"{len(self.names)}, as in fit"
            )
        if len(series.values) < s.lookback:
            raise NetsukeError(asked, f"there are {len(series.values)} rows", f"the last {s.lookback} or more")
        values, _ = filled(series, self.missing, s.period)
        x = values[-s.lookback :].T
        return fold.forecast(x, self.matrix(), self.weights.kernel, s).T

    def matrix(self) -> Array:
        """(m, n): what the forecast comes down to, apart from the smoothing."""
        self._fitted("fold the paths")
        return self.weights.matrix(self.alpha, self.shape)

    def update(self, rows: Array | Series) -> MixLinear:
        """Learns from the rows that follow those seen last, exactly as if the moments had been taken of all; the time path
        goes on from where it is. Missing values are filled from these rows and those of the last window before them. Raises
        NetsukeError for another number of channels and after Adam."""
        self._fitted("update")
        if self.moments is None:
            raise NetsukeError("update the forecaster", "it was trained by Adam", 'method "moments"', "fit it again")
        series = rows if isinstance(rows, Series) else from_array(rows)
        if series.values.shape[1] != len(self.names):
            raise NetsukeError("update", f"the rows have {series.values.shape[1]} channels", f"{len(self.names)}")
        if self.missing == "error":
            filled(series, self.missing, None)
        mo, s, w = self.moments, self.shape, self.weights
        known = np.concatenate([mo.tail * self.scale, series.values])  # a gap may begin with the first of the new rows
        values, _ = filled(Series(known, self.names), self.missing, s.period)
        if mo.update(values[len(mo.tail) :] / self.scale):
            if self.alpha > 0:
                w.a1, w.a2 = fit_time(mo.sxx, mo.sxy, s, sweeps=30, start=(w.a1, w.a2))
            if self.alpha < 1:
                w.w1, w.w2 = fit_frequency(mo.sxx, mo.sxy, s, self.lpf)
        return self

    def n_parameters(self, real: bool = True) -> int:
        """Trained numbers; with real=False a complex one counts once, as in the paper's tables."""
        self._fitted("count parameters")
        s = self.shape
        time = 2 * s.p * s.q if self.alpha > 0 else 0
        frequency = (2 * self.lpf + 2 * s.m) * (2 if real else 1) if self.alpha < 1 else 0
        return time + frequency + (0 if self.weights.kernel is None else len(self.weights.kernel))

    def like(self) -> MixLinear:
        """A fresh forecaster with the settings that `fit` decided on."""
        own = {"lookback": self.shape.lookback, "period": self.shape.period} if self.shape else {}
        return replace(self, **own)

    def as_asked(self) -> MixLinear:
        """A fresh forecaster with the settings that were asked for: nothing in it comes from data."""
        return replace(self, alpha=self.asked[0], lpf=self.asked[1])

    def save(self, path: Path | str) -> None:
        """Writes the forecaster as JSON, some kilobytes."""
        from netsuke.apps.signals.forecast.store import save

        self._fitted("save")
        save(self, Path(path))

    @classmethod
    def load(cls, path: Path | str) -> MixLinear:
        """Reads what `save` wrote. Raises NetsukeError for anything else."""
        from netsuke.apps.signals.forecast.store import load

        return load(Path(path))

    def to_c(
        self, out: Path | str, *, name: str = "forecast", weights: str = "float32", updating: bool = False
    ) -> dict:
        """Writes a folder of C99 and returns its facts (device.write_forecaster)."""
        from netsuke.apps.signals.forecast.device import write_forecaster

        self._fitted("export")
        return write_forecaster(self, Path(out), name=name, weights=weights, updating=updating)

    def _fitted(self, what: str) -> None:
        if self.weights is None:
            raise NetsukeError(what, "the forecaster has not learned yet", "", "fit(x) first, or MixLinear.load(path)")


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
