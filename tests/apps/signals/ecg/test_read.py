"""Every file format gives the numbers that were written, and every bad file one sentence."""

import json

import numpy as np
import pytest

from netsuke.apps.signals.ecg import synthetic, wfdb
from netsuke.apps.signals.ecg.pipeline import analyse
from netsuke.apps.signals.ecg.read import read
from netsuke.apps.signals.ecg.record import of_array
from netsuke.apps.signals.ecg.variability import hrv
from netsuke.data.catalogue import find, missing
from netsuke.errors import NetsukeError
from tests.apps.signals.ecg.files import write_annotations, write_edf, write_wfdb

REAL = "featuredb-ecg/wfdb-sample/100.hea"
with_real = pytest.mark.skipif(bool(missing((REAL,))), reason=f"NETSUKE_DATA lacks {REAL}")


@pytest.fixture
def counts():
    return np.random.default_rng(0).integers(-2000, 2000, (1001, 3))


@pytest.mark.parametrize("format_", [16, 212])
def test_wfdb_signals_are_read_exactly(tmp_path, counts, format_):
    record = read(write_wfdb(tmp_path, "r", counts, 250, format_))
    assert (record.fs, record.leads, record.samples, record.sex, record.age) == (250, ("I", "II", "V1"), 1001, "F", 61)
    for lead in range(3):
        np.testing.assert_allclose(record.millivolts(lead), (counts[:, lead] + 3) / 200)
    np.testing.assert_array_equal(record.millivolts(1, 10, 20), record.millivolts(1)[10:20])
    assert read(tmp_path / "r").samples == read(tmp_path / "r.dat").samples == 1001


def test_missing_samples_become_nan_and_microvolts_millivolts(tmp_path, counts):
    counts[5, 0] = -32768
    record = read(write_wfdb(tmp_path, "r", counts, 250, 16, gain="0.2/uV"))
    assert np.isnan(record.millivolts(0)[5]) and np.isnan(record.millivolts(0)).sum() == 1
    np.testing.assert_allclose(record.millivolts(1), counts[:, 1] / 200)


def test_annotations_with_long_steps_and_delineation(tmp_path):
    rows = [(100, 39), (120, 24), (140, 40), (150, 39), (170, 1), (190, 40), (270, 27), (300, 40), (70_000, 5)]
    write_annotations(tmp_path / "r.ii", rows)
    got = wfdb.read_annotations(tmp_path / "r.ii")
    assert list(zip(got.samples, got.kinds)) == rows and list(got.beats) == [170, 70_000]
    assert wfdb.waves(got).tolist() == [[0, 100, 120, 140], [1, 150, 170, 190], [2, -1, 270, 300]]


@with_real
def test_a_real_record_matches_its_checksums():
    record = read(find(REAL))
    sums = [int(np.asarray(record.signals[k], dtype=np.int64).sum()) % 65536 for k in (0, 1)]
    assert sums == [-22131 % 65536, 20052] and (record.sex, record.age) == ("M", 69)
    assert len(wfdb.read_annotations(find(REAL).with_suffix(".atr")).beats) == 2273


def test_edf_voltages_of_the_commonest_rate(tmp_path):
    x = np.arange(-1000, 1000, dtype=np.int16)
    write_edf(tmp_path / "r.edf", {"ECG II": (x, "uV"), "EDF Annotations": (x, ""), "V1": (x[::-1], "mV")}, 200)
    record = read(tmp_path / "r.edf")
    assert record.leads == ("II", "V1") and record.fs == 200
    np.testing.assert_allclose(record.millivolts(0), x / 500 / 1000, atol=1e-12)
    np.testing.assert_allclose(record.millivolts(1), x[::-1] / 500, atol=1e-12)


def test_text_json_and_numpy_agree(tmp_path):
    x = synthetic.heart(seconds=4, fs=200).x
    t = np.arange(len(x)) / 200
    (tmp_path / "a.csv").write_text("time,II [uV]\n" + "\n".join(f"{a:.4f},{1000 * b:.3f}" for a, b in zip(t, x)))
    (tmp_path / "b.txt").write_text("\n".join(f"{b:.6f}" for b in x))
    (tmp_path / "c.json").write_text(json.dumps({"sampling_rate": 200, "unit": "V", "samples": list(x / 1000)}))
    np.save(tmp_path / "d.npy", np.rint(x * 1e6).astype(np.int32))
    np.savez(tmp_path / "e.npz", signal=x, fs=200, leads=["II"])
    got = [
        read(tmp_path / "a.csv"), read(tmp_path / "b.txt", rate=200), read(tmp_path / "c.json"),
        read(tmp_path / "d.npy", rate=200, unit="nV"), read(tmp_path / "e.npz"),
    ]  # fmt: skip
    for record in got:
        assert record.fs == 200
        np.testing.assert_allclose(record.millivolts(0), x, atol=2e-6)
    assert got[0].leads == got[4].leads == ("II",)


def good_header(tmp_path, **change):
    head = write_wfdb(tmp_path, "r", np.zeros((900, 1), int), 250)
    text = head.read_text()
    for old, new in change.items():
        text = text.replace({"rate": " 250 900", "format": " 16 ", "gain": "200(-3)/mV", "file": "r.dat"}[old], new)
    head.write_text(text)
    return head


def spoiled_dat(tmp_path):
    head = good_header(tmp_path)
    (tmp_path / "r.dat").write_bytes(b"\0" * 100)
    return head


def without_dat(tmp_path):
    head = good_header(tmp_path)
    (tmp_path / "r.dat").unlink()
    return head


def written(name, content):
    def make(tmp_path):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    return make


