"""Classification of photographs from a folder or a zip archive `<class>/<file>`, as the int8 codes a small network reads.

Nothing is unpacked to disk: a member of an archive is only ever decoded as an image, so its path cannot do harm.

The clothing photographs (`mobiletl`) come split; the hand signs (`ed-vit`) do not: their numbers run pupil by pupil, ten
in a row, so `by_pupil` gives sets that share no person.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.inputs import square
from netsuke.models.files import reading
from netsuke.tasks.base import Split

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
LARGEST_FILE = 32 << 20  # bytes of one image file
LARGEST_SET = 100_000
LARGEST_ARCHIVE = 2 << 30  # bytes of all its images, unpacked: they are in memory together


@dataclass(frozen=True)
class Images:
    """codes (N, S, S, 3) int8 = pixel - 128; labels (N,) int64, indices of `classes`; names as in the archive."""

    codes: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, which: np.ndarray) -> Images:
        return replace(
            self, codes=self.codes[which], labels=self.labels[which], names=tuple(self.names[i] for i in which)
        )


def read_images(path: Path, size: int, classes: tuple[str, ...] | None = None) -> Images:
    """All images below `path`, a folder or a .zip, centre-cropped to a square and resized to `size` x `size`.

    classes   their order; None sorts the folders' names. Raises NetsukeError that names the file that cannot be read.
    """
    members = sorted(_members(path), key=lambda m: m[0])
    if not members:
        raise NetsukeError(f"read the images in {path}", "there are none", "<class>/<file>.jpg or .png")
    found = tuple(sorted({name.split("/")[-2] for name, _ in members}))
    classes = classes or found
    if unknown := sorted(set(found) - set(classes)):
        raise NetsukeError(f"read the images in {path}", f"it has the class {unknown[0]!r}", ", ".join(classes))
    codes = np.empty((len(members), size, size, 3), np.int8)
    for k, (name, data) in enumerate(members):
        codes[k] = decode(data, size, f"{path}: {name}")
    labels = np.array([classes.index(name.split("/")[-2]) for name, _ in members], np.int64)
    return Images(codes, labels, classes, tuple(name for name, _ in members))


def decode(data: bytes, size: int, where: str) -> np.ndarray:
    """(size, size, 3) int8 codes of an image file's bytes. Raises NetsukeError for what is no image."""
    try:
        pixels = square(data, (size, size), 3, f"read {where}")
    except (
        zlib.error,
        struct.error,
        EOFError,
        IndexError,
        MemoryError,
    ) as e:  # what readers of single formats let through
        raise NetsukeError(f"read {where}", f"no readable image ({str(e)[:80]})", ", ".join(SUFFIXES)) from None
    return (pixels.astype(np.int16) - 128).astype(np.int8)


def _members(path: Path) -> list[tuple[str, bytes]]:
    if path.is_dir():
        files = [f for f in path.glob("*/*") if f.suffix.lower() in SUFFIXES and f.is_file()]
        _not_too_many(path, len(files), sum(f.stat().st_size for f in files))
        return [(f"{f.parent.name}/{f.name}", _bounded(f)) for f in files]
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            infos = [
                i for i in archive.infolist() if i.filename.lower().endswith(SUFFIXES) and i.filename.count("/") >= 1
            ]
            _not_too_many(path, len(infos), sum(i.file_size for i in infos))
            for i in infos:
                if i.file_size > LARGEST_FILE:
                    raise NetsukeError(f"read {path}", f"{i.filename} unpacks to {i.file_size} bytes", "photographs")
            return [("/".join(i.filename.split("/")[-2:]), archive.read(i)) for i in infos]
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as e:
        raise NetsukeError(f"read {path}", f"not a readable archive ({str(e)[:80]})", "a folder or a .zip") from None


def _not_too_many(path: Path, count: int, size: int) -> None:
    """Refuses a set by what its folder or directory of contents declares, before anything is read."""
    if count > LARGEST_SET or size > LARGEST_ARCHIVE:
        raise NetsukeError(
            f"read the images in {path}", f"there are {count} of {size >> 20} MiB in all, unpacked",
            f"at most {LARGEST_SET} of {LARGEST_ARCHIVE >> 20} MiB", "a part of them, or smaller pictures",
        )  # fmt: skip


def _bounded(path: Path) -> bytes:
    with reading(path):
        if path.stat().st_size > LARGEST_FILE:
            raise NetsukeError(f"read {path}", f"it has {path.stat().st_size} bytes", f"at most {LARGEST_FILE}")
        return path.read_bytes()


def clothing(size: int = 128) -> dict[Split, Images]:
    """Clothes worn by many people, 10 classes: 1435, 341 and 372 images, split by the data set's authors."""
    from netsuke.data.catalogue import find

    train = read_images(find("mobiletl/clothing128_train.zip"), size)
    rest: tuple[Split, ...] = ("validation", "test")
    return {"train": train} | {s: read_images(find(f"mobiletl/clothing128_{s}.zip"), size, train.classes) for s in rest}


def signs(size: int = 128) -> tuple[Images, np.ndarray]:
    """Hand signs for 0 to 9, and for every image its pupil (int64, from 0)."""
    from netsuke.data.catalogue import find

    images = read_images(find("ed-vit/sign_digits64.zip"), size)
    return images, pupils(images)


def pupils(images: Images) -> np.ndarray:
    """Whose hand it is: numbers run pupil by pupil, and a new pupil begins where the digit is not larger than before."""
    numbers = np.array(
        [int("".join(c for c in n.rsplit("/", 1)[1].split(".")[0] if c.isdigit())) for n in images.names]
    )
    order = np.argsort(numbers, kind="stable")
    steps, digits = np.diff(numbers[order]), images.labels[order]
    fresh = np.concatenate([[0], (steps > 10) | (np.diff(digits) <= 0)])
    out = np.empty(len(order), np.int64)
    out[order] = np.cumsum(fresh)
    return out


def by_pupil(images: Images, who: np.ndarray, shares: tuple[float, float] = (0.7, 0.15), seed: int = 0) -> dict:
    """Train, validation and test sets without a person in common; `shares` of the people go to the first two."""
    people = np.random.default_rng(seed).permutation(np.unique(who))
    a, b = (round(len(people) * s) for s in (shares[0], sum(shares)))
    groups = {"train": people[:a], "validation": people[a:b], "test": people[b:]}
    return {split: images.take(np.flatnonzero(np.isin(who, group))) for split, group in groups.items()}
