"""Tokenizers: round trips, streams that never split a character, the file in the artifact, llama2.c's merge rule."""

from __future__ import annotations

import random
import struct

import pytest

from netsuke.errors import NetsukeError
from netsuke.models.load import SHIPPED
from netsuke.models.tokenizer import Decoder, HFTokenizer, ScoredTokenizer, Tokenizer
from tests.models.hostile import tiny_tokenizer

TEXT = "def café(x):\n    return '日本語' + \"🙂🙂\"  # naïve — ok\n"


def scored(pieces: dict[str, float]) -> ScoredTokenizer:
    rows = [
        (b"<unk>", 0.0),
        (b"\n<s>\n", 0.0),
        (b"\n</s>\n", 0.0),
        *((f"<0x{b:02X}>".encode(), 0.0) for b in range(256)),
    ]
    rows += [(p.encode(), s) for p, s in pieces.items()]
    return ScoredTokenizer(struct.pack("<i", 8) + b"".join(struct.pack("<fi", s, len(p)) + p for p, s in rows))


def slow_encode(tok: ScoredTokenizer, text: str) -> list[int]:
    """llama2.c's loop as its authors wrote it: scan all pairs, merge the first of the best, again."""
    ids: list[int] = []
    for char in text:
        raw = char.encode()
        ids += [tok._ids[raw]] if raw in tok._ids else [b + 3 for b in raw]
    piece = lambda i: bytes([i - 3]) if i < 259 else tok.pieces[i]  # noqa: E731
    while True:
        best, where = -1e10, None
        for i in range(len(ids) - 1):
            token = tok._ids.get(piece(ids[i]) + piece(ids[i + 1]))
            if token is not None and tok.scores[token] > best:
                best, where = tok.scores[token], (i, token)
        if where is None:
            return ids
        ids[where[0] : where[0] + 2] = [where[1]]


LETTERS = {c: -1.0 for c in " abcdé"}
MERGES = LETTERS | {"ab": -2.0, "bc": -2.0, "abc": -5.0, "aa": -3.0, "aaa": -3.0, " a": -2.5, "cd": -0.5, "dé": -4.0}


def test_merging_with_a_heap_equals_the_plain_loop():
    tok, rng = scored(MERGES), random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice(" abcdéxß") for _ in range(rng.randrange(0, 25)))
        assert tok.encode(text) == slow_encode(tok, text)
        assert tok.decode(tok.encode(text)) == text
        assert tok.decode(tok.encode(text, bos=True)) == text


def test_a_text_that_opens_a_sequence_gets_the_space_of_training():
    tok = scored(MERGES)
    assert tok.encode("a", bos=True) == [1, tok.encode(" a")[0]]
    assert tok.encode("", bos=True) == [1]


@pytest.fixture(params=["bytes", "scored", "shipped"])
def tokenizer(request) -> Tokenizer:
    if request.param == "bytes":
        return tiny_tokenizer()
    if request.param == "scored":
        return scored(MERGES)
    path = SHIPPED / "pycode.netsuke" / "tokenizer.json"
    if not path.is_file():
        pytest.skip("the shipped tokenizer is not in this tree")
    return HFTokenizer(path.read_bytes(), bos=0, eos=(0,))


def test_round_trip_and_streams(tokenizer):
    ids = tokenizer.encode(TEXT, bos=True)
    assert ids[0] == tokenizer.bos and max(ids) < tokenizer.vocab
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode("") == []
    stream, parts = Decoder(tokenizer), []
    for i in ids:
        parts.append(stream.push(i))
        assert "\ufffd" not in parts[-1]
    assert "".join(parts) + stream.flush() == TEXT


def test_streams_of_anything_add_up(tokenizer):
    rng = random.Random(1)
    for _ in range(50):
        ids = [rng.randrange(tokenizer.vocab) for _ in range(rng.randrange(1, 40))]
        stream = Decoder(tokenizer)
        text = "".join(map(stream.push, ids)) + stream.flush()
        assert text.replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")


def test_an_unfinished_character_comes_out_at_the_end():
    tok = tiny_tokenizer()
    stream = Decoder(tok)
    assert [stream.push(i) for i in tok.encode("é")[:1]] == [""]
    assert stream.flush() == "\ufffd" and stream.flush() == ""


def test_bytes_in_and_out(tokenizer):
    again = type(tokenizer).from_bytes(tokenizer.to_bytes(), tokenizer.bos, tokenizer.eos)
    assert again.to_bytes() == tokenizer.to_bytes()
    assert again.encode(TEXT) == tokenizer.encode(TEXT) and again.vocab == tokenizer.vocab


def test_too_many_tokens_for_an_embedding(tokenizer):
    tokenizer.check_fits(tokenizer.vocab, "x")
    with pytest.raises(NetsukeError, match="wrong tokenizer"):
        tokenizer.check_fits(tokenizer.vocab - 1, "x")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff\xfe", b'{"model": 3}', b"null"])
def test_what_is_no_tokenizer(data):
    with pytest.raises(NetsukeError, match="not a tokenizer"):
        HFTokenizer(data)
    with pytest.raises(NetsukeError):
        ScoredTokenizer(data)


def test_settings_that_cut_or_pad_are_switched_off():
    import tokenizers

    raw = tokenizers.Tokenizer.from_str(tiny_tokenizer().to_bytes().decode())
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    assert len(HFTokenizer(raw.to_str().encode()).encode("a" * 30)) == 30
