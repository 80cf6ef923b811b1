"""The trainings behind tinylm's claims, one cell each: measured once, kept as JSON, so that a run can be stopped and continued.

Which cells there are, and the command that runs them all, is in tinylm_study.py. Cells lie in $NETSUKE_CACHE/tinylm, else in
the user's cache, under a key of all their settings, the text and the teacher. At most one cell is lost when a run ends early.
`--quick` trains a few steps on little text and keeps nothing.

Scaled down from the card: 1.5 M parameters everywhere (its tokenizer study has 2 M), 0.8 M tokens a training (2 to 10 M), one
seed for each random shape; about 100 minutes on one core.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from netsuke.compress.inherit import choose_blocks, inherit, skip_profile
from netsuke.data import domains
from netsuke.models.llama import Llama, LlamaConfig, random_llama
from netsuke.models.load import Loaded, find, load
from netsuke.models.places import WEIGHTS, digest
from netsuke.models.shapes import candidates, expansion, parameters, random_shapes, shape_of
from netsuke.models.tokenizer import HFTokenizer
from netsuke.models.tokenizer_train import train_bpe
from netsuke.models.tokenizer_trim import Trimmed, count_pieces, pieces_of, retokenize, trim
from netsuke.tasks.domains import DomainModeling, equal_sample
from netsuke.train.loop import LoopKnobs, train
from netsuke.train.rounds import Rounds, gentler, second_round, train_drawn

TEACHER = "wide"
DATA = domains.needs()
MARKS = (0.1, 0.5, 1.0)  # shares of a training after which held-out text is scored
SCORES = ("random", "l1", "l2", "taylor", "mask")
MISALIGNED = "misaligned"  # taylor's cut, but the embedding's channels in another order: one gate for all, forgotten
DRAWS = {
    "whole": Rounds(keep=1.0),
    "uniform": Rounds(temperature=math.inf),
    "published": Rounds(),
    "sharp": Rounds(temperature=0.3, by="sequence"),
}


@dataclass(frozen=True)
class Scale:
    """How much is trained. `sizes` are vocabularies, the first one is the tokenizer that the others are trimmed from."""

    budget: int = 1_500_000
    sizes: tuple[int, ...] = (8192, 4096, 2048, 1024)
    steps: int = 400
    batch: int = 8
    context: int = 256
    seeds: int = 3
    shapes: int = 12
    depth: int = 6  # of the tokenizer study
    middle: int = 2048  # vocabulary of the shape study and of the rounds
    round_steps: int = 240
    round_seeds: int = 5
    scored: int = 20_000  # bytes of each domain
    learned: int = 1_000_000  # bytes of each domain that the tokenizer is trained on
    windows: int = 32  # that a teacher's units are scored on
    mask_steps: int = 60
    text: int | None = None  # bytes of each domain's text that are read at all


FULL = Scale()
QUICK = Scale(
    budget=400_000, sizes=(1024, 512, 320), steps=4, batch=4, context=64, seeds=1, shapes=3, depth=3, middle=512, round_steps=4,
    round_seeds=1, scored=1500, learned=20_000, windows=4, mask_steps=2, text=40_000,
)  # fmt: skip


def scale(quick: bool) -> Scale:
    return QUICK if quick else FULL


def folder() -> Path:
    root = (
        os.environ.get("NETSUKE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "netsuke"
    )
    return Path(root) / "tinylm"


@cache
def text_digest() -> str:
    """Of all documents: Python's own library differs from version to version."""
    sha = hashlib.sha256()
    for domain in domains.DOMAINS:
        for split in ("train", "validation", "test"):
            for text in domains.documents(domain, split):
                sha.update(text.encode())
    return sha.hexdigest()


@cache
def teacher() -> Loaded:
    return load(TEACHER, dtype="float32")


_quick: dict[str, dict[str, Any]] = {}
_states: dict[str, dict[str, torch.Tensor]] = {}


def cell(settings: dict[str, Any], s: Scale, make: Callable[[], tuple[dict[str, Any], Llama | None]]) -> dict[str, Any]:
    """What `make` measured under these settings, now or before; its model is kept beside it (see `kept_model`)."""
    key = key_of(settings, s)
    if s is not FULL:
        if key not in _quick:
            _quick[key], model = make()
            if model is not None:
                _states[key] = model.state_dict()
        return _quick[key]
    path = folder() / f"{key}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))["measured"]
    path.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    measured, model = make()
    if model is not None:
        _replace(path.with_suffix(".pt"), lambda part: torch.save(model.state_dict(), part))
    whole = {"settings": settings, "seconds": round(time.perf_counter() - begin, 1), "measured": measured}
    _replace(path, lambda part: part.write_text(json.dumps(whole, indent=1), encoding="utf-8"))
    return measured


