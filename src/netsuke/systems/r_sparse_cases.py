"""What R-Sparse's claims are measured on: three models with their texts, sparse models built once, rivals at equal traffic.

stories260K is calibrated and searched on stories that it samples itself and scored on real ones, as in modegpt_cases. `wide`
and `small` have windows of five domains, as many of each, every split in the same mixture. Every window is decoded from
its second token on: no dense prompt but the first token, which has nothing before it.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor

from netsuke.compress.quantize import Quantize, calibration_windows
from netsuke.compress.sparse_channels import MapTraffic, block_maps, decoding, make_sparse, traffic
from netsuke.compress.sparse_recipe import Found
from netsuke.compress.sparsify import Sparsify
from netsuke.data.domains import DOMAINS
from netsuke.measure.activations import QuantileSketch, SquareSum, tapped
from netsuke.models.llama import Llama
from netsuke.models.load import load
from netsuke.models.tokenizer import Tokenizer
from netsuke.systems.modegpt_cases import STORIES, Case, Rows
from netsuke.systems.modegpt_cases import case_of as stories_case
from netsuke.tasks.base import run_calibration
from netsuke.tasks.domains import DomainModeling

WIDE, SMALL = "wide", "small"
CONTEXT = 256
BYTES = 6  # of text for a token, more than any domain takes
WINDOWS = {"train": 20, "validation": 8, "test": 16}  # per domain
QUICK_WINDOWS = {"train": 2, "validation": 1, "test": 1}
PAPER_TOKENS = 512  # of calibration text in the released code
RELEASED_SHARE = 0.1  # of a sequence is sparse by default in the released code's evaluation


def mixture(tokenizer: Tokenizer, split: str, windows: int) -> list[Tensor]:
    """The first windows (CONTEXT + 1) of every domain, in batches that hold two of each."""
    task = DomainModeling(tokenizer, CONTEXT, scored_bytes=windows * CONTEXT * BYTES)
    whole = [[r for r in task.scored(d, split)[0] if len(r) == CONTEXT + 1][:windows] for d in task.share]
    turns = [torch.stack(turn) for turn in zip(*whole)]
    return [torch.cat(turns[i : i + 2]) for i in range(0, len(turns), 2)]


@cache
def case_of(name: str, quick: bool) -> Case:
    """The model and its text. Raises NetsukeError for what is absent."""
    if name == STORIES:
        return stories_case(name, quick)
    loaded, windows = load(name, dtype="float32"), QUICK_WINDOWS if quick else WINDOWS
    task = Rows({split: mixture(loaded.tokenizer, split, count) for split, count in windows.items()})
    return Case(loaded.model, task, windows["train"] * len(DOMAINS), (), {})


def method(name: str, sparsity: float, quick: bool, **knobs) -> Sparsify:
    case = case_of(name, quick)
    effort = {"population": 4, "generations": 1, "trial": 8} if quick else {"population": 16, "generations": 10}
    trial = {"trial": 16 if name == STORIES else 10}
    return Sparsify(sparsity, calibration=case.calibration, **{**trial, **effort, **knobs})


@cache
def found(name: str, sparsity: float, quick: bool) -> Found:
    """The recipe search; train and validation text only."""
    case = case_of(name, quick)
    return method(name, sparsity, quick, search="evolve").searched(case.model, case.task)


@cache
@torch.no_grad()
def sparse_model(name: str, sparsity: float, how: str, quick: bool) -> Llama:
    """how: a number is ρ everywhere; "searched"; "released", the code's score where ρ = 1; "dense", thresholds through the dense
    model; "paper", the same from 512 tokens; "4 bits", the quantized model with ρ = 1."""
    case = case_of(name, quick)
    if how == "searched":
        return method(name, sparsity, quick, per_layer=found(name, sparsity, quick).plan).apply(case.model, case.task)
    if how in ("released", "dense"):
        switch = {"released": {"score": "released"}, "dense": {"inputs": "dense"}}[how]
        return method(name, sparsity, quick, **switch).apply(case.model, case.task)
    if how == "paper":
        model, knobs = copy.deepcopy(case.model), method(name, sparsity, quick)
        ids = torch.cat([i.flatten() for i in calibration_windows(case.task, case.calibration)])[None, :PAPER_TOKENS]
        make_sparse(model, [ids.view(2, -1)], knobs.plan(model), dense=True)
        return model
    if how == "4 bits":
        return method(name, sparsity, quick).apply(four_bits(name, quick), case.task)
    return method(name, sparsity, quick, rho=float(how)).apply(case.model, case.task)


@cache
def four_bits(name: str, quick: bool) -> Llama:
    case = case_of(name, quick)
    return Quantize(bits=4, group=32, calibration=min(case.calibration, 32)).apply(case.model, case.task)


@cache
@torch.no_grad()
def scored(name: str, sparsity: float, how: str, quick: bool, split: str = "test") -> tuple[float, list[MapTraffic]]:
    """Perplexity with every token but the first of a text decoded by the rule, and the traffic of every map."""
    case, model = case_of(name, quick), sparse_model(name, sparsity, how, quick)
    with decoding(model):
        return case.score(model, split), traffic(model)


@cache
@torch.no_grad()
def dense_score(name: str, split: str, quick: bool, four: bool = False) -> float:
    case = case_of(name, quick)
    return case.score(four_bits(name, quick) if four else case.model, split)


def ratio(name: str, sparsity: float, how: str, quick: bool, split: str = "test") -> float:
    """Perplexity over that of the dense model (of the dense 4-bit one for "4 bits")."""
    return scored(name, sparsity, how, quick, split)[0] / dense_score(name, split, quick, how == "4 bits")


@cache
@torch.no_grad()
def released_ratio(name: str, sparsity: float, how: str, quick: bool) -> float:
    """The same as the released code scores it by default: the first nine tenths of every sequence run dense."""
    case, model = case_of(name, quick), sparse_model(name, sparsity, how, quick)
    total = count = 0.0
    for rows in case.task.batches("test"):
        tokens = rows.shape[1] - 1
        with decoding(model, prompt=tokens - round(RELEASED_SHARE * tokens)):
            total += float(case.task.loss(model, rows)) * rows[:, 1:].numel()
        count += rows[:, 1:].numel()
    return float(torch.tensor(total / count).exp()) / dense_score(name, "test", quick)


@cache
@torch.no_grad()
def rival_ratio(name: str, sparsity: float, rival: str, quick: bool) -> float:
    """Perplexity ratio of another way to read as few weights: "magnitude" and "wanda" (a share s of each matrix's weights set to
    zero; their indices read for nothing), "relu" and "cats" (see `output_sided`)."""
    case = case_of(name, quick)
    model = copy.deepcopy(case.model)
    if rival in ("magnitude", "wanda"):
        squares = {n: SquareSum() for n in block_maps(model)}
        with tapped({m: squares[n] for n, m in block_maps(model).items()}):
            run_calibration(model, case.task, case.calibration)
        for name_, layer in block_maps(model).items():
            score = layer.weight.abs()
            if rival == "wanda":  # per output: |W| times the norm of its input (Sun et al., 2024)
                score = score * squares[name_].total.sqrt().float()
                cut = score.kthvalue(max(round(sparsity * layer.ins), 1), dim=1, keepdim=True).values
            else:
                cut = score.flatten().kthvalue(max(round(sparsity * score.numel()), 1)).values
            layer.weight.masked_fill_(score <= cut, 0.0)
    else:
        output_sided(model, case, sparsity, relu=rival == "relu")
    return case.score(model, "test") / dense_score(name, "test", quick)


def output_sided(model: Llama, case: Case, sparsity: float, relu: bool) -> None:
    """Skips hidden units whose activated gate is small: their rows of `up` and columns of `down` are not read, gate and attention
    are read whole. As many units go as bring the traffic of the whole model to 1 − s.

    relu   ReLU in SiLU's place, without training (Mirzadeh et al., 2024); else SiLU as trained, cut by size (CATS, 2024)
    """
    maps = block_maps(model)
    whole = sum(m.outs * m.ins for m in maps.values())
    reached = sum(m.outs * m.ins for n, m in maps.items() if n.rpartition(".")[2] in ("up", "down"))
    share = min(sparsity * whole / reached, 1.0)
    swap = {f"blocks.{i}.sigmoid": lambda s: (s > 0.5).to(s.dtype) for i in range(len(model.blocks))} if relu else {}
    sketches = [QuantileSketch() for _ in model.blocks]

    def heard(sketch: QuantileSketch):
        def listen(x: Tensor) -> Tensor:
            sketch.add(x[:, 1:].abs())
            return x

        return listen

    model.stand(swap | {f"blocks.{i}.silu": heard(s) for i, s in enumerate(sketches)})
    run_calibration(model, case.task, case.calibration)

    def cut(threshold: float):
        return lambda x: x * (x.abs() > threshold)

    model.stand(swap | {f"blocks.{i}.silu": cut(s.quantile(share)) for i, s in enumerate(sketches)})


def worst_map(rows: list[MapTraffic], sparsity: float) -> tuple[float, str]:
    """Largest distance of a map's realised sparsity from the target, and which map."""
    return max((abs(r.sparsity - sparsity), r.name) for r in rows)
