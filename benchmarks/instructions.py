"""Counts what every kernel costs on an emulated Cortex-M4 and writes the table that predicts it: graph/instructions.json.

    python benchmarks/instructions.py [--out FILE] [--drop]

A sweep of random shapes, and the networks of $NETSUKE_DATA that are there, are exported as C and run with a hook after every
call. A quarter of the sweep is held out of the fit; `errors` says how far the prediction is off there, and which classes were
only fitted. `whole` is of networks: [instructions predicted by a fit to everything but this network, counted].
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from netsuke.data.catalogue import data_root
from netsuke.devices.board import EmulatedBoard
from netsuke.errors import NetsukeError
from netsuke.export.c import write_c
from netsuke.export.c.emulate import ROOM, count_calls, run_emulated
from netsuke.graph.abi import KERNELS, defined_in
from netsuke.graph.abi import sources as sources_of
from netsuke.graph.arena import plan_arena
from netsuke.graph.instructions import OTHER, TABLE, features, general, kernel_class, predicted
from netsuke.graph.ir import Op, QGraph, Tensor
from netsuke.graph.lower import lower, scratch
from netsuke.graph.read import load_graph
from netsuke.measure.machine import provenance
from netsuke.models.files import write_atomically

NETWORKS = ("mlperf-tiny/**/*.tflite", "tflm/*.tflite", "tiny-training/*.npz", "nn4mc/*.hdf5")
ROOT = {"int8": 48 << 10, "float32": 24 << 10}  # elements of the input that every operator of a sweep looks at
HELD_OUT = 0.25  # share of a sweep that the fit does not see
SLACK = 100  # instructions: the clock's steps, which small operators must not be fitted to
FEW_MANY = (2, 34)  # calls of two programs whose code is compared
SHAPES, EACH_LOOP = 28, 28  # of a kind; of each window that depthwise kernels have a loop for
WINDOWS = {
    "conv2d": ((1, 1, 2), (2, 2, 1), (3, 3, 1), (3, 3, 2), (5, 5, 1), (5, 5, 2), (10, 4, 2)),
    "depthwise2d": (
        (3, 3, 1),
        (3, 3, 2),
        (5, 5, 1),
        (5, 5, 2),
        (7, 7, 1),
        (7, 7, 2),
        (4, 2, 1),
        (1, 9, 1),
        (3, 1, 2),
        (9, 1, 1),
    ),
}  # height, width, stride
TYPES = (("int8", "int8"), ("int8", "int4"), ("float32", "float32"), ("float32", "int8"), ("float32", "int4"))


class Row(NamedTuple):
    """One counted operator."""

    network: str
    graph: QGraph
    op: Op
    count: int
    held_out: bool


class Sweep:
    """A graph of operators that have nothing to do with one another: each reads the start of one input."""

    def __init__(self, dtype: str, seed: int):
        self.rng, self.dtype = np.random.default_rng(seed), dtype
        self.graph = QGraph(f"sweep of {dtype}")
        self.root = self.graph.add(self._tensor("x", (1, ROOT[dtype])))
        self.graph.inputs = (self.root,)

    def _tensor(
        self, name: str, shape: tuple[int, ...], view: tuple[int, int] | None = None, scale: float = 0.02
    ) -> Tensor:
        quantized = self.dtype == "int8"
        return Tensor(name, shape, self.dtype, np.float64(scale) if quantized else None, 3 * quantized, view=view)

    def image(self, *shape: int) -> int:
        """A view of the input's start."""
        return self.graph.add(self._tensor("view", (1, *shape), (self.root, 0)))

    def add(self, kind: str, inputs: tuple[int, ...], shape: tuple[int, ...], scale: float = 0.02, **attrs) -> None:
        y = self.graph.append(kind, inputs, self._tensor(f"y{len(self.graph.ops)}", shape, scale=scale), **attrs)
        self.graph.outputs = (y,)

    def weights(self, shape: tuple[int, ...], dtype: str, axis: int) -> tuple[int, int]:
        """Random weights and bias."""
        outs, g = shape[axis], self.graph
        if dtype == "float32":
            w = g.constant("w", self.rng.normal(0, 1, shape).astype(np.float32))
        else:
            top = 7 if dtype == "int4" else 127
            codes = self.rng.integers(-top, top + 1, shape).astype(np.int8)
            w = g.constant("w", codes, dtype=dtype, scale=self.rng.uniform(0.5, 1.0, outs) / top, axis=axis)
        bias = self.rng.integers(-99, 99, outs)
        return w, g.constant("b", bias.astype(np.int32 if self.dtype == "int8" else np.float32))

    def size(self, low: float, high: float) -> int:
        """A whole number, equally often in every octave."""
        return round(float(np.exp(self.rng.uniform(np.log(low), np.log(high)))))

    def linear(self, kind: str, weights: str, largest: int, window: tuple[int, int, int] = (1, 1, 1)) -> None:
        """A random dense layer or (depthwise) convolution of at most `largest` multiply-accumulates. `window`: height, width
        and stride, with same padding."""
        depthwise, rng, (kh, kw, stride) = kind == "depthwise2d", self.rng, window
        if kind == "dense":
            i, o = self.size(4, 400), self.size(4, 160)
            self.add(kind, (self.image(i), *self.weights((o, i), weights, 0)), (1, o), scale=0.02 * i)
            return
        high, wide = (self.size(kh, 30),) * 2 if rng.random() < 0.6 else (self.size(k, 30) for k in window[:2])
        i, o = self.size(4, 120), self.size(4, 160)
        i = (
            int(rng.choice((1, 3)))
            if kind == "conv2d" and rng.random() < 0.25
            else i // 4 * 4
            if rng.random() < 0.7
            else i
        )
        pad = ((kh - 1) // 2, kh // 2, (kw - 1) // 2, kw // 2)
        oh, ow = (high + kh - 1 - kh) // stride + 1, (wide + kw - 1 - kw) // stride + 1
        macs, outs = oh * ow * kh * kw * i * (1 if depthwise else o), i if depthwise else o
        if macs > largest or min(high - kh, wide - kw) < 0 or max(high * wide * i, oh * ow * outs) > ROOT[self.dtype]:
            self.linear(kind, weights, largest, window)
            return
        parts = self.weights((kh, kw, i) if depthwise else (o, kh, kw, i), weights, 2 if depthwise else 0)
        attrs = {"stride": (stride, stride), "pad": pad}
        scale = 0.02 * max(kh * kw * (1 if depthwise else i), 3)
        kind = "conv2d" if kind == "pointwise" else kind
        self.add(kind, (self.image(high, wide, i), *parts), (1, oh, ow, outs), scale=scale, **attrs)

    def pool(self, kind: str) -> None:
        k, stride = int(self.rng.integers(2, 5)), int(self.rng.integers(1, 3))
        side, c = self.size(k, 17), self.size(4, 80)
        out = (side - k) // stride + 1
        self.add(kind, (self.image(side, side, c),), (1, out, out, c), window=(k, k), stride=(stride, stride))

    def plain(self, kind: str, **attrs) -> None:
        """An operator whose output is as large as its input."""
        shape = (1, self.size(1, 12), self.size(1, 12), self.size(4, 90))
        x = self.image(*shape[1:])
        self.add(kind, (x, x) if kind in ("add", "mul") else (x,), shape, **attrs)


def sweeps() -> Iterator[QGraph]:
    for k, (dtype, weights) in enumerate(TYPES):
        for j, kind in enumerate(("dense", "pointwise", "conv2d", "depthwise2d")):
            sweep = Sweep(dtype, 10 * k + j)
            windows = WINDOWS.get(kind, ((1, 1, 1),))
            count = EACH_LOOP * len(windows) if (kind, dtype) == ("depthwise2d", "int8") else SHAPES
            for n in range(count):
                sweep.linear(kind, weights, 400_000 if dtype == "int8" else 100_000, windows[n % len(windows)])
            sweep.graph.name += f" {kind} {weights}"
            yield sweep.graph
    for dtype in ROOT:
        sweep = Sweep(dtype, 99)
        for _ in range(12):
            for kind in ("add", "mul"):
                sweep.plain(kind)
            for kind in ("avgpool2d", "maxpool2d"):
                sweep.pool(kind)
            sweep.add("softmax", (sweep.image(1, 1, n := sweep.size(2, 100)),), (1, 1, 1, n), scale=1 / 256)
            sweep.graph.tensors[-1].zero = -128 if dtype == "int8" else 0
            if dtype == "int8":
                sweep.plain("lut", table=np.arange(-128, 128, dtype=np.int8))
            else:
                for function in ("tanh", "sigmoid"):
                    sweep.plain("unary", function=function)
        yield sweep.graph


def networks() -> Iterator[QGraph]:
    """Networks of the data folder that C can be made of."""
    for pattern in NETWORKS if data_root() else ():
        for path in sorted(data_root().glob(pattern)):
            try:
                graph = load_graph(path)
                lower(graph, plan_arena(graph, scratch))
            except NetsukeError as e:
                print(f"{path.name} is left out: {e.found}", flush=True)
                continue
            yield graph


def counted(graph: QGraph, sweep: bool) -> list[Row]:
    """A row per operator that has calls."""
    program = lower(graph.check(), plan_arena(graph, scratch))
    with tempfile.TemporaryDirectory() as folder:
        write_c(graph, Path(folder) / "c")
        counts = count_calls(Path(folder) / "c")
    total: dict[int, int] = defaultdict(int)
    for call, count in zip(program.calls, counts, strict=True):
        total[call.op] += count
    held_out = np.random.default_rng(len(total)).random(len(total)) < HELD_OUT
    return [
        Row(graph.name, graph, graph.ops[k], n, sweep and bool(held_out[j])) for j, (k, n) in enumerate(total.items())
    ]


def fit(x: np.ndarray, count: np.ndarray) -> list[float]:
    """Non-negative coefficients with the least relative errors."""
    from scipy.optimize import nnls

    scaled = x / (count + SLACK)[:, None]
    size = np.maximum(np.linalg.norm(scaled, axis=0), 1e-30)
    return [float(f"{c:.5g}") for c in nnls(scaled / size, count / (count + SLACK))[0] / size]


def fitted(rows: list[Row]) -> tuple[dict[str, list[float]], dict[str, dict]]:
    """(coefficients, errors) by class."""
    classes, errors = coefficients([r for r in rows if not r.held_out]), {}
    for name, members in sorted(by_class(rows).items()):
        row: dict = {"operators": len(members)}
        if not any(r.held_out for r in members):
            row["fitted_only"] = True
        for what, part in (("", members), ("held_out_", [r for r in members if r.held_out])):
            off = [abs(predicted(classes, r.graph, r.op) - r.count) / (r.count + SLACK) for r in part]
            if off:
                row |= {f"{what}median": round(float(np.median(off)), 4), f"{what}worst": round(float(max(off)), 4)}
        errors[name] = row
    return classes, errors


def by_class(rows: list[Row]) -> dict[str, list[Row]]:
    classes: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        classes[kernel_class(row.graph, row.op)].append(row)
    return classes


def coefficients(seen: list[Row]) -> dict[str, list[float]]:
    """The fit of every class, and of `OTHER` to all operators."""

    def fitting(rows: list[Row], what: Callable[[QGraph, Op], np.ndarray]) -> list[float]:
        return fit(np.array([what(r.graph, r.op) for r in rows]), np.array([r.count for r in rows], np.float64))

    classes = {name: fitting(members, features) for name, members in by_class(seen).items()}
    return dict(sorted((classes | {OTHER: fitting(seen, general)}).items()))


def left_out(rows: list[Row], network: str) -> list[int]:
    """[instructions of a network as predicted without it, counted]; a class that it alone has is predicted as a new one."""
    own = [r for r in rows if r.network == network]
    classes = coefficients([r for r in rows if not r.held_out and r.network != network])
    return [round(sum(predicted(classes, r.graph, r.op) for r in own)), sum(r.count for r in own)]


def code() -> dict:
    """`linked`: {kernel: {source or library: bytes of code it brings into a program}}; of a call; of the rest of a program."""
    linked = {}
    with tempfile.TemporaryDirectory() as temporary:
        base = _linked(Path(temporary) / "none", "")
        for name in sorted(defined_in()):
            parts = _linked(Path(temporary) / name, name)
            linked[name] = {part: size - base.get(part, 0) for part, size in parts.items() if size > base.get(part, 0)}
        few, many = (_own(Path(temporary), calls) for calls in FEW_MANY)
    each = (many - few) / (FEW_MANY[1] - FEW_MANY[0])
    return {"linked": linked, "call": round(each, 1), "run": round(few - each * FEW_MANY[0])}


def _own(folder: Path, calls: int) -> int:
    """Bytes of code of a program of so many calls, without its kernels, constants and parameters."""
    sweep = Sweep("int8", 1)
    for _ in range(calls):
        sweep.plain("lut", table=np.arange(-128, 128, dtype=np.int8))
    flash = write_c(sweep.graph, folder / f"calls{calls}")["flash"]
    return run_emulated(folder / f"calls{calls}", "m4")["parts"]["model"][0] - flash["constants"] - flash["parameters"]


def _linked(out: Path, kernel: str) -> dict[str, int]:
    """Bytes of code by part of a program that holds the kernel's address."""
    out.mkdir()
    held = f"void {kernel}(void);\nvoid (*volatile held)(void) = {kernel};\n" if kernel else ""
    (out / "main.c").write_text(f"int main(void);\n{held}int main(void) {{ return {'held == 0' if kernel else 0}; }}\n")
    sources = [KERNELS / part for part in (sources_of({kernel}) if kernel else ()) if part.endswith(".c")]
    parts = EmulatedBoard.load("m4", **ROOM).build([out / "main.c", *sources], out, include=[KERNELS]).parts
    return {name: size.text + size.data for name, size in parts.items() if name not in ("main", "board")}


def vanished(table: Path, classes: Iterable[str]) -> list[str]:
    """Classes of the table at that place, if there is one, that `classes` lacks."""
    return sorted(set(json.loads(table.read_text())["classes"]) - set(classes)) if table.exists() else []


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--out", type=Path, default=TABLE)
    ask.add_argument("--drop", action="store_true", help="classes that the table has may be missing from the new one")
    args = ask.parse_args()
    graphs = list(networks())
    if not graphs and args.out == TABLE:
        raise SystemExit(
            f"{TABLE.name} stays as it is: it is fitted to the networks of NETSUKE_DATA, of which none is here"
        )
    rows: list[Row] = []
    begin = time.perf_counter()
    for graph in sweeps():
        rows += counted(graph, True)
        print(f"{time.perf_counter() - begin:.0f} s: {graph.name}, {len(graph.ops)} operators", flush=True)
    for graph in graphs:
        rows += counted(graph, False)
        print(f"{time.perf_counter() - begin:.0f} s: {graph.name}, {len(graph.ops)} operators", flush=True)
    classes, errors = fitted(rows)
    whole = {graph.name: left_out(rows, graph.name) for graph in graphs}
    for name, error in errors.items():
        print(f"{name:32}{error}")
    for name, (said, count) in whole.items():
        print(f"{name:32}{count:12,} counted, {said / count - 1:+.1%} predicted without it")
    out = {"classes": classes, "errors": errors, "whole": whole, "code": code(), "run": provenance()}
    gone = vanished(args.out, classes)
    if gone and not args.drop:
        raise SystemExit(f"{args.out.name} stays as it is: {', '.join(gone)} would vanish; --drop if they are to")
    write_atomically(args.out, lambda f: f.write((json.dumps(out, indent=1) + "\n").encode()))


if __name__ == "__main__":
    main()
