"""Static integers for a whole decoder, with transformations, clips and ranges learned end to end.

"MobileQuant: Mobile-friendly Quantization for On-device Language Models" (Tan et al., EMNLP Findings 2024). Every tensor gets
a fixed grid (compress/static.py says which), and then, in order, each step a switch:

    0  smoothing      s = a^α / w^(1−α) at every equivalent pair (compress/equivalent.py), folded
    1  ranges         smallest and largest value of every site over the calibration windows
    2  let            learnable scales at the same pairs and, where rotation allows, between q and k, starting at 1
    3  lwc            learnable clips of the weights' ranges, one per map or row
    4  lrl            learnable ranges of the 8-bit sites

Steps 2 to 4 are learned together, by AdamW on the mean squared difference between the float stack's final hidden states and
the quantized stack's (`learn="e2e"`), or block by block, each on the output of its float twin with the quantized model's
inputs ("blockwise", the order of OmniQuant, kept as the baseline). Embedding, final norm and head take no part.

Where it differs from the paper's code: rotary pairs share one q↔k scale, without which that pair is not exact; ranges are
learned as logarithms of their ends, because steps of 1e-6 on a zero point never move it (ranges="raw" is the paper's); zero
points are rounded while learning, too; norm weights are not clipped, 16 bits have no use for it; a loss that is not finite
ends the run with the name of a site. Rates are for hundreds of steps of two windows, the paper's (1e-3, 1e-2, 1e-6) for
60,000 of one.

Use it when activations must be static 8-bit integers: on NPUs, or for the integer-only executor (runtime/integer.py). Where
only weights must shrink, compress/quantize.py loses less.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from netsuke.compress.equivalent import (
    bounded,
    column_reach,
    fold,
    pair_sizes,
    skipped,
    smoothing,
    transform,
    weights_of,
)
from netsuke.compress.fake_quant import clip_start, fake_static, fake_weight, grid
from netsuke.compress.method import Method
from netsuke.compress.quantize import calibration_windows, quantize_linear
from netsuke.compress.static import (
    KNOWN,
    SCHEMES,
    WIDE,
    BitMap,
    Ranges,
    calibrate,
    norm_on_grid,
    quantized,
    reason_against,
)
from netsuke.errors import NetsukeError
from netsuke.layers.static import levels
from netsuke.measure.activations import AbsMax, tapped
from netsuke.models.llama import LINEARS, SITES, Block, Llama
from netsuke.tasks.base import Task, run_calibration
from netsuke.train.loop import LoopKnobs, train

LEARN = ("e2e", "blockwise", "off")
TARGETS = ("stream", "normed", "logits")
RANGES = ("log", "raw", "off")
RAW_RATE = 1e-6
FLOOR = 0.1  # of a rate, at the end of its cosine
SMOOTHED = ("attn_in", "mlp_in", "v_o", "up_down")


# --- step 0 ---


@torch.no_grad()
def smoothing_scales(model: Llama, task: Task, windows: int, alpha: float, grouped: bool = False) -> dict[str, Tensor]:
    """SmoothQuant's scales at every pair between a linear map and what feeds it ("blocks.0.attn_in": (C,))."""
    heard, scales = {}, {}
    for i, block in enumerate(model.blocks):
        for pair in pair_sizes(model.cfg, i, grouped).keys() & set(SMOOTHED):
            site, dims = {"v_o": ("v", 2), "up_down": ("hidden", 1)}.get(pair, (pair, 1))
            heard[f"blocks.{i}.{pair}"] = block, site, AbsMax(dims)
    with tapped(sites={(block, site): acc for block, site, acc in heard.values()}):
        run_calibration(model, task, windows)
    for name, (block, _, acc) in heard.items():
        w = column_reach(weights_of(block), name.rpartition(".")[2], model.cfg)
        scales[name] = smoothing(acc.reach.reshape(-1), w, alpha)
    return scales


# --- steps 2 to 4 ---