def key_of(settings: dict[str, Any], s: Scale) -> str:
    facts = settings | {"scale": asdict(s), "text": text_digest()}
    if settings.get("start") not in (None, "fresh"):
        facts["teacher"] = digest(find(TEACHER)[0] / WEIGHTS)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    part = path.with_suffix(f"{path.suffix}.part")
    write(part)
    os.replace(part, path)


def kept_model(settings: dict[str, Any], s: Scale, cfg: LlamaConfig) -> Llama:
    """The model that a cell ended with."""
    key, model = key_of(settings, s), Llama(cfg)
    state = _states[key] if s is not FULL else torch.load(folder() / f"{key}.pt", weights_only=True)
    model.load_state_dict(state)
    return model


# Tokenizers and text


@cache
def first_tokenizer(s: Scale) -> HFTokenizer:
    """The tokenizer that the others are trimmed from, trained on equal amounts of all domains."""
    return train_bpe(equal_sample(s.learned), s.sizes[0])


@cache
def counts(s: Scale) -> torch.Tensor:
    return count_pieces(first_tokenizer(s), equal_sample(s.learned))


@cache
def trimmed(vocab: int, s: Scale) -> Trimmed:
    return trim(first_tokenizer(s), counts(s), vocab)


@cache
def tokenizer_of(name: str, s: Scale) -> HFTokenizer:
    """ "2048": trimmed to so many pieces; "retrained 2048": trained with so many."""
    kind, _, vocab = name.rpartition(" ")
    if kind == "retrained":
        return train_bpe(equal_sample(s.learned), int(vocab))
    return first_tokenizer(s) if int(vocab) == s.sizes[0] else trimmed(int(vocab), s).tokenizer


@cache
def task_of(tokenizer: str, s: Scale) -> DomainModeling:
    return DomainModeling(
        tokenizer_of(tokenizer, s), s.context, s.batch, scored_bytes=s.scored, documents=_documents(s.text)
    )


def _documents(limit: int | None) -> Callable[[str, str], Sequence[str]]:
    if limit is None:
        return domains.documents

    def some(domain: str, split: str) -> list[str]:
        out, size = [], 0
        for text in domains.documents(domain, split):
            out.append(text[:limit])
            size += len(text)
            if size > limit:
                break
        return out

    return some


# Shapes


def config(tokenizer: str, layers: int, width: int, s: Scale) -> LlamaConfig:
    """The shape of this depth and width at the budget, under a tokenizer."""
    vocab = tokenizer_of(tokenizer, s).vocab
    return shape_of(s.budget, vocab, layers, width, context=s.context, bos=0, eos=(0,))


@cache
def study_shape(tokenizer: str, s: Scale) -> tuple[int, int]:
    """(depth, width) in the tokenizer study: one depth for all, the width whose expansion is nearest to 8/3."""
    vocab = tokenizer_of(tokenizer, s).vocab
    pool = candidates(s.budget, vocab, depths=(s.depth,), bounds=(0.1, 100), context=s.context)
    best = min(pool, key=lambda c: abs(math.log(expansion(c) / (8 / 3))))
    return len(best.blocks), best.width


@cache
def drawn_shapes(s: Scale) -> list[tuple[int, int]]:
    pool = random_shapes(s.budget, s.middle, s.shapes, seed=0, context=s.context)
    return [(len(c.blocks), c.width) for c in pool]


def inside_teacher(cfg: LlamaConfig) -> bool:
    big = teacher().model.cfg
    deep, wide = len(cfg.blocks) <= len(big.blocks), max(b.hidden for b in cfg.blocks) <= big.blocks[0].hidden
    return deep and wide and cfg.width <= big.width and cfg.heads <= big.heads


# Trainings


@cache
def big_model(tokenizer: str, s: Scale) -> Llama:
    """The teacher under another tokenizer."""
    return retokenize(teacher().model, teacher().tokenizer, tokenizer_of(tokenizer, s))


def own_rows(tokenizer: str, s: Scale) -> float:
    """Share of a tokenizer's pieces that the teacher's tokenizer has as well."""
    mine, theirs = (pieces_of(t).content for t in (tokenizer_of(tokenizer, s), teacher().tokenizer))
    return len(set(mine) & set(theirs)) / len(mine)


@cache
def kept_blocks(tokenizer: str, layers: int, s: Scale) -> tuple[int, ...]:
    """The teacher's blocks that stay, by its layer-skip profile."""
    profile = skip_profile(copy.deepcopy(big_model(tokenizer, s)), task_of(tokenizer, s), limit=2)
    return choose_blocks(profile, layers)


