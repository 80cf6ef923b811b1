"""Greenformers: a cheaper Transformer by low-rank weights (LRT) or low-rank attention (Linformer), and which one when.

"Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank Approximation", thesis, HKUST,
2021, arXiv 2108.10808; library greenformer 0.2.2 (MIT). LRT: "Lightweight and efficient end-to-end speech recognition using
low-rank transformer", ICASSP 2020. Linformer: arXiv 2006.04768, 2020.

What the thesis and its library give and where it is here
    every linear map as two thin ones; ranks as numbers or shares of the break-even rank; what does not pay is left and
    listed; random, SVD and (ours) whitened SVD starts; fine-tuning                          compress/factorize.py
    the same in any torch.nn.Module, convolutions as k x k and 1 x 1                         compress/plain.py
    exact and randomised SVD, balanced factors                                               compress/decompose.py
    the low-rank map itself, also in the native engine                                       layers/lowrank.py
    an encoder with full or Linformer attention                                              models/encoder.py
    its data: digits and MNIST by pixels, spoken digits by speaker                           tasks/sequences.py, data/spoken.py
    the analysis of time and memory over the length of the input, as an adviser              compress/advise.py
    what is measured here: shapes, trainings, subjects                                       systems/greenformers_cases.py

Where the library and good sense differ: its default start is `random`, which destroys a trained model without a word (here it
must be asked for); an unknown solver silently keeps random factors (refused); it edits in place (a copy here); its break-even
rank of k x k convolutions ignores k² (counted here); maps inside nn.MultiheadAttention are passed over in silence (listed here);
its non-negative factors are left out. It pins packages of 2021 and cannot be installed beside a current PyTorch, so its
semantics are tested against formulas.

What differs, and why
    Attention maps stand in the open in 2021's analysis, and a training step keeps them. PyTorch's fused kernel keeps none: then
    memory never speaks for Linformer. Bars about time and memory are judged with open maps, as published; the figures of the
    fused kernel stand beside them.
    Encoders have two blocks, width 128 as the card asks for and 64 on MNIST. digits have 64 tokens, spoken digits up to 64
    frames, MNIST 784 pixels. Nobody who tests has trained: spoken digits are cut by speaker, all six test once. MNIST is the
    10,000 test images with a split of our own. The nearest training example stands beside every accuracy as the floor. At
    width 64, tried first and seen on test data, the low-rank encoder lost 5 points on digits and 5 to 9 on spoken digits: a
    rank of 12 is thin. The width was then set by the card, steps by validation data.
    Post-training: stories260K (others' model, tight; tuned on stories that it wrote itself, scored on real ones), `wide` (ours),
    the digits encoder. A random start gets the better of two sets of rates.

What the controls are
    Formulas: Linformer's without its projections. Quality: factors of a fiftieth of the break-even rank. The crossing of times:
    Linformer that keeps as many summaries as there are tokens never gets ahead.

What cannot be shown here
    BERT's pre-training, GLUE, speech recognition on AiShell, money and CO₂: the saving of a BERT-base run is arithmetic on
    measured step times, and is called so.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from netsuke.claims import Claim, Measured
from netsuke.compress import advise
from netsuke.compress.factorize import Factorize, break_even, low_rank_design
from netsuke.data import spoken
from netsuke.data.domains import needs as domain_files
from netsuke.devices import Device
from netsuke.errors import NetsukeError
from netsuke.measure.peak import peak_of
from netsuke.models.encoder import projections, random_encoder
from netsuke.models.load import find
from netsuke.models.places import WEIGHTS
from netsuke.models.save import save_artifact
from netsuke.runtime.engine import Engine
from netsuke.systems import greenformers_cases as cases
from netsuke.systems.greenformers_cases import BERT, LENGTHS, SHARE, SMALL, bert_block, excess, step_seconds, trained
from netsuke.systems.modegpt_cases import STORIES, STORIES_FILES
from netsuke.systems.r_sparse_cases import WIDE
from netsuke.tasks.sequences import MNIST

DENSE, LRT, LINFORMER = ("dense", 0), ("lrt", BERT.r), ("linformer", 0)
SHORT, LONG = (64, 128, 256), (2048, 4096)
PEAK_LENGTHS = (128, 256, 512, 1024, 2048)
QUICK_LENGTHS = (64, 256)
# BERT-base, for the arithmetic: blocks, steps, sequences in a step, and the head over 30,522 pieces at 15 % of the tokens
BLOCKS, BERT_STEPS, BATCH, PHASES, PIECES = 12, 1_000_000, 256, {128: 0.9, 512: 0.1}, 30_522
WATTS = 300.0


def formulas(quick: bool, forget: bool = False) -> Measured:
    """Every rank, projection and length of the card on meta tensors: shapes only, counted operation by operation."""
    worst, checked = 0, 0
    lengths = LENGTHS[:3] if quick else LENGTHS
    for n in lengths:
        shapes = [("dense", BERT)]
        shapes += [("lrt", advise.Shape(768, 12, rank=r)) for r in (32, 64, 128, 256)]
        shapes += [("linformer", advise.Shape(768, 12, project=p)) for p in (64, 128, 256) if p <= n]
        for kind, s in shapes:
            block = cases.shapes_only(kind, n, s)
            with FlopCounterMode(display=False) as counted:
                block(torch.empty(1, n, s.d, device="meta"))
            macs = advise.macs(kind, s, n) - (2 * n * s.P(n) * s.d if forget and kind == "linformer" else 0)
            off = abs(counted.get_total_flops() // 2 - macs)
            off += abs(sum(p.numel() for p in block.parameters()) - advise.parameters(kind, s, n))
            worst, checked = max(worst, off), checked + 1
    what = "the projections left out of Linformer's formula" if forget else "off"
    return Measured(f"{checked} blocks, {what}: by {worst:,} at most", worst == 0, {"blocks": checked, "worst": worst})


def curve(kind: tuple[str, int], open_maps: bool, quick: bool) -> dict[int, float]:
    """Seconds per token of a training step by length."""
    lengths = QUICK_LENGTHS if quick else LENGTHS if open_maps else cases.FUSED_LENGTHS
    return {n: times(n, open_maps, quick)[kind] for n in lengths}


def times(n: int, open_maps: bool, quick: bool) -> dict[tuple[str, int], float]:
    """All kinds in one series of turns. The dense block is not timed where no bar asks for it."""
    kinds = (DENSE, LRT, LINFORMER) if open_maps and (n in SHORT + LONG or quick) else (LRT, LINFORMER)
    return step_seconds(n, kinds, open_maps, quick)


def faster(kind: tuple[str, int], lengths: tuple[int, ...], bar: float, quick: bool) -> Measured:
    """The worst ratio to the dense block over the lengths."""
    lengths = QUICK_LENGTHS if quick else lengths
    ratios = {n: times(n, True, quick)[kind] / times(n, True, quick)[DENSE] for n in lengths}
    shown = "; ".join(f"{n} tokens {r:.2f}x of dense" for n, r in ratios.items())
    threads = torch.get_num_threads()
    return Measured(
        f"{shown} ({threads} threads)",
        None if quick else max(ratios.values()) <= bar,
        {"ratios": ratios, "threads": threads},
    )


def time_crossing(open_maps: bool, quick: bool) -> Measured:
    """Where Linformer's step becomes as fast as LRT's, beside what was foretold: by multiply-accumulates alone for the fused
    kernel, with the traffic of maps at this machine's measured bandwidth for open ones."""
    at = cases.crossing_of(curve(LRT, open_maps, quick), curve(LINFORMER, open_maps, quick))
    s, device = SMALL if quick else BERT, Device.load("this")
    plain = advise.formula_crossing(s.d, s.r, s.P(4096))
    foretold = advise.crossing("time", s, cases.TOKENS, device, fused=not open_maps)
    judged = foretold if open_maps else plain
    found = "none up to the longest" if at is None else f"{at:,.0f} tokens"
    shown = (
        f"{found}; foretold {foretold:,} with the traffic of {'open' if open_maps else 'no'} maps, {plain:,.0f} by "
        f"multiply-accumulates alone"
    )
    values = {"measured": at, "foretold": foretold, "formula": plain}
    if quick:
        return Measured(shown, None, values)
    return Measured(shown, at is not None and 0.5 <= judged / at <= 2, values)


