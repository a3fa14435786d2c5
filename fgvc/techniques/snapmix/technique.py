"""SnapMix (Huang et al., AAAI 2021, arXiv:2012.04846): a piece of another image, resized; labels by class maps.

Each label counts by its share of the class map, not of the area. The maps come from a forward of the clean images in eval mode,
which leaves the batch norms alone. Left after stripping: nothing, it only changes the batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fgvc.techniques.api import Batch
from fgvc.techniques.boxes import draw_boxes, inside
from fgvc.techniques.mixing import MixingTechnique, draw_count, mixed_target, partners, pasted
from fgvc.techniques.plan import Context, Plan
from fgvc.techniques.snapmix.settings import SnapmixSettings


class Snapmix(MixingTechnique):
    """SnapMix: loss = (1 - sum_to S_a) CE(y_a) + (sum_of S_b) CE(y_b), S the class map above its minimum, with sum 1.

    The two weights need not add up to one: those of two pieces of sky are small, those of two heads large. Pairs of one class
    are counted once; the official code counts them twice.
    """

    source: ClassVar[str] = "Huang et al., AAAI 2021, arXiv:2012.04846"
    forwards: ClassVar[str] = "1 (no backward), in steps that mix so"

    config: SnapmixSettings

    @override
    def setup(self, plan: Plan) -> None:
        """Choose the class map. Raises FgvcError where this backbone has none."""
        self._method = plan.map(self.config.map)

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Draw boxes to paste into and boxes to take from, (1 or B,4) int64 in pixels; partners (B,) int64."""
        size, count = (batch.x.shape[2], batch.x.shape[3]), draw_count(batch, self.config.per)
        to, of = (
            draw_boxes(rng, rng.beta(self.config.alpha, self.config.alpha, count), size, least=1) for _ in range(2)
        )
        return to, of, partners(rng, batch.labels, self.config.pairing)

    @override
    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        if ctx.draw is None:
            return batch
        size = (batch.x.shape[2], batch.x.shape[3])
        to, of, order = (drawn.to(batch.x.device, non_blocking=True) for drawn in ctx.draw)
        maps = semantic(ctx.eval_pass("net").map(self._method), size)
        ctx.show("map", maps / maps.amax((1, 2), keepdim=True), batch.x_clean)
        weight = 1 - (maps * inside(to[:, None], size)).sum((1, 2))
        partner_weight = (maps[order] * inside(of[:, None], size)).sum((1, 2))
        if self.config.one_class == "twice":
            same = batch.labels == batch.labels[order]
            total = weight + partner_weight
            weight, partner_weight = torch.where(same, total, weight), torch.where(same, total, partner_weight)
        x = pasted(batch.x, batch.x[order], to=to, of=of)
        return replace(batch, x=x, target=mixed_target(batch.target, [(None, weight), (order, partner_weight)]))


def semantic(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Semantic percent maps (B,H,W) float32 >= 0 with sum 1, from class maps (B,h,w): brought to the image's size, less their
    minimum. A map that is flat or not finite counts every pixel alike."""
    large = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    above = large - large.amin((1, 2), keepdim=True)
    total = above.sum((1, 2), keepdim=True)
    return torch.where(torch.isfinite(total) & (total > 0), above / total, 1 / (size[0] * size[1]))
