"""Bricks of neurons: found, listed, run alone, cut out for good, traced. Each function is a command of `netsuke bricks`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from netsuke import __version__
from netsuke.apps.bricks import texts
from netsuke.apps.bricks.store import NAME, Opened, check_manifest_path, copy_plugins, opened
from netsuke.compress.adapters import Rack, attach, burned
from netsuke.compress.bricks import (
    Found,
    Manifest,
    after_removal,
    cut,
    fired,
    harm,
    instance_loss,
    leaving,
    random_sites,
)  # fmt: skip
from netsuke.compress.bricks import find as find_bricks
from netsuke.errors import NetsukeError
from netsuke.measure.neurons import INDICATORS
from netsuke.models.artifact import check_writable
from netsuke.models.llama import Llama
from netsuke.models.save import save_artifact
from netsuke.models.tokenizer import Decoder
from netsuke.runtime.generate import generate
from netsuke.runtime.timings import Timings

Progress = Callable[[str, int, int], None]
SHUFFLES = 5  # of labels, for what luck gives
FIRED = 0.5  # half way from how a brick answers to other skills' texts to how it answers to its own


def find(
    model: str, skills: str, *, out: str | None = None, share: float = 0.05, length: int = 64, count: int = 400,
    indicator: str = "activation", judge: bool = True, on_progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Names the `share` of every layer's neurons that know each skill best, and writes the manifest.

    skills     DIR with DIR/<skill>/*.txt, or "domains": the five built-in ones
    out        NAME.netsuke (a copy of the model with its bricks), a .json file, or None: beside the weights
    length     tokens of an instance, `count` of them a skill at most
    indicator  "activation" or "output" (activation times what the neuron adds)
    judge      also cut every brick, and a random one of the same size, and measure all skills on texts held back

    Returns {model, base, manifest, artifact, share, instances, skills (precision of the brick, the best neuron, what luck
    gives), judged (see there; None without enough texts)}. Raises NetsukeError for everything
    that is wrong with model, texts or place; nothing is written then.
    """
    tell = on_progress or (lambda *_: None)
    if not 0 < share <= 0.5:
        raise NetsukeError("find bricks", f"--share {share}", "more than 0, at most 0.5")
    if indicator not in INDICATORS:
        raise NetsukeError("find bricks", f"--indicator {indicator!r}", ", ".join(INDICATORS))
    as_artifact = out is not None and Path(out).suffix != ".json"
    target = check_writable(Path(out)) if as_artifact else None
    tell("reading", 0, 0)
    if as_artifact or out is None:
        source = opened(model, need=False)
    else:
        check_manifest_path(Path(out))
        source = opened(model, out, need=False)
    if not as_artifact:
        check_manifest_path(source.path)
    if target is not None and source.path.parent.resolve() == target:
        raise NetsukeError(f"save {target}", "it is the model that is read", "another name", "no -o: bricks beside it")
    got = texts.read(source, skills, length, count)
    plugins = [b for b in source.manifest.bricks if b.kind != "neurons"]
    if taken := sorted({b.id for b in plugins} & got.found.keys()):
        raise NetsukeError(f"find the skill {taken[0]!r}", "a plugin has this id", "another name of the folder")
    found = find_bricks(
        source.loaded.model, got.found, share, indicator,
        on_batch=lambda done, total: tell("listening to neurons", done, total),
    )  # fmt: skip
    manifest = found.manifest.plus(*plugins)
    verdict = judged(source.loaded.model, manifest, got.held, tell) if judge and got.held else None
    if target is not None:
        write_model(source, source.loaded.model, manifest, target, {"bricks": sorted(got.found)}, source.path.parent)
    else:
        manifest.write(source.path)
    return {
        "model": model, "base": manifest.base, "manifest": str(source.path if target is None else target / NAME),
        "artifact": None if target is None else str(target), "share": share,
        "instances": {s: {"found": len(ids), "held": len(got.held.get(s, ()))} for s, ids in got.found.items()},
        "skills": {s: precisions(found, s) for s in got.found}, "judged": verdict,
    }  # fmt: skip


def precisions(found: Found, skill: str) -> dict[str, Any]:
    """How well the neurons of a brick tell their skill, beside the best of all and what luck gives."""
    brick = found.manifest.brick(skill)
    luck = [found.chance(skill, i, SHUFFLES) for i in range(len(found.rankings))]
    return {
        "neurons": sum(map(len, brick.sites.values())), "bytes": brick.bytes, "precision": brick.skills[skill],
        "best": max(float(s.max()) for s in found.scores[skill]), "random": float(found.labels[skill].double().mean()),
        "best_by_luck": max(c.best_95 for c in luck),
    }  # fmt: skip