def no_crossing(quick: bool) -> Measured:
    """The control: with as many summaries as tokens Linformer does all of attention's work and its projections too."""
    n, base = (256, SMALL) if quick else (1024, BERT)
    shapes = {"lrt": base, "linformer": advise.Shape(base.d, base.heads, project=n)}
    blocks = {kind: bert_block(kind, n, s) for kind, s in shapes.items()}
    x, taken = cases.input_of(n, base.d, n), {kind: [] for kind in shapes}
    for _ in range(3):
        for kind, block in blocks.items():
            begin = time.perf_counter()
            cases.step(block, x)
            taken[kind].append(time.perf_counter() - begin)
    ratio = min(taken["linformer"]) / min(taken["lrt"])
    return Measured(f"{n} summaries of {n} tokens: {ratio:.1f}x the time of LRT", ratio < 1, {"ratio": ratio})


def peaks(kind: str, n: int, open_maps: bool, quick: bool) -> int:
    """Bytes above an idle process in a training step."""
    key = (kind, n, open_maps, quick)
    if key not in _PEAKS:
        _PEAKS[key] = peak_of("netsuke.systems.greenformers_cases:train_twice", *key).above
    return _PEAKS[key]


_PEAKS: dict[tuple[str, int, bool, bool], int] = {}