@cache
def inherited(tokenizer: str, layers: int, width: int, score: str, seed: int, s: Scale) -> Llama:
    cfg, kind = config(tokenizer, layers, width, s), "taylor" if score == MISALIGNED else score
    model = inherit(
        big_model(tokenizer, s), cfg, task_of(tokenizer, s), kind, calibration=s.windows,
        steps=s.mask_steps, seed=seed if kind == "random" else 0, blocks=kept_blocks(tokenizer, layers, s),
    )  # fmt: skip
    if score == MISALIGNED:
        order = torch.randperm(cfg.width, generator=torch.Generator().manual_seed(0))
        model.embed.weight.copy_(model.embed.weight[:, order])
    return model


def begin(tokenizer: str, layers: int, width: int, start: str, seed: int, s: Scale) -> Llama:
    if start == "fresh":
        return random_llama(config(tokenizer, layers, width, s), seed)
    return copy.deepcopy(inherited(tokenizer, layers, width, start, seed if start == "random" else 0, s))


def settings_of(
    tokenizer: str, shape: tuple[int, int], seed: int, start: str = "fresh", *, stop: float = 1.0, steps: int | None = None,
    keep: bool = False,
) -> dict[str, Any]:  # fmt: skip
    return {
        "tokenizer": tokenizer, "layers": shape[0], "width": shape[1], "start": start, "seed": seed, "stop": stop,
        "steps": steps, "keep": keep,
    }  # fmt: skip


def trained(settings: dict[str, Any], s: Scale) -> dict[str, Any]:
    """A training from its start: {parameters, share, bits_per_byte: {validation, test}, marks: {share: {split: nats}}}."""

    def make() -> tuple[dict[str, Any], Llama | None]:
        v = dict(settings)
        task, steps = task_of(v["tokenizer"], s), v["steps"] or s.steps
        model = begin(v["tokenizer"], v["layers"], v["width"], v["start"], v["seed"], s).requires_grad_(True)
        marks: dict[str, dict[str, float]] = {}
        wanted = {max(round(m * steps), 1): m for m in MARKS if m <= v["stop"]}

        def on_step(step: int, loss: float, rate: float) -> bool:
            if step in wanted:
                marks[str(wanted[step])] = {split: nats(model, task, split) for split in ("validation", "test")}
            return step >= v["stop"] * steps

        knobs = LoopKnobs(steps=steps, bf16=True)
        history = train(model, lambda step: task.batch_at(step, seed=v["seed"]), task.loss, knobs, on_step=on_step)
        model.requires_grad_(False)
        count = parameters(model.cfg)
        out = {
            "parameters": count.total, "share": count.share, "hidden": model.cfg.blocks[0].hidden, "marks": marks,
            "tokens": len(history.steps) * s.batch * s.context, "train_seconds": history.seconds,
            "first_losses": history.losses[:3], "bits_per_byte": scores(model, task),
        }  # fmt: skip
        return out, model if v["keep"] else None

    return cell(settings, s, make)


@torch.no_grad()
def nats(model: Llama, task: DomainModeling, split: str) -> float:
    """Mean loss of a token, on up to 8 batches of held-out windows."""
    rows = list(task.batches(split, 8))
    return sum(float(task.loss(model, b)) * len(b) for b in rows) / sum(map(len, rows))


def scores(model: Llama, task: DomainModeling) -> dict[str, dict[str, float]]:
    return {split: task.bits_per_byte(model, split) for split in ("validation", "test")}


def again(settings: dict[str, Any], draw: str, s: Scale) -> dict[str, Any]:
    """A second round after the training with these settings: what `trained` gives of bits per byte, and what was drawn."""

    def make() -> tuple[dict[str, Any], None]:
        task, seed, steps = task_of(settings["tokenizer"], s), settings["seed"], settings["steps"] or s.steps
        cfg = config(settings["tokenizer"], settings["layers"], settings["width"], s)
        model = kept_model(settings, s, cfg).requires_grad_(True)
        seen = [task.batch_at(step, seed=seed) for step in range(steps)]
        drawn = second_round(model, seen, replace(DRAWS[draw], seed=seed))
        train_drawn(model, drawn.batches, task.loss, gentler(LoopKnobs(steps=1, bf16=True)))
        out = {
            "steps": len(drawn.batches), "effective_share": drawn.effective_share, "mean_loss": drawn.mean_loss,
            "drawn_loss": drawn.drawn_loss, "bits_per_byte": scores(model.requires_grad_(False), task),
        }  # fmt: skip
        return out, None

    trained(settings, s)
    return cell({**settings, "draw": {"name": draw, **asdict(DRAWS[draw])}}, s, make)
