"""WS-DAN's attention branch (Hu et al. 2019, arXiv:1901.09891): learned maps, bilinear attention pooling, feature centres.

Where this differs from public code: docs/methods.md.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.models import norms
from fgvc.techniques.attention_crop_drop.settings import SCALE
from fgvc.techniques.centres import class_sums


class _SignedRoot(torch.autograd.Function):
    """Signed square root, sign(p) sqrt(|p| + 1e-12), with a gradient of 0 at 0; in half of the passes of autograd's own."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        sign, root = p.sign(), p.abs().add_(1e-12).sqrt_()
        ctx.save_for_backward(sign / root)
        return root.mul_(sign)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return gradient * slope.abs().mul_(0.5)


class BilinearAttention(nn.Module):
    """Attention branch: A = relu(bn(conv1x1(f))); v = ssqrt(mean_hw(A_m f_c)) over all M*C; z = W (s v / |v|). In float32."""

    def __init__(self, channels: int, maps: int, classes: int, *, scale: float = SCALE) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(channels, maps, 1, bias=False)
        self.norm = nn.BatchNorm2d(maps, eps=1e-3)
        self.classifier = nn.Linear(maps * channels, classes, bias=False)
        self.register_buffer("centres", torch.zeros(classes, maps * channels))
        self.centres: Tensor

    def forward(self, f: Tensor, *, batch_statistics: bool = False) -> tuple[Tensor, Tensor]:
        """Attend to f (B,C,h,w): maps A (B,M,h,w) >= 0, v (B,M*C). `batch_statistics`: of this batch; the running ones stay."""
        statistics = norms.batch_statistics(self, recompute=False) if batch_statistics else nullcontext()
        with torch.autocast(f.device.type, enabled=False), statistics:
            f = f.to(self.conv.weight.dtype)
            attention = self.norm(self.conv(f)).relu()
            cells = f.permute(0, 2, 3, 1).flatten(1, 2)  # a view where f is channels_last
            return attention, _SignedRoot.apply(torch.bmm(attention.flatten(2), cells).flatten(1) / cells.shape[1])

    def logits(self, vector: Tensor) -> Tensor:
        """Logits z (N,K) of v (N,M*C). The length divides z instead of v: these rows are long, and every pass over them costs."""
        with torch.autocast(vector.device.type, enabled=False):
            return self.classifier(vector) * (self.scale / vector.norm(dim=1, keepdim=True).clamp_min(1e-12))

    def distance(self, vector: Tensor, labels: Tensor) -> Tensor:
        """Mean squared distance to the centres, sum_b |v_b / |v_b| - c_y / |c_y||^2 / B, from lengths and products; a vector of
        zeros has length 0."""
        centres = self.centres[labels]
        v, c, product = vector.norm(dim=1), centres.norm(dim=1), (vector[:, None] @ centres[:, :, None]).flatten()
        return ((v > 0).float() + (c > 0).float() - 2 * product / (v * c).clamp_min(1e-12)).mean()

    @torch.no_grad()
    def follow(self, vector: Tensor, labels: Tensor, *, rate: float) -> None:
        """Move the centres: c_y += rate * (mean of the v / |v| of class y - c_y / |c_y|), once for every class that
        is there; label -1: left out."""
        present, counts, sums = class_sums(F.normalize(vector, dim=1), labels)
        centres = self.centres[present]
        self.centres[present] = centres + rate * (sums / counts[:, None] - F.normalize(centres, dim=1))


def pick(attention: Tensor, which: Tensor) -> Tensor:
    """Pick one map (B,h,w) a sample of the maps (B,M,h,w), with probability proportional to the square root of its
    sum; `which` (B,) uniform in [0,1) decides."""
    mass = attention.sum((2, 3)).sqrt().cumsum(1)
    picked = (mass <= which[:, None] * mass[:, -1:]).sum(1).clamp(max=attention.shape[1] - 1)
    return attention[torch.arange(len(attention), device=attention.device), picked]
