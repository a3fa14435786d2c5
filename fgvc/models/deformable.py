"""ResNets with deformable convolutions (Dai et al., ICCV 2017, arXiv:1703.06211), as ordinary models of timm.

Meant as teachers, and deployable if the runtime has ONNX's DeformConv (opset 19).

A deformable convolution reads every tap of its kernel at an offset that a small convolution computes. That one starts
at zero, so with the weights of the plain ResNet the net starts as the plain ResNet. Importing this module registers the nets
with timm, as timm's own modules do; fgvc.models.backbone imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

DEFORMED = ("layer3", "layer4")


class Deformable(DeformConv2d):
    """A deformable convolution in place of `conv`, whose weight and key in the state dict it takes over.

    x (B,C,H,W) -> (B,C',H',W'), as `conv`. `offset` computes (dy, dx) for each of the kernel's taps, (B,2kk,H',W').
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        shape = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation
        super().__init__(*shape, groups=conv.groups, bias=conv.bias is not None)
        self.weight, self.bias = conv.weight, conv.bias
        self.offset = nn.Conv2d(
            conv.in_channels,
            2 * conv.kernel_size[0] * conv.kernel_size[1],
            _pair(conv.kernel_size),
            stride=_pair(conv.stride),
            padding=_pair(conv.padding),
            dilation=_pair(conv.dilation),
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        self.start_plain()

    def start_plain(self) -> None:
        """Set the offsets to zero, as in the plain convolution."""
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # torchvision has no kernel in bfloat16 for CPUs, and eight bits are too few for places in a map.
            with torch.autocast(device, enabled=False):
                return self(x.float())
        return super().forward(x, self.offset(x))


class DeformableResNet(ResNet):
    """timm's ResNet with deformable 3x3 convolutions in the last two stages. Everything else is timm's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for stage in DEFORMED:
            for name, conv in list(self.get_submodule(stage).named_modules()):
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                    self.set_submodule(f"{stage}.{name}", Deformable(conv))

    def init_weights(self, zero_init_last: bool = True) -> None:
        super().init_weights(zero_init_last)
        for module in self.modules():
            if isinstance(module, Deformable):
                module.start_plain()


def _pair(sides: tuple[int, ...] | str) -> tuple[int, int]:
    return int(sides[0]), int(sides[1])


def offsets(net: nn.Module) -> frozenset[str]:
    """Keys of the offsets in `net`'s state dict, which weights of the plain ResNet lack; empty for other nets."""
    layers = [name for name, module in net.named_modules() if isinstance(module, Deformable)]
    return frozenset(f"{layer}.offset.{parameter}" for layer in layers for parameter in ("weight", "bias"))


def _with_offsets(state: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Add the net's present offsets to `state` if it has none; timm calls this when it loads weights."""
    present = net.state_dict()
    return {key: present[key] for key in offsets(net)} | dict(state)


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    net: nn.Module = build_model_with_cfg(
        DeformableResNet, name, pretrained, pretrained_filter_fn=_with_offsets, **kwargs
    )
    return net


# The ImageNet weights are those of the plain nets.
default_cfgs = generate_default_cfgs(
    {f"{plain}_deform.{cfg.tag}": cfg for plain in ("resnet18", "resnet50") if (cfg := get_pretrained_cfg(plain))}
)


def resnet18_deform(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18, the last 8 of its 3x3 convolutions deformable."""
    return _create("resnet18_deform", pretrained, **{"block": BasicBlock, "layers": (2, 2, 2, 2)} | kwargs)


def resnet50_deform(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50, the last 9 of its 3x3 convolutions deformable."""
    return _create("resnet50_deform", pretrained, **{"block": Bottleneck, "layers": (3, 4, 6, 3)} | kwargs)


register_model(resnet18_deform)
register_model(resnet50_deform)
