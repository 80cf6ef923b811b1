"""The tokenizer half of tinylm's claims: trimmed tokenizers and trained models under them, and the vocabulary study."""

from __future__ import annotations

import json
import random

import torch

from netsuke.claims import Measured
from netsuke.data import catalogue, domains
from netsuke.errors import NetsukeError
from netsuke.models import gguf_tokenizer
from netsuke.models.gguf_file import read_gguf
from netsuke.models.load import Loaded, load
from netsuke.models.shapes import parameters
from netsuke.models.tokenizer import HFTokenizer, Tokenizer
from netsuke.models.tokenizer_trim import RULES, count_pieces, pieces_of, trim, trim_model
from netsuke.systems.modegpt_cases import STORIES, STORIES_FILES
from netsuke.systems.tinylm_cells import TEACHER, config, counts, first_tokenizer, scale, study_shape, trimmed
from netsuke.systems.tinylm_study import bits, mean, sized
from netsuke.tasks.domains import equal_sample

VOCABULARIES = {"GPT-2": "gguf-vocab/ggml-vocab-gpt-2.gguf", "Phi-3": "gguf-vocab/ggml-vocab-phi-3.gguf"}


def verdict(met: bool, quick: bool) -> bool | None:
    """A few steps on little text judge nothing."""
    return None if quick else met


def strings(count: int) -> list[str]:
    """Random text: every character up to U+07FF once, then any mixture of ASCII and all of Unicode but surrogates."""
    rng = random.Random(0)
    out = ["".join(chr(c) for c in range(0x800))]
    for _ in range(count):
        planes = [rng.choice((0x7F, 0x7F, 0xD7FF)) for _ in range(rng.randrange(60))]
        out.append("".join(chr(rng.randrange(p)) for p in planes))
    return [*out, "\U0001f600 \U0001f1e9\U0001f1ea e\u0301"]


def lossless(quick: bool, spoil: bool = False) -> Measured:
    s, lost, tried = scale(quick), 0, 0
    texts = strings(200 if quick else 2000)
    if not quick:
        texts += [t for d in domains.DOMAINS for t in domains.documents(d, "test")[:50]]
    for vocab in s.sizes:
        for rule in RULES:
            tok: Tokenizer = trim(first_tokenizer(s), counts(s), vocab, rule).tokenizer
            if spoil:
                tok = without_a_byte(tok)
            tried += len(texts)
            lost += sum(tok.decode(tok.encode(t)) != t for t in texts)
    shown = f"{lost} of {tried:,} texts differ ({len(s.sizes)} sizes, both rules)"
    return Measured(("one byte without a piece: " if spoil else "") + shown, lost == 0, {"lost": lost, "tried": tried})


def without_a_byte(tok: HFTokenizer) -> HFTokenizer:
    data = json.loads(tok.to_bytes())
    gone = next(p for p, i in data["model"]["vocab"].items() if pieces_of(tok).content[i] == b"e")
    model = data["model"]
    model["merges"] = [m for m in model["merges"] if gone not in "".join(m)]
    model["vocab"] = {p: i for p, i in model["vocab"].items() if gone not in p}
    return HFTokenizer(json.dumps(data).encode())


def coverage(quick: bool) -> Measured:
    s, rows = scale(quick), {}
    for vocab in s.sizes:
        by_frequency = trim(first_tokenizer(s), counts(s), vocab, "frequency")
        cfg = config(str(vocab), *study_shape(str(vocab), s), s)
        rows[vocab] = {
            "coverage": trimmed(vocab, s).coverage, "frequency": by_frequency.coverage, "share": parameters(cfg).share,
            "unreachable": len(by_frequency.unreachable),
        }  # fmt: skip
    shown = "; ".join(
        f"{v:,}: {r['coverage']:.1%} covered (by frequency alone {r['frequency']:.1%}, {r['unreachable']} pieces unreachable), "
        f"tables {r['share']:.1%}"
        for v, r in rows.items()
    )
    met = any(max(r["coverage"], r["frequency"]) > 0.9 and r["share"] < 0.2 for r in rows.values())
    return Measured(shown, verdict(met, quick), {str(v): r for v, r in rows.items()})


def real_vocabularies(quick: bool, rule: str = "closed") -> Measured:
    """Published vocabularies cut to 4,096 pieces for English prose and sums."""
    texts = [t for d in ("knowledge", "math") for t in domains.documents(d, "validation")[: 40 if quick else 400]]
    values, good = {}, True
    for name, file in VOCABULARIES.items():
        path = catalogue.find(file)
        meta = read_gguf(path).metadata
        tok = gguf_tokenizer.from_metadata(meta, *gguf_tokenizer.special_ids(meta, 1 << 20, path), path)
        before = len(pieces_of(tok).content)
        got = trim(tok, count_pieces(tok, texts), 4096, rule)
        lost = sum(got.tokenizer.decode(got.tokenizer.encode(t)) != t for t in texts[:40])
        content = pieces_of(got.tokenizer).content
        empty = sum(not content[i] for i in got.unreachable)  # fillers of the published file
        values[name] = {
            "from": before,
            "coverage": got.coverage,
            "unreachable": len(got.unreachable) - empty,
            "lost": lost,
        }
        good &= lost == 0 and len(got.unreachable) == empty
    shown = "; ".join(
        f"{n} {v['from']:,} to 4,096: {v['coverage']:.1%} covered, {v['unreachable']} unreachable, {v['lost']} texts lost"
        for n, v in values.items()
    )
    return Measured(("the released rule: " if rule == "frequency" else "") + shown, good, values)


