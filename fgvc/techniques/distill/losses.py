"""Distillation losses: how far a student's outputs are from a teacher's. To be called with autocast off.

In half precision the logarithms of small probabilities are infinite. What public code gets wrong here: docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def softened(logits: Sequence[Tensor], temperature: float, weights: Sequence[float] = (1.0,)) -> Tensor:
    """Logarithm of softened probabilities (B,K): q = sum_i w_i softmax(z_i / T) / sum_i w_i, of z_i (B,K) (Hinton
    et al. 2015, arXiv:1503.02531, Eq. 1)."""
    logs = torch.stack([F.log_softmax(z.float() / temperature, 1) for z in logits])
    share = torch.tensor(weights, device=logs.device) / sum(weights)
    return torch.logsumexp(logs + share.log().view(-1, 1, 1), 0)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL divergence KL(q || p), the mean over the batch of the sum over classes: `reduction="mean"` would divide by the
    classes, too."""
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def decoupled(log_p: Tensor, log_q: Tensor, y: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Decoupled distillation: alpha KL(b_q || b_p) + beta KL(q' || p'), mean over the batch; b = [p_y, 1 - p_y], and p' is p
    renormalised over the classes that are not y (DKD, Zhao et al., CVPR 2022, arXiv:2203.08679). In logarithms, since 1 - p_y
    underflows."""
    rest = F.one_hot(y, log_p.shape[1]) == 0
    target, others = [], []
    for log in (log_p, log_q):
        among = log[rest].view(len(y), -1)
        left = among.logsumexp(1, keepdim=True)
        target.append(torch.cat([log.gather(1, y[:, None]), left], 1))
        others.append(among - left)
    return alpha * divergence(*target) + beta * divergence(*others)


def attention(ours: Tensor, theirs: Tensor) -> Tensor:
    """Attention transfer: 1000 mean (a_s - a_t)^2, a = vec(mean_c f^2) over its norm, of f (B,C,h,w) pooled to the smaller
    of the two sizes (AT, Zagoruyko & Komodakis, ICLR 2017, arXiv:1612.03928)."""
    a, b = (f.square().mean(1, keepdim=True) for f in (ours, theirs))
    a, b = (F.normalize(f.flatten(1), dim=1) for f in _matched(a, b))
    return 1000 * (a - b).square().mean()


def hint(regressor: nn.Conv2d, ours: Tensor, theirs: Tensor) -> Tensor:
    """Hint loss: mean (r(f_s) - f_t)^2, both (B,C,h,w) pooled to the smaller of the two sizes (FitNets, Romero et al.,
    ICLR 2015, arXiv:1412.6550)."""
    f, theirs = _matched(ours.to(regressor.weight.dtype), theirs)
    return F.mse_loss(regressor(f), theirs.to(f.dtype))


def _matched(a: Tensor, b: Tensor) -> list[Tensor]:
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return [f if f.shape[2:] == size else F.adaptive_avg_pool2d(f, size) for f in (a, b)]
