"""Image folders and archives: what is read, what is refused, splits by person, the firmware's file."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from netsuke.errors import NetsukeError
from netsuke.tasks.base import Task
from netsuke.tasks.images import ImageClassification, Images, by_pupil, pupils, read_images, write_samples


def picture(colour: tuple[int, int, int], width: int = 10, height: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, "PNG")
    return out.getvalue()


def archive(path, members: dict[str, bytes]):
    with zipfile.ZipFile(path, "w") as z:
        for name, data in members.items():
            z.writestr(name, data)
    return path


@pytest.fixture
def colours() -> dict[str, bytes]:
    return {"red/1.png": picture((255, 0, 0)), "blue/1.png": picture((0, 0, 255)), "blue/2.png": picture((1, 2, 200))}


def test_an_archive_and_a_folder_are_the_same(tmp_path, colours):
    a = read_images(archive(tmp_path / "a.zip", colours), 8)
    for name, data in colours.items():
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(data)
    b = read_images(tmp_path / "d", 8)
    np.testing.assert_array_equal(a.codes, b.codes)
    assert a.names == b.names == ("blue/1.png", "blue/2.png", "red/1.png")
    assert a.classes == ("blue", "red")
    assert list(a.labels) == [0, 0, 1]
    assert a.codes.shape == (3, 8, 8, 3)
    assert list(a.codes[2, 4, 4]) == [127, -128, -128]


@pytest.mark.parametrize(
    "members, sentence",
    [
        ({}, "there are none"),
        ({"red/1.png": b"no picture"}, r"red/1\.png: no readable image"),
        ({"red/1.png": picture((1, 2, 3))[:45]}, "no readable image"),
        ({"flat.png": picture((1, 2, 3))}, "there are none"),
        ({"green/1.png": picture((1, 2, 3))}, "it has the class 'green'"),
    ],
)
def test_refusals(tmp_path, members, sentence):
    with pytest.raises(NetsukeError, match=sentence):
        read_images(archive(tmp_path / "a.zip", members), 8, ("red", "blue"))


def test_what_is_no_archive(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\3\4 and then nothing")
    with pytest.raises(NetsukeError, match="not a readable archive"):
        read_images(tmp_path / "a.zip", 8)
    with pytest.raises(NetsukeError, match="No such file"):
        read_images(tmp_path / "b.zip", 8)


def test_paths_in_an_archive_lead_nowhere(tmp_path, colours):
    made = read_images(archive(tmp_path / "a.zip", {"../../red/1.png": colours["red/1.png"]}), 8)
    assert made.names == ("red/1.png",)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip"]


def signs(numbers_and_digits) -> Images:
    names = tuple(f"{d}/IMG_{n}.jpg" for n, d in numbers_and_digits)
    labels = np.array([d for _, d in numbers_and_digits])
    return Images(np.zeros((len(names), 4, 4, 3), np.int8), labels, tuple("0123456789"), names)


def test_pupils_follow_one_another():
    rows = [(1118 + i, i) for i in range(10)] + [(1128 + i, i) for i in range(10)] + [(4000, 5), (4001, 6), (4002, 2)]
    order = np.random.default_rng(0).permutation(len(rows))
    who = pupils(signs([rows[i] for i in order]))
    back = np.empty_like(who)
    back[order] = who
    assert list(back) == [0] * 10 + [1] * 10 + [2, 2, 3]


def test_sets_share_no_pupil():
    images = signs([(1000 + 10 * p + d, d) for p in range(20) for d in range(10)])
    sets = by_pupil(images, pupils(images))
    people = {s: {int(n.split("_")[1][:4]) // 10 for n in part.names} for s, part in sets.items()}
    assert [len(people[s]) for s in ("train", "validation", "test")] == [14, 3, 3]
    assert len(set.union(*people.values())) == 20


def test_it_is_a_task(tmp_path, colours):
    images = read_images(archive(tmp_path / "a.zip", colours), 8)
    task = ImageClassification({"train": images, "validation": images, "test": images}, batch=2)
    assert isinstance(task, Task)
    assert [len(y) for _, y in task.batches("train")] == [2, 1]

    class Reddest(torch.nn.Module):
        def forward(self, codes):
            return torch.stack([codes[..., 2].float().mean((1, 2)), codes[..., 0].float().mean((1, 2))], 1)

    assert task.score(Reddest(), "test") == 1.0
    assert task.facts()["test"]["images"] == 3


def test_the_firmware_file(tmp_path, colours):
    images = read_images(archive(tmp_path / "a.zip", colours), 8)
    assert write_samples(tmp_path / "train.bin", images, 0.5) == 3 * (8 * 8 * 3 + 4 + 4)
    third = (tmp_path / "train.bin").read_bytes()[2 * 200 :]
    np.testing.assert_array_equal(np.frombuffer(third[:192], np.int8), images.codes[2].reshape(-1))
    assert int.from_bytes(third[192:196], "little") == 1
    assert np.frombuffer(third[196:], "<f4")[0] == 0.5
