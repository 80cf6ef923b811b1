"""ZeroQAT: descends on the quantized loss without gradients, keeps the best, resumes, refuses by name."""

import math
from dataclasses import replace

import pytest
import torch

from netsuke.compress.method import Method
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.layers.quantized import QuantLinear
from netsuke.models.llama import SITES
from netsuke.train.masters import MasterLinear
from netsuke.train.zeroqat import Run, ZeroQAT, _evaluate, batch_at, fit, held_out, masters_of, prepare, train_rows
from tests.tiny import same_state, tiny_llama, tiny_task

FAST = ZeroQAT(w=3, group=16, steps=40, every=10, warm=0, batch=8, micro=8, calibration=4, eps=3e-3, rate=3e-4)


@pytest.fixture(scope="module")
def task():
    return tiny_task()


def test_the_loss_falls_and_the_best_is_returned(task):
    model = prepare(tiny_llama(), task, FAST)
    before = held_out(model, task, FAST)
    run = fit(model, task, FAST)
    assert run.start == before and run.least < before - 0.02
    assert [step for step, _, _ in run.evaluations] == [0, 10, 20, 30, 40] and len(run.log) == 40
    after = FAST.apply(tiny_llama(), task)
    assert held_out(after, task, FAST) == pytest.approx(run.least, abs=1e-6)
    blocks = [m for n, m in after.linears().items() if n.startswith("blocks.")]
    assert all(isinstance(m, QuantLinear) and m.bits == 3 for m in blocks) and isinstance(after.embed, Dense)


def test_never_worse_than_the_warm_start(task):
    wild = replace(FAST, rate=1.0, steps=8, every=2)
    after = wild.apply(tiny_llama(), task)
    start = prepare(tiny_llama(), task, wild)
    assert held_out(after, task, wild) <= held_out(start, task, wild) + 1e-6


def test_light_variant_moves_queries_and_values_alone(task):
    light = replace(FAST, trainable="qv", w=4)
    model = prepare(tiny_llama(), task, light)
    moved = masters_of(model)
    assert {n.rpartition(".")[2] for n in moved} == {"q", "v"}
    packed = {n: m for n, m in model.linears().items() if isinstance(m, QuantLinear)}
    kept = {n: m.codes.clone() for n, m in packed.items()}
    start = {n: m.weight.clone() for n, m in moved.items()}
    fit(model, task, light)
    assert all(torch.equal(kept[n], m.codes) for n, m in packed.items()) and len(kept) == 10
    assert all(not torch.equal(start[n], m.weight) for n, m in moved.items())


def test_activations_are_rounded_where_they_enter_a_product(task):
    method = replace(FAST, w=8, a=4, group=0, steps=2)
    after = method.apply(tiny_llama(), task)
    assert set(after.blocks[0].sites) == {"attn_in", "q_rot", "k_rot", "v", "heads", "mlp_in", "hidden"} < set(SITES)
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    levels = after.blocks[0].sites["attn_in"](x)
    assert max(len(levels[b, t].unique()) for b in range(2) for t in range(5)) <= 16
    eight, four = (
        float((m(task.windows("validation")[:4, :-1]) - tiny_llama()(task.windows("validation")[:4, :-1])).norm())
        for m in (
            replace(method, a=8, steps=0).apply(tiny_llama(), task),
            replace(method, steps=0).apply(tiny_llama(), task),
        )
    )
    assert eight < 0.3 * four


