"""The classification loss, of the step and of every added classifier."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fgvc.types import Target


def cross_entropy(logits: Tensor, target: Target, label_smoothing: float = 0.0) -> Tensor:
    """mean_b sum_j w_j CE(z, y_j), z (B,K), label smoothing applied to each one-hot before mixing (methods 7); in float32."""
    logits = logits.float()
    if len(target) == 1 and target[0][1] is None:
        return F.cross_entropy(logits, target[0][0], label_smoothing=label_smoothing)
    terms = [
        F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing) * (1.0 if w is None else w)
        for y, w in target
    ]
    return torch.stack(terms).sum(0).mean()
