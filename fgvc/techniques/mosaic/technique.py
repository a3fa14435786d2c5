"""Mosaic for classification: four images in one, labels by the exact area of each.

The mosaic of detectors (YOLOv4, Bochkovskiy et al. 2020, arXiv:2004.10934) keeps boxes; labels by area are fgvc's own. Left
after stripping: nothing, it only changes the batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fgvc.techniques.api import Batch
from fgvc.techniques.mixing import MixingTechnique, draw_count, mixed_target, partners
from fgvc.techniques.mosaic.canvas import CELLS, in_cells, on_canvas, shares
from fgvc.techniques.mosaic.settings import MosaicSettings
from fgvc.techniques.plan import Context


class Mosaic(MixingTechnique):
    """Mosaic: x' = pieces of x, x[p], x[q], x[r]; loss = sum_i a_i CE(y_i), a_i the exact share of the pixels."""

    source: ClassVar[str] = "YOLOv4, Bochkovskiy et al. 2020, arXiv:2004.10934; here with labels by area"

    config: MosaicSettings

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> dict[str, Any]:
        """Draw `orders` (3,B) int64; cells: `split` (n,2) int64 rows and columns of the first cell, `windows` (n,4,2) in [0,1);
        canvas: `middle` (n,2), `scale` (n,), `shift` (n,2). n is 1 or B."""
        count = draw_count(batch, self.config.per)
        orders = [partners(rng, batch.labels, self.config.pairing) for _ in range(CELLS - 1)]
        drawn: dict[str, Any] = {"orders": torch.stack(orders)}
        if self.config.style == "cells":
            sides = np.array(batch.x.shape[2:])
            split = np.rint(rng.uniform(*self.config.split, (count, 2)) * sides).clip(1, sides - 1).astype(np.int64)
            return drawn | {"split": split, "windows": rng.random((count, CELLS, 2))}
        largest = self.config.shift
        for name, low, high, shape in (
            ("middle", 0.5, 1.5, (count, 2)),
            ("scale", *self.config.scale, (count,)),
            ("shift", 0.5 - largest, 0.5 + largest, (count, 2)),
        ):
            drawn[name] = torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))
        return drawn

    @override
    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        if ctx.draw is None:
            return batch
        orders = ctx.draw["orders"].to(batch.x.device, non_blocking=True)
        pictures = [batch.x, *(batch.x[order] for order in orders)]
        if self.config.style == "cells":
            x, areas = _in_cells(pictures, ctx.draw["split"], ctx.draw["windows"])
        else:
            numbers = (ctx.draw[name].to(batch.x.device, non_blocking=True) for name in ("middle", "scale", "shift"))
            x, areas = on_canvas(pictures, *numbers)
        return replace(batch, x=x, target=mixed_target(batch.target, list(zip([None, *orders], areas, strict=True))))


def _in_cells(pictures: list[Tensor], split: np.ndarray, windows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mosaics (B,3,H,W), and each picture's share (4,B) float32."""
    x, size = pictures[0], pictures[0].shape[2:]
    groups = [slice(None)] if len(split) == 1 else [slice(b, b + 1) for b in range(len(split))]
    mosaic = torch.empty_like(x)
    for rows, (y, z), places in zip(groups, split.tolist(), windows.tolist(), strict=True):
        mosaic[rows] = in_cells([picture[rows] for picture in pictures], (y, z), places)
    areas = torch.tensor([shares((y, z), size) for y, z in split.tolist()], device=x.device)
    return mosaic, areas.T.expand(CELLS, len(x))
