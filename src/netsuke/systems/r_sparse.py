"""R-Sparse: decoding that reads only the weights of the input channels that matter for this token.

"R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference", ICLR 2025, arXiv 2504.19449.

What the paper gives and where it is here
    the layer: score, mask, two thin factors for the rest           layers/sparse.py
    the budget divided between channels and rank, thresholds        compress/sparse_channels.py, the method compress/sparsify.py
    the sparsification recipe, Algorithm 1                          compress/sparse_recipe.py
    the kernel that gathers the chosen rows, also of 8- to 2-bit codes; prompts dense   native/src/linear.c and kernels/
    models, texts, rivals                                           systems/r_sparse_cases.py
    The released code has no kernel for processors and masks a dense product, which saves nothing: the control of the speed.

What differs, and why
    Thresholds: the paper takes one scalar per map from 512 tokens that run through the dense model. Once the maps before it are
    sparse, a map sees other inputs, and its realised sparsity is off by several points. Here each map is calibrated on
    what the sparse maps before it give, on 8,192 tokens or more, the first token of every window left out (`inputs="dense"`
    is the paper's way). Ranks follow a map's own shape: the released code takes the model's width for both sides.
    Score: the released code drops the column norm where ρ = 1 (`score="released"`); here it stays.
    Evaluation: the released code runs the first nine tenths of a sequence dense and scores all of it. Here every token but
    the first is decoded by the rule; the released way stands beside it.
    Search: as published, but trials use the thresholds of one calibration, and validation text has the last word between
    the found recipe and its two starts.

The models: stories260K is small and fully used (real text of 1,807 tokens, calibrated on stories of its own), wide and small are
ours (recipes/tinylm, five domains). Speed is measured on random weights of a size that no cache holds.

What the controls are
    Perplexity: pure low rank at the same traffic must miss. Realised sparsity: the paper's calibration must miss. Speed: masked,
    dense products must miss. Exactness: one hundredth of sparsity, and factors of half the rank, must be seen.

What cannot be shown here
    Task scores of models of 7 to 8 billion weights, generation on a GPU.
"""

from __future__ import annotations

import copy
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import cache

import torch

from netsuke.claims import Claim, Measured
from netsuke.compress.decompose import svd
from netsuke.compress.sparse_channels import decoding, divide, make_sparse, sparse_maps, total, traffic
from netsuke.compress.sparsify import Sparsify
from netsuke.data import catalogue, domains
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.layers.sparse import InputSparse
from netsuke.measure.matvec import sparse_against_dense
from netsuke.models.llama import Llama, LlamaConfig, random_llama
from netsuke.models.load import find
from netsuke.runtime.engine import Engine
from netsuke.systems.modegpt_cases import STORIES, STORIES_FILES
from netsuke.systems.r_sparse_cases import (
    SMALL,
    WIDE,
    case_of,
    dense_score,
    found,
    ratio,
    released_ratio,
    rival_ratio,
    scored,
    worst_map,
)

HARM = 0.4  # the sparsity at which rivals are compared: half of wide's traffic is out of reach of output-sided skipping
CURVE = (0.2, 0.3, 0.4, 0.5, 0.6)
THREADS = min(2, os.cpu_count() or 1)


def absent(name: str) -> str | None:
    """What a model or its text lacks here, or None."""
    if name == STORIES:
        lacking = catalogue.missing(STORIES_FILES)
    else:
        lacking = domains.missing()
        try:
            find(name)
        except NetsukeError:
            return f"the model {name} is not installed"
    return f"absent: {', '.join(lacking)}" if lacking else None


def on(names: tuple[str, ...], measure: Callable[..., Measured], *args, **kwargs) -> Callable[[bool], Measured]:
    """Measures on all of `names` that are there, quickly on the first; without it there is nothing to judge."""

    def run(quick: bool) -> Measured:
        if reason := absent(names[0]):
            return Measured(reason, None)
        present = [n for n in names if not absent(n)]
        return measure(present[:1] if quick else present, *args, quick, **kwargs)

    return run


