"""The tables of docs/forecast.md are those of the result files, and a run of some methods does not thin them out."""

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


def test_the_tables_of_the_page_are_those_of_the_result_files(load, tmp_path):
    docs = load("forecast_docs")
    page = Path(shutil.copy(docs.PAGE, tmp_path / "forecast.md"))
    for name in docs.ERRORS | docs.JUDGED:
        assert f"<!-- {name} -->\n" in page.read_text() and f"<!-- /{name} -->" in page.read_text(), name
    docs.write(page)
    assert page.read_text() == docs.PAGE.read_text()


def test_every_row_of_the_result_file_is_on_the_page(load):
    docs, bench = load("forecast_docs"), load("forecast")
    got, text = json.loads(docs.RESULT.read_text()), docs.PAGE.read_text()
    assert docs.methods(got["rows"])[0] == list(bench.METHODS) and len(got["rows"]) == 8 * len(bench.METHODS)
    for r in got["rows"]:
        assert f"{r['mse']:.4f} (" in text and f"| {r['mae']:.4f} |" in text, r


def test_a_run_of_some_methods_keeps_the_other_rows(load, tmp_path):
    bench, path = load("forecast"), tmp_path / "forecast.json"
    rows = [{"set": "A", "horizon": h, "method": m, "mse": 1.0} for h in (96, 192) for m in ("mean day", "DLinear")]
    path.write_text(json.dumps({"rows": rows, "run": "first"}))
    got = bench.kept([r | {"mse": 2.0} for r in rows if r["method"] == "mean day"], ["mean day"], path)
    assert [(r["horizon"], r["method"], r["mse"]) for r in got["rows"]] == [
        (96, "mean day", 2.0), (96, "DLinear", 1.0), (192, "mean day", 2.0), (192, "DLinear", 1.0),
    ]  # fmt: skip
    assert got["run"] == "first" and list(got["runs"]) == ["mean day"]
    assert set(bench.kept(rows, list(bench.METHODS), path)) == {"rows", "run"}
