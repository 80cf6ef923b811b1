"""Small good models on disk, and the ways to spoil them: every loader and command must answer each with one sentence.

`CASES` maps a name to `Case(build, culprit)`: `build(folder)` writes a spoiled model below an empty folder and returns
the path to hand to a loader, `culprit` is what the sentence must mention. Nothing here needs data or another library's
writer.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from netsuke.models.hf import theirs
from netsuke.models.llama import Llama, LlamaConfig, random_llama
from netsuke.models.places import digest
from netsuke.models.save import save_artifact
from netsuke.models.tokenizer import HFTokenizer
from netsuke.models.weights import write_safetensors


def tiny_config(**changes: Any) -> LlamaConfig:
    base = {"vocab": 300, "width": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "context": 32, "bos": 0, "eos": (0,)}
    return LlamaConfig.uniform(2, 24, **(base | changes))


def tiny_model(seed: int = 0, **changes: Any) -> Llama:
    return random_llama(tiny_config(**changes), seed, std=0.3)


def tiny_tokenizer(extra: int = 0) -> HFTokenizer:
    """All bytes and one special token: 257 tokens, and `extra` more."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"extra{i}" for i in range(extra))]
    tok = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tok.add_special_tokens(["<|end|>"])
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    return HFTokenizer(tok.to_str().encode(), bos=0, eos=(0,))


def hf_folder(folder: Path, model: Llama | None = None, extra_tokens: int = 0, **config: Any) -> Path:
    """A Hugging Face folder of the tiny model; `config` overrides entries of config.json (None removes one)."""
    model = model or tiny_model()
    c = model.cfg
    entries = {
        "model_type": "llama", "vocab_size": c.vocab, "hidden_size": c.width, "intermediate_size": c.blocks[0].hidden,
        "num_hidden_layers": len(c.blocks), "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads,
        "max_position_embeddings": c.context, "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tied,
        "bos_token_id": c.bos, "eos_token_id": list(c.eos),
    }  # fmt: skip
    entries = {k: v for k, v in (entries | config).items() if v is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(entries))
    write_safetensors(folder / "model.safetensors", {theirs(n): t for n, t in model.state_dict().items()})
    (folder / "tokenizer.json").write_bytes(tiny_tokenizer(extra_tokens).to_bytes())
    return folder