def perplexity(names: list[str], sparsity: float, how: str, bar: float, quick: bool) -> Measured:
    """The first model is judged; beside a searched recipe stands its curve at ρ = 1."""
    parts, values = [], {}
    for name in names:
        got, saved = ratio(name, sparsity, how, quick), total(scored(name, sparsity, how, quick)[1]).sparsity
        published = released_ratio(name, sparsity, how, quick)
        values[name] = {"ratio": got, "released_evaluation": published, "traffic_saved": saved}
        parts.append(
            f"{name} x {got:.3f} (dense {dense_score(name, 'test', quick):.2f}, {saved:.1%} of the weights unread; scored as "
            f"released, a tenth sparse: x {published:.3f})"
        )
    if how == "1":
        switched = {h: ratio(names[0], sparsity, h, quick) for h in ("released", "dense")}
        values[names[0]] |= switched
        parts.append(
            f"as in the code, without norms x {switched['released']:.3f}, thresholds through the dense model "
            f"x {switched['dense']:.3f} (not judged)"
        )
    values["curve"] = {s: ratio(names[0], s, "1", quick) for s in CURVE if how == "searched" and not quick}
    if values["curve"]:
        parts.append(
            "ρ=1 on " + names[0] + ": " + ", ".join(f"{s:g} x {got:.3f}" for s, got in values["curve"].items())
        )
    return Measured("; ".join(parts), values[names[0]]["ratio"] <= bar, values)


def searched_recipe(names: list[str], sparsity: float, quick: bool) -> Measured:
    """On test text, against ρ = 1 and ρ = 0.95 everywhere."""
    parts, values, met = [], {}, []
    for name in names:
        got = {how: ratio(name, sparsity, how, quick) for how in ("searched", "1", "0.95", "released")}
        rhos = [rho for _, rho in found(name, sparsity, quick).plan.values()]
        ones = sum(r == 1 for r in rhos) / len(rhos)
        values[name] = got | {
            "recipe": found(name, sparsity, quick).plan, "validation": found(name, sparsity, quick).judged,
            "trials": found(name, sparsity, quick).trials,
        }  # fmt: skip
        met.append(got["searched"] <= min(got["1"], got["0.95"]) and got["searched"] < got["0.95"])
        parts.append(
            f"{name} x {got['searched']:.4f}, ρ=1 x {got['1']:.4f} (as released, without norms x {got['released']:.4f}), "
            f"ρ=.95 x {got['0.95']:.4f}; ρ=1 for {ones:.0%} of the maps, mean {statistics.fmean(rhos):.3f}"
        )
    return Measured("; ".join(parts), all(met), values)


def random_recipe(names: list[str], sparsity: float, quick: bool) -> Measured:
    """The control of the search: ρ drawn at random for every map."""
    name, rng = names[0], random.Random(0)
    case = case_of(name, quick)
    plan = {n: (sparsity, rng.random()) for n in found(name, sparsity, quick).plan}
    model = Sparsify(sparsity, per_layer=plan, calibration=case.calibration).apply(case.model, case.task)
    with decoding(model):
        got = case.score(model, "test") / dense_score(name, "test", quick)
    return Measured(f"any ρ, drawn for every map: x {got:.2f}", got <= ratio(name, sparsity, "0.95", quick))


def rivals(names: list[str], quick: bool, ours: str = "1") -> Measured:
    """Perplexity ratios at s = HARM. Judged: pure low rank at least ten times ours, the others above ours."""
    parts, values, met = [], {}, []
    for name in names:
        got = {"ours": ratio(name, HARM, ours, quick), "low rank": ratio(name, HARM, "0", quick)}
        got |= {r: rival_ratio(name, HARM, r, quick) for r in ("magnitude", "wanda", "relu", "cats")}
        values[name] = got
        rest = min(got["magnitude"], got["relu"])
        met.append(got["low rank"] >= 10 * got["ours"] and rest > got["ours"])
        parts.append(
            f"{name} x {got['ours']:.3f}; low rank x {got['low rank']:.1f}, weights by magnitude x {got['magnitude']:.2f} "
            f"(by Wanda x {got['wanda']:.2f}, not judged), ReLU swap x {got['relu']:.2f} (SiLU cut as in CATS "
            f"x {got['cats']:.2f}, not judged)"
        )
    return Measured("; ".join(parts), all(met), values)


def realised(names: list[str], quick: bool, how: str = "1") -> Measured:
    """Largest distance from the target of any map, held-out text, at s = 0.3 and 0.5."""
    parts, values = [], {}
    for name in names:
        for sparsity in (0.3, 0.5):
            off, where = worst_map(scored(name, sparsity, how, quick)[1], sparsity)
            values[f"{name} {sparsity}"] = {"off": off, "map": where}
            parts.append(f"{name} at {sparsity}: {100 * off:.1f} points ({where})")
    shown = ("thresholds from 512 tokens through the dense model: " if how == "paper" else "") + ", ".join(parts)
    return Measured(shown, all(v["off"] <= 0.02 for v in values.values()), values)


