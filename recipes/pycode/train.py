"""Trains pycode, the model that netsuke ships: `python recipes/pycode/train.py --minutes 106`.

A Llama of 6.5 M parameters (256 wide, 6 layers, 8 heads on 2 key heads, feed-forward 1024: four times the width where
8/3 is usual, so that there is slack to carve), 1,024 tokens of context, two phases: a mixture of Python sources, then
mostly the standard library while the rate falls.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import training_files
from tokenizers import Tokenizer

from netsuke.data import pysource
from netsuke.models.llama import Llama, LlamaConfig, half_precision, random_llama
from netsuke.models.save import save_artifact
from netsuke.models.tokenizer import HFTokenizer
from netsuke.train.loop import LoopKnobs, train

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "src/netsuke/weights/pycode.netsuke"  # the shipped artifact
CONTEXT, BATCH, SEED = 1024, 8, 0
SECOND_PHASE = 1400  # the step from which the library-heavy text is read: about when the rate begins to fall


def config(vocab: int) -> LlamaConfig:
    return LlamaConfig.uniform(
        6, 1024, vocab=vocab, width=256, heads=8, kv_heads=2, head_dim=32, context=CONTEXT, bos=0, eos=(0,)
    )


def token_stream(tokenizer: Tokenizer, phase: int) -> tuple[torch.Tensor, dict[str, int]]:
    """All training files of a phase in shuffled order as one row of ids, each file opened by <|file|> (id 0)."""
    files, sources = training_files(SEED, phase)
    ids: list[int] = []
    for start in range(0, len(files), 500):
        for coded in tokenizer.encode_batch(files[start : start + 500]):
            ids.append(0)
            ids.extend(coded.ids)
    return torch.tensor(ids, dtype=torch.int16), sources


def next_token_loss(model: Llama, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--minutes", type=float, default=106)
    ask.add_argument("--checkpoint", type=Path, default=HERE / "pycode.ckpt")
    args = ask.parse_args()
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    phases = [token_stream(tokenizer, phase) for phase in (0, 1)]
    # Rows are cut in order and dealt in strides, so that one batch mixes distant files.
    strides = [(len(stream) - 1) // CONTEXT // BATCH for stream, _ in phases]
    steps = SECOND_PHASE + strides[1]
    print([f"{len(stream):,} tokens" for stream, _ in phases], f"{steps} steps at most", flush=True)

    def batch_at(step: int) -> torch.Tensor:
        phase = int(step >= SECOND_PHASE)
        stream, stride = phases[phase][0], strides[phase]
        picks = [(step - phase * SECOND_PHASE + k * stride) * CONTEXT for k in range(BATCH)]
        return torch.stack([stream[p : p + CONTEXT + 1].long() for p in picks])

    torch.manual_seed(SEED)
    model = random_llama(config(tokenizer.get_vocab_size()), SEED).requires_grad_(True)
    held = tokenizer.encode(pysource.text("validation")).ids
    held = torch.tensor(held[: len(held) // (CONTEXT + 1) * (CONTEXT + 1)]).view(-1, CONTEXT + 1)[:16]
    log: list[dict] = []
    log_path = args.checkpoint.with_suffix(".log.json")
    if log_path.exists():
        log = json.loads(log_path.read_text())

    def on_step(step: int, loss: float, rate: float) -> None:
        if step % 100 == 0 or step == steps:
            with torch.no_grad():
                valid = float(next_token_loss(model, held))
            log.append({"step": step, "loss": round(loss, 4), "validation": round(valid, 4), "rate": round(rate, 4)})
            log_path.write_text(json.dumps(log))
            print(log[-1], flush=True)

    knobs = LoopKnobs(steps=steps, minutes=args.minutes, bf16=True)
    history = train(model, batch_at, torch.compile(next_token_loss), knobs, checkpoint=args.checkpoint, on_step=on_step)
    tokens = len(history.steps) * BATCH * CONTEXT
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()), "tokens": tokens, "seconds": round(history.seconds),
        "steps": len(history.steps), "seed": SEED, "second_phase": SECOND_PHASE,
        "bytes_of_one_pass": [sources for _, sources in phases], "python": platform.python_version(),
        "torch": torch.__version__, "knobs": knobs.__dict__, "log": log,
    }  # fmt: skip
    (HERE / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    ship(model)
    print(f"done: {tokens:,} tokens in {history.seconds / 60:.1f} min", flush=True)


def ship(model: Llama) -> None:
    """Writes the artifact that the package carries: 16-bit weights, the tokenizer, where they come from."""
    provenance = {"data": "python-library", "recipe": "recipes/pycode", "training_log": "recipes/pycode/training.json"}
    tokenizer = HFTokenizer((HERE / "tokenizer.json").read_bytes(), bos=0, eos=(0,))
    save_artifact(OUT, half_precision(model.requires_grad_(False)), tokenizer, provenance, {})


if __name__ == "__main__":
    main()
