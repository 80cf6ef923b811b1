"""What people write as a budget, and the cost model that budgets are held against."""

from __future__ import annotations

import pytest

from netsuke.devices import Budget, Device, Work, format_bytes, format_seconds, parse_bytes
from netsuke.errors import NetsukeError


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("512MB", 512_000_000), ("512 mb", 512_000_000), ("512M", 512_000_000), ("256KB", 256_000),
        ("256KiB", 262_144), ("256Ki", 262_144), ("1.5GiB", 1_610_612_736), ("4.1 KB", 4100), ("0.1MB", 100_000),
        (".5k", 500), ("1e6", 1_000_000), ("1e3KB", 1_000_000), (" 7 ", 7), ("7B", 7), (4096, 4096), (2e9, 2 * 10**9),
        ("9007199254740993", 9007199254740993), ("2TB", 2 * 10**12),
    ],
)  # fmt: skip
def test_sizes(text, n):
    assert parse_bytes(text) == n
    assert isinstance(parse_bytes(text), int)


BAD = [
    "", " ", "0", "0MB", "-1", "-5MB", "nan", "inf", "12 parsecs", "MB", "5 5MB", "1,5MB", "1e999", "1e99", "--",
    "5m b", "0x10", "٣MB", True, None, [], float("nan"), float("inf"), 0, -3, 10**30,
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_nonsense_is_refused_by_the_name_of_the_option(bad):
    for option in ("ram", "storage", "latency", "energy", "max_loss"):
        if bad is None:  # no limit at all
            continue
        with pytest.raises(NetsukeError, match=f"--{option.replace('_', '-')}") as caught:
            Budget.parse(**{option: bad})
        assert caught.value.code == 2
    with pytest.raises(NetsukeError):
        parse_bytes(bad)


def test_less_than_a_byte_is_refused():
    with pytest.raises(NetsukeError, match="--ram"):
        Budget.parse(ram="0.2B")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("50ms", 0.05), ("20us", 2e-5), ("20µs", 2e-5), ("20μs", 2e-5),
        ("1.5 s", 1.5), ("3", 3.0), (0.25, 0.25), ("2min", 120.0), ("5ns", 5e-9),
    ],
)  # fmt: skip
def test_times(text, seconds):
    assert Budget.parse(latency=text).latency == pytest.approx(seconds, rel=1e-12)


def test_energies_and_losses():
    assert Budget.parse(energy="2mJ").energy == pytest.approx(2e-3)
    assert Budget.parse(energy="40 uJ").energy == pytest.approx(4e-5)
    assert Budget.parse(energy=1).energy == 1.0
    for text in ("2%", "0.02", 0.02, "2 %"):
        assert Budget.parse(max_loss=text).max_loss == pytest.approx(0.02)
    for option, text in (("energy", "2MJ"), ("latency", "2Ms"), ("max_loss", "2"), ("max_loss", "150%"), ("ram", "2%")):
        with pytest.raises(NetsukeError, match=f"--{option.replace('_', '-')}"):
            Budget.parse(**{option: text})


def test_nothing_given_is_no_limit():
    assert Budget.parse() == Budget(None, None, None, None, None)


def test_a_budget_is_filled_in_from_the_device():
    pi = Device.load("pi-zero-2w")
    filled = Budget.for_device(pi, Budget.parse(storage="8MB", latency="50ms"))
    assert filled == Budget(ram=pi.ram, storage=8_000_000, latency=0.05)
    assert Budget.for_device(pi, Budget(ram=pi.ram_total)).ram == pi.ram_total


@pytest.mark.parametrize("option", ["ram", "storage"])
def test_more_than_the_device_has_is_refused(option):
    chip = Device.load("nrf52840")
    with pytest.raises(NetsukeError, match=f"nrf52840 with --{option}"):
        Budget.for_device(chip, Budget.parse(**{option: "8MB"}))


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (512e6, "512 MB"),
        (6_104_000, "6.10 MB"), (999_999, "1.00 MB"), (99_960, "100 KB"), (2e15, "2000 TB"),
    ],
)  # fmt: skip
def test_format_bytes(n, text):
    assert format_bytes(n) == text


@pytest.mark.parametrize(
    ("s", "text"),
    [
        (0, "0 s"), (0.05, "50.0 ms"), (2.0, "2.00 s"), (3.2e-5, "32.0 µs"),
        (5e-9, "5.00 ns"), (0.99999, "1.00 s"), (1e-12, "0.00 ns"),
    ],
)  # fmt: skip
def test_format_seconds(s, text):
    assert format_seconds(s) == text


@pytest.mark.parametrize("n", [1, 999, 1000, 123_456, 5_000_000, 7 * 10**9])
def test_sizes_survive_the_round_trip_to_three_digits(n):
    assert parse_bytes(format_bytes(n)) == pytest.approx(n, rel=0.006)


def test_cost_is_the_roofline():
    pi = Device.load("pi4")
    work = Work(macs=15e6, bytes_read=15e6, bits=8, layers=10, ram=20_000_000, storage=16_000_000)
    cost = pi.cost(work)
    assert cost.latency == pytest.approx(15e6 / pi.ram_bandwidth + 10 * pi.overhead_s)
    assert cost.energy == pytest.approx(15e6 * pi.energy_per_mac["int8"] + 15e6 * pi.energy_per_byte)
    assert (cost.peak_ram, cost.storage, cost.bound) == (20_000_000, 16_000_000, "memory")


@pytest.mark.parametrize(
    ("work", "bound"),
    [
        (Work(macs=1e6, bytes_read=1e9), "memory"),
        (Work(macs=1e11, bytes_read=1e6), "arithmetic"),
        (Work(macs=1e6, bytes_read=1e6, bytes_from_storage=1e8), "storage"),
        (Work(macs=1e3, bytes_read=1e3, layers=100), "overhead"),
    ],
)
def test_the_limit_that_binds(work, bound):
    assert Device.load("pi4").cost(work).bound == bound


@pytest.mark.parametrize("name", Device.names())
def test_more_work_never_costs_less(name):
    device = Device.load(name)
    small = dict(macs=1e6, bytes_read=1e5, bits=8, bytes_from_storage=1e4, layers=5, ram=1000, storage=1000)
    base = device.cost(Work(**small))
    for field in small:
        more = device.cost(Work(**small | {field: small[field] * 4}))
        assert more.latency >= base.latency and more.energy >= base.energy
        assert more.peak_ram >= base.peak_ram and more.storage >= base.storage


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf")])
def test_work_must_be_a_number(bad):
    with pytest.raises(NetsukeError, match="bytes_read"):
        Work(macs=1, bytes_read=bad)
