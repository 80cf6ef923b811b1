"""`netsuke control`: a folder from a model file, and sentences for what does not fit."""

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from netsuke.apps.control import command, simulate
from netsuke.errors import NetsukeError
from tests.apps.control.cases import path
from tests.apps.control.test_network import graph_of

CONFIG = """
[model]
controls = 1
outputs = 3
ranges = { control = 0.5, outputs = [1.0, 1.0, 1.0] }
[controller]
q = [1.0, 1.0, 1.0]
change = [1e-3]
last = 3
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A configuration, and a reader that gives a small graph for any file."""
    (tmp_path / "arm.toml").write_text(CONFIG)
    monkeypatch.setattr(command, "_read", lambda where: graph_of())
    np.save(tmp_path / "path.npy", np.repeat(path(12)[:, :1], 3, axis=1))
    return tmp_path


@pytest.mark.skipif(simulate.compiler() is None, reason="no C compiler")
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_the_command_writes_a_folder_that_passes_its_test(files, weights):
    import subprocess

    app = typer.Typer()
    command.register(app)
    given = [str(files / "m.h5"), "--config", str(files / "arm.toml"), "-o", str(files / "fw"), "--weights", weights]
    done = CliRunner().invoke(app, [*given, "--path", str(files / "path.npy"), "--json"], catch_exceptions=False)
    got = json.loads(done.stdout)
    assert got["weights"] < 300 and got["workspace"] > 100
    assert (got["weights"] < 160) == (weights == "int8")
    subprocess.run(["make", "-s", "-C", files / "fw", "test"], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("outputs = 3\n", "", "outputs"), ("last = 3", "last = 'x'", "last"), ("last = 3", "laste = 3", "laste"),
        ("controls = 1", "controls = 2", "maps 4 inputs"), ("change = [1e-3]", "change = [1e-3, 1e-3]", "2 of changes"),
        ("[model]", "[model", "line"), ("last = 3", "starts = 0", "starts is 0"),
        ("last = 3", "correction = nan", "correction is nan"), ("last = 3", "centre = inf", "centre is inf"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_named_and_nothing_is_written(files, old, new, named):
    (files / "arm.toml").write_text(CONFIG.replace(old, new))
    with pytest.raises(NetsukeError, match=named):
        command.control(files / "m.h5", files / "arm.toml", files / "fw")
    assert not (files / "fw").exists()


def test_other_inputs_are_refused(files):
    good = (files / "m.h5", files / "arm.toml", files / "fw")
    with pytest.raises(NetsukeError, match="'q15'"):
        command.control(*good, weights="q15")
    (files / "arm.toml").write_text(CONFIG.replace("ranges", "#ranges"))
    with pytest.raises(NetsukeError, match="ranges"):
        command.control(*good, weights="int8")
    np.save(files / "bad.npy", np.full((4, 3), np.nan))
    with pytest.raises(NetsukeError, match="finite"):
        command.control(*good, path=files / "bad.npy")
    (files / "bad.npy").write_bytes(b"\x93NUMPY junk")
    with pytest.raises(NetsukeError, match="read the path"):
        command.control(*good, path=files / "bad.npy")
    with pytest.raises(NetsukeError, match="nowhere"):
        command.control(good[0], files / "nowhere.toml", good[2])
    assert not (files / "fw").exists()


@pytest.mark.parametrize("new", ["control = 0", "control = nan", "sensor = -1.0, control = 0.5"])
def test_ranges_that_are_no_magnitudes_are_refused(files, new):
    (files / "arm.toml").write_text(CONFIG.replace("control = 0.5", new))
    with pytest.raises(NetsukeError, match=f"range of {new.split()[0]}"):
        command.control(files / "m.h5", files / "arm.toml", files / "fw", weights="int8")
    assert not (files / "fw").exists()


def test_a_board_is_refused_before_anything_is_written(files, monkeypatch):
    given = files / "m.h5", files / "arm.toml", files / "fw"
    with pytest.raises(NetsukeError, match="m4"):
        command.control(*given, emulate="m5")
    monkeypatch.setattr("netsuke.devices.board.shutil.which", lambda tool: None)
    with pytest.raises(NetsukeError, match="not installed"):
        command.control(*given, emulate="m4")
    assert not (files / "fw").exists()


def test_unknown_model_files_are_refused(tmp_path):
    with pytest.raises(NetsukeError, match=r"\.pt is not known"):
        command._read(tmp_path / "m.pt")
