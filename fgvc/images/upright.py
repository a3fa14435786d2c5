"""EXIF orientation: pixels, points and boxes of a stored picture turned upright. Pillow and numpy only.

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
    """The EXIF orientation of a picture, 1 to 8; 1 if it has none or an invalid one."""
    try:
        value = image.getexif().get(_TAG, UPRIGHT)
    except Exception:  # broken metadata must not lose a good picture
        return UPRIGHT
    return value if isinstance(value, int) and value in _TURNS else UPRIGHT


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The upright picture of a stored one."""
    return image if orientation == UPRIGHT else image.transpose(_TURNS[orientation])


def turned_sides(sides: tuple[int, int], orientation: int) -> tuple[int, int]:
    """The upright (width, height) of the stored ones, and the other way round."""
    return (sides[1], sides[0]) if orientation >= 5 else sides


def turned_points(points: NDArray[Any], orientation: int, stored: tuple[int, int]) -> NDArray[Any]:
    """Map points (...,2), x and y in the stored picture with the sides `stored`, to the upright one."""
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
    """Map boxes (...,4), as of `fgvc.images.preprocess.Box`, in the stored picture with the sides `stored` to the upright one,
    clipped to it; NaN if nothing of a box lies in the picture, or the box is unknown."""
    first, second = (turned_points(corner, orientation, stored) for corner in (boxes[..., :2], boxes[..., 2:]))
    limits = np.asarray(turned_sides(stored, orientation), first.dtype)
    low, high = np.minimum(first, second).clip(0, limits), np.maximum(first, second).clip(0, limits)
    inside = (high > low).all(axis=-1, keepdims=True)
    return np.where(inside, np.concatenate([low, high], axis=-1), np.asarray(np.nan, low.dtype))
