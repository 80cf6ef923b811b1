"""Writes the generated parts of README.md and docs/measurements.md from the result files: `make pages`.

Sources: docs/demo.txt (what `make demo` printed), recipes/pycode/{training,evaluation}.json, benchmarks/results/*.json,
results/*.json. A part whose source is missing says so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from netsuke.bench.command import figure
from netsuke.bench.plots import kind, picture

ROOT = Path(__file__).parents[1]


def read(path: str) -> Any:
    file = ROOT / path
    if not file.exists():
        return None
    return json.loads(file.read_text()) if file.suffix == ".json" else file.read_text()


def demo() -> str:
    text = read("docs/demo.txt")
    return f"```\n{text.rstrip()}\n```" if text else "Not recorded yet."


def where(run: dict[str, Any]) -> str:
    return f"{run['cpu']}, {run['cores']} cores, torch {run['torch']}, {run['date']}, commit {run['commit']}"


def allocation() -> str:
    got = read("benchmarks/results/allocation.json")
    if got is None:
        return "Not measured yet: `python benchmarks/allocation.py --json`."
    rows = [
        "| storage | carved by `fit` | best uniform setting that fits | ratio of excess losses |", "|---|---|---|---|",
        *(
            f"| {r['budget']} | {r['bytes'] / 1e6:.2f} MB, +{r['excess']:.4f} nats | {r['uniform']}: "
            f"{r['uniform_bytes'] / 1e6:.2f} MB, +{r['uniform_excess']:.4f} nats | {r['ratio']:.2f} |"
            for r in got["rows"]
        ),
    ]  # fmt: skip
    head = (
        "Excess loss over the 16-bit model, nats per token on held-out test text; both sides use error compensation, and "
        f"choose on validation text (`python benchmarks/allocation.py`; {where(got['run'])})."
    )
    return head + "\n\n" + "\n".join(rows)


def quantization() -> str:
    got = read("benchmarks/results/quantization.json")
    if got is None:
        return "Not measured yet: `python benchmarks/quantization.py --json`."
    rows = ["| bits | bytes of the linear maps | rounding to nearest | GPTQ | descent |", "|---|---|---|---|---|"]
    solvers = ("rtn", "gptq", "descent")
    for r in got["rows"]:
        cells = " | ".join(f"x{r[s]:.4f}, {r[f'{s}_seconds']} s" for s in solvers)
        rows.append(f"| {r['bits']} | {r['bytes'] / 1e6:.2f} MB | {cells} |")
    head = f"Perplexity on test text as a multiple of the 16-bit model's {got['perplexity_16_bit']:.2f}, and seconds"
    return f"{head} (`python benchmarks/quantization.py`; {where(got['run'])}).\n\n" + "\n".join(rows)


def plans() -> str:
    got = read("benchmarks/results/plan.json")
    if got is None:
        return "Not measured yet: `python benchmarks/plan.py --json`."
    rows = ["| what | model | how | predicted | measured | off by |", "|---|---|---|---|---|---|"]
    for c in got["cells"]:
        if c["kind"] == "inference":
            how = f"{c['precision']}, context {c['context']}"
        else:
            how = f"{c['scope']}, {c['batch']} windows of {c['tokens']} tokens"
        sizes = f"{c['predicted'] / 1e6:.1f} MB | {c['measured'] / 1e6:.1f} MB | {c['error']:+.1%}"
        rows.append(f"| {c['kind']} | {c['model']} | {how} | {sizes} |")
    worst = ", ".join(f"{kind} {value:.1%} (bar {got['bars'][kind]:.0%})" for kind, value in got["worst"].items())
    head = "Peak memory of a fresh process above its idle level, predicted before loading and measured"
    note = f"{head} (`python benchmarks/plan.py`; {where(got)}). Furthest off: {worst}."
    return note + "\n\n" + "\n".join(rows)


# 4 and 8 bits; 1.1B once more, as memory was slow in the first; 16 bits, small models
RUNS_OF_LM = ("lm", "lm-again", "lm-16")


def lm() -> str:
    found = [got for name in RUNS_OF_LM if (got := read(f"benchmarks/results/{name}.json"))]
    if not found:
        return "Not measured yet: `netsuke bench lm -o benchmarks/results/lm.json`."
    picture(found[0], ROOT / "docs/lm.svg")
    return "\n\n".join([lm_run(found[0], "\n\n![Ratios to llama.cpp](lm.svg)"), *(lm_run(got) for got in found[1:])])


def lm_run(got: dict[str, Any], more: str = "") -> str:
    """One run's figures as a paragraph and a table."""
    run, limits, settings = got["run"], got["limits"], got["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in got["versions"].items() if number)
    head = (
        f"`netsuke bench lm` ({where(run)}; {versions}; {settings['threads']} threads each, sides in turn, medians of "
        f"{settings['rounds']} rounds{', a quick run: not for publication' if settings['quick'] else ''}). A ratio above 1 means "
        f"that netsuke is better, whatever the unit. Limits of the machine in the same run: {limits['read_gbps']:.1f} GB/s read "
        f"from 512 MB, {limits['vnni_gops']:.0f} G int8 multiply-accumulates/s; models that fit a cache can read faster."
    )
    notes = [f"**{sentence}.**" for sentence in got["warnings"]]
    if got["llama_cpp"]:
        notes.append(
            f"llama.cpp was built with: {got['llama_cpp']['system_info'].removeprefix('CPU : ')}.".replace("|", "·")
        )
    rows = ["| model | bits | what | netsuke | of limit | beside | peer | ratio |", "|---|---|---|---|---|---|---|---|"]
    for r in got["rows"]:
        share = "" if r["share_of_limit"] is None else f"{r['share_of_limit']:.0%}"
        rows.append(
            f"| {r['model']} | {r['bits']} | {kind(r)} | {figure(r['what'], r['netsuke'])} | {share} | {r['peer_name']} | "
            f"{figure(r['what'], r['peer'])} | {r['ratio']:.2f} |"
        )
    return "\n\n".join([head, *notes]) + more + "\n\n" + "\n".join(rows)


def lm_short() -> str:
    """One table per run: two runs of one model say how much a machine's memory swings, and none is left out."""
    found = [got for name in RUNS_OF_LM if (got := read(f"benchmarks/results/{name}.json"))]
    return (
        "\n\n".join(map(lm_short_run, found)) or "Not measured yet: `netsuke bench lm -o benchmarks/results/lm.json`."
    )


def lm_short_run(got: dict[str, Any]) -> str:
    rows = ["| model | bits | what | netsuke | llama.cpp | ratio |", "|---|---|---|---|---|---|"]
    rows += [
        f"| {r['model']} | {r['bits']} | {kind(r)} | {figure(r['what'], r['netsuke'])} | {figure(r['what'], r['peer'])} | "
        f"{r['ratio']:.2f} |"
        for r in got["rows"]
        if r["peer_name"] == "llama.cpp" and r["what"] != "first-token"
    ]  # fmt: skip
    read_limit = f"{got['limits']['read_gbps']:.0f} GB/s read in this run"
    busy = "".join(f" {sentence}." for sentence in got["warnings"])
    head = f"Two threads each, sides in turn, medians ({where(got['run'])}; {read_limit}).{busy}"
    return head + "\n\n" + "\n".join(rows)


def sparse() -> str:
    got = read("benchmarks/results/sparse.json")
    if got is None:
        return "Not measured yet: `python benchmarks/sparse.py --json`."
    rows = ["| bits | matrix | channels read | dense | input-sparse | ratio | bar |", "|---|---|---|---|---|---|---|"]
    for r in got["rows"]:
        bar = "" if r["bar"] is None else f"{r['bar']} {'met' if r['ratio'] >= r['bar'] else 'not met'}"
        rows.append(
            f"| {r['bits']} | {r['outs']} x {r['ins']} | {r['share']:.0%} | {r['dense_ms']:.2f} ms | {r['sparse_ms']:.2f} ms | "
            f"{r['ratio']:.2f} ({r['lowest']:.2f} to {r['highest']:.2f}) | {bar} |"
        )
    head = f"One product of the native engine, {got['threads']} threads, both sides in turn (`python benchmarks/sparse.py`; "
    return head + where(got["run"]) + ").\n\n" + "\n".join(rows)


def serve() -> str:
    got = read("benchmarks/results/serve.json")
    if got is None:
        return "Not measured yet: `python benchmarks/serve_load.py --json`."
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(got["statuses"].items()))
    settled = [size for second, size in got["resident"] if second >= 10]
    spread = (max(settled) - min(settled)) / min(settled)
    return (
        f"{got['clients']} clients at once for {got['seconds']:.0f} s on loopback, `{got['model']}`, "
        f"{got['server']['slots']} slots, half of them leaving midway (`python benchmarks/serve_load.py`; "
        f"{where(got['run'])}): {got['finished']} answers finished, "
        f"{got['abandoned']} abandoned, **{got['wrong']} wrong or mixed**; statuses {statuses}; "
        f"{got['generated_tokens_per_second']:.0f} tokens/s beside the clients on the same cores; resident memory "
        f"{settled[-1] / 1e6:.1f} MB, spread {spread:.2%} after the first ten seconds."
    )


