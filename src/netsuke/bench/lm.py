"""Decoding, prompts, first token, loading and memory of the engine beside its peers, in one run.

Rows (`what`), and their unit:
    decode        tokens/s of all sequences together, each 32 tokens long when 16 more are made; batch 1 and 4
    prompt-N      tokens/s of a prompt of N tokens, logits of the last
    first-token   seconds from a prompt of 32 tokens to the most likely next one, warm
    load          seconds of opening the model and the first token of such a prompt: fresh process, imports done, files cached
    peak          bytes of a fresh process above its idle level: opening, a prompt, eight tokens (mapped files count)

Sides take turns: every round asks each of them once, after a pause in which the threads of the last one have gone to sleep
(its processor time is watched) and after a short prompt that is not counted. Figures are medians of seven rounds or
more, with quartiles. `ratio` above 1 means that netsuke is better, whatever the unit.

share_of_limit, against what this machine can do with as many threads, measured before, between and after:
    decode    bytes of weights per step · steps/s / bytes read per second from 512 MB; models that fit a cache exceed 1
    prompt    multiply-accumulates/s of the linear maps / int8 multiply-accumulates/s from registers
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.bench.peers import OURS, PEERS, Side, absent, names_of, open_side, system_info, takes
from netsuke.bench.shapes import SHAPES, Subject, check, prepare
from netsuke.devices.probe import core_count
from netsuke.errors import NetsukeError
from netsuke.measure.machine import provenance
from netsuke.measure.peak import peak_of

MODELS = ("pycode", *SHAPES)
PAST, STEPS = 32, 16  # tokens before and in one counted stretch of decoding; the prompt of first-token as well
CONTEXT = 1024
ROUNDS, QUICK_ROUNDS = 7, 3
QUICK_PROCESSES = 1
TURN, QUICK_TURN = 0.25, 0.02  # seconds of counted work in a turn, at least
FRESH = (OURS, "llama.cpp", "torch")  # sides whose loading and memory are measured
READ_BYTES = 512 << 20
LOUD = "UNFAIR COMPARISON: llama.cpp is built without {}: this processor has them; rebuild it with -DGGML_NATIVE=ON"
Progress = Callable[[str, int, int], None]


@dataclass
class Limits:
    """Readings of the two limits of the machine; the medians count."""

    threads: int
    seconds: float
    read: list[float] = field(default_factory=list)
    int8: list[float] = field(default_factory=list)

    def take(self) -> None:
        from netsuke import _native

        self.read.append(_native.read_rate(READ_BYTES, self.threads, self.seconds) / 1e9)
        self.int8.append(_native.int8_rate(self.threads, self.seconds) / 1e9)

    def as_dict(self) -> dict[str, Any]:
        return {
            "read_gbps": float(np.median(self.read)), "vnni_gops": float(np.median(self.int8)),
            "units": {"read_gbps": "1e9 bytes/s", "vnni_gops": "1e9 int8 multiply-accumulates/s"},
            "readings": {"read_gbps": self.read, "vnni_gops": self.int8},
        }  # fmt: skip


def settle(longest: float = 0.5, step: float = 0.005) -> float:
    """Waits until no thread of this process computes; returns the seconds it took (`longest`: one never stopped)."""
    begin = time.perf_counter()
    while (waited := time.perf_counter() - begin) < longest:
        used = time.process_time()
        time.sleep(step)
        if time.process_time() - used < step / 4:
            return waited
    return longest


@dataclass(frozen=True)
class Work:
    """One row's stretch of work. `amount` is what it counts as: tokens, or None where the seconds themselves count."""

    what: str
    batch: int
    amount: int | None
    run: Callable[[Side], None]

    def value(self, seconds: float) -> float:
        return self.amount / seconds if self.amount else seconds


def works(ids: list[int], batch: int, prompts: Sequence[int], decoding: bool = True) -> list[Work]:
    """The rows that are measured with one set of open sides."""

    def decode(side: Side) -> None:
        side.cut(PAST)
        for token in ids[:STEPS]:
            side.feed([[token]] * batch)

    def prompt(length: int) -> Callable[[Side], None]:
        def run(side: Side) -> None:
            side.cut(0)
            side.feed([ids[:length]])

        return run

    def first(side: Side) -> None:
        side.cut(0)
        side.feed([ids[:PAST]])
        side.logits()[0].argmax()

    rows = [Work("decode", batch, batch * STEPS, decode)] if decoding else []
    if batch == 1:
        rows += [Work(f"prompt-{n}", 1, n, prompt(n)) for n in prompts]
        rows.append(Work("first-token", 1, None, first))
    return rows


def turn(side: Side, work: Work, ids: list[int], repeats: int) -> float:
    """Seconds of one stretch, from `repeats` of them in a row, after a pause and a prompt that are not counted."""
    side.cut(0)
    side.feed([ids[:PAST]] * work.batch)
    begin = time.perf_counter()
    for _ in range(repeats):
        work.run(side)
    return (time.perf_counter() - begin) / repeats


