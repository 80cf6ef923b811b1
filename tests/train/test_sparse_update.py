"""Plans of sparse update: the memory rule against hand counts and published sizes, refusals, and the search."""

import itertools
import json

import pytest

from netsuke.data.catalogue import find, missing
from netsuke.errors import NetsukeError
from netsuke.graph.read.npz import read_npz
from netsuke.graph.update_plan import UpdatePlan, full, kept_channels, last, layers, qas
from netsuke.train.sparse_update import PUBLISHED, Contributions, contributions, extra_bytes, search
from tests.graph.small import residual_network

MODELS = "tiny-training/mcunet-5fps.npz"
needs_models = pytest.mark.skipif(bool(missing((MODELS,))), reason=f"{MODELS} is not below NETSUKE_DATA")


def test_the_rule_by_hand():
    g = residual_network()
    # layer 8: 1 x 1, 8 -> 16 channels, 3 x 3 pixels; the head reads 16 features
    assert extra_bytes(g, UpdatePlan(0)) == 16
    assert extra_bytes(g, UpdatePlan(1)) == 16 + (3 * 3 * 16 / 8 + 4 * 16)
    assert extra_bytes(g, UpdatePlan(1, {8: 0.5})) == 16 + 18 + 64 + 4 * (9 + 16)
    # layer 7: depthwise, 3 x 3, stride 2, 8 channels on 6 x 6 pixels
    assert extra_bytes(g, UpdatePlan(2, {7: 1.0})) == 16 + 18 + 64 + (3 * 3 * 8 / 8 + 4 * 8) + 8 * (36 + 9)


@needs_models
def test_published_plans_cost_what_they_are_named_for():
    g = read_npz(find(MODELS))
    sizes = [extra_bytes(g, p) / 1024 for p in (*PUBLISHED.values(), last(g, 12), full(g))]
    assert [round(s) for s in sizes] == [50, 75, 100, 125, 148, 448, 1400]


@needs_models
@pytest.mark.parametrize("name, kilobytes, count", [("mbv2-w0.35", 1306, 51), ("proxyless-w0.3", 1211, 60)])
def test_full_update_of_the_other_networks(name, kilobytes, count):
    g = read_npz(find(f"tiny-training/{name}.npz"))
    assert len(layers(g)) == count
    assert round(extra_bytes(g, full(g)) / 1024) == kilobytes


def test_plans_survive_json(tmp_path):
    plan = UpdatePlan(5, {4: 0.5, 8: 0.125}, "mine")
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert UpdatePlan.from_json(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("text", ['{"weights": {}}', '{"n_bias": "many"}', '{"n_bias": 1, "weights": {"a": 1}}', "[]"])
def test_files_that_are_no_plans(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(NetsukeError, match=r"plan\.json"):
        UpdatePlan.from_json(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "plan, sentence",
    [
        (UpdatePlan(2, {4: 0.5}), r"layer 4 \(b\.pw1\).*gradients end at layer 7.*n_bias of 5 or more"),
        (UpdatePlan(2, {8: 0.3}), r"layer 8 \(c\.pw\) has 8 input channels and the ratio 0\.3"),
        (UpdatePlan(9, {0: 0.5}), r"layer 0 \(first\) has 3 input channels.*allowed: 1$"),
        (UpdatePlan(10), "10 layers are to train"),
        (UpdatePlan(-1), "-1 layers"),
        (UpdatePlan(2, {9: 1.0}), "no layer 9"),
    ],
)
def test_refusals_name_the_layer(plan, sentence):
    with pytest.raises(NetsukeError, match=sentence):
        extra_bytes(residual_network(), plan)


def test_the_channels_of_largest_norm_are_kept():
    g = residual_network()
    op = g.ops[layers(g)[8]]
    g.tensors[op.inputs[1]].data[..., [1, 6]] = 100
    assert list(kept_channels(g, op, 0.25)) == [1, 6]


def test_empty_channels_are_not_scaled_up():
    g = residual_network()
    op = g.ops[layers(g)[4]]
    g.tensors[op.inputs[1]].scale[3] = 4e-9
    weight, bias = qas(g, op)
    assert weight[3] == bias[3] == 0
    assert weight[2] == pytest.approx(float(g.tensors[op.inputs[1]].scale[2]) ** -2)


def gains() -> Contributions:
    depths = {2: 0.04, 5: 0.07}
    return Contributions(depths, {(i, r): 0.01 * (i - 3) * r**0.5 - 0.005 for i in (4, 6, 8) for r in (1.0, 0.5, 0.25)})


@pytest.mark.parametrize("limit", [300, 500, 700, 1200, 5000])
def test_the_search_finds_the_best_set(limit):
    g, known = residual_network(), gains()
    found = search(g, known, limit)

    def worth(p: UpdatePlan) -> float:
        return known.bias[p.n_bias] + sum(known.weight[i, r] for i, r in p.weights.items())

    best = 0.0
    for k, *ratios in itertools.product((2, 5), *[(0.0, 0.25, 0.5, 1.0)] * 3):
        chosen = {i: r for i, r in zip((4, 6, 8), ratios) if r}
        if all(i >= 9 - k for i in chosen) and extra_bytes(g, plan := UpdatePlan(k, chosen)) <= limit:
            best = max(best, worth(plan))
    assert extra_bytes(g, found) <= limit
    assert worth(found) == pytest.approx(best, rel=1e-3)


def test_a_limit_below_the_least_plan():
    with pytest.raises(NetsukeError, match=r"0\.[12] KB or more"):
        search(residual_network(), gains(), 90)


def test_contributions_are_differences_of_accuracies():
    table = {(0, ()): 0.5, (2, ()): 0.6, (5, ()): 0.7, (5, ((8, 0.5),)): 0.75, (5, ((8, 1.0),)): 0.72}
    got = contributions(
        residual_network(), lambda p: table[p.n_bias, tuple(p.weights.items())], (2, 5), (1, 8), (0.5, 1.0)
    )
    assert {k: round(v, 6) for k, v in got.bias.items()} == {0: 0.0, 2: 0.1, 5: 0.2}
    assert {k: round(v, 6) for k, v in got.weight.items()} == {(8, 0.5): 0.05, (8, 1.0): 0.02}


def test_the_plan_is_plain_json():
    assert json.loads(PUBLISHED[49].to_json())["weights"] == {"24": 0.25, "27": 0.5, "30": 0.5}
