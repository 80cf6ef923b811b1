"""An artifact as a folder, whatever the model in it: complete or not there, never half-written. Without PyTorch.

All is written into a hidden folder beside the target, flushed to the disk, and renamed into place. `save.py` fills it with
a language model, `graph/store.py` with a small static network.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from netsuke.errors import NetsukeError
from netsuke.models.files import plain_name
from netsuke.models.places import FORMAT, MANIFEST, SUFFIX, VERSION, digest


def is_artifact(folder: Path) -> bool:
    """Whether a folder's manifest says that it is ours, of any version."""
    return _says(folder / MANIFEST, FORMAT)


def _says(file: Path, format: str) -> bool:
    try:
        return json.loads(file.read_bytes()).get("format") == format
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def write_artifact(
    folder: Path, manifest: dict[str, Any], fill: Callable[[Path], None], verify: Callable[[Path], None] | None = None
) -> Path:
    """Writes the artifact and returns its folder (".netsuke" is added to a name without it).

    `manifest` is completed by format, version and the hashes of the files that `fill` writes into the folder it is
    called with. An artifact that is there is replaced in one step. `verify` is called with the finished folder before it
    gets its name; what it raises leaves nothing behind. Raises NetsukeError when something else is there, when the parent
    folder is missing, read-only or full, and when the manifest is no JSON.
    """
    folder = check_writable(folder)
    asked = f"save {folder}"
    manifest = {"format": FORMAT, "version": VERSION, **manifest}
    _encode(manifest, asked)  # before anything is written
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            fill(part)
            manifest["files"] = {
                p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in sorted(part.iterdir())
            }
            write_file(part / MANIFEST, _encode(manifest, asked))
            _flush_folder(part)
            if verify:
                verify(part)
            replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _flush_folder(folder.parent)
        remove_stale(folder)
    except OSError as e:
        raise NetsukeError(asked, e.strerror or str(e), "a folder that can be written to, with room left") from e
    return folder


def check_folder(out: Path, asked: str, mark: str, format: str) -> Path:
    """The full path of a folder that may be written; refuses before any work what could not be written after it.

    mark, format   a folder is ours when its file `mark` is JSON that says so: {"format": format, …}

    Raises NetsukeError when the name is not plain, the parent is missing, or anything that is not ours stands there.
    """
    out = Path(os.path.realpath(out))
    if not plain_name(out.name) or not out.parent.is_dir():
        raise NetsukeError(asked, "the name is not plain or the parent folder does not exist", "a new folder's name")
    if os.path.lexists(out) and not (out.is_dir() and _says(out / mark, format)):
        raise NetsukeError(asked, "something else is there", "a new folder, or one that this wrote", "another name")
    return out


def write_texts(out: Path, files: dict[str, str], asked: str) -> None:
    """Writes a folder of text files (path inside it -> text), complete or not there; what stood there is replaced.

    Raises NetsukeError when the parent folder cannot be written to.
    """
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        for path, text in files.items():
            (part / path).parent.mkdir(parents=True, exist_ok=True)
            write_file(part / path, text.encode())
        replace(part, out)
        remove_stale(out)
    except OSError as e:
        raise NetsukeError(asked, e.strerror or str(e), "a folder that can be written to, with room left") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_writable(folder: Path) -> Path:
    """The full path that an artifact would get; refuses before minutes of work what could not be written after them.

    Raises NetsukeError for a name that is no plain one, a parent that is missing or read-only, and anything at the
    place that is not an artifact.
    """
    folder = Path(os.path.realpath(folder))
    if folder.suffix != SUFFIX:
        folder = folder.with_name(folder.name + SUFFIX)
    asked, parent = f"save {folder}", folder.parent
    if not plain_name(folder.name):
        raise NetsukeError(asked, "not a plain name", "a name of letters, digits, dots and dashes")
    if not parent.is_dir():
        raise NetsukeError(asked, f"the folder {parent} does not exist", "an existing folder", f"mkdir -p {parent}")
    # root may write anywhere by its permissions, so the flag of a read-only mount is looked at as well
    if not os.access(parent, os.W_OK) or os.statvfs(parent).f_flag & os.ST_RDONLY or not parent.stat().st_mode & 0o222:
        raise NetsukeError(asked, f"the folder {parent} is read-only", "a writable folder", "another folder")
    refuse_other(folder)
    return folder


def refuse_other(folder: Path) -> None:
    """Raises NetsukeError when something that is not an artifact stands where one is to be written."""
    if os.path.lexists(folder) and not (folder.is_dir() and is_artifact(folder)):
        found = "something that is not a netsuke artifact is there"
        raise NetsukeError(f"save {folder}", found, "a new name or an artifact to replace", "another name")


def replace(part: Path, folder: Path) -> None:
    """Moves a finished folder into place; what was there moves aside first, and back if the move fails."""
    aside = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    had = folder.exists()
    if had:
        os.rename(folder, aside)
    try:
        os.rename(part, folder)
    except OSError:
        if had:
            os.rename(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def remove_stale(folder: Path) -> None:
    """Removes what saves of this artifact by processes that have died left beside it."""
    pattern = re.compile(re.escape(f".{folder.name}.") + r"(?:part|old)-(\d+)")
    for entry in folder.parent.iterdir():
        found = pattern.fullmatch(entry.name)
        if found and entry.is_dir() and not _alive(int(found[1])):
            shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _encode(manifest: dict[str, Any], asked: str) -> bytes:
    try:
        return (json.dumps(manifest, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as e:
        raise NetsukeError(
            asked, f"facts, provenance or budget are no JSON ({e})", "texts, finite numbers, lists"
        ) from e


def write_file(path: Path, data: bytes) -> None:
    """A file whose bytes are on the disk when this returns."""
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes renames in a folder durable, where the system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
