"""`netsuke ecg` beside NeuroKit2, XQRS and the released FeatureDB method: LUDB leads I and II, MIT-BIH 100, one run.

    NETSUKE_DATA=FOLDER python benchmarks/ecg.py [--peer-python PYTHON] [--folder LUDB] [--robustness] [--day] [--json]
    python benchmarks/ecg.py --docs

The peers (neurokit2, wfdb, py-ecg-detectors) run in an interpreter of their own, which runs this file with --as-peer. Everybody
gets the same signals in mV and is judged by the same code; a reference without an answer is a failure. netsuke's network
never saw the person it marks. --folder judges every lead of a folder of WFDB records as well (the twelve of LUDB, for
instance); --day makes 24 h of one lead at 250 Hz from record 100 and measures time and memory in a fresh process. --json
writes results/ecg.json; a run of some parts keeps the others as they stand there and names its own run beside its parts.
--docs measures nothing and writes the tables of docs/ecg.md from that file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from ecg_docs import CONSTANT, CONSTANT_QT, RESULT
from ecg_docs import write as write_docs

PEERS = ("neurokit2 dwt", "neurokit2 prominence")
DETECTORS = ("neurokit2", "wfdb xqrs", "py-ecg-detectors hamilton", "py-ecg-detectors pan-tompkins")


def peer_intervals(x: np.ndarray, fs: float, method: str) -> list[float]:
    """PR, QRS, QT in ms and RR in s by NeuroKit2, medians over the beats; NaN where it found nothing or failed."""
    import neurokit2 as nk

    try:
        clean = nk.ecg_clean(x, sampling_rate=fs)
        r = np.asarray(nk.ecg_peaks(clean, sampling_rate=fs)[1]["ECG_R_Peaks"])
        waves = nk.ecg_delineate(clean, r, sampling_rate=fs, method=method)[1]
    except Exception:  # whatever stops it is a failure of the record
        return [float("nan")] * 4
    p, on, off, t = (
        np.array([v for v in waves[f"ECG_{k}"] if v is not None and np.isfinite(v)], dtype=float)
        for k in ("P_Onsets", "R_Onsets", "R_Offsets", "T_Offsets")
    )
    rows: list[list[float]] = [[], [], []]
    for k, peak in enumerate(r):
        before, after = r[k - 1] if k else -1e9, r[k + 1] if k + 1 < len(r) else 1e9
        start = on[(on > before) & (on <= peak)]
        if not len(start):
            continue
        for row, found in (
            (rows[0], start[-1] - p[(p > before) & (p < start[-1])][-1:]),
            (rows[1], off[(off > peak) & (off < after)][:1] - start[-1]),
            (rows[2], t[(t > peak) & (t < after)][:1] - start[-1]),
        ):
            row += [1e3 * float(v) / fs for v in found]
    rr = float(np.median(np.diff(r))) / fs if len(r) > 1 else float("nan")
    return [*(float(np.median(v)) if v else float("nan") for v in rows), rr]


def peer_peaks(x: np.ndarray, fs: float, detector: str) -> np.ndarray:
    try:
        if detector == "neurokit2":
            import neurokit2 as nk

            return np.asarray(nk.ecg_peaks(nk.ecg_clean(x, sampling_rate=fs), sampling_rate=fs)[1]["ECG_R_Peaks"])
        if detector == "wfdb xqrs":
            from wfdb import processing

            return np.asarray(processing.xqrs_detect(x, fs, verbose=False))
        from ecgdetectors import Detectors

        d = Detectors(fs)
        return np.asarray(d.hamilton_detector(x) if "hamilton" in detector else d.pan_tompkins_detector(x))
    except Exception:  # whatever stops it is a failure of the record
        return np.zeros(0)


def as_peer(folder: Path) -> None:
    """In the peers' interpreter: answers for every signal of `folder`/signals.npz, to answers.json beside it."""
    import warnings

    warnings.simplefilter("ignore")
    out: dict[str, dict] = {"intervals": {}, "peaks": {}, "ms": {}}
    with np.load(folder / "signals.npz") as z:
        for key in z.files:
            name, lead, fs = key.rsplit("_", 2)
            x, rate = z[key], float(fs)
            if name != "mit":
                for method in PEERS:
                    begin = time.perf_counter()
                    got = peer_intervals(x, int(rate), method.split()[1])
                    out["ms"].setdefault(method, []).append(1e3 * (time.perf_counter() - begin))
                    out["intervals"].setdefault(method, {})[f"{name}_{lead}"] = got
            for detector in DETECTORS:
                out["peaks"].setdefault(detector, {})[f"{name}_{lead}"] = peer_peaks(x, int(rate), detector).tolist()
    from importlib.metadata import version

    out["versions"] = {n: version(n) for n in ("neurokit2", "wfdb", "py-ecg-detectors")}
    (folder / "answers.json").write_text(json.dumps(out))


