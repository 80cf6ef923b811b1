"""Rounding to nearest, GPTQ and descent from GPTQ: perplexity ratio to 16 bits on test text, same bytes.

    python benchmarks/quantization.py [--json] [--model pycode]

Nothing is chosen here, so the test text is scored once for each setting. Groups of 64, table at 8 bits.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

from netsuke.compress.quantize import Quantize
from netsuke.measure.machine import provenance
from netsuke.models.load import load
from netsuke.tasks.language import language_task

RESULT = Path(__file__).parent / "results/quantization.json"
SOLVERS = ("rtn", "gptq", "descent")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    ask.add_argument("--model", default="pycode")
    ask.add_argument("--data", default=None)
    args = ask.parse_args()
    loaded = load(args.model)
    dense, task, rows = loaded.model.float(), language_task(loaded, args.data, None), []
    with torch.no_grad():
        base = task.mean_loss(dense, "test")
        for bits in (8, 4, 3, 2):
            row: dict = {"bits": bits}
            for solver in SOLVERS:
                begin = time.perf_counter()
                model = Quantize(bits=bits, solver=solver).apply(dense, task)
                row[f"{solver}_seconds"] = round(time.perf_counter() - begin, 1)
                row[solver] = math.exp(task.mean_loss(model, "test") - base)
                row["bytes"] = sum(m.bytes() for m in model.linears().values())
            rows.append(row)
            said = ", ".join(f"{solver} x{row[solver]:.4f} in {row[f'{solver}_seconds']} s" for solver in SOLVERS)
            print(f"{bits} bits, {row['bytes'] / 1e6:.2f} MB: {said}", flush=True)
    out = {"model": args.model, "perplexity_16_bit": math.exp(base), "rows": rows, "run": provenance()}
    if args.json:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
