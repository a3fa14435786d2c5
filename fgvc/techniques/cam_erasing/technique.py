"""CAM-guided erasing: the image region that the network relies on is erased, so that it learns the remaining evidence.

The map is that of the step itself, of the moving average, or of the epoch before. The last is the first form of Cutout
(DeVries & Taylor 2017, arXiv:1708.04552), which then kept random boxes; compare AE-PSL (Wei et al., CVPR 2017,
arXiv:1703.08448). What was erased when a map was recorded is not in that map, so the regions of one image change from epoch to
epoch. After stripping nothing is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fgvc.config.knots import value_at
from fgvc.models.class_maps import normalised
from fgvc.techniques.api import MAIN, Batch, Output, Technique, View
from fgvc.techniques.cam_erasing.settings import CamErasingSettings
from fgvc.techniques.cam_erasing.store import MapStore
from fgvc.techniques.masks import erase, select
from fgvc.techniques.plan import Context, Plan
from fgvc.techniques.ranks import gathered


class CamErasing(Technique):
    """CAM-guided erasing: x' = x outside of region(map), `fill` inside."""

    source: ClassVar[str] = "DeVries & Taylor 2017, arXiv:1708.04552; Wei et al., CVPR 2017, arXiv:1703.08448"
    forwards: ClassVar[str] = "1 (current), 1/3 (ema), 0 (previous_epoch)"

    def __init__(self, config: CamErasingSettings) -> None:
        self.config = config
        self.remembers_images = config.source == "previous_epoch"
        self._store: MapStore | None = None
        self._new: list[tuple[Tensor, Tensor, Tensor, tuple[int, int]]] = []  # of the micro-batches of one step

    @override
    def setup(self, plan: Plan) -> None:
        """Choose the class map. Raises FgvcError where this backbone has none."""
        self._method = plan.map(self.config.map)
        if self.config.source == "previous_epoch":
            self._store = MapStore(plan.map_shape[1:])

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> tuple[Tensor, int]:
        """Draw which samples are erased, (B,) bool, and the seed of a fill of noise."""
        share = self.config.probability
        share = (1.0 if self.config.source == "current" else 0.5) if share is None else share
        return torch.from_numpy(rng.random(len(batch.labels)) < share), int(rng.integers(2**63))

    @override
    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        """Erase where the map is there before the forward."""
        if self.config.source == "ema":
            return replace(batch, x=self._erased(batch.x, normalised(ctx.eval_pass("ema").map(self._method)), ctx))
        if self._store is not None:
            maps = self._store.recall(batch.index, batch.geometry, batch.x.shape[2:]).to(batch.x.device)
            # Not stretched again: the map's maximum may lie outside of the new crop.
            return replace(batch, x=self._erased(batch.x, maps, ctx, maximum=1.0))
        return batch

    @override
    def views_after(self, batch: Batch, outputs: Mapping[str, Output], ctx: Context) -> list[View]:
        main = outputs[MAIN]
        if self._store is not None:
            height, width = main.view.x.shape[2:]
            if len(main.view.target) == 1:
                maps = main.map(self._method)
            else:  # mixed: of the image's own label all the same
                maps = main.mapper(main.features, [(batch.labels, None)], self._method, batch.x.shape[2:])
            self._new.append((batch.index, batch.geometry, normalised(maps), (height, width)))
        weight = value_at(1.0 if self.config.weight is None else self.config.weight, ctx.progress)
        if self.config.source != "current" or not weight:
            return []
        x = self._erased(main.view.x, normalised(main.map(self._method)), ctx)
        return [View("erased", x, main.view.target, weight, bn="own")]

    @override
    def after_step(self, ctx: Context) -> None:
        """Record this step's maps for the next epoch, those of all ranks."""
        for index, geometry, maps, size in self._new:
            assert self._store is not None
            device = maps.device
            rows, matrices = gathered(index.to(device)), gathered(geometry.to(device))
            self._store.record(rows, matrices, gathered(maps), size)
        self._new.clear()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._store is None else self._store.state_dict()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._store is not None:
            self._store.load_state_dict(state)

    def _erased(self, x: Tensor, maps: Tensor, ctx: Context, maximum: float | None = None) -> Tensor:
        """Erase the regions of `maps` (B,h,w) in [0,1] from the drawn samples of x (B,3,H,W)."""
        drawn, seed = ctx.draw
        mask = select(maps, x.shape[2:], self.config.region, maximum=maximum) & drawn.to(x.device)[:, None, None]
        ctx.show("map", maps, x)
        ctx.show("erased", mask, x)
        return erase(x, mask, self.config.fill, seed=seed)
