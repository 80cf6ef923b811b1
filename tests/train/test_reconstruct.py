"""Block-wise reconstruction: transformations keep the function, learning brings the quantized block closer."""

import torch

from netsuke.train.reconstruct import Reconstruction, reconstruct, starting_scales
from tests.tiny import same_state, tiny_llama, tiny_task


def rows(task, n=8):
    return list(task.windows("train")[:n, :-1].split(2))


def test_scales_are_exact_before_rounding():
    model, task = tiny_llama(0, qkv_bias=True), tiny_task()
    ids = task.windows("validation")[:4, :-1]
    with torch.no_grad():
        want = model(ids)
        scales = starting_scales(model, rows(task), 0.75)
        assert all(set(s) == {"attn_in", "mlp_in", "v_o", "q_k"} for s in scales)
        assert any(float((s["attn_in"] - 1).abs().max()) > 0.1 for s in scales)
        for s in scales:  # scales that learning might have found
            s["v_o"].mul_(torch.linspace(0.5, 2, len(s["v_o"])))
            s["q_k"].mul_(torch.linspace(0.5, 2, len(s["q_k"])))
        for block, s in zip(model.blocks, scales):
            Reconstruction(block, s, 4, 16).install()
        assert float((model(ids) - want).abs().max() / want.abs().max()) < 1e-5


def test_learning_lowers_the_loss_and_leaves_weights():
    model, task, seen = tiny_llama(), tiny_task(), []
    losses = reconstruct(model, rows(task), 3, 16, [{}, {}], 20, lambda block, maps: seen.append((block.layer, maps)))
    assert [layer for layer, _ in seen] == [0, 1]
    assert all(last < 0.97 * first for first, last in losses), losses
    assert same_state(model, tiny_llama())
    assert all(float((clip - 3).abs().max()) > 0.01 for _, maps in seen for _, clip in maps.values())


def test_no_epochs_run_nothing():
    model, seen = tiny_llama(), []
    assert reconstruct(model, [], 3, 16, [{}, {}], 0, lambda block, maps: seen.extend(maps)) == []
    assert sorted(seen) == sorted(2 * ["q", "k", "v", "o", "gate", "up", "down"])
