"""The eight ways in which a camera may have stored a picture, by its EXIF orientation; and how pixels, points and boxes are
turned upright. Pillow and numpy only.

Sides are (width, height) in pixels; points are continuous: pixel (column j, row i) covers [j, j+1) x [i, i+1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_TAG = 0x0112  # of EXIF
UPRIGHT = 1
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation_of(image: Image.Image) -> int:
    """1 to 8; 1 where the file says nothing, or nonsense."""
    try:
        found = image.getexif().get(_TAG, UPRIGHT)
    except Exception:  # broken metadata must not cost a good picture
        return UPRIGHT
    return found if isinstance(found, int) and found in _TURNS else UPRIGHT


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The picture upright."""
    return image if orientation == UPRIGHT else image.transpose(_TURNS[orientation])


def turned_sides(sides: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Width and height upright, of those as stored; and the other way round."""
    return (sides[1], sides[0]) if orientation >= 5 else sides


def turned_points(points: NDArray[Any], orientation: int, stored: tuple[int, int]) -> NDArray[Any]:
    """Points (...,2), x and y in the picture as it is stored with these sides, where they lie in the upright one."""
    if orientation == UPRIGHT:
        return points
    (x, y), (width, height) = (points[..., 0], points[..., 1]), stored
    x, y = {
        2: (width - x, y),
        3: (width - x, height - y),
        4: (x, height - y),
        5: (y, x),
        6: (height - y, x),
        7: (height - y, width - x),
        8: (y, width - x),
    }[orientation]
    return np.stack([x, y], axis=-1)


def turned_boxes(boxes: NDArray[Any], orientation: int, stored: tuple[int, int]) -> NDArray[Any]:
    """Boxes (...,4) left, top, width, height of the picture as it is stored, turned with it and cut at its borders; NaN where
    nothing of a box lies in the picture, or none is known."""
    first = turned_points(boxes[..., :2], orientation, stored)
    second = turned_points(boxes[..., :2] + boxes[..., 2:], orientation, stored)
    low, high = np.minimum(first, second), np.maximum(first, second)
    limits = np.asarray(turned_sides(stored, orientation), low.dtype)
    cut_low, cut_high = low.clip(0, limits), high.clip(0, limits)
    extent = boxes[..., :1:-1] if orientation >= 5 else boxes[..., 2:]  # exact, unlike high - low
    extent = np.where((cut_low == low) & (cut_high == high), extent, cut_high - cut_low)
    inside = (cut_high > cut_low).all(axis=-1, keepdims=True)
    return np.where(inside, np.concatenate([cut_low, extent], axis=-1), np.asarray(np.nan, low.dtype))
