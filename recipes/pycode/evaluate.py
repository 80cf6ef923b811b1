"""Scores pycode on the held-out test modules of this interpreter's standard library: `python recipes/pycode/evaluate.py`.

Bits per byte with a sliding window beside `xz -9e` on the same bytes, and the share of greedy 64-token completions of held-out
function headers whose complete lines are Python. Writes evaluation.json beside this file.
"""

from __future__ import annotations

import argparse
import ast
import codeop
import json
import lzma
import math
import warnings
from pathlib import Path

import torch
from corpus import long_lines, training_files

from netsuke.data import pysource
from netsuke.measure.machine import provenance
from netsuke.models.load import Loaded, load
from netsuke.runtime.generate import generate
from netsuke.tasks.language import strided_loss

NEW_TOKENS, PROMPT_TOKENS, FUNCTIONS = 64, 256, 100


def bits_per_byte(loaded: Loaded, text: str) -> float:
    ids = torch.tensor(loaded.tokenizer.encode(text, bos=True))
    context = loaded.model.cfg.context
    nats = strided_loss(loaded.model, ids, context, context // 2) * (len(ids) - 1)
    return nats / math.log(2) / len(text.encode())


def seen_lines(text: str) -> float:
    """Share of the long lines of `text` that occur in the training text: common idioms, and whatever leaked."""
    training = set().union(*(long_lines(t) for phase in (0, 1) for t in training_files(phase=phase)[0]))
    lines = [s for line in text.splitlines() if len(s := line.strip()) >= 30]
    return sum(line in training for line in lines) / len(lines)


def function_headers(split: str) -> list[tuple[str, str, int]]:
    """(module up to and including the header, the header dedented, its depth in columns) of every function."""
    out = []
    for _, body in pysource.modules(split):
        lines = body.splitlines(keepends=True)
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.FunctionDef) and node.body[0].lineno > node.lineno:
                end = node.body[0].lineno - 1
                header = "".join(line[node.col_offset :] for line in lines[node.lineno - 1 : end])
                out.append(("".join(lines[:end]), header, node.col_offset))
    return out


def complete_lines_parse(header: str, depth: int, completion: str) -> bool:
    """Whether the header and the complete lines after it are Python: possibly unfinished, but never wrong, and not empty.

    Lines after the function's end (a next method, say) are not judged.
    """
    body = []
    for line in completion[: completion.rfind("\n") + 1].splitlines():
        if line.strip() and (line[:depth].strip() or not line[depth:].startswith(" ")):
            break
        body.append(line[depth:])
    if not "".join(body).strip():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            codeop.compile_command(header + "\n".join(body) + "\n", symbol="exec")
        except (SyntaxError, ValueError, OverflowError):
            return False
    return True


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--model", default="pycode")
    ask.add_argument("--out", type=Path, default=Path(__file__).parent / "evaluation.json")
    args = ask.parse_args()
    loaded = load(args.model, dtype="float32")
    text = pysource.text("test")
    ours = bits_per_byte(loaded, text)
    xz = 8 * len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)) / len(text.encode())
    seen = seen_lines(text)
    headers = function_headers("test")
    picked = [headers[i * len(headers) // FUNCTIONS] for i in range(FUNCTIONS)]
    good, samples = 0, []
    for before, header, depth in picked:
        ids = loaded.tokenizer.encode(before)[-PROMPT_TOKENS:]
        made = loaded.tokenizer.decode(list(generate(loaded.model, ids, NEW_TOKENS)))
        parses = complete_lines_parse(header, depth, made)
        good += parses
        samples.append({"header": header, "completion": made, "parses": parses})
    out = {
        "test_bytes": len(text.encode()), "test_modules": len(pysource.modules("test")), "bits_per_byte": round(ours, 4),
        "xz_9e_bits_per_byte": round(xz, 4), "fewer_bits_than_xz": round(1 - ours / xz, 4),
        "long_lines_also_in_training_text": round(seen, 4),
        "completions_that_parse": good / len(picked), "completions": len(picked), "samples": samples[::10],
        "run": provenance(),
    }  # fmt: skip
    args.out.write_text(json.dumps(out, indent=1) + "\n")
    print(
        f"bits per byte: pycode {ours:.3f}, xz -9e {xz:.3f} on {out['test_bytes']:,} bytes: {1 - ours / xz:.1%} fewer"
    )
    print(f"lines of 30 characters or more that stand somewhere in the training text too: {seen:.1%}")
    print(f"greedy {NEW_TOKENS}-token completions whose complete lines parse: {good} of {len(picked)}")


if __name__ == "__main__":
    main()
