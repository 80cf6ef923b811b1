"""What MobileQuant's claims are measured on: models with their texts, the treated models built once, losses by split.

Texts are those of r_sparse_cases: stories260K on stories that it wrote itself and tested on real ones, `wide` on five domains.
A treatment is a list of switches; every one is learned on the train split, nothing is chosen by what is scored.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from netsuke.compress.equivalent import fold
from netsuke.compress.static import WIDE, BitMap, calibrate, quantized, sensitivity
from netsuke.models.llama import Llama
from netsuke.systems.modegpt_cases import STORIES, Case, Rows
from netsuke.systems.r_sparse_cases import WIDE as WIDE_MODEL
from netsuke.systems.r_sparse_cases import case_of as whole_case
from netsuke.train.mobilequant import MobileQuant, smoothing_scales

FACTOR, CHANNELS = 40.0, 2  # of planted outliers, per norm
# Switches by treatment, in the order of the ablation. Rounding to nearest is the floor.
TREATMENTS: dict[str, dict] = {
    "rtn": {"smooth": None, "learn": "off"},
    "smooth": {"learn": "off"},
    "lwc": {"let": False, "ranges": "off"},
    "let": {"ranges": "off"},
    "all": {},
    "blockwise": {"learn": "blockwise"},
    "normed": {"target": "normed"},
    "logits": {"target": "logits"},
    "paper's ranges": {"ranges": "raw"},
    "narrow": {"learn": "off", "wide": ()},
}
EPOCHS = {STORIES: 5, WIDE_MODEL: 2}  # of 64 windows; one takes 10 times as long as the other


@cache
def case_of(name: str, quick: bool) -> Case:
    """The model and its text; a quick run of `wide` has two batches of four short windows per split. Raises NetsukeError for
    what is absent."""
    case = whole_case(name, quick)
    if not quick or name == STORIES:
        return case
    rows = {split: [batch[:4, :129] for batch in case.task.rows[split][:2]] for split in case.task.rows}
    return Case(case.model, Rows(rows), 8, (), {})


def calibration(name: str, quick: bool) -> int:
    return min(case_of(name, quick).calibration, 8 if quick else 64)


def knobs(name: str, scheme: str, treatment: str, seed: int, quick: bool) -> MobileQuant:
    epochs = 1 if quick else EPOCHS.get(name, 3)
    return MobileQuant(
        scheme=scheme, calibration=calibration(name, quick), epochs=epochs, seed=seed, **TREATMENTS[treatment]
    )


@cache
def planted(name: str, quick: bool) -> Llama:
    """The model with two channels of every norm 40 times larger and their readers' columns 40 times smaller: the same
    function, with the outliers that large models grow and small ones do not."""
    model, rng, scales = case_of(name, quick).model, torch.Generator().manual_seed(0), {}
    for i in range(len(model.blocks)):
        for pair in ("attn_in", "mlp_in"):
            s = torch.ones(model.cfg.width)
            s[torch.randperm(model.cfg.width, generator=rng)[:CHANNELS]] = 1 / FACTOR
            scales[f"blocks.{i}.{pair}"] = s
    return fold(model, scales)


@cache
def treated(name: str, scheme: str, treatment: str, quick: bool, seed: int = 0, outliers: bool = False) -> Llama:
    """The quantized model after a treatment."""
    case = case_of(name, quick)
    model = planted(name, quick) if outliers else case.model
    return knobs(name, scheme, treatment, seed, quick).apply(model, case.task)


@cache
@torch.no_grad()
def wrongly_smoothed(name: str, quick: bool) -> Llama:
    """The planted model, smoothed by the right scales on the wrong channels, at W8A8."""
    case, model, windows = case_of(name, quick), planted(name, quick), calibration(name, quick)
    rng = torch.Generator().manual_seed(1)
    scales = smoothing_scales(model, case.task, windows, 0.5)
    shuffled: dict[str, Tensor] = {n: s[torch.randperm(len(s), generator=rng)] for n, s in scales.items()}
    model = fold(model, shuffled)
    return quantized(model, calibrate(model, case.task, windows), BitMap.of("w8a8"))


@cache
@torch.no_grad()
def coarse(name: str, quick: bool) -> Llama:
    """Activations as in W8A8, weights of 4 bits with one scale per map and no treatment."""
    case = case_of(name, quick)
    bits = BitMap(4, dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), "tensor"), WIDE)
    return quantized(case.model, calibrate(case.model, case.task, calibration(name, quick)), bits)


def nats(name: str, model: Llama, quick: bool, split: str = "test") -> float:
    """Mean loss of a split."""
    return math.log(case_of(name, quick).score(model, split))


@cache
def float_nats(name: str, quick: bool) -> float:
    return nats(name, case_of(name, quick).model, quick)


@cache
def excess(name: str, scheme: str, treatment: str, quick: bool, seed: int = 0, outliers: bool = False) -> float:
    """Test loss over the float model's, in nats per token."""
    return nats(name, treated(name, scheme, treatment, quick, seed, outliers), quick) - float_nats(name, quick)


@cache
def site_table(name: str, quick: bool) -> list[dict]:
    """What each site costs at 8 and at 16 bits on its own, on validation text, worst first."""
    case = case_of(name, quick)
    ranges = calibrate(case.model, case.task, calibration(name, quick))
    return sensitivity(case.model, case.task, ranges, limit=1 if quick else 2)
