"""`netsuke fit MODEL --device pi4 --storage 4MB`: carve a model until it fits, and prove it.

Measure → offer choices → allocate → apply → measure → repair → pack → reload and compare → report. The test split is
scored once before and once after; everything in between looks at train and validation text only.
"""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netsuke import __version__
from netsuke.devices import Budget, Device, format_bytes, format_seconds
from netsuke.errors import NetsukeError
from netsuke.verb import verb

if TYPE_CHECKING:
    from netsuke.allocate import Allocation

GROUP = 64  # inputs per scale: 32 costs 0.4 bits more per weight, 128 loses visibly at 3 and 2 bits
CALIBRATION = 32  # windows of train text for statistics
PROBE = 8  # windows of validation text per trial: harms are paired differences, so few suffice
CHECK = 32  # windows of validation text on which candidates are compared
HASTE = (1.0, 2.0)  # cuts of several blocks hurt more than their sum: they are also tried at this many times their harm
LOGIT_LIMIT = 1e-3

Progress = Callable[[str, int, int], None]


@verb
def fit(
    model: str, device: str = "this", *, ram: str | None = None, storage: str | None = None, latency: str | None = None,
    energy: str | None = None, max_loss: str | None = None, data: str | None = None, context: int | None = None,
    out: str | None = None, cuts: bool = True, on_progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Carves `model` (artifact, Hugging Face folder, llama2.c file or "pycode") until it fits, and writes the artifact
    and its report beside it.

    device            a card's name, a TOML file, or "this"
    ram … max_loss    limits as text ("512MB", "50ms" per generated token, "2%" of the metric); RAM and storage default
                      to the device's own
    data              a UTF-8 text file or folder, cut 80/10/10; default: the Python standard library, for models of code
    context           tokens of text per window and of the key/value cache; default: at most 512 of the model's own

    Returns the report as a dictionary; `fits` says whether a set was found. Raises NetsukeError for unusable input, and
    with code 1 when no set of choices meets the budget (nothing is written then).
    """
    return Fitting(
        model, device, Budget.parse(ram, storage, latency, energy, max_loss), data, context, out, cuts, on_progress
    ).run()


class Fitting:
    """One run of `fit`: the steps in order, each method one step."""

    def __init__(self, model, device, budget, data, context, out, cuts, on_progress):
        from netsuke.models.load import describe, load
        from netsuke.models.save import check_writable
        from netsuke.tasks.language import language_task

        self.started, self.clock, self.seconds = time.time(), time.monotonic(), {}
        self.name, self.on_progress = model, on_progress or (lambda *_: None)
        self.asked, self.device = budget, Device.load(device)
        self.budget = Budget.for_device(self.device, budget)
        self.out = Path(
            out or f"{Path(model).name.removesuffix('.netsuke').removesuffix('.bin')}-{self.device.name}.netsuke"
        )
        if self.out.suffix != ".netsuke":
            self.out = self.out.with_name(self.out.name + ".netsuke")
        check_writable(self.out)
        self.described = describe(model)
        self.loaded = load(model)
        self.cfg = self.loaded.model.cfg
        self.use_cuts = cuts
        dense = all(s["kind"] == "dense" for s in self.described.layers.values())
        if not dense:
            raise NetsukeError(
                f"carve {model}",
                "its weights are quantized already",
                "a model with dense weights",
                "the model it came from",
            )
        self.task = language_task(self.loaded, data, context)
        self.context = self.task.context

    def step(self, name: str, done: int = 0, total: int = 0) -> None:
        self.on_progress(name, done, total)

    def timed(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.clock = round(now - self.clock, 2), now

    def run(self) -> dict[str, Any]:
        import torch

        torch.manual_seed(0)
        with torch.no_grad():
            self.measure_before()
            self.make_choices()
            winner = self.build_candidates()
            return self.finish(winner)

    # -- 1. the model as it is

    def measure_before(self) -> None:
        self.step("measuring the model as it is")
        self.dense = self.loaded.model.float()
        self.memory_before = self.memory(self.cfg, self.described.layers)
        quality = {
            s: self.task.mean_loss(self.dense, s, CHECK if s == "validation" else None) for s in ("validation", "test")
        }
        self.before = {
            "quality": self.quality(quality), "bytes": self.described.bytes_on_disk,
            "peak_ram": self.memory_before["peak"], "latency": self.latency(self.cfg, self.described.layers),
        }  # fmt: skip
        self.base_loss = quality["validation"]
        self.timed("measure")

    def quality(self, losses: dict[str, float]) -> dict[str, float]:
        out = {split: math.exp(min(v, 80.0)) for split, v in losses.items()}
        return out | {"bits_per_byte_test": self.task.bits_per_byte(losses["test"], "test")}

    def memory(self, cfg, layers: dict[str, dict]) -> dict[str, int]:
        from netsuke.runtime.memory_plan import inference_plan

        return inference_plan(cfg, layers, context=self.context).as_dict()

    def latency(self, cfg, layers: dict[str, dict]) -> dict[str, Any]:
        from netsuke.runtime.memory_plan import work_of

        token = self.device.cost(work_of(cfg, layers, context=self.context, tokens=1))
        prompt = self.device.cost(work_of(cfg, layers, context=self.context, tokens=128))
        return {
            "per_token": token.latency, "first_token": prompt.latency, "energy_per_token": token.energy,
            "how": f"predicted for {self.device.name} by its card (128 prompt tokens); not measured there",
        }  # fmt: skip

    # -- 2. choices, 3. allocation

    def make_choices(self) -> None:
        from netsuke.compress.choices import CUTS, offer
        from netsuke.compress.modegpt import MODULES

        modules = MODULES
        if self.cfg.qk_norm:  # cutting normed heads would change the norm itself; MoDeGPT refuses it
            modules = ("mlp", "vo")
        kv_bytes = 4.0 * self.context
        self.parts, self.probe = offer(
            self.dense, self.task, self.device, group=GROUP, windows=PROBE, calibration=CALIBRATION,
            cuts=CUTS if self.use_cuts else (0.0,), modules=modules, kv_bytes=kv_bytes,
            on_trial=lambda done, total: self.step("trying each part", done, total),
        )  # fmt: skip
        self.fixed_storage = self._fixed_storage()
        self.fixed_ram = self.memory_before["peak"] - self._dense_total("ram")
        self.fixed_latency = self.before["latency"]["per_token"] - self._dense_total("latency")
        self.timed("choices")

    def _dense_total(self, resource: str) -> float:
        """What the uncut 16-bit model costs in the parts' own arithmetic; the rest of the whole is fixed."""
        untouched = [
            next(o for o in part if o.value.cut == 0 and set(o.value.bits.values()) == {16}) for part in self.parts
        ]
        return sum(o.costs[resource] for o in untouched)

    def _fixed_storage(self) -> int:
        """Bytes of an artifact that no choice changes: tokenizer, norms, headers, manifest (measured again at the end)."""
        linears = set(self.dense.linears())
        norms = sum(p.numel() * 4 for n, p in self.dense.named_parameters() if n.rsplit(".", 1)[0] not in linears)
        return self.described.tokenizer_bytes + norms + 2500 + 420 * len(linears)

    def limits(self, shrink: dict[str, float] | None = None) -> dict[str, float]:
        shrink = shrink or {}
        out = {"storage": self.budget.storage - self.fixed_storage - shrink.get("storage", 0)}
        out["ram"] = self.budget.ram - self.fixed_ram - shrink.get("ram", 0)
        if self.budget.latency is not None:
            out["latency"] = self.budget.latency - self.fixed_latency
        if self.budget.energy is not None:
            out["energy"] = self.budget.energy
        return {k: max(v, 1e-12) for k, v in out.items()}

    def solve(self, parts, shrink: dict[str, float] | None = None, harm: float | None = None) -> Allocation:
        """Least harm inside the limits; with only a loss allowed and no tight limit, the smallest model within it."""
        from netsuke.allocate import allocate

        limits = self.limits(shrink)
        asked = (self.asked.ram, self.asked.storage, self.asked.latency, self.asked.energy)
        if self.budget.max_loss is not None and all(a is None for a in asked):
            allowed = math.log1p(self.budget.max_loss) if harm is None else harm
            return allocate(parts, {**limits, "harm": allowed}, minimise="storage")
        return allocate(parts, limits)

    def refuse(self, found: Allocation) -> NetsukeError:
        """No set fits: the limit that binds and the nearest thing that would work."""
        names = {"storage": (self.budget.storage, self.fixed_storage, format_bytes), "ram": (self.budget.ram, self.fixed_ram, format_bytes),
                 "latency": (self.budget.latency, self.fixed_latency, format_seconds), "energy": (self.budget.energy, 0, lambda v: f"{v:.3g} J")}  # fmt: skip
        limit, fixed, show = names[found.binding]
        need = found.costs[found.binding] + fixed
        loss = math.expm1(min(found.harm, 60))
        return NetsukeError(
            f"fit {self.name} into this budget",
            f"the {found.binding} limit binds: the smallest carving needs {show(need)}, {show(limit)} allowed",
            "", f"--{found.binding} {show(need * 1.02).replace(' ', '')}, at a predicted rise of {self.task.metric} by {loss:.0%}", code=1,
        )  # fmt: skip

    # -- 4. apply, measure, repair

    def build_candidates(self) -> dict[str, Any]:
        """Builds a few allocations for real, and keeps the one whose validation loss is least."""
        plans = []
        for haste in (*HASTE, math.inf) if self.use_cuts else (math.inf,):
            parts = self.weighted(haste)
            found = self.solve(parts)
            if found.feasible and all(found.picks != p.picks for _, p in plans):
                plans.append((haste, found))
        if not plans:
            raise self.refuse(self.solve(self.parts))
        self.candidates = []
        for i, (haste, found) in enumerate(plans):
            self.step("building what was chosen", i, len(plans))
            self.candidates.append(self.build(haste, found))
        self.timed("build")
        return min(self.candidates, key=lambda c: c["loss"])

    def weighted(self, haste: float) -> list:
        """The parts with the harm of cuts multiplied; infinity leaves cuts out."""
        from dataclasses import replace

        if haste == 1.0:
            return self.parts
        out = []
        for part in self.parts:
            base = {tuple(o.value.bits.values()): o.harm for o in part if o.value.cut == 0}
            kept = []
            for o in part:
                if o.value.cut == 0:
                    kept.append(o)
                elif math.isfinite(haste):
                    rounding = (1 - o.value.cut) * base[tuple(o.value.bits.values())]
                    kept.append(replace(o, harm=rounding + haste * (o.harm - rounding)))
            out.append(kept)
        return out

    def build(self, haste: float, found: Allocation) -> dict[str, Any]:
        from netsuke.compress.choices import methods_for

        shrink, harm_limit = {}, None
        for _ in range(4):  # a prediction that was off is repaired by tightening the limit by what was missing
            methods = methods_for([o.value for o in found.picks], len(self.cfg.blocks), GROUP, CALIBRATION)
            carved = self.dense
            for method in methods:
                carved = method.apply(carved, self.task)
            if not methods:
                from netsuke.models.llama import half_precision

                carved = half_precision(self.dense)
            layers = {n: m.spec() for n, m in carved.linears().items()}
            size = sum(m.bytes() for m in carved.linears().values()) + self.fixed_storage
            peak = self.memory(carved.cfg, layers)["peak"]
            loss = self.task.mean_loss(carved, "validation", CHECK)
            over = {"storage": size - self.budget.storage, "ram": peak - self.budget.ram}
            too_lossy = self.budget.max_loss is not None and loss - self.base_loss > math.log1p(self.budget.max_loss)
            if max(over.values()) <= 0 and not (too_lossy and "harm" not in self.limits() and self._only_loss_asked()):
                break
            shrink = {k: shrink.get(k, 0) + max(v, 0) for k, v in over.items()}
            if too_lossy and self._only_loss_asked():
                excess = loss - self.base_loss
                harm_limit = (
                    (harm_limit or math.log1p(self.budget.max_loss)) * math.log1p(self.budget.max_loss) / excess * 0.97
                )
            again = self.solve(self.weighted(haste), shrink, harm_limit)
            if not again.feasible:
                break
            found = again
        return {"model": carved, "methods": methods, "found": found, "loss": loss, "haste": haste, "layers": layers}

    def _only_loss_asked(self) -> bool:
        return all(v is None for v in (self.asked.ram, self.asked.storage, self.asked.latency, self.asked.energy))

    # -- 5. pack, prove, report

    def finish(self, winner: dict[str, Any]) -> dict[str, Any]:
        import torch

        from netsuke.models.load import load
        from netsuke.models.save import save_artifact

        carved, methods = winner["model"], winner["methods"]
        rise = math.expm1(winner["loss"] - self.base_loss)
        if self.budget.max_loss is not None and rise > self.budget.max_loss:
            raise NetsukeError(
                f"fit {self.name} into this budget",
                f"--max-loss binds: inside the other limits {self.task.metric} rises by {rise:.1%} on validation text, "
                f"{self.budget.max_loss:.1%} allowed", "", f"--max-loss {rise * 1.05:.1%}, or a wider limit", code=1,
            )  # fmt: skip
        self.step("scoring the test text")
        test = self.task.mean_loss(carved, "test")
        quality = self.quality({"validation": winner["loss"], "test": test})
        loss_of_quality = quality["test"] / self.before["quality"]["test"] - 1
        memory_after = self.memory(carved.cfg, winner["layers"])
        trained_on = (self.loaded.manifest or {}).get("provenance", {}).get("data")
        provenance = {"base": Path(self.name).name, "methods": [m.to_json() for m in methods], "netsuke": __version__}
        if trained_on:
            provenance["data"] = trained_on
        facts = {
            "perplexity_test": quality["test"],
            "loss_of_quality": loss_of_quality,
            "peak_ram_planned": memory_after["peak"],
        }
        budget = {k: v for k, v in vars(self.budget).items() if v is not None} | {"device": self.device.name}
        self.step("packing and proving")
        ids = self.task.windows("validation")[:2, :64]
        expected, proof = carved(ids), {}

        def prove(folder: Path) -> None:
            """The artifact, read back, must give the carved model's logits, and its real bytes must fit."""
            again = load(folder).model
            proof["difference"] = float((again(ids) - expected).abs().max())
            proof["bytes"] = sum(f.stat().st_size for f in folder.iterdir())
            if proof["difference"] > LOGIT_LIMIT or not torch.isfinite(expected).all():
                raise NetsukeError(
                    f"prove {self.out.name}",
                    f"reloaded logits differ by {proof['difference']:.2g}",
                    f"{LOGIT_LIMIT:g}",
                    code=1,
                )
            if proof["bytes"] > self.budget.storage:
                raise NetsukeError(
                    f"fit {self.name}", f"the artifact has {proof['bytes']} bytes", f"{self.budget.storage}", code=1
                )

        save_artifact(
            self.out, carved, self.loaded.tokenizer, provenance=provenance, facts=facts, budget=budget, verify=prove
        )
        self.after = {
            "quality": quality, "bytes": proof["bytes"], "peak_ram": memory_after["peak"],
            "latency": self.latency(carved.cfg, winner["layers"]), "loss_of_quality": loss_of_quality,
        }  # fmt: skip
        self.timed("pack")
        return self.report(winner, memory_after, proof)

    def report(self, winner: dict[str, Any], memory_after: dict[str, int], proof: dict[str, float]) -> dict[str, Any]:
        from netsuke.allocate import frontier
        from netsuke.measure.machine import provenance
        from netsuke.report import write_report

        found = winner["found"]
        base = math.exp(self.base_loss)
        before_bytes = {c.part: s for c, s in self._untouched()}
        curve = [
            {"bytes": a.costs["storage"] + self.fixed_storage, "quality_predicted": base * math.exp(min(a.harm, 60)),
             "quality_measured": None, "chosen": False, "label": ""}
            for a in frontier(self.parts, "storage")
        ]  # fmt: skip
        for c in self.candidates:
            size = sum(m.bytes() for m in c["model"].linears().values()) + self.fixed_storage
            label = "bits only" if math.isinf(c["haste"]) else f"bits and cuts (harm of cuts x{c['haste']:g})"
            curve.append({"bytes": size, "quality_predicted": base * math.exp(c["found"].harm), "quality_measured": math.exp(c["loss"]),
                          "chosen": c is winner, "label": label})  # fmt: skip
        run = provenance()
        out = {
            "fits": True, "model": self.name, "source": self.loaded.kind,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)), "command": shlex.join(["netsuke", *sys.argv[1:]]),
            "seed": 0, "device": {k: getattr(self.device, k) for k in ("name", "title", "kind", "ram", "storage", "ram_bandwidth", "rates")},
            "budget": vars(self.budget), "metric": {"name": self.task.metric, "higher_is_better": False, "data": self.task.facts()},
            "before": self.before,
            "predicted": {"quality": base * math.exp(found.harm), "bytes": round(found.costs["storage"] + self.fixed_storage),
                          "peak_ram": round(found.costs["ram"] + self.fixed_ram), "latency": found.costs["latency"] + self.fixed_latency},
            "after": self.after, "curve": sorted(curve, key=lambda p: p["bytes"]), "floors": self.floors(),
            "choices": [
                {"part": o.value.part, "method": "modegpt + quantize" if o.value.cut else "quantize", "cut": o.value.cut,
                 "bits": {n.rsplit(".", 1)[-1]: b for n, b in o.value.bits.items()}, "bytes": round(o.costs["storage"]),
                 "bytes_before": before_bytes[o.value.part], "harm": o.harm}
                for o in found.picks
            ],
            "memory_before": self.memory_before, "memory_after": memory_after,
            "checks": [
                {"what": "the artifact, reloaded, gives the carved model's logits (largest difference)", "value": proof["difference"],
                 "limit": LOGIT_LIMIT, "ok": proof["difference"] <= LOGIT_LIMIT},
                {"what": "bytes of the artifact's files against the storage limit", "value": proof["bytes"],
                 "limit": self.budget.storage, "ok": proof["bytes"] <= self.budget.storage},
                {"what": "planned peak RAM against the limit", "value": memory_after["peak"], "limit": self.budget.ram,
                 "ok": memory_after["peak"] <= self.budget.ram},
            ],
            "methods": [m.to_json() for m in winner["methods"]],
            "artifact": str(self.out), "report": str(self.out.with_suffix(".report.html")),
            "versions": {"netsuke": __version__, "python": platform.python_version(), "torch": run["torch"], "numpy": run["numpy"]},
            "machine": {"cpu": run["cpu"], "cores": run["cores"]}, "seconds": self.seconds,
        }  # fmt: skip
        self.timed("report")
        write_report(out, self.out.with_suffix(".report.html"), self.out.with_suffix(".report.json"))
        return out

    def _untouched(self) -> list:
        found = [
            next(o for o in part if o.value.cut == 0 and set(o.value.bits.values()) == {16}) for part in self.parts
        ]
        return [(o.value, round(o.costs["storage"])) for o in found]

    def floors(self) -> list[dict[str, Any]]:
        """The trivial way: every layer rounded to the same bits, nothing else."""
        from netsuke.compress.quantize import Quantize

        rows = []
        for bits in (8, 4, 3):
            self.step("measuring the trivial way", bits)
            plain = Quantize(bits=bits, group=GROUP, solver="rtn").apply(self.dense, self.task)
            size = sum(m.bytes() for m in plain.linears().values()) + self.fixed_storage
            quality = math.exp(min(self.task.mean_loss(plain, "validation", CHECK), 80))
            rows.append(
                {
                    "name": f"{bits}-bit round-to-nearest, all layers alike",
                    "bytes": size,
                    "quality": quality,
                    "fits": size <= self.budget.storage,
                }
            )
        return rows


