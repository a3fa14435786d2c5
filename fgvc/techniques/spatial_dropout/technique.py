"""Spatial dropout (Tompson et al., CVPR 2015, arXiv:1411.4280): whole channels of a stage's output are dropped, per sample.

Left after stripping: nothing, it is the identity in evaluation.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fgvc.techniques.api import Batch, Technique
from fgvc.techniques.plan import Context, Plan
from fgvc.techniques.spatial_dropout.settings import SpatialDropoutSettings


class SpatialDropout(Technique):
    """Spatial dropout: f'[b,c] = f[b,c] m[b,c] / (1 - rate), m ~ Bernoulli(1 - rate), of maps (B,C,h,w), (B,h,w,C)
    or tokens (B,N,C)."""

    source: ClassVar[str] = "Tompson et al., CVPR 2015, arXiv:1411.4280"

    def __init__(self, config: SpatialDropoutSettings) -> None:
        self.config = config
        self._channels = 0

    @override
    def setup(self, plan: Plan) -> None:
        name = plan.stage(self.config.stage)
        self._channels = plan.stage_channels(self.config.stage)
        plan.gate(name, self._drop)
        if after := plan.norms_after(name):
            plan.note(
                f"WARNING: {after} batch norms come after {name}: in evaluation they meet features of another variance than "
                "in training (Li et al., CVPR 2019). Choose a later stage, or set train.precise_bn"
            )

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> Tensor:
        """Draw (B,C) float32: 0 or 1/(1-rate)."""
        keep = rng.random((len(batch.labels), self._channels)) >= self.config.rate
        return torch.from_numpy((keep / (1 - self.config.rate)).astype(np.float32))

    def _drop(self, f: Tensor, ctx: Context) -> Tensor:
        mask = ctx.draw.to(f.device, f.dtype, non_blocking=True)
        mask = mask[torch.arange(len(f), device=f.device) % len(mask)]  # views of one image lose the same channels
        last = f.ndim == 3 or f.shape[1] != self._channels
        return f * (mask.view(len(f), *[1] * (f.ndim - 2), -1) if last else mask.view(len(f), -1, 1, 1))
