"""Every spoiled model gets one sentence that names the culprit, from `load` and, if headers tell, from `describe`."""

from __future__ import annotations

import os

import pytest

from netsuke.errors import NetsukeError
from netsuke.models.files import plain_name
from netsuke.models.load import describe, load
from tests.models import hostile

# What only the tensors' values or the files' bodies reveal: describe reads neither.
BODIES = {
    "weights_nan", "tokenizer_is_no_tokenizer", "tokenizer_of_a_larger_vocabulary", "llama2c_nan",
    "llama2c_tokenizer_truncated", "llama2c_tokenizer_too_large", "artifact_with_a_flipped_bit",
    "artifact_with_a_changed_tokenizer", "artifact_resealed_with_nan", "artifact_of_a_smaller_embedding",
}  # fmt: skip


@pytest.mark.parametrize("name", hostile.CASES)
def test_refused_with_one_sentence(name, tmp_path):
    case = hostile.CASES[name]
    path = case.build(tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for ask in [load] if name in BODIES else [load, describe]:
        with pytest.raises(NetsukeError) as e:
            ask(path)
        text = str(e.value)
        assert case.culprit in text
        assert text.startswith("cannot ") and "\n" not in text and len(text) < 900
        assert e.value.found and e.value.code == 2
    assert sorted(p.name for p in tmp_path.rglob("*")) == before  # nothing ran, nothing was written


def test_the_same_models_unspoiled_load(tmp_path):
    """Control: what the cases spoil is good before."""
    for path in (
        hostile.hf_folder(tmp_path / "hf"),
        hostile.shard(hostile.hf_folder(tmp_path / "shards")),
        hostile.artifact(tmp_path / "artifact"),
        hostile.llama2c_file(tmp_path / "llama2c"),
        hostile.llama2c_file(tmp_path / "untied", untied=True),
    ):
        assert load(path).model.cfg == describe(path).config


def test_every_cut_of_a_file_is_refused(tmp_path):
    """Truncation anywhere: no length of a weight file but the full one loads."""
    path = hostile.hf_folder(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    for keep in [*range(0, 64), *range(64, len(whole), 1997), len(whole) - 1]:
        path.write_bytes(whole[:keep])
        with pytest.raises(NetsukeError):
            load(tmp_path)


def test_flipped_bits_in_the_header_never_escape(tmp_path):
    """Any bit of the header flipped: refused, or loaded when the bit does not matter; no other exception."""
    path = hostile.hf_folder(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    refused = 0
    for at in range(0, 8 + length, 23):
        path.write_bytes(whole)
        hostile.flip_bit(path, at)
        try:
            load(tmp_path)
        except NetsukeError:
            refused += 1
    assert refused > (8 + length) // 23 * 0.9


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.bin")
    with pytest.raises(NetsukeError, match="neither a file nor a folder"):
        load(tmp_path / "model.bin")


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "a\\b", "c:x", "a\0b", "a\nb", None, 3, "x" * 300])
def test_names_that_are_more_than_names(name):
    assert not plain_name(name)
