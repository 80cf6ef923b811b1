"""The comparison with other libraries that shrink language models, without them: its command, its sizes, its duels."""

import hashlib
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from netsuke import fit
from netsuke.compress.quantize import Quantize
from netsuke.models.hf import load_folder, theirs
from netsuke.models.llama import half_precision
from netsuke.models.save import save_artifact
from netsuke.models.weights import write_safetensors
from tests.models.hostile import tiny_tokenizer
from tests.tiny import tiny_llama, tiny_task

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A benchmark as it is imported when its folder is the script's."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_missing_interpreter_is_one_sentence(load, monkeypatch, tmp_path):
    bench = load("compressors")
    monkeypatch.setattr(sys, "argv", ["compressors.py", "--peer-python", str(tmp_path / "python")])
    with pytest.raises(SystemExit, match=r"--peer-python .*python: No such file or directory"):
        bench.main()
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(SystemExit, match="it is no Python that runs"):
        bench.find_libraries([str(broken)])


def test_a_library_is_run_by_the_first_interpreter_that_imports_it(load, monkeypatch, tmp_path):
    bench = load("compressors")
    for folder, text in (("broken", "import no_such_module"), ("whole", "")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "somewhere.py").write_text(text)
        python = tmp_path / f"python-{folder}"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / folder} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
    monkeypatch.setattr(bench, "LIBRARIES", {"some-where": "somewhere", "none": "no_such_library"})
    broken, whole = str(tmp_path / "python-broken"), str(tmp_path / "python-whole")
    found, missing = bench.find_libraries([sys.executable, broken, whole])
    assert found == {"some-where": whole} and missing == {
        "none": "ModuleNotFoundError: No module named 'no_such_library'"
    }
    _, missing = bench.find_libraries([broken])
    assert missing["some-where"] == "ModuleNotFoundError: No module named 'no_such_module'"


@pytest.mark.parametrize("words", [["--only", "torchao"], ["--model", "wide"]])
def test_a_part_of_the_rows_is_not_written(load, monkeypatch, capsys, words):
    bench = load("compressors")
    monkeypatch.setattr(sys, "argv", ["compressors.py", "--json", *words])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "leave out --only and --model" in capsys.readouterr().err


def test_a_peer_that_fails_is_a_row_with_its_sentence(load, tmp_path):
    bench = load("compressors")
    fails = tmp_path / "python"
    fails.write_text("#!/bin/sh\necho ImportError: no such kernel >&2\nexit 1\n")
    fails.chmod(0o755)
    rows = bench.ask_peer("torchao", str(fails), {}, tmp_path)
    assert rows == [{"setting": "its process", "left": "", "error": "ImportError: no such kernel"}]


def test_the_folder_for_peers_holds_the_same_model(load, tmp_path):
    sizes, model = load("compressors_sizes"), half_precision(tiny_llama(eos=(0,), bos=0))
    write_safetensors(tmp_path / "model.safetensors", {theirs(n): t for n, t in model.state_dict().items()})
    (tmp_path / "config.json").write_text(json.dumps(sizes.hf_config(model.cfg)))
    again, _ = load_folder(tmp_path)
    assert again.cfg == model.cfg
    ids = torch.arange(60).view(2, 30)
    assert torch.equal(again(ids), model(ids))


def test_bytes_are_told_apart_under_both_sides_names(load, tmp_path):
    sizes, model = load("compressors_sizes"), half_precision(tiny_llama())
    maps = sum(2 * m.outs * m.ins for n, m in model.linears().items() if n != "embed")
    table = 2 * model.cfg.vocab * model.cfg.width
    file = tmp_path / "weights.safetensors"
    for name in (str, theirs):
        write_safetensors(file, {name(n): t for n, t in model.state_dict().items()})
        found = sizes.weight_bytes(file)
        assert (found["maps"], found["embedding"], found["file"]) == (maps, table, file.stat().st_size)
        assert "masked" not in found
    sparse = {
        n: torch.where(torch.arange(t.numel()).view(t.shape) % 2 == 0, t, 0) for n, t in model.state_dict().items()
    }
    write_safetensors(file, {theirs(n): t for n, t in sparse.items()})
    assert sizes.weight_bytes(file)["masked"] == pytest.approx(
        maps / 2 + maps / 16, rel=1e-3
    )  # a bit a place, half the values
    packed = Quantize(4, group=16, solver="rtn", embed_bits=16).apply(model.float(), tiny_task())
    write_safetensors(file, packed.state_dict())
    assert sizes.weight_bytes(file)["maps"] == sum(m.bytes() for n, m in packed.linears().items() if n != "embed")