def judged(model: Llama, manifest: Manifest, held: Mapping[str, Tensor], tell: Progress) -> dict[str, Any]:
    """{loss: skill -> nats; harm: cut brick -> skill -> nats added; random: the same for as many neurons drawn by lot;
    hurts_most: brick -> skill}."""
    names = [b.id for b in manifest.bricks if b.kind == "neurons"]
    tell("measuring the model as it is", 0, 0)
    base = {s: instance_loss(model, ids) for s, ids in held.items()}
    rows = {}
    for i, name in enumerate(names):
        tell("cutting one brick after the other", i, len(names) + 1)
        rows[name] = harm(model, manifest.brick(name).sites, held, base)
    tell("cutting one brick after the other", len(names), len(names) + 1)
    lot = harm(model, random_sites(model, manifest.brick(names[0]).sites), held, base)
    most = {name: max(row, key=lambda s, row=row: row[s]) for name, row in rows.items()}
    return {"loss": base, "harm": rows, "random": lot, "hurts_most": most}


def write_model(
    source: Opened, model: Llama, manifest: Manifest, target: Path, facts: dict[str, Any], plugins: Path
) -> None:
    """An artifact with its manifest and the plugin files of the folder `plugins`; all of it appears at once."""

    def complete(part: Path) -> None:
        copy_plugins(manifest, plugins, part)
        manifest.write(part / NAME)

    known = (source.loaded.manifest or {}).get("provenance", {})
    provenance = {**known, "base": Path(source.source).name, "netsuke": __version__}
    save_artifact(target, model, source.loaded.tokenizer, provenance=provenance, facts=facts, verify=complete)


def list_bricks(model: str, *, bricks: str | None = None) -> dict[str, Any]:
    """All bricks of a model: {model, base, manifest, bricks: [{id, kind, skills, neurons, maps, bytes, share, file, parents}]},
    `share` of the model's bytes. Raises NetsukeError when there is no manifest or it is of another base."""
    source = opened(model, bricks)
    total, rows = source.loaded.model.bytes(), []
    for b in source.manifest.bricks:
        rows.append({
            "id": b.id, "kind": b.kind, "skills": b.skills, "neurons": sum(map(len, b.sites.values())),
            "maps": len(b.sites), "bytes": b.bytes, "share": b.bytes / total, "file": b.file, "parents": list(b.parents),
            "there": b.file is None or (source.path.parent / b.file).is_file(),
        })  # fmt: skip
    return {"model": model, "base": source.base, "manifest": str(source.path), "bytes": total, "bricks": rows}


def chosen(source: Opened, only: Sequence[str] | None, also: Sequence[str]) -> tuple[Llama, list[str], list[str]]:
    """The model without the neuron bricks that `only` leaves out, with the plugins that `only` and `also` name; then the ids of
    what is in it and of what was cut."""
    manifest = source.manifest
    neurons = [b.id for b in manifest.bricks if b.kind == "neurons"]
    asked = source.ids_of(only) if only is not None else neurons
    kept = [n for n in asked if n in neurons]
    plugins = list(dict.fromkeys([n for n in asked if n not in neurons] + source.ids_of(also)))
    if wrong := [n for n in plugins if n in neurons]:
        raise NetsukeError(f"attach {wrong[0]!r}", "it is a brick of neurons", "plugins", f"--only {wrong[0]}")
    gone, model = [n for n in neurons if n not in kept], source.loaded.model
    together = source.with_plugins(plugins)
    if together is not None:  # plugins stand on the whole model: they are written into it before anything is cut
        model = burned(model, together) if gone else attach(model, together, source.base)
    return cut(model, leaving(manifest, gone)) if gone else model, kept + plugins, gone


