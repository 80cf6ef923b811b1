"""What benchmarks/compressors.py measures on: a model with its text, the same model for its peers, and `fit` at many sizes."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from netsuke.carve import CALIBRATION, Carving
from netsuke.compress.modegpt import block_parameters
from netsuke.data import domains
from netsuke.devices import Budget
from netsuke.errors import NetsukeError
from netsuke.models.hf import theirs
from netsuke.models.llama import Llama, LlamaConfig
from netsuke.models.load import load
from netsuke.models.save import save_artifact
from netsuke.models.weights import WeightFile, read_header, write_safetensors
from netsuke.tasks.domains import SHARE
from netsuke.tasks.language import language_task, token_losses

CARD = "pi-zero-2w"
CONTEXT = 512
WINDOWS = {"train": 64, "validation": 16, "test": 32}
PIECE = 8000  # characters of one document at most, so that no long one speaks for all
TEXTS = {"pycode": {"coding": 1.0}, "wide": SHARE}  # what each was trained on
MAPS = re.compile(r"_proj\.|^blocks\.\d+\.(q|k|v|o|gate|up|down)\.")
TABLES = re.compile(r"embed|head")


class Subject:
    """A shipped model and its text as a folder of ten files, which `fit` splits as they were drawn: eight train, one validates,
    one tests. Raises NetsukeError where the text is absent."""

    def __init__(self, name: str, place: Path):
        loaded = load(name)
        self.name, self.tokenizer, self.data = name, loaded.tokenizer, place / f"{name}-text"
        self.half, self.model = loaded.model, load(name, dtype="float32").model
        self.data.mkdir()
        train = self.text("train")
        eighth = -(-len(train) // 8)
        for i in range(8):
            (self.data / f"{i}.txt").write_text(train[i * eighth : (i + 1) * eighth], encoding="utf-8")
        for i, split in ((8, "validation"), (9, "test")):
            (self.data / f"{i}.txt").write_text(self.text(split), encoding="utf-8")
        self.task = language_task(loaded, str(self.data), CONTEXT)
        self.test = self.task.windows("test")[: WINDOWS["test"]]
        self.losses = window_losses(self.model, self.test)

    def text(self, split: str) -> str:
        """About as many windows of a split as are wanted, of all domains in their shares, pieces in shuffled order."""
        tokens, pieces = (WINDOWS[split] + 1) * CONTEXT, []
        for domain, share in TEXTS[self.name].items():
            found, left = list(domains.documents(domain, split)), int(share * tokens)
            random.Random(0).shuffle(found)
            for piece in (t[:PIECE] for t in found):
                ids = len(self.tokenizer.encode(piece))
                pieces.append(piece[: len(piece) * left // ids] if ids > left else piece)
                left -= ids
                if left <= 0:
                    break
        random.Random(0).shuffle(pieces)
        return "\n".join(pieces)

    def excess(self, losses: Tensor) -> float:
        """Mean loss above the unmodified model's, nats per token."""
        return float((losses - self.losses).mean())

    def share_of(self, channels: float) -> float:
        """The share of the blocks' linear weights that this share of the hidden channels is."""
        cfg = self.model.cfg
        return channels * sum(3 * b.hidden * cfg.width for b in cfg.blocks) / block_parameters(cfg)

    def write_for_peers(self, folder: Path) -> dict[str, str]:
        """A Hugging Face folder with the weights as shipped, and the windows; what the peers' job names."""
        folder.mkdir()
        state = {theirs(name): t for name, t in self.half.state_dict().items()}
        write_safetensors(folder / "model.safetensors", state, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(hf_config(self.model.cfg)))
        (folder / "tokenizer.json").write_bytes(self.tokenizer.to_bytes())
        np.save(folder / "calibration.npy", self.task.windows("train")[:CALIBRATION].numpy())
        np.save(folder / "test.npy", self.test.numpy())
        files = folder / "files"
        files.mkdir()
        names = {"calibration": "calibration.npy", "test": "test.npy", "logits": "logits.npy"}
        return {"model": str(folder), "files": str(files)} | {k: str(folder / v) for k, v in names.items()}

    def saved(self, model: Llama, folder: Path) -> dict[str, int]:
        """Bytes of a model's artifact: the whole folder and, of its weights, what is where."""
        return artifact_bytes(save_artifact(folder, model, self.tokenizer, {}, {}))


