"""All methods on one model: quality against bytes and against tokens/s, and `fit` with all choices against the best of them.

    python benchmarks/methods.py [--model pycode] [--json] [--speeds] [--plot]

Every method runs through its strengths; quality is perplexity on validation text, as decoded. Speed is measured in the native
engine on real text, every model in turn with the 16-bit one. Budgets: the sizes of plain 4-, 3- and 2-bit rounding, and 0.5 and
0.35 of the 16-bit model's time per token as a device's card prices it. At each, the strongest single method is the setting
that fits and is best on validation text; it and what `fit` carves are scored once on test text. excess = test loss - test loss
of the 16-bit model, in nats per token.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from netsuke.compress.factorize import Factorize
from netsuke.compress.inherit import Inherit
from netsuke.compress.method import Method, from_json
from netsuke.compress.modegpt import MoDeGPT
from netsuke.compress.quantize import Quantize
from netsuke.compress.sparse_channels import decoding, sparse_maps, total, traffic
from netsuke.compress.sparsify import Sparsify
from netsuke.devices import Device
from netsuke.fit import fit
from netsuke.measure.decoding import decoding_speed
from netsuke.measure.machine import provenance
from netsuke.models.files import write_atomically
from netsuke.models.llama import Llama, half_precision
from netsuke.models.load import load
from netsuke.models.save import save_artifact
from netsuke.runtime.engine import Engine
from netsuke.runtime.native_plan import native_work
from netsuke.tasks.language import LanguageModeling, language_task
from netsuke.train.heal import Heal
from netsuke.train.zeroqat import ZeroQAT

RESULT = Path(__file__).parent / "results/methods.json"
PLOT = Path(__file__).parents[1] / "docs/methods.svg"
CARD = "pi-zero-2w"
SPEEDS = (0.5, 0.35)  # of the 16-bit model's time per token
BATCHES = 8  # of validation text on which settings are compared; fit uses as many
BAR = 0.8
TURNS = 5
HEAL = "45s"  # of healing in every carving; single methods that train have 60 to 100 steps, as long or longer
SINGLES: dict[str, list[list[Method]]] = {
    "rounding": [[Quantize(b, solver="rtn")] for b in (8, 4, 3, 2)],
    "quantize": [[Quantize(b)] for b in (8, 4, 3, 2)],
    "modegpt": [[MoDeGPT(remove=r, allocate="uniform")] for r in (0.1, 0.2, 0.3, 0.5)],
    "factorize": [[Factorize(rank=r)] for r in (0.75, 0.5, 0.35)],
    "factorize, tuned": [[Factorize(rank=0.5, finetune=100)]],
    "inherit": [[Inherit(keep=0.7, steps=100)]],
    "sparsify": [[Sparsify(s)] for s in (0.3, 0.5, 0.6, 0.7)],
    "zeroqat": [[ZeroQAT(w=w, group=64, steps=60)] for w in (3, 2)],
    "quantize, healed": [[Quantize(b), Heal(steps=60)] for b in (3, 2)],
}


@dataclass
class Point:
    """One setting. `latency` is the card's seconds per token, `speed` tokens/s here over those of the 16-bit model."""

    name: str
    methods: list[dict[str, Any]]
    bytes: int
    validation: float
    latency: float
    speed: float
    seconds: float
    test: float | None = None
    model: Any = field(default=None, repr=False)


class Bench:
    def __init__(self, name: str):
        self.name, self.device = name, Device.load(CARD)
        loaded = load(name)
        self.task: LanguageModeling = language_task(loaded, None, None)
        self.dense, self.tokenizer = loaded.model.float(), loaded.tokenizer
        self.half = half_precision(self.dense)
        self.text = self.task.ids("validation")[:4096].tolist()

    @torch.no_grad()
    def loss(self, model: Llama, split: str) -> float:
        with decoding(model):
            return self.task.mean_loss(model, split, BATCHES if split == "validation" else None)

    def latency(self, model: Llama) -> float:
        """Seconds per token by the card; of sparse maps the share that validation text was seen to read counts."""
        shares = {n: r.weights / r.dense for n in sparse_maps(model) for r in traffic(model) if r.name == n}
        layers = {n: m.spec() for n, m in model.linears().items()}
        return self.device.cost(
            native_work(model.cfg, layers, context=self.task.context, tokens=1, shares=shares)
        ).latency

    def bytes(self, model: Llama) -> int:
        with tempfile.TemporaryDirectory() as folder:
            saved = save_artifact(Path(folder) / "model", model, self.tokenizer, {}, {})
            return sum(f.stat().st_size for f in saved.iterdir())

    def speed(self, model: Llama) -> float:
        """Tokens/s over those of the 16-bit model: the median of `TURNS` turns, both sides in each."""
        ratios = []
        for _ in range(TURNS):
            times = []
            for one in (self.half, model):
                with Engine.of_model(one, context=self.task.context) as engine:
                    times.append(
                        decoding_speed(
                            engine.forward, engine.truncate, engine.vocab, engine.context, text=self.text
                        ).token
                    )
            ratios.append(times[0] / times[1])
        return statistics.median(ratios)

    def point(self, name: str, methods: list[Method]) -> Point:
        begin, model = time.monotonic(), self.dense if methods else self.half
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for method in methods:
                healing = {"before": self.dense} if method.name == "heal" else {}
                model = method.apply(model, self.task, **healing)
        seconds = time.monotonic() - begin
        if not any(m.name in ("quantize", "zeroqat") for m in methods):
            model = half_precision(model)
        loss = self.loss(model, "validation")
        made = Point(
            name, [m.to_json() for m in methods], self.bytes(model), math.exp(min(loss, 80)), self.latency(model),
            self.speed(model), round(seconds, 1), model=model,
        )  # fmt: skip
        print(
            f"{name:18} {made.bytes / 1e6:6.2f} MB  {made.validation:8.3f}  x{made.speed:.2f}  {seconds:5.1f} s",
            flush=True,
        )
        return made

    def duel(self, points: list[Point], base: float, budget: dict[str, str], limit: float, what: str) -> dict[str, Any]:
        """`fit` inside a budget against the best single setting inside it, on test text."""
        inside = [p for p in points if getattr(p, what) <= limit]
        best = min(inside, key=lambda p: p.validation, default=None)
        with tempfile.TemporaryDirectory() as folder:
            report = fit(self.name, CARD, out=f"{folder}/carved", heal=HEAL, **budget)
        row: dict[str, Any] = {
            "budget": budget, "fit": {k: report["after"][k] for k in ("bytes", "quality", "latency")}, "tried": report["tried"],
            "methods": report["methods"],
            "excess_fit": math.log(report["after"]["quality"]["test"]) - base,
        }  # fmt: skip
        if best is not None:
            best.test = math.exp(self.loss(best.model, "test"))
            row |= {"single": best.name, "single_methods": best.methods, "excess_single": math.log(best.test) - base}
            row["ratio"] = row["excess_fit"] / row["excess_single"]
            row["met"] = row["ratio"] <= BAR
        print(json.dumps({k: v for k, v in row.items() if k not in ("tried", "single_methods")}), flush=True)
        return row


