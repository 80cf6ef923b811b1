"""Continuous batching: many requests share one engine, and none can tell.

Jobs enter a bounded queue; a free slot takes the next. Every step is one `engine.forward`: one row for each slot that is
writing, and as much prompt of the others, oldest first, as the engine's chunk still holds (iteration-level scheduling:
Orca, Yu et al. 2022; prompts in chunks beside decoding: Sarathi, Agrawal et al. 2023). A job starts from the slot that
remembers the longest common prefix, or from a copy of a busy slot's.

One worker thread owns the engine. A job's answer depends on its prompt and its own sampler only: the engine gives a row the
same bits whatever else is in the batch.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.runtime.text_stream import Score, TextStream

log = logging.getLogger(__name__)
WORTH_KEEPING = 16  # tokens in common; fewer are evaluated again in a part of one step
LONGEST_RETRY = 60  # seconds


class Engine(Protocol):
    """What is used of `netsuke.runtime.engine.Engine`."""

    vocab: int
    context: int
    slots: int
    chunk: int
    eos: tuple[int, ...]

    def forward(
        self, tokens: Sequence[int], slots: Sequence[int], want: Sequence[bool], generated: Sequence[bool]
    ) -> np.ndarray: ...
    def truncate(self, slot: int, length: int) -> None: ...
    def copy(self, target: int, source: int, length: int) -> None: ...
    def memory(self) -> dict[str, int]: ...


class Picker(Protocol):
    """What is used of `netsuke.runtime.engine.Sampler`."""

    def pick(self, logits: np.ndarray) -> int: ...


class Refused(Exception):
    """The job was not taken: the queue is "full", or the server is "stopping". `retry_after` is in seconds."""

    def __init__(self, reason: str, retry_after: int):
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


@dataclass
class Delta:
    """News of a job. `finish` comes once, last: "stop", "length", "cancelled", "refused" (while waiting) or "error"."""

    text: str = ""
    scores: list[Score] = field(default_factory=list)
    finish: str | None = None


@dataclass(eq=False)
class Job:
    """One answer to make. `sink` is called in the worker's thread and must not block.

    ids         prompt, at least one token, fewer than the engine's context
    max_tokens  at least 1; the context ends an answer too
    rivals      None, or how many rivals to score beside each token (0 scores the token alone)
    """

    ids: list[int]
    max_tokens: int
    sampler: Picker
    text: TextStream
    sink: Callable[[Delta], None]
    rivals: int | None = None
    made: int = 0  # tokens of the answer so far
    reused: int = 0  # tokens of the prompt that were not evaluated again
    started: float = 0.0
    cancelled: bool = False
    finish: str | None = None


@dataclass(eq=False)
class Slot:
    """`sequence` is the prompt and the answer. The first `evaluated` tokens of it lie in the engine's cache, and the first
    `reusable` of those are what any prompt that begins with them would have put there."""

    number: int
    sequence: list[int] = field(default_factory=list)
    evaluated: int = 0
    reusable: int = 0
    job: Job | None = None
    used: int = 0  # rises with every job, so the smallest was used longest ago

    def shared(self, ids: list[int]) -> int:
        """Tokens of a prompt that need not be evaluated again; the last one always is, for its logits."""
        most = min(self.reusable, len(ids) - 1)
        return next((i for i in range(most) if self.sequence[i] != ids[i]), most)


@dataclass
class Counts:
    """Totals since the start. A step's seconds are split between prompts and answers by their rows."""

    outcomes: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0


