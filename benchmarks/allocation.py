"""Does choosing per part beat one setting for all? Excess loss on test text at equal bytes, pycode, three budgets.

    python benchmarks/allocation.py [--json]

Uniform settings: the same bits for every linear map (table at the same bits or at 8), the same cut for every block, all with
error compensation. The budgets are the sizes on disk of the plain 4-, 3- and 2-bit ones, where a uniform setting is at its
best. At each, the best uniform setting that fits is chosen on validation text, as `fit` chooses, and both are scored once on
test text. excess = test loss - test loss of the 16-bit model, in nats per token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from netsuke.compress.modegpt import MoDeGPT
from netsuke.compress.quantize import Quantize
from netsuke.fit import fit
from netsuke.measure.machine import provenance
from netsuke.models.load import load
from netsuke.models.save import save_artifact
from netsuke.tasks.language import language_task

BUDGETS = ("4 bits, table 8 bits", "3 bits, table 8 bits", "2 bits, table 8 bits")
RESULT = Path(__file__).parent / "results/allocation.json"
BATCHES = 8  # of validation text on which settings are compared; fit uses as many


@dataclass
class Uniform:
    name: str
    model: nn.Module
    bytes: int
    validation: float


def settings() -> Iterator[tuple[str, float, int, int]]:
    """(name, cut, bits, bits of the table)"""
    for cut in (0.0, 0.125, 0.25):
        for bits in (8, 4, 3, 2):
            for table in sorted({bits, 8}):
                yield (
                    f"{bits} bits, table {table} bits" + (f", every block cut by {cut:.1%}" if cut else ""),
                    cut,
                    bits,
                    table,
                )


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    ask.add_argument("--model", default="pycode")
    args = ask.parse_args()
    loaded = load(args.model)
    dense, task = loaded.model.float(), language_task(loaded, None, None)
    rows = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:

        def on_disk(model: nn.Module) -> int:
            path = save_artifact(Path(folder) / "u.netsuke", model, loaded.tokenizer, {}, {})
            return sum(f.stat().st_size for f in path.iterdir())

        uniform: list[Uniform] = []
        for name, cut, bits, table in settings():
            narrow = MoDeGPT(remove=cut, allocate="uniform").apply(dense, task) if cut else dense
            model = Quantize(bits=bits, embed_bits=table).apply(narrow, task)
            uniform.append(Uniform(name, model, on_disk(model), task.mean_loss(model, "validation", BATCHES)))
            print(f"{uniform[-1].bytes / 1e6:6.3f} MB  validation {uniform[-1].validation:.4f}  {name}", flush=True)
        base = task.mean_loss(dense, "test")
        for budget in (next(u.bytes for u in uniform if u.name == b) for b in BUDGETS):
            report = fit(args.model, "pi-zero-2w", storage=str(budget), out=f"{folder}/a.netsuke")
            ours = task.mean_loss(load(report["artifact"]).model, "test") - base
            best = min((u for u in uniform if u.bytes <= budget), key=lambda u: u.validation)
            theirs = task.mean_loss(best.model, "test") - base
            rows.append({
                "budget": f"{budget / 1e6:.2f} MB", "bytes": report["after"]["bytes"], "excess": ours, "uniform": best.name,
                "uniform_bytes": best.bytes, "uniform_excess": theirs, "ratio": ours / theirs,
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    settings_table = [{"name": u.name, "bytes": u.bytes, "validation": u.validation} for u in uniform]
    out = {"model": args.model, "test_loss_16_bit": base, "rows": rows, "uniform": settings_table, "run": provenance()}
    if args.json:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
