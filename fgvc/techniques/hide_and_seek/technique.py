"""Hide-and-Seek (Singh & Lee, ICCV 2017, arXiv:1704.04232): cells of a grid are hidden at random.

The random counterpart of adversarial erasing. Left after stripping: nothing, it only changes the batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fgvc.techniques.api import Batch, Technique
from fgvc.techniques.hide_and_seek.settings import HideAndSeekSettings
from fgvc.techniques.masks import erase, sparing
from fgvc.techniques.plan import Context


class HideAndSeek(Technique):
    """Hide-and-Seek: every cell is hidden independently with probability `share`; at least one stays."""

    source: ClassVar[str] = "Singh & Lee, ICCV 2017, arXiv:1704.04232"

    def __init__(self, config: HideAndSeekSettings) -> None:
        self.config = config

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> tuple[Tensor, int]:
        """Draw which cells are hidden, (B,grid,grid) bool; and a seed."""
        numbers = rng.random((len(batch.labels), self.config.grid, self.config.grid))
        hidden = numbers < self.config.share
        hidden &= numbers < numbers.max((1, 2), keepdims=True)
        hidden &= (rng.random(len(hidden)) < self.config.probability)[:, None, None]
        return torch.from_numpy(hidden), int(rng.integers(2**63))

    @override
    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        hidden, seed = ctx.draw
        cells = hidden.to(batch.x.device, non_blocking=True).float()[:, None]
        mask = F.interpolate(cells, batch.x.shape[2:], mode="nearest-exact")[:, 0] > 0
        mask = sparing(mask)  # a grid finer than the image can lose the cell that stays
        ctx.show("erased", mask, batch.x)
        return replace(batch, x=erase(batch.x, mask, self.config.fill, seed=seed))
