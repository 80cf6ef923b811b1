"""What the claims of Greenformers are measured on: a BERT-base block, small encoders trained on real sequences, two decoders.

Everything is cached per process, so that claims share what they have in common and test data are scored once.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from netsuke.compress.advise import Shape
from netsuke.compress.factorize import TUNE, Factorize, fine_tune, low_rank_design
from netsuke.models.encoder import Encoder, EncoderBlock, EncoderConfig, random_encoder
from netsuke.models.llama import Llama
from netsuke.models.load import load
from netsuke.models.skeleton import skeleton
from netsuke.runtime.allocator import LARGE_IN_TRAINING, return_freed_memory
from netsuke.systems.modegpt_cases import STORIES, Rows, case_of, written_by
from netsuke.systems.r_sparse_cases import WIDE, mixture
from netsuke.tasks import sequences
from netsuke.tasks.sequences import SequenceTask
from netsuke.train.loop import LoopKnobs, train

BERT = Shape(768, 12, rank=64, project=128)
SMALL = Shape(192, 4, rank=16, project=32)  # a quick run's block
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
FUSED_LENGTHS = (1024, 2048, 4096)
TOKENS = 1024  # in a timed step, in one sequence at least
PEAK_TOKENS = 4096  # in a step whose memory is measured
REPEATS = 5
WIDTH, LAYERS = {"digits": 128, "spoken": 128, "mnist": 64}, 2
SHARE = 0.4  # of the break-even rank: 2.4 times fewer weights in the blocks
PROJECT = 64  # summaries of 784 pixels
STEPS = {"digits": 400, "spoken": 200, "mnist": 600}
HEADS = {"digits": 4, "spoken": 4, "mnist": 2}
HEAL_STEPS = 200


def config_of(kind: str, n: int, s: Shape, layers: int = 1) -> EncoderConfig:
    """An encoder of the shape for at most n tokens. kind: dense, lrt, linformer."""
    extra = {"attention": "linformer", "project": s.P(n)} if kind == "linformer" else {}
    return EncoderConfig.uniform(layers, s.f, width=s.d, heads=s.heads, context=n, features=1, classes=2, **extra)


def bert_block(kind: str, n: int, s: Shape = BERT, open_maps: bool = True) -> EncoderBlock:
    """One block with random weights."""
    model = random_encoder(config_of(kind, n, s), 0)
    if kind == "lrt":
        model = low_rank_design(model, s.r)
    return model.open_maps(open_maps).blocks[0].requires_grad_(True)


def shapes_only(kind: str, n: int, s: Shape) -> EncoderBlock:
    """The same block without memory, with open maps: operations are counted on it, not run."""
    cfg, dense = config_of(kind, n, s), {"kind": "dense", "dtype": "float32"}
    thin = {"kind": "lowrank", "rank": s.r, "first": dense, "second": dense}
    names = skeleton(cfg).linears()
    specs = {name: thin if kind == "lrt" and name.startswith("blocks.") else dense for name in names}
    return skeleton(cfg, specs).open_maps().blocks[0]


def step(block: EncoderBlock, x: Tensor) -> None:
    """Forward and backward pass, gradients of the weights and of the input, as inside a stack."""
    for p in block.parameters():
        p.grad = None
    block(x).square().mean().backward()


def input_of(n: int, d: int, tokens: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(max(tokens // n, 1), n, d, generator=rng).requires_grad_(True)


@cache
def step_seconds(
    n: int, kinds: tuple[tuple[str, int], ...], open_maps: bool, quick: bool
) -> dict[tuple[str, int], float]:
    """Median seconds per token of a training step for each (kind, rank), taken in turns so that all see the same machine."""
    base, tokens, repeats = (SMALL, 512, 1) if quick else (BERT, TOKENS, REPEATS)
    shapes = {key: replace(base, rank=key[1] if key[0] == "lrt" else base.rank) for key in kinds}
    blocks = {key: bert_block(key[0], n, shapes[key], open_maps) for key in kinds}
    x, times = input_of(n, base.d, tokens), {key: [] for key in kinds}
    for turn in range(repeats + 1):
        for key, block in blocks.items():
            x.grad, begin = None, time.perf_counter()
            step(block, x)
            if turn:  # the first one warms up
                times[key].append((time.perf_counter() - begin) / (x.shape[0] * n))
    return {key: statistics.median(t) for key, t in times.items()}


def peak_shape(small: bool) -> tuple[Shape, int]:
    """The block whose memory is measured, and the tokens in a step."""
    return (SMALL, 512) if small else (BERT, PEAK_TOKENS)


def train_twice(kind: str, n: int, open_maps: bool, small: bool) -> None:
    """Two steps with Adam's moments, for `peak_of`: the second holds weights, gradients and moments together."""
    return_freed_memory(LARGE_IN_TRAINING)  # holes in the heap, 200 MB here, would hide what the methods differ in
    s, tokens = peak_shape(small)
    block = bert_block(kind, n, s, open_maps)
    x, weights = input_of(n, s.d, tokens), list(block.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in weights]
    for _ in range(2):  # Adam by hand: torch's module imports a compiler, 90 MB that no step needs
        x.grad = None
        block(x).square().mean().backward()
        with torch.no_grad():
            for p, (mean, square) in zip(weights, moments):
                mean.lerp_(p.grad, 0.1)
                square.mul_(0.95).addcmul_(p.grad, p.grad, value=0.05)
                p.addcdiv_(mean, square.sqrt().add_(1e-8), value=-1e-4)
                p.grad.zero_()


