"""ASFF: adaptively spatial feature fusion (Liu, Huang, Wang 2019, arXiv:1911.09516), of any number of stages.

It is for training only, so it may have batch norms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, int, int]  # C, h, w


class Asff(nn.Module):
    """Fusion of stages: fused = sum_l a_l r_l at every cell, a = softmax over l of conv1x1_l(r_l); r_l is stage l at the
    size of one of them and in `width` channels."""

    def __init__(self, shapes: Sequence[Shape], *, level: int, width: int) -> None:
        """Fuse stages of these `shapes`, in any order, at the size of the one at position `level`."""
        super().__init__()
        self.level = level
        self.resize = nn.ModuleList(Resize(shape, shapes[level], width) for shape in shapes)
        self.weigh = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in shapes)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Fuse maps (B,C_l,h_l,w_l) -> fused (B,width,H,W) and weights (B,L,H,W), which sum to 1 over L."""
        size = maps[self.level].shape[2:]
        resized = [resize(f, size) for resize, f in zip(self.resize, maps, strict=True)]
        weights = torch.cat([weigh(r) for weigh, r in zip(self.weigh, resized, strict=True)], dim=1).softmax(1)
        terms = [weight[:, None] * r for weight, r in zip(weights.unbind(1), resized, strict=True)]
        return torch.stack(terms).sum(0), weights


class Resize(nn.Module):
    """Resize one stage to another one's size, after conv, BN and ReLU, which give all stages one scale.

    Coarser or as large: a 1x1 convolution, then the nearest cell. 2^k times finer: k - 1 max-pools, then a 3x3 convolution,
    all of stride 2. Sides that are no such multiples are brought to the exact size at the end.
    """

    def __init__(self, shape: Shape, target: Shape, width: int) -> None:
        super().__init__()
        finer = math.sqrt(shape[1] * shape[2] / (target[1] * target[2]))
        # Rounded: 7 cells to 4 is a halving, too.
        self.halvings = max(0, round(math.log2(finer)))
        kernel, stride = (3, 2) if self.halvings else (1, 1)
        self.conv = nn.Conv2d(shape[0], width, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, f: Tensor, size: Sequence[int]) -> Tensor:
        """Resize f (B,C,h,w) -> (B,width,H,W)."""
        for _ in range(self.halvings - 1):
            f = F.max_pool2d(f, 3, stride=2, padding=1)
        f = self.norm(self.conv(f)).relu()
        return f if f.shape[2:] == tuple(size) else F.interpolate(f, tuple(size), mode="nearest-exact")
