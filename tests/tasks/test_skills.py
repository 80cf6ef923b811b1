"""Labelled folders become instances of one length."""

import pytest

from netsuke.errors import NetsukeError
from netsuke.tasks.skills import instances, read_skills
from tests.tiny import Letters


def test_instances_are_cut_evenly_and_long_texts_do_not_dominate():
    texts = ["a" * 1000, *("b" * 25 for _ in range(5)), "short"]
    got = instances(texts, Letters(), 0, 10, 100, per_text=3)
    assert got.shape == (3 + 5 * 2, 11) and bool((got[:, 0] == 0).all())
    assert instances(texts, Letters(), None, 10, 4).shape == (4, 10)
    assert instances(["short"], Letters(), 0, 10, 4).shape == (0, 11)


def test_a_folder_of_skills(tmp_path):
    for skill, ending in (("coding", "py"), ("math", "txt")):
        (tmp_path / skill).mkdir()
        for i in range(3):
            (tmp_path / skill / f"{i}.{ending}").write_text(f"{skill} {i} " * 20)
    (tmp_path / "math" / "notes.bin").write_bytes(b"\xff\xfe")
    got = read_skills(tmp_path, Letters(), 0, length=16, count=8)
    assert {skill: tuple(ids.shape) for skill, ids in got.items()} == {"coding": (8, 17), "math": (8, 17)}
    with pytest.raises(NetsukeError, match="coding has no text of 4000 tokens"):
        read_skills(tmp_path, Letters(), 0, length=4000)
    (tmp_path / "math" / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(NetsukeError, match=r"bad\.txt as text: byte 0 is not UTF-8"):
        read_skills(tmp_path, Letters(), 0, length=16)
    with pytest.raises(NetsukeError, match="it holds 0 folders"):
        read_skills(tmp_path / "coding", Letters(), 0)
    with pytest.raises(NetsukeError, match="it holds 0 folders"):
        read_skills(tmp_path / "absent", Letters(), 0)
