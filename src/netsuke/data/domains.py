"""Five kinds of real text, each with disjoint splits: what small language models are trained and told apart on.

    coding        the Python standard library, by module path (pysource.py)
    math          GSM8K (MIT): grade-school problems with worked answers; its test file, 5 % of the train file validates
    knowledge     WikiText-2's valid and test files (CC BY-SA 3.0), by article: valid trains, test is cut 1:2
    writing       tinyshakespeare (public domain), in order, 90/5/5
    translation   English messages of Django's catalogues (BSD) in another language, by the English message: a message is in
                  one split in all languages

A document belongs to a split by its own name or text, so the splits are the same on every machine.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
import struct
from functools import cache
from pathlib import Path

from netsuke.data import catalogue, pysource
from netsuke.errors import NetsukeError

DOMAINS = ("coding", "math", "knowledge", "writing", "translation")
FILES = {
    "math": ("configurable-fm/gsm8k_train.jsonl", "configurable-fm/gsm8k_test.jsonl"),
    "knowledge": ("tinylm/wikitext2_valid.txt", "tinylm/wikitext2_test.txt"),
    "writing": ("tinylm/tinyshakespeare.txt",),
}
LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "nl": "Dutch"}
LINES = 8  # translated messages in a document
PASSAGE = 2000  # characters of a play in a document, at least


def needs(domains: tuple[str, ...] = DOMAINS) -> tuple[str, ...]:
    """Files below $NETSUKE_DATA that these domains are read from."""
    return tuple(f for d in domains for f in FILES.get(d, ()))


def missing(domains: tuple[str, ...] = DOMAINS) -> list[str]:
    """What is absent: files below $NETSUKE_DATA, and the package django for translations."""
    absent = catalogue.missing(needs(domains))
    return absent + (["the package django"] if "translation" in domains and django_root() is None else [])


@cache
def documents(domain: str, split: str) -> tuple[str, ...]:
    """The documents of a domain in one split ("train", "validation", "test"), in a fixed order.

    Raises NetsukeError for an unknown domain and for absent data, naming it.
    """
    readers = {
        "coding": _coding,
        "math": _math,
        "knowledge": _knowledge,
        "writing": _writing,
        "translation": translations,
    }
    if domain not in readers or split not in pysource.SPLITS:
        found = f"{domain!r}, {split!r}"
        raise NetsukeError("read a domain", found, f"{', '.join(DOMAINS)}; {', '.join(pysource.SPLITS)}")
    if absent := missing((domain,)):
        raise NetsukeError(
            f"read the domain {domain}", f"absent: {', '.join(absent)}",
            attempt="NETSUKE_DATA=FOLDER, pip install --no-deps django",
        )  # fmt: skip
    return tuple(readers[domain](split))


def sample(domain: str, split: str, size: int) -> list[str]:
    """`size` bytes of a domain's split (all of it where there is less), documents in a fixed shuffled order."""
    texts, own, left = [], list(documents(domain, split)), size
    random.Random(0).shuffle(own)
    while left > 0 and own:
        texts.append(own.pop()[:left])
        left -= len(texts[-1].encode())
    return texts


def bucket(text: str) -> int:
    """0 to 99 by the sha256 of a document's name or text."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100


def _coding(split: str) -> list[str]:
    return [body for _, body in pysource.modules(split)]


def _math(split: str) -> list[str]:
    lines = catalogue.find(FILES["math"][split == "test"]).read_text(encoding="utf-8").splitlines()
    out = []
    for row in map(json.loads, lines):
        held = split != "test" and bucket(row["question"]) < 5
        if held == (split == "validation"):
            answer = re.sub(r"<<[^>]*>>", "", row["answer"])  # a calculator's calls, not prose
            out.append(f"Question: {row['question']}\nAnswer: {answer}\n")
    return out


def _knowledge(split: str) -> list[str]:
    text = catalogue.find(FILES["knowledge"][split != "train"]).read_text(encoding="utf-8")
    articles = [a for a in re.split(r"(?m)^(?= = [^=].*[^=] = $)", text) if a.strip()]
    if split == "train":
        return articles
    return [a for a in articles if (bucket(a[:80]) < 33) == (split == "validation")]


def _writing(split: str) -> list[str]:
    text = catalogue.find(FILES["writing"][0]).read_text(encoding="utf-8")
    passages, part = [], ""
    for speech in text.split("\n\n"):
        part += speech + "\n\n"
        if len(part) >= PASSAGE:
            passages.append(part)
            part = ""
    a, b = int(len(passages) * 0.9), int(len(passages) * 0.95)
    return {"train": passages[:a], "validation": passages[a:b], "test": passages[b:]}[split]


def django_root() -> Path | None:
    """The installed package django, found without importing it."""
    spec = importlib.util.find_spec("django")
    return Path(spec.origin).parent if spec and spec.origin else None


def translations(split: str, languages: dict[str, str] | None = None) -> list[str]:
    """Documents of `LINES` lines "English => German: Yes => Ja", one language each. `languages` maps a catalogue's folder
    to its name, by default the five of `LANGUAGES`."""
    out = []
    for code, name in (languages or LANGUAGES).items():
        pairs: dict[str, str] = {}
        for path in sorted(django_root().glob(f"**/locale/{code}/LC_MESSAGES/django.mo")):
            pairs |= read_catalogue(path.read_bytes())
        lines = [
            f"English => {name}: {source} => {target}"
            for source, target in sorted(pairs.items())
            if 2 <= len(source) <= 160 and "\n" not in source + target and _of_split(source, split)
        ]
        out += ["\n".join(lines[i : i + LINES]) + "\n" for i in range(0, len(lines), LINES)]
    return out


def _of_split(message: str, split: str) -> bool:
    b = bucket(message)
    return split == ("test" if b < 8 else "validation" if b < 16 else "train")


def read_catalogue(data: bytes) -> dict[str, str]:
    """Message -> translation of a compiled gettext catalogue (.mo), without contexts and plurals."""
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    count, sources, targets = struct.unpack_from(f"{order}3I", data, 8)

    def text(table: int, i: int) -> str:
        length, start = struct.unpack_from(f"{order}2I", data, table + 8 * i)
        return data[start : start + length].decode("utf-8")

    rows = ((text(sources, i), text(targets, i)) for i in range(count))
    return {s: t for s, t in rows if s and t and not {"\0", "\4"} & set(s)}
