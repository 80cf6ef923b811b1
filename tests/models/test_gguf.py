"""GGUF files in: round trips bit for bit, real vocabularies with their test vectors, and hostile files by the dozen."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from netsuke.errors import NetsukeError
from netsuke.export.gguf import write
from netsuke.layers.quantized import QuantLinear
from netsuke.models.gguf_file import IDS, TYPES, Pending, read_gguf, write_gguf
from netsuke.models.gguf_tokenizer import HF_KEY, QWEN2, from_metadata, to_metadata
from netsuke.models.llama import Llama, LlamaConfig, RopeScaling, random_llama
from netsuke.models.load import Loaded, describe, find, load
from netsuke.models.tokenizer import HFTokenizer
from tests.models.hostile import tiny_tokenizer
from tests.tiny import same_state

SHAPE = {"vocab": 300, "width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "context": 64, "hidden": 96}
FAMILIES = {
    "llama": {"rope_scaling": RopeScaling("llama3", 8.0)}, "qwen2": {"qkv_bias": True, "tied": False},
    "qwen3": {"qk_norm": True, "head_dim": 32, "norm_eps": 1e-6, "rope_theta": 1e6},
}  # fmt: skip
BITS = {16: None, 8: 128, 4: 8}  # bits -> zero point


def tiny(family: str = "llama", bits: int = 16) -> Llama:
    """A random model; below 16 bits all its maps hold random codes of that many bits in groups of 32."""
    rng = torch.Generator().manual_seed(5)
    cfg = LlamaConfig.uniform(layers=2, **SHAPE | FAMILIES[family], bos=0, eos=(0,))
    model = random_llama(cfg, seed=1, std=0.15)
    for p in model.parameters():  # weights that float16 holds, so that nothing but a mistake changes the logits
        p.data = 1 + 0.2 * torch.randn(p.shape, generator=rng) if p.ndim == 1 else p.data.half().float()
    for name, layer in model.linears().items() if bits < 16 else ():
        codes = torch.randint(0, 1 << bits, (layer.outs, layer.ins), generator=rng, dtype=torch.uint8)
        scales = 0.3 / (1 << bits) * torch.rand(layer.outs, layer.ins // 32, generator=rng)
        zeros = torch.full(scales.shape, BITS[bits])
        model.replace(name, QuantLinear.from_codes(codes, scales, zeros, bits, 32, layer.bias))
    return model


def gguf(path: Path, family: str = "llama", bits: int = 16) -> Llama:
    model = tiny(family, bits)
    write(Loaded(model, tiny_tokenizer(), "tiny", "artifact", None), path, bits)
    return model


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, bits, tmp_path):
    path = tmp_path / "m.gguf"
    model = gguf(path, family, bits)
    got, told = load(path), describe(path)
    assert got.kind == told.kind == "gguf"
    assert got.model.cfg == model.cfg == told.config
    assert told.layers == {name: layer.spec() for name, layer in got.model.linears().items()}
    assert told.bytes_on_disk == path.stat().st_size
    if bits < 16:
        assert same_state(model, got.model), "codes, scales, zero points, norms and biases bit for bit"
    ids = torch.arange(24)[None] * 7 % 300
    assert (model(ids) - got.model(ids)).abs().max() < 1e-3
    text = "Grüße, 12345 times\n"
    assert got.tokenizer.encode(text, bos=True) == tiny_tokenizer().encode(text, bos=True)


def test_a_file_of_another_name_is_known_by_its_content(tmp_path):
    gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").rename(tmp_path / "m.bin")
    assert find(tmp_path / "m.bin")[1] == "gguf"


def test_bfloat16_float32_and_a_dtype(tmp_path):
    path, model = tmp_path / "m.gguf", tiny()
    write(Loaded(model, None, "tiny", "artifact", None), path, 16)
    header = read_gguf(path)

    def stored(name: str, kind: str, dtype: torch.dtype) -> Pending:
        return Pending(name, TYPES[IDS[kind]], header.tensors[name].shape, lambda: header.floats(name).to(dtype))

    kinds = [("BF16", torch.bfloat16), ("F32", torch.float32)]
    again = [stored(n, *kinds[i % 2 if len(header.tensors[n].shape) == 2 else 1]) for i, n in enumerate(header.tensors)]
    write_gguf(tmp_path / "n.gguf", header.metadata, again)
    got = load(tmp_path / "n.gguf").model
    assert {layer.weight.dtype for layer in got.linears().values()} == {torch.bfloat16, torch.float32}
    for name, tensor in load(path).model.state_dict().items():
        assert torch.allclose(got.state_dict()[name].float(), tensor.float(), rtol=2**-8)
    assert {p.dtype for p in load(path, dtype="float32").model.parameters()} == {torch.float32}
    assert load(tmp_path / "n.gguf").tokenizer is None


def vectors(name: str) -> tuple[dict[str, Any], Path, list[str], list[list[int]]]:
    folder = Path(os.environ.get("NETSUKE_DATA", "")) / "gguf-vocab"
    path = folder / f"ggml-vocab-{name}.gguf"
    if not os.environ.get("NETSUKE_DATA") or not path.is_file():
        pytest.skip("gguf-vocab is not below NETSUKE_DATA")
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    ids = [[int(i) for i in line.split()] for line in Path(f"{path}.out").read_text().split("\n")]
    return read_gguf(path).metadata, path, texts, ids[: len(texts)]


@pytest.mark.parametrize("name", ["gpt-2", "phi-3"])
def test_real_vocabularies_give_the_published_ids(name):
    meta, path, texts, expected = vectors(name)
    tok = from_metadata(meta, 1 if name == "phi-3" else None, (), path)
    # scored pieces begin a text with a space only when it opens a sequence, which the vectors' ids leave out
    got = [tok.encode(t, bos=True)[1:] if name == "phi-3" else tok.encode(t) for t in texts]
    wrong = [t for t, a, b in zip(texts, got, expected) if a != b]
    assert len(texts) == 46 and not wrong
    assert [tok.decode(ids) for ids in got if name == "gpt-2"] == [t for t in texts if name == "gpt-2"]


QWEN_STEPS = [
    {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
]


@pytest.mark.parametrize(
    "changes, pre, own, notes",
    [
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}}, "gpt-2", False, 0),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": QWEN_STEPS}}, "qwen2", False, 0),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": QWEN_STEPS}, "normalizer": {"type": "NFC"}}, "qwen2", True, 1),
        ({}, "dbrx", True, 1),
    ],
)  # fmt: skip
def test_the_name_of_a_split(changes, pre, own, notes):
    raw = json.loads(tiny_tokenizer().to_bytes()) | changes
    for step in [raw["pre_tokenizer"], *raw["pre_tokenizer"].get("pretokenizers", [])]:
        step |= {"trim_offsets": True} if step["type"] == "ByteLevel" else {}
    tok = HFTokenizer(json.dumps(raw).encode())
    meta, told = to_metadata(tok, 300, None, (), "export")
    assert (meta["tokenizer.ggml.pre"], HF_KEY in meta, len(told)) == (pre, own, notes)
    back = from_metadata(meta, None, (), Path("m.gguf"))
    for text in ("it's 1234  x\n\n y", "e\u0301", "\t\r\n"):
        assert back.encode(text) == tok.encode(text)


def test_a_tokenizer_of_another_kind_is_not_exported():
    raw = json.loads(tiny_tokenizer().to_bytes())
    raw["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    with pytest.raises(NetsukeError, match="not byte-level BPE"):
        to_metadata(HFTokenizer(json.dumps(raw).encode()), 300, None, (), "export")


# ---- hostile files ---------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any], list[Pending]], None]


def rebuilt(path: Path, change: Change) -> None:
    """Reads a good file, changes its metadata or tensors, and writes it again."""
    header = read_gguf(path)
    raws = {name: header.raw(name) for name in header.tensors}
    tensors = [Pending(n, t.kind, t.shape, partial(raws.get, n)) for n, t in header.tensors.items()]
    meta = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in header.metadata.items()}
    change(meta, tensors)
    write_gguf(path, meta, tensors)


def key(name: str, value: Any, drop: str = "") -> Change:
    def change(meta: dict[str, Any], _: list[Pending]) -> None:
        meta.pop(drop, None)
        meta[name] = value

    return change


def without(name: str) -> Change:
    return lambda meta, _: meta.pop(name)


def tensor(at: int, **fields: Any) -> Change:
    def change(_: dict[str, Any], tensors: list[Pending]) -> None:
        tensors[at] = tensors[at]._replace(**fields)

    return change


def nan(_: dict[str, Any], tensors: list[Pending]) -> None:
    bad = torch.full((64,), float("nan"))
    at = next(i for i, t in enumerate(tensors) if t.name == "output_norm.weight")
    tensors[at] = tensors[at]._replace(data=lambda: bad)


def norm_in_blocks(_: dict[str, Any], tensors: list[Pending]) -> None:
    at = next(i for i, t in enumerate(tensors) if t.name == "output_norm.weight")
    tensors[at] = tensors[at]._replace(kind=TYPES[IDS["Q8_0"]], data=lambda: torch.zeros(68, dtype=torch.uint8))


REBUILT: dict[str, tuple[Change, str]] = {
    "another architecture": (key("general.architecture", "mamba"), "mamba"),
    "no architecture": (without("general.architecture"), "general.architecture"),
    "experts": (key("llama.expert_count", 8), "llama.expert_count is 8"),
    "a million blocks": (key("llama.block_count", 1_000_000), "block_count is 1000000"),
    "more blocks than tensors": (key("llama.block_count", 3), "block_count is 3"),
    "no heads": (key("llama.attention.head_count", 0), "head_count is 0"),
    "heads as a text": (key("llama.attention.head_count", "4"), "head_count"),
    "uneven heads": (key("llama.attention.head_count_kv", [2, 1]), "the same for all layers"),
    "hidden widths for three blocks": (key("llama.feed_forward_length", [96, 96, 96]), "3 entries for 2"),
    "no epsilon": (without("llama.attention.layer_norm_rms_epsilon"), "rms_epsilon is missing"),
    "a theta of infinity": (key("llama.rope.freq_base", float("inf")), "freq_base"),
    "half of the head turns": (key("llama.rope.dimension_count", 8), "rope.dimension_count"),
    "a width of another model": (key("llama.embedding_length", 32), "shape"),
    "an unknown rope scaling": (key("llama.rope.scaling.type", "longrope"), "longrope"),
    "rope factors of another rule": (key("llama.rope.scaling.original_context_length", 77), "rope_freqs.weight"),
    "a bos outside": (key("tokenizer.ggml.bos_token_id", 5000), "bos_token_id is '5000'"),
    "an unknown tokenizer": (key("tokenizer.ggml.model", "bert"), "bert"),
    "an unknown split": (key("tokenizer.ggml.pre", "klingon", drop=HF_KEY), "klingon"),
    "a merge of no tokens": (key("tokenizer.ggml.merges", ["qq zz"], drop=HF_KEY), "qq zz"),
    "too few token types": (key("tokenizer.ggml.token_type", [1, 1]), "2 entries for 300"),
    "a token twice": (lambda m, _: m["tokenizer.ggml.tokens"].__setitem__(5, m["tokenizer.ggml.tokens"][6]), "stands twice"),
    "a tensor too many": (lambda _, t: t.append(t[-2]._replace(name="blk.0.ffn_gate_inp.weight")), "ffn_gate_inp"),
    "a tensor missing": (lambda _, t: t.remove(next(x for x in t if x.name == "blk.1.ffn_up.weight")), "blk.1.ffn_up.weight"),
    "a tensor under an endless name": (tensor(3, name="x" * 200), "200 bytes"),
    "a tensor without a dimension": (tensor(3, shape=()), "0 dimensions"),
    "a norm in blocks": (norm_in_blocks, "output_norm.weight"),
    "NaN": (nan, "norm.weight"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    gguf(path, bits=8)
    return path.read_bytes()


def one_sentence(path: Path, culprit: str, describes: bool = True) -> None:
    for ask in (load, describe) if describes else (load,):
        with pytest.raises(NetsukeError) as e:
            ask(path)
        text = str(e.value)
        assert culprit in text and text.startswith("cannot ") and "\n" not in text and len(text) < 900, text


@pytest.mark.parametrize("name", REBUILT)
def test_a_wrong_content_is_refused_by_name(name, good, tmp_path):
    change, culprit = REBUILT[name]
    (path := tmp_path / "m.gguf").write_bytes(good)
    rebuilt(path, change)
    one_sentence(path, culprit, describes=name != "NaN")


def patched(find: bytes, at: int, value: bytes) -> Callable[[bytes], bytes]:
    """Overwrites bytes `at` places after the end of the first `find`."""

    def change(data: bytes) -> bytes:
        start = data.index(find) + len(find) + at
        return data[:start] + value + data[start + len(value) :]

    return change


UP = b"blk.0.ffn_up.weight"  # then: dimension count u32, two dimensions u64, type u32, offset u64
HUGE = struct.pack("<Q", 1 << 60)
PATCHED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "magic": (lambda d: b"GGML" + d[4:], "does not begin with GGUF"),
    "version 1": (lambda d: d[:4] + b"\1\0\0\0" + d[8:], "version 1"),
    "big-endian": (lambda d: d[:4] + b"\0\0\0\3" + d[8:], "big-endian"),
    "tensors without end": (lambda d: d[:8] + HUGE + d[16:], f"{1 << 60} tensors"),
    "keys without end": (lambda d: d[:16] + HUGE + d[24:], f"{1 << 60} keys"),
    "more keys than there are": (lambda d: d[:16] + struct.pack("<Q", 5000) + d[24:], "m.gguf"),
    "a text without end": (patched(b"general.name", 4, HUGE), "general.name"),
    "an array without end": (patched(b"tokenizer.ggml.token_type", 8, HUGE), "token_type"),
    "texts without end": (patched(b"tokenizer.ggml.tokens", 8, HUGE), "texts"),
    "an array of arrays": (patched(b"tokenizer.ggml.token_type", 4, b"\x09\0\0\0"), "array of type 9"),
    "a value of no type": (patched(b"general.name", 0, b"\x63\0\0\0"), "unknown type 99"),
    "no UTF-8": (patched(b"general.name", 12, b"\xff\xfe"), "no UTF-8"),
    "five dimensions": (patched(UP, 0, b"\5\0\0\0"), "5 dimensions"),
    "a dimension of 0": (patched(UP, 4, bytes(8)), "no dimension of 0"),
    "rows of half a block": (patched(UP, 4, struct.pack("<Q", 48)), "multiples of 32"),
    "a tensor of exabytes": (patched(UP, 12, HUGE), "blk.0.ffn_up.weight"),
    "Q6_K": (patched(UP, 20, b"\x0e\0\0\0"), "stored as Q6_K; allowed: F32, F16, Q4_0, Q8_0, BF16"),
    "type 200": (patched(UP, 20, b"\xc8\0\0\0"), "unknown type 200"),
    "two tensors in one place": (patched(UP, 24, bytes(8)), "overlaps"),
    "an offset between the lines": (patched(UP, 24, struct.pack("<Q", 7)), "multiples of 32"),
    "an offset of exabytes": (patched(UP, 24, HUGE), "leaves a gap"),
    "spare bytes": (lambda d: d + bytes(64), "belong to no tensor"),
    "a name twice": (patched(b"blk.0.ffn_up.weigh", -len("0.ffn_up.weigh"), b"1"), "stands twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", PATCHED)
def test_a_broken_container_is_refused(name, good, tmp_path):
    change, culprit = PATCHED[name]
    (path := tmp_path / "m.gguf").write_bytes(change(good))
    one_sentence(path, culprit)


def test_every_cut_and_every_flipped_bit_ends_in_a_sentence(good, tmp_path):
    """No length but the full one loads; a flipped bit of the header is refused or does not matter."""
    path = tmp_path / "m.gguf"
    for keep in [*range(0, 40), *range(40, len(good) - 40, 4001)]:
        path.write_bytes(good[:keep])
        with pytest.raises(NetsukeError):
            describe(path)
    header = good.index(b"blk.1.ffn_down.weight")
    for at in range(0, header, 97):
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        try:
            describe(path)
        except NetsukeError as e:
            assert "\n" not in str(e)


def test_the_file_unspoiled_loads(good, tmp_path):
    """Control: rebuilding and describing a good file changes nothing."""
    (path := tmp_path / "m.gguf").write_bytes(good)
    rebuilt(path, lambda *_: None)
    assert path.read_bytes() == good
    assert load(path).model.cfg == tiny().cfg
