"""llama2.c checkpoints (version 0, `.bin`) -> Llama, with their tokenizer.

Layout: seven little-endian int32 (width, hidden, layers, heads, kv heads, vocab, longest text), then float32 tensors
in a fixed order, each kind stacked over the layers. A negative vocab says that the output head is not tied and follows
at the end. The two rotary tables are recomputed, not read. Rotary pairs lie interleaved (0,1), (2,3), …; they become
half-split here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from netsuke.errors import NetsukeError
from netsuke.models.files import reading
from netsuke.models.llama import Llama, LlamaConfig
from netsuke.models.skeleton import LIMITS, check_config, fill, skeleton
from netsuke.models.tokenizer import Tokenizer, read_tokenizer
from netsuke.models.weights import read_bytes

HEADER = struct.Struct("<7i")
FIELDS = ("width", "hidden", "layers", "heads", "kv_heads", "vocab", "context")
MAGIC = 0x616B3432  # "ak42": the header of versions 1 and 2
# The order of the file: our name, and whether it comes once per layer.
ORDER = (
    ("embed.weight", False), ("attn_norm.weight", True), ("q.weight", True), ("k.weight", True), ("v.weight", True),
    ("o.weight", True), ("mlp_norm.weight", True), ("gate.weight", True), ("down.weight", True), ("up.weight", True),
    ("norm.weight", False),
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checked file: its config, the skeleton, and where (byte) each of its tensors starts."""

    path: Path
    config: LlamaConfig
    model: Llama
    starts: dict[str, int]

    def read(self, name: str) -> Tensor:
        """A fresh copy of one tensor, rotary pairs half-split."""
        shape = self.model.state_dict()[name].shape
        with reading(self.path), self.path.open("rb") as f:
            t = read_bytes(f, self.starts[name], shape.numel() * 4, self.path).view(torch.float32).reshape(shape)
        if name.endswith((".q.weight", ".k.weight")):
            return half_split(t, shape[0] // self.config.head_dim)
        return t


def half_split(w: Tensor, heads: int) -> Tensor:
    """Rows of (heads·2R, I) from interleaved pairs (2j, 2j+1) to half-split ones (j, R+j)."""
    outs, ins = w.shape
    return w.view(heads, outs // heads // 2, 2, ins).transpose(1, 2).reshape(outs, ins)


def header_of(path: Path) -> dict[str, int] | None:
    """The seven numbers when they could be those of a model, else None: how a llama2.c file is told from others."""
    with reading(path), path.open("rb") as f:
        head = f.read(HEADER.size)
    if len(head) < HEADER.size:
        return None
    h = dict(zip(FIELDS, HEADER.unpack(head)))
    sane = all(1 <= abs(v) <= LIMITS[k] and (v > 0 or k == "vocab") for k, v in h.items())
    return h if sane and h["width"] % h["heads"] == 0 else None


def open_checkpoint(path: Path) -> Checkpoint:
    """Config and tensor places of a version-0 file; no tensor is read.

    Raises NetsukeError for versions 1 and 2, an absurd header, and a file that is shorter or longer than its header
    says.
    """
    asked = f"load {path}"
    h = header_of(path)
    if h is None:
        with reading(path), path.open("rb") as f:
            head = f.read(HEADER.size)
        if int.from_bytes(head[:4], "little") == MAGIC:
            raise NetsukeError(asked, "a llama2.c file of version 1 or 2", "version 0", "export.py --version 0")
        found = str(HEADER.unpack(head)) if len(head) == HEADER.size else f"only {len(head)} bytes"
        raise NetsukeError(asked, f"no llama2.c header ({found})", f"{', '.join(FIELDS)} within reason")
    cfg = LlamaConfig.uniform(
        h["layers"], h["hidden"], vocab=abs(h["vocab"]), width=h["width"], heads=h["heads"], kv_heads=h["kv_heads"],
        head_dim=h["width"] // h["heads"], context=h["context"], norm_eps=1e-5, tied=h["vocab"] > 0,
        # llama2.c's own loop stops at <s> as well: the models were trained on texts joined by it.
        bos=1 if abs(h["vocab"]) > 2 else None, eos=(1, 2) if abs(h["vocab"]) > 2 else (),
    )  # fmt: skip
    model = skeleton(check_config(cfg, path))
    starts, end = {}, HEADER.size
    state = model.state_dict()

    def take(name: str) -> None:
        nonlocal end
        starts[name] = end
        end += state[name].numel() * 4

    for name, stacked in ORDER:
        for full in [f"blocks.{i}.{name}" for i in range(h["layers"])] if stacked else [name]:
            take(full)
    end += 4 * 2 * h["context"] * (cfg.head_dim // 2)
    if not cfg.tied:
        take("head.weight")
    with reading(path):
        size = path.stat().st_size
    if size != end:
        what = "truncated" if size < end else "longer than its header says"
        raise NetsukeError(asked, f"the llama2.c file is {what}: {size} bytes of {end}", f"exactly {end} bytes")
    return Checkpoint(path, cfg, model, starts)


def tokenizer_path(path: Path, vocab: int) -> Path | None:
    """The tokenizer beside a checkpoint: tok512.bin for 512 tokens, else tokenizer.bin."""
    beside = (path.with_name(f"tok{vocab}.bin"), path.with_name("tokenizer.bin"))
    return next((p for p in beside if p.is_file() and p != path), None)


def load_file(path: Path, dtype: str | None, tokenizer: Path | None) -> tuple[Llama, Tokenizer | None]:
    """The model and its tokenizer (`tokenizer`, or the one beside the file, or None)."""
    found = open_checkpoint(path)
    where = tokenizer or tokenizer_path(path, found.config.vocab)
    tok = None
    if where is not None:
        tok = read_tokenizer(where, found.config.bos, found.config.eos)
        tok.check_fits(found.config.vocab, where)
    return fill(found.model, found.read, dtype, path), tok
