"""Attention cropping and dropping as in WS-DAN (Hu et al. 2019, arXiv:1901.09891), with the deployed head left as it is.

A training-only branch learns attention maps. Each image is trained on again cropped to the region of one map, and once
more with that region dropped; the deployed classifier learns from all three. After stripping nothing is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fgvc.config.knots import ever, value_at
from fgvc.models.class_maps import normalised
from fgvc.models.loss import cross_entropy
from fgvc.techniques.api import MAIN, Batch, Output, Technique, View
from fgvc.techniques.attention_crop_drop.attention import BilinearAttention, pick
from fgvc.techniques.attention_crop_drop.settings import AttentionCropDropSettings
from fgvc.techniques.boxes import boxes_of_masks, crop, moved
from fgvc.techniques.centres import FeatureBuffer
from fgvc.techniques.masks import erase, select, shifted
from fgvc.techniques.plan import Context, Plan
from fgvc.techniques.settings import Region


class AttentionCropDrop(Technique):
    """Attention cropping and dropping: base = (CE + crop CE_crop + drop CE_drop) / (1 + crop + drop); terms: `pooled` =
    mean_v CE(BAP(v)), `centre`."""

    source: ClassVar[str] = "WS-DAN, Hu et al. 2019, arXiv:1901.09891"
    forwards: ClassVar[str] = "2"

    def __init__(self, config: AttentionCropDropSettings) -> None:
        self.config = config
        self.weights = {"pooled": config.pooled, "centre": config.centre}
        self._buffer = FeatureBuffer()

    @override
    def setup(self, plan: Plan) -> None:
        """Add the branch. Raises FgvcError where the features are no map, or `guide: cam` has none."""
        channels, *cells = plan.map_shape
        plan.need_cells(cells)
        if self.config.guide == "cam":
            self._method = plan.map(self.config.map)
        if self.config.learns:
            plan.add("attention", BilinearAttention(channels, self.config.maps, plan.classes, scale=self.config.scale))
        if ever(self.config.crop):
            plan.render(self.config.render)

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> dict[str, Any]:
        """Draw for crop and drop (B,4) float32: threshold, which map, how far down and across instead; and a seed."""
        drawn: dict[str, Any] = {"seed": int(rng.integers(2**63))}
        for view, bounds in (("crop", self.config.crop_threshold), ("drop", self.config.drop_threshold)):
            numbers = rng.random((len(batch.labels), 4), dtype=np.float32)
            numbers[:, 0] = rng.uniform(*bounds, len(numbers))
            drawn[view] = torch.from_numpy(numbers)
        return drawn

    @override
    def views_after(self, batch: Batch, outputs: Mapping[str, Output], ctx: Context) -> list[View]:
        """Cropped and dropped view. Crops are cut from the finer render, unless the main view is mixed or erased."""
        main, views = outputs[MAIN], []
        if value_at(self.config.centre, ctx.progress):
            self._buffer.add(self._attend(main, ctx)[1], main.view.target, ctx)
        x, size = main.view.x, (main.view.x.shape[2], main.view.x.shape[3])
        for name, largest in (("crop", 1.0), ("drop", self.config.largest_drop)):
            if not (weight := value_at(getattr(self.config, name), ctx.progress)):
                continue
            drawn = ctx.draw[name].to(x.device, non_blocking=True)
            maps = self._guide(main, drawn[:, 1], ctx)
            mask = select(maps, size, Region.model_construct(area=(0.0, largest)), values=drawn[:, 0])
            if name == "crop":
                box = boxes_of_masks(mask, self.config.padding)
                box = moved(box, drawn[:, 2:], size) if self.config.guide == "random" else box
                view_x = crop(batch.finest if x is batch.x_clean else x, box, size, pixels=size)
            else:
                mask = shifted(mask, drawn[:, 2:]) if self.config.guide == "random" else mask
                ctx.show("dropped", mask)
                view_x = erase(x, mask, self.config.fill, seed=ctx.draw["seed"])
            ctx.show(f"map for {name}", maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12))
            views.append(View(name, view_x, main.view.target, weight, bn="own"))
        return views

    @override
    def losses(self, outputs: Mapping[str, Output], ctx: Context) -> dict[str, Tensor]:
        """Compute `pooled` over all views, `centre` of the main one where its labels are whole."""
        views = [o for name, o in outputs.items() if name == MAIN or name.startswith("attention_crop_drop.")]
        branch, vectors = cast("BilinearAttention", ctx.branches["attention"]), [self._attend(o, ctx)[1] for o in views]
        logits = branch.logits(torch.cat(vectors)).split([len(vector) for vector in vectors])
        terms = [cross_entropy(z, o.view.target) for z, o in zip(logits, views, strict=True)]
        losses = {"pooled": torch.stack(terms).mean()}
        if len(target := views[0].view.target) == 1:
            losses["centre"] = branch.distance(vectors[0], target[0][0])
        return losses

    @override
    def after_step(self, ctx: Context) -> None:
        """Move the centres by this step's features, those of all ranks and micro-batches together."""
        if features := self._buffer.take():
            cast("BilinearAttention", ctx.branches["attention"]).follow(*features, rate=self.config.centre_rate)

    @override
    def refine(self, output: Output, ctx: Context) -> Tensor:
        """Crop the images for an evaluation in two passes: to the class map or the mean attention above 0.1 of its maximum,
        widened by 0.05, as in WS-DAN's second pass."""
        x, size = output.view.x, (output.view.x.shape[2], output.view.x.shape[3])
        by_class = self.config.guide == "cam"
        maps = normalised(output.map(self._method)) if by_class else self._attend(output, ctx)[0].mean(1)
        mask = select(maps, size, Region.model_construct(value=0.1, area=(0.0, 1.0)))
        return crop(x, boxes_of_masks(mask, 0.05), size, pixels=size)

    def _guide(self, main: Output, which: Tensor, ctx: Context) -> Tensor:
        """Class map (B,h,w), or for each sample one attention map with probability ~ sqrt of its sum."""
        if self.config.guide == "cam":
            return normalised(main.map(self._method))
        return pick(self._attend(main, ctx)[0].detach(), which)

    def _attend(self, output: Output, ctx: Context) -> tuple[Tensor, Tensor]:
        """Maps and pooled features of one view by the branch, computed once a step."""
        if output.view.name not in ctx.cache:
            branch, batch_statistics = ctx.branches["attention"], output.view.bn == "own"
            ctx.cache[output.view.name] = branch(ctx.grid(output.features), batch_statistics=batch_statistics)
        return cast("tuple[Tensor, Tensor]", ctx.cache[output.view.name])
