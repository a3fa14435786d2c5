"""What the mixing techniques share: who is mixed with whom, boxes, and targets of exact shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fgvc.config.technique import Mixing
from fgvc.models.target import Target
from fgvc.techniques.api import Batch, Technique

Part = tuple[Tensor | None, Tensor]
"""Which rows (B,) int64 a share comes from, None: the images' own; and the share (B,) float32."""


class MixingTechnique(Technique):
    """One that mixes images and their labels, in the share of the steps that its settings name; a subclass narrows `config`."""

    config: Mixing

    def __init__(self, config: Mixing) -> None:
        self.config = config

    @override
    def mixes(self, progress: float) -> float:
        return self.config.share(progress)


def partners(rng: np.random.Generator, labels: Tensor, pairing: Literal["any", "other_class"]) -> Tensor:
    """(B,) int64: a permutation of the batch; of another class: rows drawn alike from all that have another label."""
    count = len(labels)
    if pairing == "any":
        return torch.from_numpy(rng.permutation(count))
    y = labels.cpu().numpy()
    return torch.from_numpy((rng.random((count, count)) - (y[:, None] == y)).argmax(1))


def draws(batch: Batch, per: Literal["batch", "sample"]) -> int:
    """How many draws a step needs: 1, or B."""
    return 1 if per == "batch" else len(batch.labels)


def draw_boxes(rng: np.random.Generator, share: np.ndarray, size: tuple[int, int], *, least: int = 0) -> Tensor:
    """(n,4) int64 top, left, bottom, right for shares (n,) in [0,1] of an image of `size`: sides sqrt(share) of the image's,
    of `least` pixels or more; the centre anywhere, what reaches outside is cut off (CutMix, arXiv:1905.04899, Eq. 2)."""
    sides = np.maximum(np.rint(np.sqrt(share)[:, None] * size), least).astype(np.int64)
    return boxes_around(torch.from_numpy(rng.integers(0, size, (len(share), 2))), torch.from_numpy(sides), size)


def boxes_around(centres: Tensor, sides: Tensor, size: tuple[int, int]) -> Tensor:
    """(n,4) int64 top, left, bottom, right, cut off at the edges, from centres and sides (n,2) int64, down and across."""
    first, bound = centres - sides // 2, torch.tensor(size, device=centres.device)
    return torch.cat([first.clamp(min=0), torch.minimum(first + sides, bound)], dim=1)


def inside(box: Tensor, size: tuple[int, int]) -> Tensor:
    """(n,1,H,W) bool: what lies in boxes (n,4)."""
    y, x = (torch.arange(side, device=box.device) for side in size)
    top, left, bottom, right = box.unbind(1)
    rows = (y >= top[:, None]) & (y < bottom[:, None])
    columns = (x >= left[:, None]) & (x < right[:, None])
    return (rows[:, :, None] & columns[:, None])[:, None]


def share_of(box: Tensor, size: tuple[int, int]) -> Tensor:
    """(n,) float32: the share of the image that boxes (n,4) cover, exactly."""
    return ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])).float() / (size[0] * size[1])


def pasted(x: Tensor, source: Tensor, *, to: Tensor, of: Tensor) -> Tensor:
    """x (B,3,H,W) with what `source` has in its boxes `of`, bilinearly resized, in the boxes `to`; both (1,4) or (B,4), none
    empty. As torch's `interpolate` of each piece: nothing outside of the piece leaks into it."""
    size = (x.shape[2], x.shape[3])
    grid = []
    for axis, side in enumerate(size):
        at = torch.arange(side, device=x.device) + 0.5
        (start, end), (first, last) = ((b[:, axis, None], b[:, axis + 2, None]) for b in (to, of))
        seen = first + (at - start) * ((last - first) / (end - start))
        # Continuous coordinates: the middle of the piece's first pixel is at first + 0.5.
        grid.append(2 * seen.clamp(first + 0.5, last - 0.5) / side - 1)
    rows, columns = grid
    where = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=-1).to(x.dtype)
    moved = F.grid_sample(source, where.expand(len(x), -1, -1, -1), align_corners=False, padding_mode="border")
    return torch.where(inside(to, size), moved, x)


def boxes_of_partners(batch: Batch, box: Tensor, order: Tensor) -> Batch:
    """Each image with what its partner `order` (B,) has in the boxes (1 or B,4), at the same place; labels by exact area."""
    size = (batch.x.shape[2], batch.x.shape[3])
    theirs = share_of(box, size).expand(len(order))
    x = torch.where(inside(box, size), batch.x[order], batch.x)
    return replace(batch, x=x, target=mixed_target(batch.target, [(None, 1 - theirs), (order, theirs)]))


def mixed_target(target: Target, parts: Sequence[Part]) -> list[tuple[Tensor, Tensor]]:
    """The labels of images that were mixed of others, each with its share; the target may be mixed already."""
    return [
        ((y if order is None else y[order]), share if w is None else (w if order is None else w[order]) * share)
        for order, share in parts
        for y, w in target
    ]
