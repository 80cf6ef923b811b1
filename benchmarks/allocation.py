"""Does choosing per part beat one setting for all? Excess loss on test text at equal bytes, pycode, three budgets.

    python benchmarks/allocation.py [--json]

For each budget the best uniform setting (same bits for every linear map, table at the same bits or at 8, same cut for
every block; all solved with error compensation) that fits is chosen on validation text; `fit` chooses on validation text as
well. Both are then scored once on the test text. excess = test loss − test loss of the 16-bit model, in nats per token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from netsuke.compress.modegpt import MoDeGPT
from netsuke.compress.quantize import Quantize
from netsuke.fit import fit
from netsuke.measure.machine import provenance
from netsuke.models.load import load
from netsuke.tasks.language import language_task

BUDGETS = ("2.5MB", "3.2MB", "4MB")
RESULT = Path(__file__).parent / "results/allocation.json"
WINDOWS = 32  # batches of validation text on which settings are compared


def uniform_models(dense, task):
    """(name, carved model) of every uniform setting."""
    for cut in (0.0, 0.125, 0.25):
        narrow = MoDeGPT(remove=cut, allocate="uniform").apply(dense, task) if cut else dense
        for bits in (8, 4, 3, 2):
            for table in sorted({bits, 8}):
                name = f"{bits} bits, table {table} bits" + (f", every block cut by {cut:.1%}" if cut else "")
                yield name, Quantize(bits=bits, embed_bits=table).apply(narrow, task)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    ask.add_argument("--model", default="pycode")
    args = ask.parse_args()
    loaded = load(args.model)
    dense, task = loaded.model.float(), language_task(loaded, None, None)
    rows = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        base = task.mean_loss(dense, "test")
        uniform = []
        for name, model in uniform_models(dense, task):
            size = sum(m.bytes() for m in model.linears().values())
            uniform.append((size, task.mean_loss(model, "validation", WINDOWS), name, model))
            print(f"{size / 1e6:6.3f} MB  validation {uniform[-1][1]:.4f}  {name}", flush=True)
        for budget in BUDGETS:
            report = fit(args.model, "pi-zero-2w", storage=budget, out=f"{folder}/a.netsuke")
            carved = load(report["artifact"]).model
            ours = task.mean_loss(carved, "test") - base
            fixed = report["after"]["bytes"] - sum(m.bytes() for m in carved.linears().values())
            fitting = [u for u in uniform if u[0] + fixed <= report["budget"]["storage"]]
            size, _, name, model = min(fitting, key=lambda u: u[1])
            theirs = task.mean_loss(model, "test") - base
            rows.append({
                "budget": budget, "bytes": report["after"]["bytes"], "excess": ours, "uniform": name,
                "uniform_bytes": size + fixed, "uniform_excess": theirs, "ratio": ours / theirs,
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    out = {"model": args.model, "test_loss_16_bit": base, "rows": rows, "run": provenance()}
    print(json.dumps(out))
    if args.json:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
