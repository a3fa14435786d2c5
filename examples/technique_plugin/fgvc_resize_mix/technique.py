"""Another image, made smaller, lies in each, as in ResizeMix (Qin et al. 2020, arXiv:2012.11101)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fgvc.techniques.api import Batch, Technique
from fgvc.techniques.mixing import mixed_target, partners
from fgvc.techniques.plan import Context
from fgvc_resize_mix.settings import ResizeMixSettings


class ResizeMix(Technique):
    """ResizeMix: x' = x outside of a box and x[p], resized, inside; loss = (1-a) CE(y) + a CE(y[p]), a: its share of the area."""

    source: ClassVar[str] = "Qin et al. 2020, arXiv:2012.11101"

    def __init__(self, settings: ResizeMixSettings) -> None:
        self.settings = settings

    @override
    def mixes(self, progress: float) -> float:
        return self.settings.share(progress)

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> tuple[Tensor, float, float, float]:
        """Draw the partners (B,) int64; side of the box, and how far down and across it lies, as shares of what can be."""
        side = rng.uniform(self.settings.smallest, self.settings.largest)
        return partners(rng, batch.labels, "any"), side, rng.random(), rng.random()

    @override
    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        if ctx.draw is None:  # another technique mixes in this step, or none does
            return batch
        partner, side, down, across = ctx.draw
        partner = partner.to(batch.x.device)
        h, w = (max(1, round(side * length)) for length in batch.x.shape[2:])
        top, left = int(down * (batch.x.shape[2] - h + 1)), int(across * (batch.x.shape[3] - w + 1))
        x = batch.x.clone()
        x[:, :, top : top + h, left : left + w] = F.interpolate(batch.x[partner], (h, w), mode="bilinear", antialias=True)
        share = batch.x.new_full((len(partner),), h * w / (x.shape[2] * x.shape[3]))
        return replace(batch, x=x, target=mixed_target(batch.target, [(None, 1 - share), (partner, share)]))
