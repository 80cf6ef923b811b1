"""A stand-in for the native engine: what it says next depends on every token in the slot, so a mix-up shows at once.

A prompt "say|TEXT|" is answered with TEXT, byte by byte, and the end token; any other with letters drawn from a hash of all
tokens so far. Tokens are bytes; 256 opens a sequence, 257 ends one.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Sequence

import numpy as np

from netsuke.models.tokenizer import Tokenizer

BOS, EOS, VOCAB = 256, 257, 258
SPARSE = 1000  # added to a token that an input-sparse engine evaluates as its own answer
LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", np.uint8)


class Bytes(Tokenizer):
    """One token per byte of UTF-8."""

    file, vocab, bos, eos = "bytes.json", VOCAB, BOS, (EOS,)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        special = text.startswith("<s>")  # a template writes the start token as text
        return [BOS] * (bos + special) + list(text.removeprefix("<s>").encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def to_bytes(self) -> bytes:
        return b'{"added_tokens": [{"id": 256, "content": "<s>"}, {"id": 257, "content": "</s>"}]}'


def logits_after(tokens: Sequence[int]) -> np.ndarray:
    """(V,) float32, a function of all the tokens, and of which of them carry the mark `SPARSE`."""
    raw = bytes(t % SPARSE for t in tokens if t % SPARSE < 256)
    out = np.full(VOCAB, -40, np.float32)
    if raw.startswith(b"say|"):
        script, said = raw.split(b"|", 2)[1:]
        out[script[len(said)] if len(said) < len(script) else EOS] = 40
    else:
        rng = np.random.default_rng(zlib.crc32(np.asarray(tokens, np.int32).tobytes()))
        out[LETTERS] = rng.standard_normal(len(LETTERS)) * 3
    return out


class StandIn:
    """Meets the contract of netsuke.runtime.engine.Engine and checks that its caller does. `gate` holds up the steps;
    `batches` keeps [(slot, rows), …] of each. `sparse`: as an input-sparse model, it sees which tokens were its own."""

    def __init__(self, slots: int = 4, context: int = 256, chunk: int = 32, step: float = 0.0, sparse: bool = False):
        self.vocab, self.context, self.slots, self.chunk, self.bos, self.eos = VOCAB, context, slots, chunk, BOS, (EOS,)
        self.tokenizer, self._step, self._sparse = Bytes(), step, sparse
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._lock = threading.Lock()
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[tuple[int, int]]] = []
        self.copies: list[tuple[int, int, int]] = []
        self.fail_next = False

    def forward(
        self, tokens: Sequence[int], slots: Sequence[int], want: Sequence[bool], generated: Sequence[bool]
    ) -> np.ndarray:
        assert self._lock.acquire(blocking=False), "two callers at a time"
        try:
            self.gate.wait(10)
            time.sleep(self._step)
            if self.fail_next:
                self.fail_next = False
                raise RuntimeError("made to fail")
            assert 0 < len(tokens) == len(slots) == len(want) == len(generated) <= self.chunk
            order = [s for i, s in enumerate(slots) if i == 0 or slots[i - 1] != s]
            assert len(order) == len(set(order)), "rows of a slot must be adjacent"
            self.batches.append([(s, list(slots).count(s)) for s in order])
            out = []
            for token, slot, wanted, own in zip(tokens, slots, want, generated):
                self._held[slot].append(token + SPARSE * (own and self._sparse))
                assert len(self._held[slot]) <= self.context
                if wanted:
                    out.append(logits_after(self._held[slot]))
            return np.array(out, np.float32).reshape(-1, VOCAB)
        finally:
            self._lock.release()

    def length(self, slot: int) -> int:
        return len(self._held[slot])

    def truncate(self, slot: int, length: int) -> None:
        assert 0 <= length <= len(self._held[slot])
        del self._held[slot][length:]

    def copy(self, target: int, source: int, length: int) -> None:
        assert target != source and 0 <= length <= len(self._held[source])
        self._held[target] = self._held[source][:length]
        self.copies.append((target, source, length))

    def memory(self) -> dict[str, int]:
        return {"weights": 1000, "cache": 2000, "allocated": 2000}

    def close(self) -> None:
        pass


class Draw:
    """A sampler with the engine's interface: greedy at temperature 0, else Gumbel's trick with its own generator."""

    def __init__(self, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0):
        self._temperature, self._rng = temperature, np.random.default_rng(seed)

    def pick(self, logits: np.ndarray) -> int:
        if self._temperature == 0:
            return int(logits.argmax())
        return int((logits / self._temperature + self._rng.gumbel(size=len(logits))).argmax())


def expected(prompt: str, new_tokens: int, sampler: Draw | None = None, sparse: bool = False) -> str:
    """The answer to a prompt, computed alone and without an engine."""
    mark = SPARSE * sparse
    tokenizer, sampler = Bytes(), sampler or Draw()
    ids = tokenizer.encode(prompt, bos=True)
    answer: list[int] = []
    while len(answer) < new_tokens and (token := sampler.pick(logits_after(ids + [t + mark for t in answer]))) != EOS:
        answer.append(token)
    return tokenizer.decode(answer)
