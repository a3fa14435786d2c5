"""Class maps of many images between two epochs, by pytorch-grad-cam: any of its gradient methods, no hurry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fgvc.cam.maps import evaluating
from fgvc.model.backbone import feature_map

Rows = NDArray[np.int64]
OfflineMethod = Literal["GradCAM", "GradCAMPlusPlus", "HiResCAM", "XGradCAM", "LayerCAM"]


class _Split(nn.Module):
    """A timm classifier with its features at a module of their own, for the library's hooks."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.features = net, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net.forward_head(self.features(self.net.forward_features(x)))  # type: ignore[operator]
        return logits


def offline_maps(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Rows]], method: OfflineMethod
) -> Iterator[tuple[Rows, Tensor]]:
    """For every batch of images (B,3,H,W), labels (B,) and rows (B,): the rows, and maps (B,H,W) float32 in [0,1]. The net's
    mode, gradients and flags are what they were when the iterator ends."""
    import pytorch_grad_cam  # slow to import, and needed here alone
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    split = _Split(net)
    with evaluating(net), _without_gradients(net):
        layout = partial(feature_map, net)
        cam = getattr(pytorch_grad_cam, method)(split.eval(), target_layers=[split.features], reshape_transform=layout)
        try:  # its own `with` swallows IndexErrors
            for images, labels, rows in batches:
                x = images.detach().requires_grad_()  # the parameters don't
                yield rows, torch.from_numpy(cam(x, [ClassifierOutputTarget(int(label)) for label in labels]))
        finally:
            cam.activations_and_grads.release()


@contextmanager
def _without_gradients(net: nn.Module) -> Iterator[None]:
    """The library runs whole backward passes: nothing of them may stay in the parameters, or reach other processes."""
    learn = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for parameter in learn:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learn:
            parameter.requires_grad_(True)
