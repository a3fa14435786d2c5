"""Matrices of albumentations' transforms that map straight lines to straight lines, from what they applied.

Each goes from continuous coordinates after the transform to those before it: pixel (column j, row i) covers [j, j+1) x [i, i+1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]  # (3,3)
Shape = tuple[int, int]  # height, width
Applied = Sequence[tuple[str, dict[str, Any]]]
"""Class and parameters of the transforms that were applied, in turn, as albumentations' `applied_transforms` has them."""


def inverse(applied: Applied, shape: Shape) -> Matrix:
    """Matrix from the coordinates after all the transforms, which left an image of `shape`, to those before."""
    matrix = np.eye(3)
    shapes = [params["shape"][:2] for _, params in applied] + [shape]
    for (name, params), before, after in zip(applied, shapes, shapes[1:], strict=False):
        if name in FOLLOWED:
            matrix = matrix @ FOLLOWED[name](params, before, after)
    return matrix


def affine(*numbers: float) -> Matrix:
    """The matrix of the first two rows' six numbers, row by row."""
    return np.array([numbers[:3], numbers[3:], (0, 0, 1)], dtype=np.float64)


def window(source: Sequence[float], target: Sequence[float]) -> Matrix:
    """Matrix from the rectangle `target` (left, top, right, bottom) to the rectangle `source`."""
    sx, sy = (source[2] - source[0]) / (target[2] - target[0]), (source[3] - source[1]) / (target[3] - target[1])
    return affine(sx, 0, source[0] - sx * target[0], 0, sy, source[1] - sy * target[1])


def scaled(before: Shape, after: Shape) -> Matrix:
    """Matrix of an image of shape `before` that was resized to `after`."""
    return window((0, 0, before[1], before[0]), (0, 0, after[1], after[0]))


def _symmetry(element: str, shape: Shape) -> Matrix:
    """Matrix of an element of the square's symmetry group, as albumentations names them; turns are counter-clockwise."""
    h, w = shape
    return {
        "e": affine(1, 0, 0, 0, 1, 0),
        "h": affine(-1, 0, w, 0, 1, 0),
        "v": affine(1, 0, 0, 0, -1, h),
        "t": affine(0, 1, 0, 1, 0, 0),
        "hvt": affine(0, -1, w, -1, 0, h),
        "r90": affine(0, -1, w, 1, 0, 0),
        "r180": affine(-1, 0, w, 0, -1, h),
        "r270": affine(0, 1, 0, -1, 0, h),
    }[element]


def _warp(params: Mapping[str, Any], *_: Shape) -> Matrix:
    """Matrix of Affine and related transforms, whose own matrix has its origin at the centre of the first pixel."""
    centre = affine(1, 0, 0.5, 0, 1, 0.5)
    return centre @ np.linalg.inv(np.vstack([np.asarray(params["matrix"])[:2], [0, 0, 1]])) @ np.linalg.inv(centre)


def _rotate(params: Mapping[str, Any], *_: Shape) -> Matrix:
    return _warp(params) @ affine(1, 0, max(params["x_min"], 0), 0, 1, max(params["y_min"], 0))  # -1: not cropped


def _crop(params: Mapping[str, Any], *_: Shape) -> Matrix:
    pad = params.get("pad_params") or {}
    left, top = params["crop_coords"][:2]
    return affine(1, 0, left - pad.get("pad_left", 0), 0, 1, top - pad.get("pad_top", 0))


def _resized_crop(params: Mapping[str, Any], _: Shape, after: Shape) -> Matrix:
    return window(params["crop_coords"], (0, 0, after[1], after[0]))


def _crop_and_pad(params: Mapping[str, Any], _: Shape, after: Shape) -> Matrix:
    left, top = (params["crop_params"] or (0, 0))[:2]
    above, beside = (params["pad_params"] or (0, 0, 0))[0:3:2]
    return affine(1, 0, left - beside, 0, 1, top - above) @ scaled(params["result_shape"], after)


def _pad(params: Mapping[str, Any], *_: Shape) -> Matrix:
    return affine(1, 0, -params["pad_left"], 0, 1, -params["pad_top"])


FOLLOWED: Mapping[str, Callable[[Mapping[str, Any], Shape, Shape], Matrix]] = {
    "HorizontalFlip": lambda _, before, __: _symmetry("h", before),
    "VerticalFlip": lambda _, before, __: _symmetry("v", before),
    "Transpose": lambda _, before, __: _symmetry("t", before),
    "RandomRotate90": lambda params, before, _: _symmetry(("e", "r90", "r180", "r270")[params["factor"]], before),
    "D4": lambda params, before, _: _symmetry(str(params["group_element"]), before),
    "SquareSymmetry": lambda params, before, _: _symmetry(str(params["group_element"]), before),
    "Affine": _warp,
    "ShiftScaleRotate": _warp,
    "SafeRotate": _warp,
    "Rotate": _rotate,
    "Crop": _crop,
    "CenterCrop": _crop,
    "RandomCrop": _crop,
    "RandomCropFromBorders": _crop,
    "RandomResizedCrop": _resized_crop,
    "RandomSizedCrop": _resized_crop,
    "CropAndPad": _crop_and_pad,
    "Pad": _pad,
    "PadIfNeeded": _pad,
    "Resize": lambda _, before, after: scaled(before, after),
    "RandomScale": lambda _, before, after: scaled(before, after),
    "SmallestMaxSize": lambda _, before, after: scaled(before, after),
    "LongestMaxSize": lambda _, before, after: scaled(before, after),
}
"""Class of a transform -> its matrix, from its parameters and the shapes before and after it."""
