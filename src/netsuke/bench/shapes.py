"""The models of `netsuke bench lm`: the same weights as an artifact and as a GGUF file, made once and kept in the cache.

A random shape has codes of one constant spread per map (1/sqrt(I), so that activations neither grow nor vanish); a model
that is loaded is rounded symmetrically, in groups of 64. Both kinds fit the blocks of Q4_0 and Q8_0 exactly, so the two
programs compute with the same weights. Maps are filled one by one in the width in which they are stored: the largest
shape takes 3.3 GB while it is made at 16 bits (2.2 GB of weights), never a float32 copy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from netsuke.devices.probe import cache_folder
from netsuke.errors import NetsukeError
from netsuke.export import gguf
from netsuke.layers.linear import Dense, LinearBase, halved
from netsuke.layers.packing import pack
from netsuke.layers.quantized import QuantLinear, group_count
from netsuke.models.llama import Llama, LlamaConfig
from netsuke.models.load import Loaded, describe, find, load
from netsuke.models.places import MANIFEST, SUFFIX
from netsuke.models.save import save_artifact
from netsuke.models.skeleton import skeleton

WIDTHS = (4, 8, 16)
GROUP = 64
MAKE = 1  # of the generator: another number makes all files anew
SHAPES = {
    "30M": LlamaConfig.uniform(
        8, 1408, vocab=12000, width=512, heads=8, kv_heads=4, head_dim=64, context=2048
    ),
    "1.1B": LlamaConfig.uniform(  # TinyLlama (Zhang et al. 2024)
        22, 5632, vocab=32000, width=2048, heads=32, kv_heads=4, head_dim=64, context=2048, tied=False
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One model at one width. `gguf` is None, and `no_gguf` says why, for models that llama.cpp cannot run.

    parameters    of all linear maps, the table of embeddings among them
    weight_bytes  read for every token: all maps and the head, not the table (which is the head where they are tied)
    macs          multiply-accumulates per token of a prompt: the maps of all blocks
    head_macs     of the head, once per prompt
    """

    name: str
    bits: int
    folder: Path
    gguf: Path | None
    no_gguf: str
    config: LlamaConfig
    parameters: int
    weight_bytes: int
    macs: int
    head_macs: int

    def __str__(self) -> str:
        return f"{self.name} at {self.bits} bits"


def bench_cache() -> Path:
    """The folder of the models that benchmarks make."""
    return cache_folder() / "bench"


