"""Boxes in a picture: drawing, testing pixels, cropping. All batched.

A box is that of `fgvc.images.preprocess.Box`, and torchvision's x1, y1, x2, y2. Sizes, centres and sides are (height, width) and
(row, column), as in the shape of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def draw_boxes(rng: np.random.Generator, share: np.ndarray, size: tuple[int, int], *, least: int = 0) -> Tensor:
    """Draw boxes (N,4) int64 of shares (N,) in [0,1] of an image of `size`: sides sqrt(share) of the image's, of `least`
    pixels or more; the centre anywhere, what reaches outside is cut off (CutMix, arXiv:1905.04899, Eq. 2)."""
    sides = np.maximum(np.rint(np.sqrt(share)[:, None] * size), least).astype(np.int64)
    return boxes_around(torch.from_numpy(rng.integers(0, size, (len(share), 2))), torch.from_numpy(sides), size)


def boxes_around(centres: Tensor, sides: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (N,4) int64 from centres (N,2) and sides (N,2) int64, cut off at the edges of an image of `size`."""
    first, bound = centres - sides // 2, torch.tensor(size, device=centres.device)
    return torch.cat([first.clamp(min=0).flip(1), torch.minimum(first + sides, bound).flip(1)], dim=1)


def boxes_of_masks(mask: Tensor, padding: float = 0.0) -> Tensor:
    """Boxes (B,4) float32 around the masks (B,H,W), widened by `padding` times the picture's sides, within the picture. An
    empty mask's box is the whole picture."""
    _, height, width = mask.shape
    (top, bottom), (left, right) = _extent(mask.any(2)), _extent(mask.any(1))
    edges = [left - padding * width, top - padding * height, right + padding * width, bottom + padding * height]
    sides = (width, height, width, height)
    return torch.stack([edge.clamp(0, side) for edge, side in zip(edges, sides, strict=True)], dim=1)


def moved(box: Tensor, where: Tensor, size: Sequence[int]) -> Tensor:
    """Move boxes (B,4), whose sides stay, to places (B,2) in [0,1): shares of the way down and across that each can go in a
    picture of `size`."""
    width, height = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
    top, left = where[:, 0] * (size[0] - height), where[:, 1] * (size[1] - width)
    return torch.stack([left, top, left + width, top + height], dim=1)


def inside(box: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (B,H,W) bool of the pixels in any of the boxes (B,N,4) of each picture of `size`; boxes may reach over the border."""
    rows, columns = (torch.arange(side, device=box.device) for side in size)
    left, top, right, bottom = box[..., None].unbind(2)
    down = (rows >= top) & (rows < bottom)
    across = (columns >= left) & (columns < right)
    return (down[:, :, :, None] & across[:, :, None]).any(1)


def area_share(box: Tensor, size: tuple[int, int]) -> Tensor:
    """Share (N,) float32 of an image of `size` that integer boxes (N,4) cover, exactly."""
    return ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])).float() / (size[0] * size[1])


def crop(x: Tensor, box: Tensor, size: Sequence[int], *, pixels: Sequence[int]) -> Tensor:
    """Content (B,3,H,W) of each box (B,4) of x (B,3,h,w), brought to `size` by bilinear interpolation; boxes are in pixels of a
    picture of `pixels` (height, width), which x may have at another resolution."""
    height, width = pixels
    with torch.autocast(x.device.type, enabled=False):  # a bfloat16 grid can't even name the last pixels
        box = box.float()
        left, top, right, bottom = (box / box.new_tensor([width, height, width, height])).unbind(1)
        zero = torch.zeros_like(left)
        across = torch.stack([right - left, zero, left + right - 1], dim=1)
        down = torch.stack([zero, bottom - top, top + bottom - 1], dim=1)
        grid = F.affine_grid(torch.stack([across, down], dim=1), [len(x), x.shape[1], *size], align_corners=False)
        cut = F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False).to(x.dtype)
    last = x.is_contiguous(memory_format=torch.channels_last)
    return cut.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _extent(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last True of each row (B,N) as float32; 0 and N where there is none."""
    count = mask.shape[1]
    places = torch.arange(count, device=mask.device)
    first = torch.where(mask, places, count).amin(1)
    last = torch.where(mask, places + 1, 0).amax(1)
    empty = ~mask.any(1)
    return torch.where(empty, 0, first).float(), torch.where(empty, count, last).float()
