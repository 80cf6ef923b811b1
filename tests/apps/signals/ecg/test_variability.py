"""Measures of variability against their definitions and against signals whose answer is known."""

import numpy as np
import pytest

from netsuke.apps.signals.ecg.variability import dfa, entropies, hrv, normal, welch


def made(seconds, frequency, size=0.03, mean=0.8):
    """RR whose modulation is a sine in TIME: an axis by beat number would put it elsewhere."""
    t, out = 0.0, []
    while t < seconds:
        out.append(mean + size * np.sin(2 * np.pi * frequency * t))
        t += out[-1]
    return np.array(out)


def test_measures_of_time_are_their_definitions():
    rr = 0.8 + np.random.default_rng(0).normal(0, 0.03, 500)
    got = {k: v.value for k, v in hrv(rr).items()}
    d = np.diff(rr)
    assert got["SDNN"] == pytest.approx(1e3 * rr.std(ddof=1))
    assert got["RMSSD"] == pytest.approx(1e3 * np.sqrt(np.mean(d**2)))
    assert got["pNN50"] == pytest.approx(100 * np.mean(np.abs(d) > 0.05))
    assert got["SD1"] == pytest.approx(1e3 * d.std(ddof=1) / np.sqrt(2))
    assert got["SD1"] ** 2 + got["SD2"] ** 2 == pytest.approx(2 * got["SDNN"] ** 2)
    assert got["CVI"] == pytest.approx(np.log10(16 * got["SD1"] * got["SD2"]))


@pytest.mark.parametrize(("frequency", "band"), [(0.1, "LF"), (0.25, "HF"), (0.02, "VLF")])
def test_a_modulation_lies_in_its_band_whatever_the_heart_rate(frequency, band):
    for mean in (0.6, 1.0):
        got = hrv(made(600, frequency, mean=mean))
        power = {k: got[k].value for k in ("VLF", "LF", "HF", "VHF")}
        assert max(power, key=power.get) == band
        assert power[band] == pytest.approx(1e6 * 0.03**2 / 2, rel=0.15)  # a sine's variance, in ms²


def test_extrasystoles_do_not_count():
    rr = np.full(300, 0.8) + np.random.default_rng(1).normal(0, 0.01, 300)
    clean, dirty = hrv(rr), rr.copy()
    dirty[100], dirty[101] = 0.5, 1.1
    assert list(np.flatnonzero(~normal(dirty))) == [100, 101]
    assert hrv(dirty)["RMSSD"].value == pytest.approx(clean["RMSSD"].value, rel=0.03)


def test_what_a_record_is_too_short_for_is_a_reason():
    short = hrv(made(50, 0.1))
    assert short["LF"].value is None and "2 min" in short["LF"].reason
    assert short["ULF"].value is None and "60 min" in short["ULF"].reason
    assert hrv(np.array([0.8, 0.8]))["SDNN"].reason


def test_entropy_and_dfa_of_known_series():
    rng = np.random.default_rng(0)
    noise, sine = rng.normal(size=500), np.sin(np.arange(500) / 5)
    assert entropies(sine)[0] < 0.6 < 1.8 < entropies(noise)[0]
    assert dfa(rng.normal(size=4000), 16, 64) == pytest.approx(0.5, abs=0.1)
    assert dfa(rng.normal(size=4000).cumsum(), 16, 64) == pytest.approx(1.5, abs=0.1)


def test_welch_keeps_the_power():
    x = np.random.default_rng(0).normal(size=40_000)
    f, density = welch(x, 1200, straight=True)
    assert density.sum() * f[1] == pytest.approx(1.0, rel=0.03)