def model() -> str:
    got, training = read("recipes/pycode/evaluation.json"), read("recipes/pycode/training.json")
    if got is None or training is None:
        return "Not evaluated yet: `python recipes/pycode/evaluate.py`."
    return (
        f"`pycode` is a Llama of {training['parameters'] / 1e6:.1f} M parameters trained from nothing by `recipes/pycode/` on "
        f"{training['tokens'] / 1e6:.0f} M tokens of Python ({training['seconds'] / 60:.0f} minutes on two cores). On the "
        f"{got['test_modules']} held-out modules of the standard library ({got['test_bytes']:,} bytes; split by the hash of the "
        f"module's path, so anyone can check) it needs **{got['bits_per_byte']:.3f} bits per byte**, `xz -9e` "
        f"{got['xz_9e_bits_per_byte']:.3f}: {got['fewer_bits_than_xz']:.0%} fewer "
        f"({got['long_lines_also_in_training_text']:.1%} of the held-out lines of 30 characters or more also stand somewhere in "
        f"the training text). Of {got['completions']} held-out function "
        f"headers, completed greedily by 64 tokens, {got['completions_that_parse']:.0%} have complete "
        "lines that parse as Python. "
        "`python recipes/pycode/evaluate.py` prints both."
    )


def systems() -> str:
    rows = ["| system | claims met |", "|---|---|"]
    for path in sorted((ROOT / "results").glob("*.json")):
        got = json.loads(path.read_text())
        dots = {"met": "●", "not met": "○", "cannot be shown": "·"}
        marks = "".join(dots[c["verdict"]] for c in got["claims"])
        met = sum(c["verdict"] == "met" for c in got["claims"])
        judged = sum(c["verdict"] != "cannot be shown" for c in got["claims"])
        rows.append(f"| `{got['system']}` | {marks} {met} of {judged} |")
    return "\n".join(rows) + "\n\n● met, ○ not met, · cannot be shown here."


