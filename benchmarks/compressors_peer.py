"""The peers' side of benchmarks/compressors.py: one library per process, on a Hugging Face folder and files of token windows.

    python compressors_peer.py LIBRARY JOB.json OUT.jsonl

JOB holds "model" (the folder), "calibration" and "test" (.npy, windows of ids), "logits" (.npy to write: the unmodified model's
on the first two test windows) and "files" (a folder for what the library would store). The first line of OUT is the unmodified
model; then a line per setting: the mean loss of each test window in nats, seconds by the clock and of processor time, the
safetensors file, and what stays unquantized; or the error. Needs torch, transformers and the library; torch in one thread.

Weights are read in 16 bits where the library is quick in them (torchao, quanto: its scales are then stored in 16 bits), else in
float32 and everything that is left in floats is rounded to 16 bits before it is stored and scored (llmcompressor, whose float16
on a CPU takes seven times as long, and torch-pruning, whose gradients need it). Scored is a float32 model with the weights that
the stored ones stand for, so that no library pays for its kernels. The table is tied to the head and no library keeps it tied
when it quantizes the head, so lm_head is left out, as the libraries' own guides do.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

HEAD = "lm_head"
Made = tuple[
    nn.Module, dict[str, Tensor] | Path
]  # what is scored; what is stored: tensors, or a file of the library's own
Setting = tuple[str, str, Callable[[], Made]]  # its name, what stays unquantized


class Job:
    """The model, its windows, and the clock that runs while a library compresses."""

    def __init__(self, path: str):
        self.paths: dict[str, str] = json.loads(Path(path).read_text())
        self.calibration, self.test = (torch.tensor(np.load(self.paths[k])) for k in ("calibration", "test"))
        self.seconds = self.busy = 0.0

    def model(self, dtype: torch.dtype) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(self.paths["model"], dtype=dtype)
        model.config.use_cache = False
        return model.eval()

    @contextlib.contextmanager
    def clock(self) -> Iterator[None]:
        wall, busy = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - wall
        self.busy += time.process_time() - busy

    @torch.no_grad()
    def losses(self, model: nn.Module) -> list[float]:
        """Mean loss of each window, nats per token, from float32 logits."""
        out = []
        for rows in self.test.split(8):
            logits = model(rows[:, :-1]).logits.float()
            out.append(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"))
        return torch.cat(out).view(len(self.test), -1).double().mean(1).tolist()

    @torch.no_grad()
    def scored_like(self, model: nn.Module) -> nn.Module:
        """The float32 model with the weights that the quantized ones of `model` stand for."""
        plain = self.model(torch.float32)
        for name, layer in model.named_modules():
            if isinstance(layer, (nn.Linear, nn.Embedding)) and name != HEAD:
                plain.get_submodule(name).weight.copy_(meant(layer))
        return plain


def meant(layer: nn.Module) -> Tensor:
    """The weights that a layer computes with; a packed form without an inverse is applied to the unit matrix."""
    weight = layer.weight
    if isinstance(layer, nn.Linear) and "Opaque" in type(weight).__name__:
        return layer(torch.eye(layer.in_features, dtype=weight.dtype)).T
    return weight.dequantize() if type(weight) is not nn.Parameter else weight


def untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if not name.startswith(HEAD)}


def torchao(job: Job) -> Iterator[Setting]:
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    def parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, t in state.items():
            kept = (*getattr(t, "tensor_data_names", ()), *getattr(t, "optional_tensor_data_names", ()))
            held = {f"{name}.{part}": getattr(t, part) for part in kept} if kept else {name: t}
            out |= {n: v.contiguous() for n, v in held.items() if v is not None}
        return out

    def quantized(*steps: tuple[type[nn.Module], Any]) -> Made:
        model = job.model(torch.float16)
        with job.clock():
            for kind, config in steps:
                quantize_(model, config, filter_fn=lambda m, name, kind=kind: isinstance(m, kind) and name != HEAD)
        return job.scored_like(model), parts(untied(model.state_dict()))

    def int4(group: int, how: str = "tinygemm") -> tuple[type[nn.Module], Any]:
        return nn.Linear, PrototypeInt4WeightOnlyConfig(group, how, set_inductor_config=False)

    whole = nn.Linear, Int8WeightOnlyConfig(set_inductor_config=False)
    table = nn.Embedding, IntxWeightOnlyConfig(torch.int8, PerGroup(64))
    yield "int8 weight-only, rows", "table 16 bits", lambda: quantized(whole)
    for group in (128, 64, 32):  # the CPU's layout: the default one needs a library for GPUs
        yield (
            f"int4 weight-only, groups of {group}, opaque CPU layout",
            "table 16 bits",
            lambda g=group: quantized(int4(g)),
        )
    yield "int4, groups of 32, HQQ", "table 16 bits", lambda: quantized(int4(32, "hqq"))
    yield "int4, groups of 32, table int8 in groups of 64", "", lambda: quantized(int4(32), table)


def quanto(job: Job) -> Iterator[Setting]:
    from optimum.quanto import HqqOptimizer, freeze, qint2, qint4, qint8, quantize

    def quantized(bits: Any, optimizer: Any) -> Made:
        model = job.model(torch.float16)
        with job.clock():
            quantize(model, weights=bits, optimizer=optimizer, exclude=HEAD)
            freeze(model)
        return job.scored_like(model), untied(model.state_dict())

    for bits in (qint8, qint4, qint2):
        yield f"{bits.name} weights", "table 16 bits", lambda b=bits: quantized(b, None)
    for bits in (qint4, qint2):
        yield f"{bits.name} weights, HQQ", "table 16 bits", lambda b=bits: quantized(b, HqqOptimizer())


def torch_pruning(job: Job) -> Iterator[Setting]:
    import torch_pruning as tp

    gradients: dict[str, Tensor] = {}
    spent = [0.0, 0.0]  # on them: each setting that uses them is charged for them

    def learned(model: nn.Module) -> None:
        """Gradients of the calibration text's mean loss, which are the same for every setting."""
        before = job.seconds, job.busy
        if not gradients:
            with job.clock():
                for rows in job.calibration.split(8):
                    logits = model(rows[:, :-1]).logits
                    share = len(rows) / len(job.calibration)
                    (F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()) * share).backward()
            spent[:] = job.seconds - before[0], job.busy - before[1]
            gradients.update({n: p.grad for n, p in model.named_parameters()})
        else:
            job.seconds, job.busy = before[0] + spent[0], before[1] + spent[1]
        for name, p in model.named_parameters():
            p.grad = gradients[name].clone()

    def pruned(kind: str, share: float, heads: bool) -> Made:
        model = job.model(torch.float32)
        if kind == "taylor":
            learned(model)
        score = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}[
            kind
        ]()
        kept, attention = [model.lm_head, model.model.embed_tokens], {}
        for layer in model.model.layers:
            a, cfg = layer.self_attn, model.config
            kept += [a.o_proj, layer.mlp.down_proj] + ([] if heads else [a.q_proj, a.k_proj, a.v_proj])
            if heads:
                attention |= {a.q_proj: cfg.num_attention_heads}
                attention |= {a.k_proj: cfg.num_key_value_heads, a.v_proj: cfg.num_key_value_heads}
        with job.clock():
            pruner = tp.pruner.BasePruner(
                model, example_inputs=job.calibration[:1, :16], importance=score, global_pruning=not heads, pruning_ratio=share,
                ignored_layers=kept, num_heads=attention, prune_num_heads=heads, prune_head_dims=False,
                head_pruning_ratio=share if heads else 0.0,
            )  # fmt: skip
            for group in pruner.step(interactive=True):
                group.prune()
        for layer in model.model.layers:
            a = layer.self_attn
            a.num_key_value_groups = a.q_proj.out_features // a.k_proj.out_features
        stored = {n: t.detach().half().contiguous() for n, t in untied(model.state_dict()).items()}
        model.load_state_dict({n: t.float() for n, t in stored.items()}, strict=False)
        return model, stored

    for kind in ("magnitude", "taylor"):
        for share in (0.1, 0.25):
            name = f"{share:.0%} of the hidden channels, {kind}, ranked over all blocks"
            yield name, "all weights 16 bits", lambda k=kind, s=share: pruned(k, s, False)
    name = "25% of the hidden channels and heads of each block, taylor"
    yield name, "all weights 16 bits", lambda: pruned("taylor", 0.25, True)


