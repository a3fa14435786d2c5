"""Preprocessing of an RGB image to the network's input, shared by evaluation, export and serving. Pillow and numpy only.

The resampling is Pillow's own, antialiased, so a crop here equals torchvision's `Resize` + `CenterCrop` bit for bit; or that of
`fgvc.images.plain`, for stacks of OpenCV and TensorFlow.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fgvc.config.images import Interpolation, Preprocess, Triple
from fgvc.images.plain import resample

Box = tuple[float, float, float, float]
"""left, top, right, bottom in continuous pixels, half-open: pixel (column j, row i) covers [j, j+1) x [i, i+1), and is the box
(j, i, j+1, i+1). All boxes of fgvc are so, tuples or the rows of arrays and tensors (N,4); only `ImageIndex.boxes` are as the
tables of a data set in CUB's layout have them, until `ImageIndex.corners` reads them."""

# A resized image of more than this many times the network's input is never built as a whole (a 1 x 10,000,000 strip).
_LARGEST_RESIZED = 16
# Tolerance between the values of two normalisations, relative to max(1, |value|): a hundredth of a grey level, usually.
_SAME = 1e-4


def preprocess(image: Image.Image, spec: Preprocess) -> NDArray[np.float32]:
    """The network's input (3,H,W), float32 and C-contiguous, from an RGB image of any size."""
    return normalise(fit(image, spec), spec)


def normalise(pixels: NDArray[np.uint8], spec: Preprocess) -> NDArray[np.float32]:
    """Convert uint8 RGB (...,H,W,3) to float32 (...,3,H,W) by channel order, range, mean and std of `spec`."""
    if spec.channel_order == "bgr":
        pixels = pixels[..., ::-1]
    x = np.ascontiguousarray(np.moveaxis(pixels, -1, -3), dtype=np.float32)
    if spec.input_range == 1:
        x /= np.float32(255)
    x -= np.asarray(spec.mean, dtype=np.float32).reshape(3, 1, 1)
    x /= np.asarray(spec.std, dtype=np.float32).reshape(3, 1, 1)
    return x


def fit(image: Image.Image, spec: Preprocess) -> NDArray[np.uint8]:
    """Resize and crop an image to uint8 (H,W,3).

    It is laid onto a canvas of size / crop_pct - covering it (crop), whole in its middle (pad) or filling it (squash) - and the
    centre of the canvas is the result."""
    height, width = spec.size
    (rows, columns), (top, left) = _layout((image.height, image.width), spec)
    if not spec.antialias:
        canvas = np.full((height, width, 3), spec.fill, np.uint8)
        first, last = (max(0, top), max(0, left)), (min(rows, top + height), min(columns, left + width))
        inside = slice(first[0] - top, last[0] - top), slice(first[1] - left, last[1] - left)
        canvas[inside] = resample(np.asarray(image), (rows, columns), spec.interpolation, (*first, *last))
        return canvas
    if spec.resize == "pad":
        padded = Image.new("RGB", (width, height), spec.fill)
        padded.paste(render(image, (0, 0, *image.size), (rows, columns), spec.interpolation), (-left, -top))
        return np.asarray(padded)
    if rows * columns > _LARGEST_RESIZED * math.prod(_canvas(spec)):
        y, x = image.height / rows, image.width / columns
        box = left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height)
        return np.asarray(render(image, box, spec.size, spec.interpolation))
    resized = render(image, (0, 0, *image.size), (rows, columns), spec.interpolation)
    return np.asarray(resized.crop((left, top, left + width, top + height)))


def placed(points: NDArray[np.float64], image: tuple[int, int], spec: Preprocess) -> NDArray[np.float64]:
    """Map points (...,2), x and y in continuous pixels of an image of (height, width), to pixels of the network's input, as
    `fit` does; some may lie outside of it."""
    (rows, columns), (top, left) = _layout(image, spec)
    return points * (columns / image[1], rows / image[0]) - (left, top)


