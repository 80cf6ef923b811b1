"""Trains the shipped bidirectional encoder: `python recipes/encoder/train.py` (20 minutes on one core).

    encoder   1.6 M parameters: 4 blocks, 160 wide, 5 heads, feed-forward 640, 256 tokens of context, full attention

Masked tokens (15 %; 80/10/10) of the corpus that the decoders beside it are trained on (recipes/tinylm), with their
tokenizer and one id more, 2,048, which hides a token. A run resumes from its checkpoint, ends fully annealed, writes
training.json and the artifact that the package ships. Floor in the log: the perplexity of guessing by how often each token
occurs.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tinylm"))

from corpus import SHARE, TOKENIZER, batch_at, held_out, stream  # noqa: E402

from netsuke.data.domains import DOMAINS  # noqa: E402
from netsuke.models.encoder import EncoderConfig, random_encoder  # noqa: E402
from netsuke.models.llama import half_precision  # noqa: E402
from netsuke.models.save import save_artifact  # noqa: E402
from netsuke.models.tokenizer import HFTokenizer  # noqa: E402
from netsuke.tasks.sequences import MaskedTokens  # noqa: E402
from netsuke.train.loop import LoopKnobs, train  # noqa: E402

SHIPPED = HERE.parents[1] / "src/netsuke/weights"
CONTEXT, BATCH, SEED, VOCAB, ROWS = 256, 32, 0, 2048, 64
CONFIG = EncoderConfig.uniform(
    4, 640, width=160, heads=5, context=CONTEXT, vocab=VOCAB + 1, mask=VOCAB, bos=0, eos=(0,)
)


def windows(split: str) -> torch.Tensor:
    """The first `ROWS` windows of every domain, (N, CONTEXT)."""
    return torch.cat([held_out(d, CONTEXT, ROWS, split)[:, :CONTEXT] for d in DOMAINS])


def unigram_perplexity(rows: torch.Tensor) -> float:
    """What guessing every hidden token by its frequency in the train text comes to."""
    counts = torch.ones(VOCAB, dtype=torch.float64)
    for domain in DOMAINS:
        counts += (
            SHARE[domain]
            * torch.bincount(stream(domain, "train"), minlength=VOCAB).double().div(len(stream(domain, "train")))
            * 1e6
        )
    return math.exp(-float((counts / counts.sum()).log()[rows.flatten()].mean()))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--minutes", type=float, default=20)
    ask.add_argument("--checkpoint", type=Path, default=HERE / "encoder.ckpt")
    args = ask.parse_args()
    torch.manual_seed(SEED)
    model = random_encoder(CONFIG, SEED).requires_grad_(True)
    held = windows("validation")
    task = MaskedTokens({"train": held[:BATCH], "validation": held, "test": windows("test")}, VOCAB, VOCAB, BATCH)
    log_path = args.checkpoint.with_suffix(".log.json")
    log: list[dict] = json.loads(log_path.read_text()) if log_path.exists() else []

    def on_step(step: int, loss: float, rate: float) -> None:
        if step % 200 == 0:
            log.append({"step": step, "loss": round(loss, 4), "validation": round(task.score(model, "validation"), 2)})
            log_path.write_text(json.dumps(log))
            print(log[-1], flush=True)

    knobs = LoopKnobs(steps=100_000, minutes=args.minutes, bf16=True)
    history = train(
        model, lambda step: task.hidden(batch_at(step, BATCH, CONTEXT - 1, SEED), step), task.loss, knobs,
        checkpoint=args.checkpoint, on_step=on_step,
    )  # fmt: skip
    model.requires_grad_(False)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()), "seconds": round(history.seconds),
        "tokens": len(history.steps) * BATCH * CONTEXT, "steps": len(history.steps), "seed": SEED, "share": SHARE,
        "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "knobs": knobs.__dict__, "perplexity_unigram": round(unigram_perplexity(held), 1),
        "perplexity_validation": round(task.score(model, "validation"), 3), "log": log,
    }  # fmt: skip
    (HERE / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    provenance = {"recipe": "recipes/encoder", "training_log": "recipes/encoder/training.json"}
    tokenizer = HFTokenizer(TOKENIZER.read_bytes(), bos=0, eos=(0,))
    save_artifact(SHIPPED / "encoder.netsuke", half_precision(model), tokenizer, provenance, {})
    print("done:", {k: v for k, v in facts.items() if k not in ("log", "knobs")}, flush=True)


if __name__ == "__main__":
    main()
