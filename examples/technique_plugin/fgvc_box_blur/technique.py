"""A box of each image is blurred in a second view, as in CutBlur (Yoo et al., CVPR 2020, arXiv:2004.00448); a head locates it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from fgvc.config.knots import value_at
from fgvc.errors import FgvcError
from fgvc.techniques.api import Batch, Output, Technique, View
from fgvc.techniques.plan import Context, Plan
from fgvc_box_blur.settings import BoxBlurSettings

BLURRED = "box_blur.blurred"


class BoxBlur(Technique):
    """Blurred box: base = (CE + view CE_blurred) / (1 + view); `where` = BCE(head(f_blurred), share of each cell in the box)."""

    source: ClassVar[str] = "after CutBlur, Yoo et al., CVPR 2020, arXiv:2004.00448"
    forwards: ClassVar[str] = "1"
    measures = ("accuracy",)

    def __init__(self, settings: BoxBlurSettings) -> None:
        self.settings = settings
        self.weights = {"where": settings.where}

    @override
    def setup(self, plan: Plan) -> None:
        """Add the head. Raises FgvcError where the features are no map, or the image is too small to be blurred."""
        channels, *cells = plan.map_shape
        plan.need_cells(cells)
        if min(plan.size) < self.settings.factor:
            raise FgvcError(f"techniques.box_blur.factor: {self.settings.factor} is more than {min(plan.size)} pixels")
        hidden = self.settings.hidden
        plan.add("finder", nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, 1, 1)))
        plan.note(f"locates the box in a map of {cells[0]} x {cells[1]} cells")

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> Tensor:
        """Draw where each box lies, (B,2) float32: shares of the way down and across that it can go."""
        return torch.from_numpy(rng.random((len(batch.labels), 2), dtype=np.float32))

    @override
    def views(self, batch: Batch, ctx: Context) -> list[View]:
        """Add the clean images with a blurred box in each."""
        view, where = (value_at(weight, ctx.progress) for weight in (self.settings.view, self.settings.where))
        if not view and not where:
            return []
        x = batch.x_clean
        box = _boxes(ctx.draw.to(x.device), value_at(self.settings.side, ctx.progress), x.shape[2:])
        coarse = F.interpolate(F.avg_pool2d(x, self.settings.factor), x.shape[2:], mode="bilinear")
        ctx.state["box"] = box
        ctx.show("box", box, x)
        blurred = torch.where(box[:, None], coarse, x)
        return [View("blurred", blurred, [(batch.labels, None)], view or 1.0, classifies=view > 0)]

    @override
    def losses(self, outputs: Mapping[str, Output], ctx: Context) -> dict[str, Tensor]:
        """Compute `where`; measured: `accuracy`, the share of cells that the head puts on the right side of the box's edge."""
        if BLURRED not in outputs:
            return {}
        z = ctx.branches["finder"](ctx.grid(outputs[BLURRED].features)).float()
        share = F.interpolate(ctx.state["box"][:, None].float(), z.shape[2:], mode="area")
        right = (z > 0) == (share > 0.5)
        return {"where": F.binary_cross_entropy_with_logits(z, share), "accuracy": right.float().mean()}


def _boxes(places: Tensor, side: float, size: Sequence[int]) -> Tensor:
    """Boxes (B,H,W) bool of `side` (share of the image's) at `places` (B,2)."""
    inside = []
    for place, pixels in zip(places.unbind(1), size, strict=True):
        length = max(1, round(side * pixels))
        first = (place * (pixels - length + 1)).long()[:, None]
        at = torch.arange(pixels, device=places.device)
        inside.append((at >= first) & (at < first + length))
    return inside[0][:, :, None] & inside[1][:, None, :]
