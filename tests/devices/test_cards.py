"""Every card loads, every number of it has a source, and bad cards are refused by the name of what is wrong."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from netsuke.devices import Device
from netsuke.devices.device import CARDS, HOMES
from netsuke.errors import NetsukeError

WANTED = {
    "stm32f4", "stm32f746", "nrf52840", "rp2350", "esp32-s3", "pi-zero-2w", "pi4", "pi5", "jetson-orin-nano", "pixel6",
    "galaxy-s25", "iphone13", "iphone15pro", "m-laptop", "browser",
}  # fmt: skip


def test_the_promised_cards_are_there():
    assert set(Device.names()) >= WANTED


@pytest.mark.parametrize("name", Device.names())
def test_card(name):
    device = Device.load(name)
    assert device.name == name
    assert device.sources.keys() == device.numbers().keys()  # one source per number, and none for a number that is gone
    assert 0 < device.ram <= device.ram_total
    assert device.storage > 0 and device.ram_bandwidth > device.storage_bandwidth > 0
    assert device.rate(8) >= device.rate(16) >= device.rate(32) > 0
    assert device.mac_energy(8) <= device.mac_energy(32)
    assert set(device.homes) <= set(HOMES) and device.homes
    assert 1e-12 < device.mac_energy(32) < 1e-8 and 1e-12 < device.energy_per_byte < 1e-9
    busy = device.rate(8) * device.mac_energy(8)
    assert (0.005 < busy < 0.5) if device.kind == "mcu" else (1 < busy < 60)  # watts


def test_figures_that_people_rely_on():
    assert Device.load("pi-zero-2w").ram_total == 512 * 2**20
    assert Device.load("nrf52840").ram_total == 256 * 2**10
    assert Device.load("browser").ram_total == 2**32
    assert Device.load("stm32f746").rate(8) == pytest.approx(124.6e6)
    order = [Device.load(name).rate(8) for name in ("nrf52840", "stm32f746", "pi-zero-2w", "pi4", "pi5", "m-laptop")]
    assert order == sorted(order)


def test_rate_falls_back_to_the_next_wider_arithmetic():
    pi5, pi4 = Device.load("pi5"), Device.load("pi4")
    assert pi5.rate(4) == pi5.rates["int8"] and pi5.rate(16) == pi5.rates["f16"] and pi5.rate(32) == pi5.rates["f32"]
    assert "f16" not in pi4.rates and pi4.rate(16) == pi4.rates["f32"] and pi4.rate(12) == pi4.rates["f32"]
    only = {"rates": {"f32": 1e9}, "energy_per_mac": {"f32": 1e-10}}
    assert msgspec.structs.replace(pi4, **only).rate(8) == 1e9


def card(tmp_path, change=lambda text: text):
    path = tmp_path / "mine.toml"
    path.write_text(change((CARDS / "pi4.toml").read_text()))
    return path


def test_a_card_of_ones_own(tmp_path):
    path = card(tmp_path, lambda text: text.replace('name = "pi4"', 'name = "mine"'))
    assert Device.load(path).name == "mine" and Device.load(str(path)).ram == Device.load("pi4").ram


def refused(path) -> str:
    with pytest.raises(NetsukeError) as caught:
        Device.load(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("cores = 4", "cores = 4\nram_bandwith = 3.0", "'ram_bandwith'"),
        ("cores = 4", "cores = 0", "cores"),
        ("cores = 4", 'cores = "four"', "$.cores"),
        ("cores = 4\n", "", "cores"),
        ("ram_bandwidth = 4.85e9", "ram_bandwidth = -1.0", "ram_bandwidth"),
        ("ram_bandwidth = 4.85e9", "ram_bandwidth = nan", "ram_bandwidth"),
        ("ram_bandwidth = 4.85e9", "ram_bandwidth = inf", "ram_bandwidth"),
        ("ram = 3_221_225_472", "ram = 5_000_000_000", "ram_total"),
        ('kind = "sbc"', 'kind = "toaster"', "kind"),
        ('"gguf"]', '"cuda"]', "'cuda'"),
        ("f32 = 9.6e9", "f64 = 9.6e9", "rates"),
        ("int8 = 1.44e10\n", "", "rates"),
        ('overhead_s = "estimated: waking and joining four threads"', "", "overhead_s has no source"),
        ('overhead_s = "estimated: waking and joining four threads"', 'overhead_s = " "', "overhead_s has no source"),
        ("[rates]", "[rates", "TOML"),
    ],
)
def test_bad_cards_are_refused_by_name(tmp_path, old, new, named):
    assert old in (CARDS / "pi4.toml").read_text()
    assert named in refused(card(tmp_path, lambda text: text.replace(old, new)))


def test_each_missing_source_is_named(tmp_path):
    whole = Device.load("pi4")
    for field in whole.numbers():
        sources = {key: value for key, value in whole.sources.items() if key != field}
        with pytest.raises(NetsukeError, match=f"{field} has no source"):
            msgspec.structs.replace(whole, sources=sources)


def test_a_misspelt_key_gets_the_right_one_suggested(tmp_path):
    text = refused(card(tmp_path, lambda text: text.replace("cores = 4", "cores = 4\nram_bandwith = 3.0")))
    assert "try: 'ram_bandwidth'" in text


def test_hostile_files(tmp_path):
    path = tmp_path / "bad.toml"
    assert "cannot read the device card bad.toml" in refused(path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refused(path)
    path.write_bytes(b"#" * (2 << 20))
    assert "larger than 1 MiB" in refused(path)
    path.write_text("a = " + "[" * 100_000)
    assert "TOML" in refused(path)
    path.unlink()
    path.mkdir()
    assert "bad.toml" in refused(path)


@pytest.mark.parametrize(("asked", "near"), [("pi44", "pi4"), ("iphone15", "iphone15pro"), ("STM32F746", "stm32f746")])
def test_an_unknown_name_suggests_the_nearest(asked, near):
    text = refused(asked)
    assert near in text.split("try: ")[1]


@pytest.mark.parametrize("asked", ["", "../secrets", "zzzzzz", "pi4.tom"])
def test_names_that_are_nothing(asked):
    assert "there is no card of that name" in refused(asked)


def test_import_is_light():
    code = "import sys, netsuke.devices; print(sorted({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
