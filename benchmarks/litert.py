"""netsuke beside LiteRT on the same int8 `.tflite` files: are the outputs the same, and which is faster?

    python benchmarks/litert.py [--json] [--peer-python PATH] [--only NAME]

PATH is a Python that has ai-edge-litert (default: this one). LiteRT runs with one thread, without XNNPACK (its own kernels,
those of OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES: "off") and with it (its default: "on").
Outputs: the whole network on the inputs named in the table, ours against off and on; off against on is the control: how far
apart LiteRT's own kernels are. Each operator ("op"): on LiteRT's own inputs to it, against off and on.
Inputs are real photographs and sounds where this package can prepare them; where it cannot (MFCC, log-mel spectra of the
training set's recipe) they are smoothed noise over the input's range, which says nothing of a network's accuracy.
Latency: the exported C folder with its Makefile's flags, and the package's library (HostProgram), against LiteRT. The
processes take turns, ROUNDS times, on one input; medians, with the lowest and highest, of processor time a run, which is the
latency on an idle machine and does not count what others do on a shared one. LiteRT is called from Python (about a
microsecond a run). Bars: within one step on 99.9 % of the output's elements; at most 1.5 times off's latency.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
import wave
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.data.catalogue import find
from netsuke.graph import Interpreter, Op, QGraph
from netsuke.graph.host import HostProgram
from netsuke.graph.inputs import pixels_to_codes, square
from netsuke.graph.ops import OPS
from netsuke.graph.read.flatbuffer import Flatbuffer
from netsuke.graph.read.tflite import Import, import_tflite, read_tflite

RESULT = Path(__file__).parent / "results/litert.json"
PEER = Path(__file__).parent / "litert_peer.py"
BARS = {"within_a_step": 0.999, "latency_to_off": 1.5}
ROUNDS, SECONDS = 9, 0.04  # of a turn
OPERATORS = ("operators_to_off", "operators_to_on")
KEPT = 2  # runs whose operators are compared one by one
SOUNDS = ("yes", "no", "noise", "silence")
PHOTOS, RATE = 60, 16000
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
MAIN = """#define _POSIX_C_SOURCE 199309L
#include <stdio.h>
#include <time.h>
#include "model.h"
static double now(clockid_t id) { struct timespec t; clock_gettime(id, &t); return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec; }
static char x[1 << 20];
int main(int n, char **names) {
  FILE *file = n > 1 ? fopen(names[1], "rb") : NULL;
  int runs;
  if (!file || !fread(x, 1, sizeof x, file)) return 1;
  while (scanf("%d", &runs) == 1) {
    for (int k = 0; k < 3; k++) model_run((const void *)x, NULL);
    const double clock = now(CLOCK_MONOTONIC), busy = now(CLOCK_PROCESS_CPUTIME_ID);
    for (int k = 0; k < runs; k++) model_run((const void *)x, NULL);
    printf("{\\"clock\\": %.9g, \\"busy\\": %.9g}\\n", now(CLOCK_MONOTONIC) - clock, now(CLOCK_PROCESS_CPUTIME_ID) - busy);
    fflush(stdout);
  }
  return 0;
}
"""


# Inputs: (codes (n, …), indices of the runs that begin a sequence)
def photos(graph: QGraph) -> tuple[np.ndarray, list[int]]:
    """scikit-learn's two photographs, and photographs of clothes."""
    from sklearn import datasets

    data = [p.read_bytes() for p in sorted((Path(datasets.__file__).parent / "images").glob("*.jpg"))]
    with zipfile.ZipFile(find("mobiletl/clothing128_test.zip")) as file:
        names = sorted(n for n in file.namelist() if n.endswith(".jpg"))
        data += [file.read(n) for n in names[:: len(names) // (PHOTOS - len(data))]][: PHOTOS - len(data)]
    t = graph.tensors[graph.inputs[0]]
    size = t.shape[2:] if t.shape[1] == 3 else t.shape[1:3]
    pixels = np.array([square(d, size, 3, "read a photograph") for d in data])
    return pixels_to_codes(pixels, t, IMAGENET if t.shape[1] == 3 else graph.meta), []


def sounds() -> np.ndarray:
    """(4, 16000) int16"""
    out = []
    for name in SOUNDS:
        with wave.open(io.BytesIO(find(f"tflm/{name}_1000ms.wav").read_bytes())) as f:
            out.append(np.frombuffer(f.readframes(RATE), "<i2"))
    return np.array(out)


def words(graph: QGraph) -> tuple[np.ndarray, list[int]]:
    """Four sounds, each delayed by 0 to 225 ms, through the audio preprocessor of the same source: 49 x 40 features."""
    front, out = HostProgram(read_tflite(find("tflm/audio_preprocessor_int8.tflite"))), []
    for x in sounds():
        for delay in range(0, 4000, 400):
            front.reset()
            late = np.roll(x, delay)
            out.append(np.concatenate([front.run(late[k : k + 480][None])[0] for k in range(0, RATE - 479, 320)]))
    return np.array(out).reshape(-1, *graph.tensors[graph.inputs[0]].shape[1:]), []


def spectra(graph: QGraph) -> tuple[np.ndarray, list[int]]:
    """Magnitudes of four sounds' spectra, 512 samples every 128: four sequences."""
    t = graph.tensors[graph.inputs[0]]
    frames = np.lib.stride_tricks.sliding_window_view(sounds() / 32768, 512, axis=1)[:, ::128]
    x = t.codes(np.abs(np.fft.rfft(frames)))
    return x.reshape(-1, *t.shape[1:]), [k * x.shape[1] for k in range(len(x))]


def noise(graph: QGraph) -> tuple[np.ndarray, list[int]]:
    """Gaussian noise smoothed along the time axis, scaled to the range of codes."""
    from scipy.ndimage import gaussian_filter

    shape = graph.tensors[graph.inputs[0]].shape
    rng = np.random.default_rng(0)
    x = np.array([gaussian_filter(rng.normal(size=shape[1:]), 1.0) for _ in range(100)])
    return np.clip(np.rint(x / x.std() * 60), -128, 127).astype(np.int8), []


def every_code(graph: QGraph) -> tuple[np.ndarray, list[int]]:
    """All 256 codes."""
    return np.arange(-128, 128, dtype=np.int8).reshape(-1, *graph.tensors[graph.inputs[0]].shape[1:]), []


MODELS: dict[str, tuple[str, Callable[[QGraph], tuple[np.ndarray, list[int]]]]] = {
    "ResNet-8": ("mlperf-tiny/image_classification/pretrainedResnet_quant.tflite", photos),
    "person": ("mlperf-tiny/visual_wake_words/vww_96_int8.tflite", photos),
    "MobileNetV2-224": ("mobilenetv2-imagenet-int8/mobilenet_v2_quantized_1x3x224x224.tflite", photos),
    "micro_speech": ("tflm/micro_speech_quantized.tflite", words),
    "DTLN": ("tflm/dtln_noise_suppression.tflite", spectra),
    "keywords": ("mlperf-tiny/keyword_spotting/kws_ref_model.tflite", noise),
    "wake word": ("mlperf-tiny/streaming_wakeword/str_ww_ref_model.tflite", noise),
    "anomaly": ("mlperf-tiny/anomaly_detection/ad01_int8.tflite", noise),
    "hello_world": ("tflm/hello_world_int8.tflite", every_code),
}


def each_operator(
    work: Import, before: Callable[[int], np.ndarray], after: Callable[[int], np.ndarray]
) -> Iterator[tuple[Op, np.ndarray, np.ndarray]]:
    """Every operator on LiteRT's own inputs to it: (operator, our output, LiteRT's output).

    before, after: what a tensor of the file held ahead of LiteRT's run and after it.
    """
    graph, file = work.graph, {ours: theirs for theirs, ours in work.made.items()}
    values: dict[int, np.ndarray | None] = {a: before(file[a]) for a, _ in graph.states} | {-1: None}
    values |= {i: t.data for i, t in enumerate(graph.tensors) if t.constant}
    for op in graph.ops:
        ours = OPS[op.kind].run(graph, op, [values[i] if i in values else after(file[i]) for i in op.inputs])
        if op.outputs[0] in file:
            yield op, ours[0], after(file[op.outputs[0]]).reshape(ours[0].shape)
        else:  # inside what is one operator of the file
            values |= dict(zip(op.outputs, ours))


class Side:
    """A process that answers lines with lines of JSON."""

    def __init__(self, command: list[Any]):
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # its stderr is ours: what it says of a failure is read there

    def answer(self) -> dict[str, Any]:
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{' '.join(self.process.args)} ended (status {self.process.wait()})")
        return json.loads(line)

    def ask(self, question: Any) -> dict[str, Any]:
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Shares of elements that are equal and at most a step apart, and the largest distance."""
    apart = np.abs(a.astype(int) - b)
    return {
        "elements": a.size, "equal": float(np.mean(apart == 0)), "within_a_step": float(np.mean(apart <= 1)),
        "largest": int(apart.max()),
    }  # fmt: skip


def answers(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Of outputs (n, …): their difference, and the share of rows with the same largest element."""
    first, second = (v.reshape(len(v), -1).argmax(1) for v in (a, b))
    return difference(a, b) | {"same_answer": float(np.mean(first == second))}


class Runs:
    """LiteRT's runs of one file on inputs x (n, …)."""

    def __init__(self, peer: Side, path: Path, work: Import, x: np.ndarray, starts: list[int], place: Path):
        self.peer, self.path, self.work, self.place = peer, path, work, place
        self.asked = {"starts": starts, "keep": KEPT, "inputs": str(place / "x.npy"), "out": str(place / "y.npz")}
        self.tensors = [t for t, made in work.made.items() if not work.graph.tensors[made].constant]
        file = {made: t for t, made in work.made.items()}
        self.states = [file[read] for read, _ in work.graph.states]
        np.save(place / "x.npy", x)
        np.save(place / "first.npy", x[:KEPT])

    def whole(self, xnnpack: bool) -> dict[str, np.ndarray]:
        """The outputs "y" (n, …); without XNNPACK every tensor of the first runs as well."""
        tensors = [] if xnnpack else self.tensors
        return self._ask(path=str(self.path), xnnpack=xnnpack, tensors=tensors, before=self.states)

    def inside(self) -> dict[str, np.ndarray]:
        """Every tensor of the first runs with XNNPACK, which keeps only outputs: the file once per tensor, with that output."""
        data, out = bytearray(self.path.read_bytes()), {}
        ends = Flatbuffer(data, str(self.path), "TFL3").root().tables(2)[0].array(2, "i4")
        for t in self.tensors:
            ends[0] = t
            (self.place / "cut.tflite").write_bytes(data)
            out |= self._ask(
                path=str(self.place / "cut.tflite"), inputs=str(self.place / "first.npy"), xnnpack=True, tensors=[t],
                before=self.states,
            )  # fmt: skip
        return out

    def _ask(self, **what: Any) -> dict[str, np.ndarray]:
        self.peer.ask({"do": "run"} | self.asked | what)
        with np.load(self.place / "y.npz") as file:
            return dict(file)


def operators(work: Import, kept: dict[str, np.ndarray]) -> dict[str, Any]:
    """Ours against LiteRT's, operator by operator, over the runs whose tensors were kept."""
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for k in range(KEPT):
        before, after = (partial(lambda start, t: kept[f"{start}.{t}"], start) for start in (f"before.{k}", f"{k}"))
        for op, a, b in each_operator(work, before, after):
            parts[op.kind].append((a.reshape(-1), b.reshape(-1)))
    kinds = {kind: [np.concatenate(v) for v in zip(*pairs)] for kind, pairs in parts.items()}
    return difference(*(np.concatenate(v) for v in zip(*kinds.values()))) | {
        "kinds": {kind: difference(a, b) for kind, (a, b) in kinds.items()}
    }


def outputs(runs: Runs, x: np.ndarray, starts: list[int]) -> dict[str, Any]:
    off, on = runs.whole(xnnpack=False), runs.whole(xnnpack=True)
    graph = runs.work.graph
    host, parts = HostProgram(graph), []
    for begin, end in zip(starts or [0], [*starts[1:], len(x)]):
        host.reset()
        parts += [host.run(x[k : k + 1])[0] for k in range(begin, end)]
    ours, reference = np.concatenate(parts), Interpreter(graph)
    for k in range(KEPT):
        if not np.array_equal(reference.run(x[k : k + 1])[0][0], ours[k]):
            raise SystemExit(f"{graph.name}: the library and the reference give different outputs")
    return {
        "runs": len(x), "to_off": answers(ours, off["y"]), "to_on": answers(ours, on["y"]),
        "off_to_on": answers(off["y"], on["y"]), "operators_to_off": operators(runs.work, off),
        "operators_to_on": operators(runs.work, runs.inside()),
    }  # fmt: skip


def exported(graph: QGraph, place: Path) -> Side:
    """The C folder, built with its Makefile's flags, as a process that times runs on x.bin."""
    from netsuke.export.c import write_c

    write_c(graph, place / "c", name="model")
    (place / "c/test/model_test.c").write_text(MAIN)
    made = subprocess.run(["make", "-s", "-C", place / "c", "test/model_test"], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(made.stderr)
    return Side([place / "c/test/model_test", place / "x.bin"])


def spread(name: str, v: np.ndarray) -> dict[str, float]:
    return {name: float(np.median(v)), "lowest": float(v.min()), "highest": float(v.max())}


def latency(peer: Side, path: Path, graph: QGraph, x: np.ndarray, place: Path) -> dict[str, Any]:
    (place / "x.bin").write_bytes(x[0].tobytes())
    folder, host = exported(graph, place), HostProgram(graph)
    host.run(x[:1])

    def package(runs: int) -> dict[str, float]:
        host.step()
        clock, busy = time.perf_counter(), time.process_time()
        for _ in range(runs):
            host.step()
        return {"clock": time.perf_counter() - clock, "busy": time.process_time() - busy}

    def litert(xnnpack: bool) -> Callable[[int], dict[str, float]]:
        ask = {"do": "time", "path": str(path), "xnnpack": xnnpack, "inputs": str(place / "x.npy")}
        return lambda runs: peer.ask(ask | {"runs": runs})

    sides = {"c": folder.ask, "package": package, "off": litert(False), "on": litert(True)}
    runs = {name: max(3, int(SECONDS / (side(5)["busy"] / 5 + 1e-7))) for name, side in sides.items()}
    rounds = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            rounds[name].append(side(runs[name]))
    folder.close()
    out: dict[str, Any] = {}
    ms = {name: np.array([1e3 * r["busy"] / runs[name] for r in rounds[name]]) for name in sides}
    for name, v in ms.items():
        clock = np.median([1e3 * r["clock"] / runs[name] for r in rounds[name]])
        out[name] = spread("ms", v) | {"clock_ms": float(clock)}
    for ours, theirs in (("c", "off"), ("c", "on"), ("package", "off"), ("package", "on")):
        out[f"{ours}_to_{theirs}"] = spread("ratio", ms[ours] / ms[theirs])
    return out


def measure(name: str, peer: Side) -> dict[str, Any]:
    file, inputs = MODELS[name]
    work = import_tflite(find(file))
    x, starts = inputs(work.graph)
    with tempfile.TemporaryDirectory() as folder:
        row = {"name": name, "file": file, "macs": work.graph.macs(), "inputs": inputs.__doc__}
        row["outputs"] = outputs(Runs(peer, find(file), work, x, starts, Path(folder)), x, starts)
        row["latency"] = latency(peer, find(file), work.graph, x, Path(folder))
    row["met"] = {
        "outputs_to_off": row["outputs"]["to_off"]["within_a_step"] >= BARS["within_a_step"],
        "outputs_to_on": row["outputs"]["to_on"]["within_a_step"] >= BARS["within_a_step"],
        "operators": all(row["outputs"][k]["within_a_step"] >= BARS["within_a_step"] for k in OPERATORS),
        "latency_to_off": row["latency"]["c_to_off"]["ratio"] <= BARS["latency_to_off"],
    }
    return row


def line(row: dict[str, Any]) -> str:
    o, t = row["outputs"], row["latency"]
    shares = [f"{100 * o[k]['within_a_step']:6.2f}" for k in ("to_off", "to_on", "off_to_on", *OPERATORS)]
    times = [f"{t[k]['ms']:8.4f}" for k in ("c", "package", "off", "on")]
    return f"{row['name']:16}{' '.join(shares)} {' '.join(times)}  x{t['c_to_off']['ratio']:.2f} x{t['c_to_on']['ratio']:.2f}"


def has_peer(python: str) -> bool:
    """Whether that Python has ai-edge-litert. SystemExit where there is no such Python."""
    find_it = "import importlib.util as u, sys; sys.exit(u.find_spec('ai_edge_litert') is None)"
    try:
        return not subprocess.run([python, "-c", find_it]).returncode
    except OSError as e:
        raise SystemExit(f"--peer-python {python}: {e.strerror}") from None


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    ask.add_argument("--peer-python", default=sys.executable, help="a Python with ai-edge-litert")
    ask.add_argument("--only", choices=MODELS, action="append")
    args = ask.parse_args()
    if args.json and args.only:
        ask.error(f"--json writes all rows of {RESULT.name}: leave out --only")
    if not has_peer(args.peer_python):
        print(
            f"LiteRT is skipped: {args.peer_python} has no ai-edge-litert; pip install -c constraints.txt 'netsuke[peers]'"
        )
        return
    peer = Side([args.peer_python, PEER])
    versions = peer.answer()
    print(f"{'within a step, %':16}   off     on off/on op:off  op:on | ms: C  package      off       on  C/off C/on")
    rows = []
    for name in args.only or MODELS:
        rows.append(measure(name, peer))
        print(line(rows[-1]), flush=True)
    peer.close()
    if args.json:
        from netsuke.measure.machine import provenance
        from netsuke.models.files import write_atomically

        out = {"bars": BARS, "rounds": ROUNDS, "rows": rows, **versions, "run": provenance()}
        write_atomically(RESULT, lambda f: f.write((json.dumps(out, indent=1) + "\n").encode()))


if __name__ == "__main__":
    main()
