"""Configurable foundation models: a language model seen as bricks that are found, cut out, plugged in, merged, edited and grown.

"Configurable Foundation Models: Building LLMs from a Modular Perspective", 2024, arXiv 2409.02877: a survey with an empirical
section, which is reproduced here in kind, and four families of operations, of which a small coherent set is built.

What the paper gives and where it is here
    indicators of neurons, average precision of skills, what chance gives    measure/neurons.py
    the manifest of bricks; find, remove, keep only, extract, graft         compress/bricks.py
    groups of neurons and routers (the parent work MoEfication)             compress/neuron_groups.py, train/group_router.py
    plugins on a shared base: attach, merge, subtract, retrieve             layers/adapter.py, compress/adapters.py, train/lora.py
    update: one fact by a rank-one plugin                                   train/edit.py
    models, instances, plugins trained once                                 systems/configurable_fm_cases.py
    what plugins are measured by                                            systems/configurable_fm_plugins.py

What differs, and why
    Seven functions of instructions become five of plain text (code, mathematics, knowledge, writing, translation); an instance
    is 64 tokens of a document. Neurons are scored on train text and cut on test text.
    Cutting is real: layers get narrower. The paper masks.
    Groups: the parent clusters gate rows; clustering by co-activation harms a quarter less and is what is measured here, both are
    there. Its router predicts summed activations; ours predicts their shares, by cross-entropy.
    Plugins average products B A, not the factors A and B (PEFT's "linear", a switch): factors have cross terms.
    Retrieval: mean embeddings by plain cosine find the right plugin for 73 to 100 % of validation texts (code is wide, the others
    narrow); distances in the measure of the texts' own spread find 96 to 100 %.
    Resident neurons: at work, above their layer's median, on more than 90 % of the tokens of every function.

What the controls are
    Masks of the highest, not the lowest; shuffled labels; random neurons cut; bricks of one skill from two halves of its
    instances, whose overlap must be seen; a router that chooses backwards; the next skill's plugin instead of the right one;
    edits without their key; the sixth skill burned into the base.

What cannot be shown here
    Figures of 8B models, abilities that need instructions, stitching of several models by a planner.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import cache

import torch

from netsuke.claims import Claim, Measured
from netsuke.compress import bricks, neuron_groups
from netsuke.compress.adapters import attach, merge
from netsuke.data.domains import DOMAINS, needs
from netsuke.measure.neurons import Activity, listen, overlap, silence, silence_lowest, strength
from netsuke.models.llama import LlamaConfig, random_llama
from netsuke.systems import configurable_fm_cases as cases
from netsuke.systems.configurable_fm_cases import SHORT, SMALL, WIDE, held_out, loss, model_of
from netsuke.systems.configurable_fm_plugins import editing, growing, merging, routing, subtraction
from netsuke.systems.modegpt_cases import STORIES, STORIES_FILES
from netsuke.systems.modegpt_cases import case_of as stories_case
from netsuke.systems.r_sparse import on
from netsuke.tasks.language import token_losses

SHARES, QUICK_SHARES = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8), (0.4, 0.6)
SHARP = ("coding", "math", "translation")  # skills whose neurons the paper finds in most layers
RELATED = {"knowledge", "writing"}  # both are English prose


def on_models(names: tuple[str, ...], measure: Callable[..., Measured], *args, **kwargs) -> Callable[[bool], Measured]:
    """Measures on all models that are there; quickly on the first alone."""
    every, first = (on(n, measure, *args, **kwargs) for n in (names, names[:1]))
    return lambda quick: (first if quick else every)(quick)


def highest_silenced(share: float):
    """The control of masking: the neurons with the highest indicator go."""

    def at(x: torch.Tensor) -> torch.Tensor:
        gone = strength(x, None).topk(round(share * x.shape[-1]), dim=-1).indices
        return x.scatter(-1, gone, 0.0)

    return at


@cache
@torch.no_grad()
def mask_curve(name: str, quick: bool) -> dict[str, dict[str, float]]:
    """Perplexity ratios by share, by |activation|, by output magnitude and for the highest, on test text."""
    if name == STORIES:
        case = stories_case(name, quick)
        model, rows = case.model, [r for r in case.task.batches("test")]
    else:
        model = model_of(name)
        rows = torch.cat([held_out(name, d, quick)[:40] for d in DOMAINS]).split(25)
    norms = [bricks.weights_of("output", b.down) for b in model.blocks]

    def measured(place) -> float:
        model.stand({f"blocks.{i}.hidden": place(i) for i in range(len(model.blocks))})
        try:
            losses = torch.cat([token_losses(model, r).double().flatten() for r in rows])
        finally:
            model.stand({})
        return float(losses.mean())

    model.stand({})
    base = measured(lambda i: lambda x: x)
    out: dict[str, dict[str, float]] = {"activation": {}, "output": {}, "highest": {}}
    for share in QUICK_SHARES if quick else SHARES:
        out["activation"][f"{share}"] = math.exp(measured(lambda i, s=share: silence_lowest(s)) - base)
        out["output"][f"{share}"] = math.exp(measured(lambda i, s=share: silence_lowest(s, norms[i])) - base)
    out["highest"]["0.4"] = math.exp(measured(lambda i: highest_silenced(0.4)) - base)
    return out


def masking(names: list[str], share: float, bar: float, quick: bool, how: str = "output") -> Measured:
    """The lowest neurons of every token and layer silenced; the first model is judged."""
    parts, values = [], {}
    for name in names:
        got = values[name] = mask_curve(name, quick)
        parts.append(f"{name} " + ", ".join(
            f"{float(s):.0%} x {got['activation'][s]:.3f}/{got['output'][s]:.3f}" for s in got["output"]
        ))  # fmt: skip
    if how == "highest":
        got = values[names[0]]["highest"]["0.4"]
        return Measured(f"the highest 40 %: x {got:.1f}", got <= bar)
    return Measured(
        "by activation/by output: " + "; ".join(parts), values[names[0]]["output"][f"{share}"] <= bar, values
    )


def better_indicator(names: list[str], quick: bool, other_way: bool = False) -> Measured:
    """Whether output magnitude harms no more than activation from 40 % on, on all models."""
    values = {}
    for name in names:
        got = mask_curve(name, quick)
        values[name] = {s: got["output"][s] - got["activation"][s] for s in got["output"] if float(s) >= 0.4}
    shown = "; ".join(
        f"{n} " + ", ".join(f"{float(s):.0%} {v:+.4f}" for s, v in row.items()) for n, row in values.items()
    )
    every = [v for row in values.values() for v in row.values()]
    return Measured(shown, all(v >= 0 for v in every) if other_way else all(v <= 0 for v in every), values)


@torch.no_grad()
def inactive(names: list[str], quick: bool) -> Measured:
    """Share of neurons below a fifth of their layer's largest, mean over tokens and layers."""
    values = {}
    for name in names:
        model = model_of(name)
        for indicator in ("activation", "output"):
            heard = [Activity(bricks.weights_of(indicator, b.down)) for b in model.blocks]
            listen(model, heard, [held_out(name, d, quick)[:, :-1] for d in DOMAINS])
            values[f"{name}, {indicator}"] = statistics.fmean(h.low_share() for h in heard)
    shown = "; ".join(f"{n} {v:.1%}" for n, v in values.items())
    return Measured(shown, values[f"{names[0]}, activation"] >= 0.8, values)


