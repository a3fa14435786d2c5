"""mixup (Zhang et al., ICLR 2018; methods 7): convex combinations of images and of their losses.

Left after stripping: nothing, it only changes the batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fgvc.config import Section
from fgvc.model.plan import Context
from fgvc.types import Batch


class MixupConfig(Section):
    """Mix each image with another one of its batch."""

    kind: Literal["mixup"] = "mixup"
    alpha: float = Field(0.2, gt=0, description="lambda ~ Beta(alpha, alpha)")
    probability: float = Field(1.0, ge=0, le=1, description="share of the steps that mix")
    per: Literal["batch", "sample"] = Field("batch", description="one lambda a batch (the paper) or one a sample")

    def build(self) -> Mixup:
        return Mixup(self)


class Mixup:
    """x' = l x + (1-l) x[p]; loss = l CE(y) + (1-l) CE(y[p]), p a permutation of the batch."""

    source: ClassVar[str] = "Zhang et al., ICLR 2018"
    forwards: ClassVar[str] = "0"
    leaves: ClassVar[str] = "nothing"

    def __init__(self, config: MixupConfig) -> None:
        self.config = config

    def draw(self, rng: np.random.Generator, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """(lambda (B,) float32 in [0,1], permutation (B,) int64), or None for a step that does not mix."""
        if rng.random() >= self.config.probability:
            return None
        size = len(batch.labels)
        one = self.config.per == "batch"
        share = rng.beta(self.config.alpha, self.config.alpha, size=1 if one else size).astype(np.float32)
        return torch.from_numpy(np.broadcast_to(share, size).copy()), torch.from_numpy(rng.permutation(size))

    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        if ctx.draw is None:
            return batch
        share, order = (part.to(batch.x.device, non_blocking=True) for part in ctx.draw)
        x = torch.lerp(batch.x[order], batch.x, share.to(batch.x.dtype).view(-1, 1, 1, 1))
        own = [(y, share if w is None else w * share) for y, w in batch.target]
        others = [(y[order], (1 - share) if w is None else w[order] * (1 - share)) for y, w in batch.target]
        return replace(batch, x=x, target=[*own, *others])