def mcu() -> str:
    """The microcontroller's figures: counted instructions beside other kernels, and LiteRT on this machine."""
    out = []
    if got := (read("benchmarks/results/mcu_peers.json") or {}).get("network"):
        out.append(mcu_kernels(got))
    if got := read("benchmarks/results/litert.json"):
        out.append(litert(got))
    return (
        "\n\n".join(out)
        or "Not measured yet: `python benchmarks/mcu_peers.py --json`, `python benchmarks/litert.py --json`."
    )


def mcu_kernels(got: dict[str, Any]) -> str:
    rows = ["| kernels | compiler | instructions | to netsuke's |", "|---|---|---|---|"]
    best: dict[str, Any] = {}
    for r in got["rows"]:
        if r["peer"] not in best or r["instructions"] < best[r["peer"]]["instructions"]:
            best[r["peer"]] = r
    ours = best["netsuke, DSP"]["instructions"]
    for r in sorted(best.values(), key=lambda r: r["instructions"]):
        rows.append(
            f"| {r['peer']} | `{r['flags']}` | {r['instructions'] / 1e6:.1f} M | {r['instructions'] / ours:.2f}x |"
        )
    worst = max(r.get("worst_steps", 0) for r in got["rows"])
    return (
        f"One inference of MCUNetV3's mcunet-5fps ({got['macs'] / 1e6:.1f} M multiply-accumulates) on an emulated Cortex-M4, "
        f"each with its best flags; every layer of theirs is at most {worst} step from ours on the same inputs "
        f"(`python benchmarks/mcu_peers.py`; {where(got['run'])}).\n\n" + "\n".join(rows)
    )


