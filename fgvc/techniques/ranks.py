"""Gathering of tensors from all processes of a distributed run."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def gathered(values: Tensor) -> Tensor:
    """Gather the rows of all ranks, in rank order; in a single process, its own. Every rank must have as many."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return values
    shards = [torch.empty_like(values) for _ in range(distributed.get_world_size())]
    distributed.all_gather(shards, values.contiguous())
    return torch.cat(shards)