def register(app: typer.Typer) -> None:
    @app.command("fit", help="Carve a model until it fits a device's limits; write the artifact and its report.")
    def command(
        model: Annotated[str, typer.Argument(help="artifact, Hugging Face folder, llama2.c file, or 'pycode'")],
        device: Annotated[str, typer.Option(help="a card's name (netsuke devices), a TOML file, or 'this'")] = "this",
        ram: Annotated[str | None, typer.Option(help="e.g. 512MB")] = None,
        storage: Annotated[str | None, typer.Option(help="e.g. 8MB")] = None,
        latency: Annotated[str | None, typer.Option(help="per generated token, e.g. 50ms")] = None,
        energy: Annotated[str | None, typer.Option(help="per generated token, e.g. 2mJ")] = None,
        max_loss: Annotated[str | None, typer.Option(help="largest acceptable rise of the metric, e.g. 2%")] = None,
        data: Annotated[
            str | None, typer.Option(help="UTF-8 text file or folder (cut 80/10/10), or python-library")
        ] = None,
        context: Annotated[int | None, typer.Option(help="tokens per window and in the cache")] = None,
        out: Annotated[str | None, typer.Option("-o", "--out", help="the artifact to write, NAME.netsuke")] = None,
        cuts: Annotated[bool, typer.Option(help="allow narrower layers, or only fewer bits")] = True,
        as_json: Annotated[bool, typer.Option("--json", help="the report as JSON")] = False,
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        note = Console(stderr=True)
        columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=note, transient=True, disable=not note.is_terminal) as bar:
            task = bar.add_task("reading")
            report = fit(
                model, device, ram=ram, storage=storage, latency=latency, energy=energy, max_loss=max_loss, data=data,
                context=context, out=out, cuts=cuts,
                on_progress=lambda name, done, total: bar.update(task, description=name, completed=done, total=total or None),
            )  # fmt: skip
        if as_json:
            print(json.dumps(report))
            return
        from netsuke.report import summary_table

        Console().print(summary_table(report))
        print(f"artifact  {report['artifact']}\nreport    {report['report']}")
