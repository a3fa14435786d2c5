"""ACoL: Adversarial Complementary Learning (Zhang et al., CVPR 2018, arXiv:1804.06962).

The deployed classifier is the first one. What it relies on is erased from the features, and another one must do without.
After stripping nothing is left: the added classifiers go, or there were none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from fgvc.models.class_maps import dominant, normalised
from fgvc.models.loss import cross_entropy
from fgvc.techniques.acol.settings import AcolSettings
from fgvc.techniques.api import MAIN, Output, Technique
from fgvc.techniques.masks import select
from fgvc.techniques.plan import Context, Plan


class Acol(Technique):
    """Adversarial erasing of features: L = mean_k CE(head_k(f * keep_k), y); keep_1 = not region(map of the deployed head),
    keep_k+1 also loses head k's."""

    source: ClassVar[str] = "Zhang et al., CVPR 2018, arXiv:1804.06962"
    measures = ("area",)

    def __init__(self, config: AcolSettings) -> None:
        self.config = config
        self.weights = {"erased": config.erased}

    @override
    def setup(self, plan: Plan) -> None:
        """Add the classifiers. Raises FgvcError where this backbone has no class map."""
        self._method = plan.map(self.config.map)
        if not self.config.shared:
            for number in range(self.config.heads):
                plan.add(f"head{number}", _head(plan.map_shape[0], self.config.hidden, plan.classes))

    @override
    def losses(self, outputs: Mapping[str, Output], ctx: Context) -> dict[str, Tensor]:
        """Compute `erased`; measured: `area`, the share of the map's cells that the last classifier does not see."""
        main = outputs[MAIN]
        target, f = main.view.target, ctx.grid(main.features)
        maps = normalised(main.map(self._method))
        keep = ~select(maps, f.shape[2:], self.config.region)
        ctx.show("map", maps)
        terms = []
        for number in range(self.config.heads):
            if self.config.shared:
                features = ctx.scaled(main.features, keep)
                terms.append(cross_entropy(ctx.head(features), target))
            else:
                class_maps = ctx.branches[f"head{number}"](f * keep[:, None])
                terms.append(cross_entropy(class_maps.mean((2, 3)), target))
            if number + 1 < self.config.heads:
                if self.config.shared:
                    maps = main.mapper(features, target, self._method, main.view.x.shape[2:])
                else:
                    maps = class_maps.detach()[torch.arange(len(class_maps)), dominant(target)].float()
                rest = keep & ~select(normalised(maps) * keep, f.shape[2:], self.config.region)
                keep = torch.where(rest.any(2, keepdim=True).any(1, keepdim=True), rest, keep)  # something must be left
        ctx.show("erased", ~keep)
        return {"erased": torch.stack(terms).mean(), "area": 1 - keep.float().mean()}


def _head(channels: int, hidden: int, classes: int) -> nn.Module:
    """Classifier of f (B,C,h,w): class maps (B,K,h,w), whose means are the logits."""
    if not hidden:
        return nn.Conv2d(channels, classes, 1)
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(),
        nn.Conv2d(hidden, hidden, 3, padding=1), nn.ReLU(),
        nn.Conv2d(hidden, classes, 1),
    )  # fmt: skip