def trained_models(quick: bool) -> list[tuple[str, Loaded, list[str]]]:
    """(name, model, text): stories260K with its sample stories, and those of ours that are installed with the domains."""
    out = []
    if not catalogue.missing(STORIES_FILES):
        loaded = load(catalogue.find(STORIES_FILES[0]), dtype="float32")
        out.append((STORIES, loaded, [catalogue.find(STORIES_FILES[2]).read_text(encoding="utf-8")]))
    for name in ours(quick):
        out.append((name, load(name, dtype="float32"), equal_sample(5_000 if quick else 50_000)))
    return out


def ours(quick: bool) -> list[str]:
    """Our language models that are installed, those of the five domains first."""
    out = []
    for name in (TEACHER, "small", "pycode"):
        try:
            load(name)
        except NetsukeError:
            continue
        out.append(name)
    return out[:1] if quick else out


def free_of_dropped(tok: Tokenizer, kept: set[int], texts: list[str], count: int) -> list[list[int]]:
    """Ids of up to `count` lines, words with dropped pieces left out."""
    out = []
    for line in (line for t in texts for line in t.splitlines()):
        words = [w for w in line.split(" ") if set(tok.encode(" " + w)) <= kept]
        ids = tok.encode(" " + " ".join(words))
        if len(ids) > 8 and set(ids) <= kept:
            out.append(ids)
        if len(out) == count:
            break
    return out


@torch.no_grad()
def sliced(quick: bool, shift: int = 0) -> Measured:
    """Rows of kept pieces sliced from trained models: logits, and the loss against the renormalised one."""
    values = {}
    for name, loaded, texts in trained_models(quick):
        model, tok = loaded.model, loaded.tokenizer
        always = len(pieces_of(tok).always)
        got = trim(tok, count_pieces(tok, texts), always + round(0.6 * (tok.vocab - always)))
        small, kept, new = trim_model(model, got), torch.tensor(got.kept), {o: i for i, o in enumerate(got.kept)}
        if shift:
            small.embed.weight.copy_(small.embed.weight.roll(shift, 0))
        lines = [tok.encode(line) for t in texts for line in t.splitlines()]
        free = [ids[: model.cfg.context] for ids in lines if len(ids) > 8 and set(ids) <= new.keys()][
            : 8 if quick else 40
        ]
        logit, loss = 0.0, 0.0
        for old in (ids[: model.cfg.context] for ids in free):
            want, have = model(torch.tensor([old]))[0], small(torch.tensor([[new[i] for i in old]]))[0]
            logit = max(logit, float((have - want[:, kept]).abs().max() / want.abs().max()))
            lost = want.log_softmax(-1)[:, kept].logsumexp(-1)  # log of what the kept pieces had of the probability
            expected = want.log_softmax(-1)[:-1].gather(1, torch.tensor(old[1:])[:, None])[:, 0] - lost[:-1]
            measured = have.log_softmax(-1)[:-1].gather(1, torch.tensor([new[i] for i in old[1:]])[:, None])[:, 0]
            loss = max(loss, float((measured - expected).abs().max()))
        values[name] = {"pieces": [tok.vocab, len(got.kept)], "lines": len(free), "logit": logit, "loss": loss}
    shown = "; ".join(
        f"{n} {v['pieces'][0]:,} to {v['pieces'][1]:,} pieces: logits within {v['logit']:.0e}, losses within {v['loss']:.0e} of "
        f"the renormalised ones ({v['lines']} lines of words without dropped pieces)"
        for n, v in values.items()
    )
    met = bool(values) and all(v["lines"] and v["logit"] <= 1e-6 and v["loss"] <= 1e-5 for v in values.values())
    return Measured(("rows one off: " if shift else "") + shown, met, values)


def best_vocabulary(quick: bool) -> Measured:
    s = scale(quick)
    got = {v: mean(sized(str(v), s)) for v in s.sizes}
    spread = {v: [bits(r) for r in sized(str(v), s)] for v in s.sizes}
    retrained = mean(sized(f"retrained {s.middle}", s))
    best = min(got, key=got.get)
    gain = got[s.sizes[0]] - got[best]
    shown = (
        ", ".join(f"{v:,} pieces {b:.3f}" for v, b in got.items())
        + f" bits/byte, {s.seeds} seeds; the best, {best:,}, gains "
        f"{gain:.3f}; {s.middle:,} pieces trained instead of trimmed {retrained:.3f}"
    )
    values = {"mean": {str(k): v for k, v in got.items()}, "seeds": {str(k): v for k, v in spread.items()}}
    met = verdict(best != s.sizes[0] and gain >= 0.03, quick)
    return Measured(shown, met, values | {"gain": gain, "retrained": retrained})
