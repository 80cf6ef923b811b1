"""What `fit` carves out of pycode for this machine, beside llama.cpp's Q8_0 and Q4_0 of the same model: speed and loss, one run.

    python benchmarks/carved.py [--model pycode] [--json]

Files of the peer are made by its own quantizer, at its defaults, from the 16-bit GGUF. Two carvings: one may lose 3 %, one
half of what Q4_0 was seen to lose on validation text: a limit that is kept there to the last digit is kept on other text only
half of the time (the first run asked for all of it: 1.82 % on test text, Q4_0 1.79 %). All decode in turn, a token at a time,
medians of rounds; every side's loss is taken from its own logits, in its own runtime, on the same windows of test text, once.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from netsuke.bench.lm import PAST, alternate, quartiles, works
from netsuke.bench.peers import EngineSide, LlamaCppSide, llama_cpp_quietly
from netsuke.devices.probe import core_count
from netsuke.export import gguf
from netsuke.fit import fit
from netsuke.measure.machine import provenance
from netsuke.models.files import write_atomically
from netsuke.models.load import load
from netsuke.models.save import save_artifact
from netsuke.runtime.engine import Engine
from netsuke.tasks.language import LanguageModeling, language_task

RESULT = Path(__file__).parent / "results/carved.json"
ALLOWED = 0.03  # rise of perplexity
HALF = "half of Q4_0's loss"
BARS = {"Q8_0": 1.8, "Q4_0": 1.3}
ROUNDS, TURN = 9, 0.25
BATCHES = 8  # of validation text


def quantized_by_peer(source: Path, out: Path, kind: str) -> Path:
    """llama.cpp's own Q8_0 or Q4_0 of a GGUF file."""
    llama_cpp = llama_cpp_quietly()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = 1
    if code := llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama_model_quantize returned {code}")
    return out


def peer_logits(side: LlamaCppSide, row: list[int]) -> np.ndarray:
    """(T, V) float32, the next-token logits after each token of one window."""
    batch, cpp = side.batch, side.cpp
    cpp.llama_memory_clear(side.memory, False)
    batch.n_tokens = len(row)
    for i, token in enumerate(row):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
    if code := cpp.llama_decode(side.context, batch):
        raise RuntimeError(f"llama_decode returned {code}")
    got = np.ctypeslib.as_array(cpp.llama_get_logits(side.context), (len(row), side.vocab)).copy()
    return got


def loss_of(logits: Any, task: LanguageModeling, split: str, limit: int | None = None) -> float:
    """Mean nats per token; `logits(row)` gives (T, V) for the tokens of a window."""
    total, count = 0.0, 0
    for i, ids in enumerate(task.batches(split)):
        if limit is not None and i >= limit:
            break
        for row in ids:
            logp = torch.from_numpy(logits(row[:-1].tolist())).double().log_softmax(-1)
            total -= float(logp.gather(-1, row[1:, None]).sum())
            count += len(row) - 1
    return total / count


def peer_loss(file: Path, task: LanguageModeling, split: str, limit: int | None = None) -> float:
    """Of a GGUF file in llama.cpp; one thread, which on a shared machine waits for no other."""
    side = LlamaCppSide(file, task.context, 1, 1)
    try:
        return loss_of(lambda row: peer_logits(side, row), task, split, limit)
    finally:
        side.close()


