"""Plans of the integer-only decoder: its own count to the byte, a fresh process within 5 %, and what `netsuke plan` says."""

import json
import sys
from pathlib import Path

import pytest
import torch

from netsuke.cli import main
from netsuke.errors import NetsukeError
from netsuke.layers.quantized import QuantLinear
from netsuke.layers.static import StaticGrid
from netsuke.measure.peak import peak_of
from netsuke.models.llama import SITES, BlockShape, Llama, LlamaConfig
from netsuke.models.save import save_artifact
from netsuke.plan import plan
from netsuke.runtime.integer_engine import IntegerEngine
from netsuke.runtime.integer_plan import headers_of, integer_plan
from tests.runtime.static_models import dynamic_artifact, static_artifact
from tests.runtime.test_integer_native import LEVELS

pytestmark = pytest.mark.skipif(not LEVELS, reason="this installation lacks the integer decoder's library")
ROOT = Path(__file__).resolve().parents[2]
WIDE = ("attn_stream", "scores", "probs", "o", "mlp_stream", "down")


def random_static(bits: int, blocks: int = 3, **changes) -> Llama:
    """Random codes on plausible grids: a plan does not ask what they say."""
    shape = {"vocab": 3000, "width": 768, "heads": 12, "kv_heads": 4, "head_dim": 64, "context": 2048, "tied": True}
    shapes = changes.pop("shapes", (BlockShape(2048, 64),) * blocks)
    model = Llama(LlamaConfig(blocks=shapes, **shape | changes))
    rng = torch.Generator().manual_seed(0)
    for name, layer in list(model.linears().items()):
        wide = 8 if name in ("embed", "head") else bits
        codes = torch.randint(1, 1 << wide, (layer.outs, layer.ins), dtype=torch.uint8, generator=rng)
        zeros = torch.full((layer.outs, 1), 1 << (wide - 1))
        bias = None if layer.bias is None else torch.zeros(layer.outs)
        scales = torch.full((layer.outs, 1), 0.01)
        model.replace(name, QuantLinear.from_codes(codes, scales, zeros, wide, layer.ins, bias))
    model.stand({
        f"blocks.{i}.{site}": StaticGrid(1e-3, 0, 16) if site in WIDE else StaticGrid(0.05, 0, 8)
        for i in range(len(shapes)) for site in SITES
    })  # fmt: skip
    return model


def saved(folder: Path, model: Llama) -> Path:
    folder.mkdir(exist_ok=True)
    return save_artifact(folder / "static", model, None, {}, {})


