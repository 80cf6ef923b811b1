"""Trains the test models of the language methods: `python recipes/tinylm/train.py wide --minutes 70`.

    wide      6.8 M parameters: 6 blocks, 256 wide, 8 heads with keys of their own, feed-forward 1,024 (four times the width,
              where 8/3 is usual: there is slack to carve, and neurons to tell apart)
    small     1.9 M: 5 blocks, 160 wide, 5 heads, feed-forward 432, nothing to spare
    moe       3.7 M: 4 blocks, 128 wide, 4 heads, 8 experts of 256 units of which a token runs 2 (1.3 M at work)

A run resumes from its checkpoint, ends fully annealed, writes training-NAME.json and the artifact that the package ships.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import SHARE, TOKENIZER, batch_at, bytes_per_token, held_out

from netsuke.data.domains import DOMAINS
from netsuke.models.experts import balance_loss
from netsuke.models.llama import BlockShape, Llama, LlamaConfig, half_precision, random_llama
from netsuke.models.save import save_artifact
from netsuke.models.tokenizer import HFTokenizer
from netsuke.train.loop import LoopKnobs, train

HERE = Path(__file__).parent
SHIPPED = HERE.parents[1] / "src/netsuke/weights"
CONTEXT, BATCH, SEED, VOCAB = 512, 16, 0, 2048
COMMON = {"vocab": VOCAB, "context": CONTEXT, "bos": 0, "eos": (0,)}
LLAMAS = {
    "wide": LlamaConfig.uniform(6, 1024, width=256, heads=8, kv_heads=8, head_dim=32, **COMMON),
    "small": LlamaConfig.uniform(5, 432, width=160, heads=5, kv_heads=5, head_dim=32, **COMMON),
    "moe": LlamaConfig(
        blocks=(BlockShape(256, 32, experts=8, active=2),) * 4, width=128, heads=4, kv_heads=4, head_dim=32, **COMMON
    ),
}
MINUTES = {"wide": 75, "small": 25, "moe": 25}
BALANCE = 0.01  # of the experts' balance loss, as in "Switch Transformers" (2021)


def next_token_loss(model: Llama, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def balanced_loss(model: Llama, ids: torch.Tensor) -> torch.Tensor:
    """The next-token loss, and what keeps all experts in use."""
    routed: list[torch.Tensor] = []
    taps = [b.experts.router.register_forward_hook(lambda _, x, y: routed.append(y)) for b in model.blocks]
    try:
        loss = next_token_loss(model, ids)
    finally:
        for tap in taps:
            tap.remove()
    active = model.cfg.blocks[0].active
    return loss + BALANCE * sum(balance_loss(y.float(), active) for y in routed)


@torch.no_grad()
def bits_per_byte(model: Llama, rows: int = 8, split: str = "validation") -> dict[str, float]:
    out = {}
    for domain in DOMAINS:
        loss = float(next_token_loss(model, held_out(domain, CONTEXT, rows, split)))
        out[domain] = round(loss / math.log(2) / bytes_per_token(domain, split), 4)
    return out


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("name", choices=sorted(LLAMAS))
    ask.add_argument("--minutes", type=float, help=f"time limit, by default {MINUTES}")
    ask.add_argument("--checkpoint", type=Path)
    args = ask.parse_args()
    checkpoint = args.checkpoint or HERE / f"{args.name}.ckpt"
    torch.manual_seed(SEED)
    model = random_llama(LLAMAS[args.name], SEED).requires_grad_(True)
    log_path = checkpoint.with_suffix(".log.json")
    log: list[dict] = json.loads(log_path.read_text()) if log_path.exists() else []

    def on_step(step: int, loss: float, rate: float) -> None:
        if step % 100 == 0:
            log.append({"step": step, "loss": round(loss, 4), "rate": round(rate, 4), **bits_per_byte(model)})
            log_path.write_text(json.dumps(log))
            print(log[-1], flush=True)

    knobs = LoopKnobs(steps=100_000, minutes=args.minutes or MINUTES[args.name], bf16=True)
    # rows per expert change from step to step: compiled code would be made anew each time
    loss = balanced_loss if model.cfg.mixture is not None else torch.compile(next_token_loss)
    history = train(
        model, lambda step: batch_at(step, BATCH, CONTEXT), loss, knobs,
        checkpoint=checkpoint, on_step=on_step,
    )  # fmt: skip
    tokens = len(history.steps) * BATCH * CONTEXT
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()), "tokens": tokens, "seconds": round(history.seconds),
        "steps": len(history.steps), "seed": SEED, "share": SHARE, "python": platform.python_version(),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "knobs": knobs.__dict__,
        "bits_per_byte_validation": bits_per_byte(model, 64), "log": log,
    }  # fmt: skip
    (HERE / f"training-{args.name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    provenance = {
        "data": "domains",
        "recipe": "recipes/tinylm",
        "training_log": f"recipes/tinylm/training-{args.name}.json",
    }
    shown = HFTokenizer(TOKENIZER.read_bytes(), bos=0, eos=(0,))
    save_artifact(SHIPPED / f"{args.name}.netsuke", half_precision(model.requires_grad_(False)), shown, provenance, {})
    print(f"done: {tokens:,} tokens in {history.seconds / 60:.1f} min", facts["bits_per_byte_validation"], flush=True)


if __name__ == "__main__":
    main()
