"""What plugins of configurable foundation models are measured by: routing, merging, subtracting, editing, growing.

Each function takes names of models, of which the first is judged and all are shown; claims are in configurable_fm.py.
"""

from __future__ import annotations

import statistics

import torch

from netsuke.claims import Measured
from netsuke.compress.adapters import Plugin, attach, burned, merge
from netsuke.data.domains import DOMAINS
from netsuke.systems import configurable_fm_cases as cases
from netsuke.systems.configurable_fm_cases import EDITED, FACTS, SHORT, SIXTH, held_out, loss, model_of
from netsuke.train.edit import key_gram, make_edit, says


def routed_loss(
    name: str, quick: bool, sixth: bool = False, shift: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """Skill -> share of held-out texts that find their plugin, and the loss by what was chosen (`shift`: by another one)."""
    rack = cases.rack(name, quick, sixth)
    names, right, losses = list(rack.models), {}, {}
    for d in DOMAINS:
        ids = held_out(name, d, quick)
        chosen = rack.choose(ids)
        right[d] = sum(c == d for c in chosen) / len(chosen)
        total = 0.0
        for c in dict.fromkeys(chosen):
            rows = ids[torch.tensor([x == c for x in chosen])]
            total += loss(rack.models[names[(names.index(c) + shift) % len(names)]], rows) * len(rows)
        losses[d] = total / len(ids)
    return right, losses


def routing(names: list[str], quick: bool, shift: int = 0) -> Measured:
    """The first model is judged."""
    parts, values, met = [], {}, []
    for name in names:
        right, losses = routed_loss(name, quick, shift=shift)
        one = attach(model_of(name), cases.multitask(name, quick))
        ours, single = (
            statistics.fmean(v) for v in (losses.values(), [loss(one, held_out(name, d, quick)) for d in DOMAINS])
        )
        base = statistics.fmean(cases.base_loss(name, d, quick) for d in DOMAINS)
        values[name] = {"right": right, "routed": losses, "multitask": single, "base": base}
        met.append(min(right.values()) >= 0.95 and ours <= single)
        parts.append(f"{name} {min(right.values()):.0%} to {max(right.values()):.0%} right; {ours:.3f} nats, one of all tasks "
                     f"{single:.3f}, base {base:.3f}")  # fmt: skip
    return Measured(("the next plugin each time: " if shift else "") + "; ".join(parts), met[0], values)


def change(name: str, made: Plugin, domain: str, quick: bool) -> float:
    """Loss of a domain with a plugin, less the base's."""
    return loss(attach(model_of(name), made), held_out(name, domain, quick)) - cases.base_loss(name, domain, quick)


def merging(names: list[str], quick: bool, weights: tuple[float, float] = (0.5, 0.5)) -> Measured:
    """Mean of two plugins on both of their skills; the first model is judged."""
    parts, values, met = [], {}, []
    for name in names:
        rows = {}
        for a, b in (("coding", "writing"), ("math", "translation")):
            two = [cases.plugin(name, d, quick) for d in (a, b)]
            for how in ("products", "factors"):
                both = merge(two, weights, f"{a}+{b}", how)
                rows[f"{a}+{b}, {how}"] = [change(name, both, d, quick) for d in (a, b)]
        values[name] = rows
        met.append(all(max(v) < 0 for n, v in rows.items() if n.endswith("products")))
        parts.append(f"{name} " + ", ".join(f"{n} {v[0]:+.3f}/{v[1]:+.3f}" for n, v in rows.items()))
    return Measured(
        ("weights −½: " if weights[0] < 0 else "") + "nats against the base: " + "; ".join(parts), met[0], values
    )


def subtraction(names: list[str], quick: bool, sign: float = -1.0) -> Measured:
    """A plugin taken off the base (weight −1): what it does to its own skill and to the others; the first model is judged."""
    parts, values, met = [], {}, []
    for name in names:
        rows = {}
        for skill in DOMAINS:
            less = merge([cases.plugin(name, skill, quick)], [sign], f"no {skill}")
            rows[skill] = {d: change(name, less, d, quick) for d in DOMAINS}
        good = {s: r[s] >= 2 * statistics.fmean(abs(v) for d, v in r.items() if d != s) for s, r in rows.items()}
        values[name] = rows
        met.append(all(good.values()))
        parts.append(f"{name} {sum(good.values())} of 5: " + ", ".join(
            f"{SHORT[s]} {r[s]:+.2f} (others {statistics.fmean(v for d, v in r.items() if d != s):+.2f})" for s, r in rows.items()
        ))  # fmt: skip
    return Measured("nats: " + "; ".join(parts), met[0], values)


@torch.no_grad()
def editing(names: list[str], quick: bool, without_key: bool = False) -> Measured:
    """Facts edited one at a time; the first model is judged on all of them."""
    parts, values, met = [], {}, []
    for name in names:
        model, rows = model_of(name), {}
        gram = key_gram(model, EDITED, [cases.scored(name, d, quick)[: cases.ROUTED, :-1] for d in DOMAINS])
        other = torch.cat([held_out(name, d, quick)[:20] for d in DOMAINS])
        base = loss(model, other)
        for prompt, target, near, far in FACTS[:1] if quick else FACTS:
            facts = [cases.fact_of(name, text, target, quick) for text in (prompt, near, far)]
            made = make_edit(model, facts[0], EDITED, gram, "fact")
            if without_key:
                (first, second), rng = made.thin[f"blocks.{EDITED}.down"], torch.Generator().manual_seed(0)
                turned = torch.nn.functional.normalize(torch.randn(first.shape, generator=rng)) * first.norm()
                made = Plugin("fact", made.base, {f"blocks.{EDITED}.down": (turned, second)})
            edited = attach(model, made)
            rows[prompt] = {
                "before": says(model, facts[0].prompt, facts[0].target),
                "after": [says(edited, f.prompt, f.target) for f in facts],
                "other": loss(edited, other) / base - 1,
            }
        values[name] = rows
        ok = [all(r["after"][:2]) and not r["before"] and abs(r["other"]) < 0.01 for r in rows.values()]
        met.append(all(ok))
        worst = max(abs(r["other"]) for r in rows.values())
        hits = [sum(r["after"][i] for r in rows.values()) for i in range(3)]
        parts.append(
            f"{name}: of {len(rows)} facts {hits[0]} follow the prompt, {hits[1]} with a word changed, {hits[2]} in another "
            f"sentence (not judged); other text's loss changes by at most {worst:.2%}"
        )
    return Measured(("no key: " if without_key else "") + "; ".join(parts), met[0], values)


@torch.no_grad()
def growing(names: list[str], quick: bool, into_base: bool = False) -> Measured:
    """A sixth skill, Polish, as one more plugin. Not routed: outputs of the five others before and after; routed: their losses.
    The first model is judged."""
    parts, values, met = [], {}, []
    for name in names:
        before = cases.rack(name, quick)
        texts = {d: held_out(name, d, quick)[:8] for d in DOMAINS}
        plain = {d: before.models[d](ids) for d, ids in texts.items()}
        polish = cases.plugin(name, SIXTH, quick)
        if into_base:
            grown = burned(model_of(name), polish)
            same = all(torch.equal(model_of(name)(ids), grown(ids)) for ids in texts.values())
            rise = max(loss(grown, held_out(name, d, quick)) / cases.base_loss(name, d, quick) - 1 for d in DOMAINS)
            parts.append(f"{name}: burned into the base, identical: {same}, loss up to {rise:+.1%}")
            met.append(same and rise <= 0.005)
            continue
        after = cases.rack(name, quick, sixth=True)
        same = all(torch.equal(after.models[d](ids), plain[d]) for d, ids in texts.items())
        _, old = routed_loss(name, quick)
        right, new = routed_loss(name, quick, sixth=True)
        rise = max(new[d] / old[d] - 1 for d in DOMAINS)
        own = cases.base_loss(name, SIXTH, quick), loss(after.models[SIXTH], held_out(name, SIXTH, quick))
        found = after.choose(held_out(name, SIXTH, quick))
        share = sum(c == SIXTH for c in found) / len(found)
        values[name] = {"identical": same, "rise": rise, "right": right, "polish": own, "polish found": share}
        met.append(same and rise <= 0.005 and own[1] < own[0])
        parts.append(f"{name}: identical: {same}; routed losses at most {rise:+.2%}; Polish {own[0]:.2f} to {own[1]:.2f} nats, "
                     f"found for {share:.0%} of its texts")  # fmt: skip
    return Measured("; ".join(parts), met[0], values)