def llmcompressor(job: Job) -> Iterator[Setting]:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from loguru import logger

    logger.remove()
    ids = job.calibration[:, :-1]
    text = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    kept = [f"re:.*{HEAD}"]  # by its name alone the pruners would not know it, and prune the table
    to = {"targets": ["Linear"], "ignore": kept}

    def done(recipe: Any) -> Made:
        model = job.model(torch.float32)
        with job.clock():
            oneshot(
                model=model, dataset=text, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids),
                shuffle_calibration_samples=False,
            )  # fmt: skip
        scored = copy.deepcopy(model.half()).float()
        folder = Path(job.paths["files"]) / "llmcompressor"
        model.save_pretrained(folder, save_compressed=True)
        return scored, folder / "model.safetensors"

    def groups(bits: int, group: int) -> Any:
        """Uneven around zero, ranges by least squares: the best of its choices on few bits."""
        weights = {
            "num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group, "observer": "mse",
        }  # fmt: skip
        return GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=kept)

    recipes: dict[str, Callable[[], Any]] = {
        "GPTQ W4A16, groups of 128": lambda: GPTQModifier(scheme="W4A16", **to),
        "GPTQ W4A16 asymmetric, groups of 64, mse": lambda: groups(4, 64),
        "GPTQ W2A16 asymmetric, groups of 64, mse": lambda: groups(2, 64),
        "GPTQ W8A16, groups of 128": lambda: GPTQModifier(scheme="W8A16", **to),
        "SmoothQuant 0.8 + GPTQ W8A8": lambda: [
            SmoothQuantModifier(smoothing_strength=0.8),
            GPTQModifier(scheme="W8A8", **to),
        ],
        "SparseGPT, 50% zeros": lambda: SparseGPTModifier(sparsity=0.5, **to),
        "Wanda, 50% zeros": lambda: WandaPruningModifier(sparsity=0.5, **to),
    }
    for name, recipe in recipes.items():
        left = "all weights 16 bits, half of them zero" if "zeros" in name else "table 16 bits"
        yield name, left, lambda r=recipe: done(r())


