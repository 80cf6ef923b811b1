"""llama.cpp's own answers, through the low-level calls of llama-cpp-python; tests that use it skip where it is absent."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
QUIET = cpp.llama_log_callback(lambda *_: None)
CONTEXT = 128


class LlamaCpp:
    """A GGUF file opened by llama.cpp: logits and ids."""

    def __init__(self, path: Path, tokens_only: bool = False):
        cpp.llama_log_set(QUIET, ctypes.c_void_p(0))
        settings = cpp.llama_model_default_params()
        settings.n_gpu_layers, settings.vocab_only = 0, tokens_only
        self.model = cpp.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model, "llama.cpp does not load the file"
        self.vocab = cpp.llama_model_get_vocab(self.model)
        self.context = None
        if not tokens_only:
            c = cpp.llama_context_default_params()
            c.n_ctx, c.n_batch, c.n_ubatch, c.n_threads, c.n_threads_batch = CONTEXT, CONTEXT, CONTEXT, 1, 1
            c.flash_attn_type = 0  # its float16 keys and values would hide our differences behind theirs
            c.type_k = c.type_v = cpp.GGML_TYPE_F32
            self.context = cpp.llama_init_from_model(self.model, c)
            assert self.context, "llama.cpp makes no context for the file"

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """(T, V) for a whole text."""
        cpp.llama_memory_clear(cpp.llama_get_memory(self.context), True)
        batch = cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        assert cpp.llama_decode(self.context, batch) == 0
        width = cpp.llama_vocab_n_tokens(self.vocab)
        rows = [np.ctypeslib.as_array(cpp.llama_get_logits_ith(self.context, i), (width,)) for i in range(len(ids))]
        out = np.array(rows)
        cpp.llama_batch_free(batch)
        return out

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """`count` most likely tokens after `ids`."""
        all_ids = list(ids)
        for _ in range(count):
            all_ids.append(int(self.logits(all_ids)[-1].argmax()))
        return all_ids[len(ids) :]

    def encode(self, text: str, special: bool = False) -> list[int]:
        raw = text.encode()
        room = (ctypes.c_int * (len(raw) + 8))()
        count = cpp.llama_tokenize(self.vocab, raw, len(raw), room, len(room), special, False)
        return list(room[:count])

    def close(self) -> None:
        if self.context:
            cpp.llama_free(self.context)
        cpp.llama_model_free(self.model)


@contextmanager
def opened(path: Path, tokens_only: bool = False) -> Iterator[LlamaCpp]:
    it = LlamaCpp(path, tokens_only)
    try:
        yield it
    finally:
        it.close()
