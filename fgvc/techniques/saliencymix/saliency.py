"""Fine-grained static saliency (Montabone & Soto 2010; no arXiv): how much each place differs from its surroundings.

OpenCV has it in its contrib package, on the CPU and one image at a time. Here: the same differences between a place and the
mean of square surroundings, on images reduced to a quarter, which is fine enough to say where the peak is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

REDUCED = 4
RADII = (3, 6, 7, 12, 14, 28)  # of the surroundings; OpenCV's 12, 24, 28, 48, 56, 112 pixels, reduced


def saliency(x: Tensor) -> Tensor:
    """Saliency (B,H/4,W/4) float32 >= 0 of images (B,3,H,W): sum over the radii of |place - mean of its surroundings|, of
    the mean of the channels; surroundings end at the image's edge and exclude the place itself."""
    grey = F.avg_pool2d(x.mean(1, keepdim=True).float(), REDUCED, ceil_mode=True)[:, 0]
    height, width = grey.shape[1:]
    # Sums over rectangles from a table of running sums, in float64: they are differences of large numbers.
    table = F.pad(grey.double().cumsum(1).cumsum(2), (1, 0, 1, 0))
    y, z = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    differences = torch.zeros_like(grey)
    for radius in RADII:
        top, bottom = (y - radius).clamp(min=0)[:, None], (y + radius + 1).clamp(max=height)[:, None]
        left, right = (z - radius).clamp(min=0), (z + radius + 1).clamp(max=width)
        total = table[:, bottom, right] - table[:, top, right] - table[:, bottom, left] + table[:, top, left]
        others = ((bottom - top) * (right - left) - 1).clamp(min=1)
        differences += (grey - ((total - grey) / others).float()).abs()
    return differences


def peaks(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Row and column (B,2) int64 of the pixel in an image of `size` at the middle of the largest cell of maps (B,h,w)."""
    height, width = maps.shape[1:]
    cell = maps.flatten(1).argmax(1)
    at = torch.stack([cell // width * size[0] // height, cell % width * size[1] // width], dim=1)
    half = torch.tensor([size[0] // height // 2, size[1] // width // 2], device=maps.device)
    return torch.minimum(at + half, torch.tensor(size, device=maps.device) - 1)
