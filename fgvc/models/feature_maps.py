"""Where a classifier is hooked for its class maps: the last features, or what the last block of a ViT reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fgvc.errors import FgvcError
from fgvc.models.backbone import feature_map
from fgvc.models.class_maps import evaluating, refusal


class FeatureNet(nn.Module):
    """A timm classifier whose feature map passes through a module of its own, `features`, for the hooks of pytorch-grad-cam.

    Gradients end there, so that none is computed of the backbone before it. Logits are those of the net.
    """

    def __init__(self, net: nn.Module, inside: nn.Module | None = None) -> None:
        """`inside`: the module of the net that gives the feature map; None: the last features."""
        super().__init__()
        self.net: Any = net
        self.inside, self.features = inside, nn.Identity()
        self.hooked = torch.empty(0)  # what the last forward read: (B,...), in the net's own layout
        self._seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.inside is None:
            logits: Tensor = self.net.forward_head(self._begin(self._last(x)))
            return logits
        with _replacing(self.inside, self._begin):
            return self.net(x)

    def behind(self, x: Tensor, features: Tensor) -> Tensor:
        """The logits (B,K) of images x (B,3,H,W) with these features in the place of their own."""
        if self.inside is None:
            return self.net.forward_head(features)
        with _replacing(self.inside, lambda _: features):
            return self.net(x)

    def _begin(self, features: Tensor) -> Tensor:
        self.hooked = features.detach()
        return self.features(features.detach().requires_grad_())

    def _last(self, x: Tensor) -> Tensor:
        """The features of x; not computed again for the very same tensor: several methods look at one batch."""
        if self._seen is None or self._seen[0] is not x:
            self._seen = x, self.net.forward_features(x)
        return self._seen[1]


def feature_net(net: nn.Module, size: tuple[int, int]) -> FeatureNet:
    """The last features; of ViTs that read the class token alone, what the last block reads, where the patches still count.

    Raises FgvcError for a net that has neither.
    """
    reason = refusal(net, size, "gradcam")
    if reason is None:
        return FeatureNet(net)
    inside = _last_norm(net)
    if inside is None:
        raise FgvcError(f"no class maps: {reason}")
    found = FeatureNet(net, inside)
    weight = next(net.parameters())
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, *size, generator=rng).to(weight)
    with torch.enable_grad(), evaluating(net), without_gradients(net), _replacing(inside, found._begin):
        leaf: list[Tensor] = []
        handle = found.features.register_forward_hook(lambda module, seen, given: leaf.append(given))
        read = found.net.forward_head(found.net.forward_features(x), pre_logits=True)
        handle.remove()
        noise = torch.rand(read.shape, generator=rng).to(read)
        (gradient,) = torch.autograd.grad((read * noise).sum(), leaf[0], allow_unused=True)
        try:
            counts = gradient is not None and bool(feature_map(net, gradient, size).abs().max() > 0)
        except FgvcError:
            counts = False
    if not counts:
        raise FgvcError(f"no class maps: {reason}")
    return found


def _last_norm(net: nn.Module) -> nn.Module | None:
    """The norm before the attention by which the class token reads the patches for the last time; XCiT and CaiT have blocks
    of their own for that."""
    for name in ("cls_attn_blocks", "blocks_token_only", "blocks"):
        blocks = getattr(net, name, None)
        if isinstance(blocks, nn.Sequential | nn.ModuleList) and blocks:
            norm = getattr(blocks[-1], "norm1", None)
            return norm if isinstance(norm, nn.Module) else None
    return None


@contextmanager
def without_gradients(net: nn.Module) -> Iterator[None]:
    """The library runs whole backward passes and clears gradients: nothing of that may stay in the parameters, or reach other
    processes."""
    kept = [(parameter, parameter.requires_grad, parameter.grad) for parameter in net.parameters()]
    for parameter, _, _ in kept:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, learns, gradient in kept:
            parameter.requires_grad_(learns)
            parameter.grad = gradient


@contextmanager
def _replacing(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """For a while, what `module` gives is changed on its way."""
    handle = module.register_forward_hook(lambda own, seen, given: change(given))
    try:
        yield
    finally:
        handle.remove()
