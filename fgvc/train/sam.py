"""SAM, sharpness-aware minimisation (Foret et al., ICLR 2021; methods 15): the gradient is taken a small way uphill.

Its adaptive form (Kwon et al., ICML 2021) measures that way in units of each weight's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import nn
from torch.nn.utils import get_total_norm

from fgvc.config import Section
from fgvc.model.norm import own_statistics


class Sam(Section):
    """Sharpness-aware minimisation: two forwards and backwards a step, of the same batch."""

    rho: float = Field(0.05, gt=0, description="how far uphill; some ten times as much where it is adaptive")
    adaptive: bool = Field(False, description="ASAM: in units of each weight's size, so that rescaled layers are alike")


@contextmanager
def perturbed(step: nn.Module, sam: Sam) -> Iterator[None]:
    """The weights w at w + e for a second pass, without gradients, and running statistics that rest.

    e = rho g / |g|, or rho w^2 g / ||w| g| where it is adaptive, with the gradients g that are there and the norm over all
    of them together. On every way out w is back, bit for bit, so that no checkpoint ever holds w + e.
    """
    weights = [weight for weight in step.parameters() if weight.grad is not None]
    kept = [weight.detach().clone() for weight in weights]
    try:
        _climb(weights, sam)
        with own_statistics(step, recompute=False):
            yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)


@torch.no_grad()
def _climb(weights: Sequence[nn.Parameter], sam: Sam) -> None:
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    length = get_total_norm(
        [g * w.abs() for w, g in zip(weights, gradients, strict=True)] if sam.adaptive else gradients
    )
    for w, g in zip(weights, gradients, strict=True):
        w.add_((g * w.square() if sam.adaptive else g) * (sam.rho / (length + 1e-12)))
        w.grad = None