def test_a_run_goes_on_where_it_ended(task, tmp_path):
    knobs, whole = replace(FAST, steps=20), prepare(tiny_llama(), task, FAST)
    want = fit(whole, task, knobs)
    path = tmp_path / "run.ckpt"

    def interrupt(step, loss):
        if step == 10:
            raise KeyboardInterrupt

    part = prepare(tiny_llama(), task, FAST)
    fit(part, task, replace(knobs, steps=10), path)  # ends after step 10, as an interruption there would
    again = prepare(tiny_llama(), task, FAST)
    got = fit(again, task, knobs, path)
    assert [e[0] for e in got.evaluations] == [0, 10, 20] and len(got.log) == 20
    # the first half ran on a schedule of its own; the data, the directions and the best are shared
    assert got.evaluations[1][2] == pytest.approx(want.evaluations[1][2], abs=0.05)
    with pytest.raises(KeyboardInterrupt):
        fit(prepare(tiny_llama(), task, FAST), task, knobs, tmp_path / "other.ckpt", interrupt)
    done = fit(prepare(tiny_llama(), task, FAST), task, knobs, tmp_path / "other.ckpt")
    assert done.log == want.log and [e[2] for e in done.evaluations] == [e[2] for e in want.evaluations]
    assert same_state(torch.nn.ModuleDict({n.replace(".", "_"): m for n, m in done.best.items()}),
                      torch.nn.ModuleDict({n.replace(".", "_"): m for n, m in want.best.items()}))  # fmt: skip
    with pytest.raises(NetsukeError, match="other settings"):
        fit(again, task, replace(knobs, seed=1), path)


def test_stops_at_nan_and_keeps_the_best(task):
    model, calls = prepare(tiny_llama(), task, FAST), []

    class Breaking:
        def batches(self, split, limit=None):
            return task.batches(split, limit)

        def loss(self, model, batch):
            calls.append(1)
            return task.loss(model, batch) * (math.nan if len(calls) > 20 else 1.0)

    with pytest.warns(UserWarning, match="the loss became nan at step 8; the best model so far is kept"):
        run = fit(model, Breaking(), FAST)
    assert len(run.log) == 8 and run.best.keys() == masters_of(model).keys()


def test_a_rising_loss_ends_the_run():
    run, masters = Run(), {"m": MasterLinear("m", torch.ones(2, 16), None, torch.zeros(2, 2, 1), 4, 16)}
    for i, loss in enumerate((3.0, 2.0, 2.1, 2.2, 2.3, 2.4)):
        _evaluate(run, i, 0.0, loss, masters)
    assert not run.stopped and run.least == 2.0
    _evaluate(run, 6, 0.0, 2.5, masters)
    assert "learning rate too high: loss rose 5 evaluations running" in run.stopped


def test_perturbation_below_resolution_is_refused(task):
    with pytest.raises(NetsukeError, match="below weight resolution.*raise eps"):  # noqa: RUF043
        replace(FAST, eps=1e-12).apply(tiny_llama(), task)


def test_batches_depend_on_the_step_alone_and_are_cut(task):
    knobs = replace(FAST, tokens=10)
    rows = train_rows(task, knobs)
    assert torch.equal(batch_at(rows, 3, knobs), batch_at(rows, 3, knobs))
    assert not torch.equal(batch_at(rows, 3, knobs), batch_at(rows, 4, knobs))
    assert batch_at(rows, 3, knobs).shape == (8, 11) and batch_at(rows, 3, FAST).shape == (8, 33)


@pytest.mark.parametrize(
    "knobs", [{"w": 5}, {"w": 1}, {"a": 1}, {"w": 16, "a": 8}, {"trainable": "k"}, {"grid": "a"}, {"group": -1}, {"batch": 0},
              {"eps": 0}, {"minutes": 0}, {"tokens": 1}, {"alpha": 2}],
)  # fmt: skip
def test_knobs_are_refused_by_name(knobs):
    with pytest.raises(NetsukeError, match=list(knobs)[-1]):
        ZeroQAT(**knobs)


def test_models_are_refused_by_layer(task):
    assert isinstance(FAST, Method) and FAST.accepts(tiny_llama()) is None
    packed = FAST.apply(tiny_llama(), task)
    assert "blocks.0.q is stored as quant" in FAST.accepts(packed)
    model = tiny_llama()
    model.stand({"blocks.1.hidden": lambda x: x})
    assert "blocks.1 has functions at hidden" in replace(FAST, a=8).accepts(model) and FAST.accepts(model) is None
    assert "no Llama-style" in FAST.accepts(torch.nn.Linear(2, 2))
