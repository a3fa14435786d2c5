"""Compact storage of each sample's map for the next epoch, whose crop may lie elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FINENESS = 4  # pixels of the input to one of a recalled map


class MapStore:
    """Map of (h,w) bytes and a 2x3 matrix for every recorded row of the index. On the CPU."""

    def __init__(self, shape: Sequence[int]) -> None:
        h, w = shape
        self._maps = torch.zeros(0, h, w, dtype=torch.uint8)
        self._to_image = torch.zeros(0, 2, 3)  # from shares of the recorded crop's sides to pixels of the original

    def record(self, rows: Tensor, geometry: Tensor, maps: Tensor, size: Sequence[int]) -> None:
        """Record maps (B,h,w) in [0,1] of crops of `size` (height, width) in pixels, with matrices (B,2,3) to the
        original."""
        shape = self._maps.shape[1:]
        if maps.shape[1:] != shape:  # training at several sizes
            maps = F.interpolate(maps[:, None], shape, mode="bilinear", align_corners=False)[:, 0]
        rows = rows.cpu()
        if (more := int(rows.max()) + 1 - len(self._maps)) > 0:
            more = max(more, len(self._maps))
            self._maps = torch.cat([self._maps, self._maps.new_zeros(more, *shape)])
            self._to_image = torch.cat([self._to_image, self._to_image.new_zeros(more, 2, 3)])
        self._maps[rows] = (maps.cpu() * 255).round().to(torch.uint8)
        self._to_image[rows] = _on_shares(geometry.cpu(), size)

    def recall(self, rows: Tensor, geometry: Tensor, size: Sequence[int]) -> Tensor:
        """Recorded maps, resampled to new crops of `size` of the same images: (B,H/4,W/4) in [0,1]; 0 where the recorded crop did
        not reach, and for samples that were never recorded."""
        rows, geometry = rows.cpu(), geometry.cpu()
        height, width = (max(side // FINENESS, 1) for side in size)
        recalled = torch.zeros(len(rows), height, width)
        recorded = torch.nonzero(rows < len(self._maps))[:, 0]
        recorded = recorded[self._to_image[rows[recorded]].abs().sum((1, 2)) > 0]
        if not len(recorded):
            return recalled
        now, then = _square(_on_shares(geometry[recorded], size)), _square(self._to_image[rows[recorded]])
        shares = torch.linalg.solve(then.double(), now.double())[:, :2].float()  # of the new crop to those of the old
        across, down = ((torch.arange(side) + 0.5) / side for side in (width, height))
        new = torch.stack(torch.meshgrid(down, across, indexing="ij")[::-1], dim=-1)
        with torch.autocast("cpu", enabled=False):
            old = torch.einsum("bij,hwj->bhwi", shares[:, :, :2], new) + shares[:, None, None, :, 2]
        maps = self._maps[rows[recorded]].float()[:, None] / 255
        reached = ((old >= 0) & (old <= 1)).all(-1)
        recalled[recorded] = F.grid_sample(maps, 2 * old - 1, padding_mode="border", align_corners=False)[:, 0] * reached
        return recalled

    def state_dict(self) -> dict[str, Any]:
        return {"maps": self._maps, "to_image": self._to_image}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._maps, self._to_image = state["maps"].clone(), state["to_image"].clone()


def _on_shares(geometry: Tensor, size: Sequence[int]) -> Tensor:
    """Convert matrices on pixels of a crop of `size` to matrices on shares of its sides."""
    return geometry * torch.tensor([size[1], size[0], 1.0])


def _square(matrix: Tensor) -> Tensor:
    last = torch.tensor([0.0, 0.0, 1.0]).expand(len(matrix), 1, 3)
    return torch.cat([matrix, last], dim=1)
