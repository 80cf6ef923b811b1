"""A model, the manifest of its bricks, and the plugin files beside it: where they lie, how they are read and written.

    NAME.netsuke/ or a Hugging Face folder    bricks.json and brick-ID.safetensors inside it
    model.bin, model.gguf                     model.bricks.json and model-brick-ID.safetensors beside it
    a shipped name                            only where `bricks` says, mine.json and mine-brick-ID.safetensors: the package
                                              is not written to

Bricks belong to weights as they are stored (their dtypes too): the manifest carries the sha256 of all tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from netsuke.compress.adapters import Plugin, attach, merge, read_plugin
from netsuke.compress.bricks import Brick, Manifest, check_base, fingerprint, read_manifest
from netsuke.errors import NetsukeError
from netsuke.models.files import plain_name, reading, write_atomically
from netsuke.models.load import Loaded, find, load
from netsuke.models.places import SHIPPED, digest
from netsuke.models.tokenizer import Tokenizer
from netsuke.train.edit import check_apart

NAME = "bricks.json"


def beside(model: str) -> Path:
    """Where the manifest of a model lies."""
    path, kind = find(model)
    return path / NAME if kind in ("artifact", "hf") else path.with_name(f"{path.stem}.{NAME}")


def check_manifest_path(path: Path) -> None:
    """Refuses before any work what could not be written after it: a folder that is not there or not ours, a file of another
    kind."""
    asked = f"write the bricks to {path}"
    if SHIPPED in path.resolve().parents:
        raise NetsukeError(
            asked, "the model came with the package, which is not written to", "a place of your own",
            "-o NAME.netsuke or -o bricks.json for find, --bricks bricks.json for the others",
        )  # fmt: skip
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        found = "is read-only" if path.parent.is_dir() else "does not exist"
        raise NetsukeError(asked, f"the folder {path.parent} {found}", "a folder that can be written to")
    if path.exists():
        read_manifest(path)


def check_id(name: str, asked: str) -> str:
    """A brick's id names a file and stands in lists divided by commas. Raises NetsukeError for what cannot."""
    if not plain_name(name) or "," in name or name != name.strip():
        raise NetsukeError(asked, f"the name {name[:40]!r}", "letters, digits, dots, dashes and single words")
    return name