def litert(got: dict[str, Any]) -> str:
    """LiteRT's table: every row with its control and with the bars that it misses."""
    head = (
        "| network | inputs | ours = on | ours = off | off = on (control) | operators within a step of on / off | C | "
        "LiteRT off | LiteRT on | C/off | C/on | bars missed |"
    )
    rows, bars = [head, "|---" * (head.count("|") - 1) + "|"], got["bars"]
    for r in got["rows"]:
        t, o = r["latency"], r["outputs"]
        equal = " | ".join(f"{o[k]['equal']:.2%}" for k in ("to_on", "to_off", "off_to_on"))
        inside = " / ".join(f"{o[k]['within_a_step']:.2%}" for k in ("operators_to_on", "operators_to_off"))
        ms = " | ".join(f"{t[k]['ms']:.4g} ms" for k in ("c", "off", "on"))
        ratios = " | ".join(f"{t[k]['ratio']:.2f}" for k in ("c_to_off", "c_to_on"))
        missed = ", ".join(MET[k] for k, met in r["met"].items() if not met) or "none"
        rows.append(f"| {r['name']} | {r['inputs'].rstrip('.')} | {equal} | {inside} | {ms} | {ratios} | {missed} |")
    control = next(r["outputs"]["off_to_on"]["equal"] for r in got["rows"] if r["name"] == "DTLN")
    return (
        f"The same int8 files in LiteRT {got['litert']}, one thread, sides in turn, medians of {got['rounds']} rounds "
        f"(`python benchmarks/litert.py`; {where(got['run'])}). On and off are LiteRT with its default kernels, XNNPACK, and "
        "without; off = on is the control: how far LiteRT is from itself. Noise is noise: it says nothing of a network's "
        f"accuracy. The bars: {bars['within_a_step']:.1%} of a network's outputs, and of its operators' outputs, within a step "
        f"of on and of off; C at most {bars['latency_to_off']} times off's time.\n\n" + "\n".join(rows) + "\n\n"
        "DTLN keeps a state from run to run, in which single steps add up. LiteRT's own two ways are equal on "
        f"{control:.1%} of its outputs, so the rounding in which those two differ does not explain how far ours is from both."
    )


def compressors() -> str:
    got = read("benchmarks/results/compressors.json")
    if got is None:
        return "Not measured yet: `python benchmarks/compressors.py --json`."
    names = {k: v for m in got["models"] for library in m["versions"].values() for k, v in library.items()}
    libraries = ", ".join(f"{k} {v}" for k, v in names.items() if k not in ("torch", "transformers"))
    apart = max(a for m in got["models"] for library in m["apart"].values() for a in library.values())
    windows = got["windows"]
    head = (
        f"The same model, calibration text ({windows['calibration']} windows of {got['context']} tokens) and held-out text "
        f"({windows['test']} windows, scored once a row) on both sides; the unmodified model's losses and logits agree to "
        f"{apart:.0e} (`python benchmarks/compressors.py`; {where(got['run'])}; {libraries}). x is perplexity over the "
        "unmodified model's; MB are of the folder (weights, configuration, tokenizer), zeros counted as a bit for each place and "
        "the values left; seconds are of processor time, one run. "
        "The carving is what `fit` makes of no more bytes than the peer's folder has: one serves peers up to "
        f"{got['near'] - 1:.0%} larger, and one that loses nothing measurable every larger peer. Ratio: its excess loss over "
        f"the peer's, where that is {got['least']} nats or more; better and worse: by more than two standard errors over the "
        "windows."
    )
    kinds = {"free": "The carving free", "table 16 bits": "its table kept at 16 bits"}
    counts = [
        f"{what}: {s['better']} better, {s['even']} even, {s['worse']} worse"
        + (f", median of {s['ratios']} ratios {s['median_ratio']:.2f}" if s["ratios"] else "")
        for what, s in ((kinds[k], got["summary"][k]) for k in kinds)
        if s["better"] + s["even"] + s["worse"]
    ]
    parts = [head, "; ".join(counts) + "."]
    for m in got["models"]:
        parts += [f"### {m['model']}", compressors_peers(m), compressors_own(m)]
    return "\n\n".join(parts)


