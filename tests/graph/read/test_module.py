"""PyTorch modules as graphs: the same numbers, one transpose, and refusals that name module and operator."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netsuke.errors import NetsukeError
from netsuke.graph import Interpreter
from netsuke.graph.read.module import from_torch


def settle(module):
    """Random norms, so that folding them is seen; evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for m in module.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_(generator=generator)
            m.running_var.uniform_(0.5, 2, generator=generator)
    return module.eval()


def compare(module, x):
    graph = from_torch(module, x[:1])
    with torch.no_grad():
        want = module(x)
    want = want if isinstance(want, tuple) else (want,)
    got = Interpreter(graph).run(x.numpy())
    assert len(got) == len(want)
    for g, w in zip(got, want):
        assert g.shape == tuple(w.shape) and np.abs(g - w.numpy()).max() < 1e-5
    return graph


class Mobile(nn.Module):
    """An inverted residual with squeeze and excitation behind a stem, and a classifier on a flattened image."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU6(inplace=True))
        self.depth = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.Hardsigmoid()
        )
        self.project = nn.Conv2d(16, 8, 1)
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8 * 3 * 2, 5))

    def forward(self, x):
        x = self.stem(x)
        y = self.depth(self.expand(x))
        y = self.project(y * self.gate(y))
        y += x
        return self.head(y)


def test_a_mobile_network_needs_one_transpose_and_no_norm():
    torch.manual_seed(0)
    module = settle(Mobile())
    before = copy.deepcopy(module.state_dict())
    graph = compare(module, torch.randn(3, 3, 12, 8))
    kinds = [op.kind for op in graph.ops]
    assert kinds.count("transpose") == 1 and kinds[0] == "transpose" and kinds.count("depthwise2d") == 1
    assert graph.tensors[graph.inputs[0]].shape == (1, 3, 12, 8)
    expand = next(op for op in graph.ops if op.name == "expand.0")
    assert (expand.attrs["low"], expand.attrs["high"]) == (0.0, 6.0)
    assert {"stem.0.weight", "head.3.weight"} <= {t.name for t in graph.tensors}
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


class Many(nn.Module):
    """Operators of every family, six outputs."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(4, 6, 3, padding="same", dilation=2)
        self.norm = nn.BatchNorm1d(6 * 20)
        self.line = nn.Conv1d(6, 3, 3, stride=2, padding=1)
        self.last = nn.Linear(5, 2, bias=False)

    def forward(self, x):
        x = F.leaky_relu(self.c(x), 0.2)
        a = F.avg_pool2d(x, 2, padding=1)
        b = self.line(F.elu(x).flatten(2)).transpose(1, 2).mean(1)
        c = self.norm(torch.flatten(F.silu(x), 1)).view(-1, 10, 12).softmax(1)
        d = 1.5 - torch.cat([x, 2 * x, -x], 1).permute(0, 2, 3, 1).clamp(-0.5, 0.7)
        e = self.last(F.pad(x, (0, 1, 1, 0))[..., 1:]).squeeze().tanh()
        return a, b, c, d, e, (x / 3).sigmoid() * x.mean((2, 3), keepdim=True)


def test_operators_of_every_family_equal_pytorch():
    torch.manual_seed(1)
    graph = compare(settle(Many()), torch.randn(1, 4, 4, 5))
    assert len(graph.outputs) == 6


def test_sequences_and_plain_features():
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv1d(3, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(80, 4)
    )
    graph = compare(settle(net), torch.randn(2, 3, 20))
    assert [op.kind for op in graph.ops if op.kind not in ("reshape", "transpose")] == ["conv2d", "maxpool2d", "dense"]
    graph = compare(
        settle(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))), torch.randn(4, 6)
    )
    assert [op.kind for op in graph.ops] == ["dense", "unary", "dense"]


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    "module, shape, says",
    [
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (1, 4), "'1'.*layer_norm"),
        (nn.Sequential(nn.GELU()), (1, 4), "'0'.*tanh"),
        (Branches(), (1, 4), "torch.export cannot trace"),
        (nn.Sequential(nn.MaxPool2d(2, ceil_mode=True)), (1, 1, 5, 5), "'0'.*ceil_mode"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(3)), (1, 1, 8, 8), "'0'.*does not divide"),
        (nn.Sequential(nn.AvgPool2d(9)), (1, 1, 8, 8), "export cannot trace"),
        (nn.Sequential(nn.ReflectionPad2d(1)), (1, 1, 8, 8), "'0'.*zeros"),
        (nn.Linear(4, 2), (4,), "batch axis"),
    ],
)
def test_refusals(module, shape, says):
    with pytest.raises(NetsukeError, match=says):
        from_torch(module, torch.zeros(shape))


def test_weights_that_are_not_finite_are_named():
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].weight.data[0, 0] = float("nan")
    with pytest.raises(NetsukeError, match=r"0\.weight.*NaN"):
        from_torch(net, torch.zeros(1, 2))
