"""ETTh1 and ETTh2, all horizons: MixLinear beside SparseTSF, FITS- and DLinear-like models, linear layers and plain floors.

    python benchmarks/forecast.py [--json] [--only METHOD] …
    python benchmarks/forecast.py --docs

One split, one loop, every window of the test months scored once, errors on scaled values, a complex number counted as two. The
data are third-party files below $NETSUKE_DATA (mixlinear/). neuralforecast is not run beside it: installing it brings
PyTorch's CUDA libraries; of its models DLinear is re-implemented here. A run of some methods keeps the other rows of the result
file and names its own run beside its methods. --docs measures nothing and writes the tables of docs/forecast.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from forecast_docs import RESULT, methods, mse
from forecast_docs import write as write_docs

FLOORS = {"repeat last day": "last period", "repeat last week": "last week", "mean day": "mean period"}
MOMENTS = {"MixLinear, moments": "mixed", "least squares per phase": "least squares"}
TRAINED = {
    "MixLinear, script": "mixlinear", "MixLinear, small": "small", "SparseTSF": "sparsetsf", "FITS-like": "fits",
    "DLinear": "dlinear", "one layer": "one layer",
}  # fmt: skip
RIDGE = "one layer, ridge"
METHODS = (*FLOORS, *MOMENTS, *TRAINED, RIDGE)


def row_of(method: str, name: str, horizon: int) -> dict[str, Any]:
    """What one method gives on one task."""
    from netsuke.systems import mixlinear_cases as cases

    s, lpf = cases.shape_of(horizon), cases.SCRIPTS[name, horizon][1]
    if method in FLOORS:
        got = {"parameters": 0} | cases.floors(name, horizon)[FLOORS[method]]
    elif method in MOMENTS:
        seen = cases.without_gradients(name, horizon)
        sizes = {"mixed": 2 * s.p * s.q + 4 * (lpf + s.m), "least squares": s.n * s.m}
        took = {"seconds": seen["seconds"]} if MOMENTS[method] == "mixed" else {}  # timed with both paths' fits only
        got = {"parameters": sizes[MOMENTS[method]]} | took | seen[MOMENTS[method]]
    elif method == RIDGE:
        got = cases.ridge(name, horizon)
    else:
        seen = cases.trained(TRAINED[method], name, horizon)
        got = {k: seen[k] for k in ("parameters", "seconds", "epochs", "mse", "mae")}
    return {"set": name, "horizon": horizon, "method": method} | got


def kept(rows: list[dict[str, Any]], measured: list[str], path: Path = RESULT) -> dict[str, Any]:
    """The content of the result file `path` with `rows` of the `measured` methods; the others as they stand there."""
    from netsuke.measure.machine import provenance

    if set(measured) == set(METHODS) or not path.exists():
        return {"rows": rows, "run": provenance()}
    old = json.loads(path.read_text(encoding="utf-8"))
    rows = [r for r in old["rows"] if r["method"] not in measured] + rows
    tasks = methods(rows)[1]
    rows.sort(key=lambda r: (tasks.index((r["set"], r["horizon"])), METHODS.index(r["method"])))
    return {"rows": rows, "run": old["run"], "runs": old.get("runs", {}) | dict.fromkeys(measured, provenance())}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    ask.add_argument("--only", action="append", choices=METHODS, help="measure this method; the other rows stay")
    ask.add_argument("--docs", action="store_true", help="write the tables of docs/forecast.md from the result files")
    args = ask.parse_args()
    if args.docs:
        write_docs()
        return
    from netsuke.models.files import write_atomically
    from netsuke.systems import mixlinear_cases as cases

    rows: list[dict[str, Any]] = []
    for name, horizon in cases.TASKS:
        rows += [row_of(method, name, horizon) for method in args.only or METHODS]
        print(f"{name} {horizon} done", flush=True)
    print(mse({"rows": rows}))
    if args.json:
        text = json.dumps(kept(rows, args.only or list(METHODS)), indent=1) + "\n"
        write_atomically(RESULT, lambda f: f.write(text.encode()))


if __name__ == "__main__":
    main()
