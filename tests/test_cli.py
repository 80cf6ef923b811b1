"""The command line as a user meets it: every mistake is one sentence and exit code 2, and nothing is written."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from netsuke import VERBS
from netsuke.cli import main
from tests.models import hostile


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """Enough plain text for a byte-level tokenizer and windows of 16 tokens."""
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("\n".join(f"line {i}: the river was {i * 7919 % 1000} feet wide" for i in range(400)))
    return path


def netsuke(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `netsuke …` in this process."""
    monkeypatch.setattr(sys, "argv", ["netsuke", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def refused(result: tuple[int, str, str], culprit: str) -> None:
    code, _, err = result
    assert code == 2, err
    assert err.startswith("netsuke: ")
    assert err.count("\n") == 1, "one sentence on one line"
    assert "Traceback" not in err
    assert culprit.lower() in err.lower(), err


@pytest.mark.parametrize("name", sorted(hostile.CASES))
def test_hostile_models_are_refused_by_fit(name, tmp_path, words, monkeypatch, capsys):
    case, work = hostile.CASES[name], tmp_path / "work"
    work.mkdir()
    (tmp_path / "model").mkdir()
    model = case.build(tmp_path / "model")
    monkeypatch.chdir(work)
    refused(
        netsuke(monkeypatch, capsys, "fit", model, "--device", "pi4", "--data", words, "-o", "a.netsuke"), case.culprit
    )
    assert not list(work.iterdir())


OPTIONS = [
    (["--storage", "0"], "--storage"), (["--storage", "-4MB"], "--storage"), (["--storage", "12 parsecs"], "parsecs"),
    (["--ram", "nan"], "--ram"), (["--ram", ""], "--ram"), (["--ram", "900GB"], "--ram"), (["--latency", "0ms"], "--latency"),
    (["--latency", "fast"], "--latency"), (["--max-loss", "300"], "--max-loss"), (["--max-loss", "-2%"], "--max-loss"),
    (["--energy", "inf"], "--energy"), (["--device", "pi44"], "pi4"), (["--device", "missing.toml"], "missing.toml"),
    (["--context", "0"], "context"), (["--context", "100000"], "context"), (["--data", "no-such.txt"], "no-such.txt"),
    (["--data", "empty.txt"], "no text"), (["--data", "latin.txt"], "UTF-8"), (["--data", "short.txt"], "tokens"),
    (["--data", "emptyfolder"], "no text"), (["-o", "occupied.netsuke"], "occupied"), (["-o", "nowhere/a.netsuke"], "nowhere"),
    (["--shrink-a-lot"], "--shrink-a-lot"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "culprit"), OPTIONS, ids=[" ".join(o) for o, _ in OPTIONS])
def test_wrong_options_are_refused(options, culprit, tmp_path, words, monkeypatch, capsys):
    model = hostile.hf_folder(tmp_path / "model")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (work / "empty.txt").write_text(" \n")
    (work / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 200)
    (work / "short.txt").write_text("hello")
    (work / "emptyfolder").mkdir()
    (work / "occupied.netsuke").mkdir()
    (work / "occupied.netsuke" / "diary.txt").write_text("mine")
    before = sorted(p.as_posix() for p in work.rglob("*"))
    given = {"--device": "pi4", "--data": str(words), "-o": "a.netsuke"}
    given.update(zip(options[::2], options[1::2]))
    args = [a for pair in given.items() for a in pair] if len(options) % 2 == 0 else [*options, "--data", str(words)]
    refused(netsuke(monkeypatch, capsys, "fit", model, *args), culprit)
    assert sorted(p.as_posix() for p in work.rglob("*")) == before


def test_read_only_folder_is_refused_before_any_work(tmp_path, words, monkeypatch, capsys):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    model = hostile.hf_folder(tmp_path / "model")
    refused(
        netsuke(monkeypatch, capsys, "fit", model, "--data", words, "--device", "pi4", "-o", folder / "a.netsuke"),
        "read-only",
    )


OTHERS = [
    (["run", "no-such-model"], "no-such-model"), (["run", "MODEL", "--temperature", "-1"], "temperature"),
    (["run", "MODEL", "--top-p", "0"], "top-p"), (["run", "MODEL", "--tokens", "0"], "tokens"),
    (["run", "MODEL", "--prompt", "x" * 200], "context"), (["plan", "no-such-model"], "no-such-model"),
    (["plan", "MODEL", "--device", "toaster"], "toaster"), (["devices", "show", "toaster"], "toaster"),
    (["reproduce", "modegtp"], "modegpt"), (["reproduce"], "no system"), (["reproduce", "goclick"], "not built"),
    (["compress", "MODEL", "--method", "quantise", "-o", "a.netsuke"], "quantise"),
    (["compress", "MODEL", "--method", "quantize:bit=4", "-o", "a.netsuke"], "bit"),
    (["compress", "MODEL", "--method", "quantize:bits=5", "-o", "a.netsuke", "--data", "WORDS"], "bits"),
    (["frobnicate"], "frobnicate"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "culprit"), OTHERS, ids=[" ".join(a)[:60] for a, _ in OTHERS])
def test_other_verbs_refuse_too(args, culprit, tmp_path, words, monkeypatch, capsys):
    model = hostile.hf_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    args = [str(model) if a == "MODEL" else str(words) if a == "WORDS" else a for a in args]
    refused(netsuke(monkeypatch, capsys, *args), culprit)


def test_json_errors_are_json(tmp_path, monkeypatch, capsys):
    code, out, _ = netsuke(monkeypatch, capsys, "plan", tmp_path / "nothing", "--json")
    assert code == 2
    assert json.loads(out)["found"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_is_a_function(verb, monkeypatch, capsys):
    import netsuke as package

    code, out, _ = netsuke(monkeypatch, capsys, verb, "--help")
    assert code == 0
    assert "--json" in out
    assert callable(getattr(package, verb))


def test_help_is_quick_beside_importing_torch():
    """Median of five each, alternating: the ratio, not the time, is what is held."""
    commands = ([sys.executable, "-m", "netsuke", "--help"], [sys.executable, "-c", "import torch"])
    times: list[list[float]] = [[], []]
    for _ in range(5):
        for kept, command in zip(times, commands):
            begin = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, "COLUMNS": "100"})
            kept.append(time.perf_counter() - begin)
    ours, torch = (sorted(t)[2] for t in times)
    assert ours <= 0.5 * torch


def test_run_prints_text_and_timings(tmp_path, monkeypatch, capsys):
    model = hostile.artifact(tmp_path)
    code, out, _ = netsuke(monkeypatch, capsys, "run", model, "--prompt", "ab", "--tokens", "5", "--json")
    got = json.loads(out)
    assert code == 0
    assert got["prompt_tokens"] == 3  # the start token, then two bytes
    assert 1 <= got["new_tokens"] <= 5


def test_sampling_repeats_under_a_seed(tmp_path, monkeypatch, capsys):
    model = hostile.artifact(tmp_path)
    texts = [
        json.loads(netsuke(monkeypatch, capsys, "run", model, "--temperature", "1", "--seed", seed, "--json")[1])[
            "text"
        ]
        for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]
