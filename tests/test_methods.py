"""`netsuke methods --block`: the adviser's costs and choice on the command line, and every wrong question refused."""

import json

import pytest

from netsuke.compress.advise import TARGETS, advise
from netsuke.devices import Device
from netsuke.methods import advice
from tests.test_cli import netsuke, refused


@pytest.mark.parametrize("target", TARGETS)
def test_the_costs_are_the_adviser_s(target, monkeypatch, capsys):
    code, out, _ = netsuke(monkeypatch, capsys, "methods", "--block", "768x12", "--tokens", "4096", "--target", target,
                           "--rank", "64", "--project", "256", "--device", "pi4", "--json")  # fmt: skip
    got = json.loads(out)
    want = advise(768, 12, 4096, target, rank=64, project=256, device=Device.load("pi4"))
    assert code == 0 and (got["pick"], got["why"], got["crossings"]) == (want.pick, want.why, want.crossings)
    for kind, cost in want.costs.items():
        row = got["costs"][kind]
        assert (row["macs"], row["parameters"], row["seconds"]) == (cost.macs, cost.parameters, cost.seconds)
    assert got == advice("768x12", 4096, target, rank=64, project=256, device="pi4")


def test_the_table_has_the_three_side_by_side(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = netsuke(monkeypatch, capsys, "methods", "--block", "768x12", "--tokens", "64")
    assert code == 0 and "low-rank (LRT) ←" in out and "Linformer" in out and "dense" in out
    assert f"{advise(768, 12, 64).costs['dense'].macs:,}" in out and "choice    low-rank (LRT): 64 tokens" in out
    assert (
        "Linformer passes low-rank at" in out
        and "step of 4,096 tokens" in out
        and "size      Linformer passes low-rank never" in out
    )
    assert "tokens on" not in out  # without a card nothing is priced
    code, out, _ = netsuke(monkeypatch, capsys, "methods", "--block", "768X12", "--tokens", "9000", "--causal")
    assert code == 0 and "Linformer cannot be causal" in out and "passes" not in out


def test_a_fused_kernel_keeps_no_map():
    open_maps, fused = (advice("768x12", 4096, "memory", fused=f) for f in (False, True))
    assert fused["costs"]["dense"]["training_bytes"] < open_maps["costs"]["dense"]["training_bytes"]


@pytest.mark.parametrize("card", Device.names())
def test_every_card_prices_a_block(card):
    got = advice("64x4", 128, device=card)
    assert all(c["seconds"] > 0 for c in got["costs"].values())


def test_the_list_is_as_it_was(monkeypatch, capsys):
    code, out, _ = netsuke(monkeypatch, capsys, "methods", "--json")
    assert code == 0 and {"modegpt", "quantize"} <= {row["name"] for row in json.loads(out)}


B, N = ["--block", "768x12"], ["--tokens", "512"]
WRONG = {
    "no tokens": (B, "--block without --tokens"), "no block": (N, "--tokens without --block"),
    "target alone": (["--target", "size"], "--target without --block"), "fused alone": (["--fused"], "--fused without"),
    "one number": (["--block", "768", *N], "WIDTHxHEADS"), "three numbers": (["--block", "768x12x3", *N], "WIDTHxHEADS"),
    "no numbers": (["--block", "wide", *N], "WIDTHxHEADS"), "negative": (["--block=-768x12", *N], "WIDTHxHEADS"),
    "other digits": (["--block", "７６８x12", *N], "WIDTHxHEADS"),
    "huge": (["--block", f"{'9' * 400}x1", *N], "WIDTHxHEADS"), "large": (["--block", "999999999x1", *N], "16777216"),
    "zero": (["--block", "0x12", *N], "d=0"), "heads": (["--block", "768x7", *N], "768 for 7 heads"),
    "no heads": (["--block", "768x0", *N], "heads=0"), "tokens": ([*B, "--tokens", "0"], "n=0"),
    "too many tokens": ([*B, "--tokens", "99999999999"], "n=99999999999"), "words": ([*B, "--tokens", "many"], "--tokens"),
    "target": ([*B, *N, "--target", "money"], "time, memory, size"), "rank": ([*B, *N, "--rank", "0"], "rank=0"),
    "project": ([*B, *N, "--project", "-3"], "project=-3"), "card": ([*B, *N, "--device", "toaster"], "toaster"),
    "causal summaries": ([*B, *N, "--causal", "--project", "64"], "cannot be causal"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_questions_are_refused(name, monkeypatch, capsys):
    args, culprit = WRONG[name]
    refused(netsuke(monkeypatch, capsys, "methods", *args), culprit)
