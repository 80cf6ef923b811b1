"""Equivalent transformations leave the function as it was: every pair, with the ties that rotation and grouping ask for."""

import pytest
import torch
from torch.func import functional_call

from netsuke.compress.equivalent import (
    PAIRS,
    bounded,
    column_reach,
    fold,
    pair_sizes,
    skipped,
    smoothing,
    transform,
    weights_of,
)
from netsuke.errors import NetsukeError
from tests.tiny import same_state, tiny_llama

MODELS = {
    "heads of their own": lambda: tiny_llama(kv_heads=4),
    "grouped, biases": lambda: tiny_llama(1, qkv_bias=True, out_bias=True, mlp_bias=True),
}
IDS = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(0))


def drawn(model, pairs, seed=0):
    """Scales from 0.1 to 10 for the named pairs of every block."""
    rng, out = torch.Generator().manual_seed(seed), {}
    for i in range(len(model.blocks)):
        for name, n in pair_sizes(model.cfg, i, grouped=True).items():
            if name in pairs:
                out[f"blocks.{i}.{name}"] = 10 ** (2 * torch.rand(n, generator=rng) - 1)
    return out


def change(a, b):
    with torch.no_grad():
        want = a(IDS)
        return float((b(IDS) - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pairs", [*[(p,) for p in PAIRS], PAIRS], ids=str)
def test_folding_changes_no_logit(pairs, kind):
    model = MODELS[kind]()
    scales = drawn(model, pairs)
    assert len(scales) == len(model.blocks) * len(pairs)
    folded = fold(model, scales)
    assert change(model, folded) < 1e-4
    assert not same_state(model, folded) and same_state(model, MODELS[kind]())


def test_untied_rotary_pairs_would_be_seen():
    """The control: the paper's own q↔k scale, one per channel, is not exact under rotation."""
    model = MODELS["heads of their own"]()
    wrong = fold(model, {})
    s = 10 ** (2 * torch.rand(model.blocks[0].q.outs, generator=torch.Generator().manual_seed(0)) - 1)
    wrong.blocks[0].q.weight.div_(s[:, None])
    wrong.blocks[0].k.weight.mul_(s[:, None])
    assert change(model, wrong) > 1e-2


def test_a_shift_of_values_goes_through_attention():
    model = MODELS["grouped, biases"]()
    n = pair_sizes(model.cfg, 0, grouped=True)["v_o"]
    shift = torch.randn(n, generator=torch.Generator().manual_seed(0))
    assert change(model, fold(model, {"blocks.1.v_shift": shift, **drawn(model, ("v_o",))})) < 1e-4
    with pytest.raises(NetsukeError, match=r"blocks\.1.*no bias"):
        fold(MODELS["heads of their own"](), {"blocks.1.v_shift": torch.randn(48)})


def test_applied_functionally_it_is_the_folded_block():
    model = MODELS["grouped, biases"]()
    scales = drawn(model, PAIRS)
    own = {p: scales[f"blocks.1.{p}"].requires_grad_(True) for p in PAIRS}
    block, x = model.blocks[1], torch.randn(2, 8, 48, generator=torch.Generator().manual_seed(2))
    y = functional_call(block, transform(weights_of(block), own, model.cfg, 1), (x,))
    assert torch.allclose(y, fold(model, scales).blocks[1](x), atol=1e-5)
    for grad in torch.autograd.grad(y.square().sum(), list(own.values())):
        assert grad.isfinite().all(), "zero in exact arithmetic, but it must be there for quantized weights"


def test_pairs_of_grouped_queries_are_left_out_as_in_the_paper():
    assert skipped(tiny_llama().cfg) == {p: "2 key/value heads feed 4 query heads" for p in ("v_o", "q_k")}
    assert skipped(tiny_llama().cfg, grouped=True) == {} == skipped(tiny_llama(kv_heads=4).cfg)
    assert pair_sizes(tiny_llama().cfg, 0) == {"attn_in": 48, "mlp_in": 48, "up_down": 80}


def test_smoothing_halves_an_outlier_in_decades():
    """A channel 100 times larger than its weights' reach: at α = 0.5 both sides meet at the geometric mean."""
    a, w = torch.tensor([100.0, 1.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 2.0, 0.0])
    s = smoothing(a, w)
    assert torch.allclose(s, torch.tensor([10.0, 1.0, 1.0, 1.0]))
    assert torch.allclose((a / s)[:2], (w * s)[:2])


def test_reach_of_the_columns_that_read_a_pair():
    model = tiny_llama()
    w = weights_of(model.blocks[0])
    assert torch.equal(column_reach(w, "mlp_in", model.cfg), torch.maximum(
        w["gate.weight"].abs().amax(0), w["up.weight"].abs().amax(0)))  # fmt: skip
    assert column_reach(w, "v_o", model.cfg).shape == (24,)


def test_learned_scales_keep_their_sign_and_a_size():
    assert bounded(torch.tensor([-0.5, -1e-4, 0.0, 1e-4, 3.0])).tolist() == pytest.approx(
        [-0.5, -0.01, 0.01, 0.01, 3.0]
    )


def test_unknown_pairs_are_refused():
    with pytest.raises(NetsukeError, match="no pair 'gate_down'"):
        fold(tiny_llama(), {"blocks.0.gate_down": torch.ones(80)})
