"""Small language models built and trained on this machine, from a user's text: what a thin verb calls, one function a step.

    begin_small(data, parameters, vocab, …)    tokenizer, shape and random weights: an artifact to train
    trim_vocabulary(model, data, vocab, …)     a trained model under fewer pieces, rows sliced, nothing retrained
    train_here(model, data, …)                 gradient steps on the text, and a second round over its hard batches

To start from a larger model instead of random weights: `netsuke compress BIG --method inherit:layers=4,width=128,…`, then
`train_here`. The recipes are those of "Rethinking Optimization and Architecture for Tiny Language Models" (ICML 2024).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from netsuke import __version__
from netsuke.compress.inherit import refusal
from netsuke.errors import NetsukeError
from netsuke.models.artifact import check_writable
from netsuke.models.llama import Llama, LlamaConfig, half_precision, random_llama
from netsuke.models.load import load
from netsuke.models.save import save_artifact
from netsuke.models.shapes import expansion, find_shape, parameters
from netsuke.models.tokenizer_train import train_bpe
from netsuke.models.tokenizer_trim import count_pieces, trim, trim_model
from netsuke.tasks.language import LanguageModeling, language_task
from netsuke.train.loop import LoopKnobs, train
from netsuke.train.rounds import Rounds, gentler, second_round, train_drawn

LINES = 2000  # characters of a text that are counted or learned from at a time


def begin_small(
    data: str, count: int, vocab: int, out: str, *, context: int = 256, min_speed: float = 0.0,
    speed: Callable[[LlamaConfig], float] | None = None, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Writes a fresh model of `count` parameters (within 1 %): a tokenizer of `vocab` pieces trained on the train part of
    `data` (a UTF-8 file or folder), the deepest shape that generates `min_speed` tokens/s by `speed`, random weights.

    Returns {config, parameters, table_share, expansion, bytes_per_token, artifact}. Raises NetsukeError for unusable text, an
    impossible budget (with a proposal) and a floor that no shape reaches.
    """
    target = check_writable(Path(out))
    task = LanguageModeling.from_path(data, train_bpe([], 257), context)
    task = LanguageModeling(
        task.texts, train_bpe(pieces(task.texts["train"]), vocab), context, task.batch, source=task.source
    )
    cfg = find_shape(
        count, task.tokenizer.vocab, min_speed=min_speed, speed=speed, context=context, bos=task.tokenizer.bos,
        eos=task.tokenizer.eos,
    )  # fmt: skip
    facts = {
        "parameters": parameters(cfg).total, "table_share": parameters(cfg).share, "expansion": expansion(cfg),
        "bytes_per_token": len(task.texts["train"].encode()) / len(task.ids("train")),
    }  # fmt: skip
    save(target, random_llama(cfg, seed), task.tokenizer, {"begun": {"seed": seed, "data": task.source}}, facts)
    shape = {"blocks": len(cfg.blocks), "width": cfg.width, "heads": cfg.heads, "hidden": cfg.blocks[0].hidden}
    return {"config": shape, **facts, "artifact": str(target)}


def pieces(text: str) -> list[str]:
    """A text in parts of `LINES` characters: a tokenizer's trainer holds a text's words in memory."""
    return [text[i : i + LINES] for i in range(0, len(text), LINES)]


def trim_vocabulary(
    model: str, data: str, vocab: int, out: str, *, rule: str = "closed", context: int | None = None
) -> dict[str, Any]:
    """Writes `model` under the `vocab` pieces that the train part of `data` uses most.

    Returns {pieces, coverage, unreachable, bits_per_byte (validation text, before and after), bytes, artifact}. Raises
    NetsukeError as `trim` and `trim_model`.
    """
    target, loaded = check_writable(Path(out)), load(model)
    task = language_task(loaded, data, context)
    got = trim(loaded.tokenizer, count_pieces(loaded.tokenizer, pieces(task.texts["train"])), vocab, rule)
    small = trim_model(loaded.model, got)
    after = LanguageModeling(task.texts, got.tokenizer, task.context, task.batch, source=task.source)
    facts = {
        "pieces": [loaded.tokenizer.vocab, vocab], "coverage": got.coverage, "unreachable": len(got.unreachable),
        "bits_per_byte": [quality(loaded.model, task), quality(small, after)], "bytes": [loaded.model.bytes(), small.bytes()],
    }  # fmt: skip
    save(target, small, got.tokenizer, {"base": Path(model).name, "trimmed": {"vocab": vocab, "rule": rule}}, facts)
    return {**facts, "artifact": str(target)}


