"""Every pair of methods, in the documented order, on every shipped model: composes (finite answers, saved and read back alike) or
is refused by a sentence that names what is in the way.

    python benchmarks/matrix.py [--model NAME ...] [--json]

Strengths are mild and texts short (windows of 64 tokens): what is checked is that methods fit together, not what they lose.
tests/compress/test_pairs.py holds the same pairs to the same rule on small random models with every run of the tests.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from netsuke.compress.method import Method, registry
from netsuke.data.domains import documents
from netsuke.errors import NetsukeError
from netsuke.measure.machine import provenance
from netsuke.models.files import write_atomically
from netsuke.models.load import load, load_encoder
from netsuke.models.places import MANIFEST
from netsuke.models.save import save_artifact
from netsuke.tasks.language import LanguageModeling

RESULT = Path(__file__).parent / "results/matrix.json"
MODELS = ("pycode", "wide", "small", "moe", "encoder")
ORDER = ("inherit", "modegpt", "factorize", "quantize", "zeroqat", "mobilequant", "sparsify", "heal")
MILD: dict[str, dict[str, Any]] = {
    "inherit": {"keep": 0.8, "steps": 2, "calibration": 4}, "modegpt": {"remove": 0.1, "calibration": 8},
    "factorize": {"rank": 0.8, "calibration": 8}, "quantize": {"bits": 4, "calibration": 8},
    "zeroqat": {"w": 4, "group": 64, "steps": 2, "batch": 4, "warm": 0, "calibration": 4, "every": 2, "validation": 1},
    "mobilequant": {"calibration": 4, "learn": "off"}, "sparsify": {"sparsity": 0.2, "calibration": 8},
    "heal": {"steps": 2, "batch": 4},
}  # fmt: skip
CONTEXT, WINDOWS = 64, 16


def opened(name: str) -> tuple[torch.nn.Module, LanguageModeling]:
    """A shipped model in float32 and a short text task: writing of the standard domains, split by document."""
    loaded = load_encoder(name) if name == "encoder" else load(name)
    parts = {}
    for split in ("train", "validation", "test"):
        parts[split] = "".join(itertools.islice(documents("coding", split), 3))[: 8 * CONTEXT * WINDOWS]
    task = LanguageModeling(parts, loaded.tokenizer, CONTEXT, batch=4, source="coding")
    return loaded.model.float(), task


def answers(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids)


def cell(
    made: torch.nn.Module | str, method: Method, ids: torch.Tensor, task: LanguageModeling, before: torch.nn.Module
) -> Any:
    """The model after one more method, or the sentence that refused it."""
    if isinstance(made, str):
        return made
    try:
        more = {"before": before} if method.name == "heal" else {}
        return method.apply(made, task, **more)
    except NetsukeError as e:
        return str(e)


def proved(model: torch.nn.Module, ids: torch.Tensor, encoder: bool) -> None:
    """Raises AssertionError unless the model answers with finite numbers and is read back with the same ones."""
    want = answers(model, ids)
    assert bool(want.isfinite().all()), "answers are not finite"
    with tempfile.TemporaryDirectory() as folder:
        path = save_artifact(Path(folder) / "both", model, None, {}, {})
        assert (path / MANIFEST).is_file()
        again = (load_encoder if encoder else load)(path).model
        # shipped weights are stored in the dtype that they have here, float32, so answers are the same to the bit
        assert torch.equal(answers(again, ids), want), "read back, it answers otherwise"


def cells(name: str) -> Iterator[dict[str, Any]]:
    model, task = opened(name)
    ids = task.windows("validation")[:2, :-1]
    methods = {n: registry()[n](**MILD[n]) for n in ORDER}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in ORDER:
            begin = time.monotonic()
            first = cell(model, methods[one], ids, task, model)
            for two in (None, *ORDER[ORDER.index(one) + 1 :]):
                both = first if two is None else cell(first, methods[two], ids, task, model)
                row: dict[str, Any] = {"model": name, "methods": [one] if two is None else [one, two]}
                if isinstance(both, str):
                    row |= {"composes": False, "why": both}
                else:
                    proved(both, ids, name == "encoder")
                    row |= {"composes": True}
                yield row | {"seconds": round(time.monotonic() - begin, 1)}
                begin = time.monotonic()
                if isinstance(first, str):
                    break


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--model", action="append", choices=MODELS, help="these models alone; nothing is written")
    ask.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    args = ask.parse_args()
    if args.json and args.model:
        ask.error(f"--json writes all models of {RESULT.name}: leave out --model")
    rows = []
    for name in args.model or MODELS:
        for row in cells(name):
            rows.append(row)
            said = "composes" if row["composes"] else row["why"]
            print(f"{name:8} {' then '.join(row['methods']):26} {said}  ({row['seconds']} s)", flush=True)
    whole = [r for r in rows if r["composes"]]
    print(f"{len(whole)} of {len(rows)} compose, {len(rows) - len(whole)} are refused with a reason")
    if args.json:
        out = {"rows": rows, "settings": MILD, "run": provenance()}
        write_atomically(RESULT, lambda f: f.write((json.dumps(out, indent=1) + "\n").encode()))


if __name__ == "__main__":
    main()
