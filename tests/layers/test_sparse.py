"""InputSparse against its formula: which channels a token reads, what comes out, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F

from netsuke.compress.quantize import quantize_linear
from netsuke.errors import NetsukeError
from netsuke.layers import sparse
from netsuke.layers.linear import Dense, halved
from netsuke.layers.packing import WIDTHS, unpack
from netsuke.layers.registry import layer_bytes, layer_from_spec
from netsuke.layers.sparse import InputSparse

O, I, R, GROUP = 37, 50, 6, 16  # noqa: E741  the house's letters: outputs, inputs, rank


def dense(bias: torch.dtype | None = torch.float32, dtype=torch.float32) -> Dense:
    rng = torch.Generator().manual_seed(5)
    weight, b = torch.randn(O, I, generator=rng), torch.randn(O, generator=rng)
    return Dense(weight.to(dtype), None if bias is None else b.to(bias))


def thin(W: torch.Tensor) -> tuple[Dense, Dense]:
    """The best factors of rank R."""
    U, S, V = torch.linalg.svd(W.double(), full_matrices=False)
    return Dense((S[:R, None] * V[:R]).float()), Dense(U[:, :R].float().contiguous())


def built(form, threshold: float, rank: bool = False, bias=torch.float32) -> tuple[InputSparse, torch.Tensor]:
    """A layer stored as `form` ("float32", "float16" or bits) and its W (O, I)."""
    source = dense(bias, getattr(torch, form) if isinstance(form, str) else torch.float32)
    if isinstance(form, int):
        source = quantize_linear(source, form, GROUP, "rtn")
    W = source.to_dense()
    make = InputSparse.from_quant if isinstance(form, int) else InputSparse.from_dense
    return make(source, threshold, *(thin(W) if rank else ())), W


def tokens(*shape: int, seed: int = 6) -> torch.Tensor:
    """Activations with a few large and many small entries, some of them exactly 0."""
    x = torch.randn(*shape, I, generator=torch.Generator().manual_seed(seed)) ** 3
    return torch.where(x.abs() < 0.01, 0, x)


def naive(layer: InputSparse, W: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, list[list[int]]]:
    """One token and one channel after the other, in float64; x (N, I) -> (N, O) and the channels chosen."""
    out, kept = [], []
    rest = None if layer.first is None else layer.second.to_dense().double() @ layer.first.to_dense().double()
    for row in x:
        chosen = [i for i in range(I) if abs(float(row[i])) * float(W[:, i].double().norm()) > layer.threshold]
        y = torch.zeros(O, dtype=torch.float64) if layer.bias is None else layer.bias.double().clone()
        for i in range(I):
            if i in chosen:
                y += W[:, i].double() * row[i].double()
            elif rest is not None:
                y += rest[:, i] * row[i].double()
        out.append(y)
        kept.append(chosen)
    return torch.stack(out), kept


FORMS = ["float32", "float16", *WIDTHS]


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_relaid_quantized_map_is_the_same_matrix(bits):
    source = quantize_linear(dense(), bits, GROUP, "rtn")
    layer = InputSparse.from_quant(source, 1.0)
    assert torch.equal(layer.to_dense(), source.to_dense())
    assert torch.equal(unpack(layer.codes, bits, O), unpack(source.codes, bits, I).T)
    assert torch.equal(layer.scales.T, source.scales) and torch.equal(layer.zeros.T, source.zeros)
    ids = torch.tensor([[O - 1, 0], [4, 4]])
    assert torch.equal(layer.rows(ids), source.rows(ids))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [False, True])
def test_one_token_reads_the_channels_of_the_rule(form, rank):
    layer, W = built(form, 4.0, rank)
    layer.counting = True
    x = tokens(1)
    y, kept = naive(layer, W, x)
    assert 5 < len(kept[0]) < I - 5
    assert layer.chosen(x)[0].nonzero().squeeze(1).tolist() == kept[0]
    torch.testing.assert_close(layer(x), y.float(), rtol=1e-5, atol=1e-4)
    assert (layer.channels_read.sum, layer.channels_read.count) == (len(kept[0]), 1)
    torch.testing.assert_close(layer.norms, W.norm(dim=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["float32", "float16", 4])
def test_channels_that_are_not_chosen_are_not_read(form):
    """The rows of all other channels are poisoned: a masked product would show it."""
    layer, W = built(form, 4.0)
    x = tokens(1)
    y, kept = naive(layer, W, x)
    others = torch.tensor([i for i in range(I) if i not in kept[0]])
    if isinstance(form, str):
        layer.weight.data[others] = math.nan
    else:
        layer.codes[others] ^= 255
    torch.testing.assert_close(layer(x), y.float(), rtol=1e-5, atol=1e-4)
    full = layer.product(x)
    assert not torch.isfinite(full).all() or (full - (y.float() - layer.bias)).abs().max() > 1  # control


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [False, True])
def test_always_chooses_for_each_token(form, rank):
    layer, W = built(form, 4.0, rank)
    x = tokens(3, 7)
    y, kept = naive(layer, W, x.flatten(0, 1))
    prompt = layer(x)
    torch.testing.assert_close(prompt, F.linear(x, W, layer.bias), rtol=1e-5, atol=1e-4)  # longer inputs are dense
    assert layer.channels_read.count == 0
    layer.always = layer.counting = True
    torch.testing.assert_close(layer(x), y.view(3, 7, O).float(), rtol=1e-5, atol=1e-4)
    assert (layer(x) - prompt).abs().max() > 0.1
    assert layer.channels_read.count == 42 and layer.channels_read.sum == 2 * sum(map(len, kept))
    assert layer.channels_read.mean == layer.channels_read.sum / 42


def test_always_leaves_the_prompt_dense():
    layer, x = built("float32", 4.0, rank=True)[0], tokens(3, 7)
    dense_all = layer(x)
    layer.always = True
    sparse_all = layer(x)
    layer.prompt, layer.counting = 2, True
    torch.testing.assert_close(layer(x), torch.cat((dense_all[:, :2], sparse_all[:, 2:]), 1), rtol=1e-5, atol=1e-5)
    assert layer.channels_read.count == 3 * 5, "only what is decoded is counted"
    layer.prompt = 9
    assert torch.equal(layer(x), dense_all)


def test_a_batch_of_single_tokens_is_sparse_row_by_row():
    layer, W = built(4, 4.0, rank=True)
    x = tokens(5, 1)
    torch.testing.assert_close(layer(x), naive(layer, W, x[:, 0])[0][:, None].float(), rtol=1e-5, atol=1e-4)
    single = torch.stack([layer(row) for row in x])
    torch.testing.assert_close(layer(x), single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [False, True])
def test_a_threshold_of_zero_is_dense(form, rank):
    layer, W = built(form, 0.0, rank)
    x, one = tokens(4), tokens(1)
    with torch.no_grad():
        prompt = layer(x)
        layer.always = layer.counting = True
        assert torch.equal(layer(x), prompt)
    assert layer.channels_read.mean == I
    assert torch.equal(layer(one), layer.product(one) + layer.bias)
    torch.testing.assert_close(layer(one), F.linear(one, W, layer.bias), rtol=1e-6, atol=2e-5)
    if form == "float32":
        assert torch.equal(layer(one), one @ layer.weight + layer.bias)


def test_a_map_of_low_rank_loses_nothing_with_its_factors():
    first, second = thin(dense(None).to_dense())
    source = Dense(second.weight @ first.weight)
    layer = InputSparse.from_dense(source, 1e30, first, second)
    assert not layer.chosen(tokens(1)).any()
    torch.testing.assert_close(layer(tokens(1)), source(tokens(1)), rtol=1e-5, atol=1e-4)
    bare = InputSparse.from_dense(source, 1e30)
    assert torch.equal(bare(tokens(1)), torch.zeros(1, O))  # nothing chosen, nothing beside it


@pytest.mark.parametrize("form", ["float16", 3])
def test_in_chunks_like_whole(form, monkeypatch):
    layer, W = built(form, 2.0)
    x, whole, dense_y = tokens(1), built(form, 2.0)[0](tokens(1)), layer(tokens(4))
    monkeypatch.setattr(sparse, "WIDENED", 3 * O)
    torch.testing.assert_close(layer(x), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(tokens(4)), dense_y, rtol=1e-5, atol=2e-5)
    assert torch.equal(layer.to_dense(), W)


def test_half_precision_inputs_and_one_vector():
    layer, W = built("float16", 4.0)
    x = tokens(1)
    y = layer(x[0].bfloat16())
    assert y.dtype == torch.bfloat16 and y.shape == (O,)
    torch.testing.assert_close(y, naive(layer, W, x.bfloat16().float())[0][0].bfloat16())


def test_gradients_reach_the_input():
    layer, W = built(4, 4.0)
    x = tokens(1).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0], W.sum(0) * layer.chosen(x.detach())[0], rtol=1e-5, atol=1e-4)


def test_own_norms_replace_the_column_norms():
    layer = InputSparse.from_dense(dense(), 0.5, norms=torch.ones(I))
    x = tokens(1)
    assert torch.equal(layer.chosen(x), x.abs() > 0.5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [False, True])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.float16])
def test_spec_rebuilds_the_layer(form, rank, bias):
    layer, W = built(form, 0.1, rank, bias)
    spec = layer.spec()
    again = layer_from_spec(spec, O, I, layer.bias is not None)
    assert again.spec() == spec and spec["kind"] == "sparse" and spec["threshold"] == layer.threshold
    assert again.bytes() == layer.bytes() == layer_bytes(spec, O, I, bias is not None)
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == layer.state_dict()[name].dtype, name
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again.to_dense(), W) and torch.equal(again(tokens(1)), layer(tokens(1)))


def test_bytes_are_those_of_the_layout():
    layer, _ = built(3, 1.0)
    assert layer.bytes() == I * 14 + 4 * O * 3 + I * 4 + O * 4  # 111 bits, 4 groups, norms, bias
    assert layer.codes.shape == (I, 14) and layer.scales.shape == layer.zeros.shape == (4, O)


def test_bfloat16_is_widened_and_halving_keeps_the_rule():
    wide = InputSparse.from_dense(dense(None, torch.bfloat16), 1.0)
    assert wide.weight.dtype == torch.float32 and torch.equal(wide.to_dense(), dense(None, torch.bfloat16).to_dense())
    layer, W = built("float32", 1.0, rank=True)
    small = halved(layer, "up")
    assert small.spec()["dtype"] == small.first.spec()["dtype"] == small.spec()["bias"] == "float16"
    assert torch.equal(small.to_dense(), W.half().float()) and torch.equal(small.norms, layer.norms)
    packed, W = built(4, 1.0, rank=True)
    assert torch.equal(halved(packed, "up").to_dense(), W) and halved(packed, "up").second.weight.dtype == torch.float16
    layer.weight.data[0, 0] = 1e5
    with pytest.raises(NetsukeError, match=r"weights of up reach 1e\+05"):
        halved(layer, "up")


def floats(**changes):
    return {
        k: v for k, v in ({"kind": "sparse", "dtype": "float32", "threshold": 1.0} | changes).items() if v != "gone"
    }


def codes(**changes):
    return floats(dtype="gone", **({"bits": 4, "group": 16} | changes))


F32 = {"kind": "dense", "dtype": "float32"}


@pytest.mark.parametrize(
    "spec, words",
    [
        (floats(threshold=-0.5), r"threshold -0\.5"),
        (floats(threshold=math.nan), "threshold nan"),
        (floats(threshold=math.inf), "threshold inf"),
        (floats(threshold=10**400), "threshold 1000"),
        (floats(threshold="1"), "threshold 1;"),
        (floats(threshold=True), "threshold True"),
        (floats(threshold="gone"), "threshold None"),
        (floats(dtype="bfloat16"), "dtype 'bfloat16'"),
        (floats(dtype="os"), "dtype 'os'"),
        (floats(dtype=["float32"]), "dtype"),
        (floats(dtype="gone"), "both dtype and bits, or neither"),
        (floats(bits=4, group=16), "both dtype and bits, or neither"),
        (floats(group=16), "with a group"),
        (codes(bits=5), "bits 5"),
        (codes(bits=4.0), r"bits 4\.0"),
        (codes(group=0), "groups of 0"),
        (codes(group="gone"), "groups of None"),
        (floats(bias="int8"), "bias of dtype 'int8'"),
        (floats(rank=0, first=F32, second=F32), "rank 0"),
        (floats(rank=O, first=F32, second=F32), f"rank {O}"),
        (floats(rank=3), "first factor is of kind 'None'"),
        (floats(first=F32, second=F32), "rank None"),
        (codes(rank=3, first=F32, second={"kind": "sparse"}), "second factor is of kind 'sparse'"),
        (floats(treshold=1.0), "unknown setting 'treshold'"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_in_one_sentence(spec, words):
    with pytest.raises(NetsukeError, match=words) as e:
        layer_from_spec(spec, O, I, True)
    assert str(e.value).count("\n") == 0 and len(str(e.value)) < 400


def test_factors_that_do_not_fit_are_refused():
    first, second = thin(dense().to_dense())
    with pytest.raises(NetsukeError, match="one factor without the other"):
        InputSparse.from_dense(dense(), 1.0, first)
    with pytest.raises(NetsukeError, match="factors of a map of 37 by 50 and a bias"):
        InputSparse.from_dense(dense(), 1.0, first, Dense(second.weight, torch.zeros(O)))
    with pytest.raises(NetsukeError, match="factors of a map of 36 by 50"):
        InputSparse.from_dense(dense(), 1.0, first, Dense(second.weight[1:]))
