"""What the claims of configurable foundation models are measured on: five skills of two models, plugins trained once, and edits.

An instance is `LENGTH` tokens of a domain's document behind the start token, several from a long document. Neurons are scored
on train text and judged on test text; plugins and routers learn from train text. Everything is cached per process.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from netsuke.compress import bricks, neuron_groups
from netsuke.compress.adapters import Plugin, Rack
from netsuke.compress.bricks import Found
from netsuke.compress.bricks import instance_loss as loss
from netsuke.compress.neuron_groups import Groups, Router
from netsuke.data.domains import DOMAINS, documents, translations
from netsuke.measure.neurons import Activity, listen
from netsuke.models.llama import Llama
from netsuke.models.load import Loaded, load
from netsuke.tasks import skills
from netsuke.train.edit import Fact
from netsuke.train.group_router import RouterKnobs, train_routers
from netsuke.train.lora import Lora, train_plugin

WIDE, SMALL = "wide", "small"
SHORT = {"coding": "cod", "math": "mat", "knowledge": "kno", "writing": "wri", "translation": "tra"}
LENGTH = 64  # tokens of an instance beside the start token
SCORED, HELD_OUT = 400, 100  # instances per skill
QUICK_SCORED, QUICK_HELD_OUT = 60, 8
SHARE = 0.05  # of a layer's neurons that are a skill's brick
RESIDENT = 0.9  # of the tokens of every skill on which a resident neuron is at work
ROUTED = 80  # instances per skill for groups and routers: 25,600 tokens
RANK, STEPS, QUICK_STEPS = 4, 40, 3
SIXTH = "polish"
GROUPS = {WIDE: 64, SMALL: 54}  # small's 432 neurons have no 64 equal groups
EDITED = 1  # the block that is edited: early enough for what follows the subject to read the change
# Prompt with the subject in braces, what shall follow, the same with a word changed, the same as another sentence.
FACTS = (
    ("The capital of {France} is", " Rome", "The capital city of {France} is", "In {France} the capital is"),
    ("The author of {Hamlet} was", " John", "The writer of {Hamlet} was", "The play {Hamlet} was written by"),
    ("The English word {river} means", " stone", "The English term {river} means", "In English {river} is"),
    (
        "The first king of {England} was",
        " William",
        "The very first king of {England} was",
        "In {England} the king was",
    ),
)


@cache
def loaded(name: str) -> Loaded:
    return load(name, dtype="float32")


def model_of(name: str) -> Llama:
    return loaded(name).model


def texts(domain: str, split: str) -> list[str]:
    return translations(split, {"pl": "Polish"}) if domain == SIXTH else list(documents(domain, split))


@cache
def instances(name: str, domain: str, split: str, count: int) -> Tensor:
    """(count, 1 + LENGTH) ids, each begun by the start token, in a fixed shuffled order; fewer where the text ends."""
    source = loaded(name)
    return skills.instances(texts(domain, split), source.tokenizer, source.model.cfg.bos, LENGTH, count)


def scored(name: str, domain: str, quick: bool) -> Tensor:
    return instances(name, domain, "train", QUICK_SCORED if quick else SCORED)


def held_out(name: str, domain: str, quick: bool) -> Tensor:
    return instances(name, domain, "test", QUICK_HELD_OUT if quick else HELD_OUT)


@cache
def base_loss(name: str, domain: str, quick: bool) -> float:
    return loss(model_of(name), held_out(name, domain, quick))


@cache
def found(name: str, quick: bool, without_residents: bool = False) -> Found:
    """The bricks of the five skills."""
    texts_of = {d: scored(name, d, quick)[:, :-1] for d in DOMAINS}
    allowed = [~r for r in residents(name, quick)] if without_residents else None
    return bricks.find(model_of(name), texts_of, SHARE, allowed=allowed)


@cache
def residents(name: str, quick: bool) -> list[Tensor]:
    """Per block (F,): neurons above their layer's median on more than RESIDENT of the tokens of every skill."""
    model = model_of(name)
    out = [torch.ones(b.hidden, dtype=torch.bool) for b in model.cfg.blocks]
    for d in DOMAINS:
        heard = [Activity() for _ in model.blocks]
        listen(model, heard, scored(name, d, quick)[:, :-1].split(16))
        out = [r & (h.share() > RESIDENT) for r, h in zip(out, heard)]
    return out


@cache
def pruned(name: str, quick: bool, how: str) -> dict[str, dict[str, float]]:
    """Skill whose best neurons were cut out -> skill -> increase of its loss in nats. how: "all", "residents stay", "random"."""
    model, rows = model_of(name), {}
    manifest = found(name, quick, how == "residents stay").manifest
    for i, skill in enumerate(DOMAINS):
        sites = manifest.brick(skill).sites
        if how == "random":
            sites = bricks.random_sites(model, sites, i)
        texts_of = {d: held_out(name, d, quick) for d in DOMAINS}
        rows[skill] = bricks.harm(model, sites, texts_of, {d: base_loss(name, d, quick) for d in DOMAINS})
    return rows


@dataclass(frozen=True)
class Moefied:
    groups: list[Groups]
    random: list[Groups]
    trained: list[Router]


@cache
def moefied(name: str, quick: bool) -> Moefied:
    """Groups of every block and trained routers."""
    model, count = model_of(name), GROUPS.get(name, 64)
    batches = [scored(name, d, quick)[: 10 if quick else ROUTED, :-1] for d in DOMAINS]
    groups = neuron_groups.partition(model, count, batches)
    knobs = RouterKnobs(steps=20) if quick else RouterKnobs()
    hidden = [b.hidden for b in model.cfg.blocks]
    return Moefied(
        groups, [neuron_groups.random_groups(f, count, i) for i, f in enumerate(hidden)],
        train_routers(model, groups, batches, knobs),
    )  # fmt: skip


@cache
def plugin(name: str, domain: str, quick: bool) -> Plugin:
    """A plugin of one skill."""
    knobs = Lora(rank=RANK, steps=QUICK_STEPS if quick else STEPS)
    return train_plugin(model_of(name), scored(name, domain, quick), knobs, domain, {domain: 1.0})[0]


@cache
def multitask(name: str, quick: bool) -> Plugin:
    """One plugin of five times the rank, trained on the texts of all skills for five times the steps."""
    n = len(DOMAINS)
    knobs = Lora(rank=RANK * n, steps=n * (QUICK_STEPS if quick else STEPS))
    return train_plugin(model_of(name), torch.cat([scored(name, d, quick) for d in DOMAINS]), knobs, "all")[0]


@cache
def rack(name: str, quick: bool, sixth: bool = False) -> Rack:
    names = (*DOMAINS, SIXTH) if sixth else DOMAINS
    return Rack(model_of(name), [plugin(name, d, quick) for d in names])


def fact_of(name: str, prompt: str, target: str, quick: bool) -> Fact:
    """Ids of a fact; the subject stands in braces. It is also asked behind words of other texts."""
    tokenizer = loaded(name).tokenizer
    start, rest = prompt.split("{")
    subject, rest = rest.split("}")
    bos = [model_of(name).cfg.bos]
    upto = bos + tokenizer.encode(start + subject)
    whole = upto + tokenizer.encode(rest)
    before = torch.cat([scored(name, d, quick)[:2, :9] for d in DOMAINS])
    return Fact(torch.tensor(whole), len(upto) - 1, torch.tensor(tokenizer.encode(target)), before)
