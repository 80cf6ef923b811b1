"""`netsuke plan`: the numbers, the verdict, the exit codes; one cell of each kind against a fresh process."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from netsuke.cli import app
from netsuke.devices import Device
from netsuke.errors import NetsukeError
from netsuke.models.llama import LlamaConfig, random_llama
from netsuke.models.save import save_artifact
from netsuke.plan import plan


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape = {"vocab": 1000, "width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "context": 4096}
    folder = tmp_path_factory.mktemp("plan") / "small.netsuke"
    return str(save_artifact(folder, random_llama(LlamaConfig.uniform(2, 128, **shape), 0), None, {}, {}))


def card(tmp_path, **changes) -> str:
    """pi4's card with other numbers."""
    text = (Path(sys.modules["netsuke.devices.device"].__file__).parent / "cards/pi4.toml").read_text()
    for name, value in changes.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} = "))
        text = text.replace(line, f"{name} = {value}", 1)
    (tmp_path / "mine.toml").write_text(text)
    return str(tmp_path / "mine.toml")


def test_a_small_model_fits_a_raspberry(model):
    got = plan(model, "pi4")
    assert got["fits"] and got["binding"] == [] and got["remedy"] is None
    assert (got["context"], got["batch"], got["device"]) == (2048, 1, "pi4")
    memory = got["memory"]
    parts = [memory[k] for k in ("weights", "kv_cache", "activations", "buffers", "runtime")]
    assert sum(parts) == memory["peak"] == memory["total"] - memory["process"]
    assert memory["kv_cache"] == 2 * 2048 * 2 * 2 * (16 + 16)
    sizes = [{"part": "key/value cache", "bytes": memory["kv_cache"]}, {"part": "embed", "bytes": 4 * 64 * 1000}]
    assert got["largest"][:2] == sizes
    reference = plan(model, "pi4", backend="torch")["memory"]
    assert reference["kv_cache"] == 2 * memory["kv_cache"] and reference["total"] > memory["total"] + 150_000_000
    assert "not measured" in got["latency"]["how"]
    assert got["latency"]["first_token"] > 1 / got["latency"]["tokens_per_second"] > 0


def test_a_microcontroller_is_too_small_and_says_what_to_try(model):
    got = plan(model, "stm32f4")
    assert not got["fits"] and "ram" in got["binding"] and "netsuke fit" in got["remedy"]
    assert "not Python" in got["note"] and got["memory"]["process"] == 0


def test_the_remedy_is_the_longest_context_that_fits(model, tmp_path):
    ample = plan(model, "pi4", context=4096)["memory"]["total"]
    small = card(tmp_path, ram=ample - 500_000)
    got = plan(model, small, context=4096)
    assert got["binding"] == ["ram"]
    longest = int(got["remedy"].removeprefix("--context "))
    assert plan(model, small, context=longest)["fits"]
    assert not plan(model, small, context=longest + 1)["fits"]


def test_storage_binds_alone(model, tmp_path):
    got = plan(model, card(tmp_path, storage=100_000))
    assert got["binding"] == ["storage"] and got["storage"]["bytes"] > 100_000


def test_training_is_planned_beside_running(model):
    got = {scope: plan(model, "pi4", train=scope, tokens=64, batch=2)["training"] for scope in ("full", "last-1")}
    assert got["full"]["total"] > got["last-1"]["total"]
    for step in got.values():
        parts = [step[k] for k in ("weights", "optimizer", "gradients", "saved", "buffers", "runtime")]
        assert sum(parts) == step["peak"]


def test_training_alone_can_be_what_does_not_fit(model, tmp_path):
    needs = plan(model, "pi4", train="full")
    between = (needs["memory"]["total"] + needs["training"]["total"]) // 2
    got = plan(model, card(tmp_path, ram=between), train="full")
    assert got["binding"] == ["ram for training"] and "--train last-1" in got["remedy"]


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"device": "pi44"}, "pi4"), ({"context": 0}, "--context 0"), ({"prompt": 5000}, "--prompt 5000"),
        ({"batch": -1}, "--batch -1"), ({"train": "last-9"}, "last-2"),
        ({"backend": "tpu"}, "native, integer, torch"), ({"kv": "int4"}, "float16, int8"),
        ({"model": "no-such-model"}, "no such file"),
    ],
)  # fmt: skip
def test_misuse_is_one_sentence(model, arguments, word):
    with pytest.raises(NetsukeError, match=word):
        plan(**({"model": model, "device": "pi4"} | arguments))


@pytest.mark.parametrize("device, code", [("pi4", 0), ("stm32f4", 1)])
def test_the_exit_code_is_the_verdict(model, device, code):
    table = CliRunner().invoke(app, ["plan", model, "--device", device, "--train", "last-1"])
    as_json = CliRunner().invoke(app, ["plan", model, "--device", device, "--json"])
    assert table.exit_code == as_json.exit_code == code
    assert json.loads(as_json.output)["fits"] is (code == 0)
    assert ("does not fit" in table.output) is (code == 1)
    assert "optimizer states" in table.output


def test_misuse_exits_with_two(model):
    done = subprocess.run(
        [sys.executable, "-m", "netsuke", "plan", model, "--device", "pi44"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and "pi4" in done.stderr


def test_more_bandwidth_is_more_tokens(model):
    slow, fast = (plan(model, name)["latency"]["tokens_per_second"] for name in ("pi-zero-2w", "pi5"))
    assert Device.load("pi5").ram_bandwidth > Device.load("pi-zero-2w").ram_bandwidth
    assert fast > slow


def test_planned_peaks_are_those_of_fresh_processes():
    path = Path(__file__).parents[1] / "benchmarks/plan.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_plans", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    rows = {row["kind"]: row for row in benchmark.plan_cells(quick=True)}
    # single runs, of which the benchmark takes medians: the heap of one may lie 2 MB off
    assert abs(rows["inference"]["error"]) < 0.08
    assert abs(rows["training"]["error"]) < benchmark.BARS["training"]
