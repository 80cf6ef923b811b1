"""Peak memory of training steps, each measured in a process of its own (measure/peak.py).

A prepared model is written to a folder: as the artifact it will become, and its float masters beside it. The child loads what
its job needs, clears the kernel's mark, and does one thing:

    inference   the loss of the finished, packed model on one micro-batch, no gradients
    evaluation  the same of the model in training
    step        one zeroth-order step: two perturbed losses and the update
    gradient    one step of quantization-aware training by back-propagation: straight-through rounding, AdamW
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from netsuke.measure.peak import Watch, peak_of, resident
from netsuke.models.llama import Llama, LlamaConfig, random_llama
from netsuke.models.load import load
from netsuke.models.save import save_artifact
from netsuke.models.weights import write_safetensors
from netsuke.systems.modegpt_cases import Rows
from netsuke.tasks.language import token_losses
from netsuke.train.masters import MasterLinear
from netsuke.train.zeroqat import ZeroQAT, finish, masters_of, perturbed, prepare
from netsuke.train.zeroth_order import Perturbation, descend, in_micro_batches, slopes

# The shape of `wide` (recipes/tinylm): memory depends on shapes alone, so random weights do.
SHAPE = LlamaConfig.uniform(6, 1024, vocab=2048, width=256, heads=8, kv_heads=8, head_dim=32, context=512)
SMALL = LlamaConfig.uniform(2, 256, vocab=512, width=128, heads=4, kv_heads=4, head_dim=32, context=512)


def write_prepared(model: Llama, folder: Path) -> None:
    """Writes the masters of a prepared model and, using it up, the artifact that it would be finished as."""
    masters = masters_of(model)
    tensors = {f"{n}.{part}": getattr(m, part).detach() for n, m in masters.items() for part in ("weight", "clip")}
    write_safetensors(folder / "masters.safetensors", tensors)
    save_artifact(folder / "model", finish(model, {n: m.pack() for n, m in masters.items()}), None, {}, {})


def read_prepared(folder: Path, trained: bool) -> Llama:
    """The finished model, or with `trained` the one in training. Raises NetsukeError as `load`."""
    model = load(folder / "model.netsuke").model
    if trained:
        found = load_file(folder / "masters.safetensors")
        for name, layer in list(model.linears().items()):
            if f"{name}.weight" in found:
                clip = found[f"{name}.clip"]
                weight = found[f"{name}.weight"]
                model.replace(name, MasterLinear(name, weight, layer.bias, clip, layer.bits, layer.group))
    return model


def job(folder: str, what: str, batch: int, micro: int, tokens: int) -> dict[str, int]:
    """Runs in the child: bytes of the loaded model above an idle process, of the peak above the loaded model, and stored."""
    idle = resident()["now"]
    model = read_prepared(Path(folder), what != "inference")
    ids = torch.randint(model.cfg.vocab, (batch, tokens + 1), generator=torch.Generator().manual_seed(0))
    stored = model.bytes()
    # out of the mapped file: pages that are used count as loaded
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    watch = Watch()
    loaded = watch.idle - idle
    if what == "gradient":
        gradient_step(model, ids, micro)
    elif what == "step":
        forward_step(model, ids, micro)
    else:
        with torch.no_grad():
            in_micro_batches(lambda part: token_losses(model, part).mean(), ids, micro)
    return {"loaded": loaded, "above_loaded": watch.close() - watch.idle, "stored": stored}


@torch.no_grad()
def forward_step(model: Llama, ids: torch.Tensor, micro: int) -> None:
    masters, knobs = masters_of(model), ZeroQAT().zeroth_order(10**6)

    def loss(p: Perturbation) -> float:
        with perturbed(masters, p):
            return in_micro_batches(lambda part: token_losses(model, part).mean(), ids, micro)

    found, _ = slopes(loss, 0, knobs)
    descend({f"{n}.weight": m.weight for n, m in masters.items()}, found, 0, knobs.rate, knobs)


def gradient_step(model: Llama, ids: torch.Tensor, micro: int) -> None:
    """AdamW on the same masters; micro-batches add up their gradients."""
    parameters = [
        p for m in masters_of(model).values() for p in (m.weight.requires_grad_(True), m.clip.requires_grad_(True))
    ]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for part in ids.split(micro):
        (token_losses(model, part).mean() * (len(part) / len(ids))).backward()
    optimizer.step()


@cache
def prepared_folder(trainable: str, quick: bool) -> tempfile.TemporaryDirectory:
    """A prepared random model of 4 bits, light or not."""
    folder = tempfile.TemporaryDirectory()
    knobs = ZeroQAT(w=4, group=32, trainable=trainable, warm=0)
    write_prepared(prepare(random_llama(SMALL if quick else SHAPE, 0), Rows({}), knobs), Path(folder.name))
    return folder


@cache
def measured(trainable: str, what: str, batch: int, micro: int, tokens: int, quick: bool) -> dict[str, Any]:
    """{"peak" (bytes above an idle process, weights included), "loaded", "above_loaded", "stored"} of the median of three."""
    folder = prepared_folder(trainable, quick).name
    runs = []
    for _ in range(1 if quick else 3):
        got = peak_of("netsuke.systems.zeroqat_memory:job", folder, what, batch, micro, tokens, threads=1)
        runs.append({"peak": got.above, **got.result})
    return sorted(runs, key=lambda r: r["peak"])[len(runs) // 2]
