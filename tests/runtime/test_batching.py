"""The scheduler: answers that do not depend on company, queues that are bounded, slots that are freed, prefixes that are kept."""

import threading
import time

import pytest

from netsuke.errors import NetsukeError
from netsuke.runtime.batching import Batcher, Delta, Job, Refused
from netsuke.runtime.text_stream import TextStream
from tests.runtime.standin import Bytes, Draw, StandIn, expected


class Heard:
    """A listener that collects the news of a job and waits for its end."""

    def __init__(self):
        self.text, self.deltas, self._end = "", [], threading.Event()

    def __call__(self, delta: Delta) -> None:
        self.text += delta.text
        self.deltas.append(delta)
        if delta.finish:
            self._end.set()

    def finish(self) -> str:
        assert self._end.wait(10), "no end within 10 s"
        return self.deltas[-1].finish


def job(prompt: str, tokens: int = 20, stops=(), sampler=None, **more) -> tuple[Job, Heard]:
    heard, tok = Heard(), Bytes()
    ids = tok.encode(prompt, bos=True)
    return Job(ids, tokens, sampler or Draw(), TextStream(tok, stops), heard, **more), heard


@pytest.fixture
def start():
    """start(queue=…, slots=…, …) gives an engine and its batcher; they are stopped afterwards."""
    running = []

    def make(queue: int = 64, reuse_answers: bool = True, **engine) -> tuple[StandIn, Batcher]:
        e = StandIn(**engine)
        running.append((e, b := Batcher(e, queue, reuse_answers)))
        return e, b

    yield make
    for e, b in running:
        e.gate.set()
        b.stop()


def until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.002)


def test_forty_jobs_on_three_slots_answer_as_if_alone(start):
    engine, batcher = start(slots=3, chunk=16)
    rows = [(f"{'common start ' * (i % 3)}prompt {i}" * (1 + i % 4), 5 + i % 17, i) for i in range(40)]
    jobs = [job(p, n, sampler=Draw(i % 2, seed=i)) for p, n, i in rows]
    for j, _ in jobs:
        batcher.submit(j)
    for (prompt, n, i), (_, heard) in zip(rows, jobs):
        assert heard.finish() == "length"
        assert heard.text == expected(prompt, n, Draw(i % 2, seed=i))
    assert max(len(b) for b in engine.batches) == 3, "slots did work side by side"
    assert any(len({n > 1 for _, n in b}) == 2 for b in engine.batches), "no prompt was evaluated beside an answer"


def test_a_long_prompt_goes_in_chunks_and_answers_never_wait_for_it(start):
    engine, batcher = start(slots=2, chunk=8)
    first, heard = job("short", 60)
    engine.gate.clear()
    batcher.submit(first)
    second, other = job("x" * 100, 3)
    batcher.submit(second)
    engine.gate.set()
    assert heard.finish() == other.finish() == "length"
    slot = engine.batches[0][0][0]
    mixed = [dict(b) for b in engine.batches if any(s != slot and n > 1 for s, n in b)]
    # the prompts' first shared step aside, the writing slot has its row in every one
    assert len(mixed) > 10
    assert all(b.get(slot) for b in mixed)


def test_prefixes_are_kept_and_the_best_slot_is_taken(start):
    _, batcher = start(slots=2)
    for prompt in ("alpha " * 8, "beta " * 8):
        j, heard = job(prompt, 2)
        batcher.submit(j)
        heard.finish()
    j, heard = job("alpha " * 8 + "and more", 4)
    batcher.submit(j)
    assert heard.finish() == "length"
    assert heard.text == expected("alpha " * 8 + "and more", 4)
    assert j.reused == 1 + len("alpha " * 8)
    again, heard = job("beta " * 8, 4)
    batcher.submit(again)
    heard.finish()
    assert again.reused == len("beta " * 8), "the last prompt token is always evaluated"
    assert batcher.counts.reused_tokens == j.reused + again.reused


def test_the_prefix_of_a_busy_slot_is_copied(start):
    engine, batcher = start(slots=2, step=0.001)
    system = "a long system prompt that all share. "
    first, one = job(system + "first", 120)
    batcher.submit(first)
    until(lambda: first.made > 0)
    second, two = job(system + "second", 10)
    batcher.submit(second)
    assert two.finish() == "length"
    assert first.finish is None, "the source was busy"
    assert [length for _, _, length in engine.copies] == [1 + len(system)]
    assert two.text == expected(system + "second", 10)
    assert one.finish() == "length"
    assert one.text == expected(system + "first", 120)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_next_turn_of_a_conversation(sparse, start):
    """An answer is a prefix of the next prompt, but not where the engine evaluates its own tokens differently."""
    _, batcher = start(slots=1, sparse=sparse, reuse_answers=not sparse)
    question = "x" * 40
    first, heard = job(question, 30)
    batcher.submit(first)
    heard.finish()
    prompt = question + heard.text + " and on"
    second, other = job(prompt, 20)
    batcher.submit(second)
    assert other.finish() == "length"
    assert (heard.text, other.text) == (expected(question, 30, sparse=sparse), expected(prompt, 20, sparse=sparse))
    assert second.reused == (41 if sparse else 41 + 29), "the last token of an answer was never evaluated"


def test_the_queue_is_bounded_and_all_or_nothing(start):
    engine, batcher = start(slots=1, queue=3)
    engine.gate.clear()
    running, heard = job("a")
    batcher.submit(running)
    until(lambda: batcher.busy == 1)
    batcher.submit(job("b")[0], job("c")[0])
    with pytest.raises(Refused) as full:
        batcher.submit(job("d")[0], job("e")[0])
    assert full.value.reason == "full"
    assert 1 <= full.value.retry_after <= 60
    assert batcher.waiting == 2
    batcher.submit(last := job("f")[0])
    engine.gate.set()
    assert heard.finish() == "length"
    until(lambda: last.finish == "length")
    assert batcher.counts.outcomes == {"length": 4, "refused_full": 2}