def memory_at(kind: str, n: int, bar: float, quick: bool) -> Measured:
    n = 256 if quick else n
    ways = (True,) if quick else (True, False)
    ratios = {o: peaks(kind, n, o, quick) / peaks("dense", n, o, quick) for o in ways}
    s, tokens = cases.peak_shape(quick)
    foretold = advise.training_bytes(kind, s, n, tokens) / advise.training_bytes("dense", s, n, tokens)
    shown = f"{ratios[True]:.2f}x of dense, foretold {foretold:.2f}x" + (
        "" if quick else f"; fused {ratios[False]:.2f}x"
    )
    values = {"open": ratios[True], "fused": ratios.get(False), "foretold": foretold}
    return Measured(shown, None if quick else ratios[True] <= bar, values)


def memory_crossing(quick: bool, open_maps: bool = True) -> Measured:
    lengths = QUICK_LENGTHS if quick else PEAK_LENGTHS if open_maps else PEAK_LENGTHS[1::2]
    lrt, linformer = ({n: peaks(kind, n, open_maps, quick) for n in lengths} for kind in ("lrt", "linformer"))
    at = cases.crossing_of(lrt, linformer)
    s, tokens = cases.peak_shape(quick)
    foretold = advise.crossing("memory", s, tokens, fused=not open_maps)
    found = "none" if at is None else f"{at:,.0f} tokens"
    table = ", ".join(f"{n}: {lrt[n] / 1e6:,.0f} and {linformer[n] / 1e6:,.0f} MB" for n in lengths)
    shown = f"{found}; foretold {foretold or 'none'}; LRT and Linformer at {table}"
    met = None if quick else at is not None and 256 <= at <= 2048
    return Measured(("fused: " if not open_maps else "") + shown, met, {"at": at, "foretold": foretold})


def fused_memory(quick: bool) -> Measured:
    """The control: a kernel that keeps no maps leaves nothing to cross."""
    return Measured("not in a quick run", False) if quick else memory_crossing(quick, open_maps=False)


