"""Image folders and archives: what is read, what is refused, splits by person, the firmware's file."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from netsuke.errors import NetsukeError
from netsuke.tasks import images as images_module
from netsuke.tasks.images import Images, by_pupil, pupils, read_images


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


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # a spoiled size: refused by the next line
@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "BMP"])
def test_spoiled_pictures_are_one_sentence_or_read(tmp_path, suffix):
    """Every byte of a small picture spoiled once: a sentence that names the file, or an image, never a traceback."""
    out = io.BytesIO()
    Image.effect_noise((12, 9), 40).convert("RGB").save(out, suffix)
    whole, refused = out.getvalue(), 0
    for k in range(0, len(whole), max(len(whole) // 250, 1)):
        data = whole[:k] + bytes([whole[k] ^ 0xFF]) + whole[k + 1 :]
        try:
            assert images_module.decode(data, 8, "red/1").shape == (8, 8, 3)
        except NetsukeError as e:
            assert "red/1" in str(e) and "\n" not in str(e)
            refused += 1
    assert refused > 0


def test_spoiled_deflate_streams_are_one_sentence(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("red/1.bmp", bytes(5000))
    data = bytearray(path.read_bytes())
    at = 30 + len("red/1.bmp")
    data[at : at + 6] = b"\xff" * 6
    path.write_bytes(data)
    with pytest.raises(NetsukeError, match=r"a\.zip.*not a readable archive"):
        read_images(path, 8)


def test_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "LARGEST_ARCHIVE", 3_000_000)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for k in range(4):
            z.writestr(f"red/{k}.png", bytes(1_000_000))
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("a member was unpacked"))
    with pytest.raises(NetsukeError, match=r"there are 4 of 3 MiB in all, unpacked; allowed: at most"):
        read_images(path, 8)


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
