"""Personalisation: what shots are, that the rates handed to a board are those of the simulation, and a short run of it all."""

import numpy as np
import pytest

from netsuke.data.catalogue import missing
from netsuke.systems import tiny_training_personal as personal
from netsuke.systems.tiny_training_cases import MODEL
from netsuke.systems.tiny_training_personal import HELD_OUT, PRACTICE, Camera, Pupil
from tests.graph.small import images

needs_data = pytest.mark.skipif(
    bool(missing((MODEL, *personal.DATA))), reason="the network or the hand signs are not below NETSUKE_DATA"
)
STILL = Camera(turn=(0, 0), shift=(0, 0), zoom=(0, 0), light=(0, 0), contrast=(0, 0))


def test_a_still_camera_takes_the_photograph_itself():
    x = images(3, 16)
    assert np.abs(STILL.shots(x, 2, 0).astype(int) - np.tile(x, (2, 1, 1, 1))).max() <= 1


def test_shots_follow_their_ranges():
    x = images(2, 16)
    moved = Camera(turn=(0, 0), shift=(0.125, 0.125), zoom=(0, 0), light=(0, 0), contrast=(0, 0)).shots(x, 1, 0)
    inner = [np.roll(x[:1], (a, b), (1, 2))[:, 2:-2, 2:-2] for a in (-2, 2) for b in (-2, 2)]
    assert min(np.abs(moved[:1, 2:-2, 2:-2].astype(int) - i).max() for i in inner) <= 1
    grey = np.zeros((1, 16, 16, 3), np.int8)
    lit = Camera((0, 9), (0, 0.1), (0, 0.1), (0.1, 0.2), (0, 0.1)).shots(grey, 50, 0)
    assert np.abs(lit[:, 0, 0, 0].astype(int)).min() >= 25 and np.abs(lit.astype(int)).max() <= 51
    assert lit.min() < 0 < lit.max()


def test_no_held_out_shot_is_from_a_range_that_was_practised():
    for practised, asked in zip(vars(PRACTICE).values(), vars(HELD_OUT).values(), strict=True):
        assert practised[1] < asked[0]


def test_a_pupils_shots_are_equally_many_of_every_sign_and_repeatable():
    pupil = Pupil(3, images(10, 16))
    codes, labels = pupil.practice()
    assert codes.shape == (250, 16, 16, 3) and set(np.bincount(labels)) == {25}
    assert np.array_equal(codes, pupil.practice()[0])
    held, asked = pupil.held_out((1, 3))
    assert len(held) == 2 * personal.HELD and set(asked) == {1, 3}
    assert not np.array_equal(codes, pupil.practice(seed=1)[0])


def test_the_nearest_shot_gives_its_label():
    shots, labels = images(6, 8), np.array([3, 1, 4, 1, 5, 9])
    asked = np.clip(shots[[4, 0, 2]].astype(int) + 1, -128, 127).astype(np.int8)
    assert personal.nearest(shots, labels, asked).tolist() == [5, 3, 4]


@needs_data
def test_pupils_are_whole_and_not_shared():
    train, test = ({p.number for p in personal.pupils_of(s)} for s in ("train", "test"))
    assert len(test) > 20 and not train & test


@needs_data
def test_a_short_run_gives_the_boards_weights_and_no_verdict():
    got = personal.personal(True)
    assert got.met is None
    (own,), (floor,) = got.values["own"], got.values["neighbours"]
    assert [row[0] for row in own] == [row[0] for row in floor] == [p.number for p in personal.asked_pupils(True)]
    for board in got.values.get("boards", {}).values():
        assert board["equal"] and board["changed"] > 0 and board["right"] == board["right_simulated"]
