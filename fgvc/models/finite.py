"""Checks of tensors for NaN and infinity: a cheap one for every training step, and an exact one for doubtful steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


@torch.no_grad()
def suspicious(tensors: Iterable[Tensor]) -> Tensor:
    """Whether a value of these may be NaN or infinite, () bool on their device. One pass, without waiting for the device.

    The norm of all is not finite if a value is not; it may also overflow, so `not_finite` decides.
    """
    floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return ~get_total_norm(floats).isfinite()


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors with a NaN or an infinite value."""
    return [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
