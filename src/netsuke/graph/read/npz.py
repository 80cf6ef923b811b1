"""Reads the inverted-residual int8 networks of MCUNetV3 (Lin et al., 2022) from their `.npz` form, without pickle.

`graph_json` holds first_conv, blocks of pointwise1 | depthwise | pointwise2 with an optional residual, and a classifier;
arrays i/weight (O, I/groups, k, k) int8, i/bias int32, i/w_scales float32 belong to convolution i.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.ir import Op, QGraph, Tensor
from netsuke.graph.ops.conv import largest_bias
from netsuke.models.files import parse_json, reading

LARGEST = 256 << 20  # bytes unpacked: what claims to be larger is no network for a microcontroller


def read_npz(path: Path) -> QGraph:
    """The network in `path`. Raises NetsukeError for a file that is no such archive."""
    arrays = _arrays(path)
    if "graph_json" not in arrays:
        raise NetsukeError(f"read {path}", "the archive has no graph_json", "an .npz network of int8 convolutions")
    text = parse_json(arrays["graph_json"].astype(np.uint8).tobytes(), path)
    return from_description(text, arrays, path)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            if sum(i.file_size for i in archive.infolist()) > LARGEST:
                raise NetsukeError(f"read {path}", "the archive unpacks to more than 256 MB", "a small network")
        with reading(path), np.load(path, allow_pickle=False) as z:
            return {k: z[k] for k in z.files}
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError, NotImplementedError) as e:
        raise NetsukeError(f"read {path}", f"not a readable .npz archive ({str(e)[:80]})", "an .npz file") from None


def from_description(text: dict[str, Any], arrays: dict[str, np.ndarray], path: Path) -> QGraph:
    """The graph of a description (the keys above) and its arrays by name."""
    try:
        return _build(text, arrays, path)
    except (KeyError, TypeError, IndexError, AttributeError) as e:
        raise NetsukeError(
            f"read {path}", f"the description lacks {e}", "the keys that MCUNetV3's files have"
        ) from None
    except (ValueError, OverflowError) as e:
        raise NetsukeError(f"read {path}", f"the description does not fit the arrays ({str(e)[:80]})") from None


def _build(text: dict[str, Any], arrays: dict[str, np.ndarray], path: Path) -> QGraph:
    graph, head = QGraph(path.stem), text["first_conv"]
    size = int(head["in_shape"])
    x = graph.add(
        Tensor(
            "image", (1, size, size, int(head["in_channel"])), "int8", np.float64(head["x_scale"]), int(head["x_zero"])
        )
    )
    graph.inputs = (x,)
    x = _conv(graph, x, head, arrays, "first")
    for k, block in enumerate(text["blocks"]):
        start = x
        for part in ("pointwise1", "depthwise", "pointwise2"):
            if block.get(part):
                x = _conv(graph, x, block[part], arrays, f"block{k}.{part}")
        if (residual := block.get("residual")) is not None:
            end = graph.tensors[x]
            y = Tensor(f"block{k}.sum", end.shape, "int8", np.float64(residual["y_scale"]), int(residual["y_zero"]))
            x = graph.append("add", (x, start), y)
    last, pooled = text["classifier"], graph.tensors[x]
    shape = (1, 1, 1, pooled.shape[3])
    x = graph.append(
        "avgpool2d", (x,), Tensor("pooled", shape, "int8", pooled.scale, pooled.zero), window=pooled.shape[1:3]
    )
    x = _conv(graph, x, last, arrays, "classifier")
    classes = graph.tensors[x]
    y = graph.add(Tensor("logits", (1, classes.shape[3]), "int8", classes.scale, classes.zero))
    graph.ops.append(Op("reshape", (x,), (y,), {}, "logits"))
    graph.outputs = (y,)
    graph.meta = {"source": path.name, "input": "image", "mean": 0.5, "std": 0.5}
    return graph.check()


def _conv(graph: QGraph, x: int, c: dict[str, Any], arrays: dict[str, np.ndarray], name: str) -> int:
    """Appends one convolution; norms are folded already, and the clip to int8 is the activation."""
    i = c["tensor"]
    w, scales = arrays[f"{i}/weight"], arrays[f"{i}/w_scales"].astype(np.float64)
    depthwise, source = c["groups"] > 1 and c["groups"] == c["out_channel"], graph.tensors[x]
    w = np.ascontiguousarray(w[:, 0].transpose(1, 2, 0) if depthwise else w.transpose(0, 2, 3, 1)).astype(np.int8)
    kernel, stride = int(c["kernel_size"][0]), int(c["stride"])
    p = (kernel - 1) // 2
    out = [(n + 2 * p - kernel) // stride + 1 for n in source.shape[1:3]]
    y = Tensor(name, (1, *out, int(c["out_channel"])), "int8", np.float64(c["y_scale"]), int(c["y_zero"]))
    kind = "depthwise2d" if depthwise else "conv2d"
    weight = graph.constant(f"{name}.weight", w, scale=scales, axis=2 if depthwise else 0)
    # The biases of dead channels (weight scale 4e-9) stand at the ends of int32, where the sum would wrap around
    room = largest_bias(Tensor("", w.shape, variable=True), kind)
    bias = np.clip(arrays[f"{i}/bias"].astype(np.int64), -room, room).astype(np.int32)
    inputs = (x, weight, graph.constant(f"{name}.bias", bias))
    attrs = {"stride": (stride, stride), "pad": (p, p, p, p)}
    if not depthwise:
        attrs["groups"] = int(c["groups"])
    return graph.append(kind, inputs, y, **attrs)
