"""ETTh1 and ETTh2, all horizons: MixLinear beside SparseTSF, FITS- and DLinear-like models, one linear layer and plain floors.

    python benchmarks/forecast.py [--json]

One split, one loop, every window of the test months scored once, errors on scaled values, a complex number counted as two. The
data are third-party files below $NETSUKE_DATA (mixlinear/). neuralforecast is not run beside it: installing it brings
PyTorch's CUDA libraries; of its models DLinear is re-implemented here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from netsuke.measure.machine import provenance
from netsuke.systems import mixlinear_cases as cases

RESULT = Path(__file__).parent / "results/forecast.json"
TRAINED = {
    "MixLinear, script": "mixlinear", "MixLinear, small": "small", "SparseTSF": "sparsetsf", "FITS-like": "fits",
    "DLinear": "dlinear", "one layer": "one layer",
}  # fmt: skip
FLOORS = {"last period": "repeat last day", "last week": "repeat last week", "mean period": "mean day"}
MOMENTS = {"mixed": "MixLinear, moments", "least squares": "least squares per phase"}


def rows_of(name: str, horizon: int) -> list[dict[str, Any]]:
    task, s = {"set": name, "horizon": horizon}, cases.shape_of(horizon)
    rows = [task | {"method": FLOORS[k], "parameters": 0} | v for k, v in cases.floors(name, horizon).items()]
    seen = cases.without_gradients(name, horizon)
    lpf = cases.SCRIPTS[name, horizon][1]
    sizes = {"mixed": 2 * s.p * s.q + 4 * (lpf + s.m), "least squares": s.n * s.m}
    rows += [
        task | {"method": MOMENTS[k], "parameters": sizes[k], "seconds": seen["seconds"]} | seen[k] for k in MOMENTS
    ]
    for label, kind in TRAINED.items():
        got = cases.trained(kind, name, horizon)
        rows.append(task | {"method": label} | {k: got[k] for k in ("parameters", "seconds", "epochs", "mse", "mae")})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: methods down, tasks across, MSE with the parameters."""
    tasks = list(dict.fromkeys((r["set"], r["horizon"]) for r in rows))
    lines = ["| MSE (parameters) | " + " | ".join(f"{n} {h}" for n, h in tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = {(r["set"], r["horizon"]): r for r in rows if r["method"] == method}
        cells = [f"{mine[t]['mse']:.4f} ({mine[t]['parameters']})" if t in mine else "–" for t in tasks]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    args = ask.parse_args()
    rows = []
    for name, horizon in cases.TASKS:
        rows += rows_of(name, horizon)
        print(f"{name} {horizon} done", flush=True)
    print(table(rows))
    if args.json:
        RESULT.write_text(json.dumps({"rows": rows, "run": provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
