"""Cutout (DeVries & Taylor 2017, arXiv:1708.04552): squares at random places are erased, clipped at the image's border.

Left after stripping: nothing, it only changes the batch. A random control of `cam_erasing`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fgvc.techniques.api import Batch, Technique
from fgvc.techniques.boxes import inside
from fgvc.techniques.cutout.settings import CutoutSettings
from fgvc.techniques.masks import erase, sparing
from fgvc.techniques.plan import Context


class Cutout(Technique):
    """Cutout: x' = fill where |row - cy| and |column - cx| are below half the length, (cy, cx) uniform over the image."""

    source: ClassVar[str] = "DeVries & Taylor 2017, arXiv:1708.04552"

    def __init__(self, config: CutoutSettings) -> None:
        self.config = config

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> tuple[Tensor, int]:
        """Draw boxes (B,holes,4) float32 in pixels, empty for an image that is spared; and a seed."""
        height, width = batch.x.shape[2:]
        shape = len(batch.labels), self.config.holes
        shorter = min(height, width)
        side = max(min(round(self.config.length * shorter), shorter - 1), 1)
        top, left = (rng.integers(extent, size=shape) - side // 2 for extent in (height, width))
        boxes = np.stack([left, top, left + side, top + side], axis=-1).astype(np.float32)
        boxes[rng.random(shape[0]) >= self.config.probability] = 0
        return torch.from_numpy(boxes), int(rng.integers(2**63))

    @override
    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        boxes, seed = ctx.draw
        mask = sparing(inside(boxes.to(batch.x.device, non_blocking=True), batch.x.shape[2:]))
        ctx.show("erased", mask, batch.x)
        return replace(batch, x=erase(batch.x, mask, self.config.fill, seed=seed))
