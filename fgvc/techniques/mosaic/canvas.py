"""Putting four images into one, with exact areas: in the cells of a cross, or on a canvas as for detectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

CELLS = 4  # top left, top right, bottom left, bottom right


def in_cells(pictures: Sequence[Tensor], split: tuple[int, int], at: Sequence[tuple[float, float]]) -> Tensor:
    """Mosaic (B,3,H,W) of four pictures (B,3,H,W), each reduced until it just covers its cell, which shows a window of it.

    `split`: rows and columns of the first cell; `at`: where each window lies, in [0,1) down and across.
    """
    mosaic = torch.empty_like(pictures[0])
    for picture, cell, (down, across) in zip(pictures, cells(split, pictures[0].shape[2:]), at, strict=True):
        left, top, right, bottom = cell
        height, width = bottom - top, right - left
        scale = max(height / picture.shape[2], width / picture.shape[3])
        size = max(height, round(scale * picture.shape[2])), max(width, round(scale * picture.shape[3]))
        small = F.interpolate(picture, size, mode="bilinear", align_corners=False, antialias=True)
        y, x = int(down * (size[0] - height + 1)), int(across * (size[1] - width + 1))
        mosaic[:, :, top:bottom, left:right] = small[:, :, y : y + height, x : x + width]
    return mosaic


def cells(split: tuple[int, int], size: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Boxes of the four cells of an image of `size` that meet at `split`."""
    (y, x), (height, width) = split, size
    return [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]


def shares(split: tuple[int, int], size: Sequence[int]) -> list[float]:
    """Share of the image's area that each cell has, exactly."""
    return [(bottom - top) * (right - left) / math.prod(size) for left, top, right, bottom in cells(split, size)]


def on_canvas(pictures: Sequence[Tensor], middle: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Mosaic (B,3,H,W), a window of a canvas twice as large on which four pictures (B,3,H,W) meet at a point; and each picture's
    share (4,B) of the covered pixels.

    In units of a picture's sides, down and across: `middle` (n,2) where they meet on the canvas, in [0,2]; `shift` (n,2)
    where the canvas's middle lies in the window; `scale` (n,) of the window; n is 1 or B. Pictures keep their size, and end
    where the canvas does. What none covers is 0, the mean that the normalisation assumes.
    """
    x = pictures[0]
    lines = [(torch.arange(side, device=x.device, dtype=torch.float32) + 0.5) / side for side in x.shape[2:]]
    # Where each pixel of the window lies on the canvas.
    rows, columns = (1 + (line - shift[:, axis, None]) / scale[:, None] for axis, line in enumerate(lines))
    mosaic, counts = torch.zeros_like(x), []
    for number, picture in enumerate(pictures):
        down, across = divmod(number, 2)
        within = []
        for q, m, second in ((rows, middle[:, :1], down), (columns, middle[:, 1:], across)):
            inside = (q >= m) & (q < 2) if second else (q >= 0) & (q < m)
            at = q - m + (0 if second else 1)  # the place in the picture
            within.append((at, inside & (at >= 0) & (at < 1)))
        (y, by_row), (z, by_column) = within
        place = torch.stack(torch.broadcast_tensors(2 * z[:, None, :] - 1, 2 * y[:, :, None] - 1), dim=-1).to(x.dtype)
        covered = (by_row[:, :, None] & by_column[:, None, :]).expand(len(x), -1, -1)
        sampled = F.grid_sample(picture, place.expand(len(x), -1, -1, -1), align_corners=False, padding_mode="border")
        mosaic = torch.where(covered[:, None], sampled, mosaic)
        counts.append(covered.sum((1, 2)))
    areas = torch.stack(counts).float()
    return mosaic, areas / areas.sum(0)