def low_bits(names: list[str], quick: bool) -> Measured:
    """4-bit weights, s = 0.5: the harm beside that of the same rule on floats."""
    parts, values, met = [], {}, []
    for name in names:
        got, floats = ratio(name, 0.5, "4 bits", quick), ratio(name, 0.5, "1", quick)
        whole = total(scored(name, 0.5, "4 bits", quick)[1])
        values[name] = {"ratio": got, "floats": floats, "bytes_read": whole.bytes_read, "saved": whole.sparsity}
        met.append(abs(whole.sparsity - 0.5) <= 0.02 and got <= floats + 0.02)
        parts.append(
            f"{name} x {got:.3f} of its dense 4-bit self (floats x {floats:.3f}); {whole.sparsity:.1%} of the codes unread, "
            f"{whole.bytes_read / 1e3:.0f} kB per token in the blocks"
        )
    return Measured("; ".join(parts), all(met), values)


@cache
def kernel_times(quick: bool) -> dict[str, float]:
    """Ratios of seconds, dense over sparse, 4096 x 4096 floats (64 MB) and 8192 x 8192 4-bit codes (32 MB), by case."""
    outs = ins = 4096
    repeats = 1 if quick else 5
    one = sparse_against_dense(outs, ins, 32, 0.5, THREADS, repeats=repeats)
    channels, rank = divide(outs, ins, 0.5, 0.95)
    part = sparse_against_dense(outs, ins, 32, channels / ins, THREADS, repeats=repeats)
    up = -(-rank // 64) * 64  # the trial takes whole groups of inputs
    thin = [sparse_against_dense(*shape, 32, 1.0, THREADS, repeats=repeats).dense for shape in ((up, ins), (outs, up))]
    # The factors of a trial stay in the cache; those of a model come from memory: their share of a dense product is added.
    factors = sum(thin) + part.dense * rank * (outs + ins) / (outs * ins)
    none = sparse_against_dense(outs, ins, 32, 1.0, THREADS, repeats=repeats)
    codes = sparse_against_dense(2 * outs, 2 * ins, 4, 0.5, THREADS, repeats=repeats)
    return {
        "ρ=1": one.ratio, "ρ=.95": part.dense / (part.sparse + factors), "s=0": none.ratio, "4 bits": codes.ratio,
        "lowest ρ=1": one.lowest, "lowest s=0": none.lowest,
    }  # fmt: skip


def kernel(quick: bool) -> Measured:
    got = kernel_times(quick)
    shown = (
        f"s=.5: ρ=.95 {got['ρ=.95']:.2f}x, ρ=1 {got['ρ=1']:.2f}x (lowest of five runs {got['lowest ρ=1']:.2f}x); s=0 "
        f"{got['s=0']:.2f}x; 4-bit codes at s=.5 {got['4 bits']:.2f}x; {THREADS} threads"
    )
    return Measured(shown, got["ρ=.95"] >= 1.35 and got["ρ=1"] >= 1.5 and got["s=0"] >= 0.97, got)


def masked(quick: bool) -> Measured:
    """The control: the mask of the released code before a dense product."""
    size = 1024 if quick else 4096
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    x, seconds = torch.randn(1, size), {"dense": [], "masked": []}
    for _ in range(5 if quick else 25):
        for how, kept in (("dense", 0.0), ("masked", 0.67)):
            begin = time.perf_counter()
            x @ weight if how == "dense" else (x * (x.abs() > kept)) @ weight
            seconds[how].append(time.perf_counter() - begin)
    got = statistics.median(seconds["dense"]) / statistics.median(seconds["masked"])
    return Measured(f"a masked dense product: {got:.2f}x", got >= 1.35)


@cache
@torch.no_grad()
def decode_times(quick: bool) -> dict[str, dict[str, float]]:
    """Tokens per second of the engine, random weights: dense, sparse with ρ = 1, with factors (random ones: their values cost
    the same), alternating."""
    shape = {"width": 256, "heads": 4, "kv_heads": 4} if quick else {"width": 1024, "heads": 16, "kv_heads": 16}
    layers, hidden, tokens, turns = (2, 704, 8, 2) if quick else (8, 2816, 24, 7)
    cfg = LlamaConfig.uniform(layers, hidden, vocab=512, head_dim=64, context=512, **shape)
    model = random_llama(cfg, 0, std=0.02)
    ids = torch.randint(cfg.vocab, (2, 256), generator=torch.Generator().manual_seed(1))
    knobs, sparse = Sparsify(0.5), copy.deepcopy(model)
    make_sparse(sparse, [ids], knobs.plan(model))
    with decoding(sparse):
        sparse(ids[:1, :128])
    saved = total(traffic(sparse)).sparsity
    split = copy.deepcopy(sparse)
    for name, layer in sparse_maps(split).items():
        split.replace(name, with_random_factors(layer))
    engines = {
        how: Engine.of_model(m, threads=THREADS) for how, m in (("dense", model), ("ρ=1", sparse), ("ρ=.95", split))
    }
    rates: dict[str, list[float]] = {how: [] for how in engines}
    for turn in range(turns):
        for how, engine in engines.items():
            engine.truncate(0, 0)
            engine.forward(ids[0, :8].tolist(), [0] * 8)
            begin = time.perf_counter()
            for i in range(8, 8 + tokens):
                engine.forward([int(ids[0, i])], [0])
            if turn:  # the first turn warms up
                rates[how].append(tokens / (time.perf_counter() - begin))
    for engine in engines.values():
        engine.close()
    out = {how: {"rate": statistics.median(r), "lowest": min(r), "highest": max(r)} for how, r in rates.items()}
    for how in ("ρ=1", "ρ=.95"):
        out[how]["ratio"] = statistics.median(a / b for a, b in zip(rates[how], rates["dense"]))
    return out | {"model": {"parameters": sum(p.numel() for p in model.parameters()), "traffic_saved": saved}}


def with_random_factors(layer: InputSparse, rho: float = 0.95) -> InputSparse:
    """The map with the channels and the rank of this split at s = 0.5, factors of noise."""
    channels, rank = divide(layer.outs, layer.ins, 0.5, rho)
    rng = torch.Generator().manual_seed(0)
    first, second = (torch.randn(*s, generator=rng) * 1e-3 for s in ((rank, layer.ins), (layer.outs, rank)))
    # Scores of random weights are half-normal: the quantile of the smaller share stands in this ratio to the median.
    normal = torch.distributions.Normal(0.0, 1.0)
    share = channels / layer.ins
    scale = float(normal.icdf(torch.tensor(1 - share / 2)) / normal.icdf(torch.tensor(0.75)))
    dense = Dense(layer.weight.T.contiguous())
    return InputSparse.from_dense(dense, layer.threshold * scale, Dense(first), Dense(second), norms=layer.norms)


def decode(quick: bool) -> Measured:
    got = decode_times(quick)
    ratios = {how: got[how]["ratio"] for how in ("ρ=1", "ρ=.95")}
    shown = (
        f"ρ=1 {ratios['ρ=1']:.2f}x, ρ=.95 {ratios['ρ=.95']:.2f}x ({got['dense']['rate']:.1f} to {got['ρ=1']['rate']:.1f} "
        f"tokens/s; {got['model']['parameters'] / 1e6:.0f} M random weights, {got['model']['traffic_saved']:.0%} of the "
        f"blocks' unread, {THREADS} threads)"
    )
    return Measured(shown, min(ratios.values()) >= 1.3, got)


@torch.no_grad()
def exactness(names: list[str], quick: bool, spoiled: bool = False) -> Measured:
    """s = 0 beside the dense model, and maps without their last singular value beside themselves with factors of full rank."""
    values = {}
    for name in names:
        case = case_of(name, quick)
        ids = next(iter(case.task.batches("validation")))[:2, :-1]
        knobs = Sparsify(0.01 if spoiled else 0.0, calibration=case.calibration)
        same: Llama = knobs.apply(case.model, case.task)
        with decoding(same):
            zero = float((same(ids) - case.model(ids)).abs().max())
        worst = 0.0
        for layer in (case.model.blocks[0].q, case.model.blocks[0].down, case.model.blocks[-1].gate):
            u, s, vt = svd(layer.to_dense(), min(layer.outs, layer.ins) - 1)
            short = Dense((u * s @ vt).float())
            rank = len(s) // 2 if spoiled else len(s)
            factors = Dense((s[:rank, None] * vt[:rank]).float()), Dense(u[:, :rank].float())
            x = torch.randn(64, layer.ins, generator=torch.Generator().manual_seed(0))
            sparse = InputSparse.from_dense(short, float((x.abs() * short.weight.norm(dim=0)).median()), *factors)
            sparse.always = True
            worst = max(worst, float((sparse(x) - short(x)).abs().max() / short(x).abs().max()))
        values[name] = {"s=0": zero, "full rank": worst}
    shown = "; ".join(f"{n}: s=0 off by {v['s=0']:.0e}, full rank by {v['full rank']:.0e}" for n, v in values.items())
    checks = [v["s=0"] == 0 for v in values.values()] + [v["full rank"] <= 1e-5 for v in values.values()]
    met = any(checks) if spoiled else all(checks)
    return Measured(("s=0.01 and half the rank: " if spoiled else "") + shown, met, values)


BOTH = (STORIES, WIDE, SMALL)
OURS = (WIDE, SMALL)
DOMAIN_FILES = domains.needs()
CLAIMS = [
    Claim(
        "perplexity at s = 0.3, stories260K, every token sparse", "", "x ≤ 1.06",
        on((STORIES,), perplexity, 0.3, "1", 1.06), on((STORIES,), perplexity, 0.3, "0", 1.06), STORIES_FILES,
    ),
    Claim(
        "perplexity at s = 0.4, stories260K, every token sparse", "", "x ≤ 1.25",
        on((STORIES,), perplexity, 0.4, "1", 1.25), on((STORIES,), perplexity, 0.4, "0", 1.25), STORIES_FILES,
    ),
    Claim(
        "perplexity at s = 0.5, wide (and small), searched recipe", "comparable to dense, ten tasks, 7B to 8B", "x ≤ 1.10",
        on(OURS, perplexity, 0.5, "searched", 1.10), on((WIDE,), perplexity, 0.5, "0", 1.10), DOMAIN_FILES,
    ),
    Claim(
        "perplexity at s = 0.3, wide (and small), one calibration", "", "x ≤ 1.03",
        on(OURS, perplexity, 0.3, "1", 1.03), on((WIDE,), perplexity, 0.3, "0", 1.03), DOMAIN_FILES,
    ),
    Claim(
        "the searched recipe, stories260K, s = 0.4", "ρ = 1 for 86 % of Llama-3-8B's maps, mean .962",
        "≤ ρ=1 and ρ=.95; < ρ=.95",
        on((STORIES,), searched_recipe, 0.4), on((STORIES,), random_recipe, 0.4), STORIES_FILES,
    ),
    Claim(
        "the searched recipe, wide and small, s = 0.5", "searched above ρ = .95", "≤ ρ=1 and ρ=.95; < ρ=.95",
        on(OURS, searched_recipe, 0.5), on(OURS, random_recipe, 0.5), DOMAIN_FILES,
    ),
    Claim(
        "rivals at equal traffic, s = 0.4, stories260K", "above CATS and ReLUfication",
        "low rank ≥ 10x ours; magnitude, ReLU swap above",
        on((STORIES,), rivals), on((STORIES,), rivals, ours="0"), STORIES_FILES,
    ),
    Claim(
        "rivals at equal traffic, s = 0.4, wide and small", "above CATS and ReLUfication",
        "low rank ≥ 10x ours; magnitude, ReLU swap above",
        on(OURS, rivals), on(OURS, rivals, ours="0"), DOMAIN_FILES,
    ),
    Claim(
        "realised sparsity of every map, held-out text, stories260K", "50 to 67 % for 50 % (a fork's measurement)",
        "± 2 points", on((STORIES,), realised), on((STORIES,), realised, how="paper"), STORIES_FILES,
    ),
    Claim(
        "realised sparsity of every map, held-out text, wide and small", "50 to 67 % for 50 % (a fork's measurement)",
        "± 2 points", on(OURS, realised), on(OURS, realised, how="paper"), DOMAIN_FILES,
    ),
    Claim(
        "quantized weights: chosen channels of 4-bit codes, s = 0.5, wide and small", "",
        "traffic ± 2 points; harm ≤ floats' + 0.02", on(OURS, low_bits), None, DOMAIN_FILES,
    ),
    Claim(
        "the gather kernel, maps of 32 MB and more", "", "ρ=.95 ≥ 1.35x, ρ=1 ≥ 1.5x, s=0 ≥ 0.97x", kernel, masked,
    ),
    Claim(
        "decoding end to end, s = 0.5, random weights", "43 % faster (one GPU)", "≥ 1.3x", decode, masked,
    ),
    Claim(
        "exact where nothing is left out", "", "s=0 bit for bit; full rank 1e-5",
        on(BOTH, exactness), on(BOTH, exactness, spoiled=True), STORIES_FILES,
    ),
    Claim(
        "task scores kept at 50 %", "ARC-E .815 to .792, BoolQ .821 to .780, PIQA .801 to .795 (Llama-3.1-8B, a fork)",
        why="models of 7 to 8 billion weights and their task suites are not here",
    ),
    Claim("generation on a GPU", "43 % faster", why="the product's kernels are for processors; no kernel was released"),
]  # fmt: skip
