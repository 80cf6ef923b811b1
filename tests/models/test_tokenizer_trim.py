"""Trimming: bytes and specials stay, nothing is lost, closed vocabularies cut text as before, models keep their rows."""

import json
import random

import pytest
import torch

from netsuke.data import catalogue, pysource
from netsuke.errors import NetsukeError
from netsuke.layers.quantized import QuantLinear
from netsuke.models.load import load
from netsuke.models.tokenizer import HFTokenizer, ScoredTokenizer, read_tokenizer
from netsuke.models.tokenizer_train import train_bpe
from netsuke.models.tokenizer_trim import count_pieces, pieces_of, retokenize, trim, trim_model, unreachable
from tests.tiny import same_state, tiny_llama

STORIES = ("modegpt/stories260K.bin", "modegpt/tok512.bin", "modegpt/tinystories_sample.txt")
NO_STORIES = catalogue.missing(STORIES)
with_stories = pytest.mark.skipif(bool(NO_STORIES), reason=f"NETSUKE_DATA lacks {', '.join(NO_STORIES)}")


@pytest.fixture(scope="module")
def texts():
    return [body for _, body in pysource.modules("test")[:12]]


@pytest.fixture(scope="module")
def tok(texts):
    return train_bpe(texts, 900)


@pytest.fixture(scope="module")
def counts(tok, texts):
    return count_pieces(tok, texts)


@pytest.mark.parametrize("rule", ["closed", "frequency"])
@pytest.mark.parametrize("vocab", [257, 400, 700])
def test_every_string_comes_back(tok, counts, vocab, rule):
    small = trim(tok, counts, vocab, rule).tokenizer
    assert small.vocab == vocab
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(
            chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xD7FF)])) for _ in range(rng.randrange(40))
        )
        assert small.decode(small.encode(text)) == text


def test_all_single_bytes_and_the_opening_stay(tok, counts):
    got = trim(tok, counts, 257)
    content = pieces_of(got.tokenizer).content
    assert {bytes([b]) for b in range(256)} < set(content) and got.tokenizer.bos == 0 and got.tokenizer.eos == (0,)


def test_a_closed_vocabulary_cuts_text_of_kept_pieces_as_before(tok, counts, texts):
    got = trim(tok, counts, 600)
    assert not got.unreachable and unreachable(tok) == []
    kept, same = set(got.kept), 0
    for line in "\n".join(texts).splitlines():
        ids = tok.encode(line)
        if set(ids) <= kept:
            same += 1
            assert got.tokenizer.encode(line) == got.remap(ids)
    assert same > 100


def test_the_released_rule_strands_pieces_and_says_which(tok, counts):
    """ "Ġretur" hardly occurs by itself but "Ġreturn" is merged from it: by frequency alone it goes."""
    got = trim(tok, counts, 600, "frequency")
    assert got.unreachable
    content = pieces_of(got.tokenizer).content
    for i in got.unreachable:
        assert i not in got.tokenizer.encode(content[i].decode())
    top = sorted(range(900), key=lambda i: (-int(counts[i]), i))
    always = pieces_of(tok).always
    assert set(got.kept) == always | set([i for i in top if i not in always][: 600 - len(always)])


def test_coverage_is_the_share_of_occurrences(tok, counts):
    got = trim(tok, counts, 600)
    assert got.coverage == pytest.approx(float(counts[list(got.kept)].sum() / counts.sum()))
    assert trim(tok, counts, 900).coverage == 1 and trim(tok, counts, 300).coverage < got.coverage < 1
    assert trim(tok, counts, 900).tokenizer.encode("import os") == tok.encode("import os")


