"""Batch norms: when their running statistics move, where these come from, and residual blocks that start as identities."""

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
    """Other momenta for a while. 0: the statistics stay as they are; None: the mean of all batches."""
    kept = [norm.momentum for norm in norms]
    try:
        for norm, value in zip(norms, values, strict=True):
            norm.momentum = value
        yield
    finally:
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum


@contextmanager
def own_statistics(net: nn.Module, *, recompute: bool) -> Iterator[None]:
    """BN normalises by this forward's batch statistics and leaves its running buffers alone.

    `recompute`: by a momentum of 0, as in the backward, since the two runs must save the same tensors.
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
    """Batch norms' running statistics as the plain mean over `batches` (B,3,H,W), all else as in evaluation: torch's
    `update_bn` would let dropout and drop-path act. Batches of one image are left out. Ends in eval mode."""
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
    """Set the gamma of the last batch norm of every residual block to 0, where `model.zero_gamma` asks for it.

    Raises FgvcError on pretrained weights unless they are named, and where timm's net has no such block.
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
    for norm in (norm for found in norms for norm in found):
        nn.init.zeros_(norm.weight)
    if not blocks and not any(norms):
        raise FgvcError(
            f"model.zero_gamma: {model.backbone} has no residual blocks that end in a batch norm; set it to no"
        )
