"""`netsuke devices` and `netsuke devices show NAME`, and their Python form."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from netsuke.devices import Device, command, devices
from netsuke.devices.device import CARDS
from netsuke.errors import NetsukeError


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    app = typer.Typer()
    app.command("other")(lambda: None)
    command.register(app)
    return lambda *words: CliRunner().invoke(app, ["devices", *words])


def test_the_table_has_every_card(run):
    result = run()
    assert result.exit_code == 0
    for name in Device.names():
        assert f" {name} " in result.stdout
    assert "2.20 GB" in result.stdout and "124.6" not in result.stdout and "125 M" in result.stdout


def test_a_narrow_terminal_cuts_the_chip_and_nothing_else(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = run().stdout
    for name in Device.names():
        assert f" {name} " in text
    assert "ESP32-S3 with…" in text and "124.6" not in text and "125 M" in text


def test_json_of_all(run):
    rows = json.loads(run("--json").stdout)
    assert [row["name"] for row in rows] == Device.names() and rows == devices()


@pytest.mark.parametrize("words", [("show", "pi4", "--json"), ("--json", "show", "pi4")])
def test_json_of_one(run, words):
    row = json.loads(run(*words).stdout)
    assert row == devices("pi4") and row["sources"]["ram_bandwidth"].startswith("measured by others: STREAM")


def test_show_prints_every_figure_with_its_source(run):
    text = run("show", "stm32f746").stdout
    device = Device.load("stm32f746")
    for field in device.numbers():
        assert field in text
    assert "CMSIS-NN" in text and "1.246e+08 MAC/s" in text


def test_brackets_in_a_card_are_printed_as_they_are(run, tmp_path):
    path = tmp_path / "odd.toml"
    source = Device.load("pi4").sources["overhead_s"]
    path.write_text((CARDS / "pi4.toml").read_text().replace(source, "[bold]guess[/nonsense]"))
    result = run("show", str(path))
    assert result.exit_code == 0 and "[bold]guess[/nonsense]" in result.stdout


def test_an_unknown_device_raises_for_the_command_line_to_print(run):
    error = run("show", "pi99").exception
    assert isinstance(error, NetsukeError) and error.code == 2 and "pi4" in str(error)


def test_refresh_measures_again(run, monkeypatch):
    calls = []
    monkeypatch.setattr(Device, "this", lambda refresh=False: calls.append(refresh) or Device.load("pi4"))
    assert run("show", "this").exit_code == run("show", "this", "--refresh", "--json").exit_code == 0
    assert calls == [False, True]
