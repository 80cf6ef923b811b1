"""Language modelling: what a split is, what a score is, and what cannot be scored."""

import math

import pytest
import torch

from netsuke.errors import NetsukeError
from netsuke.models.llama import random_llama
from netsuke.tasks.language import LanguageModeling, strided_loss, token_losses
from tests.models.hostile import tiny_config, tiny_tokenizer

TEXT = "".join(f"{i} bottles of water on the wall\n" for i in range(500))


def task(context: int = 16, **texts: str) -> LanguageModeling:
    parts = {"train": TEXT[:8000], "validation": TEXT[8000:10000], "test": TEXT[10000:]} | texts
    return LanguageModeling(parts, tiny_tokenizer(), context)


def test_a_uniform_model_scores_the_vocabulary():
    model = random_llama(tiny_config(), 0)
    model.embed.weight.zero_()
    assert task().score(model, "test") == pytest.approx(300, rel=1e-5)


def test_bits_per_byte_of_a_uniform_byte_model():
    """Every byte is one token of 300 equally likely ones."""
    t = task()
    assert t.bits_per_byte(math.log(300), "test") == pytest.approx(math.log2(300))


def test_windows_cover_each_split_once_and_only_itself():
    t = task()
    for split in ("train", "validation", "test"):
        rows = t.windows(split)
        firsts = rows[:, :-1].flatten().sort().values
        assert torch.equal(firsts, t.ids(split)[: firsts.numel()].sort().values)


def test_a_prefix_of_train_is_a_sample_and_test_is_in_order():
    t = task()
    assert not torch.equal(t.windows("train")[0], t.ids("train")[:17])
    assert torch.equal(t.windows("test")[0], t.ids("test")[:17])
    assert torch.equal(t.windows("train"), task().windows("train"))


def test_file_is_cut_in_order_without_overlap(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(TEXT)
    t = LanguageModeling.from_path(path, tiny_tokenizer(), 16)
    assert t.texts["train"] + t.texts["validation"] + t.texts["test"] == TEXT


def test_folder_is_split_by_files(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"<{i}> " * 100)
    t = LanguageModeling.from_path(tmp_path, tiny_tokenizer(), 16)
    assert "<8>" in t.texts["validation"] and "<9>" in t.texts["test"] and "<0>" in t.texts["train"]
    assert not any("<9>" in t.texts[s] for s in ("train", "validation"))


@pytest.mark.parametrize(("body", "culprit"), [(b"", "no text"), (b"short", "tokens"), (b"\xff\xfe" * 900, "UTF-8")])
def test_unusable_text_is_refused(body, culprit, tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes(body)
    with pytest.raises(NetsukeError, match=culprit):
        LanguageModeling.from_path(path, tiny_tokenizer(), 16)


def test_strided_loss_equals_the_definition():
    """Every token is scored once, with at least context - stride tokens before it where there are any."""
    model, ids = random_llama(tiny_config(), 0, std=0.3), torch.randint(0, 257, (75,))
    context, stride, total = 16, 8, 0.0
    scored_until = 0  # index into ids of the last token that was scored
    for start in range(0, 75, stride):
        losses = token_losses(model, ids[None, start : start + context + 1])[0]
        for k, loss in enumerate(losses):
            if start + k + 1 > scored_until:
                total, scored_until = total + float(loss), start + k + 1
        if scored_until == 74:
            break
    assert strided_loss(model, ids, context, stride) == pytest.approx(total / 74, rel=1e-5)


def test_the_built_in_kinds_of_text_are_mixed_and_those_that_are_absent_are_left_out(monkeypatch):
    from netsuke.data import domains

    monkeypatch.setattr(domains, "missing", lambda names: [] if set(names) <= {"coding", "math"} else ["a file"])
    documents = {
        ("coding", s): tuple(f"{s}{i} = {i}\n" * 9 for i in range(40)) for s in ("train", "validation", "test")
    }
    documents |= {
        ("math", s): tuple(f"Question {s} {i}: {i} + 1?\n" for i in range(90)) for s in ("train", "validation", "test")
    }
    monkeypatch.setattr(domains, "documents", lambda domain, split: documents[domain, split])
    task = LanguageModeling.built_in_domains(tiny_tokenizer(), 16)
    assert task.source == "built-in domains: coding, math"
    for split, text in task.texts.items():
        assert all(other not in text for other in {"train", "validation", "test"} - {split})
        math_bytes = sum(len(line) + 1 for line in text.splitlines() if line.startswith("Question"))
        assert 0.4 < math_bytes / len(text) < 0.6
        assert "Question" in text[: len(text) // 8] and " = " in text[: len(text) // 8]