def test_cancelling_frees_the_slot_within_a_step(start):
    engine, batcher = start(slots=1)
    engine.gate.clear()
    doomed, heard = job("a", 200)
    batcher.submit(doomed)
    until(lambda: batcher.busy == 1)
    waiting, other = job("b")
    batcher.submit(waiting)
    batcher.cancel(waiting)
    assert other.finish() == "cancelled"
    assert batcher.waiting == 0
    batcher.cancel(doomed)
    engine.gate.set()
    assert heard.finish() == "cancelled"
    assert doomed.made <= 1
    until(lambda: batcher.busy == 0)
    after, answer = job("c", 5)
    batcher.submit(after)
    answer.finish()
    assert answer.text == expected("c", 5)
    batcher.cancel(after)  # of a finished job: nothing happens
    assert batcher.counts.outcomes == {"cancelled": 2, "length": 1}


def test_a_failed_step_ends_its_jobs_and_nothing_else(start):
    engine, batcher = start(slots=2)
    engine.fail_next = True
    j, heard = job("a prompt that breaks")
    batcher.submit(j)
    assert heard.finish() == "error"
    again, answer = job("a prompt that breaks", 8)
    batcher.submit(again)
    assert answer.finish() == "length"
    assert answer.text == expected("a prompt that breaks", 8)
    assert again.reused == 0


def test_a_broken_sampler_or_listener_harms_its_own_job_only(start):
    class Broken:
        def pick(self, logits):
            raise ValueError("made to fail")

    def deaf(delta):
        raise RuntimeError("event loop is closed")

    _, batcher = start(slots=3)
    (bad, heard), (good, answer), (mute, _) = job("x", sampler=Broken()), job("y"), job("z")
    mute.sink = deaf
    batcher.submit(bad, good, mute)
    assert heard.finish() == "error"
    assert answer.finish() == "length"
    assert answer.text == expected("y", 20)
    until(lambda: batcher.busy == 0)


def test_stopping_lets_running_jobs_finish_within_the_grace(start):
    _, batcher = start(slots=1, step=0.002)
    (running, one), (waiting, two) = job("a", 30), job("b", 30)
    batcher.submit(running)
    until(lambda: running.made > 0)
    batcher.submit(waiting)
    batcher.stop(grace=5)
    assert (one.finish(), two.finish()) == ("length", "refused")
    assert one.text == expected("a", 30)
    with pytest.raises(Refused, match="stopping"):
        batcher.submit(job("c")[0])
    _, batcher = start(slots=1, step=0.002)
    endless, heard = job("d", 10_000)
    batcher.submit(endless)
    until(lambda: endless.made > 3)
    batcher.stop(grace=0)
    assert heard.finish() == "cancelled"


def test_the_context_and_the_end_token_end_answers(start):
    _, batcher = start(slots=1, context=64)
    long, heard = job("x" * 50, 1000)
    batcher.submit(long)
    assert heard.finish() == "length"
    assert len(long.ids) + long.made == 64
    said, other = job("say|bye|", 30)
    batcher.submit(said)
    assert (other.finish(), other.text, said.made) == ("stop", "bye", 3)
    for prompt, culprit in (("x" * 64, "65 tokens"), ("", "empty")):
        j, _ = job(prompt)
        j.ids = j.ids if prompt else []
        with pytest.raises(NetsukeError, match=culprit):
            batcher.submit(j)
    j, _ = job("x")
    j.ids.append(258)
    with pytest.raises(NetsukeError, match="258"):
        batcher.submit(j)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(NetsukeError, match="slots <= chunk"):
        Batcher(StandIn(slots=40, chunk=32))
    with pytest.raises(NetsukeError, match="queue"):
        Batcher(StandIn(), queue=0)


def stream_of(text: str, stops=()) -> tuple[list[str], TextStream]:
    stream, pieces = TextStream(Bytes(), stops), []
    for token in text.encode():
        pieces.append(stream.push(token)[0])
        if stream.stopped:
            break
    return [*pieces, stream.finish()[0]], stream


@pytest.mark.parametrize(
    ("text", "stops", "out"),
    [
        ("one two END three", ["END"], "one two "), ("one EN two", ["END"], "one EN two"), ("a EN", ["END"], "a EN"),
        ("aaab", ["aab"], "a"), ("xabcd", ["abcd", "bc"], "xa"), ("début — fin", ["— f"], "début "), ("\n\nfar", ["\n\n"], ""),
        ("no stop at all", [], "no stop at all"), ("ababac", ["abac"], "ab"),
    ],
)  # fmt: skip
def test_stop_strings_never_leak(text, stops, out):
    pieces, stream = stream_of(text, stops)
    assert "".join(pieces) == out
    assert stream.stopped == (out != text)
    sent = ""
    for piece in pieces:
        sent += piece
        assert out.startswith(sent)
        assert "\ufffd" not in piece


def test_scores_go_out_with_their_text_and_not_beyond_the_stop(start):
    _, batcher = start(slots=1)
    j, heard = job("say|one TWO three|", 30, ["TWO"], rivals=2)
    batcher.submit(j)
    assert heard.finish() == "stop"
    scores = [s for d in heard.deltas for s in d.scores]
    assert heard.text == Bytes().decode([s.token for s in scores]) == "one "
    assert [s.offset for s in scores] == [0, 1, 2, 3]
    assert all(s.logprob > -1e-6 and len(s.top) == 2 and s.top[0] == (s.token, s.logprob) for s in scores)