def crossing_of(first: dict[int, float], second: dict[int, float]) -> float | None:
    """The n at which the second curve falls below the first, between measured lengths by straight lines in log n; None where
    it does not. A length at which it is below already counts as it stands."""
    ratios = [(n, second[n] / first[n]) for n in sorted(first.keys() & second.keys())]
    for (a, before), (b, after) in pairwise(ratios):
        if before > 1 >= after:
            share = (before - 1) / (before - after)
            return math.exp(math.log(a) + share * (math.log(b) - math.log(a)))
    return float(ratios[0][0]) if ratios[0][1] <= 1 else None


@dataclass(frozen=True)
class Trained:
    model: Encoder
    accuracy: float  # on test data, in per cent
    weights: int  # of the linear maps of the blocks
    step_seconds: float


def task_of(name: str, fold: int) -> SequenceTask:
    return {"digits": sequences.digits, "mnist": sequences.mnist, "spoken": lambda: sequences.spoken_digits(fold)}[
        name
    ]()


def design(name: str, kind: str, seed: int, share: float = SHARE) -> Encoder:
    part = task_of(name, 0).parts["train"].x
    extra = {"attention": "linformer", "project": PROJECT} if kind == "linformer" else {}
    cfg = EncoderConfig.uniform(
        LAYERS, 4 * WIDTH[name], width=WIDTH[name], heads=HEADS[name], context=part.shape[1], features=part.shape[2], classes=10,
        **extra,
    )  # fmt: skip
    model = random_encoder(cfg, seed)
    return low_rank_design(model, share, seed) if kind == "lrt" else model


@cache
def trained(name: str, kind: str, seed: int, quick: bool, share: float = SHARE) -> Trained:
    """An encoder trained from scratch; for spoken digits the seed is also the number of the speaker who tests. A low-rank one
    gets no weight decay: on factors it would push the rank further down."""
    task, model = task_of(name, seed), design(name, kind, seed, share).requires_grad_(True)
    steps = 2 if quick else STEPS[name]
    decay = 0.0 if kind == "lrt" else LoopKnobs.weight_decay
    knobs = LoopKnobs(steps=steps, weight_decay=decay, bf16=True)
    history = train(model, lambda step: task.batch_at(step, seed), task.loss, knobs)
    model.requires_grad_(False)
    weights = sum(p.numel() for n, p in model.blocks.named_parameters() if "norm" not in n)
    limit = 2 if quick else None
    return Trained(model, 100 * task.score(model, "test", limit), weights, history.seconds / len(history.steps))


@cache
def nearest_neighbour(name: str, fold: int) -> float:
    """The floor: the label of the nearest training sequence, frame by frame, in per cent of the test data."""
    parts = task_of(name, fold).parts
    near = torch.cdist(parts["test"].x.flatten(1), parts["train"].x.flatten(1)).argmin(1)
    return 100 * float((parts["train"].labels[near] == parts["test"].labels).double().mean())


@dataclass(frozen=True)
class Subject:
    """A trained model and its data, for factors that start from it."""

    model: Llama | Encoder
    task: Rows | SequenceTask
    loss: Callable[[object, str], float]  # mean loss in nats of a model on a split


def rows_loss(task: Rows) -> Callable[[object, str], float]:
    return lambda model, split: math.log(task.score(model, split))


@cache
def subject_of(name: str, quick: bool) -> Subject:
    """stories260K on stories it wrote itself (test: real ones), wide on five domains, or the digits encoder of seed 0. Raises
    NetsukeError for what is absent."""
    if name == "digits":
        task = sequences.digits()
        return Subject(trained("digits", "dense", 0, quick).model, task, task.mean_loss)
    if name == STORIES:
        case = case_of(name, quick)
        own = written_by(case.model, 16 if quick else 512, 192, seed=1).clone()
        task = Rows({**case.task.rows, "train": own.split(8)})
        return Subject(case.model, task, rows_loss(task))
    loaded = load(name, dtype="float32")
    windows = {"train": 4, "validation": 1, "test": 1} if quick else {"train": 120, "validation": 4, "test": 16}
    rows = {split: torch.cat(mixture(loaded.tokenizer, split, count)) for split, count in windows.items()}
    order = torch.randperm(len(rows["train"]), generator=torch.Generator().manual_seed(0))
    rows["train"] = rows["train"][order]
    task = Rows({split: found.split(2 if split == "train" else 8) for split, found in rows.items()})
    return Subject(loaded.model, task, rows_loss(task))


@cache
def excess(name: str, solver: str, rank: float, steps: int, quick: bool) -> float:
    """Loss on test data above the dense model's, in nats, after `steps` gradient steps from factors of that start. A random
    start needs other rates than a cut model: it gets the better of both on validation data."""
    subject = subject_of(name, quick)
    cut = Factorize(rank=rank, solver=solver, calibration=8 if quick else 64)
    model = cut.apply(subject.model, subject.task)
    if steps:
        tries = [TUNE] if solver != "random" else [TUNE, replace(TUNE, muon_lr=0.02, adam_lr=3e-3)]
        tuned = [fine_tune(cut.apply(subject.model, subject.task), subject.task, steps, k) for k in tries]
        model = min(tuned, key=lambda m: subject.loss(m, "validation"))
    return subject.loss(model, "test") - dense_loss(name, quick)


@cache
def dense_loss(name: str, quick: bool) -> float:
    subject = subject_of(name, quick)
    return subject.loss(subject.model, "test")


SUBJECTS = (STORIES, WIDE, "digits")
