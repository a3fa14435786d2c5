"""mixup (Zhang et al., ICLR 2018, arXiv:1710.09412): convex combinations of images and of their losses.

Left after stripping: nothing, it only changes the batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fgvc.techniques.api import Batch
from fgvc.techniques.mixing import MixingTechnique, draw_count, mixed_target, partners
from fgvc.techniques.mixup.settings import MixupSettings
from fgvc.techniques.plan import Context


class Mixup(MixingTechnique):
    """mixup: x' = l x + (1-l) x[p]; loss = l CE(y) + (1-l) CE(y[p]), p a permutation of the batch."""

    source: ClassVar[str] = "Zhang et al., ICLR 2018, arXiv:1710.09412"

    config: MixupSettings

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> tuple[Tensor, Tensor]:
        """Draw lambda (B,) float32 in [0,1] and partners (B,) int64."""
        share = rng.beta(self.config.alpha, self.config.alpha, draw_count(batch, self.config.per)).astype(np.float32)
        order = partners(rng, batch.labels, self.config.pairing)
        return torch.from_numpy(np.broadcast_to(share, len(order)).copy()), order

    @override
    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        if ctx.draw is None:
            return batch
        share, order = (drawn.to(batch.x.device, non_blocking=True) for drawn in ctx.draw)
        x = torch.lerp(batch.x[order], batch.x, share.to(batch.x.dtype).view(-1, 1, 1, 1))
        return replace(batch, x=x, target=mixed_target(batch.target, [(None, share), (order, 1 - share)]))
