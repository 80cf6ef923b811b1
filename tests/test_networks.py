"""The verbs on small networks, from the command line: what works, and what a user may do wrong."""

import json
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from netsuke.devices.board import missing_tools
from netsuke.graph import Interpreter, QGraph, Tensor
from netsuke.graph.read import load_graph
from netsuke.graph.store import save_graph
from tests.graph.small import images, residual_network
from tests.graph.tflite_writer import small, write
from tests.test_cli import netsuke, refused

BOARD = pytest.mark.skipif(bool(missing_tools()), reason=f"needs {missing_tools()}")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A network of 4 classes, its own answers on 240 images as data, and some files that are wrong."""
    path = tmp_path_factory.mktemp("networks")
    graph = residual_network()
    save_graph(path / "net.netsuke", graph, {}, {})
    x = images(240, seed=3)
    y = Interpreter(graph).run(x)[0].argmax(1)
    np.savez(path / "data.npz", x=x, y=y)
    (path / "plan.json").write_text('{"n_bias": 4, "weights": {"7": 1.0}}')
    np.save(path / "one.npy", x[:1])
    np.save(path / "reals.npy", graph.tensors[graph.inputs[0]].real(x[:2]).astype(np.float32))
    return path


def answer(monkeypatch, capsys, *args) -> dict:
    code, out, err = netsuke(monkeypatch, capsys, *args, "--json")
    assert code in (0, 1), err
    return json.loads(out)


def test_run_gives_what_the_reference_gives(place, monkeypatch, capsys):
    graph = load_graph(place / "net.netsuke")
    want = Interpreter(graph).run(np.load(place / "one.npy"))[0]
    for backend in ("native", "reference"):
        got = answer(
            monkeypatch, capsys, "run", place / "net.netsuke", "--input", place / "one.npy", "--backend", backend
        )
        assert got["rows"][0]["top"][0]["class"] == int(want.argmax())
    got = answer(
        monkeypatch, capsys, "run", place / "net.netsuke", "--input", place / "reals.npy", "-o", place / "y.npy"
    )
    assert len(got["rows"]) == 2, "real numbers are quantized"
    assert np.array_equal(np.load(place / "y.npy")[:1], want)


def test_a_picture_is_cut_and_scaled(place, monkeypatch, capsys):
    from PIL import Image

    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[:, 15:45] = 255  # white in the middle square, black beside it
    Image.fromarray(pixels).save(place / "white.png")
    got = answer(
        monkeypatch, capsys, "run", place / "net.netsuke", "--input", place / "white.png", "-o", place / "w.npy"
    )
    want = Interpreter(load_graph(place / "net.netsuke")).run(np.full((1, 12, 12, 3), 127, np.int8))[0]
    assert got["rows"] and np.array_equal(np.load(place / "w.npy"), want)


def test_plan_says_what_is_linked(place, monkeypatch, capsys):
    got = answer(monkeypatch, capsys, "plan", place / "net.netsuke", "--device", "nrf52840")
    assert got["fits"] and got["ram"]["total"] >= got["ram"]["arena"] > 0
    out = answer(monkeypatch, capsys, "export", place / "net.netsuke", "--home", "c", "-o", place / "fw")
    assert out["arena"] == got["ram"]["arena"], "planned before, linked after"
    rows = got["largest"]
    assert rows == sorted(rows, key=lambda r: -r["bytes"]) and sum(r["bytes"] for r in rows) <= got["arena"]
    shutil.rmtree(place / "fw")


def test_plan_refuses_before_anything_is_built(place, monkeypatch, capsys):
    card = Path("src/netsuke/devices/cards/nrf52840.toml").read_text()
    small_card = place / "tiny.toml"
    small_card.write_text(card.replace("ram = 229_376", "ram = 2_000").replace('"nrf52840"', '"tiny"'))
    code, out, _ = netsuke(monkeypatch, capsys, "plan", place / "net.netsuke", "--device", small_card, "--json")
    got = json.loads(out)
    assert code == 1 and got["binding"] == ["ram"] and got["remedy"]


def test_plan_of_training(place, monkeypatch, capsys):
    got = answer(
        monkeypatch, capsys, "plan", place / "net.netsuke", "--device", "nrf52840", "--train", place / "plan.json"
    )
    step = got["training"]
    assert (
        step["arena"] > got["arena"]
        and step["variables"] > 0
        and step["total"] == step["arena"] + step["variables"] + step["stack"]
    )
    _, text, _ = netsuke(
        monkeypatch, capsys, "plan", place / "net.netsuke", "--device", "nrf52840", "--train", place / "plan.json"
    )
    text = " ".join(text.split())  # a terminal's width wraps it
    assert "of a training step" in text and f"{step['total']:,} bytes of RAM" in text


def test_fit_meets_a_budget_and_proves_it(place, monkeypatch, capsys):
    before = answer(monkeypatch, capsys, "plan", place / "net.netsuke", "--device", "nrf52840")
    storage = before["storage"]["bytes"] - before["flash"]["parts"]["weights"] // 4
    got = answer(
        monkeypatch, capsys, "fit", place / "net.netsuke", "--device", "nrf52840", "--storage", storage,
        "--data", place / "data.npz", "-o", place / "carved",
    )  # fmt: skip
    assert got["after"]["bytes"] <= storage < got["before"]["bytes"]
    assert got["before"]["quality"]["test"] == 1.0, "the answers are the network's own"
    assert got["after"]["quality"]["test"] > 0.5
    assert all(c["ok"] for c in got["checks"])
    assert any(c["bits"] and (c["cut"] or 4 in c["bits"].values()) for c in got["choices"])
    assert load_graph(place / "carved.netsuke").weight_bytes() <= storage
    assert (place / "carved.report.html").read_text().count("<svg") >= 1
    again = answer(
        monkeypatch, capsys, "fit", place / "net.netsuke", "--device", "nrf52840", "--storage", storage,
        "--data", place / "data.npz", "-o", place / "again",
    )  # fmt: skip
    assert again["choices"] == got["choices"]
    for name in ("manifest.json", "weights.safetensors"):
        assert (place / "carved.netsuke" / name).read_bytes() == (place / "again.netsuke" / name).read_bytes()


def test_fit_within_less_ram_narrows_what_is_live_at_the_peak(place, monkeypatch, capsys):
    before = answer(monkeypatch, capsys, "plan", place / "net.netsuke", "--device", "nrf52840")
    got = answer(
        monkeypatch, capsys, "fit", place / "net.netsuke", "--device", "nrf52840", "--ram", before["ram"]["total"] - 300,
        "--data", place / "data.npz", "-o", place / "lean",
    )  # fmt: skip
    assert got["after"]["peak_ram"] <= before["ram"]["total"] - 300
    plan = answer(monkeypatch, capsys, "plan", place / "lean.netsuke", "--device", "nrf52840")
    assert plan["ram"]["total"] == got["after"]["peak_ram"]


def test_a_loss_alone_asks_for_the_least_flash_within_it(place, monkeypatch, capsys):
    sizes = []
    for allowed in ("0.1%", "25%"):
        got = answer(
            monkeypatch, capsys, "fit", place / "net.netsuke", "--device", "nrf52840", "--max-loss", allowed,
            "--data", place / "data.npz", "-o", place / "least",
        )  # fmt: skip
        quality = [got[x]["quality"]["validation"] for x in ("before", "after")]
        assert 1 - quality[1] / quality[0] <= float(allowed[:-1]) / 100
        sizes.append(got["after"]["bytes"])
    assert sizes[1] < sizes[0] <= got["before"]["bytes"]


def test_fit_takes_a_smaller_picture_where_time_is_short(place, monkeypatch, capsys):
    from PIL import Image

    graph = residual_network(side=64)
    save_graph(place / "big.netsuke", graph, {}, {})
    x = images(80, 64, seed=5)
    for k, (row, y) in enumerate(zip(x, Interpreter(graph).run(x)[0].argmax(1))):
        folder = place / "photos" / "abcd"[y]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((row.astype(int) + 128).astype(np.uint8)).save(folder / f"{k}.png")
    for name in "abcd":
        (place / "photos" / name).mkdir(exist_ok=True)
    before = answer(monkeypatch, capsys, "plan", place / "big.netsuke", "--device", "nrf52840")["latency"]["seconds"]
    got = answer(
        monkeypatch, capsys, "fit", place / "big.netsuke", "--device", "nrf52840", "--latency", f"{before * 330:.3f}ms",
        "--data", place / "photos", "-o", place / "quick",
    )  # fmt: skip
    assert got["after"]["latency"]["per_run"] <= before * 0.331 and got["side"] < 64
    assert load_graph(place / "quick.netsuke").tensors[0].shape == (1, got["side"], got["side"], 3)


def test_fit_into_nothing_says_which_limit_binds(place, monkeypatch, capsys):
    code, _, err = netsuke(
        monkeypatch, capsys, "fit", place / "net.netsuke", "--device", "nrf52840", "--storage", "100B",
        "--data", place / "data.npz", "-o", place / "none",
    )  # fmt: skip
    assert code == 1 and "storage limit binds" in err and not (place / "none.netsuke").exists()


def test_train_adapts_and_keeps_within_memory(place, monkeypatch, capsys):
    x, y = images(300, seed=9), np.arange(300) % 2
    x[y == 1] = np.clip(x[y == 1].astype(int) + 50, -128, 127)  # every second one is brighter
    np.savez(place / "two.npz", x=x, y=y)
    got = answer(
        monkeypatch, capsys, "train", place / "net.netsuke", "--data", place / "two.npz", "--sram", "64KB", "--epochs", 6,
        "--plan", place / "plan.json", "-o", place / "adapted",
    )  # fmt: skip
    assert got["memory"]["total"] <= 64_000 and got["after"] > got["floor"] + 0.15
    adapted, start = load_graph(place / "adapted.netsuke"), load_graph(place / "net.netsuke")
    changed = [
        t.name for t, s in zip(adapted.tensors, start.tensors) if t.constant and not np.array_equal(t.data, s.data)
    ]
    assert changed and all(name.startswith(("b", "c")) for name in changed), "only layers of the plan change"


@BOARD
def test_a_network_and_its_folder_run_on_a_board(place, monkeypatch, capsys):
    answer(monkeypatch, capsys, "export", place / "net.netsuke", "--home", "c", "-o", place / "board", "--name", "tiny")
    got = answer(monkeypatch, capsys, "run", place / "board", "--emulate", "m4", "--input", place / "one.npy")
    want = Interpreter(load_graph(place / "net.netsuke")).run(np.load(place / "one.npy"))[0]
    assert got["passed"] and got["instructions"] > 1000
    assert got["rows"][0]["top"][0]["class"] == int(want.argmax())
    assert (
        subprocess.run(["make", "-s", "-C", place / "board", "test"], capture_output=True, check=False).returncode == 0
    )


def broken(kind: str, place: Path) -> Path:
    """A model file or artifact that is wrong in one way."""
    out = place / f"bad-{kind}"
    tensors, ops = small()
    if kind == "garbage.tflite":
        out.write_bytes(b"\x1c\0\0\0TFL3" + bytes(range(256)))
    elif kind == "empty.tflite":
        out.write_bytes(b"")
    elif kind == "truncated.tflite":
        data = write(tensors, ops, (0,), (6,))
        out.write_bytes(data[: len(data) // 2])
    elif kind == "operator.tflite":
        ops[1] = replace(ops[1], kind="custom Foo")
        out.write_bytes(write(tensors, ops, (0,), (6,)))
    elif kind == "dynamic.tflite":
        tensors[0] = replace(tensors[0], shape=(1, 0, 6, 2), signature=(-1, -1, 6, 2))
        out.write_bytes(write(tensors, ops, (0,), (6,)))
    elif kind == "nan.tflite":
        tensors[1] = replace(tensors[1], scale=[0.01, float("nan"), 0.015, 0.005])
        out.write_bytes(write(tensors, ops, (0,), (6,)))
    elif kind == "text.onnx":
        out.write_text("not a protobuf")
    elif kind == "text.h5":
        out.write_text("not HDF5")
    elif kind == "text.npz":
        out.write_text("not a zip")
    elif kind == "other.npz":
        np.savez(out, a=np.zeros(3))
    elif kind == "pickle.pkl":
        out.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    elif kind == "nan.netsuke":
        g = residual_network()
        save_graph(out, g, {}, {})
        text = json.loads((out / "manifest.json").read_text())
        text["graph"]["tensors"][3]["shape"] = [1, 6, 6, 9]
        (out / "manifest.json").write_text(json.dumps(text))
    else:
        raise AssertionError(kind)
    return out


FILES = {
    "garbage.tflite": "damaged", "empty.tflite": "empty.tflite", "truncated.tflite": "truncated", "operator.tflite": "Foo",
    "dynamic.tflite": "image", "nan.tflite": "conv.weight", "text.onnx": "onnx", "text.h5": "h5", "text.npz": "npz",
    "other.npz": "graph_json", "pickle.pkl": "pickle", "nan.netsuke": "first",
}  # fmt: skip


@pytest.mark.parametrize("verb", ["plan", "export"])
@pytest.mark.parametrize("kind", sorted(FILES))
def test_broken_files_are_one_sentence(kind, verb, place, monkeypatch, capsys):
    path = broken(kind, place)
    extra = ["--home", "c", "-o", place / "nothing"] if verb == "export" else ["--device", "stm32f4"]
    refused(netsuke(monkeypatch, capsys, verb, path, *extra), FILES[kind])
    assert not (place / "nothing").exists()
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def wrong(place: Path) -> dict[str, tuple[list, str]]:
    """Arguments and what their sentence names."""
    net, data = place / "net.netsuke", place / "data.npz"
    np.save(place / "shape.npy", np.zeros((1, 5, 5, 3), np.int8))
    np.save(place / "wide.npy", np.zeros((1, 12, 12, 3), np.int64))
    np.save(place / "nan.npy", np.full((1, 12, 12, 3), np.nan, np.float32))
    np.save(place / "nan4.npy", np.full((1, 4), np.nan, np.float32))
    (place / "text.npy").write_text("no array")
    (place / "text.png").write_text("no picture")
    np.savez(place / "few.npz", x=images(8), y=np.zeros(8, int))
    np.savez(place / "classes.npz", x=images(80), y=np.full(80, 7))
    np.savez(place / "length.npz", x=images(80), y=np.zeros(79, int))
    np.savez(place / "nox.npz", z=images(80))
    with zipfile.ZipFile(place / "empty.zip", "w"):
        pass
    (place / "plan9.json").write_text('{"n_bias": 2, "weights": {"3": 1.0}}')
    (place / "planx.json").write_text("[]")
    (place / "diary").mkdir(exist_ok=True)
    (place / "diary" / "thesis.txt").write_text("mine")
    g = QGraph("float")
    x = g.add(Tensor("x", (1, 4), "float32"))
    g.inputs = (x,)
    w = g.constant("w", np.ones((2, 4), np.float32))
    g.outputs = (g.append("dense", (x, w), Tensor("y", (1, 2), "float32")),)
    save_graph(place / "float.netsuke", g, {}, {})
    fit = ["fit", net, "--device", "nrf52840", "-o", place / "nothing"]
    train = ["train", net, "-o", place / "nothing"]
    return {
        "no such model": (["plan", place / "absent.tflite"], "absent.tflite"),
        "no input": (["run", net], "--input"),
        "absent input": (["run", net, "--input", place / "absent.npy"], "absent.npy"),
        "shape": (["run", net, "--input", place / "shape.npy"], "(1, 12, 12, 3)"),
        "type": (["run", net, "--input", place / "wide.npy"], "int64"),
        "nan": (["run", net, "--input", place / "nan.npy"], "NaN"),
        "no array": (["run", net, "--input", place / "text.npy"], "text.npy"),
        "no picture": (["run", net, "--input", place / "text.png"], "text.png"),
        "backend": (["run", net, "--input", place / "one.npy", "--backend", "gpu"], "gpu"),
        "text to a network": (["run", "pycode", "--input", place / "one.npy"], "--prompt"),
        "board": (["run", net, "--input", place / "one.npy", "--emulate", "m99"], "m99"),
        "fit without data": (fit, "--data"),
        "fit with few data": ([*fit, "--data", place / "few.npz"], "8 samples"),
        "fit with other classes": ([*fit, "--data", place / "classes.npz"], "classes 0 to 3"),
        "fit with unequal data": ([*fit, "--data", place / "length.npz"], "79"),
        "fit without x": ([*fit, "--data", place / "nox.npz"], "x"),
        "fit with an empty archive": ([*fit, "--data", place / "empty.zip"], "none"),
        "fit for an energy without clock": (
            ["fit", net, "--device", "pi4", "--energy", "1nJ", "--data", data, "-o", place / "nothing"], "clock",
        ),
        "nan into a float network": (["run", place / "float.netsuke", "--input", place / "nan4.npy"], "NaN"),
        "reference on a board": (["run", net, "--emulate", "m4", "--backend", "reference"], "reference"),
        "fit for a device without clock": (
            ["fit", net, "--device", "pi4", "--latency", "5ms", "--data", data, "-o", place / "nothing"], "clock",
        ),
        "train elsewhere": ([*train, "--data", data, "--on", "moon"], "moon"),
        "train a float network": (["train", place / "float.netsuke", "--data", data], "float"),
        "train by a plan outside": ([*train, "--data", data, "--plan", place / "plan9.json"], "layer 3"),
        "train by no plan": ([*train, "--data", data, "--plan", place / "planx.json"], "planx.json"),
        "train with no epochs": ([*train, "--data", data, "--epochs", 0], "epochs"),
        "export over something else": (["export", net, "--home", "c", "-o", place / "diary"], "diary"),
        "export under a bad name": (["export", net, "--home", "c", "-o", place / "n", "--name", "9 lives"], "9 lives"),
        "export text as C": (["export", "pycode", "--home", "c", "-o", place / "n"], "gguf"),
        "a network as GGUF": (["export", net, "--home", "gguf", "-o", place / "n.gguf"], "small network"),
        "emulate no folder of C": (["run", place / "diary", "--emulate", "m4"], "size.json"),
    }  # fmt: skip


MISTAKES = (
    "fit for an energy without clock", "nan into a float network", "reference on a board",
    "no such model", "no input", "absent input", "shape", "type", "nan", "no array", "no picture", "backend",
    "text to a network", "board", "fit without data", "fit with few data", "fit with other classes", "fit with unequal data",
    "fit without x", "fit with an empty archive", "fit for a device without clock", "train elsewhere", "train a float network",
    "train by a plan outside", "train by no plan", "train with no epochs", "export over something else",
    "export under a bad name", "export text as C", "a network as GGUF", "emulate no folder of C",
)  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(mistake, place, monkeypatch, capsys):
    args, culprit = wrong(place)[mistake]
    if mistake == "board" and missing_tools():
        pytest.skip(f"needs {missing_tools()}")
    refused(netsuke(monkeypatch, capsys, *args), culprit)
    assert not (place / "nothing").exists() and not (place / "nothing.netsuke").exists()


def test_a_step_that_does_not_fit_names_the_largest_tensors(place, monkeypatch, capsys):
    code, _, err = netsuke(
        monkeypatch, capsys, "train", place / "net.netsuke", "--data", place / "data.npz", "--sram", "3KB",
        "--plan", place / "plan.json", "-o", place / "nothing",
    )  # fmt: skip
    assert code == 1 and "largest at the peak" in err and not (place / "nothing.netsuke").exists()
