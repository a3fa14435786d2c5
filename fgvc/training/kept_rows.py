"""Freezing of the classifier's rows of classes without training images.

Every step would push their logits down and their weights to zero, and so unlearn what the deployed net knows of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def keep_rows(optimizer: Optimizer, classifier: nn.Module, absent: Tensor) -> None:
    """Freeze the rows `absent` (K,) bool of a linear layer, weight (K,D) and bias (K,): every step restores their present values.
    Called when the run begins or goes on, after all other hooks of the optimizer."""
    rows = [(parameter, parameter.detach()[absent].clone()) for parameter in classifier.parameters()]

    @torch.no_grad()
    def put_back(*_: object) -> None:
        for parameter, values in rows:
            parameter[absent] = values

    optimizer.register_step_post_hook(put_back)
