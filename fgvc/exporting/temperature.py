"""A temperature that is divided into the last layer of a deployed file: its answers stay, and its probabilities are calibrated.

Temperature scaling (Guo et al., ICML 2017, arXiv:1706.04599) divides the logits by one number. Where these are a linear layer's,
its weight and bias divided by that number give the same.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fgvc.exporting.proofs import FOLD_TOLERANCE
from fgvc.models.onnxnet.classes import LAST
from fgvc.models.onnxnet.net import OnnxNet


class Divided(nn.Module):
    """A net whose logits are divided by a number."""

    def __init__(self, net: nn.Module, temperature: float) -> None:
        super().__init__()
        self.net, self.temperature = net, temperature

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits / self.temperature


def divide_last(net: OnnxNet, temperature: float, x: np.ndarray) -> str:
    """Divide the last layer of a file's net, in float64, by a temperature, in place. `x` (B,3,H,W): images on which the logits
    are compared. Returns an empty text, or the reason where it can't be done; then the net is unchanged."""
    if net.ending == "sigmoid":
        return "its output is a sigmoid's, a probability for each class by itself"
    parameters = [parameter for parameter in (net.classifier.weight, net.classifier.bias) if parameter is not None]
    places = [name for name in net.movable for slot in net.slots[name] if slot.target in LAST]
    if {slot.target for name in places for slot in net.slots[name]} != set(LAST[: len(parameters)]):
        return "its last layer is computed in the graph, or read elsewhere, too"
    images = torch.from_numpy(x).double()
    with torch.no_grad():
        expected = net(images) / temperature
        kept = [parameter.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.div_(temperature)
        difference = float((net(images) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if difference <= FOLD_TOLERANCE:
            return ""
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.copy_(values)
    return "what lies behind its last layer does not scale with it"
