"""Tokenizers in GGUF metadata, both ways: byte-level BPE ("gpt2") and scored pieces ("llama").

llama.cpp knows how to split text before merging by name only (`tokenizer.ggml.pre`), from a fixed list. A tokenizer whose
split is on that list keeps its name and works alike everywhere. One that splits otherwise gets the nearest name, and its
own tokenizer.json goes along under the specification's key `tokenizer.huggingface.json`, which netsuke prefers when it
reads the file back.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from netsuke.errors import NetsukeError
from netsuke.models.tokenizer import HFTokenizer, ScoredTokenizer, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")  # llama.cpp's own, for files without a name
# name -> (patterns applied one after the other, whether a piece that is a token skips the merges)
SPLITS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((GPT2,), False), "llama-bpe": ((LLAMA3,), True), "dbrx": ((LLAMA3,), False), "qwen2": ((QWEN2,), False),
    "smollm": ((r"\p{N}", GPT2), False), "default": (DEFAULT, False),
}  # fmt: skip
ALIASES = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "smaug-bpe": "dbrx", "phi-2": "gpt-2",
    "mpt": "gpt-2", "olmo": "gpt-2", "starcoder": "smollm", "refact": "smollm", "command-r": "smollm",
    "codeshell": "smollm", "stablelm2": "qwen2", "deepseek-r1-qwen": "qwen2",
}  # fmt: skip
HF_KEY = "tokenizer.huggingface.json"


def _key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def split_of(raw: dict[str, Any]) -> tuple[str, ...] | None:
    """The patterns by which a tokenizer.json cuts text before merging, or None when they are no plain patterns."""
    pre = raw.get("pre_tokenizer") or {}
    out: list[str] = []
    for step in pre.get("pretokenizers", [pre]):
        kind = step.get("type")
        if kind == "Split" and "Regex" in step["pattern"] and step["behavior"] == "Isolated" and not step["invert"]:
            out.append(step["pattern"]["Regex"])
        elif kind == "Digits" and step["individual_digits"]:
            out.append(r"\p{N}")
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            out += [GPT2] if step.get("use_regex", True) else []
        else:
            return None
    return tuple(out)


def to_metadata(
    tok: Tokenizer | None, vocab: int, bos: int | None, eos: tuple[int, ...], asked: str
) -> tuple[dict[str, Any], list[str]]:
    """Metadata of a tokenizer padded to `vocab` tokens, and notes on what llama.cpp will do differently.

    Raises NetsukeError for a tokenizer that is neither byte-level BPE nor scored pieces.
    """
    if tok is None:
        return {_key("model"): "none"}, ["the model has no tokenizer: programs can feed it token ids only"]
    if isinstance(tok, ScoredTokenizer):
        meta, notes = _scored(tok, vocab), []
    else:
        meta, notes = _byte_level(json.loads(tok.to_bytes()), vocab, asked)
    meta[_key("add_bos_token")], meta[_key("add_eos_token")] = bos is not None, False
    if bos is not None:
        meta[_key("bos_token_id")] = bos
    ends = sorted(eos, key=lambda e: e == bos)  # one that only ends texts comes first
    for name, token in zip(("eos_token_id", "eot_token_id"), ends):
        meta[_key(name)] = token
    if len(ends) > 2:
        notes.append(f"of the ids that end a text, {ends[:2]} are kept and {ends[2:]} are not")
    return meta, notes


def _byte_level(raw: dict[str, Any], vocab: int, asked: str) -> tuple[dict[str, Any], list[str]]:
    model, split = raw["model"], split_of(raw)
    levels = [raw.get("pre_tokenizer") or {}, *(raw.get("pre_tokenizer") or {}).get("pretokenizers", [])]
    if model.get("type") != "BPE" or not any(step.get("type") == "ByteLevel" for step in levels):
        raise NetsukeError(
            asked, f"the tokenizer is {model.get('type')}, not byte-level BPE", "byte-level BPE or llama2.c's scored pieces"
        )  # fmt: skip
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab)], [UNUSED] * vocab
    for text, i in model["vocab"].items():
        tokens[i], kinds[i] = text, NORMAL
    for added in raw.get("added_tokens", []):
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    ignore = bool(model.get("ignore_merges"))
    name = next((n for n, known in SPLITS.items() if known == (split, ignore)), None)
    meta = {
        _key("model"): "gpt2", _key("pre"): name or ("llama-bpe" if ignore else "dbrx"), _key("tokens"): tokens,
        _key("token_type"): kinds, _key("merges"): merges,
    }  # fmt: skip
    differs = []
    if name is None:
        differs.append(
            "llama.cpp has no name for this tokenizer's way to split text; the nearest, "
            f"{meta[_key('pre')]!r}, cuts some texts into other tokens (netsuke itself reads the exact tokenizer back)"
        )
    if raw.get("normalizer"):  # Qwen's NFC changes letters that are written as a base and an accent, nothing else
        kind = raw["normalizer"].get("type")
        differs.append(f"llama.cpp does not normalize texts as this tokenizer does ({kind}): rare letters may differ")
    if differs:
        meta[HF_KEY] = json.dumps(raw, ensure_ascii=False, separators=(",", ":"))
    return meta, differs


def _scored(tok: ScoredTokenizer, vocab: int) -> dict[str, Any]:
    tokens = [f"[PAD{i}]" for i in range(vocab)]
    kinds, scores = [UNUSED] * vocab, [0.0] * vocab
    first = tok.BYTES + 256
    for i, (piece, score) in enumerate(zip(tok.pieces, tok.scores)):
        if i < tok.BYTES:
            tokens[i], kinds[i] = ("<unk>", "<s>", "</s>")[i], UNKNOWN if i == 0 else CONTROL
        elif i < first:
            tokens[i], kinds[i] = f"<0x{i - tok.BYTES:02X}>", BYTE
        elif piece:
            tokens[i], kinds[i], scores[i] = piece.decode("utf-8", "replace").replace(" ", "▁"), NORMAL, score
    return {
        _key("model"): "llama", _key("pre"): "default", _key("tokens"): tokens, _key("scores"): scores,
        _key("token_type"): kinds, _key("unknown_token_id"): 0, _key("add_space_prefix"): True,
    }  # fmt: skip


def special_ids(meta: dict[str, Any], vocab: int, path: Path) -> tuple[int | None, tuple[int, ...]]:
    """bos (None where it is not put before a text) and the ids that end one. Raises NetsukeError for what is no id."""

    def read(name: str) -> int | None:
        token = meta.get(_key(name))
        if token is None or token in (0xFFFFFFFF, -1):  # how some writers say "none"
            return None
        if type(token) is not int or not 0 <= token < vocab:
            raise NetsukeError(f"load {path}", f"{_key(name)} is {str(token)[:40]!r}", f"a token from 0 to {vocab - 1}")
        return token

    scored = meta.get(_key("model")) == "llama"
    bos = read("bos_token_id")
    add = meta.get(_key("add_bos_token"), scored or SPLITS.get(_split_name(meta), ((), False))[1])
    if type(add) is not bool:
        raise NetsukeError(f"load {path}", f"{_key('add_bos_token')} is {str(add)[:40]!r}", "true or false")
    if bos is None and scored and vocab > 1:
        bos = 1
    ends = (read("eos_token_id"), read("eot_token_id"))
    return bos if add else None, tuple(dict.fromkeys(e for e in ends if e is not None))


def _split_name(meta: dict[str, Any]) -> str:
    name = meta.get(_key("pre"), "default")
    return ALIASES.get(name, name) if isinstance(name, str) else str(name)


def from_metadata(meta: dict[str, Any], bos: int | None, eos: tuple[int, ...], path: Path) -> Tokenizer | None:
    """The tokenizer that metadata describe, None when there is none.

    Raises NetsukeError for another kind of tokenizer, an unknown name of a split, and lists that do not belong together.
    """
    asked, kind = f"load {path}", meta.get(_key("model"), "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise NetsukeError(
            asked, f"a tokenizer of kind {str(kind)[:40]!r}", "gpt2 (byte-level BPE), llama (scored pieces)"
        )
    tokens = _list(meta, "tokens", str, None, asked)
    if len(set(tokens)) != len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise NetsukeError(asked, f"the token {twice[:40]!r} stands twice", "each token once")
    kinds = _list(meta, "token_type", int, len(tokens), asked) if _key("token_type") in meta else [NORMAL] * len(tokens)
    if kind == "llama":
        return _read_scored(meta, tokens, kinds, bos, eos, path)
    own = meta.get(HF_KEY)
    if isinstance(own, str) and own:
        return HFTokenizer(own.encode(), bos, eos, source=path)
    return HFTokenizer(json.dumps(_tokenizer_json(meta, tokens, kinds, asked)).encode(), bos, eos, source=path)


def _list(meta: dict[str, Any], name: str, kind: type, length: int | None, asked: str) -> list[Any]:
    """A list of metadata, as Python values. Raises NetsukeError when it is missing, of another kind or length."""
    value = meta.get(_key(name))
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list) or not all(type(v) is kind for v in value):
        raise NetsukeError(
            asked, f"{_key(name)} is {'missing' if value is None else 'of another type'}", f"a list of {kind.__name__}"
        )
    if length is not None and len(value) != length:
        raise NetsukeError(asked, f"{_key(name)} has {len(value)} entries for {length} tokens", "one for each token")
    return value


def _tokenizer_json(meta: dict[str, Any], tokens: list[str], kinds: list[int], asked: str) -> dict[str, Any]:
    name = _split_name(meta)
    if name not in SPLITS:
        raise NetsukeError(asked, f"{_key('pre')} is {name[:40]!r}", ", ".join(sorted(SPLITS | ALIASES)))
    patterns, ignore = SPLITS[name]
    merges = [m.split(" ") for m in _list(meta, "merges", str, None, asked)]
    known = {t: i for i, t in enumerate(tokens) if kinds[i] != UNUSED}
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= known.keys():
            raise NetsukeError(
                asked, f"the merge {' '.join(pair)[:40]!r} joins no tokens", "two tokens that make a third"
            )
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": tokens[i], "special": kinds[i] != USER, **plain}
        for i in range(len(tokens)) if kinds[i] in (CONTROL, USER, UNKNOWN) and tokens[i]
    ]  # fmt: skip
    splits = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns
    ]  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]}, "post_processor": None,
        "decoder": {**level, "add_prefix_space": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore,
            "vocab": known, "merges": merges,
        },
    }  # fmt: skip


def _read_scored(
    meta: dict[str, Any], tokens: list[str], kinds: list[int], bos: int | None, eos: tuple[int, ...], path: Path
) -> ScoredTokenizer:
    asked, first = f"load {path}", ScoredTokenizer.BYTES + 256
    wanted = [f"<0x{b:02X}>" for b in range(256)]
    if tokens[ScoredTokenizer.BYTES : first] != wanted:
        raise NetsukeError(
            asked, "the raw bytes are not tokens 3 to 258", "a vocabulary as Llama 2 and llama2.c order it"
        )
    if meta.get(_key("add_space_prefix"), True) is not True:
        raise NetsukeError(asked, "texts do not begin with a space", "add_space_prefix true")
    scores = _list(meta, "scores", float, len(tokens), asked)
    out = bytearray(4)  # the longest piece, which no reader needs
    for i, (token, kind, score) in enumerate(zip(tokens, kinds, scores)):
        # pieces that no text may give (control, unused) are empty: they never match and print nothing
        piece = token.replace("▁", " ").encode() if i >= first and kind in (NORMAL, USER) else b""
        if not math.isfinite(score):
            raise NetsukeError(asked, f"token {i} has the score {score}", "finite scores")
        out += struct.pack("<fi", score, len(piece)) + piece
    return ScoredTokenizer(bytes(out), bos, eos, source=path)
