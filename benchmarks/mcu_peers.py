"""Instructions and flash of this package's C beside other makers' on the same emulated Cortex-M4, compiler and weights.

    python benchmarks/mcu_peers.py [--tinyengine CHECKOUT] [--cmsis-nn CHECKOUT] [--emlearn PYTHON] [--json]

TinyEngine: a checkout of mit-han-lab/tinyengine with its submodule CMSIS. Its own code generator writes mcunet-5fps, and every
layer's output is held to what this package computes from the same inputs. CMSIS-NN: a checkout of ARM-software/CMSIS-NN, whose
kernels are called layer by layer for the same network. emlearn: a Python in which emlearn and scikit-learn
are installed; it trains and converts small networks for digits, which are then also written by this package. What is absent is
skipped with a sentence. Nothing of theirs is part of this package.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.data.catalogue import find, missing
from netsuke.devices.board import PREFIX, EmulatedBoard, Run
from netsuke.export.c import write_c
from netsuke.export.c.emulate import ROOM, count_calls, run_emulated
from netsuke.graph import Interpreter, Op, QGraph, Tensor
from netsuke.graph.ops import OPS
from netsuke.graph.quantize import quantize, weights_only
from netsuke.graph.read import load_graph
from netsuke.measure.machine import provenance
from netsuke.models.files import write_atomically

RESULT = Path(__file__).parent / "results/mcu_peers.json"
NETWORK = "tiny-training/mcunet-5fps.npz"
FLAGS = ("-O2", "-O3", "-Ofast")
SMALL = ("-Os", "-O2", "-O3")
SHAPES = {"64-32-10": (32,), "64-10-10-10": (10, 10)}  # hidden layers of the networks for emlearn
HEADERS = ("TinyEngine/include", "TinyEngine/third_party/CMSIS/CMSIS/NN/Include",
           "TinyEngine/third_party/CMSIS/CMSIS/DSP/Include", "TinyEngine/third_party/CMSIS/CMSIS/Core/Include")  # fmt: skip
KERNELS = ("TinyEngine/src/kernels/*/*.c", "TinyEngine/third_party/CMSIS/CMSIS/NN/Source/*/*.c")

INFERENCE = """#include "board.h"
#include "genNN.h"
void ns_layer(int layer, const void *at, int bytes);
static int out;
static uint64_t since, spent[%(layers)d];
void ns_layer(int layer, const void *at, int bytes) {
  spent[layer] = ns_instructions() - since;
  if (out) ns_write(out, at, bytes);
  since = ns_instructions();
}
int main(void) {
  const int in = ns_open("input.bin", "rb");
  ns_read(in, getInput(), %(bytes)d);
  const uint64_t start = since = ns_instructions();
  invoke(0);
  ns_print_count("run", ns_instructions() - start);
  for (int k = 0; k < %(layers)d; k++) ns_print_count("call", spent[k]);
  ns_read(ns_open("input.bin", "rb"), getInput(), %(bytes)d);
  out = ns_open("output.bin", "wb");
  invoke(0);
  ns_close(out);
  return 0;
}
"""

TRAIN = """import sys, warnings, numpy as np
warnings.filterwarnings("ignore")
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
import emlearn, emlearn.net
np.seterr(all="ignore")
x, y = load_digits(return_X_y=True)
x = (x / 16).astype(np.float32)
model = MLPClassifier(eval(sys.argv[1]), max_iter=150, random_state=0).fit(x[:1500], y[:1500])
out, arrays = sys.argv[2], {"x": x[1500:], "y": y[1500:], "seen": x[:200]}
kinds = ["identity", "relu", "logistic", "softmax", "tanh"]
made = emlearn.convert(model, method="loadable")
made.save(file=f"{out}/loadable.h", name="mlp", inference=["loadable"])
# 0.23.2 writes the name of an enumerator where its inline way takes a number only
emlearn.net.c_activation_function = kinds.index
made.save(file=f"{out}/inline.h", name="mlp", inference=["inline"])
for k, (w, b) in enumerate(zip(model.coefs_, model.intercepts_)):
    arrays |= {f"w{k}": w.T.astype(np.float32), f"b{k}": b.astype(np.float32)}
