"""Factors in a user's own network: linear maps, convolutions, what is left alone, and files that need no netsuke."""

import pytest
import torch
from torch import nn

from netsuke.compress.factorize import Factorize
from netsuke.compress.plain import Plain
from netsuke.errors import NetsukeError


class Photo(nn.Module):
    """Convolutions with strides, dilation and bias, a grouped one, linear maps."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.b = nn.Conv2d(16, 24, 3, dilation=2, padding="same", bias=False, padding_mode="reflect")
        self.c = nn.Conv2d(24, 24, 3, groups=24)
        self.up = nn.ConvTranspose2d(24, 8, 2)
        self.fc = nn.Linear(8, 30)
        self.out = nn.Linear(30, 30)

    def forward(self, x):
        x = self.up(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        return self.out(torch.relu(self.fc(x.mean((2, 3)))))


class Conv1D(nn.Module):
    """The form of GPT-2's linear map: weight (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def seeded(kind):
    torch.manual_seed(0)
    return kind()


def truncate(weight, rank):
    u, s, vt = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vt[:rank]).view(weight.shape)


def test_factors_compute_what_the_truncated_weights_do():
    model, x = seeded(Photo), torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    thin = Factorize(rank=5, solver="svd").apply(model)
    with torch.no_grad():
        for name in ("a", "b", "fc", "out"):
            part = model.get_submodule(name)
            part.weight.copy_(
                truncate(part.weight, 5) if isinstance(thin.get_submodule(name), nn.Sequential) else part.weight
            )
        torch.testing.assert_close(thin(x), model(x), rtol=1e-4, atol=1e-5)
    assert isinstance(thin.b, nn.Sequential) and isinstance(thin.out, nn.Sequential)
    assert {type(m) for m in thin.modules()} <= {Photo, nn.Sequential, nn.Conv2d, nn.ConvTranspose2d, nn.Linear}


def test_the_table_lists_what_is_left_and_counts_kernels():
    rows = {r.name: r for r in Factorize(rank=9, solver="svd").plan(seeded(Photo))}
    assert rows["a"].break_even == pytest.approx(27 * 16 / (27 + 16))  # with the kernel: in · k² = 27
    assert rows["b"].rank == 9 and (rows["b"].outs, rows["b"].ins) == (24, 144)
    assert rows["b"].after == 9 * (24 + 144) < rows["b"].before == 24 * 144
    assert "24 groups" in rows["c"].why and "transposed" in rows["up"].why
    assert rows["fc"].rank is None and "would not pay" in rows["fc"].why


def test_gpt2_s_linear_map_is_read_as_it_is_stored():
    model, x = seeded(lambda: nn.Sequential(Conv1D(40, 32), nn.ReLU())), torch.randn(3, 32)
    thin = Factorize(rank=4, solver="svd").apply(model)
    near = truncate(model[0].weight.detach().T, 4)
    torch.testing.assert_close(thin(x), torch.relu(x @ near.T + model[0].bias), rtol=1e-4, atol=1e-4)


def test_attention_and_shared_weights_are_left_alone():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
            self.head.weight = self.table.weight
            self.attention = nn.MultiheadAttention(16, 2)
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.second.weight = self.first.weight
            self.free = nn.Linear(16, 16)

    plain = Plain(seeded(Text))
    assert list(plain.parts) == ["free"]
    assert "shares its weight with the table" in plain.skipped["head"]
    assert "first and second share" in plain.skipped["second"] == plain.skipped["first"]
    assert "reads its weights by name" in plain.skipped["attention"]


def test_whitening_sees_the_inputs_of_linear_maps():
    class Rows:
        metric, higher_is_better = "loss", False

        def batches(self, split, limit=None):
            rng = torch.Generator().manual_seed(0)
            yield from (torch.randn(64, 20, generator=rng) * torch.logspace(0, -2, 20) for _ in range(limit or 4))

        def loss(self, model, batch):
            return model(batch).square().mean()

    model, task = seeded(lambda: nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20))), Rows()
    x = torch.cat(list(task.batches("test")))
    errors = {}
    for solver in ("svd", "whitened-svd"):
        thin = Factorize(rank=4, solver=solver, only=("0",)).apply(model, task)
        with torch.no_grad():
            errors[solver] = float((thin[0](x) - model[0](x)).norm() / (model[0](x) - model[0].bias).norm())
    assert errors["whitened-svd"] < 0.7 * errors["svd"]
    tuned = Factorize(rank=4, solver="svd", finetune=5).apply(model, task)
    assert not any(p.requires_grad for p in tuned.parameters())


def test_files_need_no_netsuke(tmp_path):
    thin = Factorize(rank=5, solver="svd").apply(seeded(Photo))
    torch.save(thin.state_dict(), tmp_path / "thin.pt")
    again = torch.load(tmp_path / "thin.pt", weights_only=True)
    assert {"b.0.weight", "b.1.weight", "out.0.weight", "out.1.bias"} <= again.keys()


def test_a_single_map_has_no_place_for_two():
    with pytest.raises(NetsukeError, match="a single linear map"):
        Factorize(rank=2, solver="svd").apply(nn.Linear(16, 16))
