"""The shrinking of language models beside its peers: quality at equal bytes, and processor time, in one run.

    python benchmarks/compressors.py [--json] [--peer-python PYTHON …] [--model NAME …] [--only LIBRARY …]

torchao, optimum-quanto, torch-pruning and llmcompressor compress the same model on the same calibration text, each in a process
of its own and in the first PYTHON that imports it (default: this one); compressors_peer.py says with which settings. The first
three install beside netsuke: pip install -c constraints.txt 'netsuke[peers]'. llmcompressor needs an older transformers and an
environment of its own: pip install llmcompressor==0.14.0.1 torch==2.13.0. A library that no PYTHON imports, or that fails, is a
row that says so.

Bytes are those of the safetensors that each would store; a model is scored in float32 with the weights that these stand for, on
the same windows of held-out text, once. Losses of the unmodified model must agree to 1e-4 on both sides, its logits too.
Duels: at the bytes of each peer's folder (weights, config.json, tokenizer.json) `fit` carves the model, its folder counted whole,
freely and with the table kept in 16 bits as most peers keep it. One carving serves all peers whose folders are up to 5 % larger,
and one that loses nothing measurable serves every larger folder: netsuke then has fewer bytes. Sparse weights, which
llmcompressor stores dense, are counted as a bit for each place and the values left. excess = loss above the unmodified model's,
nats per token; better and worse: by more than two standard errors of the difference over the windows.

Seconds are of processor time, one thread, one run, on a machine that may be busy with other work: read them as magnitudes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressors_sizes import CARD, CONTEXT, TEXTS, WINDOWS, Sizes, Subject, weight_bytes, window_losses
from torch import Tensor

from netsuke.carve import CALIBRATION
from netsuke.compress.method import Method
from netsuke.compress.modegpt import MoDeGPT
from netsuke.compress.quantize import Quantize
from netsuke.errors import NetsukeError
from netsuke.measure.machine import provenance
from netsuke.models.files import write_atomically
from netsuke.models.llama import half_precision

RESULT = Path(__file__).parent / "results/compressors.json"
PEER = Path(__file__).parent / "compressors_peer.py"
LIBRARIES = {
    "torchao": "torchao.quantization", "optimum-quanto": "optimum.quanto", "torch-pruning": "torch_pruning",
    "llmcompressor": "llmcompressor",
}  # fmt: skip
SAME = 1e-4  # of losses and logits of the unmodified model on both sides
NEAR = 1.05  # folders up to this much larger share a carving
NOTHING = 1e-4  # nats per token: a carving that loses less serves every larger folder
LEAST = 1e-3  # nats per token of excess below which a ratio says nothing
CHANNELS = (0.1, 0.25)  # as torch-pruning cuts
IMPORTS = """
import importlib, io, json, sys
said, sys.stdout = sys.stdout, io.StringIO()
found = {}
for library, module in json.loads(sys.argv[1]).items():
    try:
        importlib.import_module(module)
        found[library] = None
    except Exception as e:
        found[library] = f"{type(e).__name__}: {e}".splitlines()[0][:200]
print(json.dumps(found), file=said)
"""
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def find_libraries(pythons: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Library -> the first of the interpreters that imports it; library -> why none does. SystemExit where there is no such
    interpreter."""
    found: dict[str, str] = {}
    missing: dict[str, str] = {}
    for python in pythons:
        try:
            command = [python, "-c", IMPORTS, json.dumps(LIBRARIES)]
            said = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUIET)
        except OSError as e:
            raise SystemExit(f"--peer-python {python}: {e.strerror}") from None
        if said.returncode:
            raise SystemExit(f"--peer-python {python}: it is no Python that runs")
        for library, error in json.loads(said.stdout).items():
            if error is None:
                found.setdefault(library, python)
            elif not missing.get(library) or "No module named" in missing[library]:
                missing[library] = error
    return found, {library: error for library, error in missing.items() if library not in found}


def ask_peer(library: str, python: str, job: dict[str, str], place: Path) -> list[dict[str, Any]]:
    """The lines of a peer's process: the unmodified model, then its settings. One that dies leaves a last line that says so."""
    path, out = place / "job.json", place / f"{library}.jsonl"
    path.write_text(json.dumps(job))
    command = [python, str(PEER), library, str(path), str(out)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=place, env=os.environ | QUIET)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if said.returncode:
        last = (said.stderr.strip().splitlines() or [f"status {said.returncode}"])[-1]
        rows.append({"setting": "its process", "left": "", "error": last[:300]})
    return rows


def check_same(subject: Subject, first: dict[str, Any], logits: Path) -> dict[str, float]:
    """How far the peer's unmodified model is from ours. SystemExit where it is another model."""
    with torch.no_grad():
        ours = subject.model(subject.test[:2, :-1])
    apart = {
        "loss": abs(float(subject.losses.mean()) - statistics.fmean(first["losses"])),
        "logits": float((ours - torch.from_numpy(np.load(logits))).abs().max()),
    }
    if not max(apart.values()) <= SAME:
        raise SystemExit(f"{subject.name}: the exported model is another one: {apart}")
    return apart


