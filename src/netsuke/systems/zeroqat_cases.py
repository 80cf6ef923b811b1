"""What ZeroQAT's claims are measured on: two models with their texts, warm starts built once, runs and their rivals.

stories260K is trained on stories that it samples itself (the float model is optimal on them), its best is chosen on others of
its own, and real stories are scored once. `wide` has windows of five domains, and Portuguese, a language that it never saw,
for adapting to. Everything is cached per process.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from netsuke.compress.quantize import Quantize
from netsuke.data.domains import translations
from netsuke.layers.quantized import QuantLinear
from netsuke.models.llama import Llama
from netsuke.models.load import load
from netsuke.systems.modegpt_cases import STORIES, Rows, written_by
from netsuke.systems.modegpt_cases import case_of as stories_case
from netsuke.systems.r_sparse_cases import CONTEXT, WIDE, mixture
from netsuke.train.masters import clip_logits, quantized
from netsuke.train.zeroqat import (
    Run,
    ZeroQAT,
    batch_at,
    finish,
    fit,
    held_out,
    masters_of,
    prepare,
    token_grids,
    train_rows,
)
from netsuke.train.zeroth_order import slopes

MINUTES = {STORIES: 2.0, WIDE: 2.0}
BASE = ZeroQAT(steps=100_000, batch=16, micro=16, tokens=64, every=100, eps=3e-3)
SCHEMES = {
    "W3 g32": {"w": 3, "group": 32},
    "W2 g32": {"w": 2, "group": 32},
    "W4A4": {"w": 4, "a": 4, "group": 0},
    "W4 g32": {"w": 4, "group": 32},
}
WEIGHTS = {STORIES: "W3 g32", WIDE: "W2 g32"}  # 3 bits cost `wide` 6 %: no training could make 10 % up
UNCLIPPED = 30.0  # a logit whose sigmoid is 1: rounding over the whole range, the floor


@dataclass(frozen=True)
class Subject:
    """A trained model and rows of text in three disjoint splits."""

    model: Llama
    task: Rows


@cache
def subject_of(name: str, quick: bool, text: str = "own") -> Subject:
    """`text`: own, or new (Portuguese). Raises NetsukeError for what is absent."""
    if name == STORIES:
        case = stories_case(name, quick)
        own = written_by(case.model, 64 if quick else 512, 192, seed=1).clone()
        return Subject(case.model, Rows({**case.task.rows, "train": own.split(16)}))
    loaded = load(name, dtype="float32")
    windows = {"train": 8, "validation": 1, "test": 2} if quick else {"train": 60, "validation": 4, "test": 8}
    if text == "own":
        rows = {split: mixture(loaded.tokenizer, split, count) for split, count in windows.items()}
    else:
        rows = {split: portuguese(loaded.tokenizer, split, 2 * count) for split, count in windows.items()}
    return Subject(loaded.model, Rows(rows))


def portuguese(tokenizer, split: str, windows: int) -> list[Tensor]:
    """Windows of translated messages in a language that the models have not seen."""
    ids: list[int] = []
    for document in translations(split, {"pt": "Portuguese"}):
        ids += tokenizer.encode(document, bos=True)
    count = min(windows, (len(ids) - 1) // CONTEXT)
    return list(torch.stack([torch.tensor(ids[i * CONTEXT : (i + 1) * CONTEXT + 1]) for i in range(count)]).split(8))


def knobs_of(name: str, scheme: str, quick: bool, **changes) -> ZeroQAT:
    knobs = replace(BASE, minutes=MINUTES[name], **SCHEMES[scheme])
    if quick:
        knobs = replace(knobs, steps=4, minutes=None, every=2, calibration=2, warm=1, validation=1)
    return replace(knobs, **({k: v for k, v in changes.items() if not quick or k in ("trainable", "warm")}))


def test_score(name: str, model: Llama, quick: bool, text: str = "own") -> float:
    """Perplexity on test text."""
    return subject_of(name, quick, text).task.score(model, "test")


def rounded(model: Llama, knobs: ZeroQAT) -> Llama:
    """Round to nearest over the whole range of every group: no clip, no smoothing, no training."""
    out = copy.deepcopy(model)
    for name, layer in out.linears().items():
        if name.startswith("blocks."):
            W, group = layer.to_dense(), knobs.group or layer.ins
            out.replace(name, quantized(W, clip_logits(*W.shape, group, UNCLIPPED), knobs.w, group, layer.bias))
    if knobs.a < 16:
        out.stand(token_grids(len(out.blocks), knobs.a))
    return out


@cache
def floors(name: str, scheme: str, quick: bool) -> dict[str, float]:
    """Test perplexity of the float model, of rounding to nearest, and, where activations stay, with a search for ranges and by
    GPTQ."""
    subject, knobs = subject_of(name, quick), knobs_of(name, scheme, quick)
    models = {"float": subject.model, "rounded": rounded(subject.model, knobs)}
    if knobs.a == 16:
        for solver in ("rtn", "gptq"):
            other = Quantize(bits=knobs.w, group=knobs.group, solver=solver, embed_bits=16, calibration=64)
            models["searched" if solver == "rtn" else "gptq"] = other.apply(subject.model, subject.task)
    return {what: test_score(name, model, quick) for what, model in models.items()}


@cache
def warm_start(name: str, scheme: str, warm: bool, quick: bool) -> tuple[Llama, float]:
    """A prepared model, all maps in training, and the seconds it took. Copy it before use."""
    subject = subject_of(name, quick)
    knobs = knobs_of(name, scheme, quick, **({} if warm else {"warm": 0}))
    begin = time.monotonic()
    return prepare(subject.model, subject.task, knobs), time.monotonic() - begin


def light(model: Llama) -> Llama:
    """A copy of a prepared model with all but its query and value maps packed."""
    out = copy.deepcopy(model)
    return finish(out, {n: m.pack() for n, m in masters_of(out).items() if n.rpartition(".")[2] not in ("q", "v")})


def packed(model: Llama, best: dict[str, QuantLinear]) -> Llama:
    return finish(copy.deepcopy(model), best)


@dataclass(frozen=True)
class Outcome:
    """A run, its seconds, and test perplexity at its start, of its best by validation text, and of its last step."""

    run: Run
    seconds: float
    start: float
    best: float
    last: float


def upside_down(*args) -> tuple[list[float], float]:
    """Slopes with the wrong sign: the control climbs."""
    found, mean = slopes(*args)
    return [-g for g in found], mean


@cache
def outcome(
    name: str, scheme: str, quick: bool, warm: bool = True, trainable: str = "all", text: str = "own",
    steps: int | None = None, wrong: bool = False,
) -> Outcome:  # fmt: skip
    """Forward-only training from a warm start or from plain clipped rounding; `steps` instead of the time limit. Steps with the
    wrong sign need no more than 200 to show."""
    steps = 200 if wrong else steps
    knobs = knobs_of(name, scheme, quick, trainable=trainable, **({"steps": steps, "minutes": None} if steps else {}))
    task, model = subject_of(name, quick, text).task, warm_start(name, scheme, warm, quick)[0]
    model = light(model) if trainable == "qv" else copy.deepcopy(model)
    start = test_score(name, packed(model, {n: m.pack() for n, m in masters_of(model).items()}), quick, text)
    begin = time.monotonic()
    run = fit(model, task, knobs, estimate=upside_down if wrong else slopes)
    seconds = time.monotonic() - begin
    best, last = test_score(name, packed(model, run.best), quick, text), test_score(name, model, quick, text)
    return Outcome(run, seconds, start, best, last)


@cache
def gradient_curve(name: str, scheme: str, seconds: float, rate: float, quick: bool) -> list[tuple[float, float]]:
    """(seconds, validation perplexity) of quantization-aware training by back-propagation from the same warm start: AdamW on
    masters and clips, straight-through rounding, the same batches. train/loop.py steps matrices by Muon; AdamW is the rival."""
    knobs, task = knobs_of(name, scheme, quick), subject_of(name, quick).task
    model = copy.deepcopy(warm_start(name, scheme, True, quick)[0])
    masters = masters_of(model).values()
    parameters = [p for m in masters for p in (m.weight.requires_grad_(True), m.clip.requires_grad_(True))]
    optimizer, rows = (
        torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0),
        train_rows(task, replace(knobs, steps=1000)),
    )
    spent, step, due = 0.0, 0, 0.0
    curve = [(0.0, math.exp(held_out(model, task, knobs)))]
    while spent < seconds and not (quick and step >= 2):
        begin = time.monotonic()
        task.loss(model, batch_at(rows, step, knobs)).backward()
        optimizer.step()
        optimizer.zero_grad()
        spent, step = spent + time.monotonic() - begin, step + 1
        if spent - due >= seconds / 10:
            due = spent
            curve.append((spent, math.exp(held_out(model, task, knobs))))
    return [*curve, (spent, math.exp(held_out(model, task, knobs)))]


def seconds_per_step(step: Callable[[], None], turns: int) -> float:
    """Median seconds of `turns` calls after one that warms up."""
    taken = []
    for _ in range(turns + 1):
        begin = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begin)
    return sorted(taken[1:])[turns // 2]
