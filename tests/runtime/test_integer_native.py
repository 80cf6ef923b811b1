"""The integer decoder in C against the NumPy reference: the same logits, bit for bit, on every build of it that runs here."""

import numpy as np
import pytest

from netsuke.errors import NetsukeError
from netsuke.graph.host import VECTORS, best_vectors, load_library
from netsuke.runtime.integer import IntegerModel
from netsuke.runtime.integer_native import NativeInteger
from netsuke.train.mobilequant import MobileQuant
from tests.runtime.test_integer import MODELS
from tests.tiny import tiny_llama, tiny_task

IDS = np.random.default_rng(0).integers(0, 96, 50)


def available() -> list[int]:
    try:
        levels = list(range(best_vectors() + 1))
        for level in levels:
            load_library(VECTORS[level].replace("_mcu", "_integer"))
    except NetsukeError:
        return []
    return levels


def static(kind, **knobs):
    make, fixed = MODELS[kind]
    return MobileQuant(calibration=8, learn="off", **fixed | knobs).apply(make(), tiny_task())


LEVELS = available()
pytestmark = [
    pytest.mark.skipif(not LEVELS, reason="this installation lacks the integer decoder's library"),
    pytest.mark.filterwarnings("ignore:mobilequant"),  # grouped queries, on purpose
]


@pytest.fixture(scope="module", params=[k for k in MODELS if k != "some sites wider"])
def integer(request):
    return IntegerModel.of_model(static(request.param))


@pytest.mark.parametrize("vectors", LEVELS)
def test_the_same_logits_whole_and_in_pieces(integer, vectors):
    want = integer.forward(IDS)
    native = NativeInteger(integer, vectors)
    assert np.array_equal(native.forward(IDS, every=True), want)
    native.forget()
    parts = [native.forward(part, every=True) for part in (IDS[:7], IDS[7:8], IDS[8:])]
    assert np.array_equal(np.concatenate(parts), want)
    native.forget()
    assert np.array_equal(native.forward(IDS), want[-1:])


def test_a_sliding_window():
    integer = IntegerModel.of_model(MobileQuant(calibration=8, learn="off").apply(tiny_llama(window=6), tiny_task()))
    assert np.array_equal(NativeInteger(integer).forward(IDS, every=True), integer.forward(IDS))


def test_the_same_text():
    integer = IntegerModel.of_model(static("w4a8"))
    native = NativeInteger(integer)
    for _ in range(2):  # the second time after a sequence
        assert list(native.generate([5, 17, 40], 40)) == list(integer.generate([5, 17, 40], 40))


def test_extreme_codes_saturate_alike():
    """Ranges far too narrow: sums run into every limit."""
    model = static("w8a8")
    for block in model.blocks:
        block.sites = {s: type(g)(g.scale / 50, g.zero, g.bits) for s, g in block.sites.items()}
    integer = IntegerModel.of_model(model)
    assert np.array_equal(NativeInteger(integer).forward(IDS, every=True), integer.forward(IDS))


def test_sites_that_must_be_narrow_are_refused_by_name():
    with pytest.raises(NetsukeError, match=r"blocks\.0\.\w+ has 16 bits"):
        NativeInteger.of_model(static("some sites wider"))
    native = NativeInteger.of_model(static("w8a8"))
    for ids in ([], [96], [-1], list(range(65))):
        with pytest.raises(NetsukeError, match="run a model in integers"):
            native.forward(ids)