def localisation(names: list[str], quick: bool, part: str = "best", shuffled: bool = False) -> Measured:
    """Best and mean average precision of every layer; `part` says which is judged, on the first model."""
    parts, values, met = [], {}, []
    for name in names:
        got, rows, inside, sharp = cases.found(name, quick), {}, [], []
        for i, skill in enumerate(DOMAINS):
            labels = got.labels[skill]
            if shuffled:
                labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(i))]
            scores = [r.precision(labels) for r in got.rankings]
            chance = [got.chance(skill, b) for b in range(len(scores))]
            best, mean = [float(s.max()) for s in scores], [float(s.mean()) for s in scores]
            off = [abs(m - c.mean) - 2 * c.deviation for m, c in zip(mean, chance)]
            rows[skill] = {
                "best": best, "mean": mean, "random": float(labels.double().mean()),
                "best by chance": [c.best_95 for c in chance],
            }  # fmt: skip
            inside.append(max(off) <= 0.05)
            if skill in SHARP:
                sharp.append(sum(b > 0.9 for b in best) > len(best) / 2)
            low, high = min(best), max(best)
            parts.append(
                f"{name} {SHORT[skill]} best {low:.2f} to {high:.2f} (by chance {max(c.best_95 for c in chance):.2f}), mean "
                f"{min(mean):.2f} to {max(mean):.2f} (random {rows[skill]['random']:.2f})"
            )
        values[name] = rows
        met.append(all(sharp) if part == "best" else all(inside))
    return Measured(("shuffled labels: " if shuffled else "") + "; ".join(parts), met[0], values)


