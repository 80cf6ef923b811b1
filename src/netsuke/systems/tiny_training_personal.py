"""Personalisation on the chip: 250 steps on one pupil's hand signs, and what they give on shots that were held out.

There is one photograph per pupil and sign, so a "shot" is a photograph as another camera would have taken it: turned,
shifted, nearer or farther, brighter or darker, of more or less contrast. Practice and held-out shots are of the SAME ten
photographs, but from ranges that do not meet: no held-out turn, shift, zoom or exposure is one that was practised. What this
shows is that a device learns the hands it was shown and knows them again under cameras it has not seen; not that it would
know another photograph of them, of which there is none here, nor signs it has not been shown: training on five of a pupil's
signs and testing the other five is measured beside it.

The floor is the nearest practised shot, without any training: by the last features of the network it is above what practice
reaches (99.6 % against 98.3 %), at the price of a kept feature vector per shot. The claim is published as not met.

The network first learns from other pupils, from photographs and practice-like shots of them, with the chip's kernels. The
ranges were fixed before any gain was seen, the rate was chosen on the validation pupils; all test pupils with ten signs are
measured, none is picked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from netsuke.claims import Measured
from netsuke.graph.differentiate import UpdateRule, trained_constants, training_graph
from netsuke.graph.host import HostProgram
from netsuke.graph.ir import QGraph
from netsuke.graph.simulate import prefix
from netsuke.graph.update_plan import first_op, head
from netsuke.systems.tiny_training_cases import CLASSES, FLASH, SRAM, learned, network
from netsuke.tasks.images import Images, by_pupil, signs
from netsuke.train.int8_sgd import OnChip, on_chip, schedule
from netsuke.train.sparse_update import PUBLISHED

DATA = ("ed-vit/sign_digits64.zip",)
PLAN = PUBLISHED[49]
STEPS = 250
SEEDS = 3
HELD = 10  # held-out shots of every photograph
BASE_EPOCHS, BASE_ROUNDS, BASE_RATE = 3, 3, 0.0005
RATE = 0.003  # of 0.0003 to 0.02 the best on the validation pupils; 0.01 already diverges for some
BAR = 0.03  # gain on held-out shots
ROOM = 0.95  # a pupil whose accuracy before is above has little to gain on the boards


@dataclass(frozen=True)
class Camera:
    """From where and how a shot is taken: sizes of the changes, each from (least, most), of either sign."""

    turn: tuple[float, float]  # degrees
    shift: tuple[float, float]  # of the picture's side, in both directions
    zoom: tuple[float, float]  # natural logarithm
    light: tuple[float, float]  # added, of the full range
    contrast: tuple[float, float]  # natural logarithm

    def shots(self, codes: np.ndarray, each: int, seed: int) -> np.ndarray:
        """`each` shots (each * N, S, S, 3) int8 of the photographs (N, S, S, 3) int8, photograph by photograph in every
        round. Beyond a picture's edge its last pixel goes on."""
        rng, n = np.random.default_rng(seed), each * len(codes)

        def draw(least: float, most: float) -> torch.Tensor:
            return torch.from_numpy(rng.uniform(least, most, n) * rng.choice((-1.0, 1.0), n)).float()

        angle, zoom = torch.deg2rad(draw(*self.turn)), torch.exp(draw(*self.zoom))
        cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
        across, down = (2 * draw(*self.shift) for _ in range(2))  # torch measures a side as 2
        place = torch.stack([torch.stack([cos, -sin, across], 1), torch.stack([sin, cos, down], 1)], 1)
        light, contrast = (t[:, None, None, None] for t in (255 * draw(*self.light), torch.exp(draw(*self.contrast))))
        pictures = torch.from_numpy(np.tile(codes, (each, 1, 1, 1))).float().permute(0, 3, 1, 2)
        grid = torch.nn.functional.affine_grid(place, list(pictures.shape), align_corners=False)
        seen = torch.nn.functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
        out = (seen * contrast + light).round().clamp(-128, 127)
        return np.ascontiguousarray(out.permute(0, 2, 3, 1).numpy().astype(np.int8))


PRACTICE = Camera(turn=(0, 6), shift=(0, 0.04), zoom=(0, 0.06), light=(0, 0.08), contrast=(0, 0.12))
HELD_OUT = Camera(turn=(7, 12), shift=(0.05, 0.08), zoom=(0.07, 0.12), light=(0.1, 0.2), contrast=(0.15, 0.3))


