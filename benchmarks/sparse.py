"""Input-sparse against dense matrix-vector products of the native engine: same format, same size, alternating in one run.

    python benchmarks/sparse.py [--json]

Every matrix has 32 MB or more and takes turns with a copy, so that none stays in a cache. `share` is the part of the input
channels that is read. Ratios above 1: sparse is faster. Medians of 31 alternating pairs; the whole is repeated five times and
the median of the ratios counts, with the lowest and the highest beside it.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from netsuke.measure.machine import provenance
from netsuke.measure.matvec import sparse_against_dense

RESULT = Path(__file__).parent / "results/sparse.json"
SHAPES = {32: (4096, 4096), 16: (4096, 8192), 8: (8192, 8192), 4: (8192, 8192)}  # bits: outputs, inputs
SHARES = (1.0, 0.75, 0.5, 0.25)
BARS = {(32, 0.5): 1.35, (16, 0.5): 1.35, (4, 0.5): 1.2} | {(bits, 1.0): 0.97 for bits in SHAPES}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    ask.add_argument("--threads", type=int, default=os.cpu_count())
    args = ask.parse_args()
    rows = []
    for bits, (outs, ins) in SHAPES.items():
        for share in SHARES:
            got = sparse_against_dense(outs, ins, bits, share, args.threads)
            row = {
                "bits": bits, "outs": outs, "ins": ins, "share": share, "bar": BARS.get((bits, share)),
                "dense_ms": 1e3 * got.dense, "sparse_ms": 1e3 * got.sparse,
                "ratio": got.ratio, "lowest": got.lowest, "highest": got.highest,
            }  # fmt: skip
            rows.append(row)
            print(
                f"{bits:2} bits, {share:.0%} of the channels: x{got.ratio:.2f} ({got.lowest:.2f} to {got.highest:.2f})"
            )
    if args.json:
        RESULT.write_text(json.dumps({"threads": args.threads, "rows": rows, "run": provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
