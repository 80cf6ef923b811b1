"""Does `netsuke plan` tell the truth? Predicted against measured peak memory, each cell in a fresh process.

    python benchmarks/plan.py [--json] [--quick]

Inference: a model with random weights is written as an artifact, loaded and run by the code of
`netsuke run --backend torch`: prefill in chunks, cache for the whole context, four tokens. Training: three steps of
train/loop.py. Both with the limits of runtime/allocator.py; training is measured with glibc's own as well
(`measured_with_glibc_limits`), which no plan foresees.
Peaks are above the idle process (measure/peak.py); torch has one thread so that other work on the machine does not
stretch the runs; one cell has two. Each cell is the median of three processes (one with --quick): the same program differs
by up to 5 MB from run to run, by how its heap happens to lie.
Bars: within 5 % for inference, 15 % for training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from netsuke.layers.quantized import QuantLinear
from netsuke.measure.machine import provenance
from netsuke.measure.peak import peak_of
from netsuke.models.llama import Llama, LlamaConfig
from netsuke.models.load import describe, load
from netsuke.models.save import save_artifact
from netsuke.runtime.allocator import LARGE_IN_TRAINING, return_freed_memory
from netsuke.runtime.generate import generate
from netsuke.runtime.memory_plan import inference_plan
from netsuke.runtime.training_plan import trained_names, training_plan
from netsuke.tasks.language import token_losses
from netsuke.train.loop import LoopKnobs, train

RESULT = Path(__file__).parent / "results/plan.json"
BARS = {"inference": 0.05, "training": 0.15}
SHAPES = {  # blocks, width, heads, key heads, hidden, vocabulary: 4, 9, 30, 100 and 126 million parameters
    "4M": (4, 256, 4, 2, 704, 4096),
    "10M": (4, 384, 6, 2, 1024, 8192),
    "30M": (8, 512, 8, 4, 1408, 12000),
    "100M": (12, 768, 12, 4, 2048, 32000),
    "126M": (12, 768, 12, 12, 3072, 16384),
}
INFERENCE = [  # model, precision, context, prompt, threads
    ("4M", "float32", 512, 300, 1),
    ("10M", "float32", 4096, 2000, 1),
    ("10M", "float16", 1024, 700, 1),
    ("30M", "float32", 256, 200, 1),
    ("30M", "bfloat16", 2048, 1000, 1),
    ("30M", "8 bits", 1024, 600, 1),
    ("100M", "float32", 1024, 300, 1),
    ("100M", "float16", 256, 200, 2),
    ("100M", "bfloat16", 4096, 300, 1),
    ("100M", "8 bits", 2048, 300, 1),
    ("100M", "4 bits", 512, 300, 1),
    ("100M", "4 bits", 4096, 600, 1),
    ("126M", "4 bits", 1024, 600, 1),
    ("126M", "float16", 2048, 300, 1),
]
TRAINING = [  # model, scope, windows, tokens
    ("4M", "last-1", 2, 128),
    ("4M", "full", 4, 256),
    ("10M", "full", 2, 256),
    ("10M", "last-1", 4, 512),
    ("10M", "last-2", 2, 256),
    ("30M", "full", 1, 256),
    ("30M", "last-2", 2, 256),
]
QUICK = 1  # the first of each list: about 25 MB
REPEATS = 3


def config(shape: str, context: int = 4096) -> LlamaConfig:
    blocks, width, heads, kv_heads, hidden, vocab = SHAPES[shape]
    return LlamaConfig.uniform(
        blocks,
        hidden,
        vocab=vocab,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        context=context,
    )


def random_model(cfg: LlamaConfig, precision: str) -> Llama:
    """Random weights as they would be stored; a plan does not ask what they say."""
    rng = torch.Generator().manual_seed(0)
    model = Llama(cfg, precision if precision.startswith(("float", "bfloat")) else "float32")
    for name, p in model.named_parameters():
        if not name.endswith("norm.weight"):
            p.data.normal_(0, 0.02, generator=rng)
    if precision.endswith("bits"):
        bits, group = int(precision.split()[0]), 64
        for name, layer in list(model.linears().items()):
            shape = (layer.outs, -(-layer.ins // group))
            codes = torch.randint(0, 2**bits, (layer.outs, layer.ins), dtype=torch.uint8, generator=rng)
            scales = torch.full(shape, 0.04 / 2**bits)
            model.replace(name, QuantLinear.from_codes(codes, scales, torch.full(shape, 2 ** (bits - 1)), bits, group))
    return model


def run_cell(folder: str, context: int, prompt: int) -> int:
    """In the fresh process: what `netsuke run` does, for four tokens."""
    return_freed_memory()
    model = load(folder).model
    tokens = generate(model, [3] * prompt, context - prompt, context=context, stop=())
    return [next(tokens) for _ in range(4)][-1]


def train_cell(folder: str, scope: str, batch: int, tokens: int, give_back: bool) -> float:
    """In the fresh process: three steps of the training loop, with or without the allocator's fixed limits."""
    if give_back:
        return_freed_memory(LARGE_IN_TRAINING)
    model = load(folder).model
    names = trained_names(model.cfg, scope, [n for n, _ in model.named_parameters()])
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.cfg.vocab, (batch, tokens + 1), generator=rng)
    history = train(model, lambda step: ids, lambda m, b: token_losses(m, b).mean(), LoopKnobs(steps=3))
    return history.losses[-1]


