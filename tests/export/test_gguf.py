"""What netsuke writes as GGUF, llama.cpp computes alike: weights, rotary order, scalings, biases, norms, tokens."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from netsuke.errors import NetsukeError
from netsuke.export import export
from netsuke.export.gguf import block_quantize, exact_blocks, write
from netsuke.layers.linear import LinearBase
from netsuke.layers.quantized import QuantLinear
from netsuke.models import gguf_file
from netsuke.models.gguf_file import TYPES, pack_blocks, read_gguf, unpack_blocks
from netsuke.models.llama import BlockShape, Llama, LlamaConfig, RopeScaling, random_llama
from netsuke.models.load import Loaded, load
from tests.test_cli import netsuke, refused
from tests.tiny import tiny_llama

SHAPE = {"vocab": 96, "width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "context": 128, "hidden": 96}
IDS = [1, 5, 9, 80, 33, 2, 2, 61, 7, 44, 13, 90, 3, 28, 5, 5, 71, 8, 19, 64]


def loaded(model: Llama, tokenizer=None) -> Loaded:
    return Loaded(model, tokenizer, "tiny", "artifact", None)


def noisy(model: Llama) -> Llama:
    """Norms and biases away from 1 and 0, so that a lost one is seen."""
    rng = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.data = (1.0 if name.endswith("norm.weight") else 0.0) + 0.2 * torch.randn(p.shape, generator=rng)
    return model


def logits(model: Llama, ids=IDS) -> np.ndarray:
    with torch.no_grad():
        return model.float()(torch.tensor([ids]))[0].numpy()


VARIANTS = {
    "llama": {},
    "llama, head not tied": {"tied": False},
    "llama with all biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "llama, wide heads": {"head_dim": 32},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 32},
    "linear scaling": {"rope_scaling": RopeScaling("linear", 4.0)},
    "llama3 scaling": {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 16), "rope_theta": 500000.0},
    "yarn": {"rope_scaling": RopeScaling("yarn", 4.0, original_context=32)},
    "yarn with its own factor": {"rope_scaling": RopeScaling("yarn", 4.0, original_context=32, attention_factor=1.3)},
}


def variant(name: str) -> Llama:
    cfg = LlamaConfig.uniform(layers=2, **SHAPE | VARIANTS[name])
    return noisy(random_llama(cfg, seed=1, std=0.15))


@pytest.mark.parametrize("name", VARIANTS)
def test_llama_cpp_computes_the_same_logits(name, tmp_path):
    from tests.export.llamacpp import opened

    model, path = variant(name), tmp_path / "m.gguf"
    write(loaded(model), path, 16)
    ours = logits(load(path).model)
    with opened(path) as theirs:
        got = theirs.logits(IDS)
    # llama.cpp rounds activations to float16 before F16 products; a wrong rotary order is off by 1, not by 0.01
    assert np.abs(got - ours).max() < 0.01 * np.abs(ours).max()
    assert np.abs(ours - logits(model)).max() < 3e-3 * np.abs(ours).max()


def test_uneven_hidden_widths_are_one_number_per_block(tmp_path):
    from tests.export.llamacpp import opened

    cfg = LlamaConfig(
        blocks=(BlockShape(96, 16), BlockShape(50, 16)), **{k: v for k, v in SHAPE.items() if k != "hidden"}
    )
    model, path = noisy(random_llama(cfg, seed=2, std=0.15)), tmp_path / "m.gguf"
    got = write(loaded(model), path, 8)
    assert got["types"] == {"F16": 1, "Q8_0": 14}  # down of the second block has rows of 50
    back = load(path).model
    assert [b.hidden for b in back.cfg.blocks] == [96, 50]
    with opened(path) as theirs:
        assert np.abs(theirs.logits(IDS) - logits(back)).max() < 0.03 * np.abs(logits(back)).max()


@pytest.fixture(scope="module")
def pycode(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("pycode")
    return {
        bits: Path(export("pycode", "gguf", bits=bits, out=str(folder / f"{bits}.gguf"))["file"]) for bits in (16, 8, 4)
    }


PROMPT = "import os\n\n\ndef read_lines(path):\n    with open(path) as f:\n"


@pytest.mark.parametrize("bits, tolerance", [(16, 0.003), (8, 0.03), (4, 0.05)])
def test_pycode_says_the_same_in_llama_cpp(bits, tolerance, pycode):
    """Logits within the noise of the format: with Q8_0 and Q4_0 llama.cpp rounds the activations to 8 bits as well."""
    from tests.export.llamacpp import opened

    ours = load(pycode[bits])
    ids = ours.tokenizer.encode(PROMPT, bos=True)
    expected = logits(ours.model, ids)
    with opened(pycode[bits]) as theirs:
        got = theirs.logits(ids)
        assert np.abs(got - expected).max() < tolerance * np.abs(expected).max()
        more = theirs.greedy(ids, 32) if bits == 16 else []
    if bits == 16:
        assert got.argmax(1).tolist() == expected.argmax(1).tolist()
        for token in more:
            assert int(logits(ours.model, ids)[-1].argmax()) == token
            ids.append(token)


def test_pycode_keeps_its_weights_and_its_tokenizer(pycode):
    base, back = load("pycode"), load(pycode[16])
    assert back.model.cfg == base.model.cfg
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor.float(), back.model.state_dict()[name].float()), name
    text = "for i in range(1000000):\n        x = f'{i:>8}'\n\n\nclass Ä:\n\tpass  # done\r\n"
    assert back.tokenizer.encode(text, bos=True) == base.tokenizer.encode(text, bos=True)
    assert back.tokenizer.decode(base.tokenizer.encode(text)) == text
    exact = [t for t in read_gguf(pycode[16]).metadata if t == "tokenizer.huggingface.json"]
    assert exact, "its split has no name in llama.cpp, so its own tokenizer goes along"


def test_llama_cpp_splits_one_line_of_code_alike(pycode):
    from tests.export.llamacpp import opened

    tok = load("pycode").tokenizer
    with opened(pycode[16], tokens_only=True) as theirs:
        for line in (
            "def f(x, y=3.14):",
            "return self.items[1:] + [None]",
            "it's 12345 and naïve",
            "raise ValueError('no')",
        ):
            assert theirs.encode(line) == tok.encode(line)
        assert theirs.encode("x", special=True)[0] == tok.bos


def test_scored_pieces_in_llama_cpp(tmp_path):
    from netsuke.models.tokenizer import ScoredTokenizer
    from tests.export.llamacpp import opened

    pieces = [b""] * 3 + [bytes([i]) for i in range(256)] + [b" ", b"a", b"b", b"c", b"ab", b" a", b"abc", b" ab"]
    data = b"".join(struct.pack("<fi", -float(i), len(p)) + p for i, p in enumerate(pieces))
    tok = ScoredTokenizer(bytes(4) + data)
    model = tiny_llama(vocab=tok.vocab + 5, bos=1, eos=(1, 2))
    write(loaded(model, tok), tmp_path / "m.gguf", 16)
    back = load(tmp_path / "m.gguf")
    assert set(back.model.cfg.eos) == {1, 2} and back.model.cfg.bos == 1
    with opened(tmp_path / "m.gguf", tokens_only=True) as theirs:
        for text in ("abc", "ab cab", "a  b\n", "cabé"):
            ids = tok.encode(text, bos=True)
            assert back.tokenizer.encode(text, bos=True) == ids == theirs.encode(text, special=True)
            assert back.tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_blocks_are_those_of_the_reference(name):
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    w = torch.randn(8, 96, generator=torch.Generator().manual_seed(3))
    w[0, :32], w[1, 5], w[2, :32] = 0, 40.0, 0.5
    kind = gguf.GGMLQuantizationType[name]
    codes, scales = block_quantize(w, name)
    packed = pack_blocks(codes, scales, name)
    assert np.array_equal(packed.numpy(), gguf.quants.quantize(w.numpy(), kind))
    zero, bits = (8, 4) if name == "Q4_0" else (128, 8)
    back = QuantLinear.from_codes(codes, scales, torch.full_like(scales, zero), bits, 32)
    assert np.array_equal(back.to_dense().numpy(), gguf.quants.dequantize(packed.numpy(), kind))


def quantized(bits: int, group: int, zero: int | None, seed: int = 4) -> QuantLinear:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (6, 128), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (6, 128 // group), generator=rng, dtype=torch.uint8)
    zeros = zeros if zero is None else torch.full_like(zeros, zero)
    return QuantLinear.from_codes(codes, torch.rand(6, 128 // group, generator=rng), zeros, bits, group)


@pytest.mark.parametrize(
    "layer, bits, kind",
    [
        (quantized(4, 32, 8), 4, "Q4_0"), (quantized(4, 32, 8), 16, "Q4_0"), (quantized(8, 32, 128), 8, "Q8_0"),
        (quantized(3, 64, 4), 4, "Q4_0"), (quantized(4, 64, None), 8, "Q8_0"), (quantized(4, 64, None), 4, None),
        (quantized(8, 32, 127), 8, None), (quantized(8, 32, 128), 4, None), (quantized(4, 16, 8), 8, None),
    ],
)  # fmt: skip
def test_codes_are_kept_where_they_fit(layer: LinearBase, bits: int, kind: str | None):
    got = exact_blocks(layer, bits)
    assert (got and got[0]) == kind
    if got:
        raw = pack_blocks(got[1], got[2], kind)
        zero = 8 if kind == "Q4_0" else 128
        codes, scales = unpack_blocks(raw.flatten(), TYPES[gguf_file.IDS[kind]], 6)
        back = QuantLinear.from_codes(codes, scales, torch.full_like(scales, zero), 4 if zero == 8 else 8, 32)
        assert torch.equal(back.to_dense(), layer.to_dense())


def test_what_llama_cpp_cannot_express_is_refused_by_name(tmp_path):
    shape = {k: v for k, v in SHAPE.items() if k != "hidden"}
    narrow = BlockShape(96, 8)
    cut = BlockShape(96, 16, ((0, 1, 2), (1, 2, 5)))
    plain = BlockShape(96, 16)
    for blocks, more, culprit in (
        ((plain, cut), {}, "block 1 has 3 of 8 rotary pairs"),
        ((narrow, plain), {}, "block 0 has value heads of 8"),
        ((plain, BlockShape(64, 16)), {"qk_norm": True}, "block 1 is 64 hidden units wide"),
        ((plain,), {"rope_scaling": RopeScaling("yarn", 4.0, beta_slow=2.0)}, "beta_slow 2"),
        ((plain,), {"qk_norm": True, "mlp_bias": True}, "norms and the linear maps have biases"),
    ):
        model = random_llama(LlamaConfig(blocks=blocks, **shape, **more), seed=0)
        with pytest.raises(NetsukeError, match=culprit):
            write(loaded(model), tmp_path / "m.gguf", 16)
    model = tiny_llama()
    model.blocks[1].up.weight.data[3, 3] = 1e6
    with pytest.raises(NetsukeError, match=r"blocks\.1\.up"):
        write(loaded(model), tmp_path / "m.gguf", 16)
    model.blocks[1].up.weight.data[3, 3] = float("nan")
    with pytest.raises(NetsukeError, match=r"blocks\.1\.up"):
        write(loaded(model), tmp_path / "m.gguf", 16)
    assert not list(tmp_path.iterdir()), "nothing is half-written"


def test_a_sliding_window_shortens_the_context(tmp_path):
    got = write(loaded(tiny_llama(window=16)), tmp_path / "m.gguf", 16)
    assert load(tmp_path / "m.gguf").model.cfg.context == 16
    assert any("16 instead of 64" in note for note in got["notes"])


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = netsuke(monkeypatch, capsys, "export", "pycode", "--home", "gguf", "--bits", "4", "--json")
    got = json.loads(out)
    assert code == 0 and got["file"] == "pycode.gguf" and got["bytes"] == (tmp_path / "pycode.gguf").stat().st_size
    assert got["types"] == {"Q4_0": 43}
    first = (tmp_path / "pycode.gguf").read_bytes()
    assert netsuke(monkeypatch, capsys, "export", "pycode", "--home", "gguf", "--bits", "4", "--json")[0] == 0
    assert (tmp_path / "pycode.gguf").read_bytes() == first, "the same model gives the same bytes"
    assert netsuke(monkeypatch, capsys, "run", "pycode.gguf", "--prompt", "def f", "--tokens", "3")[0] == 0


@pytest.mark.parametrize(
    "args, culprit",
    [
        (["pycode", "--home", "abacus"], "abacus"), (["pycode", "--home", "gguf", "--bits", "5"], "--bits is 5"),
        (["nothing-here", "--home", "gguf"], "no such file"), (["pycode"], "--home"),
        (["pycode", "--home", "gguf", "-o", "no/such/folder/x.gguf"], "no/such/folder"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(args, culprit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(netsuke(monkeypatch, capsys, "export", *args), culprit)
    assert not list(tmp_path.iterdir())