np.savez(f"{out}/arrays.npz", **arrays)
print(emlearn.includedir, emlearn.__version__)
"""

CLASSIFY = """#include "board.h"
%(include)s
static %(type)s x[%(inputs)d];
int main(void) {
  const int in = ns_open("input.bin", "rb"), out = ns_open("output.bin", "wb");
  while (ns_read(in, x, sizeof x) == sizeof x) {
    int32_t label = x[0] > 0;
    const uint64_t start = ns_instructions();
    for (int k = 0; k < 20; k++) { %(call)s }
    ns_print_count("run", ns_instructions() - start);
    ns_write(out, &label, sizeof label);
  }
  return 0;
}
"""


@contextmanager
def inside(folder: Path, path: Path) -> Iterator[None]:
    """Runs in `folder` with `path` first among the places of modules, and says nothing."""
    here = Path.cwd()
    os.chdir(folder)
    sys.path.insert(0, str(path))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        os.chdir(here)
        sys.path.remove(str(path))


def board() -> EmulatedBoard:
    return EmulatedBoard.load("m4", **ROOM)


def labelled(run: Run, label: str) -> list[int]:
    return [int(line.split()[1]) for line in run.text.splitlines() if line.startswith(f"{label} ")]


def tinyengine_layers(graph: QGraph) -> list[Any]:
    """The network as layers of TinyEngine's code generator, whose modules are importable."""
    from code_generator.operators import add, avgpool2d, conv2d, depthwiseConv2d

    def ends(prefix: str, index: int) -> dict[str, Any]:
        t = graph.tensors[index]
        shape = dict(zip((f"{prefix}_h", f"{prefix}_w", f"{prefix}_c"), t.shape[1:]))
        return shape | {f"{prefix}_idx": f"t{index}", f"{prefix}_zero_point": t.zero, f"{prefix}_scale": float(t.scale)}

    layers: list[Any] = []
    for op in executed(graph):
        params = {"input_dim": 3, "output_dim": 3, **ends("input", op.inputs[0]), **ends("output", op.outputs[0])}
        if op.kind == "add":
            layers.append(add.Add({"op": "ADD", "input2_dim": 3, **params, **ends("input2", op.inputs[1])}))
        elif op.kind == "avgpool2d":
            kh, kw = op.attrs["window"]
            pool = {"op": "AVERAGE_POOL_2D", "filter_h": kh, "filter_w": kw, "stride_h": kh, "stride_w": kw}
            pool |= {"pad_h": 0, "pad_w": 0}
            layers.append(avgpool2d.AvgPool2d(params | pool))
        else:
            x, y = graph.tensors[op.inputs[0]], graph.tensors[op.outputs[0]]
            w, b = graph.tensors[op.inputs[1]], graph.tensors[op.inputs[2]]
            depthwise = op.kind == "depthwise2d"
            ratio = float(x.scale) * np.atleast_1d(w.scale) / float(y.scale)
            fraction, shift = np.frexp(ratio)
            multiplier = np.minimum(np.rint(fraction * 2.0**31), 2**31 - 1).astype(np.int64)
            kh, kw = w.shape[:2] if depthwise else w.shape[1:3]
            params |= {
                "op": "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", "kernel_h": kh, "kernel_w": kw, "padding": kh // 2,
                "stride_h": op.attrs["stride"][0], "stride_w": op.attrs["stride"][1], "weight_value": w.data.astype(np.int64),
                "bias": b.data.astype(np.int64), "effective_scale": ratio, "weight_scale": w.scale, "multiplier": multiplier,
                "shift": shift,
            }  # fmt: skip
            layers.append((depthwiseConv2d.DepthwiseConv2d if depthwise else conv2d.Conv2d)(params))
    return layers


