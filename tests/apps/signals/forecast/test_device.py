"""The generated C: its own test on this machine, the reference's numbers on the emulated board, learning there."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from netsuke.apps.signals.forecast import fold
from netsuke.apps.signals.forecast.device import SWEEPS, run_on_board, state_bytes, tables, values_of
from netsuke.apps.signals.forecast.forecaster import MixLinear
from netsuke.apps.signals.forecast.moments import sweep
from netsuke.devices.board import missing_tools
from netsuke.errors import NetsukeError
from tests.apps.signals.forecast.data import meters

needs_cc = pytest.mark.skipif(shutil.which("cc") is None or shutil.which("make") is None, reason="no cc or make")
needs_board = pytest.mark.skipif(bool(missing_tools()), reason=f"not installed: {missing_tools()}")
STRICT = "-O1 -Wpedantic -Wdouble-promotion -Werror -fsanitize=address,undefined"


def model(alpha=0.5, horizon=60, smoothed=True, period=24, seed=0):
    """A forecaster whose horizon ends inside a period."""
    x = meters(1200, 2, period=period) / [1, 10]
    out = MixLinear(horizon, 10 * period, period, alpha, 3).fit(x)
    if smoothed:
        out.weights.kernel = np.random.default_rng(seed).normal(size=period + 1) / period
    return out, x


@needs_cc
@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize(("period", "smoothed"), [(24, True), (7, True), (1, True), (24, False)])
def test_the_folder_tests_itself_under_sanitizers(tmp_path, weights, period, smoothed):
    made, _ = model(period=period, horizon=2 * period + period // 2, smoothed=smoothed)
    facts = made.to_c(tmp_path / "c", name="meter", weights=weights)
    done = subprocess.run(
        ["make", "test", f"CFLAGS={STRICT}", "CC=cc -fsanitize=address,undefined"], cwd=tmp_path / "c",
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "PASS" in done.stdout, done.stderr[-500:]
    text = "".join(p.read_text() for p in (tmp_path / "c").rglob("*") if p.suffix in (".c", ".h", ".json"))
    assert not re.search(r"\b(malloc|calloc|free)\s*\(", text) and str(tmp_path) not in text
    assert facts["ram_per_channel"] == 4 * (made.shape.lookback + made.shape.horizon)


@needs_cc
def test_its_test_fails_on_other_weights(tmp_path):
    made, _ = model()
    made.to_c(tmp_path / "c")
    source = tmp_path / "c/src/forecast.c"
    source.write_text(source.read_text().replace(".scale =", ".kernel = 0, .scale ="))
    text = re.sub(r"  \.kernel = forecast_kernel,\n", "", source.read_text())
    source.write_text(text)
    done = subprocess.run(["make", "test"], cwd=tmp_path / "c", capture_output=True, text=True)
    assert done.returncode and "FAIL" in done.stdout


@needs_board
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_the_board_gives_the_references_forecasts_in_the_memory_said(tmp_path, weights):
    made, x = model(alpha=0.3)
    facts = made.to_c(tmp_path / "c", weights=weights)
    seen = x[-made.shape.lookback :].T
    run = run_on_board(tmp_path / "c", "m4", seen)
    parts, scale, _ = tables(made, weights, False)
    matrix, kernel = values_of(parts, scale, made)
    assert np.abs(run["outputs"] - fold.forecast(seen, matrix, kernel, made.shape)).max() < 1e-5
    assert run["ram"] == facts["ram_per_channel"] and run["weights"] <= facts["weights"] <= 1024
    apart = np.abs(run["outputs"] - made.predict(x).T).max()
    assert apart < (1e-5 if weights == "float32" else 0.1)


@needs_board
@pytest.mark.parametrize("forget", [1.0, 0.999])
def test_the_board_learns_what_python_learns(tmp_path, forget):
    made = MixLinear(48, 240, 24, 1.0, forget=forget).fit(meters(900))
    facts = made.to_c(tmp_path / "c", updating=True)
    fresh = meters(1300)[900:]
    run = run_on_board(tmp_path / "c", "m4", fresh[:240, :1].T, fresh)
    seen = made.moments.on_chip()
    seen.update(fresh / made.scale)
    a1, a2 = made.weights.a1, made.weights.a2
    for _ in range(SWEEPS):
        a1, a2 = sweep(a1, a2, seen.sxx, seen.sxy, made.shape)
    sxx, sxy, _, _ = run["state"]
    assert np.abs(sxx - seen.sxx[np.tril_indices(10)]).max() < 1e-5 * np.abs(sxx).max()
    assert np.abs(sxy - seen.sxy).max() < 1e-5 * np.abs(sxy).max()
    wanted = fold.forecast((fresh[-240:] / made.scale).T, fold.time_matrix(a1, a2, made.shape), None, made.shape)
    assert np.abs(run["forecasts"] / made.scale[:, None] - wanted).max() < 1e-4
    assert facts["moments"] == 4 * (55 + 20)
    used = (
        facts["state"]["2"] + facts["scratch"] + facts["ram_per_channel"]
    )  # the last: input and output of the test's main
    assert run["ram"] == used and facts["state"]["2"] - facts["state"]["1"] == facts["window_per_channel"]


@needs_board
def test_a_refit_before_the_first_window_forgets_nothing(tmp_path):
    x = meters(1300)
    made = MixLinear(48, 240, 24, 1.0).fit(x[:1000])
    made.to_c(tmp_path / "c", updating=True)
    run = run_on_board(tmp_path / "c", "m4", x[:240, :1].T, x[1000:1250])
    assert np.abs((run["forecasts"] - made.predict(x[:1250]).T) / made.scale[:, None]).max() < 1e-3


@needs_board
def test_refits_day_after_day_are_pythons(tmp_path):
    x = meters(1400)
    made = MixLinear(48, 240, 24, 1.0).fit(x[:1000])
    made.to_c(tmp_path / "c", updating=True)
    run = run_on_board(tmp_path / "c", "m4", x[:240, :1].T, x[1000:], every=48)
    assert len(run["factors"]) == 8
    seen, a1, a2 = made.moments.on_chip(), made.weights.a1, made.weights.a2
    for k, (across, inside) in enumerate(run["factors"]):
        seen.update(x[1000 + 48 * k :][:48] / made.scale)
        for _ in range(SWEEPS):
            a1, a2 = sweep(a1, a2, seen.sxx, seen.sxy, made.shape)
        wanted = fold.time_matrix(a1, a2, made.shape)
        assert np.abs(fold.time_matrix(inside, across, made.shape) - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_learning_at_the_papers_size_keeps_eight_kilobytes_for_one_channel():
    facts = state_bytes(fold.Shape(720, 96, 24), 7)
    assert facts["state"] == {"1": 2340 + 96 + 3268, "7": 2340 + 96 + 7 * 3268} and facts["state"]["1"] <= 8192
    assert facts["scratch"] == 2880


@needs_cc
@pytest.mark.skipif(shutil.which("size") is None, reason="no size")
def test_make_size_shows_flash_and_ram(tmp_path):
    made = MixLinear(48, 240, 24, 1.0).fit(meters(900))
    facts = made.to_c(tmp_path / "c", updating=True)
    done = subprocess.run(["make", "-s", "size"], cwd=tmp_path / "c", capture_output=True, text=True, check=True)
    _, data, bss = map(int, done.stdout.splitlines()[-1].split()[:3])
    needed = facts["state"]["2"] + facts["scratch"]
    assert needed <= data + bss <= needed + 300  # 64-bit pointers in tables, alignment


@needs_board
def test_lost_values_do_not_poison_the_state(tmp_path):
    made = MixLinear(48, 240, 24, 1.0).fit(meters(900))
    made.to_c(tmp_path / "c", updating=True)
    fresh = meters(1300)[900:]
    fresh[100:103, 0], fresh[3, 1] = np.nan, np.inf
    run = run_on_board(tmp_path / "c", "m4", fresh[:240, 1:].T, fresh)
    assert np.isfinite(run["forecasts"]).all() and all(np.isfinite(s).all() for s in run["state"])


def test_small_forms_are_chosen_and_the_arrays_are_the_model():
    for horizon, alpha in ((24, 0.5), (336, 0.5), (336, 1.0)):
        made = MixLinear(horizon, 720, 24, alpha, 4).fit(meters(2400))
        parts, scale, _ = tables(made, "float32", False)
        matrix, _ = values_of(parts, scale, made)
        assert np.abs(matrix - made.matrix()).max() < 1e-6
        assert sum(t.data.size for t in parts) <= made.shape.n * made.shape.m
    assert [t.field for t in parts] == ["across", "inside"]


@pytest.mark.parametrize(
    ("words", "word"),
    [
        ({"name": "Meter"}, "prefix"), ({"name": "ns_x"}, "prefix"), ({"name": "test"}, "prefix"), ({"weights": "int4"}, "int4"),
        ({"updating": True}, "alpha"), ({"folder": "no/c"}, "parent"), ({"folder": "taken"}, "something else"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused(tmp_path, words, word):
    (tmp_path / "taken").mkdir()
    made, _ = model()
    with pytest.raises(NetsukeError, match=word):
        made.to_c(tmp_path / words.pop("folder", "c"), **words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]


def test_a_folder_of_ours_is_replaced(tmp_path):
    made, _ = model()
    made.to_c(tmp_path / "c")
    assert made.to_c(tmp_path / "c", weights="int8")["kind"] == "int8"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
