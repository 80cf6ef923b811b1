"""What MoDeGPT's claims are measured on: two models with their texts, the choice of the allocation, perplexity ratios.

stories260K comes without training text: it is calibrated and tuned on stories that it samples itself, and scored on
five real ones. pycode has the standard library, split by module; a fixed part of each split keeps the run short.
Everything is cached per process, so that claims share what they have in common and test text is scored once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from netsuke.compress import decompose, modegpt
from netsuke.compress.modegpt import MODULES, BlockStats, Fractions, MoDeGPT
from netsuke.data import catalogue, pysource
from netsuke.layers.linear import Dense
from netsuke.models.llama import KVCache, Llama
from netsuke.models.load import load
from netsuke.systems.modegpt_rivals import pruned_by_norm, svd_each
from netsuke.tasks.language import LanguageModeling, token_losses
from netsuke.train.loop import LoopKnobs, train

STORIES = "stories260K"
STORIES_FILES = ("modegpt/stories260K.bin", "modegpt/tok512.bin", "modegpt/tinystories_sample.txt")
SETTINGS = ({"allocate": "uniform"}, *({"epsilon": e} for e in (0.2, 0.3, 0.5, 0.8, 1.5, 3.0)))
HEAL = LoopKnobs(steps=200, muon_lr=0.004, adam_lr=3e-4, bf16=True)  # a fifth of the rates of training from scratch
QUICK_STEPS = 4


class Rows:
    """Rows of ids as a task: equally long ones for calibration and validation, single texts for the test."""

    metric, higher_is_better = "perplexity", False

    def __init__(self, rows: dict[str, Sequence[Tensor]]):
        self.rows = rows

    def batches(self, split: str, limit: int | None = None) -> Iterator[Tensor]:
        yield from self.rows[split][:limit]

    def loss(self, model: Llama, batch: Tensor) -> Tensor:
        return token_losses(model, batch).mean()

    @torch.no_grad()
    def score(self, model: Llama, split: str, limit: int | None = None) -> float:
        losses = torch.cat([token_losses(model, rows).flatten() for rows in self.batches(split, limit)])
        return math.exp(min(float(losses.double().mean()), 80.0))


@dataclass(frozen=True)
class Case:
    """A model and the text on which it is cut, tuned and scored."""

    model: Llama
    task: Rows | LanguageModeling
    calibration: int  # windows
    settings: tuple[dict, ...]
    limits: dict[str, int]  # batches scored; a split that is not named is scored whole

    def score(self, model: Llama, split: str) -> float:
        return self.task.score(model, split, self.limits.get(split))


@dataclass(frozen=True)
class Sweep:
    """The setting that validation text prefers, what it gives, and the same at uniform shares."""

    knobs: MoDeGPT
    stats: list[BlockStats]
    shares: tuple[Fractions, ...]
    uniform: tuple[Fractions, ...]
    validation: dict[str, float]  # perplexity ratio of every setting

    @property
    def setting(self) -> str:
        return describe(self.knobs)


def describe(knobs: MoDeGPT) -> str:
    return "uniform" if knobs.allocate == "uniform" else f"ε {knobs.epsilon:g}"


@torch.inference_mode()
def written_by(model: Llama, rows: int, length: int, seed: int) -> Tensor:
    """Texts that the model samples from its own distribution, each from the start token on, (rows, length + 1)."""
    rng = torch.Generator().manual_seed(seed)
    ids, cache_ = [torch.full((rows, 1), model.cfg.bos)], KVCache(model.cfg, rows, length)
    for _ in range(length):
        probabilities = model(ids[-1], cache_)[:, -1].double().softmax(-1)
        ids.append(torch.multinomial(probabilities, 1, generator=rng))
    return torch.cat(ids, 1)


def real_stories(tokenizer) -> list[Tensor]:
    """The sample stories of TinyStories, each (1, T) from the start token on. Curly quotes are folded, as in training."""
    text = catalogue.find(STORIES_FILES[2]).read_text(encoding="utf-8")
    for curly, plain in zip("“”‘’", "\"\"''"):
        text = text.replace(curly, plain)
    stories = [part.strip() for part in text.split("<|endoftext|>")]
    return [torch.tensor([tokenizer.encode(story, bos=True)]) for story in stories if story]


@cache
def case_of(name: str, quick: bool) -> Case:
    """The model and its text. `name` is STORIES or whatever models/load.py finds. Raises NetsukeError for what is absent."""
    if name == STORIES:
        loaded = load(catalogue.find(STORIES_FILES[0]), dtype="float32")
        own = written_by(loaded.model, 64 if quick else 128, 192, seed=0).clone()
        half = len(own) // 2
        task = Rows(
            {"train": own[:half].split(8), "validation": own[half:].split(8), "test": real_stories(loaded.tokenizer)}
        )
        return Case(loaded.model, task, half, SETTINGS[::2] if quick else SETTINGS, {})
    loaded = load(name, dtype="float32")
    strides = {"train": 60, "validation": 8, "test": 4} if quick else {"train": 5, "validation": 3, "test": 2}
    texts = {s: "\n".join(body for _, body in pysource.modules(s)[::step]) for s, step in strides.items()}
    if quick:
        texts = {s: text[:30_000] for s, text in texts.items()}
    task = LanguageModeling(texts, loaded.tokenizer, 128 if quick else 512, 8, source="Python standard library, a part")
    limits = {"validation": 1, "test": 1} if quick else {"validation": 4, "test": 8}
    return Case(loaded.model, task, 16 if quick else 64, SETTINGS[::4] if quick else SETTINGS, limits)


@cache
def dense_score(name: str, split: str, quick: bool) -> float:
    case = case_of(name, quick)
    return case.score(case.model, split)


@cache
def stats_of(name: str, quick: bool) -> list[BlockStats]:
    case = case_of(name, quick)
    return modegpt.calibrate(case.model, case.task, case.calibration)


@cache
@torch.no_grad()
def sweep(name: str, remove: float, quick: bool) -> Sweep:
    """Tries the allocations on validation text; test text is not touched."""
    case = case_of(name, quick)
    stats = stats_of(name, quick)
    influence, tried, scores = [s.influence for s in stats], {}, {}
    for setting in case.settings:
        knobs = MoDeGPT(remove=remove, calibration=case.calibration, **setting)
        tried[describe(knobs)] = knobs, modegpt.plan_cuts(case.model.cfg, influence, knobs)
        model = modegpt.apply_cuts(case.model, stats, tried[describe(knobs)][1], knobs)
        scores[describe(knobs)] = case.score(model, "validation") / dense_score(name, "validation", quick)
    best = min(scores, key=scores.get)
    return Sweep(tried[best][0], stats, tried[best][1], tried["uniform"][1], scores)


@cache
@torch.no_grad()
def ratio_on_test(name: str, remove: float, how: str, quick: bool) -> float:
    """Test perplexity over that of the dense model after removing a share of the blocks' parameters.

    how: chosen (MoDeGPT, allocation by validation text), uniform (MoDeGPT), norm and norm-uniform (norm pruning at the
    chosen or at uniform cuts), random and random-bare (`random_choice`), svd, whitened (every matrix on its own).
    """
    case, found = case_of(name, quick), sweep(name, remove, quick)
    if how in ("random", "random-bare"):
        seeds = range(3 if name == STORIES and not quick else 1)  # a wide model's draws hardly differ
        models = (random_choice(case.model, found, seed, how == "random") for seed in seeds)
        return statistics.median(case.score(m, "test") for m in models) / dense_score(name, "test", quick)
    build: dict[str, Callable[[], Llama]] = {
        "chosen": lambda: modegpt.apply_cuts(case.model, found.stats, found.shares, found.knobs),
        "uniform": lambda: modegpt.apply_cuts(case.model, found.stats, found.uniform, found.knobs),
        "norm": lambda: pruned_by_norm(case.model, found.shares),
        "norm-uniform": lambda: pruned_by_norm(case.model, found.uniform),
        "svd": lambda: svd_each(case.model, remove),
        "whitened": lambda: svd_each(case.model, remove, case.task, case.calibration),
    }
    if how == "uniform" and found.shares == found.uniform:
        return ratio_on_test(name, remove, "chosen", quick)
    return case.score(build[how](), "test") / dense_score(name, "test", quick)


def random_choice(model: Llama, found: Sweep, seed: int, compensate: bool = True) -> Llama:
    """The same widths, but hidden units and rotary pairs are drawn at random; the rest of the method stays as it is, or
    (without `compensate`) nothing makes up for the units that go."""
    rng, cuts = torch.Generator().manual_seed(seed), {}
    for layer, row in enumerate(found.shares):
        stats, block = found.stats[layer], model.blocks[layer]
        query, key, score = (
            torch.rand(n, generator=rng, dtype=torch.float64)
            for n in (len(stats.query), len(stats.key), len(stats.hidden))
        )
        # A diagonal Gram matrix of random numbers: leverage is random, and no unit tells anything about another.
        drawn = replace(stats, query=query, key=key, hidden=score.diag())
        for module, share in zip(MODULES, row):
            if share <= 0:
                continue
            cuts[layer, module] = modegpt.cut_module(model, layer, module, share, drawn, found.knobs)
            if module == "mlp" and compensate:
                changes, linears = cuts[layer, module]
                keep = score.topk(changes["hidden"]).indices.sort().values
                guess = decompose.nystrom(stats.hidden, keep, found.knobs.ridge)
                down = Dense((block.down.weight.double() @ guess.T).to(block.down.weight.dtype))
                cuts[layer, module] = changes, {**linears, "down": down}
    return modegpt.assemble(model, cuts)


@cache
def healed(name: str, remove: float, quick: bool) -> dict[str, float]:
    """Gradient steps on the training text after the cut: seconds, steps, and the test perplexity ratio."""
    case, found = case_of(name, quick), sweep(name, remove, quick)
    model = modegpt.apply_cuts(case.model, found.stats, found.shares, found.knobs).requires_grad_(True)
    rows, size = case.task.windows("train"), 2 if quick else 4
    history = train(
        model, lambda step: rows[torch.arange(step * size, (step + 1) * size) % len(rows)], case.task.loss,
        replace(HEAL, steps=QUICK_STEPS if quick else HEAL.steps),
    )  # fmt: skip
    ratio = case.score(model.requires_grad_(False), "test") / dense_score(name, "test", quick)
    tokens = rows[:size, 1:].numel()
    return {"ratio": ratio, "seconds": history.seconds, "steps": len(history.steps), "tokens_per_step": tokens}
