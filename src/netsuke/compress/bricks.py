"""Bricks: the parts of a trained model that do one job, found, listed, cut out, kept alone, and put back.

"Configurable Foundation Models: Building LLMs from a Modular Perspective", 2024. A brick is a set of neurons (a neuron is row
i of gate and up and column i of down) or a plugin made afterwards (compress/adapters.py). The manifest beside the weights says
which is which: id, kind, sites with neuron indices or a file, scores per skill, parents, bytes, and the sha256 of the base.

    find         scores every neuron for every skill by average precision (measure/neurons.py); a skill's brick is its best
                 `share` of each layer
    fired        which bricks answer to a prompt
    remove       cuts bricks out: the layers get narrower, nothing is masked
    keep_only    cuts all bricks but these out; neurons of no brick are common ground and stay
    extract      a brick's weights, to be kept in a file of their own
    graft        puts neurons into a model: where they were (the cut is undone bit for bit), or beside the others (growth)
    harm         what a cut does to texts, in nats

Find on one text and judge on another: the best of a thousand neurons is partly luck, and `find` gives what luck alone gives.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from netsuke.compress.modegpt import Cut, assemble
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.measure.neurons import Chance, InstanceMeans, Ranking, listen, top, weights_of
from netsuke.models.files import read_json, write_atomically
from netsuke.models.llama import Llama
from netsuke.tasks.language import token_losses

FORMAT, VERSION = "netsuke-bricks", 1
KINDS = ("neurons", "adapter", "edit")
LEAST = 50  # instances of a skill: below, an average precision says little
PARTS = ("gate", "up", "down")


class Brick(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`sites` gives neurons by site ("blocks.3.hidden"), or for plugins the linear maps that they stand beside, without
    indices. `base` is the `fingerprint` of the model that the brick was made for, `file` lies beside the manifest and has
    this `sha256`. `levels`: how strongly neurons answer (`fired`) to other skills' texts and to their own, on average."""

    id: str
    kind: str
    sites: dict[str, tuple[int, ...]]
    skills: dict[str, float]
    bytes: int
    base: str
    parents: tuple[str, ...] = ()
    file: str | None = None
    sha256: str | None = None
    levels: tuple[float, float] | None = None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All bricks of one base."""

    base: str
    bricks: tuple[Brick, ...] = ()
    format: str = FORMAT
    version: int = VERSION

    def brick(self, name: str) -> Brick:
        """By id. Raises NetsukeError for an unknown one."""
        for b in self.bricks:
            if b.id == name:
                return b
        raise NetsukeError(f"use the brick {name!r}", "there is no such brick", ", ".join(b.id for b in self.bricks))

    def of_skills(self, skills: Iterable[str]) -> list[str]:
        """Ids of the neuron bricks of these skills. Raises NetsukeError for a skill that no brick has."""
        out = []
        for skill in skills:
            found = [b.id for b in self.bricks if b.kind == "neurons" and skill in b.skills]
            if not found:
                known = sorted({s for b in self.bricks for s in b.skills})
                raise NetsukeError(f"use the skill {skill!r}", "no brick has it", ", ".join(known))
            out += found
        return out

    def plus(self, *bricks: Brick) -> Manifest:
        """With more bricks. Raises NetsukeError for another base and for an id that is taken."""
        taken = {b.id for b in self.bricks}
        for b in bricks:
            check_base(repr(b.id), b.base, self.base)
            if b.id in taken:
                raise NetsukeError(f"add the brick {b.id!r}", "the manifest has one of this id", "another id")
            taken.add(b.id)
        return Manifest(self.base, self.bricks + bricks)

    def write(self, path: Path) -> None:
        text = json.dumps(msgspec.to_builtins(self), indent=1, sort_keys=True) + "\n"
        write_atomically(path, lambda f: f.write(text.encode()))


def read_manifest(path: Path) -> Manifest:
    """Raises NetsukeError for what is no manifest, one of another version, and ids that stand twice."""
    raw, asked = read_json(path), f"read {path.name}"
    if raw.get("format") != FORMAT or raw.get("version") != VERSION:
        found = f"format {str(raw.get('format'))[:40]!r}, version {str(raw.get('version'))[:10]}"
        raise NetsukeError(asked, found, f"{FORMAT!r}, {VERSION}")
    try:
        got = msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as e:
        raise NetsukeError(asked, str(e), "a manifest as netsuke writes it") from e
    for b in got.bricks:
        if b.kind not in KINDS:
            raise NetsukeError(asked, f"brick {b.id[:40]!r} is of kind {b.kind[:40]!r}", ", ".join(KINDS))
        if not all(map(math.isfinite, (*b.skills.values(), *(b.levels or ())))):  # Python reads NaN as JSON
            raise NetsukeError(asked, f"a score of brick {b.id[:40]!r} is no finite number", "finite scores")
    return Manifest(got.base).plus(*got.bricks)


def fingerprint(model: Llama) -> str:
    """sha256 of all stored tensors with their names, dtypes and shapes: the identity of a base."""
    h = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        h.update(f"{name} {t.dtype} {tuple(t.shape)};".encode())
        h.update(memoryview(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return h.hexdigest()


def check_base(brick: str, made_for: str, base: str) -> None:
    """Raises NetsukeError when a brick was made for another model than the one with the fingerprint `base`."""
    if made_for != base:
        found = f"it was made for a base with sha256 {made_for[:12]}…, this one has {base[:12]}…"
        raise NetsukeError(f"use the brick {brick}", found, "the model that it was made for", "make it anew")


def check_plain(model: Llama, asked: str) -> None:
    """Raises NetsukeError unless all feed-forward maps are plain dense ones, naming the first that is not."""
    if (i := model.cfg.mixture) is not None:
        raise NetsukeError(asked, f"block {i} is a mixture of experts", "one feed-forward part a block")
    for i, block in enumerate(model.blocks):
        for part in PARTS:
            if not isinstance(getattr(block, part), Dense):
                found = f"blocks.{i}.{part} is stored as {getattr(block, part).spec()['kind']}"
                raise NetsukeError(asked, found, "dense maps", "work on bricks first, then quantize")


@dataclass
class Found:
    """`scores[skill][block]` (F,) average precision of every neuron, `labels[skill]` (N,), `rankings` by block."""

    manifest: Manifest
    scores: dict[str, list[Tensor]]
    labels: dict[str, Tensor]
    rankings: list[Ranking]

    def chance(self, skill: str, block: int, shuffles: int = 20) -> Chance:
        """What neurons of a block score for this skill by luck."""
        return self.rankings[block].by_chance(self.labels[skill], shuffles)


def find(
    model: Llama, skills: Mapping[str, Tensor], share: float = 0.05, indicator: str = "activation", batch: int = 16,
    allowed: Sequence[Tensor] | None = None, on_batch: Callable[[int, int], None] | None = None,
) -> Found:  # fmt: skip
    """Scores all neurons and names the best `share` of every layer as each skill's brick.

    skills    skill -> ids (N, T), one instance a row, all of one length T (a mean over tokens must not tell lengths apart)
    allowed   per block (F,): neurons that may be named at all
    on_batch  is told how many batches of how many have been heard

    Raises NetsukeError for fewer than two skills, fewer than LEAST instances of one, unequal lengths, and maps that are no
    dense ones.
    """
    asked = "find bricks"
    check_plain(model, asked)
    if len(skills) < 2:
        raise NetsukeError(asked, f"{len(skills)} skill", "two or more: a skill is what tells texts apart")
    for skill, ids in skills.items():
        if len(ids) < LEAST:
            raise NetsukeError(
                asked, f"{skill!r} has {len(ids)} instances", f"{LEAST} or more", "more or shorter texts"
            )
    if len(lengths := {ids.shape[1] for ids in skills.values()}) > 1:
        raise NetsukeError(asked, f"instances of {sorted(lengths)} tokens", "one length for all skills")
    heard = [InstanceMeans(weights_of(indicator, b.down)) for b in model.blocks]
    listen(model, heard, _counted(torch.cat(list(skills.values())).split(batch), on_batch))
    rows = [h.rows() for h in heard]
    rankings = [Ranking(r) for r in rows]
    owner = torch.cat([torch.full((len(ids),), i) for i, ids in enumerate(skills.values())])
    labels = {skill: owner == i for i, skill in enumerate(skills)}
    scores = {skill: [r.precision(y) for r in rankings] for skill, y in labels.items()}
    base, bricks = fingerprint(model), []
    for skill, per_block in scores.items():
        chosen = [top(s, share, None if allowed is None else allowed[i]) for i, s in enumerate(per_block)]
        sites = {f"blocks.{i}.hidden": tuple(c.tolist()) for i, c in enumerate(chosen)}
        skilled = float(torch.cat([s[c] for s, c in zip(per_block, chosen)]).mean())
        size, levels = neuron_bytes(model, sites), None
        if indicator == "activation":  # what `fired` looks at
            answers = torch.stack([r[:, c].mean(1) / r.mean(1) for r, c in zip(rows, chosen)]).double().mean(0)
            levels = tuple(round(float(answers[which].mean()), 4) for which in (~labels[skill], labels[skill]))
        bricks.append(Brick(skill, "neurons", sites, {skill: round(skilled, 4)}, size, base, levels=levels))
    return Found(Manifest(base).plus(*bricks), scores, labels, rankings)


def _counted(batches: Sequence[Tensor], tell: Callable[[int, int], None] | None) -> Iterator[Tensor]:
    for i, ids in enumerate(batches):
        yield ids
        if tell:
            tell(i + 1, len(batches))


@torch.no_grad()
def instance_loss(model: Llama, ids: Tensor) -> float:
    """Mean loss in nats of instances (N, T); the first real token is not counted (nothing tells what the text is about)."""
    parts = [token_losses(model, rows)[:, 1:].double() for rows in ids.split(25)]
    return float(torch.cat(parts).mean())


def harm(
    model: Llama, sites: Mapping[str, Iterable[int]], texts: Mapping[str, Tensor], base: Mapping[str, float]
) -> dict[str, float]:
    """Skill -> increase of the loss of its texts (N, T) over `base`, in nats, when these neurons are cut out."""
    smaller = cut(model, sites)
    return {skill: instance_loss(smaller, ids) - base[skill] for skill, ids in texts.items()}


@torch.no_grad()
def fired(model: Llama, manifest: Manifest, ids: Tensor) -> dict[str, float]:
    """How strongly every neuron brick answers to texts (N, T): mean |activation| of its neurons over that of their layers.

    Raises NetsukeError for a manifest of another base.
    """
    check_base("of this manifest", manifest.base, fingerprint(model))
    heard = [InstanceMeans() for _ in model.blocks]
    listen(model, heard, [ids])
    level = [h.rows().double().mean(0) for h in heard]
    out = {}
    for b in manifest.bricks:
        if b.kind == "neurons" and b.sites:
            own = [level[i][c].mean() / level[i].mean() for i, c in neurons(model, b.sites).items()]
            out[b.id] = float(torch.stack(own).mean()) if own else 0.0
    return out


def block_of(site: str, model: Llama) -> int:
    """ "blocks.3.hidden" -> 3. Raises NetsukeError for a site that is none of this model."""
    head, _, leaf = site.rpartition(".")
    index = head.removeprefix("blocks.")
    if leaf != "hidden" or not index.isdecimal() or len(index) > 9 or int(index) >= len(model.blocks):
        raise NetsukeError(
            f"find the site {site[:60]!r}", "no block has it", f"blocks.0 … {len(model.blocks) - 1}.hidden"
        )
    return int(index)


def neurons(model: Llama, sites: Mapping[str, Iterable[int]]) -> dict[int, Tensor]:
    """Sorted neurons by block. Raises NetsukeError for sites and neurons that the model does not have."""
    out = {}
    for site, indices in sites.items():
        i, chosen = block_of(site, model), sorted(set(indices))
        width = model.cfg.blocks[i].hidden
        if chosen and not 0 <= chosen[0] <= chosen[-1] < width:
            found = f"neurons {str(chosen[0])[:12]} to {str(chosen[-1])[:12]} of {site}, which has {width}"
            raise NetsukeError("use a brick", found, f"0 to {width - 1}", "the model that it was found in")
        if chosen:
            out[i] = torch.tensor(chosen, dtype=torch.long)
    return out


def random_sites(model: Llama, sites: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, list[int]]:
    """As many neurons of each site, drawn by lot: the floor beside which a cut's harm is read."""
    rng, out = torch.Generator().manual_seed(seed), {}
    for site, chosen in sites.items():
        width = model.cfg.blocks[block_of(site, model)].hidden
        out[site] = torch.randperm(width, generator=rng)[: len(chosen)].tolist()
    return out


