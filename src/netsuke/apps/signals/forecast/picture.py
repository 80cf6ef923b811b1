"""The picture of a forecast: the last rows, the forecast, and the band in which a backtest found the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from netsuke.apps.signals.forecast.fold import Array
from netsuke.apps.signals.forecast.series import Series
from netsuke.errors import NetsukeError
from netsuke.models.files import write_atomically

MOST = 8  # channels in one picture
KINDS = (".svg", ".png", ".pdf")


def check(path: Path) -> None:
    """Raises NetsukeError when a picture could not be written to `path`: asked before long work."""
    if path.suffix.lower() not in KINDS:
        raise NetsukeError(f"draw {path.name}", f"the ending {path.suffix!r} is unknown", ", ".join(KINDS))
    if not path.absolute().parent.is_dir():
        raise NetsukeError(f"draw {path.name}", "its folder does not exist", "an existing, writable folder")


def draw(series: Series, forecast: Array, bands: Array | None, path: Path) -> None:
    """One panel per channel (the first eight): twice the horizon of the past, the forecast (horizon, channels) and the bands
    (levels, horizon, channels) of the backtest around it. Raises NetsukeError for other endings and unwritable folders."""
    check(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = min(MOST, len(series.names))
    horizon, rows = len(forecast), len(series.values)
    past = min(rows, 2 * horizon)
    figure = Figure(figsize=(9, 1.2 + 1.7 * shown), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(shown, 1, sharex=True, squeeze=False)[:, 0]
    before, after = _times(series, rows - past, rows), _times(series, rows, rows + horizon)
    for k, (panel, name) in enumerate(zip(panels, series.names)):
        panel.plot(before, series.values[rows - past :, k], color="#333", lw=1, label="seen")
        if bands is not None:
            for low, high, alpha, label in ((0, -1, 0.15, "95 %"), (1, -2, 0.3, "80 %")):
                panel.fill_between(
                    after, forecast[:, k] + bands[low, :, k], forecast[:, k] + bands[high, :, k], color="#1b6ca8",
                    alpha=alpha, lw=0, label=f"{label} of past errors",
                )  # fmt: skip
        panel.plot(after, forecast[:, k], color="#1b6ca8", lw=1.4, label="forecast")
        panel.set_ylabel(name, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#ddd", lw=0.5)
    panels[0].legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    panels[-1].tick_params(axis="x", labelsize=8, labelrotation=20 if series.start else 0)
    if len(series.names) > shown:
        figure.supxlabel(f"the first {shown} of {len(series.names)} channels", fontsize=8)
    kind = path.suffix.lower()
    write_atomically(
        path, lambda f: figure.savefig(f, format=kind[1:], metadata={"Date": None} if kind == ".svg" else None)
    )


def _times(series: Series, first: int, last: int) -> Array:
    if series.start is None:
        return np.arange(first, last)
    return np.array([series.start + k * series.step for k in range(first, last)])
