"""The peers' side of benchmarks/bricks.py: one job per process. Needs torch, safetensors and what the job names.

    python bricks_peer.py merge JOB.safetensors OUT.safetensors    peft: both plugins loaded, merged by "linear", "cat" and "svd";
                                                                   mergekit: the two whole models merged by "linear"
    python bricks_peer.py memory JOB.safetensors COUNT             peft: resident bytes that the base and COUNT adapters take
    python bricks_peer.py kmeans JOB.safetensors OUT.safetensors   k-means-constrained: balanced groups of rows

JOB holds base.MAP (O, I), A.MAP.first (r, I) and A.MAP.second (O, r) for the plugins A = 0, 1, and the weights in its metadata;
for kmeans rows (F, C) and the number of groups. A line of JSON says versions and seconds.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def read(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as f:
        names = f.keys()
        return {n: f.get_tensor(n) for n in names}, f.metadata() or {}


def maps_of(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [n.removeprefix("base.") for n in tensors if n.startswith("base.")]


def adapted(tensors: dict[str, torch.Tensor], copies: dict[str, str]):
    """A module of linear maps with PEFT adapters: name of an adapter -> the plugin that fills it."""
    from peft import LoraConfig, get_peft_model

    names = maps_of(tensors)
    model = torch.nn.Module()
    for n in names:
        weight = tensors[f"base.{n}"]
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        model.add_module(n.replace(".", "_"), layer)
    rank = len(tensors[f"0.{names[0]}.first"])
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[n.replace(".", "_") for n in names])
    first, *rest = copies
    wrapped = get_peft_model(model, config, first)
    for name in rest:
        wrapped.add_adapter(name, config)
    for name, plugin in copies.items():
        for n in names:
            layer = getattr(wrapped.base_model.model, n.replace(".", "_"))
            layer.lora_A[name].weight.data = tensors[f"{plugin}.{n}.first"].clone()
            layer.lora_B[name].weight.data = tensors[f"{plugin}.{n}.second"].clone()
    return wrapped


def merge(job: str, out: str) -> dict:
    import mergekit.merge_methods.linear as linear
    from mergekit.merge_methods.base import TensorBatch

    tensors, meta = read(job)
    weights, names = json.loads(meta["weights"]), maps_of(tensors)
    model, made, seconds = adapted(tensors, {"zero": "0", "one": "1"}), {}, {}
    for how in ("linear", "cat", "svd"):
        begin = time.perf_counter()
        model.add_weighted_adapter(["zero", "one"], weights, how, combination_type=how)
        seconds[how] = time.perf_counter() - begin
        for n in names:
            layer = getattr(model.base_model.model, n.replace(".", "_"))
            made[f"{how}.{n}.first"] = layer.lora_A[how].weight.data.contiguous()
            made[f"{how}.{n}.second"] = layer.lora_B[how].weight.data.contiguous()
    begin = time.perf_counter()
    for n in names:
        whole = [tensors[f"base.{n}"] + tensors[f"{i}.{n}.second"] @ tensors[f"{i}.{n}.first"] for i in (0, 1)]
        merged = linear.linear_merge.implementation(
            TensorBatch([w[None] for w in whole]), torch.tensor([weights]), normalize=False
        )
        made[f"mergekit.{n}"] = merged[0].contiguous()
    seconds["mergekit"] = time.perf_counter() - begin
    save_file(made, out)
    return {"seconds": seconds, "peft": version("peft"), "mergekit": version("mergekit")}


def memory(job: str, count: str) -> dict:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    import peft

    before = resident()
    tensors, _ = read(job)
    model = adapted(tensors, {f"a{i}": str(i % 2) for i in range(int(count))})
    return {
        "bytes": resident() - before,
        "peft": peft.__version__,
        "maps": len(list(model.base_model.model.children())),
    }


def kmeans(job: str, out: str) -> dict:
    from k_means_constrained import KMeansConstrained

    tensors, meta = read(job)
    rows, count = tensors["rows"].double().numpy(), int(meta["groups"])
    size = len(rows) // count
    begin = time.perf_counter()
    got = KMeansConstrained(count, size_min=size, size_max=size, n_init=1, random_state=0).fit(rows)
    seconds = time.perf_counter() - begin
    save_file({"owner": torch.tensor(got.labels_, dtype=torch.int64)}, out)
    return {"seconds": seconds, "k-means-constrained": version("k-means-constrained")}


if __name__ == "__main__":
    print(json.dumps({"merge": merge, "memory": memory, "kmeans": kmeans}[sys.argv[1]](*sys.argv[2:])))
