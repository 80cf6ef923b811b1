"""Text to token ids and back: Hugging Face tokenizers (JSON) and llama2.c's scored pieces behind one small interface.

tok.encode(text, bos=False)   ids; with `bos` the text opens a sequence
tok.decode(ids)               text; special tokens print nothing
Decoder(tok).push(id)         text as it becomes certain, for streams: never half a character
tok.to_bytes() / from_bytes   the file that an artifact carries (`tok.file` is its name)
"""

from __future__ import annotations

import heapq
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from netsuke.errors import NetsukeError
from netsuke.models.files import LARGEST_JSON, reading

LONGEST_PIECE = 4096  # bytes; the longest piece of the known vocabularies has under 200


class Tokenizer(ABC):
    """What all tokenizers share. `vocab` is one more than the largest id; `bos` opens a sequence, `eos` ends one."""

    file: str
    vocab: int
    bos: int | None
    eos: tuple[int, ...]

    @abstractmethod
    def encode(self, text: str, bos: bool = False) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str: ...

    @abstractmethod
    def to_bytes(self) -> bytes: ...

    def check_fits(self, embedding: int, source: str | Path) -> None:
        """Raises NetsukeError when this tokenizer can give ids that the model's embedding table has no row for."""
        if self.vocab > embedding:
            raise NetsukeError(
                f"load {source}",
                f"wrong tokenizer: it has {self.vocab} tokens, the model's embedding has {embedding} rows",
                f"a tokenizer of at most {embedding} tokens", "the tokenizer that came with these weights",
            )  # fmt: skip


class HFTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the `tokenizers` library. No special token is added but `bos` when it is asked for."""

    file = "tokenizer.json"

    def __init__(self, data: bytes, bos: int | None = None, eos: Iterable[int] = (), source: str | Path = "tokenizer"):
        import tokenizers

        try:
            self._tok = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
            self._tok.no_padding()
            self._tok.no_truncation()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # the library raises bare Exception, and a Rust panic is a BaseException
            raise NetsukeError(f"load {source}", f"not a tokenizer ({str(e)[:80]})", "a tokenizer.json") from e
        self.vocab = max(self._tok.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos = bos if bos is not None and bos < self.vocab else None
        self.eos = tuple(e for e in eos if e < self.vocab)

    @classmethod
    def from_bytes(cls, data: bytes, bos: int | None = None, eos: Iterable[int] = ()) -> HFTokenizer:
        return cls(data, bos, eos)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        ids = self._tok.encode(text, add_special_tokens=False).ids
        return [self.bos, *ids] if bos and self.bos is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tok.decode(list(ids), skip_special_tokens=True)

    def to_bytes(self) -> bytes:
        return self._tok.to_str().encode()


class ScoredTokenizer(Tokenizer):
    """llama2.c's `tokenizer.bin`: pieces with scores. Ids 0, 1, 2 are <unk>, <s>, </s>; 3 … 258 are the raw bytes.

    A text that opens a sequence gets one leading space, as in training, and loses it when it is decoded after <s>.
    """

    file = "tokenizer.bin"
    BYTES = 3  # id of the byte 0

    def __init__(self, data: bytes, bos: int | None = 1, eos: Iterable[int] = (1, 2), source: str | Path = "tokenizer"):
        self._data, self.bos, self.eos = data, bos, tuple(eos)
        asked, at = f"load {source}", 4
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        if len(data) < 4:
            raise NetsukeError(asked, "the tokenizer is empty", "a llama2.c tokenizer file")
        while at < len(data):
            if at + 8 > len(data):
                raise NetsukeError(asked, f"token {len(self.pieces)} is truncated", "an intact llama2.c tokenizer file")
            score, length = struct.unpack_from("<fi", data, at)
            at += 8
            if not 0 <= length <= LONGEST_PIECE or at + length > len(data) or not math.isfinite(score):
                found = (
                    f"token {len(self.pieces)} has score {score} and length {length}, {len(data) - at} bytes are left"
                )
                raise NetsukeError(asked, found, "an intact llama2.c tokenizer file")
            self.pieces.append(data[at : at + length])
            self.scores.append(score)
            at += length
        self.vocab = len(self.pieces)
        if self.vocab < self.BYTES + 256:
            raise NetsukeError(asked, f"{self.vocab} tokens", "at least 259 (three special ones and all bytes)")
        self._ids = {p: i for i, p in enumerate(self.pieces) if i >= self.BYTES + 256}

    @classmethod
    def from_bytes(cls, data: bytes, bos: int | None = 1, eos: Iterable[int] = (1, 2)) -> ScoredTokenizer:
        return cls(data, bos, eos)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """One id per character (or per byte of an unknown one), then the best-scored neighbours merge until none can.

        A heap of candidate pairs keeps this at O(n log n); ties go to the leftmost pair, as in llama2.c.
        """
        parts: list[bytes | None] = []
        ids: list[int] = []
        for char in (" " + text) if bos and text else text:
            raw = char.encode("utf-8", "replace")
            known = self._ids.get(raw)
            if known is not None:
                parts.append(raw)
                ids.append(known)
            else:
                parts.extend(raw[i : i + 1] for i in range(len(raw)))
                ids.extend(b + self.BYTES for b in raw)
        after, before = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))
        heap: list[tuple[float, int, int, bytes]] = []

        def offer(i: int) -> None:
            if i >= 0 and after[i] < len(ids):
                joined = parts[i] + parts[after[i]]
                token = self._ids.get(joined)
                if token is not None:
                    heapq.heappush(heap, (-self.scores[token], i, after[i], joined))

        for i in range(len(ids)):
            offer(i)
        while heap:
            _, i, j, joined = heapq.heappop(heap)
            if parts[i] is None or parts[j] is None or after[i] != j or parts[i] + parts[j] != joined:
                continue  # one of the two has merged with another neighbour since
            parts[i], parts[j], ids[i] = joined, None, self._ids[joined]
            after[i] = after[j]
            if after[j] < len(ids):
                before[after[j]] = i
            offer(i)
            offer(before[i])
        out = [token for token, part in zip(ids, parts) if part is not None]
        return [self.bos, *out] if bos and self.bos is not None else out

    def decode(self, ids: Sequence[int]) -> str:
        out = bytearray()
        for position, i in enumerate(ids):
            piece = b""
            if self.BYTES <= i < self.BYTES + 256:
                piece = bytes([i - self.BYTES])
            elif i >= self.BYTES + 256:
                piece = self.pieces[i]
            if position and ids[position - 1] == self.bos:
                piece = piece.removeprefix(b" ")
            out += piece
        return out.decode("utf-8", "replace")

    def to_bytes(self) -> bytes:
        return self._data


class Decoder:
    """Text of a growing sequence, piece by piece. What `push` and `flush` return adds up to `decode` of all ids.

    A piece waits while it ends in an unfinished character; a run that stays invalid is let go after `PATIENCE` tokens.
    """

    PATIENCE = 8  # a character has at most four bytes, so at most four tokens

    def __init__(self, tokenizer: Tokenizer):
        self._tok, self._ids, self._start, self._read = tokenizer, [], 0, 0

    def push(self, token: int) -> str:
        """The text that `token` makes certain, possibly none."""
        self._ids.append(token)
        return self._take(force=len(self._ids) - self._read >= self.PATIENCE)

    def flush(self) -> str:
        """What is left at the end of the sequence."""
        return self._take(force=True)

    def _take(self, force: bool) -> str:
        # Decoding from a few tokens back keeps what a tokenizer does at the start of a text (dropped spaces) away.
        known = self._tok.decode(self._ids[self._start : self._read])
        text = self._tok.decode(self._ids[self._start :])
        if len(text) <= len(known) or (text.endswith("\ufffd") and not force):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]


KINDS: dict[str, type[HFTokenizer] | type[ScoredTokenizer]] = {t.file: t for t in (HFTokenizer, ScoredTokenizer)}


def read_tokenizer(path: Path, bos: int | None, eos: Iterable[int]) -> Tokenizer:
    """The tokenizer in a file: JSON by its suffix, llama2.c otherwise. Raises NetsukeError for what is neither."""
    with reading(path):
        if path.stat().st_size > LARGEST_JSON:
            raise NetsukeError(f"load {path}", f"a tokenizer of {path.stat().st_size} bytes", f"under {LARGEST_JSON}")
        data = path.read_bytes()
    kind = HFTokenizer if path.suffix == ".json" else ScoredTokenizer
    return kind(data, bos, eos, source=path)
