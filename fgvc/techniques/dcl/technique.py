"""DCL: Destruction and Construction Learning (Chen et al., CVPR 2019; no arXiv).

Every image also comes as a jigsaw of itself with the same label. One added head tells original from destroyed, another
says where each patch came from, against the exact permutation. Left after stripping: nothing, the deployed head alone
classifies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from fgvc.config.knots import value_at
from fgvc.errors import FgvcError
from fgvc.models.loss import cross_entropy
from fgvc.techniques.api import MAIN, Batch, Output, Technique, View
from fgvc.techniques.dcl.jigsaw import cut, draw_jigsaws, places
from fgvc.techniques.dcl.settings import DclSettings
from fgvc.techniques.plan import Context, Plan

DESTROYED = "dcl.destroyed"


class Dcl(Technique):
    """Destruction and construction: z_d = W_d pool(f), m = conv1x1(pool_N(f)); losses CE(z_d), mean |m - place| over both copies.

    The paper puts a ReLU on m; here it is linear, since its targets are shares of the side in (0,1). See docs/methods.md.
    """

    source: ClassVar[str] = "Chen et al., CVPR 2019 (no arXiv)"
    forwards: ClassVar[str] = "1"
    measures = ("destroyed_accuracy", "location_chance")

    def __init__(self, config: DclSettings) -> None:
        self.config = config
        self.weights = {"destroyed": config.destroyed, "location": config.location}

    @override
    def setup(self, plan: Plan) -> None:
        """Add the two heads. Raises FgvcError where the patches would be empty or the features are no map."""
        n, (channels, *cells), width = self.config.grid, plan.map_shape, plan.pooled_width
        if min(plan.size) < n:
            raise FgvcError(f"techniques.dcl.grid: {n} patches a side do not fit into {min(plan.size)} pixels")
        if min(cells) < n:
            plan.note(
                f"the {cells[0]} x {cells[1]} features are coarser than the grid of {n} x {n}: neighbours share a cell"
            )
        ways = 2 if self.config.head == "2-way" else 2 * plan.classes
        plan.add("destroyed", nn.Linear(width, ways))
        plan.add("location", nn.Conv2d(channels, 2, 1))

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> Tensor:
        """Draw jigsaws (B, N*N) int64: see fgvc.techniques.dcl.jigsaw."""
        jigsaws = draw_jigsaws(rng, len(batch.labels), grid=self.config.grid, reach=self.config.reach)
        return torch.from_numpy(jigsaws)

    @override
    def views(self, batch: Batch, ctx: Context) -> list[View]:
        """Add the jigsaw of the clean image, whatever is mixed elsewhere."""
        classify = value_at(self.config.classify, ctx.progress)
        if not classify and not any(value_at(weight, ctx.progress) for weight in self.weights.values()):
            return []
        x = cut(batch.x_clean, ctx.draw.to(batch.x.device, non_blocking=True))
        target = [(batch.labels, None)]
        return [View("destroyed", x, target, classify or 1.0, classifies=classify > 0, bn=self.config.bn)]

    @override
    def losses(self, outputs: Mapping[str, Output], ctx: Context) -> dict[str, Tensor]:
        """Compute `destroyed` and `location`; measured: the accuracy of the first, and the error that the second would have if it
        always predicted the cell itself."""
        if DESTROYED not in outputs:
            return {}
        copies = outputs[MAIN], outputs[DESTROYED]
        logits = [ctx.branches["destroyed"](ctx.pooled(output.features)).float() for output in copies]
        cells = [F.adaptive_avg_pool2d(ctx.grid(output.features), self.config.grid) for output in copies]
        predicted = [ctx.branches["location"](cell).float() for cell in cells]
        moved = places(ctx.draw.to(predicted[0].device, non_blocking=True))
        home = places(torch.arange(self.config.grid**2, device=moved.device)[None])
        ways = logits[0].shape[1] // 2
        right = torch.cat([z.argmax(1) // ways == copy for copy, z in enumerate(logits)])
        return {
            "destroyed": (_cross_entropy(logits[0], copies[0], 0) + _cross_entropy(logits[1], copies[1], 1)) / 2,
            "location": ((predicted[0] - home).abs().mean() + (predicted[1] - moved).abs().mean()) / 2,
            "destroyed_accuracy": right.float().mean(),
            "location_chance": (moved - home).abs().mean() / 2,
        }


def _cross_entropy(z: Tensor, output: Output, copy: int) -> Tensor:
    """Cross-entropy of z (B,2 or 2K) for `copy`: 0 the original, 1 the destroyed one; with 2K ways also for the class target."""
    ways = z.shape[1] // 2
    if ways == 1:
        return F.cross_entropy(z, torch.full((len(z),), copy, device=z.device))
    return cross_entropy(z, [(y + copy * ways, w) for y, w in output.view.target])