def file_sizes(quick: bool) -> Measured:
    """Blocks of BERT's shape as artifacts."""
    s, sizes = SMALL if quick else BERT, {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in advise.KINDS:
            cfg = cases.config_of(kind, 512, s, layers=2)
            model = random_encoder(cfg, 0)
            model = low_rank_design(model, s.r) if kind == "lrt" else model
            saved = save_artifact(Path(folder) / kind, model, None, {}, {})
            outside = 4 * sum(p.numel() for n, p in model.named_parameters() if not n.startswith("blocks."))
            sizes[kind] = (saved / WEIGHTS).stat().st_size - outside
    lrt, linformer = sizes["lrt"] / sizes["dense"], sizes["linformer"] / sizes["dense"]
    shown = f"LRT of rank {s.r} {lrt:.3f}x, Linformer {linformer:.3f}x of the dense blocks"
    return Measured(shown, lrt <= 0.25 and linformer >= 1.0, {"lrt": lrt, "linformer": linformer})


def short_quality(name: str, seeds: int, bar: float, quick: bool, share: float = SHARE) -> Measured:
    """Mean accuracy over the seeds (for spoken digits: over the speakers), trained from scratch, low-rank beside dense."""
    runs = range(1 if quick else seeds)
    dense, lrt = [trained(name, "dense", i, quick) for i in runs], [trained(name, "lrt", i, quick, share) for i in runs]
    means = [statistics.fmean(t.accuracy for t in group) for group in (dense, lrt)]
    floor = statistics.fmean(cases.nearest_neighbour(name, i) for i in runs)
    fewer, pairs = dense[0].weights / lrt[0].weights, [(a.accuracy, b.accuracy) for a, b in zip(dense, lrt)]
    shown = (
        f"{means[1]:.1f} % beside {means[0]:.1f} % dense at {fewer:.1f}x fewer weights "
        f"({', '.join(f'{b:.1f}/{a:.1f}' for a, b in pairs)}); nearest neighbour {floor:.1f} %"
    )
    met = means[1] >= means[0] - bar and fewer >= 2
    return Measured(shown, None if quick else met, {"dense": means[0], "lrt": means[1], "fewer": fewer, "floor": floor})


def too_thin(name: str, bar: float, quick: bool) -> Measured:
    """The control: a fiftieth of the break-even rank, one seed. A quick run trains too little to tell."""
    dense, lrt = trained(name, "dense", 0, quick), trained(name, "lrt", 0, quick, 0.02)
    shown = f"a fiftieth of the break-even rank: {lrt.accuracy:.1f} % beside {dense.accuracy:.1f} %"
    return Measured(shown, not quick and lrt.accuracy >= dense.accuracy - bar)


def long_quality(quick: bool) -> Measured:
    dense, linformer = (trained("mnist", kind, 0, quick) for kind in ("dense", "linformer"))
    speed, floor = dense.step_seconds / linformer.step_seconds, cases.nearest_neighbour("mnist", 0)
    shown = (
        f"{linformer.accuracy:.1f} % beside {dense.accuracy:.1f} % dense, steps {speed:.2f}x as fast (dense in the fused "
        f"kernel), {projections(linformer.model):,} weights more; nearest neighbour {floor:.1f} %"
    )
    met = linformer.accuracy >= dense.accuracy - 2 and speed >= 1.5
    values = {"dense": dense.accuracy, "linformer": linformer.accuracy, "speed": speed, "floor": floor}
    return Measured(shown, None if quick else met, values)


def svd_start(name: str, quick: bool) -> Measured:
    steps = 2 if quick else cases.HEAL_STEPS
    got = {s: excess(name, s, 0.5, steps, quick) for s in ("svd", "random", "whitened-svd")}
    before = {s: excess(name, s, 0.5, 0, quick) for s in got}
    shown = _table(got, before)
    lost = {s: max(e, 0.0) for s, e in got.items()}
    if not lost["random"]:  # then there is nothing to halve: only a start that loses nothing either is as good
        shown, met = f"the random start ends below the dense model; {shown}", not lost["svd"]
    else:
        shown, met = f"{lost['svd'] / lost['random']:.2f}x the excess; {shown}", lost["svd"] <= 0.5 * lost["random"]
    return Measured(shown, None if quick else met, got)


def whitened_start(name: str, quick: bool) -> Measured:
    steps = 2 if quick else cases.HEAL_STEPS
    got = {s: excess(name, s, 0.5, steps, quick) for s in ("svd", "whitened-svd")}
    before = {s: excess(name, s, 0.5, 0, quick) for s in got}
    return Measured(_table(got, before), None if quick else got["whitened-svd"] <= got["svd"], got)


def _table(after: dict[str, float], before: dict[str, float]) -> str:
    return ", ".join(f"{s} {after[s]:+.3f} nats ({before[s]:+.2f} before)" for s in after)


def without_tuning(name: str, quick: bool) -> Measured:
    """Perplexity ratios at three shares of the blocks' parameters removed, without a gradient step."""
    removed, parts, met = (0.21,) if quick else (0.12, 0.21, 0.32), [], True
    values = {}
    for share in removed:
        ratios = {s: float(torch.tensor(excess(name, s, 1 - share, 0, quick)).exp()) for s in ("svd", "whitened-svd")}
        parts.append(f"{share:.0%}: x {ratios['svd']:.1f} plain, x {ratios['whitened-svd']:.1f} whitened")
        met, values[str(share)] = met and ratios["whitened-svd"] < ratios["svd"], ratios
    return Measured("; ".join(parts), met, values)


def bert_saving(quick: bool) -> Measured:
    """Arithmetic, not a measurement: measured step times of a block, as many steps, the head over the vocabulary unchanged."""
    rank = int(SHARE * break_even(BERT.d, BERT.d))
    key, whole = ("lrt", SMALL.r if quick else rank), {"dense": 0.0, "lrt": 0.0}
    for n, share in PHASES.items():
        got = step_seconds(n, (DENSE, key), True, quick)
        rate = got[DENSE] / (
            3 * advise.macs("dense", SMALL if quick else BERT, n) / n
        )  # seconds per multiply-accumulate
        head = 3 * 0.15 * BERT.d * PIECES * rate
        for name, seconds in (("dense", got[DENSE]), ("lrt", got[key])):
            whole[name] += BERT_STEPS * share * BATCH * n * (BLOCKS * seconds + head)
    saved = 1 - whole["lrt"] / whole["dense"]
    hours = {k: v / 3600 for k, v in whole.items()}
    shown = (
        f"{saved:.0%} by arithmetic, rank {key[1]}: {BERT_STEPS:,} steps of {BATCH} sequences, 90 % of 128 and 10 % of 512 "
        f"tokens, at this machine's step times {hours['dense']:,.0f} and {hours['lrt']:,.0f} hours; at {WATTS:.0f} W (assumed) "
        f"{(hours['dense'] - hours['lrt']) * WATTS / 1e6:,.1f} MWh less. Equal steps to equal quality is assumed, not shown"
    )
    return Measured(shown, None if quick else saved >= 0.3, {"saved": saved, "hours": hours, "rank": key[1]})


def package_beside(quick: bool) -> Measured:
    """The linformer package's attention with our weights: the same outputs, and the time of both."""
    try:
        from linformer import LinformerSelfAttention
    except ImportError:
        return Measured("the package linformer is not installed (pip install --no-deps linformer==0.2.3)", None)
    n, s = (64, SMALL) if quick else (1024, BERT)
    block = bert_block("linformer", n, s).requires_grad_(False)
    theirs = LinformerSelfAttention(s.d, n, k=s.P(n), heads=s.heads).requires_grad_(False)
    for ours, name in ((block.q, "to_q"), (block.k, "to_k"), (block.v, "to_v"), (block.o, "to_out")):
        getattr(theirs, name).weight.copy_(ours.weight)
    theirs.to_out.bias.copy_(block.o.bias)
    theirs.proj_k.copy_(block.squeeze_k.T)
    theirs.proj_v.copy_(block.squeeze_v.T)
    x, taken = cases.input_of(n, s.d, 2 * n).detach(), {"ours": [], "theirs": []}
    sides = {"ours": lambda: block.o(block.attention(x)), "theirs": lambda: theirs(x)}
    off = float((sides["ours"]() - sides["theirs"]()).abs().max() / sides["theirs"]().abs().max())
    for _ in range(1 if quick else 7):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - begin)
    ratio = statistics.median(taken["ours"]) / statistics.median(taken["theirs"])
    shown = f"outputs differ by {off:.0e}, forward pass in {ratio:.2f}x of its time"
    return Measured(shown, off <= 1e-4 and (quick or ratio <= 1.1), {"off": off, "ratio": ratio})


