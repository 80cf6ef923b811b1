"""The report: one honest page from one dictionary, whatever is missing in it and whatever names it holds."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from netsuke import report as rep
from netsuke import report_plots as plots
from netsuke.errors import NetsukeError

SAMPLE = json.loads((Path(__file__).parent / "sample_fit.json").read_text(encoding="utf-8"))
VERDICT = (
    "pycode fits the Raspberry Pi Zero 2 W: 13.0 MB → 3.97 MB (−69 %), "
    "perplexity 9.12 → 9.40 (+3.1 %) on held-out test text"
)
HOSTILE = '<script>alert("x")</script>$\\frac{1}{0}$ & "quoted"'
VOID = {"meta", "link", "br", "img", "input", "hr", "col"}


class Page(HTMLParser):
    """Collects what a browser would fetch or run, and checks that tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched: list[str] = []
        self.scripts, self.text, self.open = 0, [], []
        self.feed(text)
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert tag not in ("link", "iframe", "object", "embed", "img", "base"), tag
        self.scripts += tag == "script"
        for name, value in attrs:
            assert not name.startswith("on"), f"{name} on <{tag}>"
            if name in ("src", "href", "action", "srcset", "data") and not (value or "").startswith("#"):
                self.fetched.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return rep.render(SAMPLE)


def changed(**parts) -> dict:
    return {**copy.deepcopy(SAMPLE), **parts}


def test_page_fetches_nothing_and_stays_small(page):
    parsed = Page(page)
    assert parsed.fetched == [] and parsed.scripts == 1
    assert not re.search(r"https?://|//[a-z]|@import", re.sub(r"<script>.*?</script>", "", page, flags=re.S))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert len(page.encode()) < 400_000


def test_page_says_the_verdict_and_every_section(page):
    assert rep.verdict(SAMPLE) == VERDICT
    assert f"<title>{VERDICT}</title>" in page
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads == [
        "Before and after", "Quality against bytes", "What was carved", "Memory while it runs", "The trivial floors",
        "Checks", "Run it again", "Where the numbers come from",
    ]  # fmt: skip
    text = " ".join("".join(Page(page).text).split())
    for fact in (
        SAMPLE["command"], SAMPLE["metric"]["data"]["splits"]["test"]["sha256"], "predicted for pi-zero-2w by its card",
        "3-bit round-to-nearest, all layers", "artifact reloaded gives the carved model's logits", SAMPLE["sample"],
    ):  # fmt: skip
        assert fact in text, fact


def test_same_report_same_bytes(page):
    again = "import json,sys; from netsuke.report import render; sys.stdout.write(render(json.load(sys.stdin)))"
    out = subprocess.run(
        [sys.executable, "-c", again], input=json.dumps(SAMPLE), capture_output=True, text=True, encoding="utf-8",
        env={"PYTHONHASHSEED": "7", "PYTHONUTF8": "1", "LC_ALL": "C", "PATH": ""}, check=True,
    )  # fmt: skip
    assert out.stdout == page


def test_hostile_names_stay_text():
    bad = changed(model=HOSTILE, command=HOSTILE, source=HOSTILE, sample=None)
    bad["device"].update(title=HOSTILE, rates={HOSTILE: 1.0})
    bad["metric"]["name"] = HOSTILE
    bad["curve"][2]["label"] = bad["floors"][0]["name"] = bad["checks"][0]["what"] = HOSTILE
    bad["choices"][0].update(part=HOSTILE, bits={HOSTILE: HOSTILE}, method=HOSTILE)
    bad["memory_after"][HOSTILE] = 5
    bad["after"]["latency"]["how"] = HOSTILE
    page = rep.render(bad)
    assert Page(page).scripts == 1, "only the page's own script"
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert HOSTILE in "".join(Page(page).text)
    from rich.console import Console

    shown = io.StringIO()
    Console(file=shown, width=200).print(rep.summary_table(changed(model="[red]m[/red]")))
    assert "[red]m[/red] fits" in shown.getvalue()


def paths(value, prefix=()):
    for key, inner in value.items():
        yield (*prefix, key)
        if isinstance(inner, dict):
            yield from paths(inner, (*prefix, key))


