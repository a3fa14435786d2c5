"""Collecting features by class, for centres and means that follow them."""

from __future__ import annotations

import torch
from torch import Tensor

from fgvc.models.target import Target
from fgvc.techniques.plan import Context
from fgvc.techniques.ranks import gathered


class FeatureBuffer:
    """Buffer of the features and labels of one step, of all its micro-batches, until the centres are updated."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, target: Target, ctx: Context) -> None:
        """Add x (B,D); label -1 where the target is mixed. Once a micro-batch on every rank; in SAM's second pass
        it adds nothing."""
        if not ctx.second_pass:
            labels = target[0][0]
            self._batches.append((x.detach(), labels if len(target) == 1 else torch.full_like(labels, -1)))

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Take x (N,D) and labels (N,) of all ranks out of the buffer; None where nothing was added."""
        if not self._batches:
            return None
        x, labels = (gathered(torch.cat(tensors)) for tensors in zip(*self._batches, strict=True))
        self._batches.clear()
        return x, labels


def class_sums(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Classes (P,) in labels (B,), the number of rows of each (P,), and the sums (P,D) of those rows of x (B,D). Label -1: left
    out."""
    x, labels = x[labels >= 0], labels[labels >= 0]
    present, where, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(present), x.shape[1], dtype=x.dtype, device=x.device)
    return present, counts, sums.index_add_(0, where, x)