def saved(array, **more):
    def make(tmp_path):
        np.savez(tmp_path / "r.npz", signal=array, **more)
        return tmp_path / "r.npz"

    return make


def damaged(tmp_path):
    """A compressed array with its bytes turned over, so that inflating fails."""
    np.savez_compressed(tmp_path / "r.npz", signal=np.zeros(5000), fs=250)
    data = bytearray((tmp_path / "r.npz").read_bytes())
    data[60:90] = bytes(255 - b for b in data[60:90])
    (tmp_path / "r.npz").write_bytes(data)
    return tmp_path / "r.npz"


SINE = np.sin(np.arange(2000) / 9)
BAD = {
    "no such file": (lambda p: p / "absent.hea", "no such file"),
    "unknown ending": (written("r.wav", b"RIFF"), "unknown"),
    "empty header": (written("r.hea", ""), "first line"),
    "header without a rate": (lambda p: good_header(p, rate=""), "rate"),
    "header with two points in its rate": (lambda p: good_header(p, rate=" 1.2.3 900"), "1.2.3"),
    "header with a superscript": (written("r.hea", "r \u00b2 250 900\n"), "first line"),
    "a zero with two signs": (lambda p: good_header(p, gain="200(+-3)/mV"), "not calibrated"),
    "header with a rate of 1 Hz": (lambda p: good_header(p, rate=" 1 900"), "1.0 samples per second"),
    "several segments": (written("r.hea", "r/3 2 250 900\n"), "several segments"),
    "another format": (lambda p: good_header(p, format=" 80 "), "format 80"),
    "no calibration": (lambda p: good_header(p, gain="0"), "not calibrated"),
    "not a voltage": (lambda p: good_header(p, gain="200/mmHg"), "mmHg"),
    "a path out of the folder": (lambda p: good_header(p, file="../r.dat"), "beside its header"),
    "truncated signals": (spoiled_dat, "promises 900"),
    "no signal file": (without_dat, "r.dat"),
    "not an EDF": (written("r.edf", b"x" * 600), "does not begin like"),
    "an empty EDF": (written("r.edf", b""), "does not begin like"),
    "a pickle": (saved(np.array([{}], dtype=object)), "read r.npz"),
    "complex numbers": (saved(SINE * 1j, fs=250), "not numbers"),
    "three dimensions": (saved(np.zeros((2, 2, 500)), fs=250), "shape"),
    "samples by leads": (saved(np.zeros((500, 2)), fs=250), "500 leads of 2 samples"),
    "no rate in the array": (saved(SINE), "samples there are per second"),
    "unknown unit": (saved(SINE, fs=250, unit="furlong"), "furlong"),
    "a torn table": (written("r.csv", "time,II\n0,1\n0.004\n"), "row 3"),
    "words in a table": (written("r.csv", "time,II\n0,1\n0.004,high\n"), "'high'"),
    "an empty table": (written("r.csv", "\n\n"), "empty"),
    "uneven times": (written("r.csv", "time,II\n0,1\n0.004,1\n0.5,1\n0.504,2\n"), "evenly"),
    "text without a rate": (written("r.txt", "1\n2\n3\n"), "per second"),
    "not JSON": (written("r.json", "{"), "not JSON"),
    "JSON without samples": (written("r.json", '{"fs": 250}'), "neither leads nor samples"),
    "a number for a unit": (written("r.json", '{"fs": 250, "unit": 5, "samples": [1, 2, 3]}'), "'5'"),
    "a sample beyond floats": (written("r.json", '{"fs": 250, "samples": [1' + 400 * "0" + "]}"), "not numbers"),
    "no zip within": (written("r.npz", b"PK\x03\x04garbage"), "read r.npz"),
    "a damaged array": (damaged, "read r.npz"),
    "leads of two lengths": (written("r.json", '{"fs": 250, "leads": {"I": [1, 2], "II": [1]}}'), "2, 1 samples"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_sentence(tmp_path, case):
    make, words = BAD[case]
    with pytest.raises(NetsukeError) as e:
        read(make(tmp_path))
    assert words in str(e.value) and "\n" not in str(e.value) and e.value.code == 2


def test_a_spoiled_edf_is_refused_wherever_it_is_cut_or_changed(tmp_path):
    x = np.arange(600, dtype=np.int16)
    write_edf(tmp_path / "r.edf", {"I": (x, "mV")}, 200)
    whole = (tmp_path / "r.edf").read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for k in range(60):
        data = bytearray(whole[: rng.integers(0, len(whole))] if k % 2 else whole)
        if not k % 2:
            data[int(rng.integers(236, 512))] = int(rng.integers(256))
        (tmp_path / "s.edf").write_bytes(data)
        try:
            assert np.isfinite(read(tmp_path / "s.edf").millivolts(0)).all()
        except NetsukeError:
            refused += 1
    assert refused >= 30


def test_misuse_of_the_functions_is_one_sentence():
    short = of_array(SINE[:400], 250.0, name="it")
    for action, words in (
        (lambda: analyse(short), "lasts 1.60 s"),
        (lambda: analyse(of_array(SINE, 250.0), "V7"), "no such lead"),
        (lambda: analyse(of_array(SINE, 250.0), method="guess"), "none of that name"),
        (lambda: analyse(of_array(SINE, 250.0), weights="fold9"), "none of that name"),
        (lambda: hrv(np.array([800.0, 810, 790, 805, 800])), "seconds"),
        (lambda: hrv(np.array([0.8, -1, 0.8])), "not positive"),
    ):
        with pytest.raises(NetsukeError) as e:
            action()
        assert words in str(e.value)