def random_map(layer: LinearBase, bits: int, rng: torch.Generator) -> LinearBase:
    """A map of the same shape with random weights of deviation 1/sqrt(I), stored at `bits`."""
    deviation = layer.ins**-0.5
    if bits == 16:
        weight = torch.empty(layer.outs, layer.ins, dtype=torch.float16)
        for rows in weight.split(max(1, (1 << 24) // layer.ins)):
            rows.copy_(torch.randn(rows.shape, generator=rng).mul_(deviation))
        return Dense(weight)
    zero, groups = 1 << (bits - 1), group_count(layer.ins, GROUP)
    step = max(1, (1 << 22) // layer.ins)  # packing takes several times the memory of the codes
    packed = []
    for start in range(0, layer.outs, step):
        rows = min(step, layer.outs - start)
        codes = torch.randint(1, 2 * zero, (rows, layer.ins), dtype=torch.uint8, generator=rng)
        packed.append(pack(codes, bits))
    # codes - zero are uniform in -(zero-1) … zero-1: their variance is zero·(zero-1)/3
    scales = torch.full((layer.outs, groups), deviation / (zero * (zero - 1) / 3) ** 0.5, dtype=torch.float16)
    zeros = torch.full((layer.outs, groups), zero, dtype=torch.uint8)
    return QuantLinear(torch.cat(packed), scales, zeros, bits, GROUP, layer.ins)


def symmetric(w: Tensor, bits: int, bias: Tensor | None = None) -> QuantLinear:
    """W (O, I) float32 rounded to the nearest of s·(-2^(b-1)+1 … 2^(b-1)-1), s = max|w| of its group."""
    (outs, ins), zero, groups = w.shape, 1 << (bits - 1), group_count(w.shape[1], GROUP)
    parts = torch.nn.functional.pad(w, (0, groups * GROUP - ins)).view(outs, groups, GROUP)
    scales = (parts.abs().amax(2) / (zero - 1)).half().clamp_min(2**-24)
    steps = (parts / scales.float()[..., None]).round_().clamp_(1 - zero, zero - 1)
    codes = (steps + zero).to(torch.uint8).view(outs, -1)[:, :ins]
    return QuantLinear.from_codes(codes, scales, torch.full((outs, groups), zero), bits, GROUP, bias)


def random_shape(cfg: LlamaConfig, bits: int, seed: int = 0) -> Llama:
    """A Llama with random maps stored at `bits`."""
    rng = torch.Generator().manual_seed(seed)
    model = Llama(cfg, "float16")  # memory that nothing writes to is not taken
    for name, layer in model.linears().items():
        model.replace(name, random_map(layer, bits, rng))
    return model.eval()


def stored_at(model: Llama, bits: int) -> Llama:
    """The model with all its maps stored at `bits`; changes it in place."""
    for name, layer in model.linears().items():
        if bits == 16:
            new = halved(Dense(layer.to_dense(), layer.bias), name)
        else:
            new = symmetric(layer.to_dense(), bits, layer.bias)
        model.replace(name, new)
    return model


def key_of(model: str) -> str:
    """What tells files of one model from those of another of the same name: the shape, or sizes and times of its files."""
    if model in SHAPES:
        facts = msgspec.json.encode(SHAPES[model])
    else:
        path, _ = find(model)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        facts = repr([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]).encode()
    return hashlib.sha256(facts + bytes([MAKE, GROUP])).hexdigest()[:10]


def check(model: str, bits: int) -> None:
    """Raises NetsukeError for a width that not both sides have and for what is neither a shape nor a model."""
    if bits not in WIDTHS:
        raise NetsukeError(f"measure {model} at {bits} bits", "both sides need the width", ", ".join(map(str, WIDTHS)))
    if model not in SHAPES:
        find(model)


def prepare(model: str, bits: int, cache: Path | None = None) -> Subject:
    """A shape's name or a model (path or shipped name) at 4, 8 or 16 bits, made if it is not in the cache.

    Raises NetsukeError for other widths, for what is no model, and when the cache cannot be written.
    """
    check(model, bits)
    cache = cache or bench_cache()
    name = Path(model).name.removesuffix(SUFFIX)
    stem = f"{name}-{bits}-{key_of(model)}"
    folder, file = cache / f"{stem}{SUFFIX}", cache / f"{stem}.gguf"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise NetsukeError(
            f"keep models in {cache}", e.strerror or str(e), "a writable folder in XDG_CACHE_HOME"
        ) from e
    no_gguf = ""
    if not (folder / MANIFEST).is_file() or not file.is_file():
        made, tokenizer = _made(model, bits)
        save_artifact(folder, made, tokenizer, {"made by": "netsuke bench lm", "from": name}, {})
        try:
            gguf.write(Loaded(made, tokenizer, name, "artifact", None), file, bits)
        except NetsukeError as e:
            no_gguf = str(e)
        del made
    return _subject(name, bits, folder, file if file.is_file() else None, no_gguf)


def _made(model: str, bits: int) -> tuple[Llama, object]:
    if model in SHAPES:
        return random_shape(SHAPES[model], bits), None
    loaded = load(model)
    return stored_at(loaded.model, bits), loaded.tokenizer


def _subject(name: str, bits: int, folder: Path, file: Path | None, no_gguf: str) -> Subject:
    described = describe(folder)
    linears = skeleton(described.config, described.layers).linears()
    inner = [layer for path, layer in linears.items() if path not in ("embed", "head")]
    head = linears.get("head", linears["embed"])
    return Subject(
        name, bits, folder, file, no_gguf, described.config,
        parameters=sum(layer.macs() for layer in linears.values()),
        weight_bytes=sum(layer.bytes() for layer in [*inner, head]),
        macs=sum(layer.macs() for layer in inner), head_macs=head.macs(),
    )  # fmt: skip
