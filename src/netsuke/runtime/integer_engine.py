"""The integer-only decoder as an engine: what `netsuke run` and `netsuke serve` open for a model with static grids.

`IntegerEngine` meets the contract of runtime/engine.py's `Engine`, so that `engine.generate`, the sampler and the server run
on it as they are. Everything up to the logits is integers (runtime/integer_native.py); the choice of a token from them is the
sampler's, in floats. Weights are read with PyTorch and kept as the C code wants them; keys and values are int8; one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.models.load import Loaded, load
from netsuke.models.tokenizer import Tokenizer
from netsuke.runtime.engine import CHUNK, rows_of
from netsuke.runtime.integer import ASKED, LOGIT_STEP, IntegerModel
from netsuke.runtime.integer_native import NativeInteger

LOGIT_BYTES = 12  # of one logit on its way out: int64, then float32


class IntegerEngine:
    """A model with static grids, opened for running. One caller at a time.

    slots    sequences held at once, each of `context` tokens (default: the model's)
    chunk    most rows per forward
    vectors  a build of the C code (graph/host.py's VECTORS; default: the best of this processor)
    """

    backend = "integer"

    def __init__(
        self, loaded: Loaded, *, context: int | None = None, slots: int = 1, chunk: int = CHUNK, vectors: int | None = None
    ):  # fmt: skip
        """`loaded` is taken over: its model's maps are let go one by one. Raises NetsukeError as IntegerModel.of_model,
        and for no slot or more slots than rows."""
        if not 1 <= slots <= chunk:
            raise NetsukeError(ASKED, f"{slots} slots and {chunk} rows at a time", "1 or more slots, and as many rows")
        self.source, self.manifest, self.slots, self.chunk = loaded.source, loaded.manifest, slots, chunk
        self.tokenizer: Tokenizer | None = loaded.tokenizer
        integer = IntegerModel.of_model(loaded.model, context)
        for block in loaded.model.blocks:
            for name in list(block._modules):
                delattr(block, name)
        self._native = NativeInteger(integer, vectors, slots, release=True)
        cfg = integer.cfg
        self.vocab, self.context, self.bos, self.eos = cfg.vocab, cfg.context, cfg.bos, tuple(cfg.eos)

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> IntegerEngine:
        """An artifact's folder or a shipped name; `settings` as above. Raises NetsukeError as models.load.load does too."""
        return cls(load(path), **settings)

    def forward(
        self, tokens: Sequence[int], slots: Sequence[int], want: Sequence[bool] | None = None,
        generated: Sequence[bool] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Appends tokens[i] to the sequence in slots[i]. Returns float32 logits (wanted rows, vocab) of the rows in `want`
        (default: the last row of each slot), less the largest of each row: small differences stay exact, so that the most
        likely token is the integers' own. `generated` is of no effect: there are no sparse maps.

        Raises NetsukeError, and no sequence has grown, for a token outside the vocabulary, a full context, or too many rows.
        """
        row, slot, last = rows_of(self.source, tokens, slots)
        if len(row) > self.chunk:
            raise NetsukeError(f"run {self.source}", f"{len(row)} rows at a time", f"at most {self.chunk}")
        logits = self._native.rows(row, slot, last if want is None else np.asarray(want, bool))
        logits -= logits.max(-1, keepdims=True)
        return np.multiply(logits, np.float32(LOGIT_STEP), dtype=np.float32, casting="unsafe")

    def length(self, slot: int) -> int:
        """Tokens held by a slot."""
        return self._native.held(slot)

    def truncate(self, slot: int, length: int) -> None:
        """Forgets what lies beyond the first `length` tokens."""
        self._native.truncate(slot, length)

    def copy(self, target: int, source: int, length: int) -> None:
        """Makes `target` hold the first `length` tokens of `source`."""
        self._native.copy(target, source, length)

    def memory(self) -> dict[str, int]:
        """Bytes: {weights, kv_cache, activations (of a pass of `chunk` rows), scratch, tables, allocated (all but weights)}."""
        parts = {
            "kv_cache": self._native.cache_bytes,
            "activations": self._native.room(self.chunk) + self.slots * self.vocab * LOGIT_BYTES,
            "scratch": 0,
            "tables": self._native.sizes["tables"],
        }
        return {"weights": self._native.sizes["weights"], **parts, "allocated": sum(parts.values())}

    def close(self) -> None:
        """Nothing is open; the memory goes with the object."""

    def __enter__(self) -> IntegerEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
