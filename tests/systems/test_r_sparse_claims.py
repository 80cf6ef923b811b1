"""The claims of R-Sparse: well-formed, measured on stories260K where it is there, controls that fail."""

import pytest
import torch

from netsuke.claims import run_claim
from netsuke.compress.sparse_channels import block_maps, total
from netsuke.data.catalogue import missing
from netsuke.systems import r_sparse, r_sparse_cases
from netsuke.systems.modegpt_cases import STORIES, STORIES_FILES, Case
from tests.tiny import tiny_llama, tiny_task

NO_STORIES = missing(STORIES_FILES)
with_stories = pytest.mark.skipif(bool(NO_STORIES), reason=f"NETSUKE_DATA lacks {', '.join(NO_STORIES)}")
pytestmark = pytest.mark.filterwarnings("ignore:sparsify")


def test_every_claim_can_be_judged_or_says_why_not():
    assert len({c.text for c in r_sparse.CLAIMS}) == len(r_sparse.CLAIMS)
    for claim in r_sparse.CLAIMS:
        assert bool(claim.measure) != bool(claim.why)
        assert claim.measure is None or claim.bar


def test_without_models_and_data_nothing_is_judged(monkeypatch):
    monkeypatch.delenv("NETSUKE_DATA", raising=False)
    rows = [run_claim(c, True) for c in r_sparse.CLAIMS if "kernel" not in c.text and "decoding end" not in c.text]
    assert len(rows) >= 12 and {r["verdict"] for r in rows} == {"cannot be shown"}


@with_stories
def test_every_token_is_sparse_and_the_released_way_flatters():
    got = r_sparse.perplexity([STORIES], 0.4, "1", 1.5, True)
    values = got.values[STORIES]
    assert got.met and 1.05 < values["released_evaluation"] + 0.05 < values["ratio"]
    assert values["traffic_saved"] == pytest.approx(0.4, abs=0.01)


@with_stories
def test_rivals_lose_and_pure_low_rank_is_the_control():
    assert r_sparse.rivals([STORIES], True).met
    assert r_sparse.rivals([STORIES], True, ours="0").met is False


@with_stories
def test_realised_sparsity_and_the_paper_s_calibration():
    assert r_sparse.realised([STORIES], True).met
    assert r_sparse.realised([STORIES], True, how="paper").met is False


@with_stories
def test_exactness_and_its_control():
    assert r_sparse.exactness([STORIES], True).met
    assert r_sparse.exactness([STORIES], True, spoiled=True).met is False


@pytest.fixture
def tiny_case(monkeypatch):
    """Stands a random model in for the real ones."""
    case = Case(tiny_llama(hidden=80, width=64, heads=4, head_dim=16), tiny_task(), 8, (), {"test": 2})
    for module in (r_sparse, r_sparse_cases):
        monkeypatch.setattr(module, "case_of", lambda name, quick: case)
    yield case
    for cached in ("found", "sparse_model", "four_bits", "scored", "dense_score", "released_ratio", "rival_ratio"):
        getattr(r_sparse_cases, cached).cache_clear()


def test_output_sided_skipping_reads_as_little(tiny_case):
    """Units are cut to the share of the traffic that is asked for, by ReLU's zeros first."""
    sparsity, zeros = 0.3, {}
    for relu in (True, False):
        model = tiny_llama(hidden=80, width=64, heads=4, head_dim=16)
        r_sparse_cases.output_sided(model, tiny_case, sparsity, relu)
        seen = []
        for block in model.blocks:
            block.down.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][:, 1:] == 0))
        with torch.no_grad():
            tiny_case.task.score(model, "train")
        zeros[relu] = float(torch.cat(seen).float().mean())
    sizes = {n.rpartition(".")[2]: m.outs * m.ins for n, m in block_maps(tiny_case.model).items()}
    share = sparsity * sum(sizes.values()) / (sizes["up"] + sizes["down"])
    assert zeros[False] == pytest.approx(share, abs=0.05) and zeros[True] == pytest.approx(share, abs=0.05)


def test_rival_weights_are_really_gone(tiny_case):
    for rival in ("magnitude", "wanda", "relu", "cats"):
        assert r_sparse_cases.rival_ratio(r_sparse.WIDE, 0.4, rival, True) > 0
    assert r_sparse_cases.rival_ratio(r_sparse.WIDE, 0.0, "cats", True) == pytest.approx(1, abs=0.01)


def test_search_and_low_bits_are_measured(tiny_case):
    got = r_sparse.searched_recipe([r_sparse.WIDE], 0.5, True)
    values = got.values[r_sparse.WIDE]
    assert set(values["recipe"]) == set(block_maps(tiny_case.model)) and len(values["trials"]) == 3
    bits = r_sparse.low_bits([r_sparse.WIDE], True)
    assert bits.values[r_sparse.WIDE]["saved"] == pytest.approx(0.5, abs=0.03)
    assert total(r_sparse_cases.scored(r_sparse.WIDE, 0.5, "1", True)[1]).sparsity == pytest.approx(0.5, abs=0.03)


def test_factors_of_noise_cost_what_factors_cost():
    sparse = r_sparse.InputSparse.from_dense(r_sparse.Dense(torch.randn(256, 128)), 8.0)
    split = r_sparse.with_random_factors(sparse)
    channels, rank = r_sparse.divide(256, 128, 0.5, 0.95)
    assert split.first.outs == rank and split.threshold > sparse.threshold and torch.equal(split.weight, sparse.weight)
    assert channels * 256 + rank * 384 == pytest.approx(0.5 * 256 * 128)
