"""Loads a model by what lies at a path: a netsuke artifact, a Hugging Face folder, a llama2.c or GGUF file, or a shipped name.

`describe` reads headers and configs only, for plans that come before anything is loaded; `load` reads weights one
tensor at a time. Every file is hostile until checked: each refusal is one NetsukeError that names the culprit.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from netsuke.errors import NetsukeError
from netsuke.layers.linear import LinearBase
from netsuke.models import gguf, hf, llama2c
from netsuke.models.encoder import Encoder, EncoderConfig, check_encoder
from netsuke.models.files import plain_name, read_json, reading, refuse_pickle
from netsuke.models.gguf_file import is_gguf
from netsuke.models.llama import Llama, LlamaConfig
from netsuke.models.places import FORMAT, MANIFEST, SHIPPED, SUFFIX, VERSION, WEIGHTS, digest
from netsuke.models.skeleton import FLOATS, check_config, check_float, check_tensors, fill, skeleton
from netsuke.models.static_sites import stand_static
from netsuke.models.tokenizer import KINDS, Tokenizer, read_tokenizer
from netsuke.models.weights import WeightFile

Kind = Literal["artifact", "hf", "llama2c", "gguf"]
ALLOWED = "a netsuke artifact, a Hugging Face folder (config.json and safetensors), a .gguf or a llama2.c .bin file"


@dataclass(frozen=True)
class Loaded:
    model: Llama
    tokenizer: Tokenizer | None
    source: str
    kind: Kind
    manifest: dict[str, Any] | None


@dataclass(frozen=True)
class LoadedEncoder:
    model: Encoder
    tokenizer: Tokenizer | None
    source: str
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Described:
    """What headers tell. `layers` gives the spec of each linear map; `bytes_on_disk` counts all files of the model."""

    config: LlamaConfig
    layers: dict[str, dict]
    kind: Kind
    bytes_on_disk: int
    tokenizer_bytes: int


class _File(msgspec.Struct):
    bytes: int
    sha256: str


class _Manifest(msgspec.Struct):
    family: str
    config: LlamaConfig
    layers: dict[str, dict[str, Any]]
    files: dict[str, _File]
    provenance: dict[str, Any]
    facts: dict[str, Any]
    budget: dict[str, Any] | None = None
    sites: dict[str, dict[str, Any]] = {}


class _EncoderManifest(_Manifest):
    config: EncoderConfig


def shipped_names() -> list[str]:
    """Names of the models that came with the package."""
    return sorted(p.parent.name.removesuffix(SUFFIX) for p in SHIPPED.glob(f"*{SUFFIX}/{MANIFEST}"))


def find(path_or_name: str | Path) -> tuple[Path, Kind]:
    """Where a model is and of which kind. Raises NetsukeError when nothing is there, or nothing that can be loaded."""
    path, asked = Path(path_or_name), f"load {path_or_name}"
    if not path.exists() and plain_name(str(path_or_name)) and (SHIPPED / f"{path_or_name}{SUFFIX}").is_dir():
        path = SHIPPED / f"{path_or_name}{SUFFIX}"
        if not (path / MANIFEST).is_file():
            raise NetsukeError(asked, "this installation lacks the weights of that model", ", ".join(shipped_names()))
    if not path.exists():
        names = ", ".join(shipped_names())
        raise NetsukeError(
            asked, "there is no such file or folder", ALLOWED + (f", or a name: {names}" if names else "")
        )
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return path, "artifact"
        if (path / "config.json").is_file():
            return path, "hf"
        with reading(path):
            empty = not any(path.iterdir())
        found = "the folder is empty" if empty else "the folder has neither manifest.json nor config.json"
        raise NetsukeError(asked, found, ALLOWED)
    if not path.is_file():
        raise NetsukeError(asked, "this is neither a file nor a folder", ALLOWED)
    if path.suffix == ".gguf" or is_gguf(path):
        return path, "gguf"
    if path.suffix == ".bin" and llama2c.header_of(path) is not None:
        return path, "llama2c"
    refuse_pickle(path)
    if path.name == MANIFEST or path.suffix in (".safetensors", ".json"):
        raise NetsukeError(asked, "this is one file of a model's folder", ALLOWED, f"the folder: {path.parent}")
    if path.suffix == ".bin":
        return path, "llama2c"  # its loader says what is wrong with the header
    raise NetsukeError(asked, f"a file of unknown kind ({path.suffix or 'no suffix'})", ALLOWED)


def load(path_or_name: str | Path, dtype: str | None = None, tokenizer: str | Path | None = None) -> Loaded:
    """The model, its weights as they are stored unless `dtype` ("float32", "float16", "bfloat16") is given; quantized
    maps keep their codes. `tokenizer` names the tokenizer of a llama2.c file that has none beside it.

    Raises NetsukeError for everything that is wrong with the files, and never runs code from them.
    """
    if dtype is not None and dtype not in FLOATS:
        raise NetsukeError(f"load {path_or_name}", f"dtype {dtype!r}", ", ".join(FLOATS))
    path, kind = find(path_or_name)
    manifest = None
    with _one_sentence(path):
        if kind == "artifact":
            manifest = read_json(path / MANIFEST)
            opened = open_artifact(path, manifest, verify=True)
            model = fill(opened.model, opened.weights.get, dtype, path)
            tok = opened.tokenizer()
        elif kind == "hf":
            model, tok = hf.load_folder(path, dtype)
        elif kind == "gguf":
            model, tok = gguf.load_file(path, dtype)
        else:
            model, tok = llama2c.load_file(path, dtype, Path(tokenizer) if tokenizer else None)
    return Loaded(model, tok, str(path_or_name), kind, manifest)


def load_encoder(path_or_name: str | Path, dtype: str | None = None) -> LoadedEncoder:
    """An encoder from its artifact, as `load` loads language models. Raises NetsukeError as `load`."""
    path, kind = find(path_or_name)
    if kind != "artifact":
        raise NetsukeError(f"load {path_or_name} as an encoder", f"it is of kind {kind}", "a netsuke artifact")
    with _one_sentence(path):
        manifest = read_json(path / MANIFEST)
        opened = open_artifact(path, manifest, verify=True, family="encoder")
        model = fill(opened.model, opened.weights.get, dtype, path)
        return LoadedEncoder(model, opened.tokenizer(), str(path_or_name), manifest)


def describe(path_or_name: str | Path) -> Described:
    """Config, specs and sizes from headers alone: no weights are read, no hash is checked. Raises NetsukeError as
    `load`."""
    path, kind = find(path_or_name)
    with _one_sentence(path):
        if kind == "artifact":
            opened = open_artifact(path, read_json(path / MANIFEST), verify=False)
            layers = {name: layer.spec() for name, layer in opened.model.linears().items()}
            tok = opened.tokenizer_path
            parts = [path / MANIFEST, *opened.weights.files] + ([tok] if tok else [])
            return Described(opened.model.cfg, layers, kind, _size(parts), _size([tok] if tok else []))
        if kind == "hf":
            cfg, model, weights = hf.open_folder(path)
            tok = [path / "tokenizer.json"] if (path / "tokenizer.json").is_file() else []
            parts = [path / "config.json", *weights.files, *tok]
            return Described(cfg, hf.specs(model, weights), kind, _size(parts), _size(tok))
        if kind == "gguf":
            file = gguf.open_file(path)
            inside = file.tokenizer()  # what an artifact carries for it is a file of another form
            return Described(file.config, file.specs, kind, _size([path]), len(inside.to_bytes()) if inside else 0)
        found = llama2c.open_checkpoint(path)
        beside = llama2c.tokenizer_path(path, found.config.vocab)
        tok = [beside] if beside else []
        layers = {name: {"kind": "dense", "dtype": "float32"} for name in found.model.linears()}
        return Described(found.config, layers, kind, _size([path, *tok]), _size(tok))


def _size(paths: list[Path]) -> int:
    return sum(p.stat().st_size for p in paths)


@contextlib.contextmanager
def _one_sentence(path: Path):
    """Files can change or vanish, and memory can run out, while they are read."""
    try:
        yield
    except OSError as e:
        raise NetsukeError(f"load {path}", e.strerror or str(e), "readable files") from e
    except MemoryError as e:
        raise NetsukeError(f"load {path}", "not enough memory for its weights", "a smaller model") from e


@dataclass(frozen=True)
class OpenArtifact:
    """An artifact whose manifest, file sizes and tensor headers have been checked."""

    model: Llama | Encoder  # a skeleton
    weights: WeightFile
    tokenizer_path: Path | None

    def tokenizer(self) -> Tokenizer | None:
        """Reads the tokenizer. Raises NetsukeError when it does not belong to the model."""
        if self.tokenizer_path is None:
            return None
        tok = read_tokenizer(self.tokenizer_path, self.model.cfg.bos, self.model.cfg.eos)
        tok.check_fits(self.model.cfg.vocab, self.tokenizer_path)
        return tok


def open_artifact(folder: Path, raw: dict[str, Any], verify: bool, family: str = "llama") -> OpenArtifact:
    """Checks an artifact against its manifest; with `verify` the sha256 of every file as well. No tensor is read. `family` is
    what the caller can use: "llama" or "encoder".

    Raises NetsukeError for another format or version, a field of the wrong type, a file that is missing, changed or
    named outside the folder, and tensors or layers that the config does not ask for.
    """
    asked = f"load {folder}"
    if raw.get("format") != FORMAT:
        raise NetsukeError(asked, f"the manifest's format is {str(raw.get('format'))[:40]!r}", repr(FORMAT))
    if type(raw.get("version")) is not int or raw["version"] != VERSION:
        raise NetsukeError(asked, f"artifact version {str(raw.get('version'))[:40]}", str(VERSION), "a newer netsuke")
    if raw.get("family") == "graph":
        attempt = "plan, fit, run, export or train it as a small network"
        raise NetsukeError(asked, "the artifact holds a small network, no language model", "family llama", attempt)
    if raw.get("family") == "encoder" and family == "llama":
        found = "the artifact holds a bidirectional encoder, no model that writes text"
        raise NetsukeError(asked, found, "family llama", "netsuke.models.load.load_encoder")
    try:
        manifest = msgspec.convert(raw, _EncoderManifest if family == "encoder" else _Manifest)
    except msgspec.ValidationError as e:
        raise NetsukeError(asked, f"manifest.json: {e}", "a manifest as netsuke writes it") from e
    if manifest.family != family or manifest.config.family != family:
        raise NetsukeError(asked, f"family {manifest.family!r}", family)
    cfg = (check_encoder if family == "encoder" else check_config)(manifest.config, folder)
    check_files(folder, manifest.files, verify)
    model = skeleton(cfg, manifest.layers, folder)
    if family == "llama":
        stand_static(model, manifest.sites, folder)
    elif manifest.sites:
        raise NetsukeError(asked, "grids at sites, which an encoder does not have", "no sites")
    weights = WeightFile(folder / WEIGHTS)
    state = model.state_dict()
    check_tensors(
        {n: tuple(t.shape) for n, t in state.items()}, {n: weights.info(n) for n in weights.names()}, weights.path
    )
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        linear = isinstance(model.get_submodule(owner), LinearBase)
        if not linear or leaf == "bias":  # norms and biases may be wider than the maps beside them
            check_float(name, weights.info(name), weights.path)
        elif weights.info(name).dtype != tensor.dtype:
            found = f"tensor {name!r} is stored as {weights.info(name).dtype}".replace("torch.", "")
            raise NetsukeError(asked, found, f"{tensor.dtype}, as its layer says".replace("torch.", ""))
    tokenizers = [folder / name for name in manifest.files if name in KINDS]
    if len(tokenizers) > 1:
        raise NetsukeError(asked, "the artifact has two tokenizers", "one")
    return OpenArtifact(model, weights, tokenizers[0] if tokenizers else None)


def files_of(manifest: dict[str, Any], folder: Path) -> dict[str, _File]:
    """A manifest's list of files. Raises NetsukeError when it is none."""
    try:
        return msgspec.convert(manifest.get("files"), dict[str, _File])
    except msgspec.ValidationError as e:
        raise NetsukeError(f"load {folder}", f"manifest.json: {e}", "a manifest as netsuke writes it") from e


def check_files(folder: Path, files: dict[str, _File], verify: bool) -> None:
    """Raises NetsukeError unless every listed file is there, inside the folder, of its size and (`verify`) its sha256."""
    asked = f"load {folder}"
    for name, fact in files.items():
        if not plain_name(name) or name == MANIFEST:
            raise NetsukeError(asked, f"the manifest lists {name!r}", "plain names of files in the artifact")
        path = folder / name
        if not path.is_file():
            raise NetsukeError(
                asked, f"the file {name!r} is missing", "every file that the manifest lists", "another copy"
            )
        if path.stat().st_size != fact.bytes:
            found = f"the file {name!r} has {path.stat().st_size} bytes, the manifest says {fact.bytes}"
            raise NetsukeError(asked, found, "files as they were written", "another copy")
        if verify and digest(path) != fact.sha256:
            found = f"the file {name!r} was changed or damaged: its sha256 differs from the manifest's"
            raise NetsukeError(asked, found, "files as they were written", "another copy")
    if WEIGHTS not in files:
        raise NetsukeError(asked, f"the manifest lists no {WEIGHTS}", f"an artifact with {WEIGHTS}")