def executed(graph: QGraph) -> list[Op]:
    return [op for op in graph.ops if op.kind != "reshape"]


def tinyengine_sources(graph: QGraph, checkout: Path, out: Path, floating: bool) -> list[Path]:
    """The C sources of the network as TinyEngine generates them, with a hook after every layer.

    floating: its rescaling in float32, which its own examples use; else in integers."""
    with inside(out, checkout):
        from code_generator.CodeGenerator import CodeGenerator
        from code_generator.GeneralMemoryScheduler import GeneralMemoryScheduler

        layers = tinyengine_layers(graph)
        memory = GeneralMemoryScheduler(layers, False, False, outputTables=[], inplace=True, mem_visual_path="memory.png",
                                        VisaulizeTrainable=False)  # fmt: skip
        memory.allocateMemory()
        CodeGenerator(memory, True, fp_requantize=floating, outputTables=[]).codeGeneration()
    model = out / "codegen/Source/genModel.c"
    before, body = model.read_text().split("void invoke(float* labels){\n")
    body, after = body.split("\n}\n", 1)
    pieces = re.split(r"(/\* layer \d+:\w+ \*/\n)", body)[1:]
    hooked = ""
    for k, (op, layer) in enumerate(zip(executed(graph), layers, strict=True)):
        at, size = layer.params["output_buf_add_offset"], graph.tensors[op.outputs[0]].bytes
        hooked += f"{pieces[2 * k]}{pieces[2 * k + 1]}\nns_layer({k}, &buffer0[{at}], {size});\n"
    hook = "void ns_layer(int layer, const void *at, int bytes);\n"
    model.write_text(f"{before}{hook}void invoke(float* labels){{\n{hooked}\n}}\n{after}")
    for path in (out / "codegen/Source").glob("depthwise*.c"):  # which lack the header of the integer rescaling
        path.write_text('#include "arm_nnsupportfunctions.h"\n' + path.read_text())
    theirs = [p for pattern in KERNELS for p in sorted(checkout.glob(pattern))]
    return [model, *needed(model, [*(out / "codegen/Source").glob("*.c"), *theirs])]


def needed(model: Path, kernels: list[Path]) -> list[Path]:
    """The kernel sources with the functions that `model` calls, and those that these call."""
    texts = {p: re.sub(r"/\*.*?\*/", "", p.read_text(errors="replace"), flags=re.S) for p in kernels if p != model}
    defined = {
        name: p for p, text in texts.items() for name in re.findall(r"^[\w *]*?\b(\w+)\s*\([^;{}]*\)\s*\{", text, re.M)
    }
    waiting, found = [model], []
    while waiting:
        text = texts.get(p := waiting.pop()) or p.read_text()
        for name in set(re.findall(r"\b(\w+)\s*\(", text)) & set(defined):
            if defined[name] not in (*found, model):
                found.append(defined[name])
                waiting.append(defined[name])
    return found


def agreement(graph: QGraph, image: np.ndarray, dumped: bytes) -> dict[str, Any]:
    """How far each layer's output is from this package's for the same inputs, in steps of its scale."""
    values, at, worst, off, total = {graph.inputs[0]: image}, 0, 0, 0, 0
    far = []
    for op in executed(graph):
        y = graph.tensors[op.outputs[0]]
        inputs = [values[i] if i in values else graph.tensors[i].data for i in op.inputs]
        ours = OPS[op.kind].run(graph, op, inputs)[0]
        theirs = np.frombuffer(dumped, np.int8, y.size, at).reshape(y.shape)
        values[op.outputs[0]] = theirs
        at += y.size
        steps = np.abs(ours.astype(int) - theirs)
        worst, off, total = max(worst, int(steps.max())), off + int((steps > 1).sum()), total + y.size
        if steps.max() > 1:
            far.append(op.name or op.kind)
    return {"worst_steps": worst, "beyond_one_step": off / total, "layers_beyond_one_step": far}


