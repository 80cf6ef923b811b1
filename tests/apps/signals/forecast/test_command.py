"""`netsuke forecast` from the outside: tables in, tables, JSON, pictures and C out."""

import csv
import json
from datetime import datetime, timedelta

import numpy as np
import pytest
import typer

from netsuke.apps.signals.forecast.command import register
from netsuke.errors import NetsukeError
from tests.apps.signals.forecast.data import meters


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("forecast") / "meters.csv"
    start = datetime(2024, 1, 1)
    with path.open("w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["date", "load", "sun"])
        rows.writerows([start + timedelta(hours=k), *map("{:.5f}".format, row)] for k, row in enumerate(meters()))
    return path


def forecast(*words):
    app = typer.Typer()
    register(app)
    app.callback()(lambda: None)
    app(["forecast", *map(str, words)], standalone_mode=False)


def test_fit_then_predict(table, tmp_path, capsys):
    kept = tmp_path / "f.json"
    forecast("fit", table, "--horizon", 48, "-o", kept, "--to-c", tmp_path / "c", "--json")
    got = json.loads(capsys.readouterr().out)
    assert got["period"] == 24 and got["channels"] == ["load", "sun"] and got["parameters"] < 100
    assert got["c"]["weights"] < 1024 and (tmp_path / "c/Makefile").is_file()
    forecast("predict", table, "--model", kept, "--plot", tmp_path / "f.svg", "-o", tmp_path / "f.csv")
    assert "<svg" in (tmp_path / "f.svg").read_text()
    rows = list(csv.reader((tmp_path / "f.csv").open()))
    assert len(rows) == 49 and rows[0] == ["date", "load", "sun"] and rows[1][0] == "2024-02-20 00:00:00"
    capsys.readouterr()
    forecast("predict", table, "--horizon", 48, "--json")
    again = json.loads(capsys.readouterr().out)
    assert np.allclose(again["forecast"]["load"], [float(r[1]) for r in rows[1:]], rtol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "f.csv", "f.json", "f.svg"]


def test_the_firmwares_memory_is_said_and_rows_fade(table, tmp_path, capsys):
    words = (
        "fit",
        table,
        "--horizon",
        48,
        "--alpha",
        1,
        "-o",
        tmp_path / "f.json",
        "--to-c",
        tmp_path / "c",
        "--updating",
    )
    forecast(*words, "--forget", 0.999)
    said = capsys.readouterr().out
    facts = json.loads((tmp_path / "c/forecast.json").read_text())
    assert f"keeps {facts['state']['1']} bytes with 1 channel, {facts['state']['2']} bytes with 2 channels" in said
    assert json.loads((tmp_path / "f.json").read_text())["forget"] == 0.999
    assert "0.999" in (tmp_path / "c/src/forecast.c").read_text()


def test_backtest(table, tmp_path, capsys):
    forecast("backtest", table, "--horizon", 48, "--folds", 2, "--plot", tmp_path / "b.png")
    said = capsys.readouterr().out
    assert "MixLinear" in said and "mean period" in said and "80 % bands" in said
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"
    forecast("backtest", table, "--horizon", 48, "--folds", 2, "--columns", "sun", "--json")
    got = json.loads(capsys.readouterr().out)
    assert list(got["channels"]) == ["sun"] and np.shape(got["bands"]["sun"]) == (5, 48)


WRONG = [
    (["fit"], "--horizon 96"),
    (["fit", "--horizon", 48, "--period", "day"], "--period"),
    (["fit", "--horizon", 48, "--alpha", "half"], "--alpha"),
    (["fit", "--horizon", 48, "--forget", 1.5], "forget"),
    (["fit", "--horizon", 48, "--columns", "wind"], "load, sun"),
    (["fit", "--horizon", 48, "-o", "nowhere/f.json"], "nowhere"),
    (["fit", "--horizon", 48, "--method", "moments", "--to-c", "c", "--updating", "--alpha", "0.5"], "--alpha 1"),
    (["fit", "--horizon", 48, "--to-c", "c", "--weights", "int4"], "float32, int8"),
    (["predict", "--horizon", 48, "--plot", "f.gif"], ".svg"),
    (["predict", "--model", "none.json"], "none.json"),
    (["predict", "--horizon", 48, "--plot", "nowhere/f.svg"], "folder"),
    (["backtest", "--horizon", 900], "rows"),
    (["backtest", "--horizon", 48, "--folds", 0], "folds"),
]


@pytest.mark.parametrize(("words", "word"), WRONG, ids=[" ".join(map(str, w)) for w, _ in WRONG])
def test_mistakes_are_sentences(table, tmp_path, monkeypatch, words, word):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NetsukeError) as e:
        forecast(words[0], table, *words[1:])
    assert word in str(e.value) and e.value.code == 2


def test_another_horizon_than_the_kept_one_is_refused(table, tmp_path):
    forecast("fit", table, "--horizon", 48, "-o", tmp_path / "f.json")
    with pytest.raises(NetsukeError, match="fitted for 48"):
        forecast("predict", table, "--model", tmp_path / "f.json", "--horizon", 24)
