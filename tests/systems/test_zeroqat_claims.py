"""ZeroQAT's claims: well-formed, judged on small cases, and their controls fail."""

import pytest
import torch

from netsuke.claims import run_claim
from netsuke.layers.quantized import QuantLinear
from netsuke.models.load import load
from netsuke.systems import zeroqat, zeroqat_cases, zeroqat_memory
from netsuke.systems.modegpt_cases import Rows
from netsuke.train.masters import MasterLinear
from netsuke.train.zeroqat import ZeroQAT, masters_of, prepare
from tests.tiny import same_state, tiny_llama, tiny_task

CACHED = ("floors", "warm_start", "outcome", "gradient_curve")


@pytest.fixture
def tiny_subject(monkeypatch):
    """Stands a random model in for both real ones."""
    task = tiny_task()
    rows = Rows({s: list(task.batches(s)) for s in ("train", "validation", "test")})
    subject = zeroqat_cases.Subject(tiny_llama(), rows)
    for module in (zeroqat, zeroqat_cases):
        monkeypatch.setattr(module, "subject_of", lambda name, quick, text="own": subject)
    yield subject
    for name in CACHED:
        getattr(zeroqat_cases, name).cache_clear()


def test_every_claim_can_be_judged_or_says_why_not():
    assert len({c.text for c in zeroqat.CLAIMS}) == len(zeroqat.CLAIMS)
    for claim in zeroqat.CLAIMS:
        assert bool(claim.measure) != bool(claim.why)
        assert claim.bar or not claim.control


def test_without_wide_its_claims_cannot_be_shown(monkeypatch):
    monkeypatch.setattr(zeroqat, "WIDE", "no-such-model")
    rows = [run_claim(c, True) for c in zeroqat.CLAIMS if "wide" in c.text and "shape" not in c.text]
    assert len(rows) >= 5 and {r["verdict"] for r in rows} == {"cannot be shown"}


def test_a_run_and_what_stands_beside_it(tiny_subject):
    got = zeroqat.against_rounding(zeroqat.STORIES, "W3 g32", 0.9, True)
    assert got.met is None and set(got.values) >= {"ratio", "rounded", "searched", "gptq", "float"}
    assert got.values["steps"] == 4 and got.values["float"] != got.values["gptq"] != got.values["rounded"]
    assert zeroqat.never_worse((zeroqat.STORIES,), True).met
    kept = tiny_subject.model
    assert same_state(kept, tiny_llama()) and not any(b.sites for b in kept.blocks)


def test_wrong_sign_climbs(tiny_subject, monkeypatch):
    eager = ZeroQAT(w=3, group=32, steps=30, every=10, warm=0, batch=8, micro=8, eps=3e-3, rate=3e-4)
    monkeypatch.setattr(zeroqat_cases, "knobs_of", lambda *args, **rest: eager)
    right, wrong = (zeroqat_cases.outcome("any", "W3 g32", True, wrong=w) for w in (False, True))
    assert right.run.evaluations[-1][2] < right.run.start < wrong.run.evaluations[-1][2]
    assert wrong.run.least == wrong.run.start


def test_rounding_is_over_the_whole_range(tiny_subject):
    knobs = ZeroQAT(w=2, a=4, group=0)
    out = zeroqat_cases.rounded(tiny_subject.model, knobs)
    layer, W = out.blocks[0].q, tiny_subject.model.blocks[0].q.to_dense()
    assert isinstance(layer, QuantLinear) and layer.group == 48
    assert float((layer.to_dense() - W).abs().max()) <= 0.75 * float(
        layer.scales.float().max()
    )  # half a step, and zero's rounding
    assert set(out.blocks[1].sites) == {"attn_in", "q_rot", "k_rot", "v", "heads", "mlp_in", "hidden"}


def test_light_packs_all_but_queries_and_values(tiny_subject):
    some = zeroqat_cases.light(prepare(tiny_subject.model, tiny_subject.task, ZeroQAT(warm=0)))
    assert {n.rpartition(".")[2] for n in masters_of(some)} == {"q", "v"}
    assert sum(isinstance(m, QuantLinear) for m in some.linears().values()) == 10


def test_a_prepared_model_is_read_as_it_was_written(tmp_path, tiny_subject):
    model = prepare(tiny_subject.model, tiny_subject.task, ZeroQAT(warm=0, trainable="qv"))
    kept = {n: (m.weight.clone(), m.clip.clone()) for n, m in masters_of(model).items()}
    zeroqat_memory.write_prepared(model, tmp_path)
    again = zeroqat_memory.read_prepared(tmp_path, True)
    assert all(
        torch.equal(m.weight, kept[n][0]) and torch.equal(m.clip, kept[n][1]) for n, m in masters_of(again).items()
    )
    assert masters_of(again).keys() == kept.keys()
    assert not any(isinstance(m, MasterLinear) for m in load(tmp_path / "model.netsuke").model.linears().values())


def test_memory_of_a_step_is_told_from_back_propagation():
    assert zeroqat.step_memory(True).met and zeroqat.step_memory(True, "gradient").met is False


def test_estimator_and_its_control():
    assert zeroqat.estimator(True).met and zeroqat.estimator(True, another_key=True).met is False


def test_replay_and_its_control(tiny_subject):
    assert zeroqat.seed_replay(True).met and zeroqat.seed_replay(True, another_key=True).met is False
