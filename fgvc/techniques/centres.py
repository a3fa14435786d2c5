"""Features by class, for centres and means that follow them."""

from __future__ import annotations

import torch
from torch import Tensor

from fgvc.models.target import Target
from fgvc.techniques.plan import Context
from fgvc.techniques.ranks import gathered


class FeatureBuffer:
    """The features of one step and their labels, those of all its parts, until what follows them moves."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, target: Target, ctx: Context) -> None:
        """x (B,D); label -1 where the target is mixed. Once a part on every rank: a second pass (SAM) adds nothing."""
        if not ctx.again:
            labels = target[0][0]
            self._parts.append((x.detach(), labels if len(target) == 1 else torch.full_like(labels, -1)))

    def take(self) -> tuple[Tensor, Tensor] | None:
        """x (N,D) and labels (N,) of all ranks, once; None where nothing was added."""
        if not self._parts:
            return None
        x, labels = (gathered(torch.cat(part)) for part in zip(*self._parts, strict=True))
        self._parts.clear()
        return x, labels


def class_sums(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x (B,D) and labels (B,): the classes that are there (P,), how many rows of each (P,), and their sums (P,D). Label
    -1: left out."""
    x, labels = x[labels >= 0], labels[labels >= 0]
    present, where, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(present), x.shape[1], dtype=x.dtype, device=x.device)
    return present, counts, sums.index_add_(0, where, x)
