"""ADL: Attention-based Dropout Layer (Choe & Shim, CVPR 2019, arXiv:1908.10028).

On named stages, features are either weighted by their own attention or lose their most attended region. After stripping
nothing is left: it is the identity in evaluation.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fgvc.config.knots import value_at
from fgvc.techniques.adl.settings import AdlSettings
from fgvc.techniques.api import Batch, Technique
from fgvc.techniques.plan import Context, Plan


class Adl(Technique):
    """Attention-based dropout: a = mean_c f; f' = f 1[a < gamma max a] with probability drop_rate, else f sigmoid(a)."""

    source: ClassVar[str] = "Choe & Shim, CVPR 2019, arXiv:1908.10028"

    def __init__(self, config: AdlSettings) -> None:
        self.config = config

    @override
    def setup(self, plan: Plan) -> None:
        """Add the gates. Raises FgvcError where a stage has no map, or the classifier does not read it."""
        for number, stage in enumerate(self.config.stages):
            name = plan.cells(stage)
            plan.gate(name, partial(self._gate, number))
            if plan.can_be_negative(name):
                plan.note(
                    f"WARNING: {name} can be negative, and the mean over its channels is then no attention; the paper's "
                    "layers come after a ReLU. Choose another of `stages`"
                )

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> Tensor:
        """Draw (stages, 1 or B) float32, uniform in [0,1)."""
        count = 1 if self.config.per == "batch" else len(batch.labels)
        return torch.from_numpy(rng.random((len(self.config.stages), count), dtype=np.float32))

    def _gate(self, number: int, f: Tensor, ctx: Context) -> Tensor:
        attention = ctx.grid(f).float().mean(1)
        highest = attention.amax((1, 2), keepdim=True)
        rest = attention < value_at(self.config.threshold, ctx.progress) * highest
        if self.config.unattended == "keep":
            rest |= (highest <= 0) | ~rest.any(2, keepdim=True).any(1, keepdim=True)
        numbers = ctx.draw[number].to(f.device, non_blocking=True)
        drops = numbers[torch.arange(len(f), device=f.device) % len(numbers)] < value_at(self.config.drop_rate, ctx.progress)
        weights = torch.where(drops[:, None, None], rest, attention.sigmoid())
        ctx.show(f"dropped at {self.config.stages[number]}", ~rest)
        return ctx.scaled(f, weights)
