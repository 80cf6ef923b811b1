"""What a user hands to a small network: arrays and pictures as the codes that the graph's input wants, and answers as numbers.

A picture's pixels become real numbers by the file's own rule (`meta` "mean" and "std", or lists of them per channel), or, where
the file has none, by what the input's scale gives away: 1/255 means 0…1, 2/255 means -1…1, 1 means 0…255.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.ir import QGraph, Tensor
from netsuke.models.files import reading

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm")
LARGEST = 1 << 28  # bytes of one input file
LARGEST_PIXELS = 1 << 26
RULES = ((1 / 255, 0.0, 1.0), (2 / 255, -1.0, 1.0), (1.0, 0.0, 255.0))  # scale of the input, reals for black and white


def read_input(path: str | Path, graph: QGraph, index: int = 0) -> np.ndarray:
    """A file as rows (n, …) for the graph's input `index`: n = 1 unless an .npy file holds several.

    .npy: the graph's own type and shape (with or without the leading 1), or floats, which are quantized; pictures: cut
    square in the middle, scaled. Raises NetsukeError for everything else.
    """
    path, tensor = Path(path), graph.tensors[graph.inputs[index]]
    asked = f"read the input {path.name}"
    if not path.is_file():
        raise NetsukeError(asked, "there is no such file", f".npy or a picture ({', '.join(PICTURES)})")
    if path.suffix.lower() == ".npy":
        return from_file(path, tensor)
    if path.suffix.lower() in PICTURES:
        return picture(path, tensor, graph.meta, asked)
    raise NetsukeError(
        asked, f"a file of unknown kind ({path.suffix or 'no suffix'})", f".npy or a picture ({', '.join(PICTURES)})"
    )


def from_file(path: Path, tensor: Tensor) -> np.ndarray:
    """Rows (n, …) of the tensor's type from an .npy file."""
    asked = f"read the input {path.name}"
    try:
        with reading(path):
            if path.stat().st_size > LARGEST:
                raise NetsukeError(asked, f"{path.stat().st_size} bytes", f"at most {LARGEST}")
            array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise NetsukeError(asked, f"not a readable .npy file ({str(e)[:80]})", "np.save of numbers") from None
    return from_array(array, tensor, asked)


def from_array(array: np.ndarray, tensor: Tensor, asked: str) -> np.ndarray:
    """Rows (n, …) of the tensor's type; floats are quantized where the tensor is."""
    shape = tensor.shape
    if array.shape == shape[1:]:
        array = array[None]
    if array.shape[1:] != shape[1:] or array.ndim != len(shape) or not len(array):
        raise NetsukeError(
            asked,
            f"it has the shape {array.shape}",
            f"{shape}, or several of them: (n, {', '.join(map(str, shape[1:]))})",
        )
    if array.dtype.kind == "f" and not np.all(np.isfinite(array)):
        raise NetsukeError(asked, "it holds NaN or infinity", "finite numbers")
    if array.dtype == tensor.dtype:
        return np.ascontiguousarray(array)
    if array.dtype.kind != "f":
        raise NetsukeError(asked, f"it holds {array.dtype}", f"{tensor.dtype} codes, or floats that are quantized here")
    return tensor.codes(array)


def picture(path: Path, tensor: Tensor, meta: dict[str, Any], asked: str) -> np.ndarray:
    """A picture file as one row for an input (1, H, W, C) or (1, C, H, W)."""
    height, width, channels = picture_size(tensor, asked)
    with reading(path):
        if path.stat().st_size > LARGEST:
            raise NetsukeError(asked, f"{path.stat().st_size} bytes", f"at most {LARGEST}")
        pixels = square(path.read_bytes(), (height, width), channels, asked)
    return pixels_to_codes(pixels[None], tensor, meta, asked)


def picture_size(tensor: Tensor, asked: str) -> tuple[int, int, int]:
    """(H, W, C) of an input (1, H, W, C) or (1, C, H, W). Raises NetsukeError for one that takes no picture."""
    shape = tensor.shape
    if len(shape) != 4:
        raise NetsukeError(
            asked, f"the network takes the shape {shape}, no picture", "an .npy or .npz file of that shape"
        )
    first = shape[3] not in (1, 3) and shape[1] in (1, 3)
    size = (shape[2], shape[3], shape[1]) if first else shape[1:]
    if size[2] not in (1, 3):
        raise NetsukeError(asked, f"the network takes {size[2]} channels", "1 or 3", "an .npy or .npz file")
    return size


def square(data: bytes, size: tuple[int, int], channels: int, asked: str) -> np.ndarray:
    """Pixels (H, W, C) uint8 of an image file's bytes, its middle square scaled to `size` (H, W), grey when C is 1."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > LARGEST_PIXELS:
                raise NetsukeError(asked, f"it has {image.width} x {image.height} pixels", "photographs")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            middle = image.convert("L" if channels == 1 else "RGB").crop((left, top, left + side, top + side))
            if middle.size != size[::-1]:
                middle = middle.resize(size[::-1], Image.Resampling.LANCZOS)
            return np.asarray(middle).reshape(*size, channels)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise NetsukeError(asked, f"no readable image ({str(e)[:80]})", ", ".join(PICTURES)) from None


def pixels_to_codes(
    pixels: np.ndarray, tensor: Tensor, meta: dict[str, Any], asked: str = "read pictures"
) -> np.ndarray:
    """Pixels 0…255 (n, H, W, C) as codes for an input (1, H, W, C) or (1, C, H, W)."""
    real = _real(pixels, tensor, meta, asked)
    if real.shape[1:] != tensor.shape[1:]:
        real = real.transpose(0, 3, 1, 2)
    if real.shape[1:] != tensor.shape[1:]:
        raise NetsukeError(
            asked, f"pictures {pixels.shape[1:]} for a network that takes {tensor.shape[1:]}", "its size"
        )
    return tensor.codes(real)


def _real(pixels: np.ndarray, tensor: Tensor, meta: dict[str, Any], asked: str) -> np.ndarray:
    """Pixels 0…255 (n, H, W, C) as the real numbers that the network was trained on."""
    if "mean" in meta and "std" in meta:  # of pixels scaled to 0…1, as torchvision writes them
        return (pixels / 255 - np.asarray(meta["mean"])) / np.asarray(meta["std"])
    if tensor.scale is not None:
        for scale, black, white in RULES:
            if abs(float(tensor.scale) / scale - 1) < 0.02:
                return black + pixels / 255 * (white - black)
    elif tensor.dtype == "float32" and "range" in meta:
        black, white = meta["range"]
        return black + pixels / 255 * (white - black)
    scale = "no scale" if tensor.scale is None else f"the scale {float(tensor.scale):.4g}"
    raise NetsukeError(
        asked, f"how the network wants its pixels is unknown: its input has {scale}",
        "scales of 1/255, 2/255 or 1, or meta mean and std", "an .npy file of what it was trained on",
    )  # fmt: skip