def test_a_carving_serves_slightly_larger_folders_and_all_when_it_loses_nothing(load):
    serving = load("compressors").serving
    lossy, clean = ({"limit": n, "table": None, "excess": e} for n, e in ((1000, 0.1), (2000, 0.0)))
    assert serving([lossy, clean], 999, None) is None
    assert serving([lossy, clean], 1050, None) is lossy
    assert serving([lossy], 1051, None) is None
    assert serving([lossy, clean], 9000, None) is clean
    assert serving([lossy, clean], 9000, 16) is None
    assert serving([{"limit": 1000, "table": None, "error": "no"}], 9000, None) is None


def test_a_duel_is_won_by_more_than_its_noise(load):
    bench, base = load("compressors"), torch.full((32,), 2.0, dtype=torch.float64)
    noise = 0.02 * torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    peer = {"peer": "p", "setting": "s", "losses": base + 0.1, "excess": 0.1, "all": 100, "maps": 50}

    def against(excess: float) -> dict:
        carved = {"table": None, "limit": 99, "losses": base + excess + noise, "excess": excess, "all": 98, "maps": 40}
        return bench.duel(peer, carved)

    assert [against(e)["verdict"] for e in (0.05, 0.1, 0.2)] == ["better", "even", "worse"]
    assert against(0.05)["ratio"] == pytest.approx(0.5)
    assert bench.duel(peer | {"excess": 1e-4}, {"table": None, "limit": 9, "error": "no"})["error"] == "no"
    found = bench.summary([{"duels": [against(0.05), against(0.2)]}])["free"]
    assert found == {"better": 1, "even": 0, "worse": 1, "ratios": 2, "median_ratio": pytest.approx(1.25)}


def test_carvings_of_many_sizes_are_those_of_fit(load, tmp_path):
    sizes = load("compressors_sizes")
    model = tiny_llama(vocab=300, eos=(0,), bos=0)
    save_artifact(tmp_path / "model.netsuke", model, tiny_tokenizer(), {}, {})
    text = tmp_path / "words.txt"
    text.write_text("".join(f"line {i}: the river was {i * 7919 % 1000} feet wide\n" for i in range(300)))
    one = fit(
        str(tmp_path / "model.netsuke"),
        sizes.CARD,
        storage="80000B",
        data=str(text),
        context=32,
        out=str(tmp_path / "one"),
    )
    many = sizes.Sizes(str(tmp_path / "model.netsuke"), text, tmp_path / "many.netsuke", context=32)
    assert many.at(30_000_000)["limit"] == 30_000_000  # a size before it leaves no trace
    found = many.at(80_000)
    assert found["all"] == one["after"]["bytes"] <= 80_000
    files = (tmp_path / f"{name}.netsuke/weights.safetensors" for name in ("one", "many"))
    assert len({hashlib.sha256(f.read_bytes()).hexdigest() for f in files}) == 1
    kept = many.at(80_000, table=16)
    assert kept["bits"]["embed"] == [16] and kept["embedding"] == 2 * 300 * 48
    assert "storage limit binds" in many.at(2_000)["error"]


def test_the_page_shows_the_result_file(load):
    pages = load("pages")
    assert f"<!-- compressors -->\n{pages.compressors()}\n" in (BENCHMARKS.parent / "docs/measurements.md").read_text()
