"""Made hearts come out as they were made, whatever lead, rate, polarity or length; what is missing has its reason."""

import io

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from netsuke.apps.signals.ecg import beats, conditioning, network, parameters, quality, rpeaks, synthetic
from netsuke.apps.signals.ecg.delineate import delineate
from netsuke.apps.signals.ecg.pipeline import analyse, intervals
from netsuke.apps.signals.ecg.record import of_array
from netsuke.apps.signals.ecg.released import wavelet
from netsuke.apps.signals.ecg.screening import screen
from netsuke.apps.signals.ecg.stream import ring, stream


def close(value, true, within):
    assert value.value is not None, value.reason
    assert abs(value.value - true) <= within, (value, true)


@pytest.mark.parametrize("fs", [125, 250, 360, 500, 1000])
@pytest.mark.parametrize("rate", [40, 70, 110])
def test_intervals_of_a_made_heart(rate, fs):
    h = synthetic.heart(rate, 12, fs, seed=rate)
    got = intervals(h.x, fs)
    close(got["heart rate"], 60 / np.median(np.diff(h.r)), 1.0)
    close(got["PR"], h.pr, 20)
    close(got["QRS"], h.qrs, 22)
    close(got["QT"], h.qt, 25)
    close(got["QTc Bazett"], got["QT"].value / np.sqrt(got["RR used"].value), 1e-9)


@pytest.mark.parametrize("rate", [30, 60, 100, 140, 180, 220])
def test_every_beat_is_found_and_none_invented(rate):
    h = synthetic.heart(rate, 30, 250, seed=3)
    r = analyse(of_array(h.x, 250)).r
    inner = h.r[(h.r > 0.5) & (h.r < 29.5)]
    assert all(np.abs(r - t).min() < 0.03 for t in inner)
    assert len(r[(r > 0.5) & (r < 29.5)]) == len(inner)


def test_gain_does_not_matter_and_polarity_hardly():
    h = synthetic.heart(70, 10, 250)
    one, ten, upside = (intervals(k * h.x, 250) for k in (1, 3, -1))
    for k in ("PR", "QRS", "QT"):
        close(ten[k], one[k].value, 0.5)
        close(upside[k], one[k].value, 25)


def test_a_long_record_is_the_median_of_its_blocks_and_beats_run_through():
    h = synthetic.heart(70, 200, 250, seed=5)
    got = analyse(of_array(h.x, 250))
    assert len(got.trend) == 7 and len(got.r) == len(got.marks) == len(got.why)
    inner = h.r[(h.r > 0.5) & (h.r < 199.5)]
    assert len(got.r[(got.r > 0.5) & (got.r < 199.5)]) == len(inner)
    assert np.all(np.diff(got.r) > 0.5) and np.abs(np.diff(got.r) - np.diff(h.r)[: len(got.r) - 1]).max() < 0.02
    close(got.values["PR"], np.median([row["PR"] for row in got.trend]), 1e-9)
    assert got.variability["LF"].value is not None and got.variability["ULF"].reason


def test_marks_of_a_beat_are_in_order_and_gaps_say_why():
    h = synthetic.heart(75, 10, 250)
    d = delineate(h.x, 250)
    assert d.per_beat.shape == (len(d.peaks), 8) and len(d.beat_reasons) == len(d.peaks)
    for row, why in zip(d.per_beat, d.beat_reasons):
        assert np.isnan(row).any() == bool(why)
        assert np.all(np.diff(row[np.isfinite(row)]) > -2)


FLAGGED = {
    "flat": (lambda x: 0 * x, "flat", "heart rate"),
    "noise": (lambda x: np.random.default_rng(0).normal(size=len(x)), "noise only", "heart rate"),
    "missing": (lambda x: np.full_like(x, np.nan), "missing", "heart rate"),
    "half flat": (lambda x: np.where(np.arange(len(x)) < 2500, x, 0.0), "partly flat", None),
    "clipped": (lambda x: np.clip(x, -0.05, 0.5), "clipped", None),
    "hum": (lambda x: x + 0.3 * np.sin(2 * np.pi * 50 * np.arange(len(x)) / 500), "mains", None),
    "wander": (lambda x: x + 3 * np.sin(2 * np.pi * 0.1 * np.arange(len(x)) / 500), "wander", None),
    "µV for mV": (lambda x: 1000 * x, "unit", None),
    "inverted": (lambda x: -x, "inverted", None),
    "noisy": (lambda x: x + np.random.default_rng(0).normal(0, 0.3, len(x)), "very noisy", None),
}


