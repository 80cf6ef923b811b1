"""The sides of `netsuke bench lm`: one small interface over the engine, llama.cpp, PyTorch and transformers.

Each side is driven the way that costs it least and changes nothing: the engine through `Engine.forward`, its Python part
included; llama.cpp through `llama_decode`, with a batch whose unchanging fields are filled once and whose logits are
computed for the last token of a sequence only, all other settings as it defaults; PyTorch as `runtime/generate.py` calls
it; transformers with a DynamicCache and the head for the last token only. Logits are copied by `logits()`, outside
`feed`, except that the engine's copy of its last row is part of its time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from netsuke.bench.shapes import Subject
from netsuke.errors import NetsukeError
from netsuke.models.hf import theirs
from netsuke.models.llama import KVCache
from netsuke.models.load import load
from netsuke.runtime.engine import Engine
from netsuke.runtime.generate import PREFILL_CHUNK

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
LARGEST_REFERENCE = 200_000_000  # parameters: above, a row of the reference takes minutes and tells nothing new
OURS = "netsuke"


class Side(Protocol):
    """Sequences of equal length that grow side by side.

    feed    appends the same number of tokens to every sequence and computes the logits of the last
    cut     shortens every sequence to `length`
    logits  float32 (sequences, vocab) of the last feed
    """

    def feed(self, tokens: Sequence[Sequence[int]]) -> None: ...
    def cut(self, length: int) -> None: ...
    def logits(self) -> np.ndarray: ...
    def close(self) -> None: ...


class EngineSide:
    """netsuke's engine on an artifact."""

    def __init__(self, folder: Path, context: int, sequences: int, threads: int):
        self.engine = Engine.open(folder, context=context, slots=sequences, threads=threads)
        self.sequences, self.rows = sequences, max(1, self.engine.chunk // sequences)

    def feed(self, tokens: Sequence[Sequence[int]]) -> None:
        count = len(tokens[0])
        for at in range(0, count, self.rows):
            part = [row[at : at + self.rows] for row in tokens]
            slots = [slot for slot, row in enumerate(part) for _ in row]
            flat = [token for row in part for token in row]
            if at + self.rows >= count:
                self.last = self.engine.forward(flat, slots)
            else:
                self.engine.forward(flat, slots, [False] * len(flat))

    def cut(self, length: int) -> None:
        for slot in range(self.sequences):
            self.engine.truncate(slot, length)

    def logits(self) -> np.ndarray:
        return self.last

    def close(self) -> None:
        self.engine.close()


class LlamaCppSide:
    """llama.cpp on a GGUF file: weights mapped (and repacked) as it defaults, context and threads as asked."""

    def __init__(self, file: Path, context: int, sequences: int, threads: int):
        self.cpp = cpp = llama_cpp_quietly()
        model = cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self.model = cpp.llama_model_load_from_file(str(file).encode(), model)
        if not self.model:
            raise NetsukeError(f"open {file} with llama.cpp", "it refuses the file", "a file of `netsuke export`")
        settings = cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = context * sequences, sequences
        settings.n_threads = settings.n_threads_batch = threads
        self.context = cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise NetsukeError(f"open {file} with llama.cpp", "it makes no context", f"less than {context} tokens")
        self.memory = cpp.llama_get_memory(self.context)
        self.vocab = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(self.model))
        self.sequences, self.length, self.shape = sequences, 0, 0
        self.most = settings.n_batch
        self.batch = cpp.llama_batch_init(self.most, 0, 1)

    def _shaped(self, count: int) -> None:
        """Fills what stays the same from call to call: whose token each row is, and which rows want logits."""
        batch, self.shape = self.batch, count
        batch.n_tokens = count * self.sequences
        for i in range(batch.n_tokens):
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = i // count
            batch.logits[i] = i % count == count - 1

    def feed(self, tokens: Sequence[Sequence[int]]) -> None:
        count, batch = len(tokens[0]), self.batch
        if count * self.sequences > self.most:
            raise NetsukeError(
                "feed llama.cpp", f"{count * self.sequences} tokens at once", f"its own batch of {self.most}"
            )
        if count != self.shape:
            self._shaped(count)
        for s, row in enumerate(tokens):
            for i, token in enumerate(row):
                batch.token[s * count + i], batch.pos[s * count + i] = token, self.length + i
        if code := self.cpp.llama_decode(self.context, batch):
            raise NetsukeError("feed llama.cpp", f"llama_decode returned {code}", "0")
        self.cpp.llama_synchronize(self.context)
        self.length += count

    def cut(self, length: int) -> None:
        if length:
            for s in range(self.sequences):
                self.cpp.llama_memory_seq_rm(self.memory, s, length, -1)
        else:
            self.cpp.llama_memory_clear(self.memory, False)
        self.length = length

    def logits(self) -> np.ndarray:
        rows = [(s + 1) * self.shape - 1 for s in range(self.sequences)]
        take = self.cpp.llama_get_logits_ith
        return np.stack([np.ctypeslib.as_array(take(self.context, i), (self.vocab,)).copy() for i in rows])

    def close(self) -> None:
        self.cpp.llama_batch_free(self.batch)
        self.cpp.llama_free(self.context)
        self.cpp.llama_model_free(self.model)