@torch.no_grad()
def beyond_tokens(names: list[str], quick: bool) -> Measured:
    """How much less precise every skill's best neurons (mean over layers) are on texts whose tokens are shuffled: what is left
    is token identity. The first model is judged."""
    parts, values = [], {}
    for name in names:
        got, rng = cases.found(name, quick), torch.Generator().manual_seed(0)
        mixed = {}
        for d in DOMAINS:
            ids = cases.scored(name, d, quick)[:, :-1]
            order = torch.rand(ids[:, 1:].shape, generator=rng).argsort(1) + 1
            mixed[d] = torch.cat((ids[:, :1], ids.gather(1, order)), 1)
        other, rows = bricks.find(model_of(name), mixed, cases.SHARE), {}
        for d in DOMAINS:
            pairs = [(float(a.max()), float(b[a.argmax()])) for a, b in zip(got.scores[d], other.scores[d])]
            rows[d] = [statistics.fmean(p[i] for p in pairs) for i in (0, 1)]
        values[name] = rows
        parts.append(f"{name} " + ", ".join(f"{SHORT[d]} {a:.2f} to {b:.2f}" for d, (a, b) in rows.items()))
    lost = [a - b for a, b in values[names[0]].values()]
    return Measured("in order to shuffled: " + "; ".join(parts), min(lost) >= 0.05, values)


def relative(nats: dict[str, float]) -> dict[str, float]:
    """Increase of perplexity as a share, from increases of the loss."""
    return {d: math.expm1(n) for d, n in nats.items()}


def diagonal(rows: dict[str, dict[str, float]]) -> int:
    """How many skills suffer most, and three times as much as the median of the others, where their own neurons went."""
    good = 0
    for skill, nats in rows.items():
        got = relative(nats)
        others = [v for d, v in got.items() if d != skill]
        good += got[skill] > max(others) and got[skill] >= 3 * max(statistics.median(others), 0.0) and got[skill] > 0
    return good


def specialisation(names: list[str], quick: bool, how: str = "all") -> Measured:
    """The matrix of cut skill by scored skill: increase of perplexity; the first model is judged."""
    parts, values = [], {}
    for name in names:
        tables = {how: cases.pruned(name, quick, how)}
        count = sum(int(r.sum()) for r in cases.residents(name, quick))
        if how == "all" and count:
            tables["residents stay"] = cases.pruned(name, quick, "residents stay")
        values[name] = {"nats": tables, "residents": count, "good": {h: diagonal(t) for h, t in tables.items()}}
        lines = []
        for h, table in tables.items():
            cells = []
            for skill, nats in table.items():
                got = relative(nats)
                rest = [v for d, v in got.items() if d != skill]
                cells.append(
                    f"{SHORT[skill]} {got[skill]:+.0%} ({nats[skill]:+.2f} nats; others {min(rest):+.0%} to {max(rest):+.0%})"
                )
            lines.append(f"{h}: {', '.join(cells)}")
        parts.append(f"{name}, {count} residents, {' | '.join(lines)}")
    return Measured("; ".join(parts), values[names[0]]["good"][how] >= 4, values)