class Batcher:
    """Runs jobs on an engine that nobody else touches from now on. `queue` jobs may wait.

    reuse_answers  whether an answer may be the prefix of a later prompt (a conversation's next turn). Not for input-sparse
                   models: they evaluate what they write more coarsely than what they read, so the answer would depend on
                   who wrote the prompt.
    Raises NetsukeError when the engine cannot take one row per slot.
    """

    def __init__(self, engine: Engine, queue: int = 64, reuse_answers: bool = True):
        if queue < 1 or engine.slots > engine.chunk:
            raise NetsukeError(
                "serve with these settings", f"{engine.slots} slots, chunks of {engine.chunk}, a queue of {queue}",
                "slots <= chunk, queue >= 1",
            )  # fmt: skip
        self.engine, self.queue, self.counts = engine, queue, Counts()
        self._reuse_answers = reuse_answers
        self.memory = engine.memory()  # taken once: the engine allocates when it opens
        self._slots = [Slot(n) for n in range(engine.slots)]
        self._waiting: deque[Job] = deque()
        self._wake = threading.Condition()
        self._ticket = itertools.count(1)
        self._draining = self._closing = False
        self._pace = 1.0  # seconds a job holds its slot, smoothed
        self._worker = threading.Thread(target=self._run, name="netsuke-engine", daemon=True)
        self._worker.start()

    # For callers, in any thread

    def submit(self, *jobs: Job) -> None:
        """Queues all the jobs or none. Raises Refused when they do not fit, NetsukeError for an unusable prompt."""
        for job in jobs:
            self._check(job)
        with self._wake:
            if self._draining or len(self._waiting) + len(jobs) > self.queue:
                reason = "stopping" if self._draining else "full"
                self.counts.outcomes[f"refused_{reason}"] += len(jobs)
                wait = math.ceil(self._pace * (len(self._waiting) + 1) / len(self._slots))
                raise Refused(reason, min(max(wait, 1), LONGEST_RETRY))
            self._waiting.extend(jobs)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Forgets a job: at once when it waits, before the next step when it runs. Nothing happens to a finished one."""
        with self._wake:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._finish(job, "cancelled")

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> int:
        """Slots that work on a job."""
        return sum(slot.job is not None for slot in self._slots)

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """Takes no more jobs and sends the waiting ones away; the running ones go on."""
        with self._wake:
            self._draining = True
            while self._waiting:
                self._finish(self._waiting.popleft(), "refused")

    def stop(self, grace: float = 0.0) -> None:
        """Drains, gives running jobs `grace` seconds to finish, cancels what is left and ends the worker."""
        self.drain()
        until = time.monotonic() + grace
        while self.busy and self._worker.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._worker.join()

    def _check(self, job: Job) -> None:
        room = self.engine.context
        if not job.ids:
            raise NetsukeError("complete this prompt", "it is empty and the model has no start token", "some text")
        if len(job.ids) >= room:
            raise NetsukeError(
                "complete this prompt", f"it has {len(job.ids)} tokens and the context is {room}",
                f"at most {room - 1} prompt tokens", "a shorter prompt, or a server with a larger --context",
            )  # fmt: skip
        wrong = next((i for i in job.ids if not 0 <= i < self.engine.vocab), None)
        if wrong is not None:
            raise NetsukeError(
                "complete this prompt", f"token {wrong} is outside the vocabulary", f"0 to {self.engine.vocab - 1}"
            )
        job.max_tokens = min(job.max_tokens, room - len(job.ids))

    # For the worker's thread

    def _run(self) -> None:
        while self._take_jobs():
            running = [slot for slot in self._slots if slot.job is not None]
            try:
                self._step(running)
            except Exception:  # whatever broke the step, the next jobs deserve an engine
                log.exception("a step failed; its %d jobs end with an error", len(running))
                for slot in running:
                    self._free(slot, "error")
                    self._forget(slot)
        for slot in self._slots:
            self._free(slot, "cancelled")

    def _take_jobs(self) -> bool:
        """Frees the slots of cancelled jobs and gives free slots to waiting ones; sleeps while there is nothing to do.
        Returns False at the end."""
        with self._wake:
            while True:
                for slot in self._slots:
                    if slot.job is not None and slot.job.cancelled:
                        self._free(slot, "cancelled")
                if self._closing:
                    return False
                if self._waiting or self.busy:
                    break
                self._wake.wait()
            fresh = [self._waiting.popleft() for _ in range(min(len(self._slots) - self.busy, len(self._waiting)))]
        for job in fresh:
            self._place(job)
        return True

    def _place(self, job: Job) -> None:
        """Gives a job a free slot, with as much of its prompt as some slot remembers."""
        shared = {slot: slot.shared(job.ids) for slot in self._slots}
        free = [slot for slot in self._slots if slot.job is None]
        # a start token in common is no reason to overwrite what another slot knows: then the one longest unused goes
        slot = max(free, key=lambda s: (shared[s] if shared[s] >= WORTH_KEEPING else 0, -s.used))
        source = max(self._slots, key=lambda s: shared[s])
        keep = shared[slot]
        try:
            if shared[source] >= keep + WORTH_KEEPING:
                slot, keep = min(free, key=lambda s: s.used), shared[source]
                self.engine.copy(slot.number, source.number, keep)
            else:
                self.engine.truncate(slot.number, keep)
        except Exception:
            log.exception("slot %d could not be prepared", slot.number)
            self._forget(slot)
            keep = 0
        slot.job, slot.sequence, slot.used = job, list(job.ids), next(self._ticket)
        slot.evaluated = slot.reusable = keep
        job.started, job.reused = time.monotonic(), keep
        self.counts.prompt_tokens += len(job.ids)
        self.counts.reused_tokens += keep

    def _step(self, running: list[Slot]) -> None:
        """One forward pass: answers first, then prompts in the order of their arrival."""
        tokens: list[int] = []
        slots: list[int] = []
        want: list[bool] = []
        generated: list[bool] = []
        complete: list[Slot] = []
        for slot in sorted(running, key=lambda s: (s.job.made == 0, s.used)):
            part = slot.sequence[slot.evaluated : slot.evaluated + self.engine.chunk - len(tokens)]
            if not part:
                break
            answer = slot.job.made > 0
            tokens += part
            slots += [slot.number] * len(part)
            generated += [answer] * len(part)
            slot.evaluated += len(part)
            if not answer or self._reuse_answers:
                slot.reusable = slot.evaluated
            done = slot.evaluated == len(slot.sequence)
            want += [False] * (len(part) - 1) + [done]
            if done:
                complete.append(slot)
        begin = time.perf_counter()
        logits = self.engine.forward(tokens, slots, want, generated)
        seconds = time.perf_counter() - begin
        answers = sum(generated)
        self.counts.steps += 1
        self.counts.decode_seconds += seconds * answers / len(tokens)
        self.counts.prompt_seconds += seconds * (len(tokens) - answers) / len(tokens)
        for slot, row in zip(complete, logits, strict=True):
            try:
                self._advance(slot, row)
            except Exception:  # this job's sampler, text or listener; the others go on
                log.exception("a job failed")
                self._free(slot, "error")

    def _advance(self, slot: Slot, row: np.ndarray) -> None:
        """Chooses the next token of a job and tells what it makes certain."""
        job = slot.job
        token = job.sampler.pick(row)
        if token in self.engine.eos:
            self._free(slot, "stop")
            return
        slot.sequence.append(token)
        job.made += 1
        self.counts.answer_tokens += 1
        text, scores = job.text.push(token, None if job.rivals is None else score(row, token, job.rivals))
        full = job.made >= job.max_tokens
        if text or scores:
            job.sink(Delta(text, scores))
        if job.text.stopped or full:
            self._free(slot, "stop" if job.text.stopped else "length")

    def _free(self, slot: Slot, finish: str) -> None:
        """Ends the slot's job, if any. What was evaluated stays, for prompts that begin alike."""
        job = slot.job
        if job is None:
            return
        slot.job = None
        del slot.sequence[slot.reusable :]
        slot.evaluated = slot.reusable
        self._pace += 0.1 * (time.monotonic() - job.started - self._pace)
        self._finish(job, finish)

    def _forget(self, slot: Slot) -> None:
        slot.sequence, slot.evaluated, slot.reusable = [], 0, 0
        try:
            self.engine.truncate(slot.number, 0)
        except Exception:
            log.exception("slot %d could not be emptied", slot.number)

    def _finish(self, job: Job, finish: str) -> None:
        delta = Delta(finish=finish)
        if finish in ("stop", "length"):
            try:
                delta.text, delta.scores = job.text.finish()
                delta.finish = "stop" if job.text.stopped else finish
            except Exception:
                log.exception("the end of an answer is no text")
                delta.finish = "error"
        job.finish = finish = delta.finish
        self.counts.outcomes[finish] += 1
        try:
            job.sink(delta)
        except Exception:  # the listener is gone, for example its event loop is closed
            log.debug("nobody hears the end of a job", exc_info=True)


def score(row: np.ndarray, token: int, rivals: int) -> Score:
    """Log probabilities of a token and of the `rivals` likeliest ones, from logits (V,)."""
    wide = row.astype(np.float64)
    logs = wide - wide.max()
    logs -= np.log(np.exp(logs).sum())
    best = np.argsort(-logs, kind="stable")[:rivals]
    return Score(token, float(logs[token]), [(int(i), float(logs[i])) for i in best])