def engine_loss(folder: Path, task: LanguageModeling, split: str) -> float:
    length = task.context
    with Engine.open(folder, context=length, slots=1, chunk=length, threads=1, logit_rows=length) as engine:

        def logits(row: list[int]) -> np.ndarray:
            engine.truncate(0, 0)
            return engine.forward(row, [0] * len(row), [True] * len(row))

        return loss_of(logits, task, split)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--model", default="pycode")
    ask.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    args = ask.parse_args()
    threads = core_count()
    torch.set_num_threads(1)  # beside other programs two would wait for one another
    loaded = load(args.model)
    task = language_task(loaded, None, None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = folder / "f16.gguf"
        gguf.write(loaded, whole, 16)
        files = {kind: quantized_by_peer(whole, folder / f"{kind}.gguf", kind) for kind in BARS}
        base = save_artifact(folder / "whole.netsuke", loaded.model, loaded.tokenizer, {}, {})
        validation = peer_loss(files["Q4_0"], task, "validation", BATCHES)
        dense = loaded.model.float()
        with torch.no_grad():
            seen = math.expm1(validation - task.mean_loss(dense, "validation", BATCHES))
        carved, reports = {}, {}
        for label, loss in (("3 %", ALLOWED), (HALF, seen / 2)):
            print(f"carving: {label} ({loss:.2%} of perplexity)", flush=True)
            reports[label] = fit(args.model, "this", max_loss=f"{loss:.4%}", out=str(folder / f"{len(carved)}.netsuke"))
            carved[label] = Path(reports[label]["artifact"])
        print("scoring the test text, each in its own runtime", flush=True)
        losses = {k: peer_loss(f, task, "test") for k, f in files.items()}
        losses |= {k: engine_loss(f, task, "test") for k, f in carved.items()}
        losses["16 bits"] = engine_loss(base, task, "test")
        sides = {k: LlamaCppSide(f, task.context, 1, threads) for k, f in files.items()}
        sides |= {k: EngineSide(f, task.context, 1, threads) for k, f in (("16 bits", base), *carved.items())}
        ids = task.ids("validation")[: max(PAST, 128)].tolist()
        decode = works(ids, 1, ())[0]
        busy = os.getloadavg()[0]
        print(f"decoding in turn, at a load of {busy:.1f}", flush=True)
        seconds = alternate(sides, decode, ids, ROUNDS, TURN, [])
        sizes = {k: f.stat().st_size for k, f in files.items()}
        sizes |= {k: sum(f.stat().st_size for f in p.iterdir()) for k, p in (("16 bits", base), *carved.items())}
        for side in sides.values():
            side.close()
    rows = [
        {
            "side": k, "bytes": sizes[k], "loss": losses[k], "rise": math.expm1(losses[k] - losses["16 bits"]),
            "tokens_per_second": statistics.median(decode.value(s) for s in seconds[k]),
            "quartiles": quartiles([decode.value(s) for s in seconds[k]]),
            "methods": reports[k]["methods"] if k in reports else [],
        }
        for k in sides
    ]  # fmt: skip
    speed = {r["side"]: r["tokens_per_second"] for r in rows}
    duels = [
        {
            "peer": peer, "ours": ours, "ratio": speed[ours] / speed[peer], "bar": BARS[peer],
            "rise": (rise := math.expm1(losses[ours] - losses["16 bits"])), "allowed": allowed_rise,
            "met": speed[ours] / speed[peer] >= BARS[peer] and rise <= allowed_rise,
        }
        for peer, ours, allowed_rise in (
            ("Q8_0", "3 %", ALLOWED),
            ("Q4_0", HALF, math.expm1(losses["Q4_0"] - losses["16 bits"])),
        )
    ]  # fmt: skip
    out = {
        "model": args.model, "loss_16_bits": losses["16 bits"], "rows": rows, "duels": duels, "load_average": busy,
        "settings": {"threads": threads, "rounds": ROUNDS, "context": task.context}, "run": provenance(),
    }  # fmt: skip
    for r in rows:
        print(
            f"{r['side']:18} {r['bytes'] / 1e6:6.2f} MB  {r['rise']:+.2%} perplexity  {r['tokens_per_second']:7.0f} tokens/s"
        )
    for d in duels:
        print(
            f"{d['ours']} beside {d['peer']}: {d['ratio']:.2f}x (bar {d['bar']}), {d['rise']:+.2%} ({d['allowed']:.2%} allowed)"
        )
    if args.json:
        write_atomically(RESULT, lambda f: f.write((json.dumps(out, indent=1) + "\n").encode()))


if __name__ == "__main__":
    main()
