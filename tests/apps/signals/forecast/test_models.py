"""The models compute what the paper says, folded or step by step, and count their numbers honestly."""

import numpy as np
import pytest
import torch

from netsuke.apps.signals.forecast import fold
from netsuke.apps.signals.forecast.models import DLinear, Fits, MixLinearNet, OneLayer, SparseTSF, parameters
from netsuke.apps.signals.forecast.training import Plan, errors, fit, seeded
from netsuke.errors import NetsukeError
from tests.apps.signals.forecast.data import EXACT, ODD, SMALL, meters


@pytest.mark.parametrize("shape", [SMALL, ODD, EXACT], ids=["padded", "odd period", "squares"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("smoothed", [True, False])
def test_folded_is_what_is_published(shape, alpha, smoothed):
    net = seeded(lambda: MixLinearNet(shape, alpha, min(3, shape.n), smoothed), 1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))  # imaginary parts too
    x = torch.randn(5, shape.lookback, generator=torch.Generator().manual_seed(2)) + 3
    y = net(x)
    assert y.shape == (5, shape.horizon)
    assert torch.allclose(y, net.published(x), atol=2e-5)
    a1, a2, w1, w2, kernel = net.arrays()
    matrix = alpha * fold.time_matrix(a1, a2, shape) + (1 - alpha) * fold.frequency_matrix(w1, w2, shape)
    assert np.abs(fold.forecast(x.double().numpy(), matrix, kernel, shape) - y.detach().numpy()).max() < 2e-5


def test_all_bins_and_the_full_transform_are_used():
    """With lpf = n the first bins' mirror images count too: a half transform could not tell them apart."""
    net = seeded(lambda: MixLinearNet(SMALL, 0.0, SMALL.n, False), 0)
    x = torch.randn(3, SMALL.lookback, generator=torch.Generator().manual_seed(0))
    before = net(x)
    with torch.no_grad():
        net.w1[:, SMALL.n - 1] += 1.0
    assert not torch.allclose(net(x), before, atol=1e-3)
    assert torch.allclose(net(x), net.published(x), atol=1e-5)


@pytest.mark.parametrize(
    ("horizon", "alpha", "lpf", "complex_once", "real"),
    [(96, 0.95, 1, 59, 69), (192, 0.95, 5, 87, 113), (336, 0.99, 2, 105, 137), (720, 0.99, 19, 195, 293), (96, 0.5, 19, 95, 141)],
)  # fmt: skip
def test_parameter_counts_are_those_of_the_scripts(horizon, alpha, lpf, complex_once, real):
    net = MixLinearNet(fold.Shape(720, horizon, 24), alpha, lpf)
    assert parameters(net) == real
    assert real - sum(p.numel() // 2 for n, p in net.named_parameters() if n.startswith("w")) == complex_once


def test_rivals_have_their_sizes_and_shapes():
    shape = fold.Shape(720, 96, 24)
    x = torch.randn(3, 720, generator=torch.Generator().manual_seed(0))
    sizes = {}
    for net in (SparseTSF(shape), Fits(shape), DLinear(shape), OneLayer(shape)):
        assert net(x).shape == (3, 96)
        sizes[type(net).__name__] = parameters(net)
    assert sizes == {"SparseTSF": 145, "Fits": 11808, "DLinear": 138432, "OneLayer": 69120}


def test_fits_continues_what_its_bins_can_say():
    """With the map that keeps every frequency in place, a sine of whole cycles goes on as itself."""
    shape = fold.Shape(48, 24, 12)
    net = Fits(shape)
    with torch.no_grad():
        net.weight.zero_()
        for k in range(net.weight.shape[1]):  # bin k of 48 rows is bin 1.5 k of 72
            if 3 * k % 2 == 0 and 3 * k // 2 < net.weight.shape[0]:
                net.weight[3 * k // 2, k, 0] = 1.0
    t = torch.arange(72) * 2 * torch.pi / 12
    wave = torch.sin(t)[None]
    assert torch.allclose(net(wave[:, :48]), wave[:, 48:], atol=1e-4)


def test_one_loop_trains_stops_early_and_keeps_the_best():
    x = meters(900)
    x = (x - x.mean(0)) / x.std(0)
    shape = fold.Shape(120, 24, 24)
    nets = {
        "mix": MixLinearNet(shape, 0.5, 2), "sparse": SparseTSF(shape), "one": OneLayer(shape), "fits": Fits(shape)
    }  # fmt: skip
    for name, net in nets.items():
        before = errors(net, x[480:], shape)[0]
        done = fit(net, x[:600], x[480:], shape, Plan(rate=0.01, epochs=6, patience=2, batch=64))
        assert done["validation"] == pytest.approx(errors(net, x[480:], shape)[0], rel=1e-6), name
        assert done["validation"] < before, name


def test_training_is_deterministic_and_loses_no_batch():
    x = meters(300)
    shape = fold.Shape(48, 24, 24)
    made = []
    for _ in range(2):
        net = seeded(lambda: MixLinearNet(shape, 1.0, 1), 3)
        steps = []
        fit(net, x[:229], x[150:], shape, Plan(epochs=2, batch=50, seed=3), on_step=lambda s, of: steps.append((s, of)))  # noqa: B023
        made.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*made)
    assert steps[-1] == (8, 8)  # 158 windows: three batches of 50 and one of 8, twice


def test_errors_count_every_window():
    x = np.arange(60, dtype=float)[:, None]
    shape = fold.Shape(20, 5, 5)

    class Zero(torch.nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 5)

    truth = np.concatenate([x[s + 20 : s + 25] for s in range(36)])
    mse, mae = errors(Zero(), x, shape, batch=7)
    assert mse == pytest.approx(np.mean(truth**2)) and mae == pytest.approx(np.mean(truth))


@pytest.mark.parametrize(
    ("alpha", "lpf", "word"), [(0.5, 0, "lpf"), (0.5, 31, "lpf"), (-0.1, 2, "alpha"), (1.5, 2, "alpha")]
)
def test_settings_outside_are_refused(alpha, lpf, word):
    with pytest.raises(NetsukeError, match=word):
        MixLinearNet(fold.Shape(720, 96, 24), alpha, lpf)