def train_here(
    model: str, data: str, out: str, *, steps: int = 1000, minutes: float | None = None, rounds: int = 1,
    how: Rounds | None = None, batch: int = 8, context: int | None = None, rate: float = 1.0, seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains all weights of a language model on the train part of `data` and writes it in 16 bits.

    steps, minutes  of the first round, whichever ends it sooner
    rounds          1, or 2: then once more over the batches that `how` (train/rounds.py) draws
    rate            share of the loop's rates: 1 for fresh or inherited weights, about 0.1 for a trained model

    Returns {steps, tokens, seconds, bits_per_byte (validation before and after, test after), second: what was drawn, artifact}.
    Raises NetsukeError for unusable input; nothing is written then.
    """
    if rounds not in (1, 2) or steps < 1 or batch < 1 or not 0 < rate <= 10:
        found = f"rounds {rounds}, steps {steps}, batch {batch}, rate {rate:g}"
        raise NetsukeError(
            "train here with these settings", found, "1 or 2 rounds, a step or more, a rate above 0 up to 10"
        )
    target, tell = check_writable(Path(out)), on_progress or (lambda *_: None)
    loaded = load(model, dtype="float32")
    if reason := refusal(loaded.model):
        raise NetsukeError(f"train {model} here", reason, "a model of plain float maps")
    task = language_task(loaded, data, context)
    rows, net = task.windows("train"), loaded.model
    before = quality(net, task)
    net.requires_grad_(True)

    def batch_at(step: int) -> Tensor:
        return rows[passes(len(rows), batch, step, seed)]

    def on_step(step: int, loss: float, share: float) -> None:
        tell(f"training, loss {loss:.2f}", step, steps)

    knobs = gentler(LoopKnobs(steps=steps, minutes=minutes, bf16=True), rate)
    history = train(net, batch_at, task.loss, knobs, on_step=on_step)
    facts: dict[str, Any] = {"steps": len(history.steps), "tokens": len(history.steps) * batch * task.context}
    seconds = history.seconds
    if rounds == 2:
        tell("choosing hard batches", 0, 0)
        drawn = second_round(net, [batch_at(step) for step in range(len(history.steps))], how or Rounds(seed=seed))
        seconds += train_drawn(net, drawn.batches, task.loss, gentler(knobs)).seconds
        facts["second"] = {
            "steps": len(drawn.batches), "effective_share": drawn.effective_share, "mean_loss": drawn.mean_loss,
            "drawn_loss": drawn.drawn_loss,
        }  # fmt: skip
    net.requires_grad_(False)
    facts |= {"seconds": seconds, "bits_per_byte": [before, quality(net, task)], "test": quality(net, task, "test")}
    provenance = {
        "base": Path(model).name,
        "trained": {"data": task.source, "rounds": rounds, "rate": rate, "seed": seed},
    }
    save(target, half_precision(net), loaded.tokenizer, provenance, facts)
    return {**facts, "artifact": str(target)}


def train_new(
    data: str, count: int, vocab: int, out: str, *, context: int = 256, min_speed: float = 0.0,
    speed: Callable[[LlamaConfig], float] | None = None, **training: Any,
) -> dict[str, Any]:  # fmt: skip
    """`begin_small` and `train_here` in one: nothing is written but the trained model. Returns what both report."""
    check_writable(Path(out))
    with tempfile.TemporaryDirectory() as folder:
        begun = begin_small(
            data, count, vocab, f"{folder}/new", context=context, min_speed=min_speed, speed=speed,
            seed=training.get("seed", 0),
        )  # fmt: skip
        return {**begun, **train_here(begun["artifact"], data, out, **training)}


def passes(rows: int, batch: int, step: int, seed: int) -> Tensor:
    """Positions of a step's rows: every pass goes through all rows in an order of its own."""
    at = torch.arange(step * batch, (step + 1) * batch)

    def order(number: int) -> Tensor:
        return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 100_003 + number))

    orders = {number: order(number) for number in {*(at // rows).tolist()}}
    return torch.stack([orders[i // rows][i % rows] for i in at.tolist()])


def quality(model: Llama, task: LanguageModeling, split: str = "validation") -> float:
    """Bits per byte."""
    return task.bits_per_byte(task.mean_loss(model, split), split)


def save(target: Path, model: Llama, tokenizer: Any, provenance: dict[str, Any], facts: dict[str, Any]) -> None:
    save_artifact(target, model, tokenizer, provenance | {"netsuke": __version__}, facts)
