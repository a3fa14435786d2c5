"""The classification loss of the step and of every added classifier."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.config.models import Kind, Loss
from fgvc.errors import FgvcError
from fgvc.models.target import Target


class Criterion(nn.Module):
    """The base loss of a run: (logits (B,K), Target) -> scalar, in float32 also under autocast.

    A target's share is w_j c_j, c the weight of its class (1 where there are none), and t = sum_j w_j c_j smooth(onehot(y_j)).
    cross_entropy: - sum_k t_k log p_k. focal: - sum_k t_k (1 - p_k)^gamma log p_k (Lin et al., ICCV 2017,
    arXiv:1708.02002, Eq. 4), p the softmax. bce: the sum over k of BCE(sigmoid(z_k), t'_k), t' = sum_j w_j smooth(onehot(y_j))
    clipped to [0,1], times the mean of the c_j by w_j. All are means over the batch.

    bce is timm's BinaryCrossEntropy with `sum_classes`. Its default and "ResNet strikes back" (Wightman et al. 2021,
    arXiv:2110.00476) take the mean over K; summed, a logit's gradient is sigmoid(z) - t, as large as that of cross-entropy, so
    that a rate for one suits the other.
    """

    def __init__(
        self,
        kind: Kind = "cross_entropy",
        *,
        label_smoothing: float = 0.0,
        gamma: float = 2.0,
        class_weights: Tensor | None = None,
    ) -> None:
        """Take the settings of the loss. `class_weights`: (K,), or None for 1 each."""
        super().__init__()
        self.kind, self.label_smoothing, self.gamma = kind, label_smoothing, gamma
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.class_weights: Tensor | None

    def forward(self, logits: Tensor, target: Target) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            if self.kind == "bce":
                return self._one_vs_all(logits.float(), target)
            target = self._weighted(target)
            if self.kind == "focal":
                return self._focal(logits.float(), target)
            return cross_entropy(logits, target, self.label_smoothing)

    def _weighted(self, target: Target) -> Target:
        c = self.class_weights
        return target if c is None else [(y, c[y] if w is None else w * c[y]) for y, w in target]

    def _focal(self, logits: Tensor, target: Target) -> Tensor:
        log_p = logits.log_softmax(1)
        # Bounded, as at p = 1 the slope of a root is infinite, and times 0 NaN.
        modulation = (-log_p.expm1()).clamp_min(1e-12) ** self.gamma
        return -(self._soft(target, logits) * modulation * log_p).sum(1).mean()

    def _one_vs_all(self, logits: Tensor, target: Target) -> Tensor:
        t = self._soft(target, logits).clamp(0, 1)
        losses = F.binary_cross_entropy_with_logits(logits, t, reduction="none").sum(1)
        if self.class_weights is not None:
            losses = losses * _mass(self._weighted(target)) / _mass(target).clamp_min(1e-12)
        return losses.mean()

    def _soft(self, target: Target, logits: Tensor) -> Tensor:
        """The soft target t (B,K) = sum_j w_j smooth(onehot(y_j))."""
        mass = _mass(target).to(logits)
        t = (mass * (self.label_smoothing / logits.shape[1]))[:, None].repeat(1, logits.shape[1])
        for y, w in target:
            share = torch.ones_like(mass) if w is None else w.to(logits)
            t.scatter_add_(1, y[:, None], (1 - self.label_smoothing) * share[:, None])
        return t


def _mass(target: Target) -> Tensor:
    """The sum (B,) of each sample's weights."""
    return torch.stack([torch.ones(len(y), device=y.device) if w is None else w for y, w in target]).sum(0)


def make_criterion(loss: Loss, counts: NDArray[np.int64] | None = None) -> Criterion:
    """The criterion of a recipe. `counts` (K,): training images by class; None if nothing is trained, as in export.

    Raises FgvcError if classes are to be weighted and one has no images.
    """
    weights = None
    if loss.class_weights == "balanced" and counts is not None:
        if not counts.all():
            missing = np.flatnonzero(counts == 0).tolist()
            raise FgvcError(
                f"loss.class_weights: balanced: no training image of classes {missing[:20]} (numbered from 0), so they have no "
                "weight; add some, remove these classes, or set it to none"
            )
        weights = torch.from_numpy(counts.sum() / (len(counts) * counts)).float()
    return Criterion(loss.kind, label_smoothing=loss.label_smoothing, gamma=loss.gamma, class_weights=weights)


def cross_entropy(logits: Tensor, target: Target, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy mean_b sum_j w_j CE(z, y_j) of z (B,K), each one-hot label smoothed before mixing, as in timm; in float32."""
    logits = logits.float()
    if len(target) == 1 and target[0][1] is None:
        return F.cross_entropy(logits, target[0][0], label_smoothing=label_smoothing)
    terms = [
        F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing) * (1.0 if w is None else w)
        for y, w in target
    ]
    return torch.stack(terms).sum(0).mean()
