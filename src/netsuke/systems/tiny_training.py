"""Tiny Training (MCUNetV3): an int8 network trained in place on a microcontroller with 256 KB of SRAM.

"On-Device Training Under 256KB Memory", NeurIPS 2022, arXiv 2206.15472.

What the paper gives and where it is here
    plans of sparse update, their memory rule         graph/update_plan.py, train/sparse_update.py
    contribution analysis and the search of a plan    train/sparse_update.py, through the one allocator
    quantization-aware scaling                        graph/update_plan.py (factors), train/int8_sgd.py (training)
    the int8 graph with gradients                     graph/simulate.py (PyTorch, batches, for choosing and measuring)
    the engine: differentiation before the run, dead code, reordering, updates in place
                                                      graph/differentiate.py, ops/train.py, kernels/train.c, graph/arena.py
    firmware                                          export/c, devices/board.py (emulated Cortex-M4 and Cortex-M7)

What differs, and why
    Codes are updated with seeded stochastic rounding and saturation; the released kernels cut toward zero and wrap around
    (`UpdateRule(truncate=True)`): with single images most of their steps vanish. Both are measured below.
    A value exactly at an end of its range lets no gradient pass, so that a mask follows from the int8 output.
    Where a tensor has two readers its gradients add up; the released differentiation keeps the last one.
    Trained channels live in RAM and are merged with the layer's other weights from flash for the time in which it runs: the
    memory rule is then what is linked, and all five published plans fit.
    Simulated training uses a new float head, as the released simulation does; the firmware trains the int8 head.
    Data: clothing photographs of ten classes instead of Flowers-102; 20 epochs instead of 50; no momentum.

What the controls are
    Sparse update: training the head alone must not reach the last 12 layers. Against the linear probe: shuffled labels.
    The arena: updates that wait until the end of the step must not fit.
    Norm ratios: without scaling. Firmware: a reference whose rounding has another seed must end with other weights.
    Personalisation (tiny_training_personal.py): as many steps on another pupil's hands must not give the gain.

What cannot be shown here
    Seconds and joules of a board, ImageNet over its validation set, Flowers-102 and VWW.
"""

from __future__ import annotations

import functools

import numpy as np

from netsuke.claims import Claim, Measured
from netsuke.graph.arena import plan_arena
from netsuke.graph.differentiate import UpdateRule, training_graph
from netsuke.graph.lower import scratch
from netsuke.graph.update_plan import first_op, full, last
from netsuke.systems import tiny_training_cases as cases
from netsuke.systems.tiny_training_cases import CLASSES, CLOTHES, MODEL, MODELS, SRAM
from netsuke.systems.tiny_training_personal import DATA as SIGNS
from netsuke.systems.tiny_training_personal import anothers_shots, personal
from netsuke.train.int8_sgd import accuracy, on_chip
from netsuke.train.on_mcu import STACK
from netsuke.train.sparse_update import PUBLISHED, extra_bytes

RATES = (0.005, 0.01, 0.02, 0.03, 0.05)  # with scaling these are rates of real SGD
SPARSE_RATES = (
    0.005,
    0.0125,
    0.025,
)  # plan 99 takes the largest, at which the last 12 layers diverge; none above was tried
STORAGE_RATES = (0.0003, 0.001, 0.003)
EXPECTED = (50, 75, 100, 125, 148, 448, 1400)  # kB


def memory_rule(quick: bool) -> Measured:
    g = cases.network()
    sizes = [extra_bytes(g, p) / 1024 for p in (*PUBLISHED.values(), last(g, 12), full(g))]
    others = [extra_bytes(cases.network(n), full(cases.network(n))) / 1024 for n in MODELS[1:]]
    shown = (
        " / ".join(f"{s:.1f}" for s in sizes) + f" kB; everything in the other two: {others[0]:.0f}, {others[1]:.0f}"
    )
    met = all(abs(s - e) < 1 for s, e in zip((*sizes, *others), (*EXPECTED, 1306, 1211)))
    return Measured(shown, met, {"sizes": sizes, "others": others})


def scaling(quick: bool) -> Measured:
    on, off = cases.on_test("last 6", RATES, True, quick), cases.unscaled_on_test("last 6", quick)
    gain = on["mean"] - off["mean"]
    shown = (
        f"{on['mean']:.1%} with (rate {on['rate']:g}), {off['mean']:.1%} without (codes {off['rate']:g}, head "
        f"{off['head_rate']:g}): {gain * 100:+.1f} "
        f"points over {len(on['test'])} seeds"
    )
    return Measured(shown, None if quick else gain >= 0.02, {"with": on, "without": off})


