"""Resampling without antialiasing, as OpenCV's INTER_LINEAR and INTER_CUBIC and TensorFlow's bilinear have it. numpy only.

A pixel of the result is made of the 2 x 2 (bilinear) or 4 x 4 (bicubic) pixels of the image around its centre, however many
it covers: a large picture that is made small shows what falls on these, and no mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fgvc.config.images import Interpolation

Levels = NDArray[np.uint8] | NDArray[np.float32]
Window = tuple[int, int, int, int]
"""top, left, bottom, right in pixels of the resized image."""

SHARPNESS = -0.75  # `a` of Keys' cubic convolution (1981), as OpenCV and torch have it; Pillow and TensorFlow have -0.5


def resample(
    pixels: NDArray[np.uint8], size: tuple[int, int], interpolation: Interpolation, window: Window | None = None
) -> NDArray[np.uint8]:
    """A window (by default all) of the image (h,w,3) resized to `size`, height and width; bilinear or bicubic.

    Pixel i lies at (i + 0.5) * old / new - 0.5 of the image, whose border goes on outside of it. Values are rounded to whole
    levels. OpenCV computes bytes in fixed point, and differs by one level at most; TensorFlow does not round.
    """
    top, left, bottom, right = window or (0, 0, *size)
    rows, down = _taps(pixels.shape[0], size[0], top, bottom, interpolation)
    columns, across = _taps(pixels.shape[1], size[1], left, right, interpolation)
    region = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    rows, columns = rows - rows.min(), columns - columns.min()
    x: NDArray[np.float32]
    if len(rows) * region.shape[1] <= region.shape[0] * len(columns):  # the axis first that leaves less, for strips
        x = _along_columns(_along_rows(region, rows, down), columns, across)
    else:
        x = _along_rows(_along_columns(region, columns, across), rows, down)
    return np.floor(x.clip(0, 255) + 0.5).astype(np.uint8)


def _taps(
    old: int, new: int, first: int, last: int, interpolation: Interpolation
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Positions (n,t) along one axis of the image, and their weights (n,t), for pixels `first` to `last` of the resized one."""
    centre = (np.arange(first, last) + 0.5) * (old / new) - 0.5
    start = np.floor(centre).astype(np.int64)
    t = (centre - start)[:, None]
    if interpolation == "bilinear":
        offsets, weights = np.arange(2), np.concatenate([1 - t, t], axis=1)
    else:
        offsets = np.arange(-1, 3)
        distance = np.abs(offsets - t)
        near = ((SHARPNESS + 2) * distance - (SHARPNESS + 3)) * distance**2 + 1
        far = SHARPNESS * (((distance - 5) * distance + 8) * distance - 4)
        weights = np.where(distance <= 1, near, far)
    return (start[:, None] + offsets).clip(0, old - 1), weights.astype(np.float32)


def _along_rows(x: Levels, rows: NDArray[np.int64], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    total = np.zeros((len(rows), *x.shape[1:]), np.float32)
    for tap in range(rows.shape[1]):
        total += x[rows[:, tap]] * weights[:, tap, None, None]
    return total


def _along_columns(x: Levels, columns: NDArray[np.int64], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    total = np.zeros((x.shape[0], len(columns), *x.shape[2:]), np.float32)
    for tap in range(columns.shape[1]):
        total += x[:, columns[:, tap]] * weights[:, tap, None]
    return total
