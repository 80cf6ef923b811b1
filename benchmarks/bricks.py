"""Plugins and balanced groups beside their peers: the same factors, the same weights, the same rows.

    python benchmarks/bricks.py [--json] [--peer-python PATH] [--model NAME]

PEFT merges the two plugins that the claims of configurable-fm train; mergekit merges the two whole models; the tensors and the
loss are compared. Memory is what a fresh process takes for the base and 20 plugins of rank 4 beside all of its maps.
k-means-constrained makes 64 equal groups of one block's gate rows; what counts is the distance to the groups' means. A peer that
is absent is skipped with a sentence: pip install -c constraints.txt peft==0.21.0 mergekit==0.1.5 k-means-constrained==0.9.1
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from netsuke.compress.adapters import Plugin, attach, merge
from netsuke.compress.bricks import fingerprint
from netsuke.compress.neuron_groups import Groups, balanced_kmeans
from netsuke.measure.machine import provenance
from netsuke.measure.peak import resident
from netsuke.models.llama import Llama
from netsuke.models.load import load
from netsuke.models.weights import WeightFile, write_safetensors
from netsuke.systems import configurable_fm_cases as cases

RESULT = Path(__file__).parent / "results/bricks.json"
PEER = Path(__file__).parent / "bricks_peer.py"
WEIGHTS, PLUGINS, SKILLS = (0.7, 0.3), 20, ("coding", "writing")
OURS = {"linear": "factors", "cat": "products", "svd": "products"}


def peer(python: str, *job: str) -> dict[str, Any] | str:
    """What the peers' process says, or why it says nothing."""
    got = subprocess.run([python, str(PEER), *job], capture_output=True, text=True)
    if got.returncode:
        return f"skipped: {(got.stderr.strip().splitlines() or ['no answer'])[-1][:200]}"
    return json.loads(got.stdout.splitlines()[-1])


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest entry of b."""
    return float((a - b).abs().max() / b.abs().max())


def product(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[1].double() @ pair[0].double()


def merging(name: str, python: str, folder: Path) -> dict[str, Any]:
    """Ours against PEFT's and mergekit's: tensors, loss on held-out text of both skills, seconds."""
    model = cases.model_of(name)
    two = [cases.plugin(name, skill, False) for skill in SKILLS]
    job, out = write_job(model, two, folder), folder / "merged.safetensors"
    said = peer(python, "merge", str(job), str(out))
    if isinstance(said, str):
        return {"peers": said}
    file, ids = WeightFile(out), torch.cat([cases.held_out(name, s, False)[:50] for s in SKILLS])
    rows: dict[str, Any] = {}
    for theirs, how in OURS.items():
        begin = time.perf_counter()
        mine = merge(two, WEIGHTS, how, how, cases.RANK if theirs == "svd" else None)
        seconds = time.perf_counter() - begin
        thin = {n: (file.get(f"{theirs}.{n}.first"), file.get(f"{theirs}.{n}.second")) for n in mine.thin}
        other = Plugin(theirs, mine.base, thin)
        rows[theirs] = {
            "tensors": max(distance(product(mine.thin[n]), product(thin[n])) for n in thin),
            "loss": cases.loss(attach(model, mine), ids), "loss of the peer": cases.loss(attach(model, other), ids),
            "ms": 1e3 * seconds, "ms of the peer": 1e3 * said["seconds"][theirs],
        }  # fmt: skip
    mine = merge(two, WEIGHTS, "whole")
    maps = model.linears()
    whole = [distance(maps[n].to_dense() + product(p), file.get(f"mergekit.{n}")) for n, p in mine.thin.items()]
    rows["mergekit, whole models"] = {"tensors": max(whole), "ms of the peer": 1e3 * said["seconds"]["mergekit"]}
    return {"peers": {n: said[n] for n in ("peft", "mergekit")}, "base": cases.loss(model, ids), "rows": rows}


def write_job(model: Llama, plugins: list[Plugin], folder: Path) -> Path:
    maps, path = model.linears(), folder / "job.safetensors"
    tensors = {f"base.{n}": maps[n].to_dense() for n in plugins[0].thin}
    for i, p in enumerate(plugins):
        for n, (first, second) in p.thin.items():
            tensors |= {f"{i}.{n}.first": first, f"{i}.{n}.second": second}
    write_safetensors(path, tensors, {"weights": json.dumps(WEIGHTS)})
    return path


def own_memory(job: Path, name: str, count: int) -> dict[str, Any]:
    """Resident bytes that the base and `count` plugins take: to be run in a process of its own."""
    before = resident()["now"]
    model, file = load(name, dtype="float32").model, WeightFile(job)
    base, racked = fingerprint(model), []
    for i in range(count):
        names = [n.removeprefix("base.") for n in file.names() if n.startswith("base.")]
        thin = {n: (file.get(f"{i % 2}.{n}.first"), file.get(f"{i % 2}.{n}.second")) for n in names}
        racked.append(attach(model, Plugin(f"a{i}", base, thin), base))
    tensors = {t.data_ptr(): t.nbytes for m in racked for t in m.state_dict().values()}
    return {"bytes": resident()["now"] - before, "tensors": sum(tensors.values())}


def memory(name: str, python: str, job: Path, plugin: int) -> dict[str, Any]:
    """Resident bytes with one plugin and with PLUGINS, and what one more takes; `plugin` are the bytes of its tensors."""
    out: dict[str, Any] = {"plugins": PLUGINS, "tensors of one": plugin}
    run = [sys.executable, __file__, "--model", name, "--memory", str(job)]
    for count in (1, PLUGINS):
        own = subprocess.run([*run, "--count", str(count)], capture_output=True, text=True, check=True)
        out[f"ours, {count}"] = json.loads(own.stdout)["bytes"]
        said = peer(python, "memory", str(job), str(count))
        out[f"peft, {count}"] = said if isinstance(said, str) else said["bytes"]
    for who in ("ours", "peft"):
        few, many = out[f"{who}, 1"], out[f"{who}, {PLUGINS}"]
        if not isinstance(few, str) and not isinstance(many, str):
            out[f"{who}, one more"] = round((many - few) / (PLUGINS - 1))
    return out


def spread(rows: Tensor, groups: Groups) -> float:
    """Σ squared distances of rows to the mean of their group."""
    return float(sum((rows[m] - rows[m].mean(0)).square().sum() for m in groups.members))


def grouping(name: str, python: str, folder: Path) -> dict[str, Any]:
    model = cases.model_of(name)
    rows = F.normalize(model.blocks[len(model.blocks) // 2].gate.to_dense().double(), dim=-1)
    count = cases.GROUPS.get(name, 64)
    begin = time.perf_counter()
    ours = balanced_kmeans(rows, count)
    seconds = time.perf_counter() - begin
    job, out = folder / "rows.safetensors", folder / "owner.safetensors"
    write_safetensors(job, {"rows": rows}, {"groups": str(count)})
    got = {"neurons": len(rows), "groups": count, "ours": {"distance": spread(rows, ours), "seconds": seconds}}
    said = peer(python, "kmeans", str(job), str(out))
    if not isinstance(said, str):
        theirs = Groups(WeightFile(out).get("owner").argsort(stable=True).view(count, -1))
        said = said | {"distance": spread(rows, theirs)}
    return got | {"k-means-constrained": said}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    ask.add_argument("--peer-python", default=sys.executable, help="a Python with peft, mergekit, k-means-constrained")
    ask.add_argument("--model", default=cases.WIDE)
    ask.add_argument("--memory", help=argparse.SUPPRESS)
    ask.add_argument("--count", type=int, default=1, help=argparse.SUPPRESS)
    args = ask.parse_args()
    if args.memory:
        print(json.dumps(own_memory(Path(args.memory), args.model, args.count)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        got = {"model": args.model, "merging": merging(args.model, args.peer_python, folder)}
        size = cases.plugin(args.model, SKILLS[0], False).bytes()
        got["memory"] = memory(args.model, args.peer_python, folder / "job.safetensors", size)
        got["groups"] = grouping(args.model, args.peer_python, folder)
    print(json.dumps(got, indent=1))
    if args.json:
        RESULT.write_text(json.dumps(got | {"run": provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
