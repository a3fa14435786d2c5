"""Hooks of a classifier's feature map for class maps: the last features, or the input of a ViT's last block."""

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
    """A timm classifier whose feature map passes through an identity module, `features`, for the hooks of pytorch-grad-cam.

    Gradients end there, so that none is computed for the backbone before it. Logits are those of the net.
    """

    def __init__(self, net: nn.Module, inside: nn.Module | None = None) -> None:
        """Insert the identity module. `inside`: the module of the net whose output is the feature map; None: the last
        features."""
        super().__init__()
        self.net: Any = net
        self.inside, self.features = inside, nn.Identity()
        self.hooked = torch.empty(0)  # the feature map of the last forward: (B,...), in the net's layout
        self._cached: tuple[Tensor, Tensor] | None = None  # the last images, and their features

    def forward(self, x: Tensor) -> Tensor:
        if self.inside is None:
            logits: Tensor = self.net.forward_head(self._begin(self._last(x)))
            return logits
        with _replacing(self.inside, self._begin):
            return self.net(x)

    def behind(self, x: Tensor, features: Tensor) -> Tensor:
        """The logits (B,K) of images x (B,3,H,W), with `features` in place of their feature map."""
        if self.inside is None:
            return self.net.forward_head(features)
        with _replacing(self.inside, lambda _: features):
            return self.net(x)

    def _begin(self, features: Tensor) -> Tensor:
        self.hooked = features.detach()
        return self.features(features.detach().requires_grad_())

    def _last(self, x: Tensor) -> Tensor:
        """The features of x, cached for the last tensor, since several methods take the same batch."""
        if self._cached is None or self._cached[0] is not x:
            self._cached = x, self.net.forward_features(x)
        return self._cached[1]


def feature_net(net: nn.Module, size: tuple[int, int]) -> FeatureNet:
    """A net hooked at its last features, or, if its head reads the class token alone, at the input of its last block.

    Raises FgvcError for a net whose logits depend on neither.
    """
    reason = refusal(net, size, "gradcam")
    if reason is None:
        return FeatureNet(net)
    inside = _last_norm(net)
    if inside is None:
        raise FgvcError(f"no class maps: {reason}")
    hooked_net = FeatureNet(net, inside)
    weight = next(net.parameters())
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, *size, generator=rng).to(weight)
    with torch.enable_grad(), evaluating(net), without_gradients(net), _replacing(inside, hooked_net._begin):
        leaf: list[Tensor] = []
        handle = hooked_net.features.register_forward_hook(lambda module, args, output: leaf.append(output))
        read = hooked_net.net.forward_head(hooked_net.net.forward_features(x), pre_logits=True)
        handle.remove()
        noise = torch.rand(read.shape, generator=rng).to(read)
        (gradient,) = torch.autograd.grad((read * noise).sum(), leaf[0], allow_unused=True)
        try:
            contributes = gradient is not None and bool(feature_map(net, gradient, size).abs().max() > 0)
        except FgvcError:
            contributes = False
    if not contributes:
        raise FgvcError(f"no class maps: {reason}")
    return hooked_net


def _last_norm(net: nn.Module) -> nn.Module | None:
    """The norm before the last attention in which the class token reads the patches; in XCiT and CaiT of separate blocks."""
    for name in ("cls_attn_blocks", "blocks_token_only", "blocks"):
        blocks = getattr(net, name, None)
        if isinstance(blocks, nn.Sequential | nn.ModuleList) and blocks:
            norm = getattr(blocks[-1], "norm1", None)
            return norm if isinstance(norm, nn.Module) else None
    return None


@contextmanager
def without_gradients(net: nn.Module) -> Iterator[None]:
    """Turn gradients of the parameters off within the block, and restore them: the library runs whole backward passes and clears
    gradients, which must not change the parameters, or reach other processes."""
    saved = [(parameter, parameter.requires_grad, parameter.grad) for parameter in net.parameters()]
    for parameter, _, _ in saved:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, learns, gradient in saved:
            parameter.requires_grad_(learns)
            parameter.grad = gradient


@contextmanager
def _replacing(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the output of `module` by `change` of it within the block."""
    handle = module.register_forward_hook(lambda hooked, args, output: change(output))
    try:
        yield
    finally:
        handle.remove()
