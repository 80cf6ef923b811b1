"""The generated parts of docs/methods.md: what was measured of the shrinking methods, from benchmarks/results and results/."""

from __future__ import annotations

import json
from typing import Any

from ecg_docs import grid
from pages import read, where


def settings(methods: list[dict[str, Any]]) -> str:
    """The knobs of a setting that are not defaults, as the command line writes them."""
    from netsuke.compress.method import registry

    words = []
    for one in methods:
        usual = json.loads(json.dumps(registry()[one["method"]]().to_json()))  # tuples are lists in the result
        knobs = ",".join(f"{k}={v}" for k, v in one.items() if v != usual.get(k))
        words.append(f"`{one['method']}{':' if knobs else ''}{knobs}`")
    return " then ".join(words) or "as trained"


def chart() -> str:
    got = read("benchmarks/results/methods.json")
    if got is None:
        return "Not measured yet: `python benchmarks/methods.py --json`."
    again = got.get("run_of_speeds")
    busy = (
        f" Speeds were measured again alone ({where(again)}; load {again['load_average']:.1f})."
        if again
        else " Speeds are from a machine that other programs kept busy, and noisy: read them as magnitudes "
        "(`--speeds` measures them again)."
    )
    return (
        "![Quality against bytes and against speed](methods.svg)\n\n"
        f"`{got['model']}`, perplexity on validation text; speed in the native engine over the 16-bit model's, medians of turns "
        f"(`python benchmarks/methods.py`; {where(got['run'])}). Stars: what `fit` carved at each budget.{busy} "
        f"With half of a context behind every token, and the {got['points'][0]['bytes'] / 1e6:.0f} MB of the 16-bit model small "
        "enough for a cache, fewer bytes buy little time here; [measurements.md](measurements.md) has decoding of larger shapes."
    )


def duels() -> str:
    """`fit` against the best single setting inside the same budget."""
    got = read("benchmarks/results/methods.json")
    if got is None:
        return "Not measured yet: `python benchmarks/methods.py --json`."
    rows = []
    for d in got["duels"]:
        budget = ", ".join(f"{k} {amount(k, v)}" for k, v in d["budget"].items())
        ours = f"{d['excess_fit']:+.4f} nats, {d['fit']['bytes'] / 1e6:.2f} MB"
        single, ratio = "none fits", "–"
        if "single" in d:
            single = f"{settings(d['single_methods'])}: {d['excess_single']:+.4f} nats"
            ratio = f"{d['ratio']:.2f}"
        rows.append([budget, ours, single, ratio])
    met = sum(d.get("met", True) for d in got["duels"])
    return (
        grid(("budget", "`fit`, all choices", "best single setting", "ratio of excess losses"), rows)
        + f"\n\nExcess loss over the 16-bit model on test text, scored once. At most {got['bar']} is the bar: met at {met} of "
        f"{len(got['duels'])} budgets. Latencies are those of the card of {got['device']}."
    )


def amount(key: str, text: str) -> str:
    return f"{float(text[:-1]) / 1e6:.2f} MB" if key == "storage" else f"{float(text[:-1]) * 1e3:.2f} ms per token"


def points() -> str:
    got = read("benchmarks/results/methods.json")
    if got is None:
        return "Not measured yet."
    floor = got["validation"]
    rows = [
        [
            p["name"], settings(p["methods"]), f"{p['bytes'] / 1e6:.2f} MB", f"x{p['validation'] / floor:.3f}",
            f"x{p['speed']:.2f}", f"{p['seconds']:.0f} s",
        ]
        for p in got["points"]
    ]  # fmt: skip
    return grid(("method", "setting", "bytes", "perplexity", "tokens/s", "time to make it"), rows) + (
        "\n\nTimes to make it are of one run, one thread, beside other work: magnitudes."
    )


def carved() -> str:
    """`fit` for this machine beside llama.cpp's files."""
    got = read("benchmarks/results/carved.json")
    if got is None:
        return "Not measured yet: `python benchmarks/carved.py --json`."
    peers = {d["peer"] for d in got["duels"]}
    rows = []
    for r in got["rows"]:
        by = "llama.cpp" if r["side"] in peers else "`fit`" if r["methods"] else "netsuke"
        low, _, high = r["quartiles"]
        speed = f"{r['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})"
        rows.append([f"{by}, {r['side']}", f"{r['bytes'] / 1e6:.2f} MB", f"{r['rise']:+.2%}", speed])
    said = "; ".join(
        f"beside {d['peer']} **{d['ratio']:.2f}x** (bar {d['bar']}x) at {d['rise']:+.2%} ({d['allowed']:.2%} allowed): "
        f"{'met' if d['met'] else 'not met'}"
        for d in got["duels"]
    )
    busy = f"; load {got['load_average']:.1f} when decoding began" if got["load_average"] > 0.5 else ""
    return (
        grid(("side", "bytes", "perplexity, test text, own runtime", "tokens/s (quartiles)"), rows)
        + f"\n\n`{got['model']}`, {got['settings']['threads']} threads each, sides in turn "
        f"(`python benchmarks/carved.py`; {where(got['run'])}{busy}): {said}. "
        "A first run asked `fit` for all of Q4_0's loss on validation text, kept it there, and lost 1.82% on test text where "
        "Q4_0 lost 1.79%: a limit kept to the last digit on one text is kept on another half of the time, so half is asked."
    )


def claim(system: str, start: str) -> str:
    """What was measured for the claims of a system whose text starts so."""
    got = read(f"results/{system}.json")
    if got is None:
        return f"Not measured yet: `netsuke reproduce {system}`."
    rows = [c for c in got["claims"] if c["text"].startswith(start)]
    return "\n".join(f"- {c['text']}: {c['measured']} (bar {c['bar']}: {c['verdict']})" for c in rows)


def matrix() -> str:
    """Which pairs of methods compose, over all shipped models."""
    got = read("benchmarks/results/matrix.json")
    if got is None:
        return "Not measured yet: `python benchmarks/matrix.py --json`."
    rows, names = got["rows"], list(dict.fromkeys(r["model"] for r in got["rows"]))
    lines = []
    for name in names:
        own = [r for r in rows if r["model"] == name]
        whole = sum(r["composes"] for r in own)
        why = dict.fromkeys(f"`{' then '.join(r['methods'])}`" for r in own if not r["composes"])
        lines.append([f"`{name}`", f"{whole} of {len(own)}", ", ".join(why) or "none"])
    head = (
        f"Single methods and pairs, each applied, read back and compared (`python benchmarks/matrix.py`; {where(got['run'])}). "
        "What is refused says which map stands in the way and what to do; the sentences are in the result file."
    )
    return head + "\n\n" + grid(("model", "compose", "refused"), lines)


PARTS = {
    "methods-chart": chart, "methods-duels": duels, "methods-points": points, "methods-carved": carved,
    "methods-matrix": matrix, "methods-memory": lambda: claim("zeroqat", "memory"),
}  # fmt: skip
