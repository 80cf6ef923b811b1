"""Tiny language models: four recipes that make a small model better at a fixed budget of parameters.

"Rethinking Optimization and Architecture for Tiny Language Models" (PanGu-π Pro), ICML 2024, arXiv 2402.02791.

What the paper gives and where it is here
    compact tokenizer: frequent pieces stay, the parameters go to the body      models/tokenizer_trim.py
    shape: depth and width at equal parameters, a floor in tokens/s             models/shapes.py, runtime/shape_speed.py
    random weights of one constant deviation                                    models/llama.py (random_llama)
    inheritance: layer-skip profile; random, L1, L2, Taylor, learned masks       compress/inherit.py, compress/unit_scores.py
    second round over hard batches                                              train/rounds.py
    bits per byte of five domains                                               tasks/domains.py, data/domains.py
    the trainings, one resumable cell each, and what is chosen from them        tinylm_cells.py, tinylm_study.py
    the measurements on tokenizers                                              tinylm_vocabulary.py

What differs, and why
    Everything is about 700 times smaller: 1.5 M parameters, 0.8 M tokens a training (the card has 2 M for the tokenizers and
    2 to 10 M tokens), five domains of English, code and catalogue translations instead of 1.6 T tokens. One training is one
    to two minutes; the whole is about 100 on one core. Tables are tied (the paper unties them): their share is half as large.
    Trainings are equal in tokens, as in the paper: a larger vocabulary sees more text in them. Scores are of equal bytes.
    Every choice is made on validation text: vocabulary, shape, score, draw. Test text gives the figures of the table.
    The teacher, `wide`, was trained on the same domains with 2,048 pieces of its own. A student under another vocabulary
    starts from its rows: a piece that both have keeps its row, another is the mean of the pieces that spell it.
    The stack's shape is the best of the drawn ones that can be cut from the teacher: 6 blocks, 256 wide at most.

Where paper and released files disagree, or say too little
    Trimming   released: by frequency alone, so that pieces whose parts are gone are never reached again (rule "frequency");
               the default, "closed", keeps the parts of what it keeps
    Shape      20 blocks, 8/3, rate 1e-4 (configuration) against 21, 2.77, 2e-4 (table): models/shapes.py has both
    Mask       not released: hard gates that close gradually, straight-through gradients
    Second round   softmax over means of large batches is almost uniform: the published draw (temperature 1, by batch) stands
               beside one by sequences at 0.3; validation text chooses, the effective sample size is printed

What the controls are
    A tokenizer that lacks one byte. Rows of the table one off. The released rule, where pieces must stay reachable. Shapes whose
    feed-forward part is not fitted. Inheritance whose embedding forgets the channels' common gate. Random units, where scores
    must beat L1. Random weights, for the layer-skip profile.

What cannot be shown here
    Accuracies on benchmarks, effects of 1.6 T tokens, the comparison with Qwen, Phi and Open-LLaMA.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np

from netsuke.claims import Claim, Measured
from netsuke.compress.inherit import skip_profile
from netsuke.data import domains
from netsuke.errors import NetsukeError
from netsuke.models.llama import Llama, LlamaConfig, random_llama
from netsuke.models.load import load
from netsuke.models.shapes import candidates, expansion, find_shape, parameters
from netsuke.runtime.shape_speed import engine_speed
from netsuke.systems.tinylm_cells import (
    DATA,
    MISALIGNED,
    SCORES,
    TEACHER,
    config,
    drawn_shapes,
    own_rows,
    scale,
    task_of,
)
from netsuke.systems.tinylm_study import (
    STEPS,
    bits,
    chosen_draw,
    chosen_score,
    chosen_shape,
    chosen_vocab,
    mean,
    on_top,
    rounds,
    shaped,
    stack,
    tenth_loss,
    whole_way,
)
from netsuke.systems.tinylm_vocabulary import (
    VOCABULARIES,
    best_vocabulary,
    coverage,
    lossless,
    ours,
    real_vocabularies,
    sliced,
    verdict,
)
from netsuke.tasks.domains import DomainModeling

GAINS = {"0.1": 0.30, "0.5": 0.10, "1.0": 0.05}  # nats, by share of the training


def here(measure: Callable[..., Measured], *args, **rest) -> Callable[[bool], Measured]:
    """`measure(*args, quick)`; a model or a text that is absent is the reason why nothing can be shown."""

    def run(quick: bool) -> Measured:
        try:
            return measure(*args, quick, **rest)
        except NetsukeError as e:
            return Measured(str(e), None)

    return run


# Shapes


def spearman(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """(ρ, and the middle 95 % of 2,000 resamples of the shapes)"""
    from scipy.stats import spearmanr

    a, b, rng = np.asarray(x), np.asarray(y), np.random.default_rng(0)
    draws = []
    while len(draws) < 2000:
        pick = rng.integers(0, len(a), len(a))
        if len(set(a[pick])) > 1 and len(set(b[pick])) > 1:
            draws.append(float(spearmanr(a[pick], b[pick]).statistic))
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(spearmanr(a, b).statistic), float(low), float(high)


def shape_study(quick: bool) -> Measured:
    s, shapes = scale(quick), drawn_shapes(scale(quick))
    cfgs = [config(str(s.middle), *shape, s) for shape in shapes]
    quality = [-bits(row) for row in shaped(s)]
    rho = {
        "depth": spearman([d for d, _ in shapes], quality), "width": spearman([w for _, w in shapes], quality),
        "expansion": spearman([expansion(c) for c in cfgs], quality),
    }  # fmt: skip
    table = sorted(zip(quality, shapes), reverse=True)
    shown = ", ".join(f"{k} {r:+.2f} ({a:+.2f} to {b:+.2f})" for k, (r, a, b) in rho.items())
    shown += f"; {len(shapes)} shapes, best {table[0][1][0]} x {table[0][1][1]} at {-table[0][0]:.3f} bits/byte, worst "
    shown += f"{table[-1][1][0]} x {table[-1][1][1]} at {-table[-1][0]:.3f}"
    met = rho["depth"][0] > 0 > rho["width"][0] and rho["expansion"][1] <= 0 <= rho["expansion"][2]
    values = {"spearman": rho, "shapes": [[d, w, -q] for q, (d, w) in table]}
    return Measured(shown, verdict(met, quick), values)


def finder(quick: bool, fitted: bool = True) -> Measured:
    """Budgets and vocabularies from 0.5 to 8 M; without fitting, the feed-forward part is 8/3 of the width."""
    worst, tried = 0.0, 0
    for budget in (500_000, 1_000_000, 1_500_000, 2_000_000, 3_000_000, 5_000_000, 8_000_000):
        for vocab in (512, 1024, 2048, 4096):
            try:
                cfg = find_shape(budget, vocab)
            except NetsukeError:  # tables above half of the budget
                continue
            if not fitted:
                cfg = LlamaConfig.uniform(
                    len(cfg.blocks), round(cfg.width * 8 / 3), vocab=vocab, width=cfg.width, heads=cfg.heads,
                    kv_heads=cfg.heads, head_dim=cfg.head_dim, context=512,
                )  # fmt: skip
            worst, tried = max(worst, abs(parameters(cfg).total / budget - 1)), tried + 1
    shown = f"{worst:.2%} off at worst, {tried} budgets and vocabularies"
    return Measured(("feed-forward at 8/3: " if not fitted else "") + shown, worst <= 0.01, {"worst": worst})


def speed(cfg: LlamaConfig) -> float:
    """Tokens/s on one thread, the best of three medians: other programs can only slow a run down."""
    return max(engine_speed(cfg, threads=1) for _ in range(3))


def floor(quick: bool) -> Measured:
    """Tokens/s of shallow and deep shapes of one budget, and the shape that a floor between them gives."""
    s = scale(quick)
    pool = sorted(candidates(s.budget, s.middle, context=s.context), key=lambda c: len(c.blocks))
    rate = {len(c.blocks): speed(c) for c in (pool[0], pool[-1])}
    wanted = (rate[min(rate)] + rate[max(rate)]) / 2
    cfg = find_shape(s.budget, s.middle, min_speed=wanted, speed=speed, context=s.context)
    again = speed(cfg)
    shown = (
        f"{min(rate)} blocks {rate[min(rate)]:.0f} tokens/s, {max(rate)} blocks {rate[max(rate)]:.0f}; a floor of {wanted:.0f} "
        f"gives {len(cfg.blocks)} x {cfg.width}, measured again {again:.0f}"
    )
    met = rate[min(rate)] > rate[max(rate)] and again >= 0.9 * wanted
    return Measured(shown, verdict(met, quick), {"rate": {str(k): v for k, v in rate.items()}, "again": again})


# Inheritance


def inheritance(quick: bool) -> Measured:
    s = scale(quick)
    fresh, ours_ = whole_way("fresh", s), whole_way(score := chosen_score(s), s)
    at = {m: [statistics.fmean(r["marks"][m]["test"] for r in rows) for rows in (fresh, ours_)] for m in GAINS}
    gains = {m: a - b for m, (a, b) in at.items()}
    shape, vocab = chosen_shape(s), chosen_vocab(s)
    shown = ", ".join(f"{gains[m]:.2f} nats at {float(m):.0%} ({a:.2f} to {b:.2f})" for m, (a, b) in at.items())
    shown += (
        f"; {shape[0]} x {shape[1]}, {vocab:,} pieces of which {own_rows(str(vocab), s):.0%} have the teacher's own rows, "
        f"score {score}, {s.seeds} seeds"
    )
    met = all(gains[m] >= bar for m, bar in GAINS.items())
    return Measured(shown, verdict(met, quick), {"gains": gains, "nats": at, "score": score})


def misaligned(quick: bool) -> Measured:
    s = scale(quick)
    fresh = statistics.fmean(r["marks"]["0.1"]["test"] for r in whole_way("fresh", s))
    gain = fresh - tenth_loss(MISALIGNED, s, "test")
    shown = f"embedding's channels in another order: {gain:.2f} nats at 10 %"
    return Measured(shown, verdict(gain >= GAINS["0.1"], quick), {"gain": gain})


def against_l1(quick: bool, judged: tuple[str, ...] = ("taylor", "mask")) -> Measured:
    s = scale(quick)
    got = {k: tenth_loss(k, s, "test") for k in SCORES}
    shown = ", ".join(f"{k} {v:.3f}" for k, v in got.items()) + f" nats after a tenth of the training, {s.seeds} seeds"
    met = all(got[k] <= got["l1"] for k in judged)
    return Measured(("judged: random; " if judged == ("random",) else "") + shown, verdict(met, quick), got)


def profiles(quick: bool, untrained: bool = False) -> Measured:
    values = {}
    for name in ours(quick):
        loaded = load(name, dtype="float32")
        model: Llama = random_llama(loaded.model.cfg, 0) if untrained else loaded.model
        task = DomainModeling(loaded.tokenizer, context=64 if quick else 256, batch=4 if quick else 8)
        if quick:
            task.documents = task_of(str(scale(True).middle), scale(True)).documents
        one = skip_profile(model, task, limit=1 if quick else 2 if untrained else 8)
        two = [] if untrained else skip_profile(model, task, together=2, limit=1 if quick else 2)
        middle = statistics.median(one[1:-1])
        values[name] = {"skip": one, "pairs": two, "first": one[0] / middle, "last": one[-1] / middle}
    if not values:
        raise NetsukeError("measure layer-skip profiles", "none of our language models is installed", TEACHER)
    rows = []
    for name, v in values.items():
        rows.append(f"{name}: " + " ".join(f"{x:.2f}" for x in v["skip"]) + " nats")
        rows[-1] += f" (first {v['first']:.1f}x, last {v['last']:.1f}x the median of the middle"
        rows[-1] += ("; pairs " + " ".join(f"{x:.2f}" for x in v["pairs"]) if v["pairs"] else "") + ")"
    shown = "; ".join(rows)
    hurt = all(
        min(v["skip"][0], v["skip"][-1]) > 0.01 for v in values.values()
    )  # a ratio of noise to noise says nothing
    met = hurt and all(min(v["first"], v["last"]) >= 2 for v in values.values())
    return Measured(("random weights: " if untrained else "") + shown, verdict(met, quick), values)


# Rounds and the whole


def second(quick: bool) -> Measured:
    s, draw = scale(quick), chosen_draw(scale(quick))
    before, whole, uniform = mean(rounds(None, s)), mean(rounds("whole", s)), mean(rounds("uniform", s))
    hard = {d: mean(rounds(d, s)) for d in ("published", "sharp")}
    share = (before - hard[draw]) / (before - whole)
    paired = [bits(u) - bits(h) for u, h in zip(rounds("uniform", s), rounds(draw, s))]
    noise = statistics.stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else 0.0
    sizes = {d: statistics.fmean(r["effective_share"] for r in rounds(d, s)) for d in hard}
    shown = (
        f"{before:.3f} bits/byte after one round, {whole:.3f} after a whole second one; half: uniform {uniform:.3f}, published "
        f"{hard['published']:.3f} (effective sample {sizes['published']:.1%}), by sequences at 0.3 {hard['sharp']:.3f} "
        f"({sizes['sharp']:.1%}); chosen {draw}: {share:.0%} of the gain, "
        f"{statistics.fmean(paired):+.4f} ± {noise:.4f} to uniform, {s.round_seeds} seeds"
    )
    within = abs(statistics.fmean(paired)) < 2 * noise
    met = share >= 0.6 and hard[draw] < uniform and not within
    shown += ", within noise" if within else ""
    return Measured(shown, verdict(met, quick), {"share": share, "paired": paired, "effective": sizes, **hard})


def whole_stack(quick: bool) -> Measured:
    s = scale(quick)
    got = {step: mean(stack(step, s)) for step in STEPS}
    worse = max(b - a for a, b in zip(got.values(), [*got.values()][1:]))
    total, top = got["baseline"] - got["second round"], mean(on_top(s))
    shown = ", ".join(f"{k} {v:.3f}" for k, v in got.items())
    shown += (
        f" bits/byte: {total:.3f} gained, largest step back {max(worse, 0):.3f}; half a round on top instead {top:.3f}"
    )
    shown += f" ({chosen_vocab(s):,} pieces, {chosen_shape(s)[0]} x {chosen_shape(s)[1]}, {s.seeds} seeds)"
    met = worse <= 0.01 and total >= 0.15
    domains_ = {
        k: {d: statistics.fmean(r["bits_per_byte"]["test"][d] for r in stack(k, s)) for d in domains.DOMAINS}
        for k in STEPS
    }
    return Measured(shown, verdict(met, quick), {"mean": got, "on_top": top, "domains": domains_})


CLAIMS = [
    Claim(
        "a trimmed tokenizer loses no text", "", "every string comes back", here(lossless), here(lossless, spoil=True), DATA
    ),
    Claim(
        "coverage and share of the tables", "48,000 of 100,883 pieces: 97.86 %; 38.19 to 18.07 %",
        "a size with > 90 % covered and tables < 20 %", here(coverage), None, DATA,
    ),
    Claim(
        "published vocabularies trimmed", "", "nothing lost, nothing unreachable", here(real_vocabularies),
        here(real_vocabularies, rule="frequency"), (*DATA, *VOCABULARIES.values()),
    ),
    Claim(
        "a trained model under a trimmed tokenizer", "", "logits of kept pieces to 1e-6, losses renormalised", here(sliced),
        here(sliced, shift=1), DATA,
    ),
    Claim(
        "a smaller vocabulary at equal parameters", "42.41 to 44.11 (1B)", "a smaller one is best, by ≥ 0.03 bits/byte",
        here(best_vocabulary), None, DATA,
    ),
    Claim(
        "depth helps, width harms, expansion is neutral", "+0.528, −0.528, ≈ 0 (about 30 shapes)",
        "signs +, −; expansion's interval holds 0", here(shape_study), None, DATA,
    ),
    Claim("the shape finder hits the parameters", "", "≤ 1 %", here(finder), here(finder, fitted=False)),
    Claim(
        "deeper is slower, and the finder keeps a floor", "20 layers: 29.5 tokens/s on a V100",
        "shallowest faster; floor reached to 10 %", here(floor),
    ),
    Claim(
        "inherited weights beat random ones", "46.53 to 49.79", "≥ 0.30 / 0.10 / 0.05 nats at 10 / 50 / 100 %",
        here(inheritance), here(misaligned), DATA,
    ),
    Claim(
        "scores that look at data are no worse than L1", "L1 46.06, Taylor 47.90, mask 48.08", "Taylor and mask ≤ L1",
        here(against_l1), here(against_l1, judged=("random",)), DATA,
    ),
    Claim(
        "the first and the last block matter most", "first two or three and the last", "both ≥ 2x the median middle",
        here(profiles), here(profiles, untrained=True), DATA,
    ),
    Claim(
        "half of the batches, the hard ones, in a second round", "51.61 to 54.46, half of the batches",
        "≥ 60 % of a whole round's gain, better than half at random", here(second), None, DATA,
    ),
    Claim(
        "the stack", "42.41 to 51.28", "no step back > 0.01, ≥ 0.15 bits/byte in all", here(whole_stack), None, DATA
    ),
    Claim(
        "benchmark accuracies, and the comparison with Qwen-1.8B, Phi-2, Open-LLaMA-3B", "56.49 against 55.04, 45.09, 43.66",
        why="models of 1 to 3 billion weights, 1.6 T tokens and the suites are not here",
    ),
]  # fmt: skip