def overlaps(names: list[str], quick: bool) -> Measured:
    """Overlap of the top sets of all pairs of skills, mean over layers; judged are unrelated pairs of the first model."""
    parts, values = [], {}
    for name in names:
        manifest, rows = cases.found(name, quick).manifest, {}
        for i, a in enumerate(DOMAINS):
            for b in DOMAINS[:i]:
                pair = manifest.brick(a).sites, manifest.brick(b).sites
                rows[f"{b}-{a}"] = statistics.fmean(
                    overlap(torch.tensor(pair[0][s]), torch.tensor(pair[1][s])) for s in pair[0]
                )
        values[name] = rows
        worst = max(rows, key=rows.get)
        parts.append(f"{name} {min(rows.values()):.3f} to {rows[worst]:.3f} ({worst})")
    judged = [v for pair, v in values[names[0]].items() if set(pair.split("-")) != RELATED]
    return Measured(f"{'; '.join(parts)}; by chance {cases.SHARE}", max(judged) <= 0.10, values)


def same_skill(names: list[str], quick: bool) -> Measured:
    """The control: each skill's bricks from two halves of the instances. They are the same thing, and must be seen to overlap."""
    name, halves = names[0], []
    for half in (slice(None, None, 2), slice(1, None, 2)):
        skills = {d: cases.scored(name, d, quick)[half, :-1] for d in DOMAINS}
        skills = {d: ids if len(ids) >= bricks.LEAST else ids.repeat(2, 1) for d, ids in skills.items()}
        halves.append(bricks.find(model_of(name), skills, cases.SHARE).manifest)
    got = [
        statistics.fmean(overlap(torch.tensor(halves[0].brick(d).sites[s]), torch.tensor(halves[1].brick(d).sites[s]))
                         for s in halves[0].brick(d).sites)
        for d in DOMAINS
    ]  # fmt: skip
    return Measured(f"one skill from two halves of its texts: {min(got):.2f} to {max(got):.2f}", max(got) <= 0.10)


@torch.no_grad()
def groups_at_work(names: list[str], quick: bool, backwards: bool = False) -> Measured:
    """Perplexity ratios with half of the groups of every token, by router; the first model is judged."""
    parts, values = [], {}
    for name in names:
        model, made = model_of(name), cases.moefied(name, quick)
        ids = torch.cat([held_out(name, d, quick) for d in DOMAINS])
        base = statistics.fmean(cases.base_loss(name, d, quick) for d in DOMAINS)
        near = [neuron_groups.similarity(b, g) for b, g in zip(model.blocks, made.groups)]
        ways = {"similarity": (made.groups, near), "mlp": (made.groups, made.trained), "oracle": (made.groups, None),
                "random groups, oracle": (made.random, None)}  # fmt: skip
        if backwards:
            ways = {
                w: (made.groups, [lambda x, r=r: -r(x) for r in made.trained]) for w in ("similarity", "mlp", "oracle")
            }
        got = {}
        for way, (groups, routers) in ways.items():
            model.stand(neuron_groups.gated(model, groups, 0.5, routers))
            try:
                got[way] = math.exp(loss(model, ids) - base)
            finally:
                model.stand({})
        values[name] = got
        parts.append(f"{name}, {made.groups[0].count} groups: " + ", ".join(f"{w} x {v:.3f}" for w, v in got.items()))
    got = values[names[0]]
    met = got["similarity"] <= 1.25 and got["mlp"] <= 1.10 and got["oracle"] <= 1.05
    return Measured(("routers backwards: " if backwards else "") + "; ".join(parts), met, values)


