"""Text of one answer as it grows: whole characters only, and nothing of a stop string, wherever token borders fall.

stream = TextStream(tokenizer, ["\\n\\n"])
text, scores = stream.push(token, score)    what has become certain; stream.stopped says that a stop string was met
text, scores = stream.finish()              the rest, when the answer ends for another reason

Of several stop strings the one that is complete first wins, so that the cut does not depend on how the text was split into
tokens. Text that may turn out to be the beginning of a stop string waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from netsuke.models.tokenizer import Decoder, Tokenizer


@dataclass
class Score:
    """Log probability of a chosen token beside its best rivals (natural logarithm, before temperature)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    offset: int = 0  # characters of the answer before this token


class TextStream:
    """See the file's docstring. `stops` are non-empty strings."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._decoder, self._stops = Decoder(tokenizer), tuple(stops)
        self._held, self._sent = "", 0
        self._scores: deque[tuple[int, Score]] = deque()  # with the length of the answer up to and with the token
        self.stopped = False

    def push(self, token: int, score: Score | None = None) -> tuple[str, list[Score]]:
        """Text and scores that `token` makes certain, possibly none."""
        before = self._sent + len(self._held)
        self._held += self._decoder.push(token)
        if score is not None:
            score.offset = before
            self._scores.append((self._sent + len(self._held), score))
        if not self._cut():
            return self._release(len(self._held) - self._waiting())
        return self._release(len(self._held))

    def finish(self) -> tuple[str, list[Score]]:
        """What is left. A stop string that only the last characters complete is still honoured."""
        if not self.stopped:
            self._held += self._decoder.flush()
            if not self._cut():
                self._scores = deque((0, score) for _, score in self._scores)  # all of them are part of the answer
        return self._release(len(self._held))

    def _cut(self) -> bool:
        """Drops the first complete stop string and what follows it. Returns whether there was one."""
        found = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            _, at = min(found)
            self._held, self.stopped = self._held[:at], True
            end = self._sent + at
            self._scores = deque((0, score) for _, score in self._scores if score.offset < end)
        return bool(found)

    def _waiting(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = min(len(self._held), max(map(len, self._stops), default=0))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stops)), 0)

    def _release(self, count: int) -> tuple[str, list[Score]]:
        text, self._held = self._held[:count], self._held[count:]
        self._sent += count
        scores = []
        while self._scores and self._scores[0][0] <= self._sent:
            scores.append(self._scores.popleft()[1])
        return text, scores
