"""The simulation in PyTorch computes the interpreter's integers, and its gradients are those of the float network."""

import numpy as np
import pytest
import torch

from netsuke.errors import NetsukeError
from netsuke.graph import Interpreter
from netsuke.graph.simulate import features, frontier, to_torch
from netsuke.graph.update_plan import layers
from tests.graph.small import images, residual_network


@pytest.mark.parametrize("start", [0, 5, 9])
def test_forward_is_the_interpreter_bit_for_bit(start):
    g, x = residual_network(), images(5)
    cut = [torch.from_numpy(a) for a in features(g, start, x)]
    np.testing.assert_array_equal(to_torch(g, start).codes(*cut), Interpreter(g).run(x)[0])


def test_large_sums_are_exact():
    """Weights whose sums pass 2^24 are summed in float64."""
    g = residual_network()
    op = g.ops[layers(g)[5]]
    g.tensors[op.inputs[1]].data[:] = 127
    g.tensors[op.inputs[2]].data[3] = 2_000_000_001
    x = images(3)
    np.testing.assert_array_equal(to_torch(g).codes(torch.from_numpy(x)), Interpreter(g).run(x)[0])


def test_a_cut_inside_a_residual_block_carries_both_branches():
    g = residual_network()
    names = [g.tensors[i].name for i in frontier(g, layers(g)[5])]
    assert names == ["a.pw2", "b.pw1"]


def test_gradients_are_those_of_autograd_with_straight_through_rounding():
    """The same network in real numbers through autograd; each value is moved to its integer behind autograd's back."""
    g, x = residual_network(), images(16)
    m = to_torch(g)
    for k in layers(g):
        m.weight(k).requires_grad_(True)
        m.bias(k).requires_grad_(True)
    labels = torch.arange(16) % 4
    torch.nn.functional.cross_entropy(m(torch.from_numpy(x)), labels).backward()
    params = {n: p.detach().clone().requires_grad_(True) for n, p in m.trained()}
    exact = {}
    Interpreter(g).run(x, on_op=lambda k, outs: exact.update({k: torch.from_numpy(outs[0]).double()}))
    values = {g.inputs[0]: torch.from_numpy(x).double().permute(0, 3, 1, 2)}
    for k, (op, module) in enumerate(zip(g.ops, m.operators)):
        y = g.tensors[op.outputs[0]]
        a = values[op.inputs[0]]
        if op.kind in ("conv2d", "depthwise2d"):
            w, b = (params.get(f"{n}{k}", m.params[f"{n}{k}"]) for n in ("weight", "bias"))
            total = torch.nn.functional.conv2d(
                a - module.zero_x, w.double(), b, module.stride, module.padding, groups=module.groups
            )
            out = total * module.ratio.reshape(1, -1, 1, 1) + y.zero
        elif op.kind == "add":
            out = (a - module.za) * module.ea + (values[op.inputs[1]] - module.zb) * module.eb + y.zero
        elif op.kind == "avgpool2d":
            out = a.mean((2, 3), keepdim=True)
        else:
            out = a.flatten(1)
        q = exact[k].permute(0, 3, 1, 2) if exact[k].ndim == 4 else exact[k]
        values[op.outputs[0]] = torch.where((q > -128) & (q < 127), out + (q - out).detach(), q)
    y = g.tensors[g.outputs[0]]
    logits = (values[g.outputs[0]] - y.zero) * float(y.scale)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    for name, p in m.trained():
        a, b = p.grad.double().flatten(), params[name].grad.double().flatten()
        assert float((a - b).norm() / b.norm()) < 1e-4, name


def test_write_back_gives_the_network_that_was_simulated():
    g, x = residual_network(), images(4)
    m = to_torch(g)
    with torch.no_grad():
        m.weight(layers(g)[5]).add_(torch.randn(m.weight(layers(g)[5]).shape) * 9)
        m.bias(layers(g)[8]).add_(37.4)
    np.testing.assert_array_equal(Interpreter(m.write_back()).run(x)[0], m.codes(torch.from_numpy(x)))


def test_an_operator_without_gradient_is_named():
    g = residual_network()
    g.ops[-1].kind = "softmax"
    with pytest.raises(NetsukeError, match=r"'logits' \(softmax\) has no gradient"):
        to_torch(g)


def test_an_uneven_padding_is_named():
    g = residual_network()
    g.ops[2].attrs["pad"] = (0, 2, 0, 2)
    with pytest.raises(NetsukeError, match=r"'a\.dw' is padded"):
        to_torch(g)
