"""Centre loss (Wen et al., ECCV 2016; no arXiv): the features of a class are drawn to its centre, which follows them.

The features are what the deployed head's last layer reads. After stripping nothing is left: the centres go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fgvc.techniques.api import MAIN, Output, Technique
from fgvc.techniques.centre_loss.settings import CentreLossSettings
from fgvc.techniques.centres import FeatureBuffer, class_sums
from fgvc.techniques.plan import Context, Plan


class CentreLoss(Technique):
    """Centre loss: L = mean_b |x_b - c_y|^2 / 2 (Eq. 2); then c_j -= rate * sum over y=j of (c_j - x) / (1 + n_j) (Eq. 4),
    once a step, of all its images."""

    source: ClassVar[str] = "Wen et al., ECCV 2016 (no arXiv)"

    def __init__(self, config: CentreLossSettings) -> None:
        self.config = config
        self.weights = {"centre": config.centre}
        self._buffer = FeatureBuffer()

    @override
    def setup(self, plan: Plan) -> None:
        plan.add("centres", Centres(plan.classes, plan.pooled_width))

    @override
    def losses(self, outputs: Mapping[str, Output], ctx: Context) -> dict[str, Tensor]:
        """Compute `centre`, of the main view; none where its labels are mixed. Collects the features, on every rank."""
        main = outputs[MAIN]
        x = ctx.pooled(main.features).float()
        self._buffer.add(x, main.view.target, ctx)
        if len(main.view.target) > 1:
            return {}
        centres = cast("Centres", ctx.branches["centres"]).values
        return {"centre": (x - centres[main.view.target[0][0]]).square().sum(1).mean() / 2}

    @override
    def after_step(self, ctx: Context) -> None:
        """Move the centres by this step's features, those of all ranks and micro-batches together."""
        if features := self._buffer.take():
            cast("Centres", ctx.branches["centres"]).follow(*features, rate=self.config.rate)


class Centres(nn.Module):
    """Centre of the features of each class, 0 at first."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(classes, width))
        self.values: Tensor

    @torch.no_grad()
    def follow(self, x: Tensor, labels: Tensor, *, rate: float) -> None:
        """Move the centres towards x (B,D) of labels (B,), each in [0,K), or -1: left out."""
        present, counts, sums = class_sums(x, labels)
        centres = self.values[present]
        self.values[present] = centres - rate * (counts[:, None] * centres - sums) / (1 + counts[:, None])