def compare(python: str | None, folder: Path | None) -> dict:
    """The table: every method on every lead, same records, same judge."""
    from netsuke.apps.signals.ecg import evaluate, wfdb
    from netsuke.apps.signals.ecg.reference import fold_weights, ludb
    from netsuke.data.catalogue import find

    rows = {lead: ludb(lead) for lead in ("I", "II")}
    if folder is not None:
        for m in evaluate.marked_folder(folder):
            rows.setdefault(m.lead.upper(), []).extend([] if m.lead.upper() in ("I", "II") else [m])
    head = find("featuredb-ecg/wfdb-sample/100.hea")
    record, beats = wfdb.read_wfdb(head), wfdb.read_annotations(head.with_suffix(".atr")).beats
    only_peaks = np.stack([np.ones_like(beats), beats, beats, beats], 1)
    mit = evaluate.Marked("mit", "MLII", 0, record.millivolts(0), record.fs, only_peaks)
    out: dict = {"intervals": {}, "fold 0": {}, "peaks": {}, "ms": {}}
    for lead, marked in rows.items():
        for method in ("netsuke", "released"):
            for m in marked[:50]:
                begin = time.perf_counter()
                evaluate.measured(m, method, fold_weights(m))
                out["ms"].setdefault(method, []).append(1e3 * (time.perf_counter() - begin))
            got = evaluate.judge(marked, method, fold_weights)
            out["peaks"].setdefault(method, {})[lead] = got.pop("R peaks")
            out["intervals"].setdefault(lead, {})[method] = slim(got)
        out["intervals"][lead] |= constants(marked)
        first = [m for m in marked if fold_weights(m) == "fold0"]  # nobody of them took part in a choice
        out["fold 0"][lead] = slim(evaluate.judge(first, "netsuke", fold_weights))
    for method in ("netsuke", "released"):
        out["peaks"][method]["MIT-BIH 100"] = evaluate.judge([mit], method)["R peaks"]
    if python:
        everybody = [(f"{m.name}_{lead}", m) for lead, marked in rows.items() for m in marked] + [("mit_MLII", mit)]
        with tempfile.TemporaryDirectory() as place:
            np.savez(Path(place) / "signals.npz", **{f"{key}_{m.fs:g}": m.x for key, m in everybody})
            subprocess.run([python, __file__, "--as-peer", place], check=True)
            answers = json.loads((Path(place) / "answers.json").read_text())
        out["versions"] = answers["versions"]
        out["ms"] |= answers["ms"]
        for lead, marked in rows.items():
            for method, got in answers["intervals"].items():
                values = [
                    np.array([np.nan if v is None else v for v in got[f"{m.name}_{lead}"]], float) for m in marked
                ]
                out["intervals"][lead][method] = slim(evaluate.table(marked, values))
        for detector, got in answers["peaks"].items():
            for lead, marked in [*rows.items(), ("MIT-BIH 100", [mit])]:
                keys = [f"{m.name}_{lead if m is not mit else 'MLII'}" for m in marked]
                counts = [evaluate.matched(np.array(got[k]), m.r, m.fs) for k, m in zip(keys, marked)]
                hits, misses, false = np.sum(counts, axis=0)
                row = {"marked": hits + misses, "missed": misses, "false": false}
                row |= {"sensitivity": hits / (hits + misses), "predictivity": hits / max(hits + false, 1)}
                out["peaks"].setdefault(detector, {})[lead] = row
    out["ms"] = {k: float(np.median(v)) for k, v in out["ms"].items()}
    return out


def constants(marked: list) -> dict[str, dict]:
    """What the medians of all references score as an answer for everybody, RR guessed too or as marked."""
    from netsuke.apps.signals.ecg import evaluate

    want = np.array([m.intervals() for m in marked])
    middle = np.nanmedian(want, axis=0)
    out = {}
    for name, rr in ((CONSTANT, np.full(len(want), middle[3])), (CONSTANT_QT, want[:, 3])):
        answers = np.column_stack((np.tile(middle[:3], (len(want), 1)), rr))
        got = slim(evaluate.table(marked, list(answers)))
        undefined = {"r", "r_interval"}  # of a constant; QTc follows RR and has one where that is marked
        out[name] = {
            k: {n: x for n, x in v.items() if (k == "QTc" and name == CONSTANT_QT) or n not in undefined}
            for k, v in got.items()
        }
    return out


