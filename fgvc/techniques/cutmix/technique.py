"""CutMix (Yun et al., ICCV 2019, arXiv:1905.04899): a box of another image, and labels by exact area.

Left after stripping: nothing, it only changes the batch.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from torch import Tensor
from typing_extensions import override

from fgvc.techniques.api import Batch
from fgvc.techniques.boxes import draw_boxes
from fgvc.techniques.cutmix.settings import CutmixSettings
from fgvc.techniques.mixing import MixingTechnique, boxes_of_partners, draw_count, partners
from fgvc.techniques.plan import Context


class Cutmix(MixingTechnique):
    """CutMix: x' = x outside and x[p] inside of a box; loss = (1-a) CE(y) + a CE(y[p]), a the area that the box really covers."""

    source: ClassVar[str] = "Yun et al., ICCV 2019, arXiv:1905.04899"

    config: CutmixSettings

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> tuple[Tensor, Tensor]:
        """Draw boxes (1 or B,4) int64 in pixels, partners (B,) int64."""
        share = rng.beta(self.config.alpha, self.config.alpha, draw_count(batch, self.config.per))
        box = draw_boxes(rng, share, (batch.x.shape[2], batch.x.shape[3]))
        return box, partners(rng, batch.labels, self.config.pairing)

    @override
    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        if ctx.draw is None:
            return batch
        box, order = (drawn.to(batch.x.device, non_blocking=True) for drawn in ctx.draw)
        return boxes_of_partners(batch, box, order)
