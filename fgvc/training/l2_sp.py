"""L2-SP (Li, Grandvalet and Davoine, ICML 2018, arXiv:1802.01483): weight decay towards where the weights started, not to 0."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def pull(optimizer: Optimizer, starts: Mapping[nn.Parameter, Tensor]) -> None:
    """Make the optimizer's own weight decay draw the weights w to their starts w0.

    It steps on u = w - w0, whose gradient is that of w. So its decay of u, at the rate alpha of their group, is the gradient of
    the penalty alpha/2 |w - w0|^2 where it is a term of the gradient (sgd, momentum, adam: the paper's form, within the
    momentum), and a step of lr alpha (w - w0) beside the optimizer's where it is decoupled (adamw, nadamw, lion, sgdw: else
    Adam's scaling would cancel alpha). For optimizers whose steps do not depend on how large a weight is.
    """

    @torch.no_grad()
    def move(sign: int) -> None:
        moving = [(weight, start) for weight, start in starts.items() if weight.grad is not None]
        if moving:
            torch._foreach_add_([weight for weight, _ in moving], [start for _, start in moving], alpha=sign)

    optimizer.register_step_pre_hook(lambda *_: move(-1))
    optimizer.register_step_post_hook(lambda *_: move(1))
