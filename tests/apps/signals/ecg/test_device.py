"""The pipeline in C finds what Python finds: on people, on spoiled and made signals, on an emulated board."""

import functools
import shutil
import subprocess
import time

import numpy as np
import pytest

from netsuke.apps.control.simulate import compiler
from netsuke.apps.signals.ecg import beats, device, network, reference, synthetic
from netsuke.apps.signals.ecg.pipeline import analyse
from netsuke.apps.signals.ecg.record import of_array
from netsuke.data.catalogue import missing
from netsuke.devices.board import missing_tools
from netsuke.errors import NetsukeError
from netsuke.systems.featuredb_ecg_cases import NOTHING, SPOILED, unlike

with_ludb = pytest.mark.skipif(bool(missing((reference.LUDB,))), reason=f"NETSUKE_DATA lacks {reference.LUDB}")
needs_c = pytest.mark.skipif(compiler() is None, reason="no C compiler")
needs_board = pytest.mark.skipif(bool(missing_tools()), reason=f"not installed: {missing_tools()}")


@pytest.fixture(scope="module")
def hosts():
    return functools.cache(device.OnHost)


def both(host, x, fs):
    x = np.asarray(x[: 10 * fs], np.float32)
    return analyse(of_array(x.astype(float), float(fs)), across=False), host(x)


@needs_c
@with_ludb
@pytest.mark.parametrize("lead", ["I", "II"])
def test_c_agrees_with_python_on_people(hosts, lead):
    for m in reference.ludb(lead)[::10]:
        python, c = both(hosts(500), m.x, 500)
        assert unlike(python, c, 0.1) == [], m.name
        assert len(c.r) == len(python.r) and np.abs(c.r - 250 * python.r).max() < 0.01


@needs_c
@with_ludb
@pytest.mark.parametrize("case", [c for c in SPOILED if c != "clean"])
def test_c_agrees_on_spoiled_signals(hosts, case):
    m, rng = reference.ludb("II")[12], np.random.default_rng(1)
    assert unlike(*both(hosts(500), SPOILED[case](m.x, m.fs, rng), 500), 0.1) == []


@needs_c
@pytest.mark.parametrize("fs", [100, 250, 360, 1000])
def test_c_agrees_on_made_hearts_at_other_rates(hosts, fs):
    kinds = [{"rate": 40}, {"rate": 90}, {"rate": 200}, {"rate": 95, "rhythm": "fibrillation"}]
    kinds += [{"rate": 70, "rhythm": "paced"}]
    flags = []
    for knobs in kinds:
        python, c = both(hosts(fs), synthetic.heart(seconds=10, fs=float(fs), seed=1, **knobs).x, fs)
        assert unlike(python, c, 0.1) == [], knobs
        flags += c.flags
    assert ("paced" in flags) == (fs >= device.SPIKE_RATE) and "fast" in flags


@needs_c
def test_nothing_to_measure_gives_reasons(hosts):
    rng = np.random.default_rng(2)
    rows = [make(5000, rng) for make in NOTHING.values()]
    for x in [*rows, np.full(5000, np.nan), np.full(5000, np.inf), rng.normal(0, 1e30, 5000)]:
        with np.errstate(all="ignore"):
            got = hosts(500)(x)
        assert all(v.reason for v in got.values.values() if v.value is None)
        assert got.values["QT"].value is None
    assert hosts(500)(np.full(5000, np.nan)).values["PR"].reason == "samples are missing or not finite"


@needs_c
def test_a_change_of_weights_or_signal_shows(hosts):
    x = synthetic.heart(seconds=10, fs=250.0, rate=70, seed=0).x
    python, c = both(hosts(250), x, 250)
    assert unlike(python, c, 0.1) == []
    assert unlike(python, device.OnHost(250, "fold0")(x), 0.1) != []
    assert unlike(python, hosts(250)(synthetic.heart(seconds=10, fs=250.0, rate=60, seed=0).x), 2.0) != []


@needs_c
def test_a_block_takes_less_than_a_millisecond(hosts):
    x, best = synthetic.heart(seconds=10, fs=250.0, rate=70, seed=0).x.astype(np.float32), 1.0
    for _ in range(5):
        start = time.process_time()
        for _ in range(10):
            hosts(250).raw(x)
        best = min(best, (time.process_time() - start) / 10)
    assert best < 1e-3


@needs_c
@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_the_folder_builds_without_warnings_and_tests_itself(tmp_path):
    facts = device.write_c(tmp_path / "c", 250)
    done = subprocess.run(
        ["make", "-s", "-C", tmp_path / "c", "test", "CFLAGS=-O1 -Werror -Wdouble-promotion"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("PASS"), done.stdout + done.stderr
    assert facts["rate"] == 250 and facts["spike bytes"] == 0
    code = "".join(p.read_text() for p in (tmp_path / "c/src").glob("*.[ch]"))
    assert "malloc" not in code.replace(", no malloc", "") and "double" not in code


@needs_board
def test_the_board_holds_a_block_in_32_kb(hosts):
    for fs in (250, 500):
        x = synthetic.heart(seconds=10, fs=float(fs), rate=70, seed=0).x.astype(np.float32)
        run = device.on_board(x[None], fs)
        assert run.ram + run.stack <= 32 << 10
        assert 4e5 < run.per_second < 1e6 and len(run.reports) == 1
        if compiler():
            assert np.abs(run.reports[0].marks - hosts(fs)(x).marks).max() < 1e-3


def test_rates_and_weights_that_do_not_exist_are_refused():
    for fs in (99, 1001, 250.5):
        with pytest.raises(NetsukeError, match="whole numbers from 100 to 1000"):
            device.sources(fs)
    with pytest.raises(NetsukeError, match="none of that name"):
        device.sources(250, "fold9")


def test_tables_carry_the_packages_own_numbers():
    text = device.sources(250)
    like = text["ns_ecg_tables.h"].split("NS_ECG_LIKE ")[1].split("\n")[0]
    assert np.float32(like.rstrip("f")) == np.float32(beats.LIKE)
    first = network.weights()["blocks.2.weight"].transpose(2, 1, 0).reshape(-1)[0]
    table = text["ns_ecg_tables.c"].split("ns_ecg_block2[1280] = {")[1].split(",")[0]
    assert np.float32(table.strip().rstrip("f")) == first
