"""The steps of `fit`, in order: measure, offer choices, allocate, build, repair, pack, prove.

The test split is scored once before and once after; everything in between looks at train and validation text only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netsuke import __version__
from netsuke.allocate import Allocation, Option, allocate
from netsuke.devices import Budget, Cost, Device, format_bytes, format_seconds
from netsuke.errors import NetsukeError

if TYPE_CHECKING:
    from torch import Tensor

    from netsuke.compress.method import Method
    from netsuke.models.llama import Llama, LlamaConfig

GROUP = 64  # inputs per scale: 32 costs 0.4 bits more per weight, 128 loses visibly at 3 and 2 bits
CALIBRATION = 32  # windows of train text for statistics
PROBE = 4  # windows of validation text per trial: divergences have little noise, so few suffice
CHECK = 8  # batches of validation text on which candidates are compared
REPAIRS = 4
# Cuts of several blocks hurt more than their sum, rounding noise does not: cuts are tried at once and at twice the harm
# that was measured one at a time, and (infinity) not at all; what was built is then compared.
CUT_FACTORS = (1.0, 2.0, math.inf)
MOST_FACTOR = 2.0  # of unread weights, which stay a choice where cuts are left out
HEAL_BATCH = 8  # windows a step
LEAST_HEALED = 1e-4  # nats per token: less is rounding
TIMED_STEPS = 2  # of healing, to know how many fit into the time that was given
LOGIT_LIMIT = 1e-3
ENGINE_LIMIT = 5e-3  # nats per token; int8 activations and a float16 cache give 2e-4 on pycode at any bits
RESOURCES = ("storage", "ram", "latency", "energy")
UNITS: dict[str, Callable[[float], str]] = {
    "storage": format_bytes, "ram": format_bytes, "latency": format_seconds, "energy": lambda v: f"{v:.3g} J",
}  # fmt: skip


@dataclass
class Candidate:
    """An allocation that was built: the model, the methods that make it, what it costs and loses."""

    cut_factor: float
    found: Allocation
    methods: list[Method]
    model: Llama
    costs: dict[str, float]
    loss: float  # validation, nats per token, as decoded
    healed: float = 0.0  # nats per token that healing took back

    @property
    def layers(self) -> dict[str, dict]:
        return {name: m.spec() for name, m in self.model.linears().items()}

    @property
    def shares(self) -> dict[str, float]:
        """Share of its weights that a decoded token reads, by name of the maps that skip some."""
        from netsuke.compress.choices import shares_read

        return shares_read([o.value for o in self.found.picks])


class Carving:
    """One run. `run()` leaves `before`, `after`, `candidates`, `winner` and `proof` for the report."""

    def __init__(
        self, model: str, device: str, budget: Budget, data: str | None, context: int | None, out: Path, cuts: bool,
        on_progress: Callable[[str, int, int], None], heal: float = 0.0,
    ):  # fmt: skip
        from netsuke.models.artifact import check_writable
        from netsuke.models.load import describe, load
        from netsuke.tasks.language import language_task

        self.name, self.on_progress, self.started, self.heal_seconds = model, on_progress, time.time(), heal
        self.clock, self.seconds = time.monotonic(), {}
        self.device = Device.load(device)
        self.here = (
            device == "this"
        )  # then latency is measured, and predictions are scaled to what the base model takes
        self.slowness = 1.0
        self.asked, self.budget = budget, Budget.for_device(self.device, budget)
        check_writable(out)
        self.out, self.cut_factors = out, CUT_FACTORS if cuts else (math.inf,)
        self.described = describe(model)
        for name, spec in self.described.layers.items():
            if spec["kind"] != "dense":
                found = f"{name} is stored as {spec['kind']} already"
                raise NetsukeError(f"carve {model}", found, "a model with dense weights", "the model it came from")
        self.loaded = load(model)
        self.cfg = self.loaded.model.cfg
        self.task = language_task(self.loaded, data, context)
        self.context = self.task.context

    def run(self) -> None:
        import torch

        torch.manual_seed(0)
        with torch.no_grad():
            self.measure_before()
            self.offer_choices()
            self.build_candidates()
            if self.heal_seconds:
                self.heal()
            self.check_loss()
            self.pack()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.clock = round(now - self.clock, 2), now

    # 1. the model as it is

    def measure_before(self) -> None:
        self.on_progress("measuring the model as it is", 0, 0)
        layers = self.described.layers
        latency = self.latency(self.loaded.model, layers)
        if self.here:
            self.slowness = latency["per_token"] / self.predicted(self.cfg, layers).latency
        self.dense = self.loaded.model.float()
        self.base_loss = self.task.mean_loss(self.dense, "validation", CHECK)
        test = self.task.mean_loss(self.dense, "test")
        self.memory_before = self.memory(self.cfg, layers)
        self.before = {
            "quality": self.quality(self.base_loss, test), "bytes": self.described.bytes_on_disk,
            "peak_ram": self.memory_before["peak"], "latency": latency,
            "energy": self.predicted(self.cfg, layers).energy,
        }  # fmt: skip
        self.lap("measure")

    def quality(self, validation: float, test: float) -> dict[str, float]:
        return {
            "validation": math.exp(min(validation, 80.0)), "test": math.exp(min(test, 80.0)),
            "bits_per_byte_test": self.task.bits_per_byte(test, "test"),
        }  # fmt: skip

    def memory(self, cfg: LlamaConfig, layers: dict[str, dict]) -> dict[str, int]:
        from netsuke.runtime.native_plan import native_plan

        return native_plan(cfg, layers, context=self.context, threads=self.device.cores).as_dict()

    def predicted(
        self, cfg: LlamaConfig, layers: dict[str, dict], tokens: int = 1, shares: dict[str, float] | None = None
    ) -> Cost:
        """The device's figures for one generated token, or for a prompt."""
        from netsuke.runtime.native_plan import native_work

        return self.device.cost(native_work(cfg, layers, context=self.context, tokens=tokens, shares=shares))

    def measured(self, model: Llama) -> dict[str, Any]:
        """Latency on this machine: the engine runs the model."""
        from netsuke.measure.decoding import decoding_speed
        from netsuke.runtime.engine import Engine

        with Engine.of_model(model, context=self.context) as engine:
            text = self.task.ids("validation")[: 4 * self.context].tolist()
            speed = decoding_speed(engine.forward, engine.truncate, engine.vocab, engine.context, text=text)
        return {
            "per_token": speed.token, "first_token": speed.prompt,
            "how": f"measured on this machine in the native engine ({speed.prompt_tokens} prompt tokens)",
        }  # fmt: skip

    def latency(self, model: Llama, layers: dict[str, dict], shares: dict[str, float] | None = None) -> dict[str, Any]:
        if self.here:
            return self.measured(model)
        return {
            "per_token": self.predicted(model.cfg, layers, shares=shares).latency,
            "first_token": self.predicted(model.cfg, layers, min(128, self.context - 1)).latency,
            "how": f"predicted for {self.device.name} by its card (128 prompt tokens); not measured there",
        }  # fmt: skip

    def costs(
        self, cfg: LlamaConfig, layers: dict[str, dict], linear_bytes: int, shares: dict[str, float] | None = None
    ) -> dict[str, float]:
        """What a whole model costs by resource; storage is an estimate within a few KB until it is packed."""
        norms = sum(p.numel() * 4 for n, p in self.dense.named_parameters() if n.endswith("norm.weight"))
        manifest = 3000 + 420 * len(layers)  # config, a spec and a header entry for each map, hashes, provenance
        token = self.predicted(cfg, layers, shares=shares)
        return {
            "storage": linear_bytes + norms + manifest + self.described.tokenizer_bytes,
            "ram": self.memory(cfg, layers)["peak"],
            "latency": token.latency * self.slowness, "energy": token.energy,
        }  # fmt: skip

    # 2. choices

    def offer_choices(self) -> None:
        from netsuke.compress.choices import CUTS, RANKS, SPARSITIES, offer, untouched
        from netsuke.compress.modegpt import MODULES
        from netsuke.runtime.memory_plan import linear_layers, uniform_specs

        # cutting normed heads would change the norm itself, so MoDeGPT refuses it
        modules = ("mlp", "vo") if self.cfg.qk_norm else MODULES
        narrower = self.cut_factors != (math.inf,)
        scarce = (
            self.asked.latency is not None or self.asked.energy is not None
        )  # then unread weights are worth something
        self.parts = offer(
            self.dense, self.task, self.device, group=GROUP, windows=PROBE, calibration=CALIBRATION,
            cuts=CUTS if narrower else (), ranks=RANKS if narrower else (), sparsities=SPARSITIES if scarce else (),
            modules=modules, kv_bytes=2.0 * self.context,
            on_trial=lambda done, total: self.on_progress("trying each part", done, total),
        )  # fmt: skip
        self.parts = [[self.slowed(o) for o in part] for part in self.parts]
        # Costs of parts add up; the rest of the whole (cache, activations, tokenizer, launches) is fixed.
        specs = uniform_specs(self.cfg, {"kind": "dense", "dtype": "float16"})
        size = sum(layer.bytes for layer in linear_layers(self.cfg, specs).values())
        self.untouched = [untouched(part) for part in self.parts]
        whole = self.costs(self.cfg, specs, size)
        self.fixed = {r: whole[r] - sum(o.costs[r] for o in self.untouched) for r in RESOURCES}
        self.lap("choices")

    def slowed(self, option: Option) -> Option:
        """An option whose predicted latency is scaled to what this machine was measured to take."""
        return replace(option, costs=option.costs | {"latency": option.costs["latency"] * self.slowness})

    # 3. allocation

    @property
    def limits(self) -> dict[str, float]:
        return {r: v for r in RESOURCES if (v := getattr(self.budget, r)) is not None}

    @property
    def smallest_wanted(self) -> bool:
        """Only a loss was named: the smallest model within it is wanted, not the best one within the device."""
        return self.budget.max_loss is not None and all(getattr(self.asked, r) is None for r in RESOURCES)

    def solve(self, parts: list[list[Option]], tighten: dict[str, float]) -> Allocation:
        """Least harm inside the limits, each lowered by `tighten`; or least storage inside the allowed loss."""
        limits = {r: max(v - self.fixed[r] - tighten.get(r, 0.0), 1e-12) for r, v in self.limits.items()}
        if not self.smallest_wanted:
            return allocate(parts, limits)
        allowed = max(math.log1p(self.budget.max_loss) - tighten.get("harm", 0.0), 1e-9)
        return allocate(parts, {**limits, "harm": allowed}, minimise="storage")

    def weighted(self, factor: float) -> list[list[Option]]:
        """The parts with the harm of cuts, factors and unread weights multiplied; infinity leaves cuts and factors out."""
        from netsuke.compress.choices import is_whole

        if factor == 1.0:
            return self.parts
        out = []
        for part in self.parts:
            rounding = {tuple(o.value.bits.values()): o.harm for o in part if is_whole(o.value)}
            kept = [o for o in part if is_whole(o.value)]
            for o in part:
                narrower = o.value.cut > 0 or o.value.rank is not None
                if is_whole(o.value) or (narrower and not math.isfinite(factor)):
                    continue
                noise = (1 - o.value.cut) * rounding[tuple(o.value.bits.values())]
                kept.append(replace(o, harm=noise + min(factor, MOST_FACTOR) * (o.harm - noise)))
            out.append(kept)
        return out

    def refusal(self) -> NetsukeError:
        """No set fits: the limit that binds, and the nearest thing that would work."""
        found = self.solve(self.parts, {})
        name = found.binding
        if name == "harm":
            return self.too_lossy(found.harm)
        show, need = UNITS[name], found.costs[name] + self.fixed[name]
        has = {"ram": self.device.ram_total, "storage": self.device.storage}.get(name, math.inf)
        more = f"--{name} {show(need * 1.02).replace(' ', '')}"
        if need > has:
            more = f"a device with at least {show(need)} of {name} (netsuke devices)"
        return NetsukeError(
            f"fit {self.name} into this budget",
            f"the {name} limit binds: the smallest carving needs {show(need)}, {show(self.limits[name])} allowed",
            attempt=f"{more}, at a predicted rise of {self.task.metric} by {math.expm1(min(found.harm, 60)):.0%}", code=1,
        )  # fmt: skip

    # 4. build, measure, repair

    def build_candidates(self) -> None:
        plans: list[tuple[float, Allocation]] = []
        for factor in self.cut_factors:
            found = self.solve(self.weighted(factor), {})
            chosen = [o.value for o in found.picks]
            if found.feasible and all(chosen != [o.value for o in other.picks] for _, other in plans):
                plans.append((factor, found))
        if not plans:
            raise self.refusal()
        self.candidates = []
        for i, (factor, found) in enumerate(plans):
            self.on_progress("building what was chosen", i, len(plans))
            self.candidates.append(self.build(factor, found))
        fitting = [c for c in self.candidates if not self.excess(c)]
        if not fitting:
            raise self.refusal()
        if self.smallest_wanted:
            self.winner = min(fitting, key=lambda c: c.costs["storage"])
        else:
            self.winner = min(fitting, key=lambda c: c.loss)
        self.lap("build")

    def build(self, factor: float, found: Allocation) -> Candidate:
        """Applies an allocation for real; where it exceeds a limit, that limit is lowered by the excess and solved again."""
        tighten: dict[str, float] = {}
        for _ in range(REPAIRS):
            candidate = self.apply(factor, found)
            excess = self.excess(candidate)
            if not excess:
                break
            tighten = {r: tighten.get(r, 0.0) + 1.02 * excess.get(r, 0.0) for r in (*RESOURCES, "harm")}
            again = self.solve(self.weighted(factor), tighten)
            if not again.feasible:
                break
            found = again
        return candidate

    def apply(self, factor: float, found: Allocation) -> Candidate:
        from netsuke.compress.choices import methods_for
        from netsuke.models.llama import half_precision

        methods = methods_for([o.value for o in found.picks], len(self.cfg.blocks), GROUP, CALIBRATION)
        model = self.dense if methods else half_precision(self.dense)
        for method in methods:
            model = method.apply(model, self.task)
        made = Candidate(factor, found, methods, model, {}, self.loss_as_decoded(model, "validation", CHECK))
        linears = model.linears()
        made.costs = self.costs(model.cfg, made.layers, sum(m.bytes() for m in linears.values()), made.shares)
        if self.here and self.budget.latency is not None:
            made.costs["latency"] = self.measured(model)["per_token"]
        return made

    def loss_as_decoded(self, model: Llama, split: str, limit: int | None = None) -> float:
        """Mean loss in nats with every token but a window's first taken as one that is decoded: input-sparse maps skip
        weights there, which they do not in prompts."""
        from netsuke.compress.sparse_channels import decoding

        with decoding(model):
            return self.task.mean_loss(model, split, limit)

    def heal(self) -> None:
        """The winner learns from the model before it, for the time that was given; unread weights are chosen anew after it."""
        from netsuke.train.heal import Heal

        made = self.winner
        trained = [m for m in made.methods if m.name != "sparsify"]
        model = self.dense
        for method in trained:
            model = method.apply(model, self.task)
        if not trained:
            return
        begin = time.monotonic()
        Heal(steps=TIMED_STEPS, batch=HEAL_BATCH).apply(model, self.task, self.dense)
        each = (time.monotonic() - begin) / TIMED_STEPS  # its looks at validation text included
        method = Heal(steps=max(int(self.heal_seconds / each), 1), batch=HEAL_BATCH)
        model = method.apply(
            model, self.task, self.dense, on_step=lambda done, total: self.on_progress("healing", done, total)
        )
        methods = [*trained, method]
        for last in made.methods[len(trained) :]:
            model, methods = last.apply(model, self.task), [*methods, last]
        loss = self.loss_as_decoded(model, "validation", CHECK)
        if made.loss - loss > LEAST_HEALED:
            self.winner = replace(made, model=model, methods=methods, loss=loss, healed=made.loss - loss)
            self.candidates.append(self.winner)
        self.lap("heal")

    def excess(self, c: Candidate) -> dict[str, float]:
        """By how much a candidate exceeds each limit that it exceeds; "harm" when the smallest model is wanted."""
        over = {r: c.costs[r] - v for r, v in self.limits.items() if c.costs[r] > v}
        if self.smallest_wanted and (rise := c.loss - self.base_loss - math.log1p(self.budget.max_loss)) > 0:
            over["harm"] = rise
        return over

    def check_loss(self) -> None:
        if self.budget.max_loss is not None and math.expm1(self.winner.loss - self.base_loss) > self.budget.max_loss:
            raise self.too_lossy(self.winner.loss - self.base_loss)

    def too_lossy(self, nats: float) -> NetsukeError:
        rise = math.expm1(min(nats, 60))
        return NetsukeError(
            f"fit {self.name} into this budget",
            f"--max-loss binds: inside the other limits {self.task.metric} rises by {rise:.1%} on validation text, "
            f"{self.budget.max_loss:.1%} allowed", attempt=f"--max-loss {rise * 1.05:.1%}, or a wider limit", code=1,
        )  # fmt: skip

    # 5. pack, prove

    def pack(self) -> None:
        """Writes the artifact. Before it gets its name it is read back: same logits, and its real bytes within the limit."""
        from netsuke.models.load import load
        from netsuke.models.save import save_artifact

        self.on_progress("scoring the test text", 0, 0)
        model, test = self.winner.model, self.loss_as_decoded(self.winner.model, "test")
        quality, memory = self.quality(self.winner.loss, test), self.memory(model.cfg, self.winner.layers)
        rise = quality["test"] / self.before["quality"]["test"] - 1
        data = (self.loaded.manifest or {}).get("provenance", {}).get("data")
        provenance = {"base": Path(self.name).name, "methods": [m.to_json() for m in self.winner.methods]}
        provenance |= {"netsuke": __version__} | ({"data": data} if data else {})
        facts = {
            f"{self.task.metric}_test": quality["test"],
            "loss_of_quality": rise,
            "peak_ram_planned": memory["peak"],
        }
        budget = {k: v for k, v in vars(self.budget).items() if v is not None} | {"device": self.device.name}
        self.on_progress("packing and proving", 0, 0)
        ids = self.task.windows("validation")[:2, :64]
        expected, self.proof = model(ids), {}

        def prove(folder: Path) -> None:
            difference = float((load(folder).model(ids) - expected).abs().max())
            size = sum(f.stat().st_size for f in folder.iterdir())
            self.proof |= {
                "difference": difference,
                "bytes": size,
                "divergence": self.divergence(folder, ids, expected),
            }
            if not difference <= LOGIT_LIMIT:  # also when it is no number
                raise NetsukeError(
                    f"prove {self.out.name}", f"reloaded logits differ by {difference:.2g}", f"{LOGIT_LIMIT:g}", code=1
                )
            if not self.proof["divergence"] <= ENGINE_LIMIT:
                found = f"the native engine's predictions diverge by {self.proof['divergence']:.2g} nats per token"
                raise NetsukeError(f"prove {self.out.name}", found, f"{ENGINE_LIMIT:g}", code=1)
            if size > self.budget.storage:
                raise NetsukeError(
                    f"fit {self.name}", f"the artifact has {size} bytes", f"{self.budget.storage}", code=1
                )

        save_artifact(self.out, model, self.loaded.tokenizer, provenance, facts, budget, verify=prove)
        self.memory_after = memory
        self.after = {
            "quality": quality, "bytes": self.proof["bytes"], "peak_ram": memory["peak"], "peak_ram_how": "planned",
            "latency": self.latency(model, self.winner.layers, self.winner.shares), "energy": self.winner.costs["energy"],
            "loss_of_quality": rise,
        }  # fmt: skip
        self.lap("pack")

    def divergence(self, folder: Path, ids: Tensor, expected: Tensor) -> float:
        """KL(reference || native engine) of the artifact's next-token predictions, nats per token."""
        import torch

        from netsuke.runtime.engine import Engine

        rows, length = ids.shape
        with Engine(folder, context=length, slots=rows, logit_rows=length) as engine:
            got = [engine.forward(row, [i] * length, [True] * length) for i, row in enumerate(ids.tolist())]
        ours = torch.from_numpy(np.stack(got)).double().log_softmax(-1)
        theirs = expected.double().log_softmax(-1)
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())
