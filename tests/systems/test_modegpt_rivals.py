"""The rivals are fair: same widths, same parameters, and exact where nothing of weight is lost."""

import torch

from netsuke.compress import modegpt
from netsuke.models.llama import LINEARS, LlamaConfig, random_llama
from netsuke.systems.modegpt_rivals import pruned_by_norm, svd_each


class Tokens:
    """Rows of random tokens as a task."""

    rows = torch.randint(61, (8, 33), generator=torch.Generator().manual_seed(5))

    def batches(self, split, limit=None):
        yield from self.rows.split(4)[:limit]

    def loss(self, model, batch):
        return torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


CFG = LlamaConfig.uniform(2, 48, vocab=61, width=32, heads=4, kv_heads=2, head_dim=8, context=64)
IDS = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(9))


def test_norm_pruning_drops_weightless_parts_exactly_and_has_the_same_widths():
    model = random_llama(CFG, 0, std=0.15)
    for block in model.blocks:
        for weight in (block.gate.weight, block.up.weight, block.down.weight.T):
            weight[::2] = 0
        for rows in (block.q.weight.view(4, 8, 32), block.k.weight.view(2, 8, 32)):
            rows[:, [1, 5]] = 0
        block.o.weight.view(32, 4, 8)[..., 3] = 0
    shares = ((0.5, 0.25, 0.125),) * 2
    small = pruned_by_norm(model, shares)
    torch.testing.assert_close(small(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    knobs = modegpt.MoDeGPT()
    assert small.cfg == modegpt.apply_cuts(model, modegpt.calibrate(model, Tokens(), 8), shares, knobs).cfg


def test_svd_keeps_the_rank_that_the_parameters_allow_and_whitening_helps_the_first_layer():
    model, task = random_llama(CFG, 0, std=0.15), Tokens()
    plain, whitened = svd_each(model, 0.4), svd_each(model, 0.4, task, windows=8)
    for layer in range(2):
        for name in LINEARS:
            old = model.get_submodule(f"blocks.{layer}.{name}")
            allowed = int(0.6 * old.outs * old.ins / (old.outs + old.ins))
            for other in (plain, whitened):
                weight = other.get_submodule(f"blocks.{layer}.{name}").to_dense().double()
                assert int(torch.linalg.matrix_rank(weight, rtol=1e-5)) == allowed
    x = model.blocks[0].attn_norm(model.embed.rows(task.rows[:, :-1]))
    errors = [(m.blocks[0].q(x) - model.blocks[0].q(x)).norm() for m in (plain, whitened)]
    assert errors[1] < errors[0]
