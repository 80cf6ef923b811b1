"""Shapes: counts that equal a model's, budgets hit within 1 %, floors in tokens/s, refusals that propose something."""

import msgspec
import pytest

from netsuke.errors import NetsukeError
from netsuke.models.llama import BlockShape, Llama
from netsuke.models.shapes import PRESETS, candidates, expansion, find_shape, parameters, random_shapes, shape_of
from tests.tiny import tiny_llama


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"tied": False}, {"qk_norm": True}, {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
        {"blocks": (BlockShape(40, 12, experts=4, active=2), BlockShape(53, 7, ((0, 2, 5), (1, 2, 3))))},
    ],
)  # fmt: skip
def test_the_count_is_the_model_s(changes):
    cfg = msgspec.structs.replace(tiny_llama().cfg, **changes)
    model = Llama(cfg)
    tables = model.embed.weight.numel() * (1 if cfg.tied else 2)
    got = parameters(cfg)
    assert (got.total, got.tables) == (sum(p.numel() for p in model.parameters()), tables)
    assert got.share == tables / got.total


@pytest.mark.parametrize("budget,vocab", [(700_000, 1024), (1_000_000, 2048), (2_000_000, 8192), (3_000_000, 2048)])
def test_every_candidate_hits_the_budget(budget, vocab):
    pool = candidates(budget, vocab)
    assert len(pool) > 5
    for cfg in pool:
        assert abs(parameters(cfg).total - budget) <= 0.01 * budget and 1 <= expansion(cfg) <= 4.5
    assert abs(parameters(find_shape(budget, vocab)).total / budget - 1) <= 0.01


def test_random_shapes_are_different_and_repeatable():
    drawn = random_shapes(1_000_000, 2048, 12, seed=3)
    assert drawn == random_shapes(1_000_000, 2048, 12, seed=3) != random_shapes(1_000_000, 2048, 12, seed=4)
    assert len(set(drawn)) == 12 and len({c.width for c in drawn}) >= 4
    with pytest.raises(NetsukeError, match="there are"):
        random_shapes(1_000_000, 2048, 1000)


def test_a_floor_in_speed_makes_it_shallower():
    def speed(cfg):
        return 1000 / len(cfg.blocks)

    free, held = find_shape(1_500_000, 2048), find_shape(1_500_000, 2048, min_speed=200, speed=speed)
    assert len(free.blocks) > len(held.blocks) == 5
    with pytest.raises(NetsukeError, match="up to 500 tokens/s") as refusal:
        find_shape(1_500_000, 2048, min_speed=2000, speed=speed)
    assert refusal.value.code == 1


def test_a_vocabulary_too_large_is_refused_with_a_smaller_one():
    with pytest.raises(NetsukeError, match="vocabulary of 7,812 pieces or fewer"):
        find_shape(500_000, 48_000)
    proposed = find_shape(500_000, 2000)
    assert parameters(proposed).share <= 0.5


def test_a_budget_without_room_for_attention_gives_no_shape():
    assert shape_of(100_000, 1024, 12, 96) is None


def test_both_published_configurations_are_there():
    assert (PRESETS["paper"].layers, PRESETS["released"].layers) == (21, 20)
    assert PRESETS["paper"].rate == 2 * PRESETS["released"].rate
