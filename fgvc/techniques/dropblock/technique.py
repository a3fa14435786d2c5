"""DropBlock (Ghiasi et al., NeurIPS 2018, arXiv:1810.12890): squares of a stage's map are dropped at random places.

The random control of `adl`. Left after stripping: nothing, it is the identity in evaluation.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fgvc.config.knots import value_at
from fgvc.techniques.api import Batch, Technique
from fgvc.techniques.dropblock.settings import DropblockSettings
from fgvc.techniques.plan import Context, Plan


class Dropblock(Technique):
    """DropBlock: f' = f m |m| / sum m; m is 0 in every square whose corner was drawn, with the paper's probability (Eq. 1)
    rate / b^2 * h w / ((h - b + 1)(w - b + 1))."""

    source: ClassVar[str] = "Ghiasi et al., NeurIPS 2018, arXiv:1810.12890"

    def __init__(self, config: DropblockSettings) -> None:
        self.config = config

    @override
    def setup(self, plan: Plan) -> None:
        """Add the gates. Raises FgvcError where a stage has no map, or the classifier does not read it."""
        for number, stage in enumerate(self.config.stages):
            plan.gate(plan.cells(stage), partial(self._gate, number))

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> list[int]:
        """Draw one seed a stage: how many cells there are is known in the forward only."""
        return [int(seed) for seed in rng.integers(2**63, size=len(self.config.stages))]

    def _gate(self, number: int, f: Tensor, ctx: Context) -> Tensor:
        b, _, h, w = ctx.grid(f).shape
        block = max(min(self.config.block, h // 2, w // 2), 1)
        corners = h - block + 1, w - block + 1
        gamma = value_at(self.config.rate, ctx.progress) / block**2 * h * w / (corners[0] * corners[1])
        rng = torch.Generator().manual_seed(ctx.draw[number])  # on the CPU: the same numbers on every device
        squares = (torch.rand(b, 1, *corners, generator=rng) < gamma).to(f.device).float()
        keep = 1 - F.max_pool2d(F.pad(squares, [block - 1] * 4), block, stride=1)[:, 0]
        ctx.show(f"dropped at {self.config.stages[number]}", keep == 0)
        return ctx.scaled(f, keep * (keep.numel() / keep.sum().clamp_min(1)))
