"""Every pair of methods, in the order in which they are meant to follow one another, composes on every kind of model, or
refuses with a sentence that names what is in the way.

The order: a smaller model from a larger one, narrower blocks, thin factors, fewer bits (one of three ways), unread weights,
healing.
"""

import itertools
import json

import pytest
import torch

from netsuke.compress.method import registry
from netsuke.errors import NetsukeError
from netsuke.models.load import load
from netsuke.models.save import save_artifact
from tests.compress.test_contract import SAMPLES
from tests.models.test_experts import mixture
from tests.tiny import same_state, tiny_llama, tiny_task

ORDER = ("inherit", "modegpt", "factorize", "quantize", "zeroqat", "mobilequant", "sparsify", "heal")
MODELS = {"dense": tiny_llama, "heads with own keys": lambda: tiny_llama(kv_heads=4), "experts": mixture}
# What cannot follow or be treated at all; everything else must compose. A row that is wrong fails the test.
REFUSED = {
    ("experts", "inherit"), ("experts", "modegpt"), ("experts", "zeroqat"), ("experts", "mobilequant"),
    ("factorize", "zeroqat"), ("factorize", "mobilequant"), ("factorize", "sparsify"),
    ("quantize", "zeroqat"), ("quantize", "mobilequant"), ("zeroqat", "mobilequant"),
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:(sparsify|modegpt|factorize)")


@pytest.fixture(scope="module")
def task():
    return tiny_task()


@pytest.fixture(scope="module")
def first(task):
    """The result of a method on a model, made once, or the sentence that refused it."""
    done = {}

    def get(name, kind):
        if (name, kind) not in done:
            try:
                done[name, kind] = registry()[name](**SAMPLES[name][0]).apply(MODELS[kind](), task)
            except NetsukeError as e:
                done[name, kind] = str(e)
        return done[name, kind]

    return get


def test_the_order_holds_all_methods():
    assert sorted(ORDER) == sorted(registry())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("one, two", list(itertools.combinations(ORDER, 2)))
def test_pair(one, two, kind, first, task, tmp_path):
    made = first(one, kind)
    if isinstance(made, str):
        assert (kind, one) in REFUSED, made
        return
    method = registry()[two](**SAMPLES[two][0])
    try:
        both = method.apply(made, task)
    except NetsukeError as e:
        assert (kind, two) in REFUSED or (one, two) in REFUSED, str(e)
        assert "blocks." in str(e) or "embed" in str(e), "the sentence names the layer"
        return
    assert (kind, two) not in REFUSED and (one, two) not in REFUSED
    ids = task.windows("validation")[:2, :-1]
    with torch.no_grad():
        assert both(ids).isfinite().all()
    steps = [registry()[n](**SAMPLES[n][0]).to_json() for n in (one, two)]
    again = load(save_artifact(tmp_path / "both", both, None, {"methods": json.loads(json.dumps(steps))}, {})).model
    with torch.no_grad():
        assert same_state(again, both) and torch.equal(again(ids), both(ids))
