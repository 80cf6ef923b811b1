"""Calibration text taken through a model stage by stage: inputs as the whole model's, and two models side by side."""

import msgspec
import pytest
import torch

from netsuke.compress.walk import stages
from netsuke.layers.linear import Dense
from netsuke.measure.activations import Gram, tapped
from netsuke.models.llama import BlockShape, random_llama
from tests.tiny import tiny_llama, tiny_task


def batches():
    return [b[:, :-1] for b in tiny_task().batches("train")][:2]


def mixture(seed=0):
    blocks = (BlockShape(24, 12, experts=4, active=2), BlockShape(40, 12))
    return random_llama(msgspec.structs.replace(tiny_llama().cfg, blocks=blocks), seed, std=0.2)


@pytest.mark.parametrize("model", [tiny_llama(), mixture(), tiny_llama(tied=False)], ids=["tied", "experts", "head"])
def test_inputs_are_those_of_the_running_model(model):
    ids = batches()
    grams = {m: Gram() for n, m in model.linears().items() if n != "embed"}
    with torch.no_grad():
        with tapped(inputs=grams):
            for batch in ids:
                model(batch)
        seen = {}
        for names, inputs in stages(model, ids):
            found = Gram()
            for x in inputs:
                found.add(x)
            seen |= dict.fromkeys(names, found)
    assert set(seen) == {n for n in model.linears() if n != "embed"} | {"head"}
    for name, module in model.linears().items():
        if name != "embed":
            torch.testing.assert_close(seen[name].total, grams[module].total, rtol=1e-4, atol=1e-4)


def test_a_map_replaced_in_its_stage_is_what_the_next_one_sees():
    model, ids = tiny_llama(), batches()
    with torch.no_grad():
        for names, _ in stages(model, ids):
            for name in names if names != ["head"] else ():
                old = model.get_submodule(name)
                model.replace(name, Dense(torch.zeros_like(old.weight)))
            if names == ["head"]:
                break
            last = names
        walked = [x for names, inputs in stages(model, ids) if names == ["head"] for x in inputs]
        assert last == ["blocks.1.down"]
        assert torch.equal(walked[0], model.norm(model.embed.rows(ids[0])))


def test_a_second_model_sends_the_same_tokens_to_the_same_experts():
    model, other, ids = mixture(), mixture(5), batches()
    sent = {}
    with torch.no_grad():
        pairs = zip(stages(model, ids, sent), stages(other, ids, sent))
        rows = [(names, [len(x) for x in a], [len(x) for x in b]) for (names, a), (_, b) in pairs]
        apart = [len(x) for names, own in stages(other, ids) if ".experts.0.gate" in names[0] for x in own]
    assert all(a == b for _, a, b in rows)
    assert apart != [n for names, a, _ in rows if ".experts.0.gate" in names[0] for n in a]