@dataclass(frozen=True)
class Pupil:
    """Ten photographs (10, S, S, 3) int8, one of each sign, in the order of the signs."""

    number: int
    codes: np.ndarray

    def practice(
        self, signs_of: Sequence[int] = range(CLASSES), steps: int = STEPS, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """(codes, labels) of `steps` shots, equally often of each sign."""
        return self._shots(PRACTICE, signs_of, steps // len(signs_of), 1000 * seed + 2 * self.number)

    def held_out(self, signs_of: Sequence[int] = range(CLASSES), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        return self._shots(HELD_OUT, signs_of, HELD, 1000 * seed + 2 * self.number + 1)

    def _shots(self, camera: Camera, signs_of: Sequence[int], each: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return camera.shots(self.codes[list(signs_of)], each, seed), np.tile(np.array(signs_of, np.int64), each)


@cache
def hands() -> tuple[dict[str, Images], dict[str, int]]:
    """(the sets, without a person in common; the pupil's number by photograph)"""
    images, who = signs()
    return by_pupil(images, who), dict(zip(images.names, who.tolist()))


@cache
def pupils_of(split: str) -> list[Pupil]:
    """Those of a split of whom there is one photograph of every sign, by number."""
    sets, mine = hands()
    part = sets[split]
    number = np.array([mine[name] for name in part.names])
    out = []
    for p in np.unique(number):
        rows = np.flatnonzero(number == p)
        rows = rows[np.argsort(part.labels[rows], kind="stable")]
        if np.array_equal(part.labels[rows], np.arange(CLASSES)):
            out.append(Pupil(int(p), part.codes[rows]))
    return out


@cache
def schooled(photographs: int | None = None) -> QGraph:
    """The network after it learned the signs from the training pupils, plan 99, on the chip's kernels. It has seen
    practice-like shots, so that what a pupil's practice adds is not mere use to cameras."""
    g, plan, train = network(), PUBLISHED[99], hands()[0]["train"]
    rows = np.random.default_rng(0).permutation(len(train))[:photographs]
    codes = np.concatenate([train.codes[rows], PRACTICE.shots(train.codes[rows], BASE_ROUNDS, 0)])
    labels = np.tile(train.labels[rows], 1 + BASE_ROUNDS)
    cut = HostProgram(prefix(g, first_op(g, plan))).run(codes)
    return on_chip(g, plan, cut, labels, CLASSES, rate=BASE_RATE, epochs=BASE_EPOCHS).graph


def right(graph: QGraph, codes: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers of the chip's kernels."""
    logits = HostProgram(graph).run(codes)[0]
    return float(np.mean(logits.reshape(len(labels), -1).argmax(1) == labels))


def presented(steps: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """(which sample each step gets, its rate float32), as `on_chip` gives them in an only epoch."""
    rates = [rate * schedule(k / steps, 0.05) for k in range(steps)]
    return np.random.default_rng(0).permutation(steps), np.array(rates, np.float32)


def practised(graph: QGraph, codes: np.ndarray, labels: np.ndarray, rate: float = RATE, seed: int = 0) -> OnChip:
    """The network after one step on every shot, with the chip's kernels on this machine."""
    cut = HostProgram(prefix(graph, first_op(graph, PLAN))).run(codes)
    rule = UpdateRule(seed=seed)
    return on_chip(graph, PLAN, cut, labels, CLASSES, rate=rate, epochs=1, rule=rule, order_seed=seed)


def nearest(shots: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The label of the shot (N, …) next to each of those asked (M, …), by squared distance: what needs no training."""
    known, new = (a.reshape(len(a), -1).astype(np.float64) for a in (shots, asked))
    return labels[((known**2).sum(1)[None] - 2 * new @ known.T).argmin(1)]


@cache
def neighbours(quick: bool, seed: int) -> list[tuple[int, float, float]]:
    """Per test pupil (number, accuracy of the nearest practised shot by pixels, by the schooled network's last features)."""
    graph, out = base(quick), []
    features = HostProgram(prefix(graph, head(graph)))
    for pupil in asked_pupils(quick):
        (shots, labels), (new, truth) = (
            pupil.practice(steps=20 if quick else STEPS, seed=seed),
            pupil.held_out(seed=seed),
        )
        pairs = (shots, new), (features.run(shots)[0], features.run(new)[0])
        out.append((pupil.number, *(float(np.mean(nearest(a, labels, b) == truth)) for a, b in pairs)))
    return out


def on_boards(graph: QGraph, pupil: Pupil, cores: Sequence[str], steps: int) -> dict[str, Any]:
    """The same steps as `practised` on emulated boards with 256 KB and 1 MB: by core, whether every weight is
    what `practised` gave, how many codes training changed, the accuracy with the board's weights and with those of
    `practised`, and the sizes."""
    from netsuke.devices.board import EmulatedBoard
    from netsuke.export.c import write_c
    from netsuke.export.c.emulate import run_emulated

    codes, labels = pupil.practice(steps=steps)
    simulated = practised(graph, codes, labels)
    order, rates = presented(steps, RATE)
    inputs = [codes[order], labels[order].astype(np.int32)[:, None], rates[:, None]]
    compiled = training_graph(graph, PLAN, CLASSES)
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="netsuke-personal-") as temporary:
        folder = Path(temporary) / "fw"
        write_c(compiled, folder)
        for core in cores:
            run = run_emulated(folder, EmulatedBoard.load(core, flash=FLASH, ram=SRAM), inputs, seconds=3000)
            after = graph.copy()
            for index, values in trained_constants(compiled, learned(compiled, run["variables"])).items():
                if index < len(after.tensors):  # all but the step counter
                    after.tensors[index].data = values
            pairs = list(zip(after.tensors, simulated.graph.tensors, strict=True))
            out[core] = {
                "equal": all(np.array_equal(a.data, b.data) for a, b in pairs if a.constant),
                "changed": sum(int(np.sum(a.data != b.data)) for a, b in zip(after.tensors, graph.tensors) if a.constant),
                "right": right(after, *pupil.held_out()), "right_simulated": right(simulated.graph, *pupil.held_out()),
                "passed": run["passed"], "flash": run["flash"], "ram": run["ram"] + run["stack_peak"],
                "instructions": run["instructions"],
            }  # fmt: skip
    return out


def base(quick: bool) -> QGraph:
    return schooled(30) if quick else schooled()


def asked_pupils(quick: bool) -> list[Pupil]:
    return pupils_of("test")[: 2 if quick else None]


@cache
def one_seed(quick: bool, practises: str, seed: int) -> list[tuple[int, float, float]]:
    """Per test pupil (number, accuracy before, after). practises: "own" shots are practised, those of "another" pupil, or
    "five" of the own signs, 0 2 4 6 8, while accuracy is that on the other five. `seed`: of shots, order and rounding."""
    graph, people = base(quick), pupils_of("test")
    out = []
    for k, pupil in enumerate(asked_pupils(quick)):
        teacher = people[(k + 1) % len(people)] if practises == "another" else pupil
        shown, asked = (range(0, CLASSES, 2), range(1, CLASSES, 2)) if practises == "five" else (range(CLASSES),) * 2
        after = practised(graph, *teacher.practice(shown, 20 if quick else STEPS, seed), seed=seed).graph
        new = pupil.held_out(asked, seed)
        out.append((pupil.number, right(graph, *new), right(after, *new)))
    return out


def before_and_after(quick: bool, practises: str) -> list[list[tuple[int, float, float]]]:
    """The rows of `one_seed` for every seed."""
    return [one_seed(quick, practises, seed) for seed in range(1 if quick else SEEDS)]


def gain(rows: list[list[tuple[int, float, float]]]) -> float:
    """Mean rise over pupils and seeds."""
    return float(np.mean([after - before for one in rows for _, before, after in one]))


def in_words(rows: list[list[tuple[int, float, float]]]) -> str:
    table = np.array(rows)[..., 1:]  # (seeds, pupils, 2)
    old, new = table.mean((0, 1))
    rise = (table[..., 1] - table[..., 0]).mean(0)
    gains = ", ".join(f"{100 * gain([one]):+.1f}" for one in rows)
    return (
        f"{old:.1%} to {new:.1%} over {len(rise)} test pupils and {len(rows)} seeds ({gains} points; {np.sum(rise > 0)} pupils "
        f"rise, {np.sum(rise < 0)} fall)"
    )


def personal(quick: bool) -> Measured:
    """All test pupils on this machine; on the boards the first of them whose accuracy before leaves room to rise."""
    from netsuke.devices.board import missing_tools

    own, another, five = (before_and_after(quick, p) for p in ("own", "another", "five"))
    floors = [neighbours(quick, seed) for seed in range(len(own))]
    by_pixels, by_features = np.array(floors)[..., 1:].mean((0, 1))
    reached = float(np.array(own)[..., 2].mean())
    values: dict[str, Any] = {"own": own, "another": another, "five": five, "neighbours": floors}
    shown = (
        f"held-out shots of the same photographs: {in_words(own)}; nearest practised shot without training: by pixels "
        f"{by_pixels:.1%}, by features {by_features:.1%}; after another pupil's shots {gain(another) * 100:+.1f} points; "
        f"trained on five signs, the other five {gain(five) * 100:+.1f} points"
    )
    if packages := missing_tools():
        return Measured(f"{shown}; boards cannot be emulated: sudo apt-get install {packages}", None, values)
    number, before, _ = next((r for r in own[0] if r[1] <= ROOM), own[0][0])
    pupil = next(p for p in pupils_of("test") if p.number == number)
    boards = on_boards(base(quick), pupil, ("m7",) if quick else ("m7", "m4"), 10 if quick else STEPS)
    equal = all(b["equal"] and b["passed"] and b["changed"] > 0 for b in boards.values())
    rises = all(b["right"] > before for b in boards.values())
    after = next(iter(boards.values()))
    shown += (
        f"; pupil {number} on Cortex-{' and Cortex-'.join(c.upper() for c in boards)}: {before:.0%} to {after['right']:.0%}, "
        f"weights {'equal' if equal else 'differ'}, {after['ram'] / 1024:.0f} KB of RAM with stack, "
        f"{after['flash'] / 1024:.0f} KB of flash, {after['instructions'] / 1e6:.0f} M instructions a step"
    )
    above = reached > max(by_pixels, by_features)
    met = equal and rises and above and gain(own) >= BAR and gain(another) <= gain(own) / 2
    return Measured(shown, None if quick else bool(met), values | {"boards": boards})


def anothers_shots(quick: bool) -> Measured:
    """The control: as many steps on shots of another pupil's hands."""
    rows = before_and_after(quick, "another")
    return Measured(f"another pupil's shots: {in_words(rows)}", gain(rows) >= BAR, {"rows": rows})