LIBRARIES: dict[str, Callable[[Job], Iterator[Setting]]] = {
    "torchao": torchao, "optimum-quanto": quanto, "torch-pruning": torch_pruning, "llmcompressor": llmcompressor,
}  # fmt: skip


def main() -> None:
    library, path, out = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    job, lines = Job(path), Path(out)
    plain = job.model(torch.float32)
    with torch.no_grad():
        np.save(job.paths["logits"], plain(job.test[:2, :-1]).logits.numpy())
    names = ("torch", "transformers", library)
    first = {"losses": job.losses(plain), "versions": {n: version(n) for n in names}}
    with lines.open("w") as f:
        print(json.dumps(first), file=f, flush=True)
        for number, (name, left, make) in enumerate(LIBRARIES[library](job)):
            row: dict[str, Any] = {"setting": name, "left": left}
            job.seconds = job.busy = 0.0
            try:
                model, stored = make()
                file = Path(job.paths["files"]) / f"{library}-{number}.safetensors"
                if isinstance(stored, Path):
                    stored.rename(file)
                else:
                    save_file(stored, file)
                row |= {"seconds": job.seconds, "busy": job.busy, "file": str(file), "losses": job.losses(model)}
            except Exception as e:  # a setting that a library cannot do is a row that says so
                row["error"] = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:200]}"
            print(json.dumps(row), file=f, flush=True)


if __name__ == "__main__":
    main()
