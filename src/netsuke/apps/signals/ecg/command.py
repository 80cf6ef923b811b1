"""`netsuke ecg report|evaluate|stream|export`: a heart read by one lead."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from netsuke.errors import NetsukeError

Method = Annotated[str, typer.Option(help="netsuke (default) or released (FeatureDB as published)")]
Json = Annotated[bool, typer.Option("--json", help="as JSON")]


def register(app: typer.Typer) -> None:
    ecg = typer.Typer(
        no_args_is_help=True, help="Read an ECG: intervals, rate, variability, with reasons for every gap."
    )
    ecg.command("report", help="Everything about one lead of a record: text, JSON, a page or a sheet.")(report)
    ecg.command("evaluate", help="Agreement with the marks in a folder of WFDB records, or with LUDB.")(evaluate)
    ecg.command("stream", help="Block by block from standard input, one sample per line.")(stream)
    ecg.command("export", help="The pipeline as C99 for a wearable: no malloc, 28 KB of RAM at 250 Hz.")(export)
    app.add_typer(ecg, name="ecg")


def report(
    record: Annotated[Path, typer.Argument(help=".hea, .edf, .npy, .npz, .csv, .txt, .json")],
    lead: Annotated[str | None, typer.Option(help="by name or number; default II or the first")] = None,
    rate: Annotated[float | None, typer.Option(help="samples per second, if the file does not say")] = None,
    unit: Annotated[str | None, typer.Option(help="V, mV, uV, nV, or counts such as 200/mV")] = None,
    method: Method = "netsuke",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="a page (.html) or sheet (.pdf)")] = None,
    beats: Annotated[bool, typer.Option("--beats", help="with --json: R and the marks of every beat")] = False,
    as_json: Json = False,
) -> None:
    from netsuke.apps.signals.ecg import report as words
    from netsuke.apps.signals.ecg.pipeline import analyse
    from netsuke.apps.signals.ecg.read import read

    got = analyse(read(record, rate=rate, unit=unit), lead, method=method)
    if output is not None:
        words.write(got, output)
    print(json.dumps(got.as_dict(beats), ensure_ascii=False) if as_json else words.text(got))


def evaluate(
    folder: Annotated[str, typer.Argument(help="WFDB records with marks beside them; 'ludb' for the bundled leads")],
    lead: Annotated[str | None, typer.Option(help="one lead only")] = None,
    method: Method = "netsuke",
    folds: Annotated[bool, typer.Option("--folds", help="LUDB people: weights that never saw the person")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Bland-Altman and ROC plots (.png, .pdf, .svg)")
    ] = None,
    as_json: Json = False,
) -> None:
    from netsuke.apps.signals.ecg.evaluate import judge, marked_folder
    from netsuke.apps.signals.ecg.pipeline import plain
    from netsuke.apps.signals.ecg.reference import fold_weights, ludb

    rows = ludb(lead or "II") if folder == "ludb" else marked_folder(Path(folder), lead)
    got = judge(rows, method, fold_weights if folds or folder == "ludb" else lambda m: "default")
    if output is not None:
        from netsuke.apps.signals.ecg.evaluate_plots import draw

        draw(got, output)
    if as_json:
        print(json.dumps(plain(got), ensure_ascii=False))
    else:
        print("\n".join(evaluation_lines(got)))


def evaluation_lines(got: dict[str, Any]) -> list[str]:
    out = [
        f"{'':9} {'records':>7} {'failed':>6} {'false':>5} {'MAE':>6} {'median':>6} {'bias':>6} {'limits':>15} {'r':>5}"
    ]
    for name in ("PR", "QRS", "QT", "QTc"):
        v = got[name]
        row = f"{name:9} {v['records']:7} {v['failures']:6} {v['false']:5}"
        if "mae" in v:
            limits = f"{v['limits'][0]:.0f} to {v['limits'][1]:.0f}"
            row += f" {v['mae']:6.1f} {v['median']:6.1f} {v['bias']:6.1f} {limits:>15} {v['r']:5.2f}"
        out.append(row)
    for name in ("AV block", "long QTc"):
        if "auc" in got.get(name, {}):
            v = got[name]
            out.append(
                f"{name:9} AUC {v['auc']:.3f} ({v['interval'][0]:.2f} to {v['interval'][1]:.2f}), {v['cases']} cases"
            )
    v = got["R peaks"]
    out.append(
        f"R peaks   sensitivity {v['sensitivity']:.4f}, predictivity {v['predictivity']:.4f} ({v['marked']} beats)"
    )
    return out


def stream(
    rate: Annotated[float | None, typer.Option(help="samples per second")] = None,
    unit: Annotated[str, typer.Option(help="V, mV, uV, nV, or counts such as 200/mV")] = "mV",
    seconds: Annotated[float, typer.Option(help="per block")] = 10.0,
    column: Annotated[int, typer.Option(help="of the lead, from 0")] = 0,
    method: Method = "netsuke",
    as_json: Json = False,
) -> None:
    from netsuke.apps.signals.ecg.stream import stream as blocks

    if rate is None:
        raise NetsukeError("read the stream", "nothing says how many samples there are per second", "", "--rate 250")
    for got in blocks(sys.stdin, rate, seconds=seconds, unit=unit, column=column, method=method):
        print(json.dumps(got, ensure_ascii=False) if as_json else stream_line(got), flush=True)


def export(
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    rate: Annotated[int, typer.Option(help="samples per second of the device's converter, 100 to 1000")] = 250,
    emulate: Annotated[str | None, typer.Option(help="also run a made heart on an emulated board, m4 or m7")] = None,
    as_json: Json = False,
) -> None:
    from netsuke.apps.signals.ecg import device

    got = device.write_c(out, rate)
    if emulate is not None:
        from netsuke.apps.signals.ecg.synthetic import heart

        run = device.on_board(heart(seconds=device.SECONDS, fs=float(rate)).x[None], rate, emulate)
        got |= {
            "core": emulate, "instructions_per_second": int(run.instructions.mean() / device.SECONDS), "flash": run.flash,
            "ram": run.ram, "stack": run.stack,
            "report": {name: value.value for name, value in run.reports[0].values.items()},
        }  # fmt: skip
    if as_json:
        print(json.dumps(got, ensure_ascii=False))
        return
    print(f"{out}: the pipeline for {rate} samples a second; `make -C {out} test` runs its self-test")
    if emulate is not None:
        print(
            f"{emulate}: {got['instructions_per_second']:,} instructions per second of signal, {got['flash']:,} bytes of flash, "
            f"{got['ram'] + got['stack']:,} of RAM with the stack"
        )


def stream_line(got: dict[str, Any]) -> str:
    def word(name: str) -> str:
        v = got[name]
        return (
            f"{name} {v['value']:.0f} {v['unit']} ({v['quality']})"
            if v["value"] is not None
            else f"{name} – ({v['reason']})"
        )

    shown = ", ".join(word(n) for n in ("heart rate", "PR", "QRS", "QT"))
    return f"{got['start']:8.0f} s  {got['beats']:3} beats  {shown}" + (
        f"  [{', '.join(got['flags'])}]" if got["flags"] else ""
    )