def in_the_engine(name: str, quick: bool) -> Measured:
    """A factorized decoder in the native engine: the same logits as in PyTorch, and a token's time beside the dense one's."""
    subject = cases.subject_of(name, quick)
    thin = Factorize(rank=SHARE, solver="svd").apply(subject.model)
    ids = next(iter(subject.task.batches("test")))[0, :33].tolist()
    engines = {"dense": Engine.of_model(subject.model, threads=1), "thin": Engine.of_model(thin, threads=1)}
    with torch.no_grad():
        want = thin(torch.tensor([ids[:-1]]))[0, -1]
    off = float((torch.from_numpy(engines["thin"].forward(ids[:-1], [0] * (len(ids) - 1))[-1]) - want).abs().max())
    taken = {k: [] for k in engines}
    for _ in range(2 if quick else 9):
        for k, engine in engines.items():
            engine.truncate(0, 0)
            engine.forward(ids[:8], [0] * 8)
            begin = time.perf_counter()
            for token in ids[8:]:
                engine.forward([token], [0])
            taken[k].append(time.perf_counter() - begin)
    speed = statistics.median(taken["dense"]) / statistics.median(taken["thin"])
    off /= float(want.abs().max())
    shown = (
        f"logits differ by {off:.0e} of the largest; tokens {speed:.2f}x as fast at {1 / SHARE:.1f}x fewer weights in the "
        f"blocks"
    )
    return Measured(shown, off <= 1e-3 and (quick or speed >= 1.2), {"off": off, "speed": speed})