def hf_config(cfg: LlamaConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": cfg.width,
        "num_attention_heads": cfg.heads, "num_key_value_heads": cfg.kv_heads, "head_dim": cfg.head_dim,
        "num_hidden_layers": len(cfg.blocks), "intermediate_size": cfg.blocks[0].hidden, "vocab_size": cfg.vocab,
        "max_position_embeddings": cfg.context, "rms_norm_eps": cfg.norm_eps, "rope_theta": cfg.rope_theta,
        "tie_word_embeddings": cfg.tied, "hidden_act": "silu", "bos_token_id": cfg.bos, "eos_token_id": cfg.eos[0],
        "dtype": "float16",
    }  # fmt: skip


@torch.no_grad()
def window_losses(model: Llama, windows: Tensor) -> Tensor:
    """Mean loss of each window, nats per token, (W,) float64."""
    return torch.cat([token_losses(model, rows).double().mean(1) for rows in windows.split(8)])


def weight_bytes(file: Path) -> dict[str, int]:
    """Bytes of a safetensors file: whole, the blocks' linear maps, the table and head; and, where zeros would pay for it, of the
    maps as a bit for each place and the values that are not zero."""
    tensors, out = read_header(file).tensors, {"file": file.stat().st_size, "maps": 0, "embedding": 0}
    for name, t in tensors.items():
        kind = "maps" if MAPS.search(name) else "embedding" if TABLES.search(name) else None
        if kind:
            out[kind] += t.end - t.start
    read = WeightFile(file)
    dense = [n for n, t in tensors.items() if MAPS.search(n) and t.dtype == torch.float16 and len(t.shape) == 2]
    if dense and all(n.endswith(".weight") for n in dense):
        counted = [read.get(n) for n in dense]
        masked = sum(2 * int(w.count_nonzero()) + w.numel() // 8 for w in counted)
        if masked < 0.9 * sum(2 * w.numel() for w in counted):
            out["masked"] = masked
    return out


def artifact_bytes(folder: Path) -> dict[str, int]:
    """`weight_bytes` of an artifact, and "all": those of every file in its folder."""
    return weight_bytes(folder / "weights.safetensors") | {"all": sum(f.stat().st_size for f in folder.iterdir())}


class Sizes(Carving):
    """`fit` at several storage limits. A limit on storage does not change which choices there are, so they are offered once; all
    else is what `fit` does, the proof of the packed artifact included. The test text is scored window by window."""

    def __init__(self, model: str, data: Path, out: Path, test: Tensor | None = None, context: int = CONTEXT):
        super().__init__(
            model, CARD, Budget.parse(None, "1GB", None, None, None), str(data), context, out, True, _silent
        )
        self.test = self.task.windows("test") if test is None else test
        begin = time.process_time()
        torch.manual_seed(0)
        with torch.no_grad():
            self.measure_before()
            self.offer_choices()
        self.offered = time.process_time() - begin

    def loss_as_decoded(self, model: Llama, split: str, limit: int | None = None) -> float:
        if split != "test":
            return super().loss_as_decoded(model, split, limit)
        self.losses = window_losses(model, self.test)
        return float(self.losses.mean())

    def at(self, limit: int, table: int | None = None) -> dict[str, Any]:
        """What `fit` makes of `limit` bytes, the whole folder counted; `table` fixes the bits of the embedding table. Seconds are
        of processor time, those of the choices included. An error is a row as well."""
        self.asked = Budget.parse(None, f"{limit}B", None, None, None)
        self.budget, begin, whole = Budget.for_device(self.device, self.asked), time.process_time(), self.parts
        if table is not None:
            self.parts = [[o for o in part if o.value.bits.get("embed", table) == table] for part in whole]
        row = {"limit": limit, "table": table}
        try:
            with torch.no_grad():
                self.build_candidates()
                self.pack()
        except NetsukeError as e:
            return row | {"error": str(e)}
        finally:
            self.parts = whole
        picked = {o.value.part: sorted(set(o.value.bits.values())) for o in self.winner.found.picks}
        return row | artifact_bytes(self.out) | {
            "losses": self.losses, "busy": time.process_time() - begin + self.offered, "bits": picked,
            "methods": [m.name for m in self.winner.methods],
        }  # fmt: skip


def _silent(name: str, done: int, total: int) -> None:
    pass
