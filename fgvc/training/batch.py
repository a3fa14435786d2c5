"""Conversion of the loader's uint8 images to the clean batch on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fgvc.config.images import Preprocess
from fgvc.techniques.api import Batch

if TYPE_CHECKING:
    from fgvc.data.loader import TrainBatch


class Normalise:
    """Normalisation of uint8 (B,H,W,3) RGB to float32 (B,3,H,W) on the device, equal to `fgvc.images.preprocess.normalise`.

    One byte a channel crosses the bus, and the result is `channels_last` without a copy.
    """

    def __init__(self, spec: Preprocess, device: torch.device, memory_format: torch.memory_format) -> None:
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        self.scale = (spec.input_range / 255 / std).to(device)
        self.shift = (-mean / std).to(device)
        self.flip = spec.channel_order == "bgr"
        self.device, self.memory_format = device, memory_format
        self.spec = spec

    def __call__(self, images: Tensor) -> Tensor:
        x = images.to(self.device, non_blocking=True)
        x = x.flip(-1) if self.flip else x
        x = x.float().mul_(self.scale).add_(self.shift).permute(0, 3, 1, 2)
        return x.contiguous(memory_format=self.memory_format)


def reduced(images: Tensor, size: tuple[int, int], spec: Preprocess) -> Tensor:
    """Images (B,3,h,w) uint8 resized to `size`, as float32 without antialiasing where the deployed stack has none."""
    if spec.antialias:  # as bytes: a reduction in float32 takes six times as long
        return F.interpolate(images, size, mode="bicubic", antialias=True)
    # torch rounds and clips bytes between rows and columns, which for bicubic is several levels
    return F.interpolate(images.float(), size, mode=spec.interpolation).clamp(0, 255).add(0.5).floor()


def to_batch(raw: TrainBatch, normalise: Normalise, size: tuple[int, int] | None = None) -> Batch:
    """Make the clean batch of a loader's batch, reduced to `size` (height, width) where the images were rendered larger."""
    device, geometry = normalise.device, raw.geometry
    images = raw.images
    x = render = normalise(images)
    if size is not None and size != (rendered := (images.shape[1], images.shape[2])):
        x = normalise(reduced(images.permute(0, 3, 1, 2), size, normalise.spec).permute(0, 2, 3, 1))
        scale = torch.tensor([rendered[1] / size[1], rendered[0] / size[0], 1.0])
        geometry = geometry * scale
    labels = raw.labels.to(device, non_blocking=True)
    return Batch(
        x=x,
        target=[(labels, None)],
        x_clean=x,
        labels=labels,
        index=raw.index,
        geometry=geometry,
        render=render,
        boxes=raw.boxes,
    )
