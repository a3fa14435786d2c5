"""SaliencyMix (Uddin et al., ICLR 2021, arXiv:2006.01791): CutMix whose box lies at the most salient place of the other image.

Left after stripping: nothing, it only changes the batch.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fgvc.techniques.api import Batch
from fgvc.techniques.boxes import boxes_around
from fgvc.techniques.mixing import MixingTechnique, boxes_of_partners, draw_count, partners
from fgvc.techniques.plan import Context
from fgvc.techniques.saliencymix.saliency import peaks, saliency
from fgvc.techniques.saliencymix.settings import SaliencymixSettings


class Saliencymix(MixingTechnique):
    """SaliencyMix: x' = x outside and x[p] inside of a box around the most salient place of x[p]; labels by the exact area.

    Each image has its own place; the official code uses that of one image for the whole batch.
    """

    source: ClassVar[str] = "Uddin et al., ICLR 2021, arXiv:2006.01791"

    config: SaliencymixSettings

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> tuple[Tensor, Tensor]:
        """Draw sides (1 or B,2) int64, height and width in pixels, and partners (B,) int64."""
        share = rng.beta(self.config.alpha, self.config.alpha, draw_count(batch, self.config.per))
        sides = np.rint(np.sqrt(share)[:, None] * batch.x.shape[2:]).astype(np.int64)
        return torch.from_numpy(sides), partners(rng, batch.labels, self.config.pairing)

    @override
    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        if ctx.draw is None:
            return batch
        size = (batch.x.shape[2], batch.x.shape[3])
        sides, order = (drawn.to(batch.x.device, non_blocking=True) for drawn in ctx.draw)
        maps = saliency(batch.x)
        ctx.show("saliency", maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12), batch.x)
        box = boxes_around(peaks(maps, size)[order], sides.expand(len(order), 2), size)
        return boxes_of_partners(batch, box, order)