def peers(subject: Subject, place: Path, found: dict[str, str], missing: dict[str, str]) -> dict[str, Any]:
    """{"rows": one per setting, "apart", "versions"}; a row keeps its losses as a tensor until the duels are over."""
    job = subject.write_for_peers(place / f"{subject.name}-hf")
    beside = sum((Path(job["model"]) / f).stat().st_size for f in ("config.json", "tokenizer.json"))
    out: dict[str, Any] = {"rows": [], "apart": {}, "versions": {}}
    out["rows"] += [{"peer": k, "setting": "", "left": "", "error": error} for k, error in missing.items()]
    for library in found:
        lines = ask_peer(library, found[library], job, place)
        if lines and "versions" in lines[0]:
            first = lines.pop(0)
            out["apart"][library] = check_same(subject, first, Path(job["logits"]))
            out["versions"][library] = first["versions"]
        for line in lines:
            row = {"peer": library} | line
            if "error" not in row:
                file = Path(row.pop("file"))
                row |= weight_bytes(file)
                stored = row["file"] - row["maps"] + row.get("masked", row["maps"])
                row |= {"all": stored + beside, "losses": torch.tensor(row["losses"], dtype=torch.float64)}
                row |= judged(subject, row["losses"])
                file.unlink()
            out["rows"].append(row)
            print(line_of(row), flush=True)
    return out


def judged(subject: Subject, losses: Tensor) -> dict[str, float]:
    """Excess loss, and perplexity over the unmodified model's."""
    excess = subject.excess(losses)
    return {"excess": excess, "perplexity_ratio": float(np.exp(min(excess, 50)))}


def line_of(row: dict[str, Any]) -> str:
    name = f"{row['peer']:15} {row['setting'][:60]:60}"
    if "error" in row:
        return f"{name} {row['error']}"
    return f"{name} {row['file'] / 1e6:6.2f} MB  x{row['perplexity_ratio']:.4f}  {row['busy']:6.1f} s"


def singles(subject: Subject) -> list[tuple[str, str, Method]]:
    """netsuke's own methods beside the peers': (setting, what stays unquantized, method)."""
    rows: list[tuple[str, str, Method]] = []
    for solver, name in (("rtn", "rounding"), ("gptq", "GPTQ"), ("descent", "descent")):
        rows += [(f"{b} bits, {name}, table 8 bits", "", Quantize(b, solver=solver)) for b in (8, 4, 3, 2)]
    rows += [(f"{b} bits, descent", "table 16 bits", Quantize(b, embed_bits=16)) for b in (4, 2)]
    for channels in CHANNELS:
        share = subject.share_of(channels)
        cuts = {
            f"MoDeGPT, {channels:.0%} of the hidden channels": MoDeGPT(remove=share, modules=("mlp",)),
            f"MoDeGPT, as many weights ({share:.1%}) of all parts alike": MoDeGPT(remove=share, allocate="uniform"),
        }
        rows += [(setting, "all weights 16 bits", method) for setting, method in cuts.items()]
    return rows


def ours(subject: Subject, place: Path) -> list[dict[str, Any]]:
    out = []
    for setting, left, method in singles(subject):
        wall, busy = time.perf_counter(), time.process_time()
        with torch.no_grad():
            model = method.apply(subject.model, subject.task)
        row = {
            "peer": "netsuke", "setting": setting, "left": left, "seconds": time.perf_counter() - wall,
            "busy": time.process_time() - busy, "method": method.to_json(),
        }  # fmt: skip
        model = half_precision(model) if method.name == "modegpt" else model
        row |= subject.saved(model, place / "single") | judged(subject, window_losses(model, subject.test))
        out.append(row)
        print(line_of(row), flush=True)
    return out


def carvings(subject: Subject, rows: list[dict[str, Any]], place: Path, tables: tuple[int | None, ...]) -> list[dict]:
    """`fit` at the sizes of the peers' folders, as few carvings as the docstring of this file says."""
    sizes, out = Sizes(subject.name, subject.data, place / "fitted.netsuke", subject.test), []
    for table in tables:
        for limit in sorted(r["all"] for r in rows if "error" not in r and (table is None or table_kept(r))):
            if serving(out, limit, table) is None:
                row = sizes.at(limit, table)
                if "error" not in row:
                    row |= judged(subject, row["losses"])
                    print(f"fit {limit:9} table {table}: {row['all']:9} x{row['perplexity_ratio']:.4f}", flush=True)
                out.append(row)
    return out


def table_kept(row: dict[str, Any]) -> bool:
    return row["left"] == "table 16 bits"