def speeds(out: dict[str, Any]) -> None:
    """Measures the speeds of a result again, for a machine that was busy: models of the same shapes, made without their training,
    which moves values only."""
    bench, untrained = Bench(out["model"]), {"finetune": 0, "steps": 1}
    for row in out["points"]:
        model: Any = bench.dense if row["methods"] else bench.half
        for told in row["methods"]:
            method = from_json({k: untrained.get(k, v) for k, v in told.items()})
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = model if method.name == "heal" else method.apply(model, bench.task)
        if not any(m["method"] in ("quantize", "zeroqat") for m in row["methods"]):
            model = half_precision(model)
        row["speed"] = bench.speed(model)
        print(f"{row['name']:18} {row['bytes'] / 1e6:6.2f} MB  x{row['speed']:.2f}", flush=True)
    out["run_of_speeds"] = provenance() | {"load_average": os.getloadavg()[0]}


def plot(out: dict[str, Any], path: Path = PLOT) -> None:
    """Perplexity against bytes and against tokens/s, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "netsuke"
    import matplotlib.pyplot as plt

    figure, panes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for pane, key, label in zip(panes, ("bytes", "speed"), ("MB on disk", "tokens/s over the 16-bit model's")):
        for i, name in enumerate(dict.fromkeys(p["name"] for p in out["points"])):
            rows = sorted((p for p in out["points"] if p["name"] == name), key=lambda p: p[key])
            x = [p[key] / (1e6 if key == "bytes" else 1) for p in rows]
            pane.plot(x, [p["validation"] for p in rows], "o-", ms=4, lw=1.2, color=f"C{i % 10}", label=name)
        pane.set_xlabel(label)
    for row in out["duels"]:
        panes[0].plot(row["fit"]["bytes"] / 1e6, row["fit"]["quality"]["validation"], "*", ms=13, color="black")
    panes[0].plot([], [], "*", ms=11, color="black", label="fit, all choices")
    floor = out["validation"]
    panes[0].set(ylabel="perplexity (validation)", yscale="log", ylim=(floor * 0.97, floor * 3))
    panes[0].legend(fontsize=8, ncols=2)
    panes[0].set_title(f"{out['model']}: quality against bytes")
    panes[1].set_title("quality against speed, native engine")
    write_atomically(path, lambda f: figure.savefig(f, format="svg", metadata={"Date": None}))
    plt.close(figure)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--model", default="pycode")
    ask.add_argument(
        "--only", choices=sorted(SINGLES), action="append", help="these methods; no budgets, nothing is written"
    )
    ask.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    ask.add_argument("--plot", action="store_true", help=f"draw docs/{PLOT.name} from {RESULT.name}; measures nothing")
    ask.add_argument("--speeds", action="store_true", help=f"measure the speeds in {RESULT.name} again, and draw")
    args = ask.parse_args()
    if args.plot or args.speeds:
        out = json.loads(RESULT.read_text(encoding="utf-8"))
        if args.speeds:
            speeds(out)
            write_atomically(RESULT, lambda f: f.write((json.dumps(out, indent=1) + "\n").encode()))
        plot(out)
        return
    if args.json and args.only:
        ask.error(f"--json writes all rows of {RESULT.name}: leave out --only")
    bench = Bench(args.model)
    whole = bench.point("16 bits", [])
    points = [bench.point(name, ms) for name in args.only or SINGLES for ms in SINGLES[name]]
    if args.only:
        return
    base = bench.loss(whole.model, "test")
    sizes = [p.bytes for p in points if p.name == "rounding"][1:]
    duels = [bench.duel(points, base, {"storage": f"{size}B"}, size, "bytes") for size in sizes]
    for share in SPEEDS:
        limit = share * whole.latency
        duels.append(bench.duel(points, base, {"latency": f"{limit:.9f}s"}, limit, "latency"))
    rows = [{k: v for k, v in asdict(p).items() if k != "model"} for p in (whole, *points)]
    out = {
        "model": args.model, "device": CARD, "bar": BAR, "validation": whole.validation, "test": math.exp(base),
        "points": rows, "duels": duels, "total_read": total(traffic(bench.half)).bytes_read, "run": provenance(),
    }  # fmt: skip
    if args.json:
        write_atomically(RESULT, lambda f: f.write((json.dumps(out, indent=1) + "\n").encode()))
        plot(out)


if __name__ == "__main__":
    main()
