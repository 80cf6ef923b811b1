"""LowRank: two thin maps stand for one, in any precision, and are refused where they cannot."""

import pytest
import torch
import torch.nn.functional as F

from netsuke.compress.quantize import quantize_linear
from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense, halved
from netsuke.layers.lowrank import LowRank
from netsuke.layers.registry import layer_bytes, layer_from_spec

O, I, R = 40, 56, 9  # noqa: E741  the house's letters: outputs, inputs, rank


def factors(bits: int | None = None, bias: bool = True, dtype=torch.float32):
    rng = torch.Generator().manual_seed(2)
    first = Dense(torch.randn(R, I, generator=rng).to(dtype))
    second = Dense(torch.randn(O, R, generator=rng).to(dtype), torch.randn(O, generator=rng) if bias else None)
    if bits is None:
        return first, second
    return quantize_linear(first, bits, 16, "rtn"), quantize_linear(second, bits, 16, "rtn")


@pytest.mark.parametrize("bits", [None, 3, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_product_of_its_factors(bits, bias):
    first, second = factors(bits, bias)
    layer = LowRank(first, second)
    W = second.to_dense() @ first.to_dense()
    x = torch.randn(2, 3, I, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer(x), F.linear(x, W, second.bias), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.to_dense(), W)
    ids = torch.tensor([[0, O - 1], [3, 3]])
    torch.testing.assert_close(layer.rows(ids), W[ids])
    assert layer.macs() == R * (O + I)
    assert layer.bytes() == first.bytes() + second.bytes()
    assert layer.bias is second.bias


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_spec_rebuilds_the_layer(bits, bias):
    layer = LowRank(*factors(bits, bias))
    spec = layer.spec()
    assert spec["kind"] == "lowrank" and spec["rank"] == R
    again = layer_from_spec(spec, O, I, bias)
    assert again.spec() == spec and again.bytes() == layer.bytes() == layer_bytes(spec, O, I, bias)
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again.to_dense(), layer.to_dense())
    names = {"first.weight", "second.weight"} if bits is None else {
        f"{f}.{t}" for f in ("first", "second") for t in ("codes", "scales", "zeros")
    }  # fmt: skip
    assert layer.state_dict().keys() == names | ({"second.bias"} if bias else set())


def test_halved_are_its_dense_factors():
    first, second = factors()
    small = halved(LowRank(first, quantize_linear(second, 8, 16, "rtn")), "down")
    assert small.first.weight.dtype == torch.float16 and torch.equal(small.first.weight, first.weight.half())
    assert small.second.spec()["kind"] == "quant"
    first.weight.data[0, 0] = 1e6
    with pytest.raises(NetsukeError, match=r"down\.first reach 1e\+06"):
        halved(LowRank(first, second), "down")


def lowrank(**changes):
    dense = {"kind": "dense", "dtype": "float32"}
    return {"kind": "lowrank", "rank": R, "first": dense, "second": dense} | changes


DEEP = lowrank()
for _ in range(3000):
    DEEP = lowrank(first=DEEP)


@pytest.mark.parametrize(
    "spec, words",
    [
        (lowrank(rank=0), "rank 0"),
        (lowrank(rank=-3), "rank -3"),
        (lowrank(rank=O), f"rank {O} for a map of {O} by {I}"),
        (lowrank(rank=10**30), "rank 1000"),
        (lowrank(rank=2.0), r"rank 2\.0"),
        (lowrank(rank=True), "rank True"),
        ({"kind": "lowrank"}, "rank None"),
        (lowrank(first=None), "the first factor is of kind 'None'"),
        (lowrank(second={"kind": ["dense"]}), "the second factor"),
        (DEEP, "the first factor is of kind 'lowrank'"),
        (lowrank(second={"kind": "dense", "dtype": "os"}), "dtype 'os'"),
        (lowrank(second={"kind": "quant", "bits": 5, "group": 8}), "5 bits"),
        (lowrank(ranks=3), "unknown setting 'ranks'"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_in_one_sentence(spec, words):
    with pytest.raises(NetsukeError, match=words) as e:
        layer_from_spec(spec, O, I, False)
    assert str(e.value).count("\n") == 0 and len(str(e.value)) < 500


def test_the_largest_and_smallest_ranks_are_allowed():
    for rank in (1, min(O, I) - 1):
        assert layer_from_spec(lowrank(rank=rank), O, I, True).rank == rank


def test_factors_that_do_not_fit_are_refused():
    first, second = factors()
    with pytest.raises(NetsukeError, match="56 inputs"):
        LowRank(first, Dense(torch.zeros(O, I)))
    with pytest.raises(NetsukeError, match="first factor has a bias"):
        LowRank(Dense(first.weight, torch.zeros(R)), second)
    with pytest.raises(NetsukeError, match="first factor is a LowRank"):
        LowRank(LowRank(first, second), second)
