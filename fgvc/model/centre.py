"""Sums of features by class, for centres and means that follow them."""

from __future__ import annotations

import torch
from torch import Tensor


def class_sums(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x (B,D) and labels (B,): the classes that are there (P,), how many rows of each (P,), and their sums (P,D). Label
    -1: left out."""
    x, labels = x[labels >= 0], labels[labels >= 0]
    present, where, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(present), x.shape[1], dtype=x.dtype, device=x.device)
    return present, counts, sums.index_add_(0, where, x)