def alternate(
    sides: dict[str, Side], work: Work, ids: list[int], rounds: int, least: float, pauses: list[float]
) -> dict[str, list[float]]:
    """Seconds per stretch of every side, side by side; the first round finds out how often to repeat and is dropped."""
    repeats = dict.fromkeys(sides, 1)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for r in range(rounds + 1):
        for name, side in sides.items():
            pauses.append(settle())
            seconds = turn(side, work, ids, repeats[name])
            if r:
                taken[name].append(seconds)
            else:
                repeats[name] = max(1, math.ceil(least / seconds))
    return taken


def quartiles(values: Sequence[float]) -> list[float]:
    return [float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))]


def row_of(
    subject: Subject, what: str, batch: int, ours: list[float], theirs: list[float], peer: str, share: float | None
) -> dict[str, Any]:
    """A row of the result from what both sides gave in each round."""
    (a, mine, b), (c, other, d) = quartiles(ours), quartiles(theirs)
    more_is_better = what == "decode" or what.startswith("prompt")
    return {
        "model": subject.name, "bits": subject.bits, "what": what, "batch": batch, "netsuke": mine, "peer": other,
        "peer_name": peer, "ratio": mine / other if more_is_better else other / mine, "share_of_limit": share,
        "netsuke_quartiles": [a, b], "peer_quartiles": [c, d], "runs": len(ours),
    }  # fmt: skip


def share(subject: Subject, work: Work, seconds: float, limits: dict[str, Any]) -> float | None:
    """How much of the machine's limit a stretch of `seconds` used; None where no limit is given."""
    if work.what == "decode":
        return subject.weight_bytes * STEPS / seconds / (limits["read_gbps"] * 1e9)
    if work.what.startswith("prompt"):
        macs = subject.macs * work.amount + subject.head_macs
        return macs / seconds / (limits["vnni_gops"] * 1e9)
    return None


def agreement(sides: dict[str, Side], ids: list[int]) -> list[dict[str, Any]]:
    """How far the peers' logits are from ours after one prompt: both sides must have done the same work."""
    answers = {}
    for name, side in sides.items():
        side.cut(0)
        side.feed([ids[:PAST]])
        answers[name] = side.logits()[0].astype(np.float64)
    mine = answers.pop(OURS)
    return [
        {
            "peer_name": name, "same_token": bool(mine.argmax() == other.argmax()),
            "distance": float(np.linalg.norm(mine - other) / np.linalg.norm(other)),
        }
        for name, other in answers.items()
    ]  # fmt: skip


@dataclass
class Run:
    """One benchmark: its settings and what it has found so far."""

    threads: int
    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: int
    processes: int
    least: float
    limits: Limits
    measured: list[tuple[Subject, Work, dict[str, list[float]]]] = field(default_factory=list)
    fresh: list[tuple[Subject, str, dict[str, list[float]], int]] = field(default_factory=list)
    agreements: list[dict[str, Any]] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)

    def side_by_side(self, subject: Subject, names: Iterable[str], note: Callable[[str], None]) -> None:
        """Speed of warm models, all sides open at once."""
        ids = [int(i) for i in np.random.default_rng(0).integers(0, subject.config.vocab, max(*self.prompts, PAST))]
        for batch in sorted({1, *self.batches}):  # prompts are measured alone, whatever is decoded
            sides = {}
            try:
                for name in names:
                    sides[name] = open_side(
                        name, subject.folder, subject.gguf, self.context(subject), batch, self.threads
                    )
                for work in works(ids, batch, self.prompts, batch in self.batches):
                    note(f"{subject}: {work.what}, batch {batch}")
                    taken = alternate(sides, work, ids, self.rounds, self.least, self.pauses)
                    self.measured.append((subject, work, taken))
                if batch == 1:
                    about = {"model": subject.name, "bits": subject.bits}
                    self.agreements += [about | found for found in agreement(sides, ids)]
            finally:
                for side in sides.values():
                    side.close()

    def context(self, subject: Subject) -> int:
        """The context of all sides. Raises NetsukeError when the model's is too short for what is asked."""
        context, needed = min(CONTEXT, subject.config.context), max(PAST + STEPS, *self.prompts)
        if needed > context:
            raise NetsukeError(
                f"measure {subject}", f"{needed} tokens are to be run and its context is {context}",
                f"a context of {PAST + STEPS} or more, and prompts that fit it", f"--prompt {context // 2}",
            )  # fmt: skip
        return context

    def in_fresh_processes(self, subject: Subject, names: Iterable[str], note: Callable[[str], None]) -> None:
        """Loading and peak memory; the first process of each side warms the page cache and is dropped."""
        from netsuke.models.files import read_json
        from netsuke.models.places import MANIFEST
        from netsuke.runtime.engine import engine_plan

        note(f"{subject}: load and peak")
        names = [name for name in names if name in FRESH]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        peaks: dict[str, list[float]] = {name: [] for name in names}
        context, file = self.context(subject), str(subject.gguf) if subject.gguf else None
        for r in range(self.processes + 1):
            for name in names:
                job = (name, str(subject.folder), file, context, self.threads, subject.config.vocab, self.prompts[0])
                got = peak_of("netsuke.bench.fresh:start", *job, threads=self.threads)
                if r:
                    seconds[name].append(got.result["load"])
                    peaks[name].append(got.above)
        plan = engine_plan(read_json(subject.folder / MANIFEST), context=context, threads=self.threads)
        planned = plan["weights"] + plan["allocated"]
        self.fresh += [(subject, "load", seconds, planned), (subject, "peak", peaks, planned)]

    def rows(self) -> list[dict[str, Any]]:
        limits, out = self.limits.as_dict(), []
        for subject, work, taken in self.measured:
            mine = taken[OURS]
            part = share(subject, work, float(np.median(mine)), limits)
            values = {name: [work.value(s) for s in seconds] for name, seconds in taken.items()}
            out += [
                row_of(subject, work.what, work.batch, values[OURS], theirs, name, part)
                for name, theirs in values.items()
                if name != OURS
            ]
        for subject, what, taken, planned in self.fresh:
            more = {"planned": planned} if what == "peak" else {}
            out += [
                row_of(subject, what, 1, taken[OURS], theirs, name, None) | more
                for name, theirs in taken.items()
                if name != OURS
            ]
        order = {model: i for i, model in enumerate(dict.fromkeys(s.name for s, *_ in self.measured))}
        return sorted(out, key=lambda r: (order[r["model"]], r["bits"], r["peer_name"]))