def measured(target: str, *args: Any, threads: int, repeats: int) -> dict[str, Any]:
    """{"measured": median bytes above idle, "runs": all of them, "idle": of the last}."""
    peaks = [peak_of(target, *args, threads=threads, folders=(str(Path(__file__).parent),)) for _ in range(repeats)]
    runs = sorted(p.above for p in peaks)
    return {"measured": runs[repeats // 2], "runs": runs, "idle": peaks[-1].idle}


def plan_cells(quick: bool = False, folder: Path | None = None) -> list[dict[str, Any]]:
    """One row per cell: {kind, model, …, predicted, measured, error, plan}; bytes, and error = predicted/measured - 1."""
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            return plan_cells(quick, Path(made))
    rows, first, repeats = [], QUICK if quick else None, 1 if quick else REPEATS

    def stored(shape: str, precision: str) -> Path:
        path = folder / f"{shape}-{precision.replace(' ', '-')}.netsuke"
        if not path.exists():
            save_artifact(path, random_model(config(shape), precision), None, provenance={}, facts={})
        return path

    def add(plan: Any, **facts: Any) -> None:
        row = {**facts, "predicted": plan.peak, "error": plan.peak / facts["measured"] - 1}
        rows.append(row | {"plan": plan.as_dict(), "moment": plan.moment})
        show(rows[-1])

    for shape, precision, context, prompt, threads in INFERENCE[:first]:
        path = stored(shape, precision)
        facts = describe(path)
        plan = inference_plan(facts.config, facts.layers, context=context, prompt=prompt, threads=threads)
        got = measured("plan:run_cell", str(path), context, prompt, threads=threads, repeats=repeats)
        add(
            plan, kind="inference", model=shape, precision=precision, context=context, prompt=prompt, threads=threads,
            **got,
        )  # fmt: skip
    for shape, scope, batch, tokens in TRAINING[:first]:
        path = stored(shape, "float32")
        facts = describe(path)
        plan = training_plan(facts.config, facts.layers, tokens=tokens, batch=batch, scope=scope, threads=1)
        job = ("plan:train_cell", str(path), scope, batch, tokens)
        got = measured(*job, True, threads=1, repeats=repeats)
        if not quick:
            got["measured_with_glibc_limits"] = measured(*job, False, threads=1, repeats=1)["measured"]
        add(plan, kind="training", model=shape, scope=scope, batch=batch, tokens=tokens, **got)
    return rows


def show(row: dict[str, Any]) -> None:
    what = (
        f"{row['precision']:9} {row['context']:5}"
        if row["kind"] == "inference"
        else f"{row['scope']:7} {row['batch']} x {row['tokens']}"
    )
    print(
        f"{row['kind']:9} {row['model']:>5} {what:16} predicted {row['predicted'] / 1e6:7.1f} MB  "
        f"measured {row['measured'] / 1e6:7.1f} MB  {row['error']:+.1%}  ({row['moment']})", flush=True,
    )  # fmt: skip


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    ask.add_argument("--quick", action="store_true", help="one cell of each kind")
    args = ask.parse_args()
    rows = plan_cells(args.quick)
    out = {**provenance(), "bars": BARS, "cells": rows}
    out["worst"] = {k: max(abs(r["error"]) for r in rows if r["kind"] == k) for k in BARS}
    print("; ".join(f"{k}: worst {v:.1%} (bar {BARS[k]:.0%})" for k, v in out["worst"].items()))
    if args.json:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
