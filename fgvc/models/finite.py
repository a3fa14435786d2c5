"""Whether tensors hold numbers: cheap to ask in every training step, exact where the answer is doubtful."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


@torch.no_grad()
def suspicious(tensors: Iterable[Tensor]) -> Tensor:
    """() bool on their device: whether a value of these may be NaN or infinite. One pass, without waiting for the device.

    Their norm is not finite where a value is not. It may overflow where all are: `not_finite` tells.
    """
    floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return ~get_total_norm(floats).isfinite()


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold a NaN or an infinite value."""
    return [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