def measure(
    models: Sequence[str] = (), *, bits: Sequence[int] = (4, 8, 16), prompts: Sequence[int] = (128, 512),
    batches: Sequence[int] = (1, 4), peers: Sequence[str] = PEERS, threads: int | None = None, quick: bool = False,
    cache: Path | None = None, on_progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """{limits, rows, agreement, skipped, warnings, settings, llama_cpp, versions, run}: see the top of this file.

    models   shapes (30M, 1.1B), artifacts, shipped names; default: pycode and both shapes, with `quick` pycode alone
    threads  of every side; default: one per usable core
    quick    three rounds of short turns, one fresh process, to see that it works: no figures to publish
    cache    where models that are made are kept (default: netsuke/bench in the user's cache folder, 8 GB with 1.1B)

    Raises NetsukeError for models, widths, prompts and peers that cannot be measured.
    """
    models = list(models) or (["pycode"] if quick else list(MODELS))
    threads = threads or core_count()
    if unknown := [p for p in peers if p not in PEERS]:
        raise NetsukeError(f"compare with {unknown[0]!r}", "it is no peer", ", ".join(PEERS))
    if min(*prompts, *batches, threads, 1) < 1 or not prompts or not batches:
        raise NetsukeError("measure this", f"prompts {list(prompts)}, batches {list(batches)}", "whole numbers from 1")
    cells = [(m, b) for m in models for b in bits]
    for model, width in cells:  # before minutes of work
        check(model, width)
    skipped = [why for p in peers if (why := absent(p))]
    peers = [p for p in peers if absent(p) is None]
    info = system_info() if "llama.cpp" in peers else None
    warnings = [LOUD.format(", ".join(info["missing"]))] if info and info["missing"] else []
    busy = os.getloadavg()[0]
    if busy > 0.5:
        warnings.append(f"the machine was busy when this began (load {busy:.1f}): figures are too low for all sides")
    progress = on_progress or (lambda *_: None)
    run = Run(
        threads, tuple(prompts), tuple(batches), QUICK_ROUNDS if quick else ROUNDS, QUICK_PROCESSES if quick else ROUNDS,
        QUICK_TURN if quick else TURN, Limits(threads, 0.2 if quick else 0.5),
    )  # fmt: skip
    per_cell = 2 + len(batches) + len(prompts) + 1
    done = 0

    def note(text: str) -> None:
        nonlocal done
        progress(text, done, len(cells) * per_cell)
        done += 1

    run.limits.take()
    for i, (model, width) in enumerate(cells):
        done = i * per_cell
        note(f"{model} at {width} bits: making it")
        subject = prepare(model, width, cache)
        run.context(subject)
        able = [p for p in peers if takes(subject, p) is None]
        skipped += [why for p in peers if (why := takes(subject, p))]
        names = [OURS, *(name for p in able for name in names_of(p))]
        run.side_by_side(subject, names, note)
        run.in_fresh_processes(subject, names, note)
        run.limits.take()
    if max(run.pauses) >= 0.5:
        warnings.append("a side kept a core busy for half a second after its work: the next one's figures suffer")
    return {
        "limits": run.limits.as_dict(), "rows": run.rows(), "agreement": run.agreements, "skipped": skipped,
        "warnings": warnings,
        "settings": {
            "threads": threads, "rounds": run.rounds, "quick": quick, "context": CONTEXT, "past": PAST, "steps": STEPS,
            "load_average": busy, "longest_pause_s": max(run.pauses),
        },
        "llama_cpp": info, "versions": versions(), "run": provenance(),
    }  # fmt: skip


def versions() -> dict[str, str | None]:
    """Versions of the peers' packages; None for those that are not installed."""

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {name: of(name) for name in ("llama-cpp-python", "torch", "transformers")}