class TorchSide:
    """netsuke's reference runtime on the same artifact: weights stay as stored and are widened when used."""

    def __init__(self, folder: Path, context: int, sequences: int, threads: int):
        torch.set_num_threads(threads)
        self.model = load(folder).model
        self.cache = KVCache(self.model.cfg, sequences, context)

    @torch.inference_mode()
    def feed(self, tokens: Sequence[Sequence[int]]) -> None:
        for part in torch.tensor(tokens).split(PREFILL_CHUNK, 1):
            self.last = self.model(part, self.cache, last_only=True)

    def cut(self, length: int) -> None:
        self.cache.length = length

    def logits(self) -> np.ndarray:
        return self.last[:, -1].numpy()

    def close(self) -> None:
        del self.model, self.cache


class TransformersSide:
    """LlamaForCausalLM with the artifact's weights in bfloat16 or float32."""

    def __init__(self, folder: Path, threads: int, dtype: torch.dtype):
        import transformers

        torch.set_num_threads(threads)
        ours = load(folder).model
        self.model = transformers.LlamaForCausalLM(_hf_config(transformers, ours.cfg))
        state = {theirs(name): tensor.float() for name, tensor in ours.state_dict().items()}
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise NetsukeError("give transformers the weights", f"{unexpected or missing} do not match", "equal names")
        self.model.tie_weights()
        self.model = self.model.to(dtype).eval()
        self.fresh_cache = transformers.DynamicCache
        self.cut(0)

    @torch.inference_mode()
    def feed(self, tokens: Sequence[Sequence[int]]) -> None:
        out = self.model(torch.tensor(tokens), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.last = out.logits

    def cut(self, length: int) -> None:
        if not length:
            self.cache = self.fresh_cache()
        elif surplus := self.cache.get_seq_length() - length:
            self.cache.crop(-surplus)

    def logits(self) -> np.ndarray:
        return self.last[:, -1].float().numpy()

    def close(self) -> None:
        del self.model, self.cache


def _hf_config(transformers: Any, cfg: Any) -> Any:
    return transformers.LlamaConfig(
        vocab_size=cfg.vocab, hidden_size=cfg.width, intermediate_size=cfg.blocks[0].hidden,
        num_hidden_layers=len(cfg.blocks), num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads,
        head_dim=cfg.head_dim, max_position_embeddings=cfg.context, rms_norm_eps=cfg.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}, tie_word_embeddings=cfg.tied,
    )  # fmt: skip


def llama_cpp_quietly() -> Any:
    """The package, its log switched off."""
    import llama_cpp

    global _quiet
    _quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept: ctypes does not
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    return llama_cpp


def plain_llama(subject: Subject) -> bool:
    """Whether transformers' LlamaForCausalLM is this model."""
    cfg = subject.config
    bare = not (cfg.qk_norm or cfg.qkv_bias or cfg.out_bias or cfg.mlp_bias or cfg.window or cfg.rope_scaling)
    return (
        bare and len(set(cfg.blocks)) == 1 and cfg.blocks[0].pairs is None and cfg.blocks[0].value_dim == cfg.head_dim
    )


PEERS = ("llama.cpp", "torch", "transformers")
PACKAGES = {"llama.cpp": "llama_cpp", "transformers": "transformers"}
INSTALL = {"llama.cpp": "pip install llama-cpp-python", "transformers": "pip install 'netsuke[hf]'"}


def absent(peer: str) -> str | None:
    """Why a peer cannot take part on this machine, or None."""
    if peer in PACKAGES and find_spec(PACKAGES[peer]) is None:
        return f"{peer} is skipped: it is not installed ({INSTALL[peer]})"
    return None


def takes(subject: Subject, peer: str) -> str | None:
    """Why a peer cannot run a model, or None."""
    if peer == "llama.cpp":
        return None if subject.gguf else f"llama.cpp is skipped for {subject}: {subject.no_gguf}"
    if subject.parameters > LARGEST_REFERENCE:
        return f"{peer} is skipped for {subject}: above {LARGEST_REFERENCE // 10**6} M weights a row takes minutes"
    if peer == "transformers" and (subject.bits != 16 or not plain_llama(subject)):
        why = "it is compared at 16 bits" if subject.bits != 16 else "the model is no plain Llama"
        return f"transformers is skipped for {subject}: {why}"
    return None


def names_of(peer: str) -> tuple[str, ...]:
    """The sides that a peer stands for."""
    return ("transformers bf16", "transformers f32") if peer == "transformers" else (peer,)


def open_side(
    name: str, folder: str | Path, file: str | Path | None, context: int, sequences: int, threads: int
) -> Side:
    """A side by name: the artifact in `folder`, for llama.cpp the GGUF file."""
    folder = Path(folder)
    if name == OURS:
        return EngineSide(folder, context, sequences, threads)
    if name == "llama.cpp":
        return LlamaCppSide(Path(file), context, sequences, threads)
    if name == "torch":
        return TorchSide(folder, context, sequences, threads)
    return TransformersSide(folder, threads, DTYPES[name.split()[1]])


FLAGS = {  # of /proc/cpuinfo -> what llama.cpp calls it; what a native build would use
    "avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "avx512f": "AVX512", "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16", "asimd": "NEON", "asimddp": "DOTPROD", "i8mm": "MATMUL_INT8",
}  # fmt: skip


def system_info() -> dict[str, Any]:
    """What llama.cpp was built with, and which instruction sets of this processor it lacks: {system_info, missing}."""
    words = llama_cpp_quietly().llama_print_system_info().decode()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next(
        (line.split(":", 1)[1].split() for line in lines if line.lower().startswith(("flags", "features"))), []
    )
    missing = [name for flag, name in FLAGS.items() if flag in flags and f" {name} = 1" not in f" {words}"]
    return {"system_info": words.strip(" |"), "missing": missing}
