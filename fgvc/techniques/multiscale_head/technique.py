"""Multi-scale head: ASFF (Liu et al. 2019, arXiv:1911.09516) over stages of the backbone, and a classifier on each.

Early stages are supervised directly, each at its own resolution. After stripping nothing is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fgvc.config.knots import ever, value_at
from fgvc.errors import FgvcError
from fgvc.models.loss import cross_entropy
from fgvc.techniques.api import MAIN, Output, Technique
from fgvc.techniques.multiscale_head.asff import Asff
from fgvc.techniques.multiscale_head.settings import WIDEST, MultiscaleHeadSettings
from fgvc.techniques.plan import Context, Plan
from fgvc.techniques.settings import FEATURES


class MultiscaleHead(Technique):
    """Multi-scale head: L = fused CE(W pool(sum_l a_l r_l)) + each mean_l CE(W_l norm(pool(f_l))); a, r: see asff.py."""

    source: ClassVar[str] = "ASFF, Liu et al. 2019, arXiv:1911.09516"

    def __init__(self, config: MultiscaleHeadSettings) -> None:
        self.config = config
        self.weights = {"fused": config.fused, "each": config.each}
        self.measures = tuple(f"share_of_{stage}" for stage in config.stages)

    @override
    def setup(self, plan: Plan) -> None:
        """Add hooks and heads. Raises FgvcError where a stage is no map that fgvc knows, or named twice."""
        stages = self.config.stages
        self._names = [plan.stage(stage) for stage in stages]
        if len(set(self._names)) < len(stages):
            raise FgvcError(f"techniques.{plan.kind}.stages: {list(stages)} names a stage twice: {self._names}")
        shapes = [plan.shape_at(name) for name in self._names]
        for stage, (channels, *_) in zip(stages, shapes, strict=True):
            if stage != FEATURES and channels != (expected := plan.stage_channels(stage)):
                raise FgvcError(
                    f"techniques.{plan.kind}: stage {stage} should have {expected} channels and gives {channels}: a layout that "
                    "fgvc does not know; leave it out"
                )
        if ever(self.config.fused) or ever(self.config.each):
            for name in self._names:
                if name != FEATURES:
                    plan.hook(name)
        if ever(self.config.fused):
            level = len(stages) // 2 if self.config.level is None else stages.index(self.config.level)
            width = self.config.width or min(shapes[level][0], WIDEST)
            plan.add("fusion", Asff(shapes, level=level, width=width))
            plan.add("fused", nn.Linear(width, plan.classes))
        if ever(self.config.each):
            # Of a residual stream the scale can be anything.
            heads = [nn.Sequential(nn.LayerNorm(c), nn.Linear(c, plan.classes)) for c, *_ in shapes]
            plan.add("each", nn.ModuleList(heads))

    @override
    def losses(self, outputs: Mapping[str, Output], ctx: Context) -> dict[str, Tensor]:
        """Compute `fused` and `each`; measured: `share_of_<stage>`, the mean weight of each stage in the fusion."""
        main = outputs[MAIN]
        target, losses = main.view.target, {}
        maps = [ctx.grid(main.features if name == FEATURES else main.hooked[name]) for name in self._names]
        if value_at(self.config.fused, ctx.progress):
            fused, weights = ctx.branches["fusion"](maps)
            losses["fused"] = cross_entropy(ctx.branches["fused"](fused.mean((2, 3))), target)
            for name, stage, share in zip(self.measures, self.config.stages, weights.unbind(1), strict=True):
                losses[name] = share.mean()
                ctx.show(f"weight of stage {stage}", share)
        if value_at(self.config.each, ctx.progress):
            heads = cast("nn.ModuleList", ctx.branches["each"])
            terms = [cross_entropy(head(f.mean((2, 3))), target) for head, f in zip(heads, maps, strict=True)]
            losses["each"] = torch.stack(terms).mean()
        return losses
