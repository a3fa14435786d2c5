"""Gathering of tensors from all processes of a distributed run."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def gathered(values: Tensor) -> Tensor:
    """The rows of all ranks, in rank order; of one process, its own. Every rank must have as many."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)
