"""`netsuke reproduce`: verdicts, their shape as JSON, exit codes, and the page of all systems."""

import json
import sys
from types import SimpleNamespace

import pytest

from netsuke import reproduce
from netsuke.claims import VERDICTS, Claim, Measured, catalogue, implemented, module_of, run_claim
from netsuke.cli import main
from netsuke.errors import NetsukeError
from netsuke.reproduce import COLUMNS, systems_page


def claim(met: bool | None, **rest) -> Claim:
    return Claim("half the size", "a third", "≤ 0.5x", lambda quick: Measured("0.4x", met, {"ratio": 0.4}), **rest)


def passing_control(quick: bool) -> Measured:
    return Measured("random scores 0.4x", True)


def failing_control(quick: bool) -> Measured:
    return Measured("random scores 2x", False)


@pytest.fixture
def system(monkeypatch):
    """Gives the claims that `reproduce modegpt` finds."""

    def put(*claims: Claim) -> None:
        monkeypatch.setattr("netsuke.claims.module_of", lambda slug: SimpleNamespace(CLAIMS=list(claims)))

    return put


def command(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["netsuke", "reproduce", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


@pytest.mark.parametrize(
    ("one", "verdict"),
    [
        (claim(True), "met"),
        (claim(False), "not met"),
        (claim(None), "cannot be shown"),
        (claim(True, control=failing_control), "met"),
        (claim(True, control=passing_control), "not met"),
        (claim(False, control=failing_control), "not met"),
        (Claim("accuracy of 7B", "95 %", why="no 7B here"), "cannot be shown"),
    ],
)
def test_verdicts(one, verdict):
    row = run_claim(one, quick=True)
    assert row["verdict"] == verdict and row["verdict"] in VERDICTS


def test_a_control_that_passes_says_so_and_one_that_fails_is_kept():
    assert "control passes too: random scores 0.4x" in run_claim(claim(True, control=passing_control), True)["measured"]
    row = run_claim(claim(True, control=failing_control), True)
    assert row["control"] == "random scores 2x" and row["measured"] == "0.4x" and row["values"] == {"ratio": 0.4}


def test_a_claim_that_has_no_measurement_gives_its_reason():
    assert run_claim(Claim("accuracy of 7B", "95 %", why="no 7B here"), True)["measured"] == "no 7B here"


def test_missing_data_is_named_and_nothing_is_measured(monkeypatch, tmp_path):
    def never(quick):
        raise AssertionError("measured without its data")

    one = Claim("a", "b", "c", never, never, ("set/there.txt", "set/absent.txt"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/there.txt").write_text("x")
    monkeypatch.setenv("NETSUKE_DATA", str(tmp_path))
    row = run_claim(one, True)
    assert row["verdict"] == "cannot be shown"
    assert "absent.txt" in row["measured"] and "there.txt" not in row["measured"]
    monkeypatch.delenv("NETSUKE_DATA")
    assert "there.txt" in run_claim(one, True)["measured"]


def test_unknown_and_unbuilt_systems_are_refused_by_name(monkeypatch, capsys):
    code, _, err = command(monkeypatch, capsys, "modegtp")
    assert code == 2 and "modegpt" in err and err.count("\n") == 1
    with pytest.raises(NetsukeError, match="modegpt"):
        module_of("modegtp")
    unbuilt = next(s["slug"] for s in catalogue() if s["slug"] not in implemented())
    with pytest.raises(NetsukeError, match="not built yet"):
        module_of(unbuilt)


def test_exit_code_and_json(system, monkeypatch, capsys, tmp_path):
    system(claim(True), claim(False))
    code, out, _ = command(monkeypatch, capsys, "modegpt", "--quick", "--json", "--results", tmp_path)
    got = json.loads(out)
    assert code == 1 and got["system"] == "modegpt" and got["run"]["quick"]
    assert [c["verdict"] for c in got["claims"]] == ["met", "not met"]
    assert all({"text", "paper", "measured", "bar", "verdict"} <= c.keys() for c in got["claims"])
    assert not list(tmp_path.iterdir()), "a quick run writes nothing"
    system(claim(True), claim(None))
    assert command(monkeypatch, capsys, "modegpt", "--quick", "--json")[0] == 0


def test_the_table_shows_every_column(system, monkeypatch, capsys):
    system(claim(True))
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = command(monkeypatch, capsys, "modegpt", "--quick")
    assert code == 0 and all(c in out for c in COLUMNS) and "0.4x" in out


def test_a_full_run_writes_its_results_and_the_page_shows_them(system, tmp_path):
    page = systems_page(tmp_path)
    assert len(catalogue()) == 50 and all(f"**{s['slug']}**" in page for s in catalogue())
    assert "built, not measured" in page and "0.4x" not in page
    system(claim(True), claim(None), claim(False))
    progress = []
    reproduce("modegpt", results=tmp_path, on_claim=lambda i, n, text: progress.append((i, n)))
    assert progress == [(0, 3), (1, 3), (2, 3)]
    assert [p.name for p in tmp_path.iterdir()] == ["modegpt.json"]
    page = systems_page(tmp_path)
    assert "measured, with misses" in page and "1 of 2" in page and "| half the size | a third | 0.4x |" in page
    system(claim(True))
    reproduce("modegpt", results=tmp_path)
    assert "● measured |" in systems_page(tmp_path)


def test_list_marks_what_is_built(monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, "--list", "--json")
    rows = {r["slug"]: r["built"] for r in json.loads(out)}
    assert code == 0 and len(rows) == 50 and rows["modegpt"]


def test_one_claim_is_measured_again_and_the_rest_stays(system, tmp_path):
    def named(text: str, ratio: str) -> Claim:
        return Claim(text, "", "", lambda quick: Measured(ratio, True))

    system(named("bytes", "1"), named("seconds", "1"))
    reproduce("modegpt", results=tmp_path)
    system(named("bytes", "2"), named("seconds", "2"))
    got = reproduce("modegpt", results=tmp_path, only="SECOND")
    assert [row["measured"] for row in got["claims"]] == ["1", "2"]
    assert json.loads((tmp_path / "modegpt.json").read_text()) == got
    assert "run" in got["claims"][1] and "run" not in got["claims"][0]
    kept = json.loads((tmp_path / "modegpt.json").read_text()) | {"run": {"commit": "old"}}
    (tmp_path / "modegpt.json").write_text(json.dumps(kept))
    assert reproduce("modegpt", results=tmp_path, only="second")["run"] == {"commit": "old"}, (
        "what stays keeps its stamp"
    )
    with pytest.raises(NetsukeError, match="is not there"):
        reproduce("modegpt", results=tmp_path / "empty", only="second")
    with pytest.raises(NetsukeError, match="no claim contains"):
        reproduce("modegpt", only="joules")