def neuron_bytes(model: Llama, sites: Mapping[str, Iterable[int]]) -> int:
    """Bytes of the rows and columns of these neurons."""
    return sum(t.nbytes for parts in extract(model, sites).values() for t in parts)


def extract(model: Llama, sites: Mapping[str, Iterable[int]]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Site -> rows of gate (n, C) and up (n, C) and columns of down (n, C) of its neurons, in ascending order."""
    out = {}
    for i, chosen in neurons(model, sites).items():
        gate, up, down = (getattr(model.blocks[i], p).weight for p in PARTS)
        out[f"blocks.{i}.hidden"] = gate[chosen], up[chosen], down.T[chosen]
    return out


def cut(model: Llama, sites: Mapping[str, Iterable[int]]) -> Llama:
    """A smaller model without these neurons; the others keep their very bits. Raises NetsukeError where none would be left."""
    check_plain(model, "cut neurons")
    cuts: dict[tuple[int, str], Cut] = {}
    for i, gone in neurons(model, sites).items():
        width = model.cfg.blocks[i].hidden
        keep = torch.ones(width, dtype=torch.bool)
        keep[gone] = False
        if not bool(keep.any()):
            raise NetsukeError(
                "cut neurons", f"all {width} of blocks.{i} would go", "one or more left", "a smaller brick"
            )
        gate, up, down = (getattr(model.blocks[i], p) for p in PARTS)
        linears = {
            n: Dense(m.weight[keep], None if m.bias is None else m.bias[keep]) for n, m in zip(PARTS, (gate, up))
        }
        linears["down"] = Dense(down.weight[:, keep], down.bias)
        cuts[i, "mlp"] = {"hidden": int(keep.sum())}, linears
    return assemble(model, cuts)


def graft(
    model: Llama, parts: Mapping[str, tuple[Tensor, Tensor, Tensor]], places: Mapping[str, Iterable[int]] | None = None
) -> Llama:
    """A wider model with these neurons (as `extract` gives them) put in: at `places`, ascending, counted in the result, or
    after the last one. The old neurons keep their very bits.

    Raises NetsukeError for rows of another width, another count of places, and maps with a bias (neurons come without).
    """
    asked = "graft neurons"
    check_plain(model, asked)
    cuts: dict[tuple[int, str], Cut] = {}
    for site, new in parts.items():
        i = block_of(site, model)
        old = [getattr(model.blocks[i], p) for p in PARTS]
        rows = [old[0].weight, old[1].weight, old[2].weight.T]
        if old[0].bias is not None or old[1].bias is not None:
            raise NetsukeError(asked, f"gate and up of blocks.{i} have a bias", "maps without")
        if any(n.shape != new[0].shape or n.shape[1:] != r.shape[1:] for n, r in zip(new, rows)):
            shapes = " and ".join(str(list(n.shape)) for n in new)
            raise NetsukeError(asked, f"rows of shapes {shapes} for {site}", f"three of [n, {model.cfg.width}]")
        total, count = len(rows[0]) + len(new[0]), len(new[0])
        where = torch.tensor(list(places[site]) if places else range(total - count, total), dtype=torch.long)
        if len(where) != count or (count and not 0 <= int(where.min()) <= int(where.max()) < total):
            raise NetsukeError(asked, f"{len(where)} places for {count} neurons of {site}", f"{count} below {total}")
        fresh = torch.zeros(total, dtype=torch.bool)
        fresh[where] = True
        wide = [r.new_empty(total, r.shape[1]) for r in rows]
        for w, r, n in zip(wide, rows, new):
            w[fresh], w[~fresh] = n.to(w.dtype), r
        linears = {"gate": Dense(wide[0]), "up": Dense(wide[1]), "down": Dense(wide[2].T, old[2].bias)}
        cuts[i, "mlp"] = {"hidden": total}, linears
    return assemble(model, cuts)


def joined(bricks: Iterable[Brick]) -> dict[str, set[int]]:
    """All neurons of several bricks by site."""
    out: dict[str, set[int]] = {}
    for b in bricks:
        if b.kind != "neurons":
            raise NetsukeError(
                f"cut the brick {b.id!r}", f"it is of kind {b.kind!r}", "neurons", "take a plugin off instead"
            )
        for site, indices in b.sites.items():
            out.setdefault(site, set()).update(indices)
    return out


def leaving(manifest: Manifest, ids: Iterable[str], spare: bool = True) -> dict[str, set[int]]:
    """Neurons by site that go with these bricks; `spare` keeps those that other neuron bricks have too."""
    gone = [manifest.brick(name) for name in dict.fromkeys(ids)]
    sites = joined(gone)
    if spare:
        shared = joined(b for b in manifest.bricks if b.kind == "neurons" and b not in gone)
        sites = {site: chosen - shared.get(site, set()) for site, chosen in sites.items()}
    return sites


def remove(model: Llama, manifest: Manifest, ids: Iterable[str], spare: bool = True) -> Llama:
    """A smaller model without these bricks (see `leaving`). Raises NetsukeError for unknown bricks and another base."""
    check_base("of this manifest", manifest.base, fingerprint(model))
    return cut(model, leaving(manifest, ids, spare))


def keep_only(model: Llama, manifest: Manifest, ids: Iterable[str]) -> Llama:
    """A smaller model with these neuron bricks and what belongs to no brick. Raises NetsukeError as `remove`."""
    kept = {manifest.brick(name).id for name in ids}
    return remove(model, manifest, [b.id for b in manifest.bricks if b.kind == "neurons" and b.id not in kept])


def after_removal(manifest: Manifest, smaller: Llama, ids: Iterable[str]) -> Manifest:
    """The manifest of what `remove` (sparing) left: the other neuron bricks, counted anew. Plugins stood on the whole model and
    are not listed."""
    names = set(ids)
    lost, base = leaving(manifest, names), fingerprint(smaller)
    out = []
    for b in manifest.bricks:
        if b.kind == "neurons" and b.id not in names:
            sites = {s: tuple(i - sum(j < i for j in lost.get(s, ())) for i in chosen) for s, chosen in b.sites.items()}
            parents = (*b.parents, manifest.base)  # levels were measured beside neurons that are gone
            out.append(msgspec.structs.replace(b, sites=sites, base=base, parents=parents, levels=None))
    return Manifest(base).plus(*out)
