"""`netsuke forecast fit|predict|backtest data.csv --horizon 96`: many steps ahead from about a hundred numbers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from netsuke.errors import NetsukeError

Data = Annotated[
    Path, typer.Argument(help=".csv with a header (and dates, if it has), or .npy of (T,) or (T, channels)")
]
Horizon = Annotated[int | None, typer.Option(help="rows to forecast")]
Lookback = Annotated[str, typer.Option(help="rows to look at; auto: up to 30 periods")]
Period = Annotated[str, typer.Option(help="rows; auto: the strongest one of the autocorrelation")]
Alpha = Annotated[str, typer.Option(help="share of the time path, 0 to 1; auto: by validation")]
Lpf = Annotated[str, typer.Option(help="bins of the frequency path; auto: by validation")]
Method = Annotated[str, typer.Option(help="moments (a second, can be updated) or adam (minutes, smooths first)")]
Columns = Annotated[str | None, typer.Option(help="names, with commas; default all")]
Missing = Annotated[str, typer.Option(help="fill or error")]
Seed = Annotated[int, typer.Option(help="of the starts")]
Json = Annotated[bool, typer.Option("--json", help="as JSON")]


def register(app: typer.Typer) -> None:
    forecast = typer.Typer(no_args_is_help=True, help="Forecast series with a period, and say how wrong it may be.")
    forecast.command("fit", help="Learn from a table and keep the forecaster: JSON, and C for a microcontroller.")(fit)
    forecast.command("predict", help="Forecast the rows after a table, with a picture.")(predict)
    forecast.command("backtest", help="How wrong forecasts of this table would have been, beside simple ones.")(
        backtest
    )
    app.add_typer(forecast, name="forecast")


def fit(
    data: Data, horizon: Horizon = None, lookback: Lookback = "auto", period: Period = "auto", alpha: Alpha = "auto",
    lpf: Lpf = "auto", method: Method = "moments", columns: Columns = None, missing: Missing = "fill", seed: Seed = 0,
    forget: Annotated[float, typer.Option(help="factor per row with which old rows fade, on the chip too; 1: never")] = 1.0,
    output: Annotated[Path, typer.Option("-o", "--output", help="the forecaster")] = Path("forecast.json"),
    to_c: Annotated[Path | None, typer.Option("--to-c", help="a folder of C99 as well")] = None,
    weights: Annotated[str, typer.Option(help="of the C: float32 or int8")] = "float32",
    updating: Annotated[bool, typer.Option("--updating", help="C that learns on; needs --alpha 1")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    series, model = _open(data, horizon, lookback, period, alpha, lpf, method, columns, missing, seed, forget)
    with _bar("training") as step:
        model.fit(series, on_step=step)
    model.save(output)
    got = _facts(model) | {"output": str(output)}
    if to_c is not None:
        got["c"] = model.to_c(to_c, weights=weights, updating=updating)
    print(json.dumps(got) if as_json else "\n".join(_said(model, f"{output}: ", got.get("c"))))


def predict(
    data: Data, horizon: Horizon = None, lookback: Lookback = "auto", period: Period = "auto", alpha: Alpha = "auto",
    lpf: Lpf = "auto", method: Method = "moments", columns: Columns = None, missing: Missing = "fill", seed: Seed = 0,
    model: Annotated[Path | None, typer.Option("--model", help="a forecaster of `fit`; else one is fitted now")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="the forecast as .csv")] = None,
    plot: Annotated[Path | None, typer.Option(help="a picture with the backtest's bands: .svg, .png, .pdf")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    from netsuke.apps.signals.forecast import backtest as past
    from netsuke.apps.signals.forecast.forecaster import MixLinear
    from netsuke.apps.signals.forecast.picture import check, draw
    from netsuke.models.files import write_atomically

    if plot is not None:
        check(plot)
    if model is not None:
        from netsuke.apps.signals.forecast.series import read

        made = MixLinear.load(model)
        if horizon not in (None, made.horizon):
            raise NetsukeError(f"forecast {horizon} rows with {model.name}", f"it was fitted for {made.horizon}")
        series = read(data, _names(columns) or made.names)
    else:
        series, made = _open(data, horizon, lookback, period, alpha, lpf, method, columns, missing, seed)
        with _bar("training") as step:
            made.fit(series, on_step=step)
    ahead = made.predict(series)
    table = _table(series, ahead)
    if output is not None:
        write_atomically(output, lambda f: f.write(table.encode()))
    if plot is not None:
        with _bar("backtest") as step:
            found = past.backtest(series, made, on_fold=step)
        draw(series, ahead, found.bands, plot)
    if as_json:
        rows = {n: ahead[:, k].tolist() for k, n in enumerate(series.names)}
        dates = [series.date(len(series.values) + k) for k in range(len(ahead))]
        print(json.dumps(_facts(made) | {"dates": dates, "forecast": rows}))
    elif output is None:
        print(table, end="")
    else:
        print("\n".join(_said(made, f"{output}: ", None)))


def backtest(
    data: Data, horizon: Horizon = None, lookback: Lookback = "auto", period: Period = "auto", alpha: Alpha = "auto",
    lpf: Lpf = "auto", method: Method = "moments", columns: Columns = None, missing: Missing = "fill", seed: Seed = 0,
    folds: Annotated[int, typer.Option(help="parts of the last 30 %, learned anew before each")] = 5,
    plot: Annotated[Path | None, typer.Option(help="the last horizon forecast, in the bands of the others")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    from netsuke.apps.signals.forecast import backtest as past
    from netsuke.apps.signals.forecast.picture import check, draw
    from netsuke.apps.signals.forecast.series import Series

    if plot is not None:
        check(plot)
    series, model = _open(data, horizon, lookback, period, alpha, lpf, method, columns, missing, seed)
    with _bar("backtest") as step:
        got = past.backtest(series, model, folds=folds, on_fold=step)
    if plot is not None:
        cut = len(series.values) - got.model.horizon
        before = Series(series.values[:cut], series.names, series.start, series.step)
        draw(before, got.model.predict(before), got.earlier, plot)
    if as_json:
        print(json.dumps(got.as_dict()))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "MSE", "MAE", title=f"{got.model.horizon} rows ahead, errors in deviations of each channel")
    for name, row in sorted(got.scores.items(), key=lambda r: r[1]["mse"]):
        table.add_row(name, f"{row['mse']:.4f}", f"{row['mae']:.4f}")
    Console().print(table)
    table = Table("channel", "MAE", "best simple MAE", "80 % of errors at the last step")
    for k, (name, row) in enumerate(got.channels.items()):
        low, high = got.bands[1, -1, k], got.bands[-2, -1, k]
        table.add_row(name, f"{row['mae']:.4g}", f"{row['best_floor_mae']:.4g}", f"{low:+.4g} to {high:+.4g}")
    Console().print(table)
    print("\n".join(_said(got.model, "", None)))
    for name, share in got.coverage.items():
        print(f"the {name} bands of the folds before held {share:.0%} of the last fold")
    for name in got.beaten:
        print(f"the plain {name} is better in MSE: use it, or another look-back")


def _open(
    data: Path, horizon: int | None, lookback: str, period: str, alpha: str, lpf: str, method: str, columns: str | None,
    missing: str, seed: int, forget: float = 1.0,
) -> tuple[Any, Any]:  # fmt: skip
    """(series, forecaster that has not learned yet)"""
    from netsuke.apps.signals.forecast.forecaster import MixLinear
    from netsuke.apps.signals.forecast.series import read

    if horizon is None:
        raise NetsukeError("forecast", "nothing says how many rows", "", "--horizon 96")
    made = MixLinear(
        horizon, _count("--lookback", lookback), _count("--period", period), _share(alpha), _count("--lpf", lpf),
        method=method, forget=forget, missing=missing, seed=seed,
    )  # fmt: skip
    return read(data, _names(columns)), made


def _count(name: str, text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise NetsukeError("forecast with these settings", f"{name} is {text!r}", "auto or a whole number") from None


def _share(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise NetsukeError(
            "forecast with these settings", f"--alpha is {text!r}", "auto or a number from 0 to 1"
        ) from None


def _names(columns: str | None) -> list[str] | None:
    return [c.strip() for c in columns.split(",") if c.strip()] if columns else None


def _facts(model: Any) -> dict[str, Any]:
    s = model.shape
    return {
        "horizon": s.horizon, "lookback": s.lookback, "period": s.period, "alpha": model.alpha, "lpf": model.lpf,
        "method": model.method, "forget": model.forget, "parameters": model.n_parameters(), "channels": model.names,
        "notes": model.notes,
    }  # fmt: skip


def _said(model: Any, before: str, c: dict[str, Any] | None) -> list[str]:
    s = model.shape
    out = [f"{before}{model.n_parameters()} parameters, {s.lookback} rows (period {s.period}) to {s.horizon}"]
    out += [f"  {note}" for note in model.notes]
    if c is not None:
        out.append(
            f"  C: {c['weights']} bytes of weights, {c['ram_per_channel']} bytes of RAM a channel, {c['macs']} MACs"
        )
        if c["updating"]:
            kept = ", ".join(f"{n} bytes with {k} channel{'s' * (k != '1')}" for k, n in c["state"].items())
            out.append(
                f"  learning: keeps {kept} ({c['moments']} of moments, {c['window_per_channel']} of last rows a channel), "
                f"and {c['scratch']} while it forecasts"
            )
    return out


def _table(series: Any, ahead: Any) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["date" if series.start is not None else "row", *series.names])
    for k, row in enumerate(ahead):
        writer.writerow([series.date(len(series.values) + k), *(f"{v:.6g}" for v in row)])
    return out.getvalue()


@contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, where that is a terminal; yields what takes (done, of)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    note = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=note, transient=True, disable=not note.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)