def norms(quick: bool, scaled: bool = True) -> Measured:
    rows = cases.norm_ratios(8 if quick else 32)
    off = np.array([abs(r["scaled" if scaled else "codes"] - r["float"]) for r in rows])
    far = np.array([abs(r["codes"] - r["float"]) for r in rows])
    shown = (
        f"{np.mean(off < 0.5):.0%} of {len(rows)} tensors within 0.5 decades of the float network's ratio (median "
        f"{np.median(off):.2f}); codes alone are off by {np.median(far):.1f} decades"
    )
    met = bool(np.mean(off < 0.5) >= 0.9 and np.median(far) > 2)
    return Measured(shown, met, {"rows": rows})


def sparse(quick: bool, small: str = "plan 99") -> Measured:
    few, many = (cases.on_test(p, SPARSE_RATES, True, quick) for p in (small, "last 12"))
    g, table = cases.network(), cases.plans()
    bytes_few, bytes_many = (extra_bytes(g, table[p]) for p in (small, "last 12"))
    shown = (
        f"{small} {few['mean']:.1%} at {bytes_few / 1024:.0f} kB, last 12 layers {many['mean']:.1%} at "
        f"{bytes_many / 1024:.0f} kB ({bytes_few / bytes_many:.2f}x)"
    )
    met = few["mean"] >= many["mean"] - 0.005 and bytes_few <= 0.225 * bytes_many
    return Measured(shown, None if quick else met, {"sparse": few, "last 12": many})


def beats_probe(quick: bool) -> Measured:
    got, line = cases.on_test("plan 99", SPARSE_RATES, True, quick), cases.probe()
    gain = got["mean"] - line["test"]
    shown = f"{got['mean']:.1%}, linear probe {line['test']:.1%}: {gain * 100:+.1f} points"
    return Measured(shown, None if quick else gain >= 0.03, {"plan 99": got, "probe": line})


def plan_search(quick: bool) -> Measured:
    plan, gains = cases.searched(quick)
    g = cases.network()
    size = extra_bytes(g, plan) / 1024
    rows = ", ".join(f"{k}: {v:g}" for k, v in sorted(plan.weights.items()))
    shown = f"biases of {plan.n_bias} layers, weights {{{rows}}}, {size:.0f} kB"
    values = {
        "plan": plan.to_json(), "kB": size, "bias": gains.bias, "weight": {str(k): v for k, v in gains.weight.items()}
    }  # fmt: skip
    if quick:
        return Measured(shown, None, values)
    ours, theirs = (cases.on_test(p, SPARSE_RATES, True, quick) for p in ("searched", "plan 99"))
    shown += f": {ours['mean']:.1%}, the published plan {theirs['mean']:.1%}"
    met = ours["mean"] >= theirs["mean"] - 0.01 and size <= extra_bytes(g, PUBLISHED[99]) / 1024
    return Measured(shown, met, values | {"searched": ours, "published": theirs})


def shuffled_labels(quick: bool) -> Measured:
    got = cases.score("test", "last 6", 0.02, True, 0, 2 if quick else 20, shuffled=True)
    return Measured(f"shuffled labels: {got:.1%}", got >= cases.probe()["test"] + 0.03, {"test": got})


def arena(quick: bool, early: bool = True) -> Measured:
    """All five published plans; `early` False is the control: gradients that wait until the end of the step."""
    values = {}
    for name, plan in PUBLISHED.items():
        graph = training_graph(cases.network(), plan, CLASSES, early=early)
        planned = plan_arena(graph, scratch)
        variables = sum(t.bytes for t in graph.tensors if t.variable)
        values[f"plan {name}"] = {
            "arena": planned.size, "lower_bound": planned.lower_bound, "variables": variables, "stack": STACK,
            "total": planned.size + variables + STACK, "operators": len(graph.ops),
        }  # fmt: skip
    ratio = max(v["arena"] / v["lower_bound"] for v in values.values())
    totals = " / ".join(f"{v['total'] / 1024:.0f}" for v in values.values())
    shown = (
        f"at most {ratio:.3f}x of the bound; arena, trained weights and {STACK} bytes of stack of the five plans: {totals} of "
        f"{SRAM >> 10} KB"
    )
    return Measured(shown, ratio <= 1.10 and all(v["total"] <= SRAM for v in values.values()), values)


