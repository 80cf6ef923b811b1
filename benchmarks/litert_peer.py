"""LiteRT's side of benchmarks/litert.py: a process that runs and times `.tflite` files, asked by lines of JSON.

Needs numpy and ai-edge-litert, nothing else: it may be another environment's Python.

    {"do": "run", "path": …, "xnnpack": false, "inputs": x.npy, "starts": […], "out": y.npz, "keep": k, "tensors": […],
     "before": […]}
        x (n, …): n runs; variables are reset before the runs in `starts`. y.npz holds "y" (n, …) and, of the first k runs,
        "RUN.t" = tensor t of the file after the run, "before.RUN.t" = tensor t ahead of it
    {"do": "time", "path": …, "xnnpack": false, "inputs": x.npy, "runs": n}
        seconds of n runs on x[0], after a few that do not count: by the clock, and of processor time
"""

from __future__ import annotations

import json
import sys
import time
from functools import cache
from importlib.metadata import version
from typing import Any

import ai_edge_litert.interpreter as lite
import numpy as np

WARM = 3  # runs that fill the caches again


def open_model(path: Any, xnnpack: bool = False, keep: bool = True) -> lite.Interpreter:
    """LiteRT's interpreter of a file, one thread. keep: intermediate tensors stay, where the kernels are not XNNPACK's."""
    kw = {} if xnnpack else {"experimental_op_resolver_type": lite.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES}
    made = lite.Interpreter(str(path), num_threads=1, experimental_preserve_all_tensors=keep and not xnnpack, **kw)
    made.allocate_tensors()
    return made


@cache
def timed_model(path: str, xnnpack: bool) -> lite.Interpreter:
    return open_model(path, xnnpack, keep=False)


def run(
    path: str, xnnpack: bool, inputs: str, starts: list[int], out: str, keep: int, tensors: list[int], before: list[int]
) -> dict:
    model, made, ys = open_model(path, xnnpack), {}, []
    start, end = model.get_input_details()[0]["index"], model.get_output_details()[0]["index"]
    for k, x in enumerate(np.load(inputs)):
        if k in starts:
            model.reset_all_variables()
        if k < keep:
            made |= {f"before.{k}.{t}": model.get_tensor(t) for t in before}
        model.set_tensor(start, x[None])
        model.invoke()
        ys.append(model.get_tensor(end)[0])
        if k < keep:
            made |= {f"{k}.{t}": model.get_tensor(t) for t in tensors}
    np.savez(out, y=np.array(ys), **made)
    return {}


def timed(path: str, xnnpack: bool, inputs: str, runs: int) -> dict[str, float]:
    model = timed_model(path, xnnpack)
    model.set_tensor(model.get_input_details()[0]["index"], np.load(inputs)[:1])
    for _ in range(WARM):
        model.invoke()
    clock, busy = time.perf_counter(), time.process_time()
    for _ in range(runs):
        model.invoke()
    return {"clock": time.perf_counter() - clock, "busy": time.process_time() - busy}


def main() -> None:
    print(json.dumps({"litert": version("ai-edge-litert")}), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        print(json.dumps({"run": run, "time": timed}[ask.pop("do")](**ask)), flush=True)


if __name__ == "__main__":
    main()