def differences(ours: Preprocess, theirs: Preprocess) -> list[str]:
    """Differences between two preprocessings, by the keys of preprocess.json, ours before theirs; empty if there are none.

    Settings with the same effect do not differ (a range with its mean and std, a crop_pct that gives the same canvas), nor do
    settings without effect (the fill, unless both pad)."""
    mine, other = _settings(ours), _settings(theirs)
    changed = {key for key in ("size", "resize", "interpolation", "antialias", "channel_order") if mine[key] != other[key]}
    canvases = (
        _canvas(ours) != _canvas(theirs) if ours.size == theirs.size else ours.crop_pct != theirs.crop_pct
    )
    changed |= {"crop_pct"} if canvases else set()
    changed |= {"fill"} if ours.resize == theirs.resize == "pad" and ours.fill != theirs.fill else set()
    changed |= {key for key in mine.keys() & other.keys() if key.startswith("network.") and mine[key] != other[key]}
    for key in ("mean", "std"):
        mine[key], other[key] = _as_rgb(mine[key], ours), _as_rgb(other[key], theirs)
    if not np.allclose(_black_and_white(ours), _black_and_white(theirs), rtol=_SAME, atol=_SAME):
        changed |= {key for key in ("input_range", "mean", "std") if mine[key] != other[key]}
    return [
        f"{key}{' of R, G, B' * (key in ('mean', 'std'))}: {_written(mine[key])} against {_written(other[key])}"
        for key in mine
        if key in changed
    ]


def keeps_pixels(spec: Preprocess, white: int = 255) -> bool:
    """Whether black comes out as 0 and white as `white`: nothing is normalised but for the range."""
    return np.allclose(_black_and_white(spec), np.array([[0.0], [white]]), rtol=1e-6, atol=1e-6)


def described(spec: Preprocess) -> str:
    """Describe all settings of a preprocessing on one line."""
    settings = _settings(spec)
    usual = {"antialias": True, "network.in_graph": (), "network.ending": None}
    without_effect = {key for key, value in usual.items() if settings.get(key) == value}
    without_effect |= {"fill"} if spec.resize != "pad" else set()
    return ", ".join(f"{key} {_written(value)}" for key, value in settings.items() if key not in without_effect)


def _settings(spec: Preprocess) -> dict[str, Any]:
    """Settings of a preprocessing by the keys of preprocess.json; and as `network.*` the input and output of the file, where they
    are known."""
    settings = {key: value for key, value in spec if key != "network"}
    if spec.network is not None and spec.network.whole:
        settings |= {f"network.{key}": getattr(spec.network, key) for key in ("layout", "dtype", "in_graph", "ending")}
    return settings


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_written(item) for item in value)})"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _as_rgb(values: Triple, spec: Preprocess) -> Triple:
    return values[::-1] if spec.channel_order == "bgr" else values


def _black_and_white(spec: Preprocess) -> NDArray[np.float64]:
    """The normalised values (2,3) of a black and a white pixel, R, G, B, which determine the affine function."""
    mean, std = (np.array(_as_rgb(values, spec)) for values in (spec.mean, spec.std))
    return (np.array([[0], [spec.input_range]]) - mean) / std


def _canvas(spec: Preprocess) -> tuple[int, int]:
    """Height and width of the canvas whose centre is the network's input."""
    return int(spec.size[0] / spec.crop_pct), int(spec.size[1] / spec.crop_pct)


def _layout(image: tuple[int, int], spec: Preprocess) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of the whole image after resizing, and the top and left of the network's input in it: below 0 if it is
    padded."""
    canvas = _canvas(spec)
    resized = resized_size(image, canvas, spec)
    if spec.resize == "pad":
        top, left = (_centre(whole, side) for whole, side in zip(canvas, spec.size, strict=True))
        return resized, (top - (canvas[0] - resized[0]) // 2, left - (canvas[1] - resized[1]) // 2)
    return resized, (_centre(resized[0], spec.size[0]), _centre(resized[1], spec.size[1]))


def resized_size(image: tuple[int, int], canvas: tuple[int, int], spec: Preprocess) -> tuple[int, int]:
    """Height and width of the whole image after resizing, from its (height, width) and the canvas's."""
    (h, w), (rows, columns) = image, canvas
    if spec.resize == "squash":
        return canvas
    if spec.resize == "pad":
        scale = min(rows / h, columns / w)
        return max(1, round(h * scale)), max(1, round(w * scale))
    if rows * w >= columns * h:  # the height decides; the other side is cut off, not rounded, as torchvision does
        return rows, int(rows * w / h)
    return int(columns * h / w), columns


def render(image: Image.Image, box: Box, size: tuple[int, int], interpolation: Interpolation) -> Image.Image:
    """The region `box` of an image, resampled to `size` = (height, width); pixels outside of it have no influence."""
    filter_ = Image.Resampling[interpolation.upper()]
    return image.resize((size[1], size[0]), filter_, box=box, reducing_gap=None)


def _centre(outer: int, inner: int) -> int:
    return round((outer - inner) / 2)  # ties to even, as torchvision
