"""Measuring the machine at hand: each measurement, the container limits, the cache file and its accidents."""

from __future__ import annotations

import errno
import subprocess
import sys

import msgspec
import pytest

from netsuke.devices import Device, probe, speed
from netsuke.errors import NetsukeError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def quick(monkeypatch):
    """A probe that copies a card instead of measuring, and counts its calls."""
    calls = []

    def fake():
        calls.append(1)
        return msgspec.structs.replace(Device.load("pi4"), name="this")

    monkeypatch.setattr(probe, "probe", fake)
    return calls


def test_the_measurements_are_plausible():
    assert 1e8 < speed.read_bandwidth(1, 64 << 20, seconds=0.05) < 1e12
    assert 1e-8 < speed.launch_seconds(2, seconds=0.02) < 1e-2


def test_arithmetic_is_measured_in_another_process():
    pytest.importorskip("torch")
    code = "import sys; from netsuke.devices import speed; print(speed.arithmetic(1, 0.02), 'torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    floats, ints, seen = printed.replace("(", "").replace(")", "").replace(",", "").split()
    assert 1e8 < float(floats) < 1e13 and 1e8 < float(ints) < 1e14 and seen == "False"


@pytest.mark.parametrize(("script", "word"), [("raise SystemExit('no BLAS')", "no BLAS"), ("pass", "no output")])
def test_a_failed_measurement_is_one_sentence(monkeypatch, tmp_path, script, word):
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(speed.sys, "executable", str(fake))
    with pytest.raises(NetsukeError, match=word):
        speed.arithmetic(1)
    monkeypatch.setattr(speed.sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(NetsukeError, match="cannot measure the arithmetic"):
        speed.arithmetic(1)


@pytest.mark.parametrize("ints", [None, 7e9])
def test_a_whole_probe(monkeypatch, ints):
    for name in ("read_bandwidth", "launch_seconds"):
        measure = getattr(speed, name)
        monkeypatch.setattr(speed, name, lambda *a, m=measure: m(*a, seconds=0.02))
    monkeypatch.setattr(speed, "arithmetic", lambda cores: (2e9, ints))
    monkeypatch.setattr(speed, "storage_bandwidth", lambda folder, m=speed.storage_bandwidth: m(folder, 8 << 20))
    device = probe.probe()
    assert device.name == "this" and device.cores == probe.core_count()
    assert device.rates == {"f32": 2e9, "int8": 4e9 if ints is None else 7e9}
    assert device.sources["rates.int8"].startswith("estimated: twice" if ints is None else "measured: ")
    for field in ("ram", "ram_total", "ram_bandwidth", "rates.f32", "cores", "overhead_s"):
        assert device.sources[field].startswith("measured: ")
    assert device.sources.keys() == device.numbers().keys()
    assert all(text.startswith(("measured: ", "estimated: ")) for text in device.sources.values())


def test_a_busy_machine_is_noted(monkeypatch):
    monkeypatch.setattr(probe.os, "getloadavg", lambda: (3.0, 0, 0))
    assert "3.0 programs" in probe.load_note(2) and probe.load_note(8) == ""


def test_without_torch_int8_is_not_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert speed.int8_rate(1, 0.01) is None


def test_storage_is_read_back_and_nothing_is_left(tmp_path):
    rate, source = speed.storage_bandwidth(tmp_path, 16 << 20)
    assert 1e6 < rate < 1e12 and source.startswith("measured: ")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_could_not_be_dropped_is_called_an_upper_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "_read_rate", lambda path: 5e9)
    assert "upper bound" in speed.storage_bandwidth(tmp_path, 8 << 20)[1]
    speeds = iter([1e9, 8e9, 9e9])
    monkeypatch.setattr(speed, "_read_rate", lambda path: next(speeds))
    rate, source = speed.storage_bandwidth(tmp_path, 8 << 20)
    assert rate == 1e9 and "dropped" in source and "upper bound" not in source


def test_a_full_disk_gives_a_marked_estimate(tmp_path, monkeypatch):
    def full(*_args, **_more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(speed.tempfile, "NamedTemporaryFile", full)
    rate, source = speed.storage_bandwidth(tmp_path)
    assert rate > 0 and source.startswith("estimated: ") and "No space left" in source


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_cgroup_v2(tmp_path):
    write(tmp_path / "a", memory__max="1000000\n", memory__current="400000\n", memory__stat="inactive_file 100000\n")
    write(tmp_path / "a" / "b", memory__max="max\n", memory__current="300000\n")
    assert probe.cgroup_room(tmp_path, "0::/a/b\n") == (1_000_000, 700_000)
    assert probe.cgroup_room(tmp_path, "0::/elsewhere\n") is None


def test_cgroup_v1(tmp_path):
    write(tmp_path / "memory" / "c", memory__limit_in_bytes="5000", memory__usage_in_bytes="1000")
    write(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="1")
    assert probe.cgroup_room(tmp_path, "4:memory:/c\n3:cpu,cpuacct:/c\n") == (5000, 4000)


def test_inside_a_container_the_mounted_root_holds_the_limit(tmp_path):
    write(tmp_path, memory__max="5000", memory__current="6000")
    assert probe.cgroup_room(tmp_path, "0::/system.slice/unseen.scope\n") == (5000, 0)
    assert probe.cgroup_room(tmp_path, "") is None


def test_the_container_limit_lowers_the_memory(monkeypatch):
    total, _, _ = probe.memory()
    monkeypatch.setattr(probe, "cgroup_room", lambda: (1 << 20, 1 << 19))
    assert probe.memory()[:2] == (1 << 20, 1 << 19)
    monkeypatch.setattr(probe, "cgroup_room", lambda: (2 * total, 2 * total))
    assert probe.memory()[0] == total


def test_unknown_system_is_one_sentence(monkeypatch):
    monkeypatch.setattr(probe, "_read", lambda path: "")
    monkeypatch.setattr(probe, "_sysctl", lambda key: "")
    with pytest.raises(NetsukeError, match="memory size"):
        probe.memory()
    assert probe.cpu_model()


def test_the_cache_is_used_once_written(quick):
    first, second = Device.this(), Device.load("this")
    assert len(quick) == 1
    assert first.rates == second.rates and first.name == "this"
    assert first.sources["ram"].startswith("measured: ")  # free memory is read anew, not taken from the cache
    Device.this(refresh=True)
    assert len(quick) == 2
    assert [path.name for path in probe.cache_folder().iterdir()] == [probe.cache_path().name]


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xff", b"[]", b'{"name": "this"}', b"null"])
def test_a_torn_cache_file_is_measured_again(quick, damage):
    Device.this()
    whole = probe.cache_path().read_bytes()
    probe.cache_path().write_bytes(damage)
    assert Device.this().name == "this" and len(quick) == 2
    assert probe.cache_path().read_bytes() == whole
    probe.cache_path().write_bytes(whole[: len(whole) // 2])
    Device.this()
    assert len(quick) == 3


def test_a_cache_that_cannot_be_written_is_no_error(quick, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Device.this().name == "this" and Device.this().name == "this" and len(quick) == 2