def cmsis_sources(graph: QGraph, checkout: Path, out: Path) -> list[Path]:
    """C that calls CMSIS-NN's kernels layer by layer with the network's weights, and the kernels."""
    arrays, calls = [], []

    def array(kind: str, data: np.ndarray) -> str:
        numbers = ",".join(map(str, data.astype(np.int64).reshape(-1).tolist()))
        arrays.append(f"static const {kind} a{len(arrays)}[] = {{{numbers}}};\n")
        return f"({kind} *)a{len(arrays) - 1}"

    def scaled(ratio: Any) -> tuple[np.ndarray, np.ndarray]:
        fraction, shift = np.frexp(np.atleast_1d(np.asarray(ratio, np.float64)))
        return np.minimum(np.rint(fraction * 2.0**31), 2**31 - 1).astype(np.int64), shift

    def dims(*shape: int) -> str:
        return f"&(cmsis_nn_dims){{{', '.join(map(str, shape))}}}"

    for k, op in enumerate(executed(graph)):
        x, y, t = graph.tensors[op.inputs[0]], graph.tensors[op.outputs[0]], graph.tensors
        source, target, clip = f"t{op.inputs[0]}", f"t{op.outputs[0]}", "{-128, 127}"
        if op.kind == "add":
            b, top = t[op.inputs[1]], 2 * max(float(t[i].scale) for i in op.inputs)
            ((m1,), (s1,)), ((m2,), (s2,)) = (scaled(float(t[i].scale) / top) for i in op.inputs)
            (m,), (s,) = scaled(top / (2**20 * float(y.scale)))
            call = (f"arm_elementwise_add_s8({source}, t{op.inputs[1]}, {-x.zero}, {m1}, {s1}, {-b.zero}, {m2}, {s2}, 20, "
                    f"{target}, {y.zero}, {m}, {s}, -128, 127, {y.size})")  # fmt: skip
        elif op.kind == "avgpool2d":
            kh, kw = op.attrs["window"]
            call = (f"arm_avgpool_s8(&ctx, &(cmsis_nn_pool_params){{{{{kw}, {kh}}}, {{0, 0}}, {clip}}}, {dims(*x.shape)}, "
                    f"{source}, {dims(1, kh, kw, 1)}, {dims(*y.shape)}, {target})")  # fmt: skip
        else:
            w, bias, deep = t[op.inputs[1]], t[op.inputs[2]], op.kind == "depthwise2d"
            m, s = scaled(float(x.scale) * np.atleast_1d(w.scale) / float(y.scale))
            (sy, sx), (top, _, left, _) = op.attrs["stride"], op.attrs["pad"]
            kind, struct, times = ("depthwise_conv", "dw_conv", "1, ") if deep else ("convolve", "conv", "")
            call = (f"arm_{kind}_wrapper_s8(&ctx, &(cmsis_nn_{struct}_params){{{-x.zero}, {y.zero}, {times}{{{sx}, {sy}}}, "
                    f"{{{left}, {top}}}, {{1, 1}}, {clip}}}, "
                    f"&(cmsis_nn_per_channel_quant_params){{{array('int32_t', m)}, {array('int32_t', s)}}}, {dims(*x.shape)}, "
                    f"{source}, {dims(1, *w.shape) if deep else dims(*w.shape)}, {array('int8_t', w.data)}, "
                    f"{dims(1, 1, 1, bias.size)}, {array('int32_t', bias.data)}, {dims(*y.shape)}, {target})")  # fmt: skip
        calls.append(f'if ({call}) ns_print("failed {k}\\n");\nns_layer({k}, {target}, {y.size});\n')
    used = [graph.inputs[0], *(op.outputs[0] for op in executed(graph))]
    tensors = "".join(f"static int8_t t{i}[{graph.tensors[i].size}] __attribute__((aligned(4)));\n" for i in used)
    (out / "genNN.h").write_text("signed char *getInput(void);\nvoid invoke(float *labels);\n")
    model = out / "model.c"
    model.write_text(
        '#include "arm_nnfunctions.h"\n#include "board.h"\n#include "genNN.h"\n'
        "void ns_layer(int layer, const void *at, int bytes);\nstatic int32_t room[1 << 16];\n"
        f"{tensors}{''.join(arrays)}signed char *getInput(void) {{ return t{graph.inputs[0]}; }}\n"
        f"void invoke(float *labels) {{\nconst cmsis_nn_context ctx = {{room, sizeof room}};\n(void)labels;\n{''.join(calls)}}}\n"
    )
    return [model, *needed(model, sorted(checkout.glob("Source/*/*.c")))]


