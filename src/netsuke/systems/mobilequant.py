"""MobileQuant: every tensor of a small language model on a fixed 8-bit grid, with transformations and ranges learned end to end.

"MobileQuant: Mobile-friendly Quantization for On-device Language Models", EMNLP 2024 Findings, arXiv 2408.13933.

What the paper gives and where it is here
    the bit map of a decoder layer, static ranges from calibration, their export      compress/static.py
    affine and symmetric formats, learnable clips, straight-through rounding          compress/fake_quant.py
    equivalent transformations at every pair, folded or applied while learning        compress/equivalent.py
    smoothing, then transformations, clips and ranges learned together, end to end
    or block by block                                                                 train/mobilequant.py
    grids in the artifact                                                             layers/static.py, models/static_sites.py
    integer-only execution (the paper's is an NPU's)     runtime/integer.py, in C native/src/integer.c, runtime/integer_native.py

What differs, and why
    The official code is under a licence that forbids commercial use; nothing of it is here. q↔k scales are tied over rotary
    pairs, without which they are not exact (the control of the folding claim). Ranges are learned as logarithms of their ends;
    the paper's steps of 1e-6 on a scale and a zero point are a switch and do nothing in hundreds of steps. Learning is short:
    160 steps of 2 windows on stories260K, 64 on `wide`, rates to match, against 60,000 of one window. Norm weights are rounded to
    16 bits but not clipped. 16-bit grids are symmetric, so that int16 holds them.

Models
    stories260K (real, trained by others; grouped queries, so v→o and q↔k stay out as in the paper) and `wide` (ours, 6.8 M, a
    key head for every query head, all pairs). Neither has the outliers of large models: they are planted, two channels of every
    norm 40 times larger, undone where they are read, as a test whose answer is known.

What the controls are
    quality: 4-bit weights with one scale per map; planted outliers: smoothing on the wrong channels; folding: untied rotary
    pairs; integers: one zero point off by one

What cannot be shown here
    Latency and energy on an NPU; TinyLlama, StableLM and Gemma on WikiText, ARC and HellaSwag.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from netsuke.claims import Claim, Measured
from netsuke.compress.equivalent import PAIRS, fold, pair_sizes
from netsuke.data import domains
from netsuke.errors import NetsukeError
from netsuke.layers.static import StaticGrid
from netsuke.models.load import find
from netsuke.runtime.integer import IntegerModel
from netsuke.runtime.integer_check import agreement, greedy_in_float64
from netsuke.runtime.integer_native import NativeInteger
from netsuke.systems.mobilequant_cases import (
    FACTOR,
    STORIES,
    WIDE_MODEL,
    case_of,
    coarse,
    excess,
    float_nats,
    knobs,
    nats,
    planted,
    site_table,
    treated,
    wrongly_smoothed,
)
from netsuke.systems.mobilequant_speed import CHUNK, map_bytes, rates
from netsuke.systems.modegpt_cases import STORIES_FILES

ORDER = ("rtn", "smooth", "lwc", "let", "all")  # of the ablation
SLACK = 0.005  # nats


def w8a8(name: str, bar: float, quick: bool) -> Measured:
    got = {t: float(np.exp(excess(name, "w8a8", t, quick))) for t in ("rtn", "smooth", "all")}
    shown = (
        f"x {got['all']:.4f} of {np.exp(float_nats(name, quick)):.3f}; rounding to nearest x {got['rtn']:.4f}, smoothed "
        f"x {got['smooth']:.4f} ({knobs(name, 'w8a8', 'all', 0, quick).epochs} epochs)"
    )
    return Measured(shown, None if quick else got["all"] <= bar, got)


def coarse_weights(name: str, bar: float, quick: bool) -> Measured:
    ratio = float(np.exp(nats(name, coarse(name, quick), quick) - float_nats(name, quick)))
    return Measured(f"4-bit weights, one scale per map: x {ratio:.3f}", ratio <= bar, {"ratio": ratio})


def outliers(name: str, quick: bool) -> Measured:
    same = float(np.exp(nats(name, planted(name, quick), quick) - float_nats(name, quick)))
    got = {t: float(np.exp(excess(name, "w8a8", t, quick, outliers=True))) for t in ("rtn", "smooth", "all")}
    shown = (
        f"untreated x {got['rtn']:.2f}, smoothed x {got['smooth']:.4f}, learned x {got['all']:.4f} "
        f"(planted x {FACTOR:g}: the float model stays at x {same:.6f})"
    )
    met = got["rtn"] >= 1.5 and got["all"] <= 1.03 and abs(same - 1) < 1e-4
    return Measured(shown, None if quick else met, {**got, "planted": same})


def wrong_channels(name: str, quick: bool) -> Measured:
    ratio = float(np.exp(nats(name, wrongly_smoothed(name, quick), quick) - float_nats(name, quick)))
    return Measured(f"smoothing on the wrong channels: x {ratio:.2f}", ratio <= 1.03, {"ratio": ratio})


def learned_against_rounding(name: str, bar: float, quick: bool) -> Measured:
    got = {t: excess(name, "w4a8", t, quick) for t in ("rtn", "all")}
    share = got["all"] / got["rtn"]
    shown = f"{share:.3f}x ({got['all']:.4f} against {got['rtn']:.4f} nats over the float model's {float_nats(name, quick):.4f})"
    return Measured(shown, None if quick else share <= bar, {**got, "share": share})


def end_to_end(name: str, seeds: int, quick: bool) -> Measured:
    """Mean excess loss of both orders at equal steps per block."""
    runs = {
        how: [excess(name, "w4a8", how, quick, seed) for seed in range(1 if quick else seeds)]
        for how in ("all", "blockwise")
    }
    mean = {how: statistics.fmean(values) for how, values in runs.items()}
    shown = f"end to end {mean['all']:.4f}, block by block {mean['blockwise']:.4f} nats over float, {len(runs['all'])} seeds"
    return Measured(shown, None if quick else mean["all"] <= mean["blockwise"], {"mean": mean, "runs": runs})


def targets(name: str, quick: bool) -> Measured:
    got = {t: excess(name, "w4a8", t, quick) for t in ("all", "normed", "logits", "paper's ranges")}
    words = {
        "all": "stream",
        "normed": "normed stream",
        "logits": "logits",
        "paper's ranges": "stream, ranges as in the paper",
    }
    shown = ", ".join(f"{words[t]} {v:.4f}" for t, v in got.items()) + " nats over float"
    return Measured(shown, None if quick else got["all"] <= min(got.values()) + SLACK, got)


def ablation(name: str, quick: bool) -> Measured:
    got = {t: excess(name, "w4a8", t, quick) for t in ORDER}
    falls = all(got[b] <= got[a] + SLACK for a, b in pairwise(ORDER))
    words = dict(zip(ORDER, ("rounding", "+ smoothing", "+ clips", "+ transformations", "+ ranges")))
    shown = ", ".join(f"{words[t]} {v:.4f}" for t, v in got.items()) + " nats over float"
    return Measured(shown, None if quick else falls, got)


def sixteen_bits(name: str, quick: bool) -> Measured:
    """The table that answers which tensor needs 16 bits, and what the bit map's exceptions are worth."""
    rows, map_, none = site_table(name, quick), *(excess(name, "w8a8", t, quick) for t in ("smooth", "narrow"))
    worst = ", ".join(f"{r['site']} {r['nats_8']:.4f}" for r in rows[:6])
    shown = f"all sites at 8 bits {none:.4f}, the map {map_:.4f} nats over float; worst sites alone at 8 bits: {worst}"
    return Measured(shown, None if quick else none > map_, {"map": map_, "none": none, "sites": rows})


