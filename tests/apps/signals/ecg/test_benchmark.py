"""The tables of docs/ecg.md are those of the result file, and a partial run does not thin that file out."""

import importlib
import json
import shutil
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[4] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A benchmark as it is imported when its folder is the script's."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_the_tables_of_the_page_are_those_of_the_result_file(load, tmp_path):
    docs = load("ecg_docs")
    page = Path(shutil.copy(docs.PAGE, tmp_path / "ecg.md"))
    for name in docs.PARTS:
        assert f"<!-- {name} -->\n" in page.read_text() and f"<!-- /{name} -->" in page.read_text(), name
    docs.write(page)
    assert page.read_text() == docs.PAGE.read_text()


def test_a_partial_run_keeps_the_other_parts(load, tmp_path):
    ecg, path = load("ecg"), tmp_path / "ecg.json"
    path.write_text(json.dumps({"intervals": {"I": {"netsuke": 1, "peer": 2}, "V1": 3}, "day": 4, "run": "first"}))
    ecg.save({"intervals": {"I": {"netsuke": 5}}}, ["netsuke"], False, path)
    got = json.loads(path.read_text())
    assert got["intervals"] == {"I": {"netsuke": 5, "peer": 2}, "V1": 3}
    assert got["day"] == 4 and got["run"] == "first" and list(got["runs"]) == ["netsuke"]
    ecg.save({"day": 6}, ["a day"], True, path)
    assert set(json.loads(path.read_text())) == {"day", "run"}


def test_how_often_plus_minus_holds_is_said_as_it_was_measured(load):
    docs = load("ecg_docs")
    got = json.loads(docs.RESULT.read_text())["intervals"]
    shares = {lead: [round(100 * v["netsuke"][k]["within_plus_minus"]) for k in docs.KEYS] for lead, v in got.items()}
    own = [s for lead in docs.TRAINED for s in shares.pop(lead)]
    others = [s for row in shares.values() for s in row]
    ecg = docs.ROOT / "src/netsuke/apps/signals/ecg"
    for path in (docs.PAGE, ecg / "parameters.py", ecg / "report.html.j2"):
        text = " ".join(path.read_text().split())
        for few, many in ((min(own), max(own)), (min(others), max(others))):
            assert f"{few} to {many}" in text, path.name
    assert f"down to {min(others)} in 100" in " ".join((ecg / "screening.py").read_text().split())


def test_numbers_are_written_to_four_digits(load, tmp_path):
    ecg, path = load("ecg"), tmp_path / "ecg.json"
    path.write_text(json.dumps({"old": [1.23456789, 2], "run": "first"}))
    ecg.save({"new": {"a": 0.98765432}}, ["new"], False, path)
    got = json.loads(path.read_text())
    assert got["old"] == [1.2346, 2] and got["new"] == {"a": 0.9877}
