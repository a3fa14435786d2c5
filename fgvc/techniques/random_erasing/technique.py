"""Random Erasing (Zhong et al., AAAI 2020, arXiv:1708.04896): a rectangle of random area and aspect is erased.

Left after stripping: nothing, it only changes the batch. A random control of `cam_erasing`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from fgvc.techniques.api import Batch, Technique
from fgvc.techniques.boxes import inside
from fgvc.techniques.masks import erase, sparing
from fgvc.techniques.plan import Context
from fgvc.techniques.random_erasing.settings import RandomErasingSettings

TRIES = {"original": 100, "timm": 10}


class RandomErasing(Technique):
    """Random erasing: h = sqrt(area aspect), w = sqrt(area / aspect), anywhere that it fits; drawn anew where it does not."""

    source: ClassVar[str] = "Zhong et al., AAAI 2020, arXiv:1708.04896"

    def __init__(self, config: RandomErasingSettings) -> None:
        self.config = config

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> tuple[Tensor, int]:
        """Draw boxes (B,boxes,4) float32 in pixels, empty where nothing is erased; and a seed."""
        boxes = np.zeros((len(batch.labels), self.config.boxes, 4), dtype=np.float32)
        for image in np.flatnonzero(rng.random(len(boxes)) < self.config.probability):
            for box in range(self.config.boxes):
                boxes[image, box] = self._box(rng, *batch.x.shape[2:])
        return torch.from_numpy(boxes), int(rng.integers(2**63))

    @override
    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        boxes, seed = ctx.draw
        mask = sparing(inside(boxes.to(batch.x.device, non_blocking=True), batch.x.shape[2:]))
        ctx.show("erased", mask, batch.x)
        fill = self.config.fill
        return replace(batch, x=erase(batch.x, mask, "noise" if fill == "pixel" else fill, seed=seed))

    def _box(self, rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
        least = self.config.aspect
        for _ in range(TRIES[self.config.statistics]):
            area = rng.uniform(*self.config.area) * height * width / self.config.boxes
            if self.config.statistics == "original":
                aspect = rng.uniform(least, 1 / least)
            else:
                aspect = math.exp(rng.uniform(math.log(least), -math.log(least)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < height and 0 < w < width:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                return np.array([left, top, left + w, top + h], dtype=np.float32)
        return np.zeros(4, dtype=np.float32)
