"""Hide-and-Seek (Singh & Lee, ICCV 2017, arXiv:1704.04232): cells of a grid are hidden at random.

The random counterpart of adversarial erasing. Left after stripping: nothing, it only changes the batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fgvc.config.section import Section
from fgvc.techniques.masks import FILLS, Fill, erase, sparing
from fgvc.techniques.plan import Context
from fgvc.types import Batch


class HideAndSeekConfig(Section):
    """Hide random cells of a grid laid over the image."""

    kind: Literal["hide_and_seek"] = "hide_and_seek"
    probability: float = Field(0.5, ge=0, le=1, description="of hiding anything in an image (paper: 1)")
    grid: int = Field(
        4,
        ge=2,
        le=32,
        description="cells a side, so that they grow with the image. The authors' code (and wsolevaluation's grid_size) has the "
        "side of a cell in pixels instead, drawn from none, 16, 32, 44 and 56 of 224: 14 to 4 cells a side",
    )
    share: float = Field(0.5, gt=0, lt=1, description="probability of hiding a cell")
    fill: Fill = Field("zero", description=f"{FILLS}; the paper's is zero")

    def build(self) -> HideAndSeek:
        return HideAndSeek(self)


class HideAndSeek:
    """Every cell is hidden by itself with probability `share`; at least one stays."""

    source: ClassVar[str] = "Singh & Lee, ICCV 2017, arXiv:1704.04232"
    forwards: ClassVar[str] = "0"
    leaves: ClassVar[str] = "nothing"

    def __init__(self, config: HideAndSeekConfig) -> None:
        self.config = config

    def draw(self, rng: np.random.Generator, batch: Batch) -> tuple[Tensor, int]:
        """(B,grid,grid) bool: which cells are hidden; a seed."""
        numbers = rng.random((len(batch.labels), self.config.grid, self.config.grid))
        hidden = numbers < self.config.share
        hidden &= numbers < numbers.max((1, 2), keepdims=True)
        hidden &= (rng.random(len(hidden)) < self.config.probability)[:, None, None]
        return torch.from_numpy(hidden), int(rng.integers(2**63))

    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        hidden, seed = ctx.draw
        cells = hidden.to(batch.x.device, non_blocking=True).float()[:, None]
        mask = F.interpolate(cells, batch.x.shape[2:], mode="nearest-exact")[:, 0] > 0
        mask = sparing(mask)  # a grid finer than the image can lose the cell that stays
        ctx.show("erased", mask, batch.x)
        return replace(batch, x=erase(batch.x, mask, self.config.fill, seed=seed))
