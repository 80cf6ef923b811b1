"""The C home: what it writes compiles without a warning anywhere, tests itself, and gives the reference's bits."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from netsuke.devices.board import EmulatedBoard, missing_tools
from netsuke.errors import NetsukeError
from netsuke.export.c import facts_of, write_c
from netsuke.export.c.emulate import run_emulated
from netsuke.export.c.golden import drawn
from netsuke.graph import Interpreter, QGraph, Tensor
from netsuke.graph.differentiate import ReferenceTraining, training_graph
from netsuke.graph.update_plan import UpdatePlan
from tests.graph.small import images, residual_network

needs_cc = pytest.mark.skipif(shutil.which("cc") is None or shutil.which("make") is None, reason="no cc or make")
needs_board = pytest.mark.skipif(bool(missing_tools()), reason=f"not installed: {missing_tools()}")
STRICT = "-std=c99 -Wall -Wextra -Wpedantic -Wdouble-promotion -Werror"


def make_test(folder: Path, flags: str = "-O1", compiler: str = "cc") -> subprocess.CompletedProcess:
    command = ["make", "-j2", "test", f"CFLAGS={flags}", f"CC={compiler}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def recurrent() -> QGraph:
    """A running sum in 8 bits: state + input, whose zero point is not 0."""
    g = QGraph("running sum")
    scale = {"scale": np.float64(0.5), "zero": -7}
    x = g.add(Tensor("x", (1, 6), "int8", np.float64(0.25), 3))
    state = g.add(Tensor("state", (1, 6), "int8", **scale))
    g.inputs = (x,)
    y = g.append("add", (state, x), Tensor("sum", (1, 6), "int8", **scale))
    g.outputs, g.states = (y,), ((state, y),)
    return g.check()


def mixed() -> QGraph:
    """Two inputs of two types, two outputs, a variable, and names that try to leave their comments."""
    rng = np.random.default_rng(1)
    g = QGraph("evil */ #error\n name")
    a, b = g.add(Tensor("a */ int", (1, 5), "float32")), g.add(Tensor("b", (1, 5), "int8", np.float64(0.1), 4))
    g.inputs = (a, b)
    real = g.append("dequantize", (b,), Tensor("real", (1, 5), "float32"))
    both = g.append("add", (a, real), Tensor("both", (1, 5), "float32"), "*/\n#error")
    w = g.constant("weights", rng.normal(size=(3, 5)).astype(np.float32), variable=True)
    y = g.append("dense", (both, w), Tensor("y", (1, 3), "float32"), low=-1.5)
    z = g.append("unary", (y,), Tensor("z", (1, 3), "float32"), function="tanh")
    q = g.append("quantize", (z,), Tensor("q", (1, 3), "int8", np.float64(1 / 128), 0))
    g.outputs = (q, y)
    return g.check()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("c") / "fw"
    write_c(residual_network(), out, name="net")
    return out


def test_the_folder_is_whole_and_knows_nothing_of_this_machine(folder, tmp_path):
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {
        "src/net.h", "src/net.c", "src/net_weights.h", "src/kernels/ns.h", "src/kernels/conv2d.c", "test/net_test.c",
        "examples/net/net.ino", "Makefile", "CMakeLists.txt", "library.properties", "size.json", "README.md",
    } <= names  # fmt: skip
    assert not any(n.endswith(("softmax.c", "host.c", "train.c")) for n in names)  # kernels that it does not call
    text = "".join((folder / n).read_text() for n in names)
    assert str(folder.parent) not in text and os.path.expanduser("~") + "/" not in text
    assert not re.search(r"\b(malloc|calloc|free)\s*\(|\bdouble\b(?! arithmetic)", text)
    again = tmp_path / "again"
    write_c(residual_network(), again, name="net")
    assert all((again / n).read_bytes() == (folder / n).read_bytes() for n in names)


def test_facts(folder):
    graph, facts = residual_network(), facts_of(folder)
    assert facts["macs"] == graph.macs() and facts["network"] == "small"
    assert facts["flash"]["constants"] == sum(facts["flash"]["by_operator"].values()) >= graph.weight_bytes()
    assert facts["input"].shape == (1, 12, 12, 3) and float(facts["input"].scale) == 2 / 255
    assert facts["output"].zero == graph.tensors[graph.outputs[0]].zero
    assert {c["kind"] for c in facts["calls"]} == {"conv2d", "depthwise2d", "add", "avgpool2d"}


@needs_cc
def test_it_compiles_without_a_warning_and_tests_itself(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "fw")
    for compiler in filter(shutil.which, ("cc", "clang")):
        subprocess.run(["make", "clean"], cwd=tmp_path / "fw", check=True, capture_output=True)
        done = make_test(tmp_path / "fw", f"-O2 {STRICT}", compiler)
        assert done.returncode == 0 and "PASS net: 2 runs" in done.stdout, done.stderr
    main = tmp_path / "main.cpp"
    main.write_text('#include "net.h"\nint main() { return net_run(nullptr, nullptr) + (net_code(1.0f) != 127); }\n')
    if shutil.which("c++"):
        flags = [*STRICT.replace("c99", "c++11").split(), f"-I{tmp_path / 'fw/src'}"]
        library = str(tmp_path / "fw/libnet.a")
        subprocess.run(["c++", *flags, str(main), library, "-o", str(tmp_path / "main")], check=True)
        subprocess.run([str(tmp_path / "main")], check=True)


@needs_cc
def test_the_self_test_fails_when_a_weight_changes(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "fw")
    weights = tmp_path / "fw/src/net_weights.h"
    weights.write_text(re.sub(r"(c0\[\d+\] = \{\s*)-?\d+,-?\d+,-?\d+", r"\g<1>127,127,127", weights.read_text()))
    done = make_test(tmp_path / "fw")
    assert done.returncode and re.search(r"FAIL net: \d+ outputs are wrong", done.stdout)


@needs_cc
def test_predicted_arena_is_the_linked_one(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "fw")
    assert make_test(tmp_path / "fw").returncode == 0
    symbols = subprocess.run(["nm", "-S", "src/net.o"], cwd=tmp_path / "fw", capture_output=True, text=True).stdout
    size = re.search(r"^\w+ (\w+) b net_arena$", symbols, re.M)[1]
    assert int(size, 16) == facts_of(folder)["arena"] == facts_of(folder)["ram"]["arena"]
    assert f"NET_ARENA_BYTES {facts_of(folder)['arena']} " in (folder / "src/net.h").read_text()


@needs_cc
def test_states_types_and_hostile_names(tmp_path):
    """A network that remembers, and one of two inputs, two outputs, floats and a variable: both in one program."""
    rng = np.random.default_rng(0)
    golden = [rng.integers(-60, 60, (5, 6)).astype(np.int8)]
    write_c(recurrent(), tmp_path / "one", name="sum", golden=golden)
    write_c(mixed(), tmp_path / "two", name="mixed")
    for name in ("one", "two"):
        done = make_test(tmp_path / name, f"-O2 {STRICT}")
        assert done.returncode == 0 and "PASS" in done.stdout, done.stdout + done.stderr
    steps = np.cumsum([0.25 * (x.astype(int) - 3) for x in golden[0]], axis=0)
    out = re.search(r"out0\[5\]\[6\] = \{(.*?)\};", (tmp_path / "one/test/sum_test.c").read_text(), re.S)[1]
    codes = np.array(re.findall(r"-?\d+", out), int).reshape(5, 6)
    assert np.abs(0.5 * (codes + 7) - np.clip(steps, -60.5, 67)).max() <= 1.5  # the state adds up, rounded at each step
    (tmp_path / "both.c").write_text(
        '#include "sum.h"\n#include "mixed.h"\n#include <stddef.h>\n'
        "int main(void) { sum_reset(); return sum_run(NULL, NULL) + mixed_run(NULL, NULL, NULL, NULL) + !mixed_variable(0)"
        " + (mixed_variable(1) != NULL) + (int)mixed_variable_bytes(0) - 60; }\n"
    )
    paths = [f"-I{tmp_path / n / 'src'}" for n in ("one", "two")] + [str(tmp_path / "both.c")]
    libraries = [str(tmp_path / "one/libsum.a"), str(tmp_path / "two/libmixed.a"), "-lm"]
    subprocess.run(["cc", *STRICT.split(), *paths, *libraries, "-o", str(tmp_path / "both")], check=True)
    subprocess.run([str(tmp_path / "both")], check=True)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_cmake(folder, tmp_path):
    for command in (["-S", str(folder), "-B", str(tmp_path)], ["--build", str(tmp_path)]):
        subprocess.run(["cmake", *command], check=True, capture_output=True)
    subprocess.run([str(tmp_path / "net_test")], check=True, capture_output=True)


def test_what_is_there_is_left_alone(tmp_path):
    graph = residual_network()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/size.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(NetsukeError, match="something else is there"):
            write_c(graph, tmp_path / name)
    write_c(graph, tmp_path / "ours")
    write_c(graph, tmp_path / "ours", name="other")
    assert not (tmp_path / "ours/src/model.c").exists() and (tmp_path / "ours/src/other.c").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine", "ours"]
    assert (tmp_path / "mine/size.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["1net", "a-b", "ns_x", "ns", "test", "m", "", "x" * 99, "../x", "a b"])
def test_names_that_c_does_not_take(tmp_path, name):
    with pytest.raises(NetsukeError, match="is no prefix of C functions"):
        write_c(residual_network(), tmp_path / "fw", name=name)
    assert not list(tmp_path.iterdir())


def test_wrong_places_and_test_inputs(tmp_path):
    graph, fine = residual_network(), images(2)
    with pytest.raises(NetsukeError, match="parent folder does not exist"):
        write_c(graph, tmp_path / "a/b")
    for golden in (
        [fine, fine],
        [fine.astype(np.int16)],
        [fine[:, :5]],
        [fine[:0]],
        [np.int8(3)],
        [np.array(3, np.int8)],
    ):
        with pytest.raises(NetsukeError, match="test inputs"):
            write_c(graph, tmp_path / "fw", golden=golden)
    assert not list(tmp_path.iterdir())


def test_facts_of_other_folders(tmp_path, folder):
    with pytest.raises(NetsukeError, match=r"it has no size\.json"):
        facts_of(tmp_path)
    changes = ({"format": "x"}, {"version": 2}, {"inputs": []}, {"outputs": [{"name": "y"}]}, {"name": "../x"},
               {"kernels": ["../../x.c"]}, {"calls": 3})  # fmt: skip
    for change in changes:
        text = json.loads((folder / "size.json").read_text()) | change
        (tmp_path / "size.json").write_text(json.dumps(text))
        with pytest.raises(NetsukeError, match="read the C folder"):
            facts_of(tmp_path)


@needs_board
def test_boards_give_the_references_bits(folder):
    x = images(3)
    want = Interpreter(residual_network()).run(x)[0]
    counts = {}
    for core in ("m4", "m7"):
        for dsp in (True, False):
            got = run_emulated(folder, core, [x], dsp=dsp, profile=core == "m4" and dsp)
            assert got["passed"] and np.array_equal(got["outputs"][0], want), (core, dsp)
            assert got["arena"] == facts_of(folder)["arena"] and got["heap_peak"] == 0
            assert len(got["runs"]) == 3 and 0 < got["stack_peak"] < 2048
            counts[core, dsp] = got["runs"]
            if "kinds" in got:
                total = sum(got["kinds"].values())
                assert set(got["kinds"]) == {"conv2d", "depthwise2d", "add", "avgpool2d"}
                assert 0.95 < total / np.mean(got["runs"]) < 1.05
    assert run_emulated(folder, "m4", [x])["runs"] == counts["m4", True]


@needs_board
def test_states_and_variables_on_a_board(tmp_path):
    rng = np.random.default_rng(2)
    x = rng.integers(-60, 60, (5, 1, 6)).astype(np.int8)
    reference = Interpreter(recurrent())
    write_c(recurrent(), tmp_path / "sum", name="sum")
    got = run_emulated(tmp_path / "sum", "m4", [x])
    assert got["passed"] and np.array_equal(got["outputs"][0], np.concatenate([reference.run(r)[0] for r in x]))
    graph = mixed()
    write_c(graph, tmp_path / "mixed", name="mixed")
    inputs = [rng.normal(size=(4, 5)).astype(np.float32), rng.integers(-128, 128, (4, 5)).astype(np.int8)]
    got = run_emulated(tmp_path / "mixed", "m7", inputs)
    q, y = Interpreter(graph).run(*inputs)
    assert got["passed"] and np.allclose(got["outputs"][1], y, atol=1e-5) and np.abs(got["outputs"][0] - q).max() <= 1
    assert np.array_equal(got["variables"][0], graph.tensors[graph.ops[2].inputs[1]].data)


@needs_board
def test_firmware_that_trains_changes_its_weights_as_the_reference_does(tmp_path):
    graph = training_graph(residual_network(), UpdatePlan(6, {4: 0.5, 5: 0.25, 7: 1.0, 8: 0.5}))
    steps, labels = images(6), np.array([0, 1, 2, 3, 0, 1], np.int32)
    inputs = [steps, labels, np.full(6, 0.05, np.float32)]
    write_c(graph, tmp_path / "fw", name="train", golden=inputs)
    got = run_emulated(tmp_path / "fw", "m4", inputs)
    reference = ReferenceTraining(graph)
    logits = [reference.step(x, label=y, rate=0.05)[0] for x, y in zip(steps, labels)]
    assert got["passed"] and np.array_equal(got["outputs"][0], np.concatenate(logits))
    names = [v["name"] for v in facts_of(tmp_path / "fw")["variables"]]
    start = {t.name: t.data for t in graph.tensors if t.variable}
    for name, found in zip(names, got["variables"]):
        assert np.array_equal(found, reference.variables()[name]), name
    assert sum(not np.array_equal(found, start[name]) for name, found in zip(names, got["variables"])) > 8


@needs_board
def test_a_board_that_is_too_small_says_so(folder):
    with pytest.raises(
        NetsukeError, match=r"RAM: \d+ bytes are needed with 512 of stack, \d+ too many \(most in net: 1"
    ):
        run_emulated(folder, EmulatedBoard("m4", 65536, 2048, 512))
    with pytest.raises(NetsukeError, match=r"the stack needs more than its 256 bytes"):
        run_emulated(folder, EmulatedBoard("m4", 65536, 8192, 256))


@needs_board
def test_inputs_that_do_not_fit_a_board(folder):
    for inputs in ([], [images(1), images(1)], [images(1).astype(np.float32)], [images(1)[:, :5]]):
        with pytest.raises(NetsukeError, match="on a board"):
            run_emulated(folder, "m4", inputs)


def test_drawn_numbers_fill_their_types():
    """xorshift32 from 2463534242 begins 723471715 (Marsaglia, 2003)."""
    assert drawn((1,), "int8", 2463534242) == (np.int8((723471715 >> 24) - 128), 723471715)
    for dtype, low, high in (("int8", -128, 127), ("uint8", 0, 255), ("int16", -32768, 32767), ("float32", -1, 1)):
        x, _ = drawn((2, 2000), dtype, 1234567)
        assert x.dtype == dtype and low <= x.min() < low * 0.9 + high * 0.1 and low * 0.1 + high * 0.9 < x.max() <= high