@pytest.mark.parametrize("path", sorted(paths(SAMPLE)), ids=".".join)
def test_any_part_may_be_null_or_missing(path, monkeypatch):
    monkeypatch.setattr(plots, "_curve", lambda *_: "")  # test_curve_draws draws
    for drop in (True, False):
        cut = copy.deepcopy(SAMPLE)
        inner = cut
        for key in path[:-1]:
            inner = inner[key]
        if drop:
            del inner[path[-1]]
        else:
            inner[path[-1]] = None
        Page(rep.render(cut))
        assert rep.summary_lines(cut)[0].startswith(("pycode fits ", "pycode does not fit ", "the model fits "))
        assert rep.compare(cut, SAMPLE)


def test_almost_nothing_still_makes_a_page():
    for poor in (
        {},
        {"model": "m", "fits": True},
        {"model": "m", "curve": [{"bytes": 1}, {}], "choices": [{}], "floors": [{}]},
    ):
        Page(rep.render(poor))
        assert rep.summary_lines(poor)[0].endswith(" the device.")
        assert rep.summary_table(poor).row_count == 0


@pytest.mark.parametrize("change", ["no budget", "no before", "no floors", "higher", "flat", "log", "infinite"])
def test_curve_draws(change):
    r = copy.deepcopy(SAMPLE)
    if change == "no budget":
        r["budget"] = None
    elif change == "no before":
        r["before"] = None
    elif change == "no floors":
        r["floors"] = None
    elif change == "higher":
        r["metric"]["higher_is_better"] = True
        for p in r["curve"]:
            p.update(quality_predicted=1 / p["quality_predicted"], quality_measured=None)
    elif change == "flat":
        r["curve"] = [{"bytes": b, "quality_predicted": 2.0} for b in (3, 4)]
        r.update(floors=None, before=None, budget=None)
    elif change == "log":
        r["before"]["bytes"] *= 40
    else:
        r["floors"][4]["quality"] = math.inf
    drawn = plots.curves(rep.plain(r))
    assert set(drawn) == {"wide", "narrow"}
    for name, svg in drawn.items():
        Page(svg)
        ids = re.findall(r'id="([^"]*)"', svg)
        assert all(i.startswith(f"{name}-") for i in ids) and len(ids) == len(set(ids))
        assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg)) <= {
            pair for i in ids for pair in ((i, ""), ("", i))
        }
        assert "#0102" not in svg, "a marker colour was left"
        assert f"limit {rep.size(4e6)}" in svg or change in ("no budget", "flat")


def test_curve_tells_predicted_from_measured_and_marks_the_choice():
    svg = plots.curves(SAMPLE)["wide"]
    tips = re.findall(r"<title>(.*?)</title>", svg)
    assert "chosen: fits 4 MB, 3.97 MB, predicted perplexity 9.39, measured perplexity 9.44" in tips
    assert "3.69 MB, predicted perplexity 9.56" in tips
    assert "E: 2-bit round-to-nearest, all layers, 2.04 MB, perplexity 211 (off the scale)" in tips
    assert "before: 13.0 MB, perplexity 9.16" in tips
    assert plots.curves(changed(curve=SAMPLE["curve"][:1])) is None


def test_layer_map_keeps_widths_bits_and_sums():
    shown = plots.layer_map(SAMPLE["choices"])
    assert shown["columns"] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert [r["name"] for r in shown["rows"]] == ["embed", *(f"block {i}" for i in range(6))]
    gate = shown["rows"][5]["cells"][4]
    assert (gate["label"], gate["css"], gate["keep"]) == ("3", "b3", 75.0)
    of_block = [c for c in SAMPLE["choices"] if c["part"].startswith("blocks.4.")]
    assert shown["rows"][5]["size"] == rep.size(sum(c["bytes"] for c in of_block))
    assert float(shown["rows"][5]["harm"]) == pytest.approx(sum(c["harm"] for c in of_block))
    odd = plots.layer_map([
        {"part": "blocks.0.mlp", "bits": 4.25, "cut": {"up": 0.5}}, {"part": "blocks.0.q", "bits": None},
        {"part": "head", "bits": "fp16"},
    ])  # fmt: skip
    assert odd["columns"] == ["q", "gate", "up", "down"]
    assert [(c["label"], c["css"], c["keep"]) for c in odd["rows"][0]["cells"]] == [
        (rep.DASH, "b0", 100), ("4.25", "b4", 100), ("4.25", "b4", 50), ("4.25", "b4", 100)
    ]  # fmt: skip
    assert odd["rows"][1]["cells"][0]["css"] == "b16"


