"""Nets whose weights make a wrong map differ from the right one."""

from __future__ import annotations

import timm
import torch
from torch import nn

CLASSES = 5


def distinct_net(name: str, **kwargs: object) -> nn.Module:
    """A timm net whose weights, statistics and biases are all different from each other."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=CLASSES, **kwargs)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    nn.init.normal_(net.get_classifier().weight, 0, 0.5)
    return net.eval()