def networks(engine: Path | None, cmsis: Path | None) -> dict[str, Any]:
    """Instructions of one inference of mcunet-5fps, by layer, theirs and ours."""
    graph = load_graph(find(NETWORK))
    image = np.random.default_rng(0).integers(-128, 128, graph.tensors[graph.inputs[0]].shape).astype(np.int8)
    ops, rows, by_layer, makers = executed(graph), [], {}, {}
    if engine:
        for name, floating in (("TinyEngine, float rescaling", True), ("TinyEngine, integer rescaling", False)):
            make = partial(tinyengine_sources, graph, engine, floating=floating)
            makers[name] = (make, ["codegen/Include", *(engine / h for h in HEADERS)])
    if cmsis:
        makers["CMSIS-NN"] = (partial(cmsis_sources, graph, cmsis), ["", cmsis / "Include", cmsis])
    with tempfile.TemporaryDirectory() as temporary:
        for name, (make, include) in makers.items():
            for flags in FLAGS:
                out = Path(tempfile.mkdtemp(dir=temporary))
                sources = make(out=out)
                (out / "main.c").write_text(INFERENCE % {"layers": len(ops), "bytes": image.size})
                firmware = board().build(
                    [out / "main.c", *sources], out / "build", include=[out / i for i in include], optimise=flags
                )
                run = firmware.run(files={"input.bin": image.tobytes()})
                far = agreement(graph, image, run.files["output.bin"])
                if far["worst_steps"] > 1:
                    raise SystemExit(
                        f"{name} {flags}: {far['layers_beyond_one_step']} are more than a step from netsuke's"
                    )
                rows.append({"peer": name, "flags": flags, "instructions": labelled(run, "run")[0], **far})
                by_layer[name, flags] = labelled(run, "call")
                print(json.dumps(rows[-1]), flush=True)
        write_c(graph, Path(temporary) / "ours")
        expected = Interpreter(graph).run(image)[0]
        for dsp, flags in product((True, False), FLAGS):
            got = run_emulated(Path(temporary) / "ours", "m4", [image], dsp=dsp, optimise=flags)
            peer = f"netsuke, {'DSP' if dsp else 'portable C'}"
            if not got["passed"] or not np.array_equal(got["outputs"][0].reshape(expected.shape), expected):
                raise SystemExit(f"{peer} {flags}: not the outputs of the reference")
            rows.append({"peer": peer, "flags": flags, "instructions": got["instructions"]})
            print(json.dumps(rows[-1]), flush=True)
        ours = count_calls(Path(temporary) / "ours")
    best = {
        peer: min((r for r in rows if r["peer"] == peer), key=lambda r: r["instructions"])
        for peer in dict.fromkeys(r["peer"] for r in rows)
    }
    theirs = {name: by_layer[name, best[name]["flags"]] for name in makers}
    layers = [
        {
            "layer": op.name,
            "kind": kind_of(graph, op),
            "netsuke": b,
            **{name: counts[k] for name, counts in theirs.items()},
        }
        for k, (op, b) in enumerate(zip(ops, ours, strict=True))
    ]
    count = best.pop("netsuke, DSP")["instructions"]
    ratios = {f"to {peer}": round(count / r["instructions"], 4) for peer, r in best.items()}
    checkouts = {name: commit(path) for name, path in (("TinyEngine", engine), ("CMSIS-NN", cmsis)) if path}
    return {
        "network": NETWORK,
        "macs": graph.macs(),
        "rows": rows,
        "layers": layers,
        "ratio": ratios,
        "commits": checkouts,
    }


