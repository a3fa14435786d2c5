"""Test-time augmentation by flips and crops: reported apart, never exported, since the deployed graph makes one pass.

Probabilities are averaged, not logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fgvc.config.images import Preprocess

Views = Literal["flip", "crops", "flip+crops", "refined"]


def canvas(spec: Preprocess) -> Preprocess:
    """Preprocessing for crops: the whole canvas that the deployed centre crop is cut from (to a pixel of rounding)."""
    height, width = (int(side / spec.crop_pct) for side in spec.size)
    return spec.model_copy(update={"size": (height, width), "crop_pct": 1.0})


def average_views(net: Callable[[Tensor], Tensor], views: Views, size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """Average `net` over x (B,3,H',W') and its mirror image, or over the centre and corners of a larger x: the function returns
    the logarithm of the mean probabilities (B,K), which ranks and scores as logits do."""

    def probabilities(x: Tensor) -> Tensor:
        crops = _five_crops(x, size) if "crops" in views else [x]
        crops += [crop.flip(-1) for crop in crops] if "flip" in views else []
        return _log(torch.stack([net(crop).float().softmax(1) for crop in crops]).mean(0))

    return probabilities


def refine_views(
    first_pass: Callable[[Tensor], tuple[Tensor, Callable[[], Tensor]]], net: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """Average `net` over x (B,3,H,W) and over the crops that `first_pass` makes of it, of the same size. `first_pass` returns
    its logits and a function that makes the crops. As in `average_views`, the logarithm of the mean probabilities."""

    def probabilities(x: Tensor) -> Tensor:
        logits, crops = first_pass(x)
        return _log(torch.stack([z.float().softmax(1) for z in (logits, net(crops()))]).mean(0))

    return probabilities


def _log(p: Tensor) -> Tensor:
    """Logarithm of probabilities, finite for those that are 0 in float32. A NaN stays one."""
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def _five_crops(x: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """Cut the centre, then the corners."""
    (height, width), (down, right) = size, (x.shape[-2] - size[0], x.shape[-1] - size[1])
    starts = [(round(down / 2), round(right / 2)), (0, 0), (0, right), (down, 0), (down, right)]
    return [x[..., top : top + height, left : left + width] for top, left in starts]