def merged(old: dict, new: dict) -> dict:
    """`old` with what `new` measured, part by part."""
    both = {k: merged(old[k], v) if isinstance(v, dict) and isinstance(old.get(k), dict) else v for k, v in new.items()}
    return old | both


def short(x: Any) -> Any:
    """Numbers to four digits after the point: more than any figure has that is made of them."""
    if isinstance(x, dict):
        return {k: short(v) for k, v in x.items()}
    if isinstance(x, list):
        return [short(v) for v in x]
    return round(x, 4) if isinstance(x, float) else x


def save(out: dict, parts: list[str], whole: bool, path: Path = RESULT) -> None:
    """Writes `path`. Unless the run is `whole`, what `path` holds of other parts stays, and `parts` name their own run."""
    from netsuke.apps.signals.ecg.pipeline import plain
    from netsuke.measure.machine import provenance
    from netsuke.models.files import write_atomically

    out = plain(out)
    if whole or not path.exists():
        out |= {"run": provenance()}
    else:
        out = merged(json.loads(path.read_text(encoding="utf-8")), out | {"runs": dict.fromkeys(parts, provenance())})
    text = json.dumps(short(out), indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda f: f.write(text.encode()))


def slim(got: dict) -> dict:
    """Without the rows and curves, which are too long for a result file."""
    return {k: {n: x for n, x in v.items() if n != "roc"} for k, v in got.items() if k != "rows"}


def show(out: dict) -> None:
    print(
        f"{'lead':5} {'method':25} "
        + " ".join(f"{k + ' MAE/med/r/failed':>24}" for k in ("PR", "QRS", "QT"))
        + "  AV   QTc"
    )
    for lead, methods in out["intervals"].items():
        for method, got in methods.items():
            cells = [
                f"{v['mae']:.1f}/{v['median']:.1f}/{v.get('r', float('nan')):.2f}/{v['failures']}"
                for v in (got[k] for k in ("PR", "QRS", "QT"))
            ]
            areas = [got.get(k, {}).get("auc", float("nan")) for k in ("AV block", "long QTc")]
            print(
                f"{lead:5} {method:25} "
                + " ".join(f"{c:>24}" for c in cells)
                + " "
                + " ".join(f"{a:.2f}" for a in areas)
            )
    for method, leads in out["peaks"].items():
        print(
            f"R peaks, {method:30} "
            + ", ".join(f"{k} {v['sensitivity']:.4f}/{v['predictivity']:.4f}" for k, v in leads.items())
        )
    print("ms per record: " + ", ".join(f"{k} {v:.1f}" for k, v in out["ms"].items()))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--peer-python", help="interpreter with neurokit2, wfdb, py-ecg-detectors")
    ask.add_argument("--as-peer", type=Path, help=argparse.SUPPRESS)
    ask.add_argument("--folder", type=Path, help="WFDB records with marks, all leads")
    ask.add_argument("--robustness", action="store_true")
    ask.add_argument("--day", action="store_true")
    ask.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    ask.add_argument("--docs", action="store_true", help=f"write the tables of docs/ecg.md from {RESULT.name}")
    args = ask.parse_args()
    if args.as_peer:
        as_peer(args.as_peer)
        return
    if args.docs:
        write_docs()
        return
    from netsuke.systems.featuredb_ecg_cases import day_long, robustness

    out = compare(args.peer_python, args.folder)
    show(out)
    if not args.peer_python:
        del out["ms"]  # times compare within one run only
    if args.robustness:
        out["robustness"] = [row.as_dict() for row in robustness()]
        for row in out["robustness"]:
            print(f"{row['case']:28} {row['grades']} confidently wrong: {row['wrong']}")
    if args.day:
        runs = sorted((day_long() for _ in range(3)), key=lambda r: r["seconds"])
        out["day"] = {
            **runs[1],
            "all_seconds": [r["seconds"] for r in runs],
            "peak_mb": max(r["peak_mb"] for r in runs),
        }
        print(out["day"])
    if args.json:
        measured = {
            "netsuke, released and constants on I and II": True, "peers": args.peer_python, "the ten other leads": args.folder,
            "spoiled signals": args.robustness, "a day": args.day,
        }  # fmt: skip
        save(out, [k for k, v in measured.items() if v], all(measured.values()))


if __name__ == "__main__":
    main()
