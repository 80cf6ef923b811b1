"""The claims of configurable foundation models: well-formed, their arithmetic, and all of them on a random model."""

import pytest
import torch

from netsuke.claims import run_claim
from netsuke.data.domains import DOMAINS
from netsuke.models.load import Loaded
from netsuke.systems import configurable_fm as system
from netsuke.systems import configurable_fm_cases as cases
from netsuke.systems import configurable_fm_plugins as plugins
from tests.tiny import Letters, tiny_llama

NAME = "tiny"


def test_every_claim_can_be_judged_or_says_why_not():
    assert len({c.text for c in system.CLAIMS}) == len(system.CLAIMS)
    for claim in system.CLAIMS:
        assert bool(claim.measure) != bool(claim.why)
        assert claim.measure is None or claim.bar


def test_without_models_and_data_nothing_is_judged(monkeypatch):
    monkeypatch.delenv("NETSUKE_DATA", raising=False)
    rows = [run_claim(c, True) for c in system.CLAIMS if "for real" not in c.text]
    assert len(rows) >= 15 and {r["verdict"] for r in rows} == {"cannot be shown"}


def test_the_diagonal_is_counted_as_the_bar_says():
    even = {d: dict.fromkeys(DOMAINS, 0.01) for d in DOMAINS}
    assert system.diagonal(even) == 0
    sharp = {d: {e: 0.3 if d == e else 0.02 for e in DOMAINS} for d in DOMAINS}
    assert system.diagonal(sharp) == 5
    sharp["math"]["coding"] = 0.4  # another skill suffers more
    assert system.diagonal(sharp) == 4
    sharp["writing"] = {e: 0.05 if e == "writing" else 0.02 for e in DOMAINS}  # only two and a half times the others
    assert system.diagonal(sharp) == 3
    gains = {d: {e: -0.01 if d == e else -0.02 for e in DOMAINS} for d in DOMAINS}
    assert system.diagonal(gains) == 0


@pytest.fixture(scope="module")
def tiny():
    """Stands a random model in for the real ones; every domain is text of letters of its own."""
    patch = pytest.MonkeyPatch()
    model = tiny_llama(bos=0, context=128, tied=False)

    def texts(domain: str, split: str) -> list[str]:
        rng = torch.Generator().manual_seed(len(domain) + len(split))
        first = 32 + 14 * [*DOMAINS, cases.SIXTH].index(domain)
        letters = torch.randint(first, first + 14, (40, 40), generator=rng).tolist()
        return ["".join(map(chr, row)) for row in letters]

    for attribute, value in (
        ("loaded", lambda name: Loaded(model, Letters(), name, "artifact", None)), ("texts", texts), ("LENGTH", 12),
    ):  # fmt: skip
        patch.setattr(cases, attribute, value)
    patch.setitem(cases.GROUPS, NAME, 8)
    yield [NAME]
    patch.undo()
    for cached in (
        "instances", "base_loss", "found", "residents", "pruned", "moefied", "plugin", "multitask", "rack",
    ):  # fmt: skip
        getattr(cases, cached).cache_clear()
    system.mask_curve.cache_clear()


def test_instances_are_of_one_length_and_of_their_split(tiny):
    train, test = (cases.instances(NAME, "math", split, 50) for split in ("train", "test"))
    assert train.shape[1] == test.shape[1] == 13 and bool((train[:, 0] == 0).all())
    fact = cases.fact_of(NAME, "AB {CD} EF", "GH", True)
    letters = Letters()
    assert fact.prompt.tolist() == [0, *letters.encode("AB CD EF")] and fact.target.tolist() == letters.encode("GH")
    assert fact.prompt[fact.subject] == letters.encode("D")[0]


def test_masks_and_indicators(tiny):
    got = system.masking(tiny, 0.4, 1.5, True).values[NAME]
    assert abs(got["output"]["0.4"] - 1) < abs(got["highest"]["0.4"] - 1)
    assert 0 < system.inactive(tiny, True).values[f"{NAME}, activation"] < 1
    assert set(system.better_indicator(tiny, True).values[NAME]) == {"0.4", "0.6"}


def test_skills_are_seen_and_shuffled_labels_are_not(tiny):
    got = system.localisation(tiny, True).values[NAME]
    blind = system.localisation(tiny, True, shuffled=True)
    assert not blind.met
    for skill in DOMAINS:
        assert min(got[skill]["best"]) > max(blind.values[NAME][skill]["best"])
    # letters drawn at random know no order: what neurons tell apart are the letters
    assert not system.beyond_tokens(tiny, True).met


def test_cuts_overlaps_and_groups(tiny):
    got = system.specialisation(tiny, True)
    assert set(got.values[NAME]["nats"]["all"]) == set(DOMAINS)
    assert "random" in system.specialisation(tiny, True, how="random").values[NAME]["nats"]
    assert len(system.overlaps(tiny, True).values[NAME]) == 10 and not system.same_skill(tiny, True).met
    ratios = system.groups_at_work(tiny, True).values[NAME]
    assert ratios["oracle"] < ratios["random groups, oracle"] + 0.5


def test_plugins_are_found_and_exact(tiny):
    got = plugins.routing(tiny, True).values[NAME]
    assert min(got["right"].values()) >= 0.9
    assert set(plugins.merging(tiny, True).values[NAME]) >= {"coding+writing, products", "coding+writing, factors"}
    assert set(plugins.subtraction(tiny, True).values[NAME]) == set(DOMAINS)
    grown = plugins.growing(tiny, True).values[NAME]
    assert grown["identical"] and not plugins.growing(tiny, True, into_base=True).met
    assert system.exactness(tiny, True).met and not system.exactness(tiny, True, spoiled=True).met


def test_facts_are_edited(tiny):
    got = plugins.editing(tiny, True).values[NAME]
    assert len(got) == 1 and all(len(r["after"]) == 3 for r in got.values())
    assert not plugins.editing(tiny, True, without_key=True).met