def test_memory_bars_share_one_scale_and_show_the_limit():
    far = plots.memory(SAMPLE)
    assert far["limit_at"] is None and [s["share"] for s in far["strips"]] == ["11 %", "8.7 %"]
    assert sum(p["width"] for p in far["bars"][0]["parts"]) == pytest.approx(100, abs=0.01)
    ratio = sum(p["width"] for p in far["bars"][1]["parts"]) / 100
    assert ratio == pytest.approx(SAMPLE["memory_after"]["peak"] / SAMPLE["memory_before"]["peak"], rel=1e-3)
    near = plots.memory(changed(budget={"ram": 40_000_000}))
    assert near["strips"] == [] and 0 < near["limit_at"] < sum(p["width"] for p in near["bars"][0]["parts"])


def test_a_budget_that_is_not_met_is_named():
    tight = changed(fits=False, budget={"storage": 3_967_000, "max_loss": 0.02, "ram": 400e6})
    assert rep.verdict(tight) == (
        "pycode does not fit the Raspberry Pi Zero 2 W: perplexity, test text loses 3.1 %, 2 % allowed; "
        "storage 3,967,226 B, 3,967,000 B allowed"
    )
    assert [row.what for row in rep.lines(tight) if row.ok is False] == ["perplexity, test text", "storage"]
    assert "✗ does not fit" in rep.render(tight)


def test_no_ratio_between_predicted_and_measured_times():
    mixed = changed()
    mixed["after"]["latency"]["how"] = "measured here"
    row = next(r for r in rep.lines(mixed) if r.what == "time per token")
    assert row.change == "" and row.note == "before: predicted for pi-zero-2w by its card; after: measured here"
    assert next(r for r in rep.lines(SAMPLE) if r.what == "time per token").change == "−66 %"


def test_numbers_read_well():
    assert [rep.percent(x) for x in (-0.694, 0.0312, -0.00001, 0.9996, -0.996)] == [
        "−69 %",
        "+3.1 %",
        "0.0 %",
        "+100.0 %",
        "−99.6 %",
    ]
    assert rep.pair(rep.figure, 9.1234, 9.1236) == ("9.123", "9.124")
    assert rep.pair(rep.size, 4_000_000, 4_000_001) == ("4,000,000 B", "4,000,001 B")
    assert [rep.size(None), rep.duration(math.nan), rep.energy(0.0021), rep.figure(True)] == ["–", "–", "2.10 mJ", "–"]
    devices = {
        "this": "this machine",
        "A browser tab on a laptop, WebAssembly": "a browser tab on a laptop",
        "Pi, 4 cores": "the Pi",
    }
    assert [rep.device_name({"device": {"name": t, "title": t}}) for t in devices] == list(devices.values())


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    html, data = tmp_path / "out.report.html", tmp_path / "out.report.json"
    rep.write_report({**SAMPLE, "seconds": {"bad": math.nan}}, html, data)
    stored = json.loads(data.read_text(encoding="utf-8"))
    assert stored["curve"] == SAMPLE["curve"] and stored["seconds"] == {"bad": None}
    assert sorted(p.name for p in tmp_path.iterdir()) == [html.name, data.name]
    old = html.read_bytes(), data.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rep.os, "fsync", full)
    with pytest.raises(NetsukeError, match=r"write the report to out\.report\.html: No space left"):
        rep.write_report(SAMPLE, html, data)
    monkeypatch.undo()
    with pytest.raises(NetsukeError, match="No such file"):
        rep.write_report(SAMPLE, tmp_path / "absent" / "a.html", data)
    (tmp_path / "folder").mkdir()
    with pytest.raises(NetsukeError, match="it is a folder"):
        rep.write_report(SAMPLE, html, tmp_path / "folder")
    assert (html.read_bytes(), data.read_bytes()) == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", html.name, data.name]


def test_compare_says_what_differs_and_what_cannot_be_compared():
    other = changed(seed=1)
    other["metric"]["data"]["splits"]["test"]["sha256"] = "0" * 64
    other["after"]["bytes"] //= 2
    other["after"]["latency"]["how"] = "measured here"
    other["choices"][3]["cut"] = 0.5
    rows = {r.what: r for r in rep.compare(SAMPLE, other)}
    assert (rows["seed"].a, rows["seed"].b) == ("0", "1")
    assert rows["test data (sha256)"].change == "different: quality does not compare"
    assert rows["storage after"].change == "−50 %"
    assert rows["time per token after"].change == "obtained in different ways"
    assert rows["parts chosen"].change == "1 of 13 differ"


def test_import_leaves_torch_and_matplotlib_alone():
    code = (
        "import sys, netsuke.report; print([m for m in ('torch', 'matplotlib', 'jinja2', 'rich') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