@pytest.mark.parametrize("case", FLAGGED)
def test_what_is_wrong_is_said(case):
    spoil, flag, refused = FLAGGED[case]
    got = analyse(of_array(spoil(synthetic.heart(70, 10).x), 500))
    assert flag in got.flags and quality.sentence(flag) != flag
    assert all(v.value is not None or v.reason for v in got.values.values())
    if refused:
        assert got.values[refused].value is None and got.values["QT"].value is None
    elif flag not in ("mains", "wander"):
        assert got.values["QT"].quality != "good"


def test_hum_does_not_move_an_interval():
    x = synthetic.heart(70, 10).x
    hum = x + 0.3 * np.sin(2 * np.pi * 60 * np.arange(len(x)) / 500)
    for k in ("PR", "QRS", "QT"):
        close(intervals(hum, 500)[k], intervals(x, 500)[k].value, 8)


def test_fibrillation_and_pacing_have_no_pr():
    for rhythm, flag in (("fibrillation", "fibrillation"), ("paced", "paced")):
        got = analyse(of_array(synthetic.heart(80, 20, rhythm=rhythm).x, 500))
        assert flag in got.flags and got.values["PR"].value is None and got.values["PR"].reason
        assert got.values["heart rate"].value is not None
    assert got.shapes["P"]["amplitude"].reason


def test_extrasystoles_are_left_out_of_the_typical_beat():
    h = synthetic.heart(60, 20, 250, seed=1)
    x, t = h.x.copy(), np.arange(len(h.x)) / 250
    for r in h.r[3:20:6]:
        x += -1.6 * np.exp(-0.5 * ((t - r - 0.55) / 0.025) ** 2)
    got = analyse(of_array(x, 250))
    assert "extrasystoles" in got.flags
    close(got.values["QRS"], h.qrs, 22)
    assert sum(w == "another shape" for w in got.why) == 3


def test_resampling_keeps_a_slow_sine_and_smooths_a_fast_one():
    for fs in (128, 250, 360, 500, 1000):
        t = np.arange(int(4 * fs)) / fs
        y = conditioning.resample(np.sin(2 * np.pi * 5 * t), fs)
        want = np.sin(2 * np.pi * 5 * np.arange(len(y)) / 250)
        assert len(y) == 1000 and np.abs(y - want)[5:-5].max() < 0.02
    fast = conditioning.resample(np.sin(2 * np.pi * 240 * np.arange(4000) / 1000), 1000)
    assert np.abs(fast[5:-5]).max() < 0.05


def test_the_network_in_numpy_is_the_one_that_was_trained_in_torch():
    w = {k: torch.from_numpy(v) for k, v in network.weights().items()}
    assert sum(v.numel() for v in w.values()) == 7225
    wave, rr = np.random.default_rng(0).normal(size=(3, 288)), np.array([200.0, 150, 300])
    h = F.relu(F.conv1d(torch.from_numpy(network.features(wave, rr)), w["input.weight"], w["input.bias"], 2, 4))
    for i, d in enumerate(network.DILATIONS):
        h = h + F.relu(F.conv1d(h, w[f"blocks.{i}.weight"], w[f"blocks.{i}.bias"], 1, 2 * d, d))
    marks, present = network.scores(wave, rr, network.weights())
    np.testing.assert_allclose(marks, F.conv1d(h, w["marks.weight"], w["marks.bias"]).numpy(), atol=1e-4)
    top = h[:, :, torch.from_numpy(network.P_TIMES)].amax(2)
    np.testing.assert_allclose(present, (top @ w["present.weight"][0] + w["present.bias"][0]).numpy(), atol=1e-4)


def test_a_mark_is_where_the_scores_peak_and_only_where_it_may_be():
    where = network.allowed(200.0)
    score = np.zeros((8, 144))
    score[:, 30], score[:, 100] = 12, 13  # 60 and 200 samples after the start of the window
    at, spread = network.place(score, where)
    assert at[0] == pytest.approx(network.COARSE[30], abs=0.1) and at[7] == pytest.approx(network.COARSE[100], abs=0.1)
    assert spread[0] < 3