class BlockLearner(nn.Module):
    """One block under simulated quantization: the parameters that are learned, and the block that they make.

    let   scales by pair     clip  logits by map     span  (2,) by 8-bit site: logarithms of both ends' growth, or
    (raw) what is added to Δ and z
    """

    def __init__(self, block: Block, ranges: Ranges, bits: BitMap, knobs: MobileQuant):
        super().__init__()
        self.twin, self.cfg, self.layer = copy.deepcopy(block).requires_grad_(False), block.cfg, block.layer
        self.base, self.bits, self.raw = weights_of(block), bits, knobs.ranges == "raw"
        sizes = pair_sizes(block.cfg, block.layer, knobs.grouped) if knobs.let else {}
        self.let = nn.ParameterDict({pair: torch.ones(n) for pair, n in sizes.items()})
        self.clip = nn.ParameterDict()
        if knobs.lwc:
            for name in LINEARS:
                self.clip[name] = clip_start(self.base[f"{name}.weight"], bits.per_of(name))
        self.ends = {s: ranges[f"blocks.{block.layer}.{s}"] for s in bits.sites()}
        learned = [s for s, b in bits.sites().items() if b == 8 and s not in KNOWN] if knobs.ranges != "off" else []
        self.span = nn.ParameterDict({site: torch.zeros(2) for site in learned})
        # 16-bit steps are 256 times finer: leaving them out of the simulation changes no digit and halves its time.
        self.twin.sites = {s: self._at(s, b) for s, b in bits.sites().items() if b == 8}

    def _at(self, site: str, bits: int):
        return lambda x: fake_static(x, *self.range(site), bits)

    def range(self, site: str) -> tuple[Tensor, Tensor]:
        """Low and high end of a site, as they stand."""
        low, high = (torch.tensor(v) for v in self.ends[site])
        if site not in self.span:
            return low, high
        a, b = self.span[site].unbind()
        if not self.raw:
            return low * a.exp(), high * b.exp()
        least, most = levels(self.bits.sites()[site])
        scale, zero = grid(low, high, self.bits.sites()[site])
        scale, zero = scale + a, zero + b
        return (least - zero) * scale, (most - zero) * scale

    def transformed(self) -> dict[str, Tensor]:
        """The block's weights after the learned transformations, not yet rounded."""
        return transform(self.base, {p: bounded(s) for p, s in self.let.items()}, self.cfg, self.layer)

    def forward(self, x: Tensor) -> Tensor:
        w = self.transformed()
        for name in LINEARS:
            key = f"{name}.weight"
            w[key] = fake_weight(w[key], self.bits.weights, self.bits.per_of(name), dict(self.clip).get(name))
        for norm in ("attn_norm.weight", "mlp_norm.weight"):
            w[norm] = norm_on_grid(w[norm])
        return functional_call(self.twin, w, (x,))

    @torch.no_grad()
    def found(self) -> dict[str, tuple[float, float]]:
        """Low and high end of every site, by its full name."""
        ranges = {s: self.range(s) for s in self.ends}
        return {f"blocks.{self.layer}.{s}": (float(low), float(high)) for s, (low, high) in ranges.items()}


def optimizers(learners: nn.Module, knobs: MobileQuant) -> list[tuple[torch.optim.Optimizer, float]]:
    """AdamW without weight decay, one for each kind of parameter, with its rate."""
    rates = {
        "let": knobs.let_rate,
        "clip": knobs.lwc_rate,
        "span": knobs.lrl_rate if knobs.ranges == "log" else RAW_RATE,
    }
    out = []
    for kind, rate in rates.items():
        own = [p for n, p in learners.named_parameters() if f".{kind}." in f".{n}" and p.requires_grad]
        if own:
            out.append((torch.optim.AdamW(own, lr=rate, weight_decay=0.0), rate))
    return out


def distance(model: Llama, got: Tensor, wanted: Tensor, target: str) -> Tensor:
    """How far final hidden states (B, T, C) are from the float model's: mean squares of the stream itself (the paper's; a few
    large channels rule it), of the normed stream, or the divergence of what the head makes of it."""
    if target == "stream":
        return F.mse_loss(got, wanted)
    if target == "normed":
        return F.mse_loss(model.norm(got), model.norm(wanted))
    p, q = (model.logits(x).log_softmax(-1) for x in (wanted, got))
    return (p.exp() * (p - q)).sum(-1).mean()


def learn(model: Llama, ids: list[Tensor], ranges: Ranges, bits: BitMap, knobs: MobileQuant) -> list[BlockLearner]:
    """Learns what the knobs switch on, on windows of ids (each (B, T)); returns the blocks' learners.

    Raises NetsukeError, naming the site of the largest step, when the loss is not finite.
    """
    learners = nn.ModuleList(BlockLearner(b, ranges, bits, knobs) for b in model.blocks)
    if knobs.learn == "off" or not any(p.requires_grad for p in learners.parameters()):
        return list(learners)
    rows = torch.cat(ids)
    order = torch.cat([
        torch.randperm(len(rows), generator=torch.Generator().manual_seed(knobs.seed * 1000 + e)) for e in range(knobs.epochs)
    ]).split(knobs.batch)  # fmt: skip
    table = quantize_linear(model.embed, 8, model.embed.ins, "rtn", name="embed")
    with torch.no_grad():
        exact, rough = (torch.cat([e.rows(part) for part in rows.split(8)]) for e in (model.embed, table))
    if knobs.learn == "e2e":
        wanted = _through(list(model.blocks), exact)

        def whole(stack: nn.Module, at: Tensor) -> Tensor:
            x = rough[at]
            for learner in stack:
                x = learner(x)
            return distance(model, x, wanted[at], knobs.target)

        _run(learners, whole, order, knobs)
        return list(learners)
    for learner, block in zip(learners, model.blocks):
        exact = _through([block], exact)

        def single(one: nn.Module, at: Tensor, x: Tensor = rough, y: Tensor = exact) -> Tensor:
            return F.mse_loss(one(x[at]), y[at])

        _run(learner, single, order, knobs)
        rough = _through([learner], rough)
    return list(learners)


@torch.no_grad()
def _through(blocks: list[nn.Module], x: Tensor) -> Tensor:
    """The stream (W, T, C) after some blocks, a few windows at a time."""
    out = []
    for part in x.split(8):
        for block in blocks:
            part = block(part)
        out.append(part)
    return torch.cat(out)