@cache
@torch.no_grad()
def group_times(quick: bool) -> dict[str, float]:
    """Seconds of a feed-forward part, 1,024 wide with 4,096 neurons, for one token: dense, half of 64 groups chosen by a
    trained-size router, and all of them; alternating, several parts in turn so that none stays in the cache."""
    width, hidden, parts = 1024, 4096, 2 if quick else 4
    cfg = LlamaConfig.uniform(
        parts, hidden, vocab=64, width=width, heads=4, kv_heads=4, head_dim=width // 4, context=64
    )
    model = random_llama(cfg, 0)
    groups = [neuron_groups.random_groups(hidden, 64, i) for i in range(parts)]
    torch.manual_seed(0)
    routers = [
        torch.nn.Sequential(torch.nn.Linear(width, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64)) for _ in groups
    ]
    made = {
        share: [neuron_groups.GroupedMLP(b, g, r, share) for b, g, r in zip(model.blocks, groups, routers)]
        for share in (0.5, 1.0)
    }
    tokens = torch.randn(20 if quick else 40, 1, 1, width, generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[float]] = {"dense": [], "half": [], "all": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for x in tokens:
            for way, run in (
                ("dense", [b.feed for b in model.blocks]), ("half", made[0.5]), ("all", made[1.0]),
            ):  # fmt: skip
                begin = time.perf_counter()
                for part in run:
                    part(x)
                seconds[way].append((time.perf_counter() - begin) / parts)
    finally:
        torch.set_num_threads(threads)
    return {way: statistics.median(s) for way, s in seconds.items()}


def group_speed(quick: bool, share: str = "half") -> Measured:
    got = group_times(quick)
    ratio = got["dense"] / got[share]
    shown = (
        f"{share} of the groups {ratio:.2f}x ({got['dense'] * 1e3:.2f} to {got[share] * 1e3:.2f} ms a token, 1 thread)"
    )
    return Measured(shown, ratio >= 1.2, got)


@torch.no_grad()
def exactness(names: list[str], quick: bool, spoiled: bool = False) -> Measured:
    """A cut equals the mask; what is put back equals the model bit for bit (`spoiled`: another brick is put there); plugins
    leave no trace on the base. The first model."""
    name = names[0]
    model, manifest = model_of(name), cases.found(name, quick).manifest
    ids, sites = held_out(name, DOMAINS[0], quick)[:4], manifest.brick("writing").sites
    smaller, sha = bricks.cut(model, sites), bricks.fingerprint(model)
    model.stand({s: silence(torch.tensor(c)) for s, c in sites.items()})
    try:
        off = float((smaller(ids) - model(ids)).abs().max())
    finally:
        model.stand({})
    parts = bricks.extract(model, manifest.brick("coding" if spoiled else "writing").sites)
    same = bricks.fingerprint(bricks.graft(smaller, parts, sites)) == sha
    two = [cases.plugin(name, d, quick) for d in ("coding", "math")]
    attach(model, merge(two, [0.7, 0.3], "both"))(ids)
    kept, saved = bricks.fingerprint(model) == sha, 1 - smaller.bytes() / model.bytes()
    shown = f"{name}: cut against mask {off:.0e}; put back identical: {same}; base as it was: {kept}; {saved:.1%} cut"
    return Measured(("another brick put back: " if spoiled else "") + shown, off <= 1e-3 and same and kept)


OURS = (WIDE, SMALL)
ALL = (WIDE, SMALL, STORIES)
FILES = needs()
CLAIMS = [
    Claim(
        "neurons below a fifth of their layer's largest, wide and small", "80 % of the neurons (Llama-3-8B, Mistral-7B)",
        "≥ 80 %, by activation", on_models(OURS, inactive), None, FILES,
    ),
    Claim(
        "the lowest 40 % of neurons silenced per token, stories260K", "70 to 80 %: almost no loss (7B and 8B)",
        "x ≤ 1.02, by output magnitude",
        on((STORIES,), masking, 0.4, 1.02), on((STORIES,), masking, 0.4, 1.02, how="highest"), STORIES_FILES,
    ),
    Claim(
        "the lowest 60 % of neurons silenced per token, wide and small", "70 to 80 %: almost no loss (7B and 8B)",
        "x ≤ 1.05, by output magnitude",
        on_models(OURS, masking, 0.6, 1.05), on((WIDE,), masking, 0.6, 1.05, how="highest"), FILES,
    ),
    Claim(
        "output magnitude names the idle neurons better than activation", "80 % instead of 70 % may go",
        "harm ≤ from 40 % on, every model",
        on_models(ALL, better_indicator), on_models(ALL, better_indicator, other_way=True), FILES,
    ),
    Claim(
        "the best neuron of a skill in every layer: average precision", "coding, math, translation > 0.8 in most layers",
        "> 0.9 in most layers for these three",
        on_models(OURS, localisation), on((WIDE,), localisation, shuffled=True), FILES,
    ),
    Claim(
        "the mean neuron of every layer knows no skill", "as random activations",
        "all skills and layers: random ± 0.05 and sampling error", on_models(OURS, localisation, part="mean"), None, FILES,
    ),
    Claim(
        "neurons of a skill know more than which tokens occur", "not asked", "every skill ≥ 0.05 less precise on shuffled tokens",
        on_models(OURS, beyond_tokens), None, FILES,
    ),
    Claim(
        "the best 5 % of neurons of a skill cut out: perplexity of all skills",
        "own +32 to 444 %, others +3 to 26 % (Llama-3-8B; knowledge an exception)",
        "4 of 5: own is the row's largest, ≥ 3x the others' median",
        on_models(OURS, specialisation), on((WIDE,), specialisation, how="random"), FILES,
    ),
    Claim(
        "overlap of the top 5 % of two skills", "0.00 to 0.09", "≤ 0.10 but for related pairs",
        on_models(OURS, overlaps), on((WIDE,), same_skill), FILES,
    ),
    Claim(
        "half of the groups of neurons run: perplexity", "25 of 96 groups (T5-base, the parent work)",
        "similarity ≤ 1.25x, trained router ≤ 1.10x, oracle ≤ 1.05x",
        on_models(OURS, groups_at_work), on((WIDE,), groups_at_work, backwards=True), FILES,
    ),
    Claim(
        "half of the groups run for real, width 1,024, one token", "", "≥ 1.2x", group_speed,
        lambda quick: group_speed(quick, "all"),
    ),
    Claim(
        "plugins of rank 4, found by the mean embedding of a text", "retrieval on token, sentence or task level",
        "≥ 95 % right; routed loss ≤ one plugin of all tasks of equal size",
        on_models(OURS, routing), on((WIDE,), routing, shift=1), FILES,
    ),
    Claim(
        "two plugins merged by their mean", "weighted averages of same-shape bricks", "below the base's loss on both",
        on_models(OURS, merging), on((WIDE,), merging, weights=(-0.5, -0.5)), FILES,
    ),
    Claim(
        "a plugin subtracted from the base", "removes a skill", "own loss rises ≥ 2x the others' change",
        on_models(OURS, subtraction), on((WIDE,), subtraction, sign=1.0), FILES,
    ),
    Claim(
        "one fact edited", "locate and edit columns of W_O", "prompt and paraphrase follow; other text's loss ± 1 %",
        on_models(OURS, editing), on((WIDE,), editing, without_key=True), FILES,
    ),
    Claim(
        "a sixth skill grown as a plugin", "the old parts frozen", "the five others bit-identical; routed within 0.5 %",
        on_models(OURS, growing), on((WIDE,), growing, into_base=True), FILES,
    ),
    Claim(
        "cut, put back, attach: exact", "", "mask 1e-3; put back and base bit for bit",
        on((WIDE,), exactness), on((WIDE,), exactness, spoiled=True), FILES,
    ),
    Claim("the same on models of 8B parameters, on instructions", "Llama-3-8B, Mistral-7B", why="no such models here"),
    Claim("bricks of several models stitched by a planner", "HuggingGPT and others", why="needs models that follow orders"),
]  # fmt: skip