def run(
    model: str, prompt: str, new_tokens: int = 128, *, only: Sequence[str] | None = None, also: Sequence[str] = (),
    temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, bricks: str | None = None,
    on_text: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Completes a prompt with some bricks alone.

    only   ids or skills: all other bricks of neurons are cut out (neurons that a kept brick shares, and those of no brick, stay),
           plugins among them are attached; None: the whole model
    also   plugins to attach

    Returns {text, prompt, bricks, without, bytes, bytes_before, timings…}; greedy at temperature 0. Raises NetsukeError for
    unknown bricks, overlapping edits, and as `netsuke run`.
    """
    if temperature < 0 or not math.isfinite(temperature) or not 0 < top_p <= 1 or new_tokens < 1:
        raise NetsukeError(
            "run with these settings", f"temperature {temperature}, top-p {top_p}, tokens {new_tokens}",
            "temperature >= 0, 0 < top-p <= 1, tokens >= 1",
        )  # fmt: skip
    source = opened(model, bricks)
    smaller, kept, gone = chosen(source, only, also)
    decoder, text, timings = Decoder(source.tokenizer), [], Timings()
    ids = source.tokenizer.encode(prompt, bos=True)
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    for token in generate(smaller, ids, new_tokens, timings=timings, **sampling):
        text.append(decoder.push(token))
        if on_text:
            on_text(text[-1])
    text.append(decoder.flush())
    if on_text:
        on_text(text[-1])
    return {
        "model": model, "prompt": prompt, "text": "".join(text), "bricks": kept, "without": gone,
        "bytes": smaller.bytes(), "bytes_before": source.loaded.model.bytes(), "seed": seed, **timings.as_dict(),
    }  # fmt: skip


def prune(
    model: str, out: str, *, remove: Sequence[str] = (), only: Sequence[str] | None = None, skills: str | None = None,
    length: int = 64, count: int = 400, bricks: str | None = None, on_progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes a smaller artifact without some bricks; layers get narrower, nothing is masked.

    remove   ids or skills to take out; or `only`: all bricks of neurons but these go
    skills   as in `find`: the losses of all skills before and after, on texts held back

    Neurons that a brick shares with one that stays are kept. The other bricks are counted anew in the artifact's manifest;
    plugins stand on the whole model and do not come along when neurons go.
    Returns {artifact, removed, left, left_behind (plugins), neurons, bytes (before, after), losses}. Raises NetsukeError for
    unknown bricks, nothing to remove, and as `find`; nothing is written then.
    """
    tell, asked = on_progress or (lambda *_: None), f"prune {model}"
    if bool(remove) == (only is not None):
        raise NetsukeError(asked, "both --remove and --only" if remove else "nothing to remove", "--remove or --only")
    target = check_writable(Path(out))
    tell("reading", 0, 0)
    source = opened(model, bricks)
    neurons = [b.id for b in source.manifest.bricks if b.kind == "neurons"]
    named = source.ids_of(remove or only or ())
    if only is not None and (odd := [n for n in named if n not in neurons]):
        raise NetsukeError(asked, f"{odd[0]!r} is a plugin", "bricks of neurons", "run --with attaches plugins")
    gone = named if only is None else [n for n in neurons if n not in named]
    if not gone:
        raise NetsukeError(asked, "no brick would go", f"some of {', '.join(neurons)}")
    if source.path.parent.resolve() == target:
        raise NetsukeError(f"save {target}", "it is the model that is read", "another name")
    held = texts.read(source, skills, length, count).held if skills is not None else {}
    if skills is not None and not held:
        raise NetsukeError(asked, f"too few texts in {skills} to hold some back", "63 or more instances a skill")
    tell("cutting", 0, 0)
    whole, cut_out = source.loaded.model, [n for n in gone if n in neurons]
    if cut_out:
        sites = leaving(source.manifest, cut_out)
        smaller = cut(whole, sites)
        manifest, count_out = after_removal(source.manifest, smaller, cut_out), sum(map(len, sites.values()))
    else:
        smaller, count_out = whole, 0
        manifest = Manifest(source.base).plus(*(b for b in source.manifest.bricks if b.id not in gone))
    tell("measuring", 0, 0)
    judged_on = {s: [instance_loss(m, ids) for m in (whole, smaller)] for s, ids in held.items()}
    write_model(source, smaller, manifest, target, {"bricks_removed": gone}, source.path.parent)
    return {
        "model": model, "artifact": str(target), "removed": gone, "left": [b.id for b in manifest.bricks],
        "left_behind": [b.id for b in source.manifest.bricks if b not in manifest.bricks and b.file and b.id not in gone],
        "neurons": count_out, "bytes": [whole.bytes(), smaller.bytes()], "losses": judged_on,
    }  # fmt: skip


def trace(model: str, prompt: str, *, bricks: str | None = None) -> dict[str, Any]:
    """Which bricks answer to a prompt.

    Returns {tokens, neurons: {id: {strength, share, fired}}, plugins: {id: distance}, nearest}. `strength` is the mean
    activation of a brick's neurons over that of their layers; `share` puts it between what the brick answers to other skills'
    texts (0) and to its own (1); from a half on it has fired. Plugins that remember their texts are ordered by how far the
    prompt is from them; the nearest is what a rack would attach. Raises NetsukeError for a prompt that is empty or too long.
    """
    source = opened(model, bricks)
    ids, longest = source.tokenizer.encode(prompt, bos=True), source.loaded.model.cfg.context
    if not prompt.strip() or not 0 < len(ids) <= longest:
        raise NetsukeError(f"trace {model}", f"the prompt has {len(ids)} tokens", f"a text of at most {longest} tokens")
    row = torch.tensor([ids])
    rows, known = {}, {b.id: b.levels for b in source.manifest.bricks}
    for name, strength in fired(source.loaded.model, source.manifest, row).items():
        others, own = known[name] or (0.0, 0.0)
        share = (strength - others) / (own - others) if own > others else None
        rows[name] = {"strength": strength, "share": share, "fired": None if share is None else share >= FIRED}
    plugins = [source.plugin(b.id) for b in source.manifest.bricks if b.kind != "neurons"]
    keyed, distances = [p for p in plugins if p.key is not None], {}
    if keyed:
        rack = Rack(source.loaded.model, keyed)
        distances = dict(zip(rack.models, rack.distance(row)[0].tolist()))
    return {
        "model": model, "prompt": prompt, "tokens": len(ids), "neurons": rows, "plugins": distances,
        "nearest": min(distances, key=lambda n: distances[n]) if distances else None,
    }  # fmt: skip