def serving(carved: list[dict[str, Any]], limit: int, table: int | None) -> dict[str, Any] | None:
    """The largest carving that may stand for a folder of `limit` bytes."""
    fits = [c for c in carved if c["table"] == table and c["limit"] <= limit]
    fits = [c for c in fits if limit <= NEAR * c["limit"] or c.get("excess", 1.0) <= NOTHING]
    return max(fits, key=lambda c: c["limit"], default=None)


def duel(peer: dict[str, Any], carved: dict[str, Any]) -> dict[str, Any]:
    """A peer's setting against a carving of no more bytes."""
    row = {"peer": peer["peer"], "setting": peer["setting"], "table": carved["table"], "limit": carved["limit"]}
    if "error" in carved:
        return row | {"error": carved["error"]}
    apart = carved["losses"] - peer["losses"]
    mean, error = float(apart.mean()), float(apart.std() / len(apart) ** 0.5)
    verdict = "even" if abs(mean) <= 2 * error else "better" if mean < 0 else "worse"
    ratio = carved["excess"] / peer["excess"] if peer["excess"] >= LEAST else None
    sizes = {f"{k}_{who}": r[k] for k in ("all", "maps", "excess") for who, r in (("netsuke", carved), ("peer", peer))}
    return row | sizes | {"difference": mean, "standard_error": error, "ratio": ratio, "verdict": verdict}


def compare(name: str, place: Path, found: dict[str, str], missing: dict[str, str]) -> dict[str, Any]:
    """All rows of one model. The table is fixed as well on the first model only: the second is there to say whether the picture
    holds."""
    subject = Subject(name, place)
    print(f"{name}: {float(subject.losses.mean()):.5f} nats per token", flush=True)
    got = peers(subject, place, found, missing)
    single = ours(subject, place)
    carved = carvings(subject, got["rows"], place, (None, 16) if name == next(iter(TEXTS)) else (None,))
    duels = []
    for table in dict.fromkeys(c["table"] for c in carved):
        for row in got["rows"]:
            if "error" not in row and (table is None or table_kept(row)):
                duels.append(duel(row, serving(carved, row["all"], table)))
    return {
        "model": name, "loss": float(subject.losses.mean()), "tokens": subject.test[:, 1:].numel(),
        "all": subject.saved(subject.half, place / "whole")["all"], "apart": got["apart"], "versions": got["versions"],
        "peers": [{k: v for k, v in r.items() if k != "losses"} for r in got["rows"]], "netsuke": single,
        "fits": [{k: v for k, v in c.items() if k != "losses"} for c in carved], "duels": duels,
    }  # fmt: skip


def summary(models: list[dict[str, Any]]) -> dict[str, Any]:
    """How many duels netsuke has better, even and worse, and the median ratio of excess losses: freely, and the table fixed."""
    out = {}
    for name, table in (("free", None), ("table 16 bits", 16)):
        duels = [d for m in models for d in m["duels"] if d["table"] == table and "error" not in d]
        ratios = [d["ratio"] for d in duels if d["ratio"] is not None]
        counts = Counter(d["verdict"] for d in duels)
        out[name] = {v: counts[v] for v in ("better", "even", "worse")}
        out[name] |= {"ratios": len(ratios), "median_ratio": statistics.median(ratios) if ratios else None}
    return out


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    ask.add_argument("--peer-python", action="append", metavar="PYTHON", help="a Python with some of the libraries")
    ask.add_argument("--model", action="append", choices=TEXTS)
    ask.add_argument("--only", action="append", choices=LIBRARIES, metavar="LIBRARY", help="this library")
    args = ask.parse_args()
    if args.json and (args.only or args.model):
        ask.error(f"--json writes all rows of {RESULT.name}: leave out --only and --model")
    asked = args.only or list(LIBRARIES)
    sides = find_libraries(args.peer_python or [sys.executable])
    found, missing = ({k: v for k, v in side.items() if k in asked} for side in sides)
    for library, error in missing.items():
        print(f"{library} is left out: {error}")
    torch.set_num_threads(1)
    begin, load, models = time.monotonic(), os.getloadavg()[0], []
    for name in args.model or TEXTS:
        with tempfile.TemporaryDirectory() as place:
            try:
                models.append(compare(name, Path(place), found, missing))
            except NetsukeError as e:
                raise SystemExit(str(e)) from None
        out = {
            "device": CARD, "context": CONTEXT, "windows": WINDOWS | {"calibration": CALIBRATION}, "near": NEAR, "least": LEAST,
            "models": models, "summary": summary(models), "seconds": time.monotonic() - begin, "load": [load, os.getloadavg()[0]],
            "time": "processor seconds of one thread, one run; the machine was busy with other work where load is above 1",
            "run": provenance(),
        }  # fmt: skip
        print(json.dumps(out["summary"], indent=1), flush=True)
        if args.json:  # after each model: a run that is stopped leaves whole ones
            write_atomically(RESULT, lambda f, out=out: f.write((json.dumps(out, indent=1) + "\n").encode()))


if __name__ == "__main__":
    main()