@dataclass
class Opened:
    """`manifest` is that of `path`; without a file there, one without bricks."""

    source: str
    loaded: Loaded
    base: str
    path: Path
    manifest: Manifest

    @property
    def tokenizer(self) -> Tokenizer:
        if self.loaded.tokenizer is None:
            raise NetsukeError(
                f"read text with {self.source}", "the model has no tokenizer", "tokenizer.json beside the weights"
            )
        return self.loaded.tokenizer

    def ids_of(self, names: Iterable[str]) -> list[str]:
        """Ids of bricks by id or skill, each once. Raises NetsukeError for what is neither."""
        known, out = {b.id for b in self.manifest.bricks}, []
        for name in names:
            out += [name] if name in known else self.manifest.of_skills([name])
        return list(dict.fromkeys(out))

    def plugin(self, name: str) -> Plugin:
        """The plugin of a brick. Raises NetsukeError when its file is missing, changed, elsewhere, or of another base."""
        brick, asked = self.manifest.brick(name), f"use the brick {name!r}"
        if brick.kind == "neurons":
            raise NetsukeError(asked, "it is of kind 'neurons'", "a plugin", "bricks run --only for neurons")
        if not plain_name(brick.file):
            raise NetsukeError(
                asked, f"its file is {str(brick.file)[:60]!r}", "a plain name of a file beside the manifest"
            )
        file = self.path.parent / brick.file
        if not file.is_file():
            raise NetsukeError(asked, f"its file {brick.file!r} is missing", f"the file beside {self.path.name}")
        if brick.sha256 is not None and digest(file) != brick.sha256:
            found = f"its file {brick.file!r} was changed: its sha256 differs from the manifest's"
            raise NetsukeError(asked, found, "the file as it was added", "bricks add, under another name")
        got = read_plugin(file)
        check_base(repr(name), got.base, self.base)
        if got.id != name:
            raise NetsukeError(asked, f"its file {brick.file!r} holds {got.id[:40]!r}", "the file of this brick")
        return got

    def with_plugins(self, names: Sequence[str]) -> Plugin | None:
        """All these plugins as one, each with weight 1; None for none. Raises NetsukeError for edits that overlap."""
        got = [self.plugin(n) for n in names]
        check_apart([p for p, n in zip(got, names) if self.manifest.brick(n).kind == "edit"])
        return merge(got, [1.0] * len(got), "all") if got else None

    def free(self, name: str) -> str:
        """The id, if no brick has it. Raises NetsukeError otherwise."""
        asked = f"add the brick {name!r}"
        if any(b.id == check_id(name, asked) for b in self.manifest.bricks):
            raise NetsukeError(asked, "the manifest has one of this id", "another id", "--name ANOTHER")
        return name

    def file_of(self, name: str) -> Path:
        """Where a plugin's file goes. Raises NetsukeError when something lies there that no brick names."""
        check_manifest_path(self.path)
        others = "" if self.path.name == NAME else self.path.name.removesuffix(".json").removesuffix(".bricks") + "-"
        file = self.path.parent / f"{others}brick-{name}.safetensors"  # several manifests may share a folder
        if os.path.lexists(file):
            raise NetsukeError(
                f"write {file}", "a file that no brick names lies there", "a free place", "--name ANOTHER"
            )
        return file

    def take(self, plugin: Plugin, kind: str, source: Path | None = None) -> Brick:
        """Writes a plugin beside the manifest (a copy of `source`, byte by byte, if it has one), then the manifest with it."""
        self.check(plugin)
        name = self.free(plugin.id)
        if source is None or source.parent.resolve() != self.path.parent.resolve():
            file = self.file_of(name)
            if source is None:
                plugin.write(file)
            else:
                with reading(source):
                    data = source.read_bytes()
                write_atomically(file, lambda f: f.write(data))
        else:
            file = source
        brick = plugin.brick(file.name, kind, digest(file))
        self.manifest = self.manifest.plus(brick)
        self.manifest.write(self.path)
        return brick

    def check(self, plugin: Plugin) -> None:
        """Raises NetsukeError for a plugin of another base, of maps that the model lacks, of other shapes, or of none."""
        if not plugin.thin:
            raise NetsukeError(
                f"add the brick {plugin.id!r}", "its file holds no thin maps", "first and second of a map"
            )
        width = self.loaded.model.cfg.width
        if plugin.key is not None and len(plugin.key) != width:
            found = f"its key is of {len(plugin.key)} numbers"
            raise NetsukeError(f"add the brick {plugin.id!r}", found, f"{width}, the width of the model")
        attach(self.loaded.model, plugin, self.base)


def opened(model: str, bricks: str | None = None, need: bool = True) -> Opened:
    """A model and its bricks. `bricks` names the manifest, by default the one beside the weights.

    Raises NetsukeError for what cannot be loaded, a manifest of another base, and (`need`) when there is none.
    """
    path = beside(model) if bricks is None else Path(bricks)
    if not path.exists() and (need or (bricks is not None and not path.parent.is_dir())):
        asked = f"use the bricks of {model}"
        raise NetsukeError(asked, f"there is no {path}", "a manifest", f"netsuke bricks find {model} --skills DIR")
    known = read_manifest(path) if path.exists() else None
    loaded = load(model)
    base = fingerprint(loaded.model)
    if known is not None:
        check_base(f"manifest {path.name}", known.base, base)
    return Opened(model, loaded, base, path, known or Manifest(base))


def copy_plugins(manifest: Manifest, source: Path, folder: Path) -> None:
    """Copies the files of a manifest's plugins, as they are."""
    for b in manifest.bricks:
        if b.file is not None and plain_name(b.file):
            with reading(source / b.file):
                data = (source / b.file).read_bytes()
            write_atomically(folder / b.file, lambda f, data=data: f.write(data))