@torch.no_grad()
def folding(names: tuple[str, ...], quick: bool, tied: bool = True) -> Measured:
    """Largest change of a logit over the largest, for random scales from 0.1 to 10 at every pair; untied is the control."""
    worst: dict[str, float] = {}
    for name in names:
        case, rng = case_of(name, quick), torch.Generator().manual_seed(0)
        model, ids = case.model, next(iter(case.task.batches("validation")))[:2, :-1]
        want = model(ids)
        for pair in PAIRS if tied else ("q_k",):
            sizes = {i: pair_sizes(model.cfg, i, grouped=True)[pair] for i in range(len(model.blocks))}
            if tied:
                scales = {f"blocks.{i}.{pair}": 10 ** (2 * torch.rand(n, generator=rng) - 1) for i, n in sizes.items()}
                other = fold(model, scales)
            else:
                other = fold(model, {})
                for i, block in enumerate(other.blocks):
                    s = 10 ** (2 * torch.rand(model.cfg.kv_heads, 2 * model.cfg.pair_count(i), generator=rng) - 1)
                    block.k.weight.mul_(s.reshape(-1)[:, None])
                    queries = s.repeat_interleave(model.cfg.heads // model.cfg.kv_heads, 0).reshape(-1)
                    block.q.weight.div_(queries[:, None])
            change = float((other(ids) - want).abs().max() / want.abs().max())
            worst[pair] = max(worst.get(pair, 0.0), change)
    shown = ", ".join(f"{p} {v:.1e}" for p, v in worst.items()) + f" ({' and '.join(names)})"
    return Measured(
        shown if tied else f"every dimension of a rotary pair its own scale: {shown}",
        max(worst.values()) <= 1e-4,
        worst,
    )


def integers(name: str, quick: bool, spoiled: bool = False) -> Measured:
    """Codes of the executor beside the simulation's, W8A8 and W4A8, operators fed alike and running freely; greedy text."""
    case, values, words, met = case_of(name, quick), {}, [], True
    ids = next(iter(case.task.batches("test")))[0, : 48 if quick else 192]
    for scheme in ("w8a8", "w4a8"):
        model = treated(name, scheme, "all", quick)
        integer = IntegerModel.of_model(model)
        if not spoiled:
            native = NativeInteger(integer).forward(ids.tolist(), every=True)
            values[f"{scheme} in C"] = same_in_c = bool(np.array_equal(native, integer.forward(ids.tolist())))
            met &= same_in_c
        if spoiled:
            up = integer.blocks[0].linear["up"]
            up.x = StaticGrid(up.x.scale, up.x.zero + 1, 8)
        for forced in (True, False):
            found, made, wanted = agreement(model, integer, ids, forced)
            narrow = [r for r in found.values() if r.bits == 8]
            count, different = sum(r.count for r in narrow), sum(r.different for r in narrow)
            row = {
                "codes": count, "different": different, "largest": max(r.largest for r in narrow),
                "logits": float(np.abs(made - wanted).max() / np.abs(wanted).max()),
            }  # fmt: skip
            values[f"{scheme} {'forced' if forced else 'free'}"] = row
            if forced:
                met &= different <= 1e-3 * count and row["largest"] <= 1
                words.append(f"{scheme}: {different} of {count:,} 8-bit codes differ, by {row['largest']} at most")
            else:
                words.append(f"running freely {different}, logits within {row['logits']:.0e}")
        length = 16 if quick else 64
        prompt = ids[:8].tolist()
        same = list(integer.generate(prompt, length)) == greedy_in_float64(model, prompt, length)
        values[f"{scheme} same text"] = same
        met &= same
        words.append(f"{'the same' if same else 'another'} text over {length} tokens")
    return Measured(("a zero point off by one: " if spoiled else "") + "; ".join(words), met, values)


def speed(quick: bool) -> Measured:
    """Decoding and prompt rates over float32's; the 8-bit integer-only decoder is judged."""
    got = rates(quick)
    base = got.pop("float32")
    ratio = {way: {what: r[what] / base[what] for what in base} for way, r in got.items()}
    shown = "; ".join(f"{way}: decode {r['decode']:.2f}x, prompt {r['prompt']:.2f}x" for way, r in ratio.items())
    judged = ratio["integers, 8 bits"]
    met = judged["decode"] >= 2 and judged["prompt"] >= 1.5
    return Measured(
        f"{shown} of float32, one block, one thread", None if quick else met, {"rates": got | {"float32": base}, "ratios": ratio}
    )  # fmt: skip


def smaller(quick: bool) -> Measured:
    got = map_bytes(512 if quick else 4096)
    ratio = {b: got[32] / got[b] for b in (8, 4)}
    shown = f"8 bits {ratio[8]:.3f}x, 4 bits {ratio[4]:.3f}x smaller than float32, scales and zero points included"
    return Measured(shown, round(ratio[8], 1) >= 4.0 and ratio[4] >= 7.5, {str(k): v for k, v in got.items()})


def on(name: str, measure: Callable[..., Measured], *args) -> Callable[[bool], Measured]:
    """A measurement on one model; where it is not installed, that is what is shown."""

    def run(quick: bool) -> Measured:
        if name != STORIES:
            try:
                find(name)
            except NetsukeError:
                return Measured(f"the model {name!r} is not installed", None)
        return measure(name, *args, quick)

    return run


def on_all(measure: Callable[..., Measured], **rest) -> Callable[[bool], Measured]:
    """On stories260K and, where it is installed, on `wide`."""

    def run(quick: bool) -> Measured:
        try:
            find(WIDE_MODEL)
        except NetsukeError:
            return measure((STORIES,), quick, **rest)
        return measure((STORIES, WIDE_MODEL), quick, **rest)

    return run


def _claims() -> list[Claim]:
    out = []
    for name in (STORIES, WIDE_MODEL):
        data = STORIES_FILES if name == STORIES else domains.needs()
        out += [
            Claim(
                f"W8A8 with static activations, {name}", "near-lossless: 15.5 on WikiText (TinyLlama-1.1B)", "x ≤ 1.02",
                on(name, w8a8, 1.02), on(name, coarse_weights, 1.02), data,
            ),
            Claim(
                f"planted outliers, W8A8, {name}", "", "untreated x ≥ 1.5, after steps 0 to 4 x ≤ 1.03",
                on(name, outliers), on(name, wrong_channels), data,
            ),
            Claim(
                f"W4A8: learned against rounded, {name}", "17.1 on WikiText (TinyLlama-1.1B)", "≤ 0.6 of the excess loss",
                on(name, learned_against_rounding, 0.6), None, data,
            ),
            Claim(
                f"W4A8: end to end against block by block at equal steps, {name}", "end to end is better", "≤ block by block",
                on(name, end_to_end, 3 if name == STORIES else 1), None, data,
            ),
            Claim(
                f"W4A8: every step helps, {name}", "rounding > smoothing > clips > transformations > ranges",
                f"not rising by more than {SLACK} nats", on(name, ablation), None, data,
            ),
            Claim(
                f"16-bit exceptions are worth it, {name}", "residual stream, logits and weights of attention at 16 bits",
                "less loss than 8 bits everywhere", on(name, sixteen_bits), None, data,
            ),
            Claim(
                f"integers only: the simulation's codes, {name}", "runs on an NPU",
                "≥ 99.9 % of 8-bit codes equal, none off by more than 1, the same greedy text over 64 tokens",
                on(name, integers), on(name, lambda n, quick: integers(n, quick, spoiled=True)), data,
            ),
        ]  # fmt: skip
    return out


CLAIMS = [
    *_claims(),
    Claim(
        "what end-to-end learning minimises, stories260K", "mean squares of the stream",
        f"the stream within {SLACK} nats of the best", on(STORIES, targets), None, STORIES_FILES,
    ),
    Claim(
        "folding is exact at every pair", "", "1e-4 of the largest logit",
        on_all(folding), on_all(folding, tied=False), STORIES_FILES,
    ),
    Claim(
        f"integers only at 4096 by 4096, against float32, prompt of {CHUNK}", "faster by 20 to 50 % (NPU)",
        "8 bits: decode ≥ 2x, prompt ≥ 1.5x", speed,
    ),
    Claim("maps of 4096 by 4096 are smaller", "", "4.0x at 8 bits, 7.5x at 4 bits", smaller),
    Claim(
        "latency and energy −20 % to −50 % on a phone's NPU", "−20 % to −50 % (Snapdragon 8 Gen 3)",
        why="no NPU is here, and no joules are measured",
    ),
    Claim(
        "WikiText, ARC-C and HellaSwag of TinyLlama, StableLM-2 and Gemma", "15.5 / 31.9 / 59.2 (TinyLlama, W8A8)",
        why="models of 1 to 2 billion weights and these suites are not here",
    ),
]  # fmt: skip