def _run(learners: nn.Module, loss, order: tuple[Tensor, ...], knobs: MobileQuant) -> None:
    loop = LoopKnobs(steps=len(order), warmup=0.0, floor=FLOOR, clip=math.inf)
    try:
        with torch.enable_grad():
            train(learners, lambda step: order[step], loss, loop, stepped=optimizers(learners, knobs))
    except FloatingPointError as e:
        widths: dict[str, float] = {}
        for one in learners if isinstance(learners, nn.ModuleList) else [learners]:
            widths |= {s: high - low for s, (low, high) in one.found().items()}
        steps = {s: w / 255 for s, w in widths.items() if s.rpartition(".")[2] not in knobs.wide}
        site = max(steps, key=lambda s: steps[s] if math.isfinite(steps[s]) else math.inf)
        raise NetsukeError(
            "learn static ranges", f"{e}; the largest step is {steps[site]:g}, at {site}", "a finite loss",
            "smaller rates, or 16 bits at that site: wide",
        ) from None  # fmt: skip


# --- the method ---


@dataclass(frozen=True)
class MobileQuant(Method):
    """Attributes:

    scheme       "w8a8", "w4a8" (weights of 8 or 4 bits), or "float", which changes nothing
    smooth       α of step 0, 0 to 1; None leaves it out. 0.5 is the paper's
    let, lwc     learn transformations, learn clips
    ranges       how ranges are learned: "log", "raw" (the paper's Δ and z at a rate of 1e-6), "off"
    learn        "e2e", "blockwise", or "off": steps 0 and 1 only
    target       of e2e: "stream" (the paper's), "normed", "logits"
    wide         sites of 16 bits; leave a name out to give it 8
    grouped      transform v→o and q↔k under grouped queries as well, tied over the group; the paper leaves them out
    """

    name: ClassVar[str] = "mobilequant"
    paper: ClassVar[str] = (
        "MobileQuant: Mobile-friendly Quantization for On-device Language Models (EMNLP Findings 2024)"
    )
    trains: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True

    scheme: str = "w8a8"
    smooth: float | None = 0.5
    let: bool = True
    lwc: bool = True
    ranges: str = "log"
    learn: str = "e2e"
    target: str = "stream"
    wide: tuple[str, ...] = WIDE
    grouped: bool = False
    calibration: int = 128
    epochs: int = 5
    # Batches of 2 and these rates, of 1 to 8, 5e-3 to 0.1, 0.03 to 0.3 and 3e-3 to 0.03, were best on stories260K's own text
    batch: int = 2
    let_rate: float = 0.01
    lwc_rate: float = 0.1
    lrl_rate: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        asked = f"build {self.name}"
        object.__setattr__(self, "wide", tuple(self.wide))
        choices = {"scheme": (*SCHEMES, "float"), "ranges": RANGES, "learn": LEARN, "target": TARGETS}
        for knob, allowed in choices.items():
            if getattr(self, knob) not in allowed:
                raise NetsukeError(asked, f"{knob}={getattr(self, knob)!r}", ", ".join(allowed))
        self.require_whole(calibration=1, epochs=1, batch=1)
        for knob in ("let_rate", "lwc_rate", "lrl_rate"):
            if not isinstance(getattr(self, knob), int | float) or not 0 <= getattr(self, knob) < 1:
                raise NetsukeError(asked, f"{knob}={getattr(self, knob)!r}", "0 up to 1")
        if self.smooth is not None and not (isinstance(self.smooth, int | float) and 0 <= self.smooth <= 1):
            raise NetsukeError(asked, f"smooth={self.smooth!r}", "0 to 1, or null")
        for site in self.wide:
            if site not in SITES:
                raise NetsukeError(asked, f"wide names {site!r}", ", ".join(SITES))
        object.__setattr__(self, "needs_data", self.scheme != "float")

    def accepts(self, model: nn.Module) -> str | None:
        return reason_against(model)

    def apply(self, model: nn.Module, task: Task | None = None) -> nn.Module:
        model = self.checked(model, task)
        if self.scheme == "float":
            return model
        model.float().requires_grad_(False)  # scales are folded in, which 16 bits would round
        bits = BitMap.of(self.scheme, self.wide)
        for pair, why in skipped(model.cfg, self.grouped).items():
            warnings.warn(f"mobilequant: the pair {pair} is left out: {why} (grouped=true ties them)", stacklevel=2)
        with torch.no_grad():
            if self.smooth is not None:
                model = fold(model, smoothing_scales(model, task, self.calibration, self.smooth, self.grouped))
            ranges = calibrate(model, task, self.calibration)
            learners = learn(model, calibration_windows(task, self.calibration), ranges, bits, self)
            final = {site: ends for m in learners for site, ends in m.found().items()}
            weights, clips = [m.transformed() for m in learners], [dict(m.clip) for m in learners]
            return quantized(model, final, bits, weights, clips)

    def strengths(self) -> list[Method]:
        return [replace(self, scheme=s) for s in ("float", "w8a8", "w4a8")]
