"""One fact changed by a rank-one plugin: it follows its prompt wherever that stands, and other text hardly notices.

A random model moves nothing from token to token on purpose: the subject is the last token, the target one token.
"""

import pytest
import torch

from netsuke.compress.adapters import attach, merge
from netsuke.errors import NetsukeError
from netsuke.train.edit import Edit, Fact, check_apart, key_gram, make_edit, says
from tests.tiny import same_state, tiny_llama, tiny_task

PROMPT, TARGET = torch.tensor([5, 40, 41, 42, 9]), torch.tensor([77])
OTHER = next(tiny_task().batches("train"))[:, :-1]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(width=96, head_dim=24, hidden=256)


@pytest.fixture(scope="module")
def gram(model):
    return key_gram(model, 0, [ids[:, :-1] for ids in tiny_task().batches("train")])


def fact(target=TARGET, prompt=PROMPT, subject=4) -> Fact:
    return Fact(prompt, subject, target, OTHER[:3, :4])


@torch.no_grad()
def test_the_fact_is_changed_and_other_text_is_not(model, gram):
    assert not says(model, PROMPT, TARGET)
    made = make_edit(model, fact(), 0, gram, "fact")
    assert same_state(model, tiny_llama(width=96, head_dim=24, hidden=256)) and not model.blocks[0].sites
    edited = attach(model, made)
    assert says(edited, PROMPT, TARGET) and says(edited, torch.cat((OTHER[0, :4], PROMPT)), TARGET)
    assert edited.bytes() - model.bytes() == 4 * (256 + 96)
    plain = attach(model, make_edit(model, fact(), 0, torch.eye(256), "plain"))  # without the covariance of other keys
    changed = {n: float((m(OTHER) - model(OTHER)).square().mean()) for n, m in (("edit", edited), ("plain", plain))}
    assert changed["edit"] < changed["plain"] and changed["edit"] < 0.3 * float(model(OTHER).var())


@torch.no_grad()
def test_two_edits_together_and_one_too_many(model, gram):
    one = make_edit(model, fact(), 0, gram, "one")
    second = torch.tensor([8, 60, 61, 63, 70]), torch.tensor([20])
    two = make_edit(model, fact(second[1], second[0]), 0, gram, "two")
    check_apart([one, two])
    both = attach(model, merge([one, two], [1, 1], "both"))
    assert says(both, PROMPT, TARGET) and says(both, *second)
    again = make_edit(model, fact(torch.tensor([50])), 0, gram, "again")
    with pytest.raises(NetsukeError, match=r"'one' and 'again': both change blocks\.0\.down at nearly the same key"):
        check_apart([one, two, again])


def test_misuse_is_refused_in_a_sentence(model, gram):
    with pytest.raises(NetsukeError, match="a subject at 5 of 5 tokens"):
        make_edit(model, fact(subject=5), 0, gram, "x")
    with pytest.raises(NetsukeError, match="0 tokens to follow"):
        make_edit(model, fact(torch.tensor([], dtype=torch.long)), 0, gram, "x")
    with pytest.raises(NetsukeError, match="block 2; allowed: 0 to 1"):
        make_edit(model, fact(), 2, gram, "x", Edit(steps=1))
    with pytest.raises(NetsukeError, match="no other text"):
        key_gram(model, 0, [])
