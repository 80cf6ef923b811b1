"""`netsuke ecg report|evaluate|stream` as a user types them: text, JSON, pages, and mistakes in one sentence."""

import json
import re

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from netsuke.apps.signals.ecg import synthetic
from netsuke.apps.signals.ecg.command import register
from netsuke.errors import NetsukeError
from tests.apps.signals.ecg.files import write_wfdb


@pytest.fixture(scope="module")
def app():
    out = typer.Typer()
    register(out)
    return out


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    x = synthetic.heart(66, 20, 250).x
    rows = np.rint(200 * np.stack((0.6 * x, x), 1)).astype(int)
    return write_wfdb(tmp_path_factory.mktemp("ecg"), "r", rows, 250, gain="200/mV")


def run(app, *words, **more):
    return CliRunner().invoke(app, list(map(str, words)), **more)


def test_a_report_names_what_a_clinician_asks_first(app, record):
    out = run(app, "ecg", "report", record)
    assert out.exit_code == 0, out.output
    assert out.output.startswith("r, lead II: 20 s at 250 Hz")
    for word in ("heart rate", "66 /min", "PR", "QTc Fridericia", "first-degree AV block", "SDNN", "axis"):
        assert word in out.output


def test_json_has_every_value_with_its_grade_and_every_beat(app, record):
    out = json.loads(run(app, "ecg", "report", record, "--lead", "i", "--json", "--beats").output)
    assert out["lead"] == "I" and out["values"]["PR"]["quality"] in ("good", "fair")
    assert all(v["value"] is not None or v["reason"] for v in out["values"].values())
    assert len(out["beats"]["r"]) == len(out["beats"]["marks"]) == len(out["beats"]["reasons"])


def test_the_page_is_one_file_that_fetches_nothing(app, record, tmp_path):
    target = tmp_path / "r.html"
    assert run(app, "ecg", "report", record, "-o", target).exit_code == 0
    page = target.read_text()
    assert page.count("<svg") == 3 and "representative beat" in page.lower()
    assert not re.search(r"(src|href)\s*=|@import|url\(", page)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_the_sheet_is_a_pdf(app, record, tmp_path):
    assert run(app, "ecg", "report", record, "-o", tmp_path / "r.pdf").exit_code == 0
    assert (tmp_path / "r.pdf").read_bytes()[:5] == b"%PDF-"


def test_a_stream_gives_a_line_per_block(app):
    lines = "\n".join(f"{1000 * v:.2f}" for v in synthetic.heart(66, 23, 250).x)
    out = run(app, "ecg", "stream", "--rate", "250", "--unit", "uV", "--json", input=lines)
    rows = [json.loads(line) for line in out.output.splitlines()]
    assert [r["start"] for r in rows] == [0, 10, 20] and abs(rows[0]["heart rate"]["value"] - 66) < 1
    text = run(app, "ecg", "stream", "--rate", "250", "--unit", "uV", input=lines).output
    assert text.count("heart rate 66 /min") >= 2


@pytest.mark.parametrize(
    ("words", "sentence", "given"),
    [
        (("report", "{record}", "--lead", "V9"), "no such lead", None),
        (("report", "{record}", "-o", "r.gif"), "ending '.gif' is unknown", None),
        (("report", "{record}", "-o", "/no/such/folder/r.html"), "writable folder", None),
        (("evaluate", "{folder}"), "no WFDB record with marks", None),
        (("evaluate", "/no/such/folder"), "no folder", None),
        (("stream",), "--rate", "1\n"),
        (("stream", "--rate", "1"), "100 to 10000 Hz", "1\n"),
        (("stream", "--rate", "250", "--seconds", "1"), "4 to 60 s", "1\n"),
        (("stream", "--rate", "250", "--unit", "bananas"), "bananas", "1\n"),
        (("stream", "--rate", "250"), "line 3", "1\n2\nx\n"),
        (("stream", "--rate", "250", "--column", "2"), "column 2", "1\n2\n"),
    ],
)
def test_mistakes_are_one_sentence(app, record, tmp_path, words, sentence, given):
    words = [w.format(record=record, folder=tmp_path) for w in words]
    out = run(app, "ecg", *words, input=given)
    assert isinstance(out.exception, NetsukeError) and sentence in str(out.exception)
    assert not list(tmp_path.iterdir())
