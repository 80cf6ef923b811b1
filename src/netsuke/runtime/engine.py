"""The native engine: a carved Llama running in C, without PyTorch.

`Engine` wraps the C core (native/include/netsuke.h). Weights stay in the mapped file; everything else is one block of
memory whose size `engine_plan` tells before anything is opened. What a row gives does not depend on the rows beside it,
bit for bit, so batches, prompts in pieces and reused prefixes change no answer.

`generate` meets the contract of runtime/generate.py; the PyTorch runtime stays the reference that tests hold this to.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.models.files import plain_name, read_json
from netsuke.models.places import FORMAT, MANIFEST, SHIPPED, SUFFIX, VERSION, WEIGHTS, digest
from netsuke.runtime.timings import Timings

if TYPE_CHECKING:
    from netsuke.models.llama import Llama
    from netsuke.models.tokenizer import Tokenizer
    from netsuke.runtime.integer_engine import IntegerEngine

CHUNK = 256  # rows per forward: larger chunks are hardly faster and take more memory
HASHED = 256 << 20  # bytes of weights whose sha256 `load` checks: 0.15 s; what is larger is held against its size alone
KV = ("float16", "int8")


def _native() -> Any:
    try:
        from netsuke import _native
    except ImportError as e:
        raise NetsukeError(
            "run the native engine",
            f"this installation lacks it ({e})",
            "a C compiler at `pip install`",
            "--backend torch",
        ) from e
    return _native


def _refuse(asked: str, error: ValueError) -> NetsukeError:
    found, _, allowed = str(error).partition("\0")
    return NetsukeError(asked, found, allowed)


def find_artifact(path_or_name: str | Path) -> Path | None:
    """The folder of an artifact, given by path or shipped name; None when it is some other kind of model."""
    path = Path(path_or_name)
    if not path.exists() and plain_name(str(path_or_name)):
        path = SHIPPED / f"{path_or_name}{SUFFIX}"
    return path if (path / MANIFEST).is_file() else None


def engine_plan(
    manifest: dict[str, Any], *, context: int | None = None, slots: int = 1, chunk: int = CHUNK,
    logit_rows: int = 0, threads: int | None = None, kv: str = "float16",
) -> dict[str, int]:  # fmt: skip
    """Bytes that an engine would take for an artifact with this manifest: {weights (mapped), kv_cache, activations,
    scratch, tables, allocated (all but weights)}. Raises NetsukeError for settings that no engine has."""
    check_runs(manifest, "plan the engine's memory")
    try:
        return _native().plan(
            json.dumps(manifest), context or 0, slots, chunk, logit_rows, threads or 0, check_cache(kv)
        )  # fmt: skip
    except ValueError as e:
        raise _refuse("plan the engine's memory", e) from e


def check_runs(manifest: dict[str, Any], asked: str) -> None:
    """Raises NetsukeError for what only the PyTorch runtime runs."""
    config = manifest.get("config")
    for i, block in enumerate(config.get("blocks") or () if isinstance(config, dict) else ()):
        if isinstance(block, dict) and block.get("experts"):
            found = f"block {i} is a mixture of {block['experts']} experts"
            raise NetsukeError(asked, found, "one feed-forward part a block", "--backend torch")
    if sites := manifest.get("sites"):
        first = next(iter(sites))
        raise NetsukeError(
            asked, f"its activations are quantized to grids (at {first} and {len(sites) - 1} more sites)",
            "models without such sites: the engine would compute something else",
            "netsuke run or serve, which run static grids in integers, or --backend torch",
        )  # fmt: skip


def plan_of(cfg: Any, layers: dict[str, dict], **settings: Any) -> dict[str, int]:
    """`engine_plan` for a config (models.llama.LlamaConfig) and the specs of its linear maps."""
    import msgspec

    manifest = {"format": FORMAT, "version": VERSION, "family": "llama", "config": msgspec.to_builtins(cfg)}
    return engine_plan(manifest | {"layers": layers}, **settings)


def check_cache(kv: str) -> str:
    """`kv`. Raises NetsukeError when it is no kind of cache."""
    if kv not in KV:
        raise NetsukeError(f"use a key/value cache of {kv!r}", "that is no kind of cache", ", ".join(KV))
    return kv


class Engine:
    """A model opened for running. One caller at a time; `forward` releases the interpreter lock.

    slots       sequences held at once, each of `context` tokens
    chunk       most rows per forward
    logit_rows  most rows whose logits are asked for at once (default: as many as slots)
    isa         "avx512", "avx2", "neon", "scalar" (default: the best of this processor)
    """

    backend = "native"

    def __init__(
        self, folder: Path, *, context: int | None = None, slots: int = 1, chunk: int = CHUNK, logit_rows: int = 0,
        threads: int | None = None, kv: str = "float16", isa: str = "", source: str | None = None,
    ):  # fmt: skip
        self.source = source or str(folder)
        native = _native()
        self.manifest = read_json(folder / MANIFEST)
        check_runs(self.manifest, f"load {self.source}")
        try:
            self._core = native.Engine(
                str(folder), context or 0, slots, chunk, min(logit_rows, chunk), threads or 0, check_cache(kv), isa
            )
        except ValueError as e:
            raise _refuse(f"load {self.source}", e) from e
        self.facts: dict[str, Any] = self._core.facts()
        self.vocab: int = self.facts["vocab"]
        self.context: int = self.facts["context"]
        self.slots, self.chunk = slots, self.facts["rows"]
        config = self.manifest["config"]
        self.bos: int | None = config.get("bos")
        self.eos: tuple[int, ...] = tuple(config.get("eos") or ())
        self.tokenizer: Tokenizer | None = self._tokenizer(folder)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False, **settings: Any) -> Engine:
        """An artifact's folder or a shipped name. `verify` checks the sha256 of every file first.

        Raises NetsukeError for anything else, for a damaged artifact and for settings beyond the model's.
        """
        folder = find_artifact(path)
        if folder is None:
            raise NetsukeError(f"load {path}", "this is no netsuke artifact", "NAME.netsuke or a shipped name")
        _check_files(folder, verify)
        return cls(folder, source=str(path), **settings)

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> Engine:
        """Any model that netsuke reads. What is no artifact (a Hugging Face folder, llama2.c, GGUF) is read with PyTorch
        and becomes a temporary one. Raises NetsukeError as models.load.load does."""
        folder = find_artifact(path)
        if folder is None:
            from netsuke.models.load import load

            loaded = load(path)
            return cls.of_model(loaded.model, loaded.tokenizer, **settings)
        weights = folder / WEIGHTS
        return cls.open(path, verify=weights.is_file() and weights.stat().st_size <= HASHED, **settings)

    @classmethod
    def of_model(cls, model: Llama, tokenizer: Tokenizer | None = None, **settings: Any) -> Engine:
        """A model that is in memory, by way of an artifact in a temporary folder that is gone when this returns (its
        weights stay mapped)."""
        from netsuke.models.save import save_artifact

        folder = Path(tempfile.mkdtemp(prefix="netsuke-"))
        try:
            saved = save_artifact(folder / "model", model, tokenizer, {}, {})
            return cls(saved, source="the model", **settings)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _tokenizer(self, folder: Path) -> Tokenizer | None:
        from netsuke.models.tokenizer import KINDS, read_tokenizer

        names = [name for name in KINDS if (folder / name).is_file()]
        if not names:
            return None
        tokenizer = read_tokenizer(folder / names[0], self.bos, self.eos)
        tokenizer.check_fits(self.vocab, folder / names[0])
        return tokenizer

    def forward(
        self, tokens: Sequence[int], slots: Sequence[int], want: Sequence[bool] | None = None,
        generated: Sequence[bool] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Appends tokens[i] to the sequence in slots[i]; rows of one slot must be adjacent. Returns float32 logits
        (wanted rows, vocab) of the rows in `want` (default: the last row of each slot).

        `generated` marks rows that are no part of a prompt: input-sparse maps leave channels out for those only
        (default: a slot's single row). Raises NetsukeError, and no sequence has grown, for a token outside the
        vocabulary, a full context, or too many rows.
        """
        row, slot, last = rows_of(self.source, tokens, slots)
        flags = (last if want is None else np.asarray(want, bool)).astype(np.uint8)
        alone = last & np.append(True, last[:-1]) if generated is None else np.asarray(generated, bool)
        try:
            return np.array(self._core.forward(row, slot, flags | alone.astype(np.uint8) << 1))
        except ValueError as e:
            raise _refuse(f"run {self.source}", e) from e

    def length(self, slot: int) -> int:
        """Tokens held by a slot."""
        return self._core.length(slot)

    def truncate(self, slot: int, length: int) -> None:
        """Forgets what lies beyond the first `length` tokens."""
        try:
            self._core.truncate(slot, length)
        except ValueError as e:
            raise _refuse("shorten a sequence", e) from e

    def copy(self, target: int, source: int, length: int) -> None:
        """Makes `target` hold the first `length` tokens of `source`."""
        try:
            self._core.copy(target, source, length)
        except ValueError as e:
            raise _refuse("copy a sequence", e) from e

    def memory(self) -> dict[str, int]:
        """Bytes, as `engine_plan` gives them."""
        return self._core.memory()

    def close(self) -> None:
        self._core.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rows_of(source: str, tokens: Sequence[int], slots: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens and slots as int32, and which rows are the last of their slot. Raises NetsukeError for what are no rows."""
    try:
        row, slot = np.asarray(tokens, np.int32), np.asarray(slots, np.int32)
    except (OverflowError, ValueError, TypeError) as e:
        raise NetsukeError(f"run {source}", f"tokens or slots are no integers ({e})", "small integers") from e
    if row.shape != slot.shape or row.ndim != 1 or not row.size:
        raise NetsukeError("run the model", f"{row.size} tokens for {slot.size} slots", "as many, and at least one")
    return row, slot, np.append(slot[1:] != slot[:-1], True)


def _check_files(folder: Path, verify: bool) -> None:
    """Sizes (and hashes) of the files that the manifest lists. Raises NetsukeError for the first that differs."""
    listed = read_json(folder / MANIFEST).get("files")
    asked = f"load {folder}"
    if not isinstance(listed, dict) or WEIGHTS not in listed:
        raise NetsukeError(asked, f"the manifest lists no {WEIGHTS}", f"an artifact with {WEIGHTS}")
    for name, fact in listed.items():
        if not plain_name(name) or not isinstance(fact, dict):
            raise NetsukeError(asked, f"the manifest lists {name!r}", "plain names of files in the artifact")
        path = folder / name
        if not path.is_file():
            raise NetsukeError(
                asked, f"the file {name!r} is missing", "every file that the manifest lists", "another copy"
            )
        if path.stat().st_size != fact.get("bytes"):
            found = f"the file {name!r} has {path.stat().st_size} bytes, the manifest says {fact.get('bytes')}"
            raise NetsukeError(asked, found, "files as they were written", "another copy")
        if verify and digest(path) != fact.get("sha256"):
            found = f"the file {name!r} was changed or damaged: its sha256 differs from the manifest's"
            raise NetsukeError(asked, found, "files as they were written", "another copy")


class Sampler:
    """Chooses tokens. Temperature 0 is greedy (the first of equals); top_k 0, top_p 1 and min_p 0 keep all. Equal seeds
    and logits give equal tokens."""

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, seed: int = 0):
        self._core = _native().Sampler(temperature, top_p, top_k, min_p, seed % (1 << 64))

    def pick(self, logits: np.ndarray) -> int:
        """One token from float32 logits (V,)."""
        return self._core.pick(logits)


def check_prompt(ids: Sequence[int], vocab: int, context: int) -> None:
    """Raises NetsukeError when a prompt is empty, holds an unknown token, or leaves no room in the context."""
    asked = "generate text"
    if not ids:
        raise NetsukeError(asked, "the prompt is empty and the model has no start token", "", "--prompt TEXT")
    if max(ids) >= vocab:
        raise NetsukeError(asked, f"token {max(ids)} is outside the model's vocabulary", f"below {vocab}")
    if len(ids) >= context:
        found = f"the prompt has {len(ids)} tokens and the context is {context}"
        raise NetsukeError(asked, found, f"at most {context - 1} prompt tokens", "a shorter prompt")


def generate(
    engine: Engine | IntegerEngine, ids: list[int], new_tokens: int = 128, *, temperature: float = 0.0, top_p: float = 1.0,
    seed: int = 0, stop: tuple[int, ...] | None = None, timings: Timings | None = None, slot: int = 0,
) -> Iterator[int]:  # fmt: skip
    """Yields up to `new_tokens` ids after the prompt; ends early at an end-of-text token (`stop`, default the model's)
    and when the context is full.

    Raises NetsukeError when the prompt is empty, too long, or outside the vocabulary.
    """
    check_prompt(ids, engine.vocab, engine.context)
    stop = engine.eos if stop is None else stop
    timings, sampler = timings if timings is not None else Timings(), Sampler(temperature, top_p, seed=seed)
    engine.truncate(slot, 0)
    start = time.perf_counter()
    for at in range(0, len(ids), engine.chunk):
        part = ids[at : at + engine.chunk]
        want = [False] * len(part)
        want[-1] = at + len(part) == len(ids)
        logits = engine.forward(part, [slot] * len(part), want, [False] * len(part))
    timings.prompt_tokens = len(ids)
    for made in range(new_tokens):
        token = sampler.pick(logits[0])
        if made == 0:
            timings.first_token = time.perf_counter() - start
            begin = time.perf_counter()
        timings.new_tokens, timings.decode = made + 1, time.perf_counter() - begin
        if token in stop:
            return
        yield token
        if engine.length(slot) >= engine.context or made == new_tokens - 1:
            return
        logits = engine.forward([token], [slot])