def artifact(folder: Path, model: Llama | None = None, tokenizer: HFTokenizer | None = None) -> Path:
    """A netsuke artifact of the tiny model in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.netsuke"
    return save_artifact(path, model or tiny_model(), tokenizer or tiny_tokenizer(), {"from": "test"}, {"loss": 1.5})


def llama2c_file(folder: Path, untied: bool = False, vocab: int = 300) -> Path:
    """A llama2.c version-0 file with random weights, no tokenizer beside it."""
    width, hidden, layers, heads, kv, context = 16, 24, 2, 4, 2, 32
    per_layer = 2 * width + 2 * width * width + 2 * width * (kv * width // heads) + 3 * width * hidden
    count = vocab * width * (1 + untied) + layers * per_layer + width + context * (width // heads)
    head = struct.pack("<7i", width, hidden, layers, heads, kv, -vocab if untied else vocab, context)
    data = torch.randn(count, generator=torch.Generator().manual_seed(3)).numpy().tobytes()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.bin").write_bytes(head + data)
    return folder / "tiny.bin"


def raw_safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """Writes a safetensors file from any header (JSON value or bytes) and any claimed header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def split_header(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a safetensors header and leaves the data as they are."""
    header, data = split_header(path)
    change(header)
    raw_safetensors(path, header, data)


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def flip_bit(path: Path, at: int) -> None:
    """Flips one bit of the byte `at` (negative: from the end)."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(raw)


def truncate(path: Path, drop: int) -> None:
    path.write_bytes(path.read_bytes()[:-drop])


def reseal(folder: Path) -> None:
    """Makes the manifest agree with the files again: a forger can compute hashes too."""

    def update(m: dict[str, Any]) -> None:
        for name, fact in m["files"].items():
            fact["bytes"], fact["sha256"] = (folder / name).stat().st_size, digest(folder / name)

    edit_json(folder / "manifest.json", update)


def shard(folder: Path) -> Path:
    """Turns a folder's single weight file into two shards with an index."""
    from netsuke.models.weights import WeightFile

    weights = WeightFile(folder / "model.safetensors")
    names, places = weights.names(), {}
    for part, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{part:05}-of-00002.safetensors"
        write_safetensors(folder / file, {n: weights.get(n) for n in chosen})
        places |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@dataclass(frozen=True)
class Case:
    build: Callable[[Path], Path]
    culprit: str  # a text that the sentence must contain


CASES: dict[str, Case] = {}


def case(culprit: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    """Registers a builder under its name."""

    def keep(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
        CASES[build.__name__] = Case(build, culprit)
        return build

    return keep


# ---- safetensors headers -------------------------------------------------------------------------------------------


def _header_case(name: str, culprit: str, change: Callable[[dict[str, Any]], None]) -> None:
    def build(folder: Path) -> Path:
        edit_header(hf_folder(folder) / "model.safetensors", change)
        return folder

    CASES[name] = Case(build, culprit)


NORM = "model.norm.weight"


def _shift(header: dict[str, Any], by: int) -> None:
    header[NORM]["data_offsets"] = [v + by for v in header[NORM]["data_offsets"]]


_header_case("offsets_overlap", "overlaps", lambda h: _shift(h, -64))
_header_case("offsets_out_of_range", "truncated", lambda h: _shift(h, 10**9))
_header_case("offsets_reversed", NORM, lambda h: h[NORM]["data_offsets"].reverse())
_header_case("offsets_negative", NORM, lambda h: h[NORM].update(data_offsets=[-64, 0]))
_header_case("shape_and_span_disagree", NORM, lambda h: h[NORM].update(shape=[17]))
_header_case("shape_negative", NORM, lambda h: h[NORM].update(shape=[-4, -4]))
_header_case("shape_absurd", NORM, lambda h: h[NORM].update(shape=[10**12, 10**12]))
_header_case("shape_of_texts", NORM, lambda h: h[NORM].update(shape=["16"]))
_header_case("dtype_unknown", "F4_MAGIC", lambda h: h[NORM].update(dtype="F4_MAGIC"))
_header_case("dtype_integer_weights", NORM, lambda h: h[NORM].update(dtype="I32"))
_header_case("tensor_entry_incomplete", NORM, lambda h: h[NORM].pop("shape"))
_header_case("tensor_hidden_leaves_a_gap", "gap", lambda h: h.pop("model.layers.0.mlp.up_proj.weight"))
_header_case("tensor_renamed", NORM, lambda h: h.update({"model.normal.weight": h.pop(NORM)}))


@case("10000000000")
def header_of_ten_gigabytes(folder: Path) -> Path:
    raw_safetensors(hf_folder(folder) / "model.safetensors", b"{}", length=10**10)
    return folder


@case("not valid JSON")
def header_is_no_json(folder: Path) -> Path:
    raw_safetensors(hf_folder(folder) / "model.safetensors", b"{'a': 1}" + b"\xff" * 8)
    return folder


@case("not valid JSON")
def header_nested_too_deep(folder: Path) -> Path:
    raw_safetensors(hf_folder(folder) / "model.safetensors", b'{"a":' + b"[" * 200_000)
    return folder


@case("twice")
def header_names_a_tensor_twice(folder: Path) -> Path:
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    raw_safetensors(hf_folder(folder) / "model.safetensors", b"{" + entry + b"," + entry + b"}", b"\0" * 4)
    return folder


@case("shorter than its header")
def weights_of_three_bytes(folder: Path) -> Path:
    (hf_folder(folder) / "model.safetensors").write_bytes(b"abc")
    return folder


@case("truncated")
def weights_truncated(folder: Path) -> Path:
    truncate(hf_folder(folder) / "model.safetensors", 100)
    return folder


@case("belong to no tensor")
def weights_with_spare_bytes(folder: Path) -> Path:
    path = hf_folder(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 64)
    return folder


# ---- Hugging Face folders ------------------------------------------------------------------------------------------


@case("blocks.1.down.weight")
def weights_nan(folder: Path) -> Path:
    model = tiny_model()
    model.blocks[1].down.weight[3, 5] = float("nan")
    return hf_folder(folder, model)


@case("model-00002-of-00002.safetensors")
def shard_missing(folder: Path) -> Path:
    (shard(hf_folder(folder)) / "model-00002-of-00002.safetensors").unlink()
    return folder


def _shard_elsewhere(folder: Path, place: str) -> Path:
    shard(hf_folder(folder))
    edit_json(folder / "model.safetensors.index.json", lambda i: i["weight_map"].update({NORM: place}))
    return folder


@case("../x.safetensors")
def shard_above_the_folder(folder: Path) -> Path:
    return _shard_elsewhere(folder, "../x.safetensors")


@case("/etc/passwd")
def shard_with_an_absolute_path(folder: Path) -> Path:
    return _shard_elsewhere(folder, "/etc/passwd")


@case(NORM)
def shard_without_its_tensor(folder: Path) -> Path:
    shard(hf_folder(folder))
    other = {"model-00001-of-00002.safetensors": "model-00002-of-00002.safetensors"}

    def swap(index: dict[str, Any]) -> None:
        place = index["weight_map"][NORM]
        index["weight_map"][NORM] = other.get(place, "model-00001-of-00002.safetensors")

    edit_json(folder / "model.safetensors.index.json", swap)
    return folder


@case("weight_map")
def index_without_a_map(folder: Path) -> Path:
    (shard(hf_folder(folder)) / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    return folder


@case("no weights")
def folder_without_weights(folder: Path) -> Path:
    (hf_folder(folder) / "model.safetensors").unlink()
    return folder


@case("pickle")
def folder_with_pickled_weights_only(folder: Path) -> Path:
    (hf_folder(folder) / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model.bin")
    return folder


@case("pickle")
def pickle_named_safetensors(folder: Path) -> Path:
    torch.save({"a": torch.zeros(2)}, hf_folder(folder) / "model.safetensors")
    return folder


@case("wrong tokenizer")
def tokenizer_of_a_larger_vocabulary(folder: Path) -> Path:
    return hf_folder(folder, extra_tokens=100)


@case("tokenizer.json")
def tokenizer_is_no_tokenizer(folder: Path) -> Path:
    (hf_folder(folder) / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}}')
    return folder


@case("config.json")
def config_is_no_json(folder: Path) -> Path:
    (hf_folder(folder) / "config.json").write_text("{")
    return folder


def _config_case(name: str, culprit: str, **changes: Any) -> None:
    CASES[name] = Case(lambda folder: hf_folder(folder, **changes), culprit)


_config_case("config_unknown_architecture", "gpt_neox", model_type="gpt_neox")
_config_case("config_text_for_a_number", "hidden_size", hidden_size="16")
_config_case("config_true_for_a_number", "num_attention_heads", num_attention_heads=True)
_config_case("config_list_for_a_text", "model_type", model_type=["llama"])
_config_case("config_without_a_size", "intermediate_size", intermediate_size=None)
_config_case("config_heads_do_not_divide", "key/value heads", num_key_value_heads=3)
_config_case("config_width_does_not_divide", "hidden_size 16", num_attention_heads=3)
_config_case("config_no_heads", "num_attention_heads", num_attention_heads=0)
_config_case("config_negative_size", "hidden", intermediate_size=-24)
_config_case("config_negative_layers", "num_hidden_layers", num_hidden_layers=-2)
_config_case("config_absurd_vocabulary", "vocab", vocab_size=10**12)
_config_case("config_absurd_layers", "num_hidden_layers", num_hidden_layers=10**9)
_config_case("config_odd_heads", "head_dim", head_dim=5)
_config_case("config_infinite_epsilon", "rms_norm_eps", rms_norm_eps=float("inf"))
_config_case("config_number_beyond_floats", "rms_norm_eps", rms_norm_eps=10**400)
_config_case("config_other_width", "shape", hidden_size=32, head_dim=4)
_config_case("config_more_layers", "model.layers.2", num_hidden_layers=3)
_config_case("config_fewer_layers", "unexpected", num_hidden_layers=1)
_config_case("config_untied_without_head", "lm_head.weight", tie_word_embeddings=False)
_config_case("config_rope_of_another_kind", "dynamic", rope_scaling={"type": "dynamic", "factor": 2.0})
_config_case("config_rope_without_original_context", "original_max", rope_scaling={"type": "yarn", "factor": 2.0,
             "original_max_position_embeddings": 0})  # fmt: skip


# ---- single files --------------------------------------------------------------------------------------------------


@case("there is no such file")
def nothing_there(folder: Path) -> Path:
    return folder / "absent.netsuke"


@case("empty")
def empty_folder(folder: Path) -> Path:
    return folder


@case("neither manifest.json nor config.json")
def folder_of_something_else(folder: Path) -> Path:
    (folder / "holiday.jpg").write_bytes(b"\xff\xd8")
    return folder


@case("unknown kind")
def file_of_another_kind(folder: Path) -> Path:
    (folder / "notes.txt").write_text("hello")
    return folder / "notes.txt"


@case("pickle")
def pickle_that_would_run_code(folder: Path) -> Path:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (folder / "ran",))

    (folder / "model.bin").write_bytes(pickle.dumps(Bomb()))
    return folder / "model.bin"


@case("pickle")
def pickle_from_torch(folder: Path) -> Path:
    torch.save({"a": torch.zeros(2)}, folder / "model.pth")
    return folder / "model.pth"


@case("truncated")
def llama2c_truncated(folder: Path) -> Path:
    truncate(llama2c_file(folder), 1000)
    return folder / "tiny.bin"


@case("longer than its header says")
def llama2c_with_spare_bytes(folder: Path) -> Path:
    path = llama2c_file(folder)
    path.write_bytes(path.read_bytes() + b"\0" * 4)
    return path


@case("header")
def llama2c_absurd_header(folder: Path) -> Path:
    (folder / "tiny.bin").write_bytes(struct.pack("<7i", 16, 24, 2_000_000_000, 4, 2, 300, 32) + b"\0" * 4096)
    return folder / "tiny.bin"


@case("only 5 bytes")
def llama2c_of_five_bytes(folder: Path) -> Path:
    (folder / "tiny.bin").write_bytes(b"12345")
    return folder / "tiny.bin"


@case("version 1")
def llama2c_of_version_1(folder: Path) -> Path:
    (folder / "tiny.bin").write_bytes(struct.pack("<2i", 0x616B3432, 1) + b"\0" * 512)
    return folder / "tiny.bin"


@case("blocks.0.k.weight")
def llama2c_nan(folder: Path) -> Path:
    path = llama2c_file(folder)
    raw = bytearray(path.read_bytes())
    at = 28 + 4 * (300 * 16 + 2 * 16 + 2 * 256)  # after the embedding, the norms and q of both layers
    raw[at : at + 4] = struct.pack("<f", float("nan"))
    path.write_bytes(raw)
    return path


@case("tok300.bin")
def llama2c_tokenizer_truncated(folder: Path) -> Path:
    path = llama2c_file(folder)
    (folder / "tok300.bin").write_bytes(struct.pack("<i", 4) + struct.pack("<fi", 0.0, 2_000_000_000) + b"ab")
    return path


@case("wrong tokenizer")
def llama2c_tokenizer_too_large(folder: Path) -> Path:
    path = llama2c_file(folder)
    (folder / "tokenizer.bin").write_bytes(struct.pack("<i", 1) + (struct.pack("<fi", 0.0, 1) + b"a") * 301)
    return path


# ---- artifacts -----------------------------------------------------------------------------------------------------


@case("weights.safetensors")
def artifact_with_a_flipped_bit(folder: Path) -> Path:
    path = artifact(folder)
    flip_bit(path / "weights.safetensors", -10)
    return path


@case("tokenizer.json")
def artifact_with_a_changed_tokenizer(folder: Path) -> Path:
    path = artifact(folder)
    flip_bit(path / "tokenizer.json", 200)
    return path


@case("weights.safetensors")
def artifact_truncated(folder: Path) -> Path:
    path = artifact(folder)
    truncate(path / "weights.safetensors", 7)
    return path


@case("weights.safetensors")
def artifact_without_its_weights(folder: Path) -> Path:
    path = artifact(folder)
    (path / "weights.safetensors").unlink()
    return path


@case("manifest.json")
def artifact_with_half_a_manifest(folder: Path) -> Path:
    path = artifact(folder)
    truncate(path / "manifest.json", 300)
    return path


@case("blocks.0.gate.weight")
def artifact_resealed_with_nan(folder: Path) -> Path:
    path = artifact(folder)
    model = tiny_model()
    model.blocks[0].gate.weight[0, 0] = float("inf")
    write_safetensors(path / "weights.safetensors", model.state_dict(), {"format": "pt"})
    reseal(path)
    return path


@case("wrong tokenizer")
def artifact_of_a_smaller_embedding(folder: Path) -> Path:
    return artifact(folder, tokenizer=tiny_tokenizer(extra=100))


def _manifest_case(name: str, culprit: str, change: Callable[[dict[str, Any]], Any]) -> None:
    def build(folder: Path) -> Path:
        path = artifact(folder)
        edit_json(path / "manifest.json", change)
        return path

    CASES[name] = Case(build, culprit)


def _quant(m: dict[str, Any], bits: int, group: int) -> None:
    m["layers"]["blocks.0.q"] = {"kind": "quant", "bits": bits, "group": group}


def _list(m: dict[str, Any], name: str) -> None:
    m["files"][name] = {"bytes": 1, "sha256": ""}


_manifest_case("manifest_of_another_format", "tarball", lambda m: m.update(format="tarball"))
_manifest_case("manifest_of_a_later_version", "version 2", lambda m: m.update(version=2))
_manifest_case("manifest_version_is_a_text", "version", lambda m: m.update(version="1"))
_manifest_case("manifest_of_another_family", "mamba", lambda m: m.update(family="mamba"))
_manifest_case("manifest_names_a_file_above", "../../secret", lambda m: _list(m, "../../secret"))
_manifest_case("manifest_names_an_absolute_file", "/etc/passwd", lambda m: _list(m, "/etc/passwd"))
_manifest_case("manifest_without_weights", "weights.safetensors", lambda m: m["files"].pop("weights.safetensors"))
_manifest_case("manifest_without_files", "files", lambda m: m.pop("files"))
_manifest_case("manifest_text_for_a_number", "width", lambda m: m["config"].update(width="16"))
_manifest_case("manifest_number_beyond_floats", "norm_eps", lambda m: m["config"].update(norm_eps=10**400))
_manifest_case("manifest_unknown_setting", "colour", lambda m: m["config"].update(colour=1))
_manifest_case("manifest_absurd_vocabulary", "vocab", lambda m: m["config"].update(vocab=10**12))
_manifest_case("manifest_heads_do_not_divide", "heads", lambda m: m["config"].update(kv_heads=3))
_manifest_case("manifest_without_blocks", "layers", lambda m: m["config"].update(blocks=[]))
_manifest_case(
    "manifest_absurd_pairs", "pairs of block 0", lambda m: m["config"]["blocks"][0].update(pairs=[[0], [99]])
)
_manifest_case("manifest_eos_outside", "special token 999", lambda m: m["config"].update(eos=[999]))
_manifest_case("manifest_layer_missing", "blocks.0.q", lambda m: m["layers"].pop("blocks.0.q"))
_manifest_case("manifest_layer_unknown", "blocks.7.q", lambda m: m["layers"].update({"blocks.7.q": {"kind": "dense"}}))
_manifest_case(
    "manifest_layer_of_unknown_kind", "spectral", lambda m: m["layers"].update({"blocks.0.q": {"kind": "spectral"}})
)
_manifest_case("manifest_layer_of_unknown_dtype", "'os'", lambda m: m["layers"]["blocks.0.q"].update(dtype="os"))
_manifest_case(
    "manifest_layer_of_another_dtype", "blocks.0.q", lambda m: m["layers"]["blocks.0.q"].update(dtype="float16")
)
_manifest_case("manifest_layer_not_as_stored", "blocks.0.q", lambda m: _quant(m, 4, 8))
_manifest_case("manifest_layer_of_absurd_bits", "bits", lambda m: _quant(m, 5, 8))
_manifest_case("manifest_layer_of_empty_groups", "group", lambda m: _quant(m, 4, 0))
