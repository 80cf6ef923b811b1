"""Bricks made afterwards: added or trained, merged, and edits of one fact. Each function is a command of `netsuke bricks`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from netsuke.apps.bricks import texts
from netsuke.apps.bricks.store import check_id, check_manifest_path, opened
from netsuke.compress.adapters import attach, merge, read_plugin
from netsuke.compress.bricks import check_base, instance_loss
from netsuke.errors import NetsukeError
from netsuke.models.tokenizer import Tokenizer
from netsuke.train.edit import Edit, Fact, check_apart, key_gram, make_edit, says
from netsuke.train.lora import Lora, train_plugin

Progress = Callable[[str, int, int], None]
PLUGIN = ".safetensors"
BEFORE, OPENING = 10, 9  # texts that an edited prompt also stands behind, and their tokens
OTHER = 480  # instances of other text: four fifths give the keys that are left alone, a fifth is judged on
BLOCK = 1  # early enough for what follows the subject to read the change


def add(
    model: str, source: str, *, name: str | None = None, rank: int = 4, steps: int = 60, length: int = 64,
    count: int = 400, bricks: str | None = None, on_progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Adds a plugin to a model's bricks: a plugin file, or texts (a file or a folder) that a new one of this rank learns from.

    Four fifths of the instances train, the last fifth is judged on. Returns {id, kind, file, manifest, bytes, losses (before,
    after; None for a file)}. Raises NetsukeError for a plugin of another base or shape, a taken name, a file that is none, and
    too few texts; nothing is written then.
    """
    tell, path = on_progress or (lambda *_: None), Path(source)
    tell("reading", 0, 0)
    place = opened(model, bricks, need=False)
    check_manifest_path(place.path)
    if path.suffix == PLUGIN:
        if not path.is_file():
            raise NetsukeError(f"add {source}", "there is no such file", "a plugin file, or texts to learn from")
        plugin, copied = read_plugin(path), path
        if name is not None and name != plugin.id:  # the file says who it is: under another name it is another file
            plugin, copied = replace(plugin, id=name, parents=(*plugin.parents, plugin.id)), None
        losses = None
    else:
        name = place.free(name if name is not None else path.stem if path.suffix else path.name)
        place.file_of(name)
        rows = texts.rows_of(place, source, length, count)
        held = len(rows) // 5
        learn, judge = rows[: len(rows) - held], rows[len(rows) - held :]
        before = instance_loss(place.loaded.model, judge)
        plugin, _ = train_plugin(
            place.loaded.model, learn, Lora(rank=rank, steps=steps), name,
            on_step=lambda step, *_: tell("training", step, steps),
        )  # fmt: skip
        after = instance_loss(attach(place.loaded.model, plugin, place.base), judge)
        plugin, copied, losses = replace(plugin, skills={name: round(before - after, 4)}), None, [before, after]
    brick = place.take(plugin, "adapter", copied)
    return {
        "id": brick.id, "kind": brick.kind, "file": brick.file, "manifest": str(place.path), "bytes": brick.bytes,
        "losses": losses,
    }  # fmt: skip


