"""Flips and crops at test time: reported apart, never exported - the deployed graph makes one pass.

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
    """What to load for crops: the whole canvas that the deployed centre crop is cut from (to a pixel of rounding)."""
    height, width = (int(side / spec.crop_pct) for side in spec.size)
    return spec.model_copy(update={"size": (height, width), "crop_pct": 1.0})


def averaged(net: Callable[[Tensor], Tensor], views: Views, size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """`net` over the mirror image too, and over the centre and the four corners of a larger x (B,3,H',W'): the
    logarithm of the mean probabilities (B,K), which ranks and scores as logits do."""

    def probabilities(x: Tensor) -> Tensor:
        cuts = _five(x, size) if "crops" in views else [x]
        cuts += [part.flip(-1) for part in cuts] if "flip" in views else []
        return _log(torch.stack([net(part).float().softmax(1) for part in cuts]).mean(0))

    return probabilities


def refined(
    look: Callable[[Tensor], tuple[Tensor, Callable[[], Tensor]]], net: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """Two passes: over x (B,3,H,W), and over what `look` finds in it, an image of the same size. `look` gives the first
    pass' logits and how to make the crops. As `averaged`, the logarithm of the mean probabilities."""

    def probabilities(x: Tensor) -> Tensor:
        logits, crops = look(x)
        return _log(torch.stack([z.float().softmax(1) for z in (logits, net(crops()))]).mean(0))

    return probabilities


def _log(p: Tensor) -> Tensor:
    """Of probabilities, of which one that is too small for float32 is 0: still a number. A NaN stays one."""
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def _five(x: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """Centre, then the corners."""
    (height, width), (down, right) = size, (x.shape[-2] - size[0], x.shape[-1] - size[1])
    starts = [(round(down / 2), round(right / 2)), (0, 0), (0, right), (down, 0), (down, right)]
    return [x[..., top : top + height, left : left + width] for top, left in starts]
