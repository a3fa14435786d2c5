"""Shared code of the mixing techniques: drawing partners, pasting boxes, and targets of exact shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fgvc.config.technique import PairMixing
from fgvc.models.target import Target
from fgvc.techniques.api import Batch, Technique
from fgvc.techniques.boxes import area_share, inside

Source = tuple[Tensor | None, Tensor]
"""Rows (B,) int64 of a share's images, None: the image's own; and the share (B,) float32."""


class MixingTechnique(Technique):
    """Base class of techniques that mix images and their labels, in the share of the steps that their settings name.

    A subclass narrows `config`.
    """

    config: PairMixing

    def __init__(self, config: PairMixing) -> None:
        self.config = config

    @override
    def mixes(self, progress: float) -> float:
        return self.config.share(progress)


def partners(rng: np.random.Generator, labels: Tensor, pairing: Literal["any", "other_class"]) -> Tensor:
    """Draw a partner (B,) int64 for each row: a permutation of the batch, or uniformly among the rows of another label."""
    count = len(labels)
    if pairing == "any":
        return torch.from_numpy(rng.permutation(count))
    y = labels.cpu().numpy()
    return torch.from_numpy((rng.random((count, count)) - (y[:, None] == y)).argmax(1))


def partner_rows(draw: Any) -> Tensor:
    """Rows (B,M) int64 of the batch whose images are mixed into each, by what a mixing technique has drawn: its `orders` (M,B),
    or the last of several parts, (B,)."""
    orders: Tensor = draw["orders"] if isinstance(draw, Mapping) else draw[-1][None]
    return orders.T


def draw_count(batch: Batch, per: Literal["batch", "sample"]) -> int:
    """Number of draws that a step needs: 1, or B."""
    return 1 if per == "batch" else len(batch.labels)


def pasted(x: Tensor, source: Tensor, *, to: Tensor, of: Tensor) -> Tensor:
    """Paste the pieces in boxes `of` of `source`, bilinearly resized, into boxes `to` of x (B,3,H,W); both (1,4) or (B,4) int64,
    none empty. As torch's `interpolate` of each piece: nothing outside of the piece leaks into it."""
    size = (x.shape[2], x.shape[3])
    grid = []
    for axis, side in enumerate(size):
        at = torch.arange(side, device=x.device) + 0.5
        (start, end), (first, last) = ((box[:, 1 - axis, None], box[:, 3 - axis, None]) for box in (to, of))
        place = first + (at - start) * ((last - first) / (end - start))
        # Continuous coordinates: the middle of the piece's first pixel is at first + 0.5.
        grid.append(2 * place.clamp(first + 0.5, last - 0.5) / side - 1)
    rows, columns = grid
    where = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=-1).to(x.dtype)
    moved = F.grid_sample(source, where.expand(len(x), -1, -1, -1), align_corners=False, padding_mode="border")
    return torch.where(inside(to[:, None], size)[:, None], moved, x)


def boxes_of_partners(batch: Batch, box: Tensor, order: Tensor) -> Batch:
    """Paste the boxes (1 or B,4) of each image's partner `order` (B,) into it, at the same place; labels by exact area."""
    size = (batch.x.shape[2], batch.x.shape[3])
    theirs = area_share(box, size).expand(len(order))
    x = torch.where(inside(box[:, None], size)[:, None], batch.x[order], batch.x)
    return replace(batch, x=x, target=mixed_target(batch.target, [(None, 1 - theirs), (order, theirs)]))


def mixed_target(target: Target, sources: Sequence[Source]) -> list[tuple[Tensor, Tensor]]:
    """Target of images that were mixed of others: the labels of each, by its share; `target` may be mixed already."""
    return [
        ((y if order is None else y[order]), share if w is None else (w if order is None else w[order]) * share)
        for order, share in sources
        for y, w in target
    ]