def commit(checkout: Path) -> str | None:
    """What the checkout stands on; None for a folder without git's."""
    if not (checkout / ".git").exists():
        return None
    return subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


def stamp() -> dict[str, Any]:
    """Of one part of the result: where and when it was measured, and by which compiler."""
    said = subprocess.run([PREFIX + "gcc", "--version"], capture_output=True, text=True, check=True).stdout
    return {"compiler": said.splitlines()[0], "run": provenance()}


def kind_of(graph: QGraph, op: Op) -> str:
    shape = "x".join(map(str, graph.tensors[op.outputs[0]].shape[1:]))
    if op.kind not in ("conv2d", "depthwise2d"):
        return f"{op.kind} -> {shape}"
    w, source = graph.tensors[op.inputs[1]].shape, graph.tensors[op.inputs[0]].shape
    kernel = w[:2] if op.kind == "depthwise2d" else w[1:3]
    return f"{op.kind} {kernel[0]}x{kernel[1]}s{op.attrs['stride'][0]} {source[1]}x{source[2]}x{source[3]} -> {shape}"


def classifier(arrays: dict[str, np.ndarray]) -> QGraph:
    """The network that scikit-learn trained: dense layers with ReLU, softmax in the end."""
    graph, layers = QGraph("digits"), sum(k.startswith("w") for k in arrays)
    x = graph.add(Tensor("x", (1, arrays["w0"].shape[1]), "float32"))
    graph.inputs = (x,)
    for k in range(layers):
        w, b = (graph.constant(f"{p}{k}", arrays[f"{p}{k}"]) for p in "wb")
        attrs = {"low": 0.0} if k < layers - 1 else {}
        x = graph.append("dense", (x, w, b), Tensor(f"h{k}", (1, arrays[f"w{k}"].shape[0]), "float32"), **attrs)
    graph.outputs = (graph.append("softmax", (x,), Tensor("p", graph.tensors[x].shape, "float32")),)
    return graph.check()


def classify(folder: Path, flags: str, include: str, call: str, x: np.ndarray, paths: list[Path],
             sources: tuple[Path, ...] = ()) -> tuple[int, int, np.ndarray]:  # fmt: skip
    """(instructions of a call, bytes of flash without the harness, labels)"""
    out = Path(tempfile.mkdtemp(dir=folder))
    flash, kind = [], "int8_t" if x.dtype == np.int8 else "float"
    for k, (inc, what) in enumerate((("", ""), (include, call))):
        text = CLASSIFY % {"include": inc, "call": what, "type": kind, "inputs": x.shape[1]}
        (out / f"main{k}.c").write_text(text)
        parts = [out / f"main{k}.c", *(sources if k else ())]
        firmware = board().build(parts, out / str(k), include=paths, optimise=flags, defines={"NS_NO_MAIN": 1})
        flash.append(firmware.flash)
    run = firmware.run(files={"input.bin": x.tobytes()})
    labels = np.frombuffer(run.files["output.bin"], np.int32)
    return round(float(np.median(labelled(run, "run"))) / 20), flash[1] - flash[0], labels


