"""Hugging Face folders: our logits against transformers' on tiny random models of every family and setting."""

from __future__ import annotations

import json

import pytest
import torch

from netsuke.errors import NetsukeError
from netsuke.models.hf import read_config
from netsuke.models.llama import KVCache
from netsuke.models.load import describe, load

transformers = pytest.importorskip("transformers")

BASE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama no groups": ("Llama", {"num_key_value_heads": 4}),
    "llama one key head": ("Llama", {"num_key_value_heads": 1}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("Llama", {"head_dim": 20}),
    "llama theta and eps": (
        "Llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "rms_norm_eps": 1e-2},
    ),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("Llama", {"rope_parameters": YARN, "head_dim": 16}),
    "llama yarn factor": ("Llama", {"rope_parameters": YARN | {"attention_factor": 0.7, "beta_fast": 8.0}}),
    "llama yarn mscale": ("Llama", {"rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.3}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 7}),
    "mistral tied yarn": ("Mistral", {"sliding_window": 9, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2": ("Qwen2", {}),
    "qwen2 window unused": ("Qwen2", {"sliding_window": 5, "use_sliding_window": False}),
    "qwen2 window": ("Qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}),
    "qwen2 tied linear": (
        "Qwen2",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 biases tied": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3 yarn window": (
        "Qwen3",
        {
            "head_dim": 8,
            "rope_parameters": YARN,
            "sliding_window": 6,
            "use_sliding_window": True,
            "max_window_layers": 0,
        },
    ),
}


def reference(family: str, changes: dict, seed: int = 0):
    """A random transformers model, biases and norms made uneven so that ignoring one shows."""
    config = getattr(transformers, f"{family}Config")(**(BASE | changes), attn_implementation="eager")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.2)
    return model


IDS = torch.randint(0, 96, (2, 50), generator=torch.Generator().manual_seed(1))  # longer than every window and context


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_transformers_and_cached_decoding_equals_the_full_pass(case, tmp_path):
    model = reference(*CASES[case])
    model.save_pretrained(tmp_path)
    wanted = model(IDS).logits
    ours = load(tmp_path)
    full = ours.model(IDS)
    assert ours.kind == "hf"
    assert (full - wanted).abs().max() < 1e-4
    assert not any(p.requires_grad for p in ours.model.parameters())
    for chunks in ([1] * 50, [20, 1, 9, 1, 1, 18]):
        cache, parts, at = KVCache(ours.model.cfg, 2, 50), [], 0
        for n in chunks:
            parts.append(ours.model(IDS[:, at : at + n], cache))
            at += n
        assert (torch.cat(parts, 1) - full).abs().max() < 1e-4


@torch.no_grad()
def test_the_settings_that_matter_do_matter(tmp_path):
    """Control: with the window or the rope scaling left out of the config, the logits are far from transformers'."""
    for case in ("mistral window", "llama llama3", "llama yarn", "llama linear"):
        model = reference(*CASES[case])
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["sliding_window"] = None
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert (load(tmp_path).model(IDS) - model(IDS).logits).abs().max() > 1e-2, case


@torch.no_grad()
def test_shards_and_stored_dtypes(tmp_path):
    model = reference("Llama", {"num_hidden_layers": 3}).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = load(tmp_path)
    assert {t.dtype for t in ours.model.state_dict().values()} == {torch.bfloat16}
    wanted = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(IDS).logits
    assert (ours.model(IDS) - wanted).abs().max() < 1e-4  # stored in halves, computed in float32
    wide = load(tmp_path, dtype="float32")
    assert {t.dtype for t in wide.model.state_dict().values()} == {torch.float32}
    assert (wide.model(IDS) - wanted).abs().max() < 1e-4
    described = describe(tmp_path)
    assert described.layers == {n: {"kind": "dense", "dtype": "bfloat16"} for n in ours.model.linears()}
    assert described.config == ours.model.cfg
    shards = sum(p.stat().st_size for p in tmp_path.glob("model*"))
    assert described.bytes_on_disk == shards + (tmp_path / "config.json").stat().st_size


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama llama3", "llama yarn", "llama linear", "llama theta and eps"])
def test_rope_settings_as_transformers_4_wrote_them(case, tmp_path):
    model = reference(*CASES[case])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if config["rope_scaling"] and case == "llama linear":
        config["rope_scaling"]["type"] = rope.pop("rope_type")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (load(tmp_path).model(IDS) - model(IDS).logits).abs().max() < 1e-4


def test_old_frequency_tensors_and_the_tied_head_are_ignored(tmp_path):
    from safetensors.torch import load_file, save_file

    model = reference("Llama", {"tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert (load(tmp_path).model(IDS) - model(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"model_type": "gpt_neox"}, "gpt_neox"),
        ({"model_type": None}, "model_type"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "sliding"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "frequency factors"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes, culprit, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"model_type": "llama"} | changes))
    with pytest.raises(NetsukeError, match=culprit):
        read_config(tmp_path)


def test_special_tokens(tmp_path):
    config = BASE | {"model_type": "llama", "eos_token_id": [2, 5, 4096], "bos_token_id": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (read_config(tmp_path).bos, read_config(tmp_path).eos) == (3, (2, 5))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
    assert read_config(tmp_path).bos is None
