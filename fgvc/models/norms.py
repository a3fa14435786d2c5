"""Batch norms: update and re-estimation of running statistics, and residual blocks that start as identities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fgvc.config.models import Model
from fgvc.errors import FgvcError


def running_norms(net: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a net that keep running statistics."""
    return [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@contextmanager
def momenta(norms: Sequence[_BatchNorm], values: Sequence[float | None]) -> Iterator[None]:
    """Set other momenta within the block. 0: running statistics stay as they are; None: they become the mean of all batches."""
    saved = [norm.momentum for norm in norms]
    try:
        for norm, value in zip(norms, values, strict=True):
            norm.momentum = value
        yield
    finally:
        for norm, momentum in zip(norms, saved, strict=True):
            norm.momentum = momentum


@contextmanager
def batch_statistics(net: nn.Module, *, recompute: bool) -> Iterator[None]:
    """Normalise by the batch's statistics within the block, without updating the running statistics.

    `recompute`: by a momentum of 0, under activation checkpointing, where forward and backward must save the same tensors.
    """
    norms = [norm for norm in running_norms(net) if norm.training]
    if recompute:
        with momenta(norms, [0.0] * len(norms)):
            yield
        return
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def reestimate_norms(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics to the plain mean over `batches` (B,3,H,W), with all else in eval mode.

    torch's `update_bn` would leave dropout and drop-path on. Batches of one image are left out. The net ends in eval mode."""
    net.eval()
    norms = running_norms(net)
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    with momenta(norms, [None] * len(norms)), torch.no_grad():
        for x in batches:
            if len(x) > 1:
                net(x)
    net.eval()


def zero_gamma(net: nn.Module, model: Model) -> None:
    """Set the gamma of the last batch norm of every residual block to 0, if `model.zero_gamma` says so.

    Raises FgvcError on pretrained weights unless it is `even pretrained`, and if timm's net has no such block.
    """
    if model.zero_gamma == "no":
        return
    if model.weights != "none" and model.zero_gamma != "even pretrained":
        raise FgvcError(
            f"model.zero_gamma: yes would erase the residual blocks of {model.weights}; set it to no, or to "
            "`even pretrained` if that is what you want"
        )
    blocks = [m for m in net.modules() if hasattr(m, "zero_init_last") and m is not net]
    skips = [m for m in net.modules() if getattr(m, "has_skip", False) is True]
    norms = [[n for n in m.modules() if isinstance(n, nn.BatchNorm2d) and n.affine][-1:] for m in skips]
    for block in blocks:
        block.zero_init_last()  # type: ignore[operator]
    for norm in (norm for last in norms for norm in last):
        nn.init.zeros_(norm.weight)
    if not blocks and not any(norms):
        raise FgvcError(
            f"model.zero_gamma: {model.name} has no residual blocks that end in a batch norm; set it to no"
        )