def on(measure: Callable[..., Measured], name: str, *args) -> Callable[[bool], Measured]:
    """`measure` on a model; where that is not installed, the claim says so."""

    def run(quick: bool) -> Measured:
        if name == WIDE:
            try:
                find(name)
            except NetsukeError:
                return Measured(f"the model {name} is not installed (recipes/tinylm trains it)", None)
        return measure(name, *args, quick)

    return run


SUBJECT_FILES = {STORIES: STORIES_FILES, WIDE: domain_files(), "digits": ()}
WHERE = {STORIES: "stories260K", WIDE: "wide", "digits": "digits encoder"}

CLAIMS = [
    Claim(
        "parameters and multiply-adds of a BERT-base block are the formulas, n 64 to 4,096", "r(in + out) for in · out",
        "equal to the last one", formulas, lambda quick: formulas(quick, forget=True),
    ),
    Claim(
        "short inputs: LRT of rank 64 trains faster, n ≤ 256, BERT-base block", "faster at ≤ 512 tokens", "step ≤ 0.6x of dense",
        lambda quick: faster(LRT, SHORT, 0.6, quick),
    ),
    Claim(
        "long inputs: Linformer with 128 summaries trains faster, n ≥ 2,048, BERT-base block", "faster at ≥ 512 tokens",
        "step ≤ 0.6x of dense", lambda quick: faster(LINFORMER, LONG, 0.6, quick),
    ),
    Claim(
        "times of LRT and Linformer cross where foretold, attention maps in the open", "at 512 tokens",
        "within a factor 2 of the adviser", lambda quick: time_crossing(True, quick), no_crossing,
    ),
    Claim(
        "times of LRT and Linformer cross where foretold, fused attention", "",
        "within a factor 2 of 6d + 2k − 9r", lambda quick: time_crossing(False, quick), no_crossing,
    ),
    Claim(
        "short inputs: LRT trains in less memory, n = 128", "less at ≤ 512 tokens", "peak ≤ 0.85x of dense",
        lambda quick: memory_at("lrt", 128, 0.85, quick),
    ),
    Claim(
        "long inputs: Linformer trains in less memory, n = 2,048", "less at ≥ 512 tokens", "peak ≤ 0.5x of dense",
        lambda quick: memory_at("linformer", 2048, 0.5, quick),
    ),
    Claim(
        "memory of LRT and Linformer crosses near 512 tokens", "512", "256 to 2,048", memory_crossing, fused_memory
    ),
    Claim(
        "LRT suits devices: a smaller file, Linformer's is no smaller", "much smaller; not smaller",
        "LRT ≤ 0.25x, Linformer ≥ 1.0x", file_sizes,
    ),
    Claim(
        "low-rank by design keeps the accuracy, digits (64 tokens)", "small change", "≥ dense − 1.0 point, ≥ 2x fewer weights",
        lambda quick: short_quality("digits", 3, 1.0, quick), lambda quick: too_thin("digits", 1.0, quick),
    ),
    Claim(
        "low-rank by design keeps the accuracy, spoken digits of unheard speakers",
        "> 50 % fewer weights, small change (AiShell)", "≥ dense − 2.0 points, ≥ 2x fewer weights",
        lambda quick: short_quality("spoken", 6, 2.0, quick), lambda quick: too_thin("spoken", 2.0, quick),
        spoken.FILES,
    ),
    Claim(
        "Linformer keeps the accuracy on 784 tokens (MNIST by pixels)", "", "≥ dense − 2.0 points, steps ≥ 1.5x as fast",
        long_quality, None, MNIST,
    ),
    *(
        Claim(
            f"an SVD start beats a random one after 200 steps, {WHERE[name]}", "", "≤ 0.5x the excess loss",
            on(svd_start, name), None, SUBJECT_FILES[name],
        )
        for name in cases.SUBJECTS
    ),
    *(
        Claim(
            f"a whitened SVD start is no worse than a plain one after 200 steps, {WHERE[name]}", "", "≤ 1x the excess loss",
            on(whitened_start, name), None, SUBJECT_FILES[name],
        )
        for name in cases.SUBJECTS
    ),
    *(
        Claim(
            f"without fine-tuning the SVD must be whitened, {WHERE[name]}", "", "whitened below plain at 12, 21, 32 % removed",
            on(without_tuning, name), None, SUBJECT_FILES[name],
        )
        for name in (STORIES, WIDE)
    ),
    Claim(
        "BERT-base with LRT: less computation, as arithmetic", "> 30 % of computation, money, CO₂", "≥ 30 %", bert_saving
    ),
    Claim(
        "beside the package linformer 0.2.3, the same weights", "", "same outputs to 1e-4, ≤ 1.1x its time", package_beside
    ),
    Claim(
        "a factorized decoder runs in the native engine, wide", "", "same logits to 1e-3, tokens ≥ 1.2x as fast at 0.4x weights",
        on(in_the_engine, WIDE), None, SUBJECT_FILES[WIDE],
    ),
    Claim(
        "beside the library greenformer 0.2.2", "", why="it pins packages of 2021 and imports a class that has moved since: it "
        "cannot be installed beside a current PyTorch; its semantics are tested against formulas",
    ),
    Claim(
        "BERT's pre-training, GLUE, AiShell, CO₂ in the field", "> 30 % less; > 50 % fewer weights at a small change",
        why="weeks of accelerators and their data are not here",
    ),
]  # fmt: skip