PAIRS = (tuple(range(0, 20, 2)), tuple(range(1, 20, 2)), tuple(range(10)), tuple(range(5, 15)))
CASES = {
    "8 bits": (8, {}),
    "4 bits": (4, {}),
    "untied, biases": (4, {"tied": False, "qkv_bias": True, "mlp_bias": True}),
    "cut": (8, {"shapes": (BlockShape(501, 48), BlockShape(301, 20, PAIRS)), "window": 100}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("context, slots", [(300, 1), (2048, 3)])
def test_the_plan_is_what_the_decoder_counts(case, context, slots, tmp_path):
    bits, changes = CASES[case]
    folder = saved(tmp_path, random_static(bits, **{"width": 96, "vocab": 301, "blocks": 2} | changes))
    planned = integer_plan(headers_of(folder), context=context, batch=slots)
    counted = IntegerEngine.load(folder, context=context, slots=slots).memory()
    names = ("weights", "kv_cache", "activations")
    assert {n: getattr(planned, n) for n in names} == {n: counted[n] for n in names}
    if planned.moment.startswith("a pass"):
        assert planned.buffers == counted["tables"]


@pytest.mark.parametrize("bits, context", [(8, 768), (4, 512)])
def test_the_peak_of_a_process_is_the_plan(bits, context, tmp_path):
    folder = saved(tmp_path, random_static(bits, blocks=8))
    planned = integer_plan(headers_of(folder), context=context)
    peak = peak_of("tests.runtime.integer_peak:fill", str(folder), context, threads=1, folders=(str(ROOT),))
    assert planned.peak > 45e6
    assert planned.peak == pytest.approx(peak.above, rel=0.05)


def test_handing_over_can_be_the_peak():
    """A short context and one large block: both copies of its 8-bit codes are alive at once; of 4-bit codes there is one."""
    sizes = {"shapes": (BlockShape(1536, 64),), "width": 1536, "vocab": 300}
    eight, four = (integer_plan(random_static(bits, **sizes), context=8) for bits in (8, 4))
    assert eight.moment == "handing over block 0" and eight.peak - eight.runtime > 1.9 * sum(eight.parts.values())
    assert four.moment.startswith("a pass")


def test_the_verb_plans_the_decoder(tmp_path, monkeypatch, capsys):
    folder = static_artifact(tmp_path / "static")
    got = plan(str(folder), "pi4", context=32)
    assert got["backend"] == "integer" and got["fits"] and "integer-only decoder" in got["note"]
    assert got == plan(str(folder), "pi4", context=32, backend="integer"), "the home of such a model"
    memory = got["memory"]
    assert memory["kv_cache"] == 32 * 2 * 2 * (4 + 4) == IntegerEngine.load(folder).memory()["kv_cache"]
    parts = ("weights", "kv_cache", "activations", "buffers", "runtime")
    assert sum(memory[k] for k in parts) == memory["peak"] == memory["total"] - memory["process"]
    assert memory["process"] == plan(str(folder), "pi4", context=32, backend="torch")["memory"]["process"]
    assert plan(str(folder), "pi4", batch=3)["memory"]["kv_cache"] == 3 * memory["kv_cache"]
    assert got["latency"]["tokens_per_second"] > 0
    code, out, _ = command(monkeypatch, capsys, "plan", folder, "--device", "stm32f4")
    assert code == 1 and "integer-only decoder runs it" in " ".join(out.split()) and "does not fit" in out
    code, out, _ = command(monkeypatch, capsys, "plan", folder, "--device", "pi4", "--json")
    assert code == 0 and json.loads(out)["backend"] == "integer"


def test_one_core_is_what_it_gets(tmp_path):
    """The decoder has one thread: a prompt takes as long on a card of four cores as its arithmetic on one."""
    card = (Path(sys.modules["netsuke.devices.device"].__file__).parent / "cards/pi4.toml").read_text()
    assert "cores = 4" in card
    (tmp_path / "one.toml").write_text(card.replace("cores = 4", "cores = 1"))
    folder = saved(tmp_path, random_static(8, width=96, blocks=2))
    four, one = (plan(str(folder), name)["latency"] for name in ("pi4", str(tmp_path / "one.toml")))
    assert four["bound"] == "arithmetic" and four["first_token"] == pytest.approx(4 * one["first_token"])
    assert four["energy_per_token"] == one["energy_per_token"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--batch", "300"), "300 slots"), (("--context", "0"), "--context 0"), (("--kv", "int4"), "int4"),
        (("--backend", "numpy"), "native, integer, torch"), (("--train", "full"), "cannot"),
    ],
)  # fmt: skip
def test_misuse_is_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    folder = static_artifact(tmp_path / "static")
    code, _, err = command(monkeypatch, capsys, "plan", folder, "--device", "pi4", *arguments)
    assert code == 2 and words in err and err.count("\n") == 1 and "Traceback" not in err


def test_what_no_decoder_runs_does_not_fit_anywhere(tmp_path, monkeypatch, capsys):
    for folder, words in (
        (dynamic_artifact(tmp_path / "dynamic"), "--backend torch"),
        (static_artifact(tmp_path / "wide", wide=["hidden"]), "blocks.0.hidden has 16 bits"),
    ):
        code, out, err = command(monkeypatch, capsys, "plan", folder, "--device", "pi4")
        assert code == 2 and words in err and not out
    with pytest.raises(NetsukeError, match="a context of 4096"):
        integer_plan(headers_of(static_artifact(tmp_path / "static")), context=4096)


def command(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, output and errors of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["netsuke", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, *capsys.readouterr()