def test_wavelet_crosses_zero_at_the_peak_of_a_bell():
    t = np.arange(4000)
    w = wavelet(np.exp(-0.5 * ((t - 2000) / 60) ** 2))
    for level in (4, 5, 6):
        rise, fall = np.argmax(w[level]), np.argmin(w[level])
        assert rise < 2000 < fall
        cross = rise + np.flatnonzero(np.diff(np.sign(w[level][rise:fall])))[0]
        assert abs(cross - 2000) <= 2**level


def test_released_method_runs_through_the_same_pipeline():
    h = synthetic.heart(70, 12)
    got = intervals(h.x, 500, method="released")
    close(got["heart rate"], 60 / np.median(np.diff(h.r)), 1.0)
    assert got["QT"].value is not None and got["QT"].quality != "good"


def test_beats_are_averaged_with_the_outlier_left_out():
    rows = np.array([[1.0, 2, np.nan], [1, 2, 3], [1, 2, 3], [100, -50, 3]])
    np.testing.assert_allclose(beats.trimmed_mean(rows), [1, 2, 3])
    assert beats.representative(np.zeros(1000), np.array([300, 600])) is None
    assert len(rpeaks.detect(np.zeros(100))) == 0


@pytest.mark.parametrize(
    ("y", "name"),
    [([0, -0.1, 0, 1, 0.5, 0, -0.2, 0], "qRs"), ([0, 0.2, 0, -1, 0], "rS"), ([0, -0.5, -1, 0], "QS"), ([0, 1, 0.2, 0], "R"),
     ([0, 0.4, 0, -0.5, 0, 0.6, 0], "RSR'")],
)  # fmt: skip
def test_qrs_names(y, name):
    assert parameters.qrs_form(np.array(y))[0] == name


def test_wave_forms_axis_and_corrections():
    bump = np.sin(np.linspace(0, np.pi, 30))
    assert [parameters.form(k * bump) for k in (0.2, -0.2, 0.01)] == ["+", "-", "flat"]
    assert parameters.form(np.concatenate((0.2 * bump, -0.1 * bump))) == "+-"
    for i, iii, degrees in ((1, 0, 30), (1, 1, 60), (0, 1, 90), (1, -0.5, 0), (-1, 1, 150)):
        assert parameters.axis(i, iii).value == pytest.approx(degrees, abs=0.1)
    assert parameters.axis(0.01, 0.02).reason and parameters.axis(None, 1).reason
    at_60 = {k: f(400.0, 1.0) for k, f in parameters.QTC.items()}
    assert set(at_60.values()) == {400.0}
    got = {k: f(360.0, 0.75) for k, f in parameters.QTC.items()}
    assert got == pytest.approx({"Bazett": 415.7, "Fridericia": 396.2, "Framingham": 398.5, "Hodges": 395.0}, abs=0.1)


def test_screening_says_how_sure_it_is():
    marks = np.full((40, 8), np.nan)
    marks[:, 0], marks[:, 3], marks[:, 7] = 0.0, 0.23 + 0.002 * np.arange(40) / 40, 0.65
    values = {
        "PR": parameters.Value(231.0, "ms", "good", 40, 12.0), "RR used": parameters.Value(1.0, "s"),
        "QTc Bazett": parameters.gap("no T"),
    }  # fmt: skip
    got = screen(marks, values, "F", np.arange(40.0))
    block = got["first-degree AV block"]
    assert block["low"] < 231 < block["high"] and block["share_above"] > 0.99
    assert got["long QT"]["reason"] == "no T" and got["irregular rhythm"]["score"] == 0


def test_the_stream_gives_the_blocks_of_the_record_with_bounded_memory():
    x = np.arange(250 * 33.0)
    blocks = list(ring(iter(x), 250, 10))
    assert [(b.keep_from, b.keep_to) for b in blocks] == [(0, 10), (10, 20), (20, 30), (30, 33)]
    for b in blocks:
        np.testing.assert_array_equal(b.x, x[round(b.start * 250) : round(b.start * 250) + len(b.x)])
        assert b.start >= b.keep_from - 2 and len(b.x) <= 14 * 250
    h = synthetic.heart(70, 33, 250)
    lines = list(stream(io.StringIO("mV\n" + "\n".join(f"{v:.5f}" for v in h.x)), 250))
    beats_found = np.concatenate([line["r"] for line in lines])
    whole = analyse(of_array(h.x, 250)).r
    assert len(beats_found) == len(whole) and np.abs(beats_found - whole).max() < 0.005
    assert all(abs(line["QT"]["value"] - h.qt) < 25 for line in lines[:3])
