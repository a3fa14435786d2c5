"""SAM, sharpness-aware minimisation (Foret et al., ICLR 2021, arXiv:2010.01412): gradients from perturbed weights.

Its adaptive form (Kwon et al., ICML 2021, arXiv:2102.11600) measures that way in units of each weight's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from fgvc.config.training import Sam
from fgvc.models.norms import batch_statistics


@contextmanager
def perturbed(step: nn.Module, sam: Sam) -> Iterator[None]:
    """Move the weights w to w + e for a second pass, with gradients cleared and running statistics unchanged.

    e = rho g / |g|, or rho T^2 g / |T g| where it is adaptive, T as of `Sam.eta`, with the present gradients g and the
    norm over all of them together. On every way out w is back, bit for bit, so that no checkpoint ever holds w + e.
    """
    named = [(name, weight) for name, weight in step.named_parameters() if weight.grad is not None]
    weights = [weight for _, weight in named]
    originals = [weight.detach().clone() for weight in weights]
    try:
        _perturb(named, sam)
        with batch_statistics(step, recompute=False):
            yield
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)


@torch.no_grad()
def _perturb(named: Sequence[tuple[str, nn.Parameter]], sam: Sam) -> None:
    graded = [(name, w, w.grad) for name, w in named if w.grad is not None]
    length = get_total_norm([g * _unit(name, w, sam) if sam.adaptive else g for name, w, g in graded])
    for name, w, g in graded:
        w.add_((g * _unit(name, w, sam).square() if sam.adaptive else g) * (sam.rho / (length + 1e-12)))
        w.grad = None


def _unit(name: str, w: Tensor, sam: Sam) -> Tensor:
    """ASAM's T of one parameter."""
    if sam.eta is None:
        return w.abs()
    return w.abs() + sam.eta if name.endswith("weight") else torch.ones_like(w)
