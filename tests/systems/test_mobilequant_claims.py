"""The claims of MobileQuant: well-formed, judged on a random model that stands in, their controls failing."""

import pytest

from netsuke.claims import run_claim
from netsuke.systems import mobilequant, mobilequant_cases, mobilequant_speed
from netsuke.systems.modegpt_cases import Case
from tests.tiny import tiny_llama, tiny_task

pytestmark = pytest.mark.filterwarnings("ignore:mobilequant")  # grouped queries, on purpose
CACHED = ("planted", "treated", "wrongly_smoothed", "coarse", "float_nats", "excess", "site_table")


@pytest.fixture
def tiny_case(monkeypatch):
    case = Case(tiny_llama(), tiny_task(), 8, (), {})
    for module in (mobilequant, mobilequant_cases):
        monkeypatch.setattr(module, "case_of", lambda name, quick: case)
    yield case
    for cached in CACHED:
        getattr(mobilequant_cases, cached).cache_clear()


def test_every_claim_can_be_judged_or_says_why_not():
    assert len({c.text for c in mobilequant.CLAIMS}) == len(mobilequant.CLAIMS)
    for claim in mobilequant.CLAIMS:
        assert bool(claim.measure) != bool(claim.why)
        assert claim.measure is None or claim.bar or not claim.control


def test_a_model_that_is_not_installed_is_said_so(monkeypatch):
    row = run_claim(
        mobilequant.Claim("x", "", "bar", mobilequant.on("no-such-model", mobilequant.w8a8, 1.02)), quick=True
    )
    assert row["verdict"] == "cannot be shown" and "'no-such-model' is not installed" in row["measured"]


def test_integers_and_folding_are_met_and_their_controls_are_not(tiny_case):
    assert mobilequant.integers("tiny", True).met
    assert not mobilequant.integers("tiny", True, spoiled=True).met
    assert mobilequant.folding(("tiny",), True).met
    assert not mobilequant.folding(("tiny",), True, tied=False).met


def test_quality_is_measured_but_not_judged_on_little_text(tiny_case):
    for measure in (mobilequant.outliers, mobilequant.ablation, mobilequant.sixteen_bits):
        got = measure("tiny", True)
        assert got.met is None and got.values and "nan" not in got.shown
    got = mobilequant.end_to_end("tiny", 3, True)
    assert got.values["runs"].keys() == {"all", "blockwise"}
    assert abs(mobilequant.outliers("tiny", True).values["planted"] - 1) < 1e-4


def test_bytes_of_a_map_are_those_of_its_tensors():
    got = mobilequant_speed.map_bytes(128)
    assert got == {32: 128 * 128 * 4, 8: 128 * 128 + 3 * 128, 4: 128 * 128 // 2 + 3 * 128}