def test_a_trimmed_model_keeps_its_logits(tok, counts):
    model, got = tiny_llama(vocab=900, tied=False), trim(tok, counts, 500)
    small = trim_model(model, got)
    ids = torch.randint(500, (2, 20), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor(got.kept)
    with torch.no_grad():
        assert torch.allclose(small(ids), model(rows[ids])[..., rows], atol=1e-6)
    assert small.cfg.vocab == 500 and model.cfg.vocab == 900 and same_state(model, tiny_llama(vocab=900, tied=False))


def test_another_tokenizer_starts_from_the_rows_that_spell_its_pieces(tok, texts):
    model, other = tiny_llama(vocab=900), train_bpe(texts[:3], 500)
    moved = retokenize(model, tok, other)
    old, new = ({p: i for i, p in enumerate(pieces_of(t).content)} for t in (tok, other))
    table, before = moved.embed.weight, model.embed.weight
    shared = old.keys() & new.keys()
    assert all(torch.equal(table[new[p]], before[old[p]]) for p in shared) and len(shared) > 300
    for piece in list(new.keys() - old.keys())[:5]:
        mean = before[tok.encode(piece.decode())].mean(0)
        assert torch.allclose(table[new[piece]], mean)


def test_template_and_added_ids_are_renumbered(tok, counts):
    data = json.loads(tok.to_bytes())
    piece = {"SpecialToken": {"id": "<|text|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    data["added_tokens"].append(data["added_tokens"][0] | {"id": 900, "content": "<|end|>"})
    data["post_processor"] = {
        "type": "TemplateProcessing", "single": list(piece), "pair": [*piece, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|text|>": {"id": "<|text|>", "ids": [0], "tokens": ["<|text|>"]}},
    }  # fmt: skip
    chat = HFTokenizer(json.dumps(data).encode(), bos=0, eos=(900,))
    small = trim(chat, torch.cat([counts, torch.zeros(1, dtype=torch.long)]), 400).tokenizer
    assert small.eos == (399,) and small.encode("<|end|>") == [399]
    assert small._tok.encode("a", add_special_tokens=True).ids[0] == 0


@pytest.mark.parametrize("vocab,words", [(256, "257 to 900"), (901, "257 to 900")])
def test_impossible_sizes_are_refused(tok, counts, vocab, words):
    with pytest.raises(NetsukeError, match=words):
        trim(tok, counts, vocab)


def test_what_cannot_be_trimmed_is_refused(tok, counts):
    with pytest.raises(NetsukeError, match="closed, frequency"):
        trim(tok, counts, 400, "rare")
    with pytest.raises(NetsukeError, match="no text"):
        count_pieces(tok, [""])
    with pytest.raises(NetsukeError, match="was dropped"):
        trim(tok, counts, 300).remap([899])
    data = json.loads(tok.to_bytes())
    data["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    data["added_tokens"] = []
    with pytest.raises(NetsukeError, match="WordLevel"):
        pieces_of(HFTokenizer(json.dumps(data).encode()))
    model = tiny_llama(vocab=900)
    model.replace("embed", QuantLinear.from_spec({"bits": 8, "group": 16}, 900, 48, False))
    with pytest.raises(NetsukeError, match="embed is stored as quant"):
        trim_model(model, trim(tok, counts, 400))


@with_stories
def test_a_real_scored_tokenizer():
    text = catalogue.find(STORIES[2]).read_text(encoding="utf-8")
    tok = read_tokenizer(catalogue.find(STORIES[1]), 1, (1, 2))
    counts = count_pieces(tok, [text])
    got = trim(tok, counts, 400)
    small = got.tokenizer
    assert isinstance(small, ScoredTokenizer) and small.vocab == 400 and small.decode(small.encode(text)) == text
    assert not got.unreachable and 0.8 < got.coverage < 1
    model = load(catalogue.find(STORIES[0]), dtype="float32").model
    ids = torch.tensor([small.encode(text)[:100]])
    rows = torch.tensor(got.kept)
    with torch.no_grad():
        assert torch.allclose(trim_model(model, got)(ids), model(rows[ids])[..., rows], atol=1e-5)