def emlearn(python: str) -> dict[str, Any]:
    """The same trained networks converted by emlearn and by this package: instructions of a classification, bytes of flash."""
    rows, ratios, version = [], {}, ""
    with tempfile.TemporaryDirectory() as temporary:
        for shape, hidden in SHAPES.items():
            out = Path(temporary) / shape
            out.mkdir()
            done = subprocess.run(
                [python, "-c", TRAIN, repr(hidden), str(out)], capture_output=True, text=True, check=True
            )
            include, version = done.stdout.split()
            arrays = dict(np.load(out / "arrays.npz"))
            here, x, y = len(rows), arrays["x"][:40], arrays["y"][:40]
            for flags in SMALL:
                for made in ("loadable", "inline"):
                    call = (
                        f"label = {'eml_net_predict(&mlp, ' if made == 'loadable' else 'mlp_predict('}x, {x.shape[1]});"
                    )
                    got = classify(out, flags, f'#include "{made}.h"', call, x, [out, Path(include)])
                    rows.append(row(shape, f"emlearn {made}", flags, got, y))
                whole = classifier(arrays)
                integer = quantize(whole, [arrays["seen"]])
                for form, graph in (
                    ("float32", whole),
                    ("int8 weights, float", weights_only(whole)),
                    ("int8", integer),
                ):
                    rows.append(row(shape, f"netsuke {form}", flags, ours(out, flags, graph, x), y))
            for r in rows[here:]:
                print(json.dumps(r), flush=True)
            ratios[shape] = {what: ratio(rows[here:], what) for what in ("instructions", "flash")}
    return {"emlearn": version, "rows": rows, "ratio of float32 to emlearn's best float": ratios}


def row(shape: str, peer: str, flags: str, got: tuple[int, int, np.ndarray], y: np.ndarray) -> dict[str, Any]:
    right = float(np.mean(got[2] == y))
    return {"network": shape, "peer": peer, "flags": flags, "instructions": got[0], "flash": got[1], "accuracy": right}


def ratio(rows: list[dict[str, Any]], what: str) -> float:
    """Ours over theirs, each with its best flags and way, with float weights and activations."""

    def best(who: tuple[str, ...]) -> int:
        return min(r[what] for r in rows if r["peer"] in who)

    return best(("netsuke float32",)) / best(("emlearn loadable", "emlearn inline"))


def ours(out: Path, flags: str, graph: QGraph, x: np.ndarray) -> tuple[int, int, np.ndarray]:
    folder = Path(tempfile.mkdtemp(dir=out)) / "c"
    write_c(graph, folder, name="mlp")
    source, output = folder / "src", graph.tensors[graph.outputs[0]]
    data = graph.tensors[graph.inputs[0]].codes(x)
    kind, n = "int8_t" if output.dtype == "int8" else "float", output.size
    call = (f"static {kind} p[{n}]; mlp_run(x, p); label = 0; "
            f"for (int i = 1; i < {n}; i++) if (p[i] > p[label]) label = i;")  # fmt: skip
    sources = (source / "mlp.c", *sorted((source / "kernels").glob("*.c")))
    return classify(out, flags, '#include "mlp.h"', call, data, [source], sources)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--tinyengine", type=Path, help="a checkout of mit-han-lab/tinyengine")
    ask.add_argument("--cmsis-nn", type=Path, help="a checkout of ARM-software/CMSIS-NN")
    ask.add_argument("--emlearn", help="a python with emlearn and scikit-learn")
    ask.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    args = ask.parse_args()
    ran: dict[str, Any] = {}
    checkouts = [path and path.resolve() for path in (args.tinyengine, args.cmsis_nn)]
    if not any(checkouts) or missing((NETWORK,)):
        print(f"TinyEngine and CMSIS-NN are skipped: they need --tinyengine, --cmsis-nn and the data {NETWORK}")
    else:
        ran["network"] = networks(*checkouts) | stamp()
    if args.emlearn is None:
        print("emlearn is skipped: it needs --emlearn, a python in which it is installed")
    else:
        ran["emlearn"] = emlearn(args.emlearn) | stamp()
    for part, got in ran.items():
        print(part, {k: v for k, v in got.items() if k.startswith("ratio")})
    if args.json and ran:
        kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        RESULT.parent.mkdir(exist_ok=True)
        write_atomically(RESULT, lambda f: f.write((json.dumps(kept | ran, indent=1) + "\n").encode()))
    elif args.json:
        print(f"nothing was measured; {RESULT.name} stays as it is")


if __name__ == "__main__":
    main()