def no_board() -> Measured | None:
    from netsuke.devices.board import missing_tools

    packages = missing_tools()
    return Measured(f"boards cannot be emulated: sudo apt-get install {packages}", None) if packages else None


def firmware(core: str, quick: bool, rounding_seed: int = 0) -> Measured:
    if absent := no_board():
        return absent
    steps = 4 if quick else 100
    run, still = cases.firmware(core, steps), cases.firmware(core, steps, rate=0.0)
    logits, variables = cases.reference_run(steps, rounding_seed)
    differ = [
        run["graph"].tensors[i].name
        for i in sorted(variables.keys() | run["learned"].keys())
        if not np.array_equal(run["learned"].get(i), variables.get(i))
    ]
    first = np.array_equal(run["outputs"][0][:1], logits[0])
    loss, untrained = (-np.log(np.maximum(r["outputs"][1].ravel(), 1e-12)) for r in (run, still))
    quarter, chance = max(steps // 4, 1), float(np.log(CLASSES))
    start, end, floor = (float(part.mean()) for part in (loss[:quarter], loss[-quarter:], untrained[-quarter:]))
    weights = f"{len(differ)} of {len(variables)} differ" if differ else f"all {len(variables)} equal"
    shown = (
        f"{steps} steps in {run['ram'] / 1024:.0f} KB of RAM + {run['stack_peak']} bytes of stack and "
        f"{run['flash'] / 1024:.0f} KB of flash; loss {start:.2f} in the first quarter, {end:.2f} in the last (guessing "
        f"{chance:.2f}, untrained on the same images {floor:.2f}); first logits {'equal' if first else 'differ'}; trained "
        f"tensors: {weights}; {run['instructions'] / 1e6:.0f} M instructions a step"
    )
    values = {k: run[k] for k in ("ram", "flash", "stack_peak", "arena", "instructions", "dsp", "optimise")}
    learns = end < min(start, chance, floor)
    met = bool(first and not differ and (quick or learns) and run["passed"] and still["passed"])
    values |= {"loss": loss.tolist(), "loss_untrained": untrained.tolist(), "tensors": len(variables), "differ": differ}
    return Measured(shown, met, values)


def desktop(quick: bool) -> Measured:
    from netsuke.measure.peak import peak_of

    if absent := no_board():
        return absent
    peak = peak_of("netsuke.systems.tiny_training_cases:desktop_step", threads=1)
    run = cases.firmware("m7", 4 if quick else 100)
    device = run["ram"] + run["stack_peak"]
    ratio = peak.peak / device
    shown = (
        f"{ratio:.0f}x: a step of everything in float32, PyTorch's whole process {peak.peak / 2**20:.0f} MB resident, against "
        f"all RAM of a step of plan 49 on the device, {device / 1024:.0f} KB; without what the process takes when idle "
        f"{peak.above / 2**20:.0f} MB, {peak.above / device:.0f}x"
    )
    return Measured(shown, ratio >= 1000, {"peak": peak.peak, "above_idle": peak.above, "device": device})


def speed(quick: bool) -> Measured:
    if absent := no_board():
        return absent
    few, many = (cases.firmware("m4", 2, plan, limited=False)["instructions"] for plan in ("plan 49", "everything"))
    shown = f"{few / many:.2f}x: {few / 1e6:.0f} M instructions instead of {many / 1e6:.0f} M (Cortex-M4)"
    return Measured(shown, few <= 0.5 * many, {"sparse": few, "full": many})


def storage(quick: bool) -> Measured:
    """The chip's kernels on this machine, plan 49, single images; rates from validation at seed 0, test over seeds."""
    g, plan, data = cases.network(), cases.plans()["plan 49"], cases.clothes()
    cut = cases.cuts()[first_op(g, plan)]
    images, epochs, seeds = (200, 1, 1) if quick else (None, 4, 3)

    def run(truncate: bool, rate: float, seed: int, split: str) -> float:
        done = on_chip(
            g, plan, [x[:images] for x in cut["train"]], data["train"].labels[:images], CLASSES, rate=rate,
            epochs=epochs, rule=UpdateRule(truncate=truncate, seed=seed), order_seed=seed,
        )  # fmt: skip
        return accuracy(cases.Simulation(done.graph, first_op(g, plan)), cut[split], data[split].labels)

    values = {}
    for name, truncate in (("stochastic", False), ("truncated", True)):
        rate, found = 0.001, {}
        if not quick:
            rate, found = cases.widened(STORAGE_RATES, lambda r, t=truncate: run(t, r, 0, "validation"))
        test = [run(truncate, rate, seed, "test") for seed in range(seeds)]
        values[name] = {"rate": rate, "validation": found, "test": test, "mean": float(np.mean(test))}
    a, b = values["stochastic"], values["truncated"]
    shown = (
        f"{a['mean']:.1%} stochastic (rate {a['rate']:g}), {b['mean']:.1%} cut toward zero (rate {b['rate']:g}) over {seeds} "
        f"seeds (int8 head, single images, {epochs} epochs)"
    )
    return Measured(shown, None if quick else a["mean"] >= b["mean"] + 0.02, values)


BOTH = (MODEL, *CLOTHES)
FIRMWARE_BAR = (
    "100 steps of plan 49 in 256 KB / 1 MB; loss of the last quarter below the first's, guessing and the untrained network; "
    "every trained tensor as in Python"
)
PERSONAL_BAR = (
    "250 steps on shots of ten photographs: held-out shots of the same ten (one photograph per sign) + 3 points and above the "
    "nearest practised shot, from another pupil's at most half of that, 3 seeds; weights as in Python on both cores"
)
CLAIMS = [
    Claim("the memory rule of sparse update", "plans of 49, 74, 99, 124, 148 KB; 448 KB for 12 layers",
          "50, 75, 100, 125, 148, 448, 1400 kB to 1 kB", memory_rule, needs=MODELS),
    Claim("quantization-aware scaling lets int8 training converge", "84.3 to 88.1 % (Flowers-102, last 6 layers)",
          "+ 2 points, each at its best rates (without: of codes and of the head), 3 seeds", scaling, needs=BOTH),
    Claim("weight and gradient norms stand as in the float network", "ratios match after scaling",
          "90 % of tensors within 0.5 decades; > 2 decades off without", norms,
          functools.partial(norms, scaled=False), needs=BOTH),
    Claim("sparse update matches a deep full one at a fraction of its memory", "88.8 % at 100 KB; 87.7 % at 448 KB",
          "plan 99 ≥ last 12 layers - 0.5 points at 0.22x the memory", sparse,
          functools.partial(sparse, small="head"), needs=BOTH),
    Claim("contribution analysis finds a plan", "a plan found once serves all data sets",
          "≥ plan 99 - 1 point at no more memory (our bar: the paper gives none)", plan_search, needs=BOTH),
    Claim("training beats a linear probe of the frozen network", "not given", "+ 3 points", beats_probe, shuffled_labels,
          needs=BOTH),
    Claim("the arena of a training step", "first-fit under 256 KB",
          "≤ 1.10x of live bytes; all five plans within 256 KB with their stack", arena,
          functools.partial(arena, early=False), needs=(MODEL,)),
    Claim("firmware trains on a Cortex-M4", "STM32F746, under 256 KB", FIRMWARE_BAR, functools.partial(firmware, "m4"),
          functools.partial(firmware, "m4", rounding_seed=1), needs=BOTH),
    Claim("firmware trains on a Cortex-M7", "STM32F746, under 256 KB", "the same", functools.partial(firmware, "m7"),
          functools.partial(firmware, "m7", rounding_seed=1), needs=BOTH),
    Claim("practice on the chip fits the network to a pupil's hand signs", "not given", PERSONAL_BAR, personal,
          anothers_shots, needs=(MODEL, *SIGNS)),
    Claim("codes in place need stochastic rounding", "released kernels cut toward zero",
          "+ 2 points (no bar in the paper), each at its best rate, 3 seeds", storage, needs=BOTH),
    Claim("memory against a desktop framework", "< 1/1000", "≥ 1000x, a whole process against all of the device's RAM",
          desktop, needs=BOTH),
    Claim("a sparse step costs less than a full one", "23x with stock kernels", "≤ 0.5x instructions", speed, needs=BOTH),
    Claim("seconds and joules on a board", "about 20x less memory, 23x faster on an STM32F746",
          why="no board here: instructions on an emulated core stand in for it"),
    Claim("accuracy on Flowers-102 and VWW, ImageNet top-1", "88.8 %; 45.7, 54.1, 48.3 %", why="these data are not here"),
]  # fmt: skip