def merge_bricks(
    model: str, names: Sequence[str], weights: Sequence[float], *, out: str | None = None, name: str | None = None,
    how: str = "products", rank: int | None = None, bricks: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One plugin from several, Σ w_i B_i A_i; a negative weight subtracts. The plugins stay, so that a merge can be undone.

    names   ids of plugins, or plugin files
    out     a .safetensors file; None: it becomes a brick of the model
    how     "products" (any ranks; `rank` cuts the sum) or "factors" (equal ranks)

    Returns {id, file, manifest (None with `out`), bytes, parents, weights, ranks}. Raises NetsukeError for bricks of neurons,
    other bases, shapes or ranks, and an output that is something else; nothing is written then.
    """
    asked = f"merge {' and '.join(names)}"
    if len(names) < 2:
        raise NetsukeError(asked, f"{len(names)} brick", "two or more")
    place = opened(model, bricks, need=False)
    label = check_id(name if name is not None else "+".join(Path(n).stem for n in names), asked)
    if out is None:
        check_manifest_path(place.path)
        place.free(label)
    else:
        check_out(Path(out))
    plugins = []
    for n in names:
        file = Path(n)
        if file.suffix == PLUGIN and file.is_file():
            plugins.append(read_plugin(file))
            check_base(repr(n), plugins[-1].base, place.base)
        else:
            plugins.append(place.plugin(n))
    made = merge(plugins, weights, label, how, rank)
    place.check(made)
    if out is None:
        file = place.path.parent / place.take(made, "adapter").file
    else:
        made.write(file := Path(out))
    return {
        "id": label, "file": str(file), "manifest": None if out is not None else str(place.path),
        "bytes": made.bytes(), "parents": list(made.parents), "weights": list(weights),
        "ranks": sorted({len(first) for first, _ in made.thin.values()}),
    }  # fmt: skip


def check_out(out: Path) -> None:
    """Refuses a place that a plugin cannot be written to: another suffix, no folder, a file that is no plugin."""
    asked = f"write {out}"
    if out.suffix != PLUGIN:
        raise NetsukeError(asked, f"the suffix is {out.suffix or 'none'}", PLUGIN)
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise NetsukeError(asked, f"the folder {out.parent} is missing or read-only", "a folder that can be written to")
    if os.path.lexists(out):
        read_plugin(out)


def edit(
    model: str, prompt: str, target: str, *, subject: str | None = None, name: str | None = None, block: int | None = None,
    steps: int = 40, harm: float = 0.01, text: str | None = None, length: int = 64, bricks: str | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Makes the model write `target` after `prompt`: a rank-one plugin, which is added to its bricks as an edit.

    subject  what the fact is about, a part of the prompt; or in braces in the prompt; else its last word with a capital letter
    block    whose down map is changed, by default the second
    harm     largest relative change of the loss of other text
    text     a file or folder of text that must not change, by default built-in text; in instances of `length` tokens

    Returns {id, file, manifest, bytes, subject, block, before, after (whether the target follows), other_text (relative change
    of its loss)}. Raises NetsukeError with code 1 when the edit does not take or harms other text more, with code 2 for a
    prompt without a subject and an edit that overlaps one that is there; nothing is written then.
    """
    tell, asked = on_progress or (lambda *_: None), "edit a fact"
    tell("reading", 0, 0)
    place = opened(model, bricks, need=False)
    whole, blocks = place.loaded.model, len(place.loaded.model.blocks)
    check_manifest_path(place.path)
    if steps < 1 or not harm > 0:
        raise NetsukeError(asked, f"--steps {steps}, --harm {harm}", "1 step or more, a harm above 0")
    plain, end, about = subject_of(prompt, subject)
    label = place.free(name if name is not None else re.sub(r"\W+", "-", f"{about} {target}".strip().lower()))
    place.file_of(label)
    block = min(BLOCK, blocks - 1) if block is None else block
    ids, at, following = encoded(place.tokenizer, plain, end, target)
    if len(ids) + len(following) + OPENING > whole.cfg.context:
        found = f"{len(ids) + len(following)} tokens"
        raise NetsukeError(asked, found, f"{whole.cfg.context - OPENING}, the model's context less words before it")
    other = texts.other_text(place, text, length, OTHER)
    held = len(other) // 5
    fact = Fact(torch.tensor(ids), at, torch.tensor(following), other[held : held + BEFORE, :OPENING])
    before = says(whole, fact.prompt, fact.target)
    tell("hearing other text", 0, 0)
    gram = key_gram(whole, block, other[held:].split(16)) if 0 <= block < blocks else None
    tell("finding the change", 0, 0)
    made = make_edit(whole, fact, block, gram, label, Edit(steps=steps))
    check_apart([*(place.plugin(b.id) for b in place.manifest.bricks if b.kind == "edit"), made])
    edited = attach(whole, made, place.base)
    changed = instance_loss(edited, other[:held]) / instance_loss(whole, other[:held]) - 1
    if not says(edited, fact.prompt, fact.target):
        found = f"{target!r} does not follow {plain!r} after {steps} steps, other text's loss would change by {changed:+.2%}"
        raise NetsukeError(asked, found, "", "more --steps, another --block or a larger model", code=1)
    if not abs(changed) <= harm:
        found = f"{target!r} follows {plain!r}, but the loss of other text changes by {changed:+.2%}"
        raise NetsukeError(asked, found, f"--harm {harm:g}", "fewer --steps, another --block or more --harm", code=1)
    brick = place.take(made, "edit")
    return {
        "id": brick.id, "file": brick.file, "manifest": str(place.path), "bytes": brick.bytes, "subject": about,
        "block": block, "before": before, "after": True, "other_text": changed,
    }  # fmt: skip


def subject_of(prompt: str, subject: str | None) -> tuple[str, int, str]:
    """The prompt without braces, where its subject ends in it, and the subject. Raises NetsukeError when none can be told."""
    asked, allowed = "edit a fact", "the subject in braces, 'The capital of {France} is', or --subject"
    if subject is not None:
        at = prompt.rfind(subject)
        if not subject.strip() or at < 0:
            raise NetsukeError(asked, f"{subject!r} is not in {prompt!r}", "a part of the prompt")
        return prompt, at + len(subject), subject
    if found := re.fullmatch(r"([^{}]*)\{([^{}]+)\}([^{}]*)", prompt):
        start, about, rest = found.groups()
        if about.strip():
            return start + about + rest, len(start + about), about
    if set(prompt) & set("{}") or not prompt.strip():
        raise NetsukeError(asked, f"the prompt is {prompt!r}", allowed)
    words = [m for m in re.finditer(r"\w+", prompt) if m.start() > 0 and m[0][0].isupper()]
    if not words:
        raise NetsukeError(asked, f"nothing tells what {prompt!r} is about", allowed)
    return prompt, words[-1].end(), words[-1][0]


def encoded(tokenizer: Tokenizer, prompt: str, end: int, target: str) -> tuple[list[int], int, list[int]]:
    """Ids of the prompt, the position of the token in which its character `end` falls, ids of what follows (a space comes
    between where there is none). Raises NetsukeError where the two cannot be told apart in ids."""
    if not target.strip():
        raise NetsukeError("edit a fact", "the target is empty", "what shall follow the prompt")
    gap = "" if prompt[-1:].isspace() or target[:1].isspace() or not target[0].isalnum() else " "
    ids, whole = tokenizer.encode(prompt, bos=True), tokenizer.encode(prompt + gap + target, bos=True)
    if whole[: len(ids)] != ids or len(whole) == len(ids):
        found = f"the tokens of {prompt!r} change when {target!r} follows"
        raise NetsukeError("edit a fact", found, "a prompt that ends with a word", "no space at its end")
    for at in range(len(ids)):
        if len(tokenizer.decode(ids[: at + 1])) >= end:
            return ids, at, whole[len(ids) :]
    return ids, len(ids) - 1, whole[len(ids) :]
