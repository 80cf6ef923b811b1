"""Makes a trained tokenizer smaller without training: frequent pieces stay, and a trained model keeps their rows.

"Rethinking Optimization and Architecture for Tiny Language Models" (PanGu-π Pro, ICML 2024): a large vocabulary takes a
third of a small model's parameters for pieces that hardly occur. Count the pieces of a corpus, keep specials, all bytes
and the most frequent ones; what is dropped falls back to shorter pieces.

    rule "closed"     (default) a piece brings the pieces along that it is merged from: every piece stays reachable, and text
                      without dropped pieces is cut into the same pieces as before
    rule "frequency"  as released: the most frequent pieces, whatever they are merged from. Pieces whose parts are gone never
                      occur again: `Trimmed.unreachable` lists them

Ids keep their order. A trimmed model's logits of kept pieces are what they were: losses change by the softmax over fewer
pieces alone. Use it before training a small model, and on a trained one whose text is narrower than its vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.models.llama import Llama
from netsuke.models.tokenizer import HFTokenizer, ScoredTokenizer, Tokenizer

RULES = ("closed", "frequency")
SPECIAL = re.compile(r"<.+>|\[.+\]", re.DOTALL)  # as released; longer than two characters


@dataclass(frozen=True)
class Pieces:
    """What a tokenizer is made of: the bytes of every id, the ids that always stay, the two pieces that a piece is merged
    from."""

    content: list[bytes]
    always: frozenset[int]
    parts: dict[int, tuple[int, int]]


@dataclass(frozen=True)
class Trimmed:
    """`kept` is the old id of each new id, ascending; `coverage` the share of counted pieces that stay; `unreachable` are new
    ids that no text is cut into."""

    tokenizer: Tokenizer
    kept: tuple[int, ...]
    coverage: float
    unreachable: tuple[int, ...]

    def remap(self, ids: Sequence[int]) -> list[int]:
        """Old ids as new ones. Raises NetsukeError for one that was dropped."""
        new = {old: i for i, old in enumerate(self.kept)}
        for i in ids:
            if i not in new:
                raise NetsukeError(f"renumber piece {i}", "it was dropped", "kept pieces", "encode the text again")
        return [new[i] for i in ids]


def count_pieces(tokenizer: Tokenizer, texts: Iterable[str]) -> Tensor:
    """How often each piece occurs, (V,) int64. Raises NetsukeError when the texts hold nothing."""
    counts = torch.zeros(tokenizer.vocab, dtype=torch.long)
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text), dtype=torch.long)
        counts += torch.bincount(ids, minlength=tokenizer.vocab)
    if not int(counts.sum()):
        raise NetsukeError(
            "count the pieces of a corpus", "it holds no text", "UTF-8 text like what the model will meet"
        )
    return counts


def pieces_of(tokenizer: Tokenizer) -> Pieces:
    """Raises NetsukeError for a tokenizer that is not merged (Unigram, WordPiece) or has no pieces for single bytes."""
    if isinstance(tokenizer, ScoredTokenizer):
        return _scored_pieces(tokenizer)
    return _merged_pieces(json.loads(tokenizer.to_bytes()), tokenizer.vocab)


def trim(tokenizer: Tokenizer, counts: Tensor, vocab: int, rule: str = "closed") -> Trimmed:
    """The tokenizer with `vocab` pieces left, by their `counts` (V,).

    Raises NetsukeError for a size that specials and bytes do not fit into, or larger than it is, and for an unknown rule.
    """
    asked, found = f"trim a tokenizer to {vocab} pieces", pieces_of(tokenizer)
    if rule not in RULES:
        raise NetsukeError(asked, f"rule {rule!r}", ", ".join(RULES))
    if not len(found.always) <= vocab <= len(found.content):
        raise NetsukeError(
            asked, f"it has {len(found.content)} pieces, of which {len(found.always)} are specials and bytes",
            f"{len(found.always)} to {len(found.content)}",
        )  # fmt: skip
    kept = set(found.always)
    for piece in sorted(range(len(found.content)), key=lambda i: (-int(counts[i]), i)):
        new = _with_parts(piece, found.parts, kept) if rule == "closed" else {piece} - kept
        if len(kept) + len(new) <= vocab:
            kept |= new
    order = tuple(sorted(kept))
    small = _rebuilt(tokenizer, order)
    coverage = float(counts[list(order)].sum()) / float(counts.sum())
    return Trimmed(small, order, coverage, tuple(unreachable(small)))


def _with_parts(piece: int, parts: dict[int, tuple[int, int]], kept: set[int]) -> set[int]:
    """The piece and all that it is merged from, so far as they are not kept already."""
    new, open_ = set(), [piece]
    while open_:
        one = open_.pop()
        if one not in kept and one not in new:
            new.add(one)
            open_ += parts.get(one, ())
    return new


def unreachable(tokenizer: Tokenizer) -> list[int]:
    """Ids that no text is cut into, since a piece that they are merged from is missing."""
    found = pieces_of(tokenizer)
    if isinstance(tokenizer, ScoredTokenizer):
        texts = {
            i: found.content[i].decode("utf-8", "replace") for i in range(tokenizer.vocab) if i not in found.always
        }
        return [i for i, text in texts.items() if "\ufffd" not in text and tokenizer.encode(text) != [i]]
    if json.loads(tokenizer.to_bytes())["model"].get("ignore_merges"):
        return []
    reached = set(found.always) | {i for i, c in enumerate(found.content) if len(c.decode("utf-8", "replace")) == 1}
    for piece in sorted(range(len(found.content)), key=lambda i: len(found.content[i])):  # parts are shorter
        if piece in found.parts and set(found.parts[piece]) <= reached:
            reached.add(piece)
    return [i for i in range(len(found.content)) if i not in reached]


def _scored_pieces(tok: ScoredTokenizer) -> Pieces:
    first = tok.BYTES + 256
    content = [bytes([i - tok.BYTES]) if tok.BYTES <= i < first else p for i, p in enumerate(tok.pieces)]
    ids = {p: i for i, p in enumerate(content) if i >= tok.BYTES}  # a character's own piece wins over its byte
    parts = {}
    for i in range(first, tok.vocab):
        last = _last_merge(content[i], ids, tok.scores)
        if last is not None:
            parts[i] = last
    return Pieces(content, frozenset(range(first)), parts)


def _last_merge(piece: bytes, ids: dict[bytes, int], scores: Sequence[float]) -> tuple[int, int] | None:
    """The two pieces that are merged last when a piece's characters are merged by score, as the tokenizer does it; None for a
    single character and for what never comes together."""
    symbols = [c.encode() for c in piece.decode("utf-8", "replace")]
    last = None
    while len(symbols) > 1:
        joined = [(scores[ids[a + b]], -k) for k, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids]
        if not joined:
            return None
        k = -max(joined)[1]
        last = symbols[k], symbols[k + 1]
        symbols[k : k + 2] = [symbols[k] + symbols[k + 1]]
    return (ids[last[0]], ids[last[1]]) if last and {*last} <= ids.keys() else None


def _merged_pieces(data: dict[str, Any], size: int) -> Pieces:
    model, asked = data["model"], "trim a tokenizer"
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise NetsukeError(asked, f"it is of type {model.get('type')}", "byte-level BPE, or BPE with byte fallback")
    from tokenizers import pre_tokenizers

    vocab, added = model["vocab"], {t["content"]: t["id"] for t in data["added_tokens"]}
    alphabet = _alphabet(pre_tokenizers.ByteLevel.alphabet())
    coded = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}
    if coded.keys() <= vocab.keys():
        singles, read = coded, lambda piece: coded.get(piece) or piece.encode()
    elif alphabet.keys() <= vocab.keys():
        singles, read = alphabet, lambda piece: b"".join(alphabet.get(c) or c.encode() for c in piece)
    else:
        found = "it has no pieces for single bytes, so that a dropped piece could not be written"
        raise NetsukeError(asked, found, "byte-level BPE, or BPE with byte fallback")
    content = [b""] * size
    for piece, i in vocab.items():
        content[i] = read(piece)
    always = {vocab[s] for s in singles} | set(added.values())
    always |= {i for p, i in vocab.items() if p == model.get("unk_token") or (len(p) > 2 and SPECIAL.fullmatch(p))}
    for text, i in added.items():
        content[i] = text.encode()
    parts: dict[int, tuple[int, int]] = {}
    for a, b in map(_pair, model["merges"]):
        parts.setdefault(vocab[a + b], (vocab[a], vocab[b]))
    return Pieces(content, frozenset(always), parts)


def _alphabet(letters: Iterable[str]) -> dict[str, bytes]:
    """The printable stand-ins of byte-level BPE -> their bytes (as in GPT-2): printable Latin-1 is itself, the rest follows from
    256 on in order."""
    plain = {c: bytes([ord(c)]) for c in letters if ord(c) < 256}
    rest = sorted(b for b in range(256) if bytes([b]) not in plain.values())
    return plain | {chr(256 + i): bytes([b]) for i, b in enumerate(rest)}


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    a, b = merge.split(" ") if isinstance(merge, str) else merge
    return a, b


def _rebuilt(tokenizer: Tokenizer, kept: Sequence[int]) -> Tokenizer:
    """The tokenizer whose id i is the old id kept[i]; pieces keep their order and their scores."""
    new = {old: i for i, old in enumerate(kept)}
    bos = new.get(tokenizer.bos) if tokenizer.bos is not None else None
    eos = tuple(new[e] for e in tokenizer.eos if e in new)
    if isinstance(tokenizer, ScoredTokenizer):
        rows = (struct.pack("<fi", tokenizer.scores[i], len(p := tokenizer.pieces[i])) + p for i in kept)
        return ScoredTokenizer(tokenizer.to_bytes()[:4] + b"".join(rows), bos, eos)
    data = json.loads(tokenizer.to_bytes())
    model = data["model"]
    model["vocab"] = {p: new[i] for p, i in sorted(model["vocab"].items(), key=lambda row: row[1]) if i in new}
    merges = [_pair(m) for m in model["merges"]]
    model["merges"] = [[a, b] for a, b in merges if {a, b, a + b} <= model["vocab"].keys()]
    for token in data["added_tokens"]:
        token["id"] = new[token["id"]]
    _renumber(data.get("post_processor"), new)
    return HFTokenizer(json.dumps(data).encode(), bos, eos)


def _renumber(step: Any, new: dict[int, int]) -> None:
    """New ids in a post-processor, which wraps texts in special tokens."""
    if isinstance(step, dict):
        if isinstance(step.get("ids"), list):
            step["ids"] = [new[i] for i in step["ids"]]
        for name in ("sep", "cls"):
            if isinstance(step.get(name), list):
                step[name] = [step[name][0], new[step[name][1]]]
        for value in step.values():
            _renumber(value, new)
    elif isinstance(step, list):
        for value in step:
            _renumber(value, new)


def trim_model(model: Llama, trimmed: Trimmed) -> Llama:
    """A copy of a trained model with the rows of the kept pieces alone. Raises NetsukeError for a table that is no plain float
    matrix, naming it."""
    rows = torch.tensor(trimmed.kept)
    return _with_rows(model, trimmed.tokenizer, lambda table: table[rows])


def retokenize(model: Llama, old: Tokenizer, new: Tokenizer) -> Llama:
    """A copy of a trained model under another tokenizer: a piece that both have keeps its row, another one starts as the mean of
    the rows of the old pieces that spell it. Raises NetsukeError as `trim_model`."""
    before, after = pieces_of(old), pieces_of(new)
    ids = {piece: i for i, piece in reversed(list(enumerate(before.content)))}
    spelled = []
    for i, piece in enumerate(after.content):
        text = piece.decode("utf-8", "replace")
        if piece in ids:
            spelled.append([ids[piece]])
        elif "\ufffd" not in text and (found := old.encode(text)):
            spelled.append(found)
        else:
            spelled.append([ids[piece[k : k + 1]] for k in range(len(piece))] or [min(i, old.vocab - 1)])
    return _with_rows(model, new, lambda table: torch.stack([table[s].mean(0) for s in spelled]))


def _with_rows(model: Llama, tokenizer: Tokenizer, choose: Callable[[Tensor], Tensor]) -> Llama:
    cfg = msgspec.structs.replace(model.cfg, vocab=tokenizer.vocab, bos=tokenizer.bos, eos=tokenizer.eos)
    out = copy.deepcopy(model)
    for name in ("embed",) if cfg.tied else ("embed", "head"):
        layer = out.linears()[name]
        if not isinstance(layer, Dense):
            raise NetsukeError(
                "trim the model's vocabulary", f"{name} is stored as {layer.spec()['kind']}", "dense weights",
                "trim first, quantize after",
            )  # fmt: skip
        out.replace(name, Dense(choose(layer.weight.detach())))
    out.cfg = cfg
    for block in out.blocks:
        block.cfg = cfg
    return out
