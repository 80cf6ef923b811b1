"""llama2.c checkpoints: the known story, and interleaved rotation against a direct computation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from netsuke.models.llama import KVCache
from netsuke.models.llama2c import half_split
from netsuke.models.load import describe, load
from tests.models.hostile import llama2c_file

DATA = Path(os.environ.get("NETSUKE_DATA", "absent")) / "modegpt"
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)
needs_data = pytest.mark.skipif(not (DATA / "stories260K.bin").is_file(), reason="NETSUKE_DATA has no stories260K.bin")


def test_half_split_turns_the_same_pairs():
    """Rotating interleaved pairs and then reordering equals reordering and then rotating half-split pairs."""
    rng = torch.Generator().manual_seed(0)
    w, x, angle = torch.randn(3 * 8, 5, generator=rng), torch.randn(5, generator=rng), torch.rand(4, generator=rng)
    a, b = (w @ x).view(3, 4, 2).unbind(-1)
    turned = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    c, d = (half_split(w, 3) @ x).view(3, 2, 4).unbind(1)
    assert torch.allclose(c * angle.cos() - d * angle.sin(), turned[0], atol=1e-6)
    assert torch.allclose(d * angle.cos() + c * angle.sin(), turned[1], atol=1e-6)


def test_untied_heads_lie_after_the_tables(tmp_path):
    path = llama2c_file(tmp_path, untied=True)
    model = load(path).model
    last = torch.frombuffer(bytearray(path.read_bytes()[-4 * 300 * 16 :]), dtype=torch.float32).view(300, 16)
    assert not model.cfg.tied and torch.equal(model.head.weight, last)
    assert describe(path).layers["head"] == {"kind": "dense", "dtype": "float32"}
    assert load(path, dtype="bfloat16").model.head.weight.dtype == torch.bfloat16


def test_a_width_that_looks_like_a_pickle_is_no_pickle(tmp_path):
    """A width of 640 begins with the bytes 80 02, as pickles of protocol 2 do."""
    import struct

    from netsuke.models.files import is_pickled

    (tmp_path / "a.bin").write_bytes(struct.pack("<7i", 640, 1, 1, 1, 1, 3, 1))
    assert not is_pickled(tmp_path / "a.bin")


@needs_data
@torch.no_grad()
def test_the_known_story():
    found = load(DATA / "stories260K.bin")
    model, tok = found.model, found.tokenizer
    ids, cache = [tok.bos], KVCache(model.cfg, 1, model.cfg.context)
    for _ in range(60):
        ids.append(int(model(torch.tensor([ids[-1:]]), cache, last_only=True)[0, -1].argmax()))
    assert tok.decode(ids).startswith(STORY)


@needs_data
@torch.no_grad()
def test_the_published_loss():
    """1.264 over the five stories: BOS before each, curly quotes folded (the figure beside the data)."""
    found = load(DATA / "stories260K.bin")
    text = (DATA / "tinystories_sample.txt").read_text()
    for curly, plain in {"“": '"', "”": '"', "’": "'", "‘": "'"}.items():
        text = text.replace(curly, plain)
    total, count = 0.0, 0
    for story in filter(None, (s.strip() for s in text.split("<|endoftext|>"))):
        ids = torch.tensor([found.tokenizer.encode(story, bos=True)])
        loss = torch.nn.functional.cross_entropy(found.model(ids[:, :-1])[0], ids[0, 1:], reduction="sum")
        total, count = total + loss.double().item(), count + ids.shape[1] - 1
    assert abs(total / count - 1.264) < 0.01


@needs_data
def test_description_and_a_named_tokenizer(tmp_path):
    told = describe(DATA / "stories260K.bin")
    assert (told.kind, told.tokenizer_bytes, told.bytes_on_disk) == ("llama2c", 6227, 1_056_540 + 6227)
    copy = tmp_path / "model.bin"
    copy.write_bytes((DATA / "stories260K.bin").read_bytes())
    assert load(copy).tokenizer is None
    assert load(copy, tokenizer=DATA / "tok512.bin").tokenizer.vocab == 512
