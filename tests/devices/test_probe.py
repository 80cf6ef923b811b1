"""Measuring the machine at hand: each measurement, the container limits, the cache file and its accidents."""

from __future__ import annotations

import builtins
import errno

import msgspec
import pytest

from netsuke.devices import Device, probe
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
    assert 1e8 < probe.read_bandwidth(1, 64 << 20, seconds=0.05) < 1e12
    assert 1e8 < probe.f32_rate(1, n=256, seconds=0.05) < 1e13
    assert 1e-8 < probe.launch_seconds(2, seconds=0.02) < 1e-2


def test_a_whole_probe(monkeypatch):
    for name in ("read_bandwidth", "f32_rate", "launch_seconds"):
        measure = getattr(probe, name)
        monkeypatch.setattr(probe, name, lambda *a, m=measure: m(*a, seconds=0.02))
    monkeypatch.setattr(probe, "int8_rate", lambda cores: None)
    monkeypatch.setattr(probe, "storage_bandwidth", lambda folder, m=probe.storage_bandwidth: m(folder, 8 << 20))
    device = probe.probe()
    assert device.name == "this" and device.cores == probe.core_count()
    assert device.rates["int8"] == 2 * device.rates["f32"] and "estimated" in device.sources["rates.int8"]
    for field in ("ram", "ram_total", "ram_bandwidth", "rates.f32", "cores", "overhead_s"):
        assert device.sources[field].startswith("measured: ")
    assert all(text.startswith(("measured: ", "estimated: ")) for text in device.sources.values())


def test_int8_is_measured_with_torch_and_leaves_its_threads_alone():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    assert 1e8 < probe.int8_rate(1, n=128, seconds=0.02) < 1e14
    assert torch.get_num_threads() == before


def test_without_torch_int8_is_not_measured(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **more):
        if name == "torch":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert probe.int8_rate(1, n=64) is None


def test_storage_is_read_back_and_nothing_is_left(tmp_path):
    rate, source = probe.storage_bandwidth(tmp_path, 16 << 20)
    assert 1e6 < rate < 1e12 and source.startswith("measured: ")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_could_not_be_dropped_is_called_an_upper_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "_read_rate", lambda path: 5e9)
    assert "upper bound" in probe.storage_bandwidth(tmp_path, 8 << 20)[1]
    speeds = iter([1e9, 8e9, 9e9])
    monkeypatch.setattr(probe, "_read_rate", lambda path: next(speeds))
    rate, source = probe.storage_bandwidth(tmp_path, 8 << 20)
    assert rate == 1e9 and "dropped" in source and "upper bound" not in source


def test_a_full_disk_gives_a_marked_estimate(tmp_path, monkeypatch):
    def full(*_args, **_more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(probe.tempfile, "NamedTemporaryFile", full)
    rate, source = probe.storage_bandwidth(tmp_path)
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
