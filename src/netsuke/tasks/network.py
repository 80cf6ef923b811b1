"""The task of a small network: samples of a user's own data, in three parts, and how well outputs answer them.

Data are a folder or a .zip of pictures (`<class>/<file>`), or an .npz file with `x` (n, …) and, if there are answers, `y` (n,).
The parts are cut by the sha256 of each sample, so equal samples never stand in two of them: half for calibration ("train"),
a quarter each for choosing ("validation") and for the one final score ("test").

The metric is accuracy when there are answers and the network has one output per class; else "fidelity", the share of the
original network's output variance that a changed one still explains (1 is the same, 0 no better than its mean).
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.inputs import from_array, picture_size, pixels_to_codes
from netsuke.graph.ir import QGraph, Tensor
from netsuke.tasks.base import Split
from netsuke.tasks.images import Images, read_images

SMALLEST = 40  # samples: ten to score with
LARGEST_ARRAYS = 2 << 30  # bytes of an .npz file, unpacked: they are in memory together
UNREADABLE = (
    ValueError, EOFError, OSError, MemoryError, KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
Run = Callable[[np.ndarray], np.ndarray]  # codes (n, …) -> output codes (n, …)


@dataclass
class NetworkTask:
    """`codes(split, graph)` gives inputs in a graph's own type and size; `answers` are class indices or None."""

    source: Path
    graph: QGraph
    pictures: bool
    x: np.ndarray | None
    answers: np.ndarray | None
    parts: dict[Split, np.ndarray]
    classes: tuple[str, ...] = ()
    _cache: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)
    _original: dict[Split, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def metric(self) -> str:
        return "accuracy" if self.answers is not None else "fidelity"

    higher_is_better = True

    def codes(self, split: Split, graph: QGraph | None = None, limit: int | None = None) -> np.ndarray:
        """Input codes (n, …) of a part, for `graph` (the task's own one by default, or the same at another resolution)."""
        tensor = (graph or self.graph).tensors[(graph or self.graph).inputs[0]]
        rows = self.parts[split][:limit]
        if not self.pictures:
            return from_array(self.x[rows], tensor, f"read {self.source.name}")
        height, width, channels = picture_size(tensor, f"read {self.source.name}")
        if (height, channels) not in self._cache:
            self._cache[height, channels] = _pictures(self.source, height, width, channels)[0]
        return pixels_to_codes(self._cache[height, channels][rows], tensor, self.graph.meta)

    def labels(self, split: Split, limit: int | None = None) -> np.ndarray | None:
        return None if self.answers is None else self.answers[self.parts[split][:limit]]

    def keep_original(self, run: Run) -> None:
        """Remembers the original network's real outputs: what divergence and fidelity are measured against."""
        for split in ("validation", "test"):
            self._original[split] = _real(run, self.codes(split), self.graph)

    def divergence(self, run: Run, graph: QGraph, limit: int | None = None) -> float:
        """How far a changed network's outputs on validation data are from the original's: KL in nats per sample for classes,
        else the share of variance that is lost."""
        got, want = _real(run, self.codes("validation", graph, limit), graph), self._original["validation"][:limit]
        if self.answers is None:
            return _lost(got, want)
        p, q = _log_probabilities(want, self.graph), _log_probabilities(got, graph)
        return float((np.exp(p) * (p - q)).sum(-1).mean())

    def score(self, run: Run, split: Split, graph: QGraph) -> float:
        """The metric on a part."""
        got = _real(run, self.codes(split, graph), graph)
        if self.answers is None:
            return 1 - _lost(got, self._original[split])
        return float((got.reshape(len(got), -1).argmax(1) == self.labels(split)).mean())

    def facts(self) -> dict:
        """What the data are: for reports."""
        splits = {}
        for split, rows in self.parts.items():
            digest = hashlib.sha256(self.codes(split).tobytes())
            if self.answers is not None:
                digest.update(np.ascontiguousarray(self.answers[rows]).tobytes())
            splits[split] = {"samples": len(rows), "sha256": digest.hexdigest()}
        return {"name": self.source.name, "classes": list(self.classes), "splits": splits}


def network_task(path: str | Path, graph: QGraph, own_classes: bool = False) -> NetworkTask:
    """The task of the data at `path` for `graph`; `own_classes`: answers are the data's classes, whatever the network's are
    (for training). Raises NetsukeError for unusable or too few data."""
    path, asked = Path(path), f"read the data {path}"
    if len(graph.inputs) != 1:
        raise NetsukeError(asked, f"the network has {len(graph.inputs)} inputs", "one", "Python: netsuke.graph")
    if not path.exists():
        raise NetsukeError(asked, "there is nothing", "a folder or .zip of <class>/<file>, or an .npz with x and y")
    if path.suffix.lower() == ".npz":
        x, y = _npz(path, graph.tensors[graph.inputs[0]], asked)
        digests = [hashlib.sha256(np.ascontiguousarray(row).tobytes()).digest() for row in x]
        outputs = graph.tensors[graph.outputs[0]].size
        if own_classes and y is None:
            raise NetsukeError(asked, "it holds no y", "x and y", "np.savez(path, x=…, y=…)")
        if y is not None and (y.min() < 0 or y.max() >= outputs):
            raise NetsukeError(
                asked, f"y goes from {y.min()} to {y.max()}", f"classes 0 to {outputs - 1}, which the network has"
            )
        return NetworkTask(path, graph, False, x, y, _cut(digests, asked))
    height, width, channels = picture_size(graph.tensors[graph.inputs[0]], asked)
    pixels, images = _pictures(path, height, width, channels)
    digests = [hashlib.sha256(row.tobytes()).digest() for row in images.codes]
    answers = images.labels if own_classes else _matching(images.labels, images.classes, graph)
    parts, kept = _cut(digests, asked), {(height, channels): pixels}
    return NetworkTask(path, graph, True, None, answers, parts, images.classes, kept)


def _pictures(path: Path, height: int, width: int, channels: int) -> tuple[np.ndarray, Images]:
    """(pixels (n, H, W, C) 0…255, the set they came from); grey is Rec. 601's weighting, as Pillow's."""
    if height != width:
        raise NetsukeError(f"read {path.name}", f"the network wants {height} x {width} pixels", "square pictures")
    images = read_images(path, height)
    pixels = images.codes.astype(np.int16) + 128
    if channels == 1:
        pixels = np.rint(pixels @ np.array([0.299, 0.587, 0.114]))[..., None].astype(np.int16)
    return pixels, images


def _matching(labels: np.ndarray, classes: tuple[str, ...], graph: QGraph) -> np.ndarray | None:
    """Folder names as the network's classes: by its labels, or in sorted order when there are as many; else no answers."""
    names, outputs = graph.meta.get("labels"), graph.tensors[graph.outputs[0]].size
    if names and set(classes) <= set(names):
        return np.array([names.index(c) for c in classes])[labels]
    return labels if len(classes) == outputs else None


def _cut(digests: list[bytes], asked: str) -> dict[Split, np.ndarray]:
    if len(digests) < SMALLEST:
        raise NetsukeError(
            asked, f"there are {len(digests)} samples", f"at least {SMALLEST}: calibration, validation and test"
        )
    place = np.array([d[0] % 4 for d in digests])
    order = np.argsort([d[1:9] for d in digests], kind="stable")  # mixed: folders come class by class

    def rows(which: tuple[int, ...]) -> np.ndarray:
        return order[np.isin(place[order], which)]

    parts: dict[Split, np.ndarray] = {"train": rows((0, 1)), "validation": rows((2,)), "test": rows((3,))}
    if empty := [split for split, part in parts.items() if not len(part)]:
        raise NetsukeError(
            asked, f"the number of its different samples is {len(set(digests))} of {len(digests)}: the {empty[0]} part is empty",
            f"at least {SMALLEST} different ones: equal samples never stand in two parts", "more samples, not copies",
        )  # fmt: skip
    return parts


def _npz(path: Path, tensor: Tensor, asked: str) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(i.file_size for i in archive.infolist())
        if size > LARGEST_ARRAYS:
            raise NetsukeError(
                asked, f"it unpacks to {size >> 20} MiB", f"at most {LARGEST_ARRAYS >> 20} MiB", "fewer samples"
            )
        with np.load(path, allow_pickle=False) as z:
            if "x" not in z.files:
                raise NetsukeError(asked, f"it holds {', '.join(z.files)[:60]}", "x (n, …) and, for accuracy, y (n,)")
            x, y = z["x"], z["y"] if "y" in z.files else None
    except UNREADABLE as e:
        raise NetsukeError(asked, f"not a readable .npz archive ({str(e)[:80]})", "np.savez(path, x=…, y=…)") from None
    if not x.ndim:
        raise NetsukeError(asked, "x is a single number", "x (n, …): samples along the first axis")
    if y is not None and (y.shape != (len(x),) or y.dtype.kind not in "iu"):
        raise NetsukeError(asked, f"y is {y.dtype} {y.shape} for {len(x)} samples", "one whole number per sample")
    from_array(x[:1], tensor, asked)
    return x, None if y is None else y.astype(np.int64)


def _real(run: Run, codes: np.ndarray, graph: QGraph) -> np.ndarray:
    out = graph.tensors[graph.outputs[0]]
    return out.real(run(codes)).reshape(len(codes), -1)


def _lost(got: np.ndarray, want: np.ndarray) -> float:
    return float(((got - want) ** 2).sum() / max(((want - want.mean(0)) ** 2).sum(), 1e-30))


def _log_probabilities(real: np.ndarray, graph: QGraph) -> np.ndarray:
    """Log-probabilities of an output: of a softmax, smoothed by half a code so that no class is impossible; else of logits."""
    out = graph.outputs[0]
    if any(op.kind == "softmax" and graph.root(op.outputs[0]) == graph.root(out) for op in graph.ops):
        p = real + 0.5 / 256
        return np.log(p / p.sum(-1, keepdims=True))
    z = real - real.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))