def compressors_peers(m: dict[str, Any]) -> str:
    """One model's peers, each beside the carvings of no more bytes."""
    fixed = any(d["table"] is not None for d in m["duels"])
    head = "| peer | setting | left unquantized | MB | x | s | carving, MB | x | ratio |  |"
    head += " table at 16 bits: ratio |  |" * fixed
    rows = [head, "|---" * (head.count("|") - 1) + "|"]
    for r in m["peers"]:
        if "error" in r:
            rows.append(f"| {r['peer']} | {r['setting']} | {r['error']} |" + " |" * (head.count("|") - 4))
            continue
        cells = [
            r["peer"], r["setting"], r["left"], f"{r['all'] / 1e6:.2f}", f"{r['perplexity_ratio']:.4f}", f"{r['busy']:.3g}",
        ]  # fmt: skip
        mine = {d["table"]: d for d in m["duels"] if (d["peer"], d["setting"]) == (r["peer"], r["setting"])}
        for table in (None, 16)[: 1 + fixed]:
            d = mine.get(table, {})
            if table is None:
                size, x = d.get("all_netsuke"), d.get("excess_netsuke")
                cells += [
                    "" if size is None else f"{size / 1e6:.2f}",
                    "" if x is None else f"{math.exp(min(x, 50)):.4f}",
                ]
            cells += ["" if d.get("ratio") is None else f"{d['ratio']:.2f}", d.get("error") or d.get("verdict", "")]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def compressors_own(m: dict[str, Any]) -> str:
    """One model's rows of netsuke's single methods."""
    rows = ["| netsuke, one method | left unquantized | MB | x | s |", "|---|---|---|---|---|"]
    rows += [
        f"| {r['setting']} | {r['left']} | {r['all'] / 1e6:.2f} | {r['perplexity_ratio']:.4f} | {r['busy']:.3g} |"
        for r in m["netsuke"]
    ]
    spent = [f["busy"] for f in m["fits"] if "busy" in f]
    note = f"Unmodified: {m['all'] / 1e6:.2f} MB."
    if spent:
        note += f" A carving takes {min(spent):.0f} to {max(spent):.0f} s, most of it to measure the choices."
    return "\n".join(rows) + f"\n\n{note}"


MET = {  # what the row of a network misses, by the name of its bar in litert.json
    "outputs_to_off": "outputs to off", "outputs_to_on": "outputs to on", "operators": "operators",
    "latency_to_off": "latency",
}  # fmt: skip
PARTS = {
    "mcu": mcu,
    "demo": demo,
    "measured": allocation,
    "quantization": quantization,
    "compressors": compressors,
    "plans": plans,
    "lm": lm,
    "lm-short": lm_short,
    "sparse": sparse,
    "serve": serve,
    "model": model,
    "systems": systems,
}


def fill(path: Path, parts: dict[str, Callable[[], str]] | None = None) -> None:
    """Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->`, by default with `PARTS`."""
    text = path.read_text()
    for name, make in (parts or PARTS).items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text)
    path.write_text(text)


if __name__ == "__main__":
    fill(ROOT / "README.md")
    fill(ROOT / "docs/measurements.md")
    fill(ROOT / "docs/microcontrollers.md")
    from methods_docs import PARTS as OF_METHODS  # which takes `read` and `where` from here

    fill(ROOT / "docs/methods.md", OF_METHODS)
