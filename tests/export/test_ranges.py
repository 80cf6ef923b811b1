"""`netsuke export --home ranges`: every site's range where it is read and where it is made, or one sentence and no file."""

import json

import pytest

from netsuke.models.llama import LINEARS
from netsuke.models.load import load
from netsuke.models.static_sites import static_sites
from tests.models import hostile
from tests.runtime.static_models import dynamic_artifact, static_artifact
from tests.test_cli import netsuke, refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return static_artifact(tmp_path_factory.mktemp("static"), scheme="w4a8")


def test_both_files_say_what_stands_in_the_model(folder, tmp_path, monkeypatch, capsys):
    code, out, _ = netsuke(
        monkeypatch, capsys, "export", folder, "--home", "ranges", "-o", tmp_path / "encodings", "--json"
    )
    got = json.loads(out)
    assert code == 0 and (got["home"], got["file"]) == ("ranges", str(tmp_path / "encodings"))
    ranges, bitmap = (json.loads((tmp_path / "encodings" / f"{n}.json").read_text()) for n in ("act_ranges", "bitmap"))
    grids = static_sites(load(folder).model)
    made = {m: ends["output"] for m, ends in ranges.items() if "output" in ends}
    modules = {name: name for name in LINEARS} | {"gated": "hidden", "softmax": "probs", "mlp_norm": "mlp_in"}
    for module, site in modules.items():
        for i in range(2):
            assert made[f"blocks.{i}.{module}"] == list(grids[f"blocks.{i}.{site}"].range)
    assert ranges["blocks.0.scores"].keys() == {"input", "input2", "output"}
    assert ranges["blocks.0.o"]["input"] == ranges["blocks.0.mix"]["output"], "quantized once, where it was made"
    assert ranges["blocks.0.mlp_add"]["output"] == list(grids["blocks.1.attn_stream"].range)
    assert "output" not in ranges["blocks.1.mlp_add"], "the final norm reads it as it is"
    named = {tuple(r) for ends in ranges.values() for r in ends.values()}
    assert named == {grid.range for grid in grids.values()}, "no site is left out"
    assert {m: ends.keys() for m, ends in ranges.items()} == {m: e.keys() for m, e in bitmap["activations"].items()}
    assert bitmap["activations"]["blocks.0.down"] == {"input": 8, "output": 16}
    assert bitmap["weights"]["blocks.0.q"] == {"bits": 4, "group": 16} and bitmap["weights"]["embed"]["bits"] == 8
    assert sum(got["bits"].values()) == got["ranges"] == sum(len(ends) for ends in ranges.values())


def test_a_second_export_replaces_the_first(folder, tmp_path, monkeypatch, capsys):
    for _ in range(2):
        code, out, _ = netsuke(monkeypatch, capsys, "export", folder, "--home", "ranges", "-o", tmp_path / "e")
        assert code == 0 and "ranges of 16" in out
    assert {p.name for p in (tmp_path / "e").iterdir()} == {"act_ranges.json", "bitmap.json"}
    monkeypatch.chdir(tmp_path)
    assert netsuke(monkeypatch, capsys, "export", folder, "--home", "ranges")[0] == 0
    assert (tmp_path / "tiny-ranges" / "bitmap.json").is_file()


def test_misuse_is_one_sentence_and_nothing_is_written(folder, tmp_path, monkeypatch, capsys):
    work, mine = tmp_path / "work", tmp_path / "mine"
    work.mkdir(), mine.mkdir()
    (mine / "diary.txt").write_text("mine")
    dense, dynamic = hostile.artifact(tmp_path / "dense"), dynamic_artifact(tmp_path / "dynamic")

    def export(model, *options):
        return netsuke(monkeypatch, capsys, "export", model, "--home", "ranges", "-o", work / "out", *options)

    for model in (dense, dynamic):
        refused(export(model), "--method mobilequant")
    refused(export(tmp_path / "none"), "no such file")
    refused(export(folder, "--bits", 8), "--bits is 8")
    refused(export(folder, "-o", mine), "something else is there")
    refused(export(folder, "-o", tmp_path / "no" / "where"), "parent folder")
    assert not list(work.iterdir()) and [p.name for p in mine.iterdir()] == ["diary.txt"]
