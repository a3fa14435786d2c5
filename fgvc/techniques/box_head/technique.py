"""Box head: predicts the object's box in the crop, trained by the overlap (Zheng et al., AAAI 2020, arXiv:1911.08287).

The features must keep the object's place. For data with a box an image, such as CUB. `giou` is Rezatofighi et al.'s (CVPR 2019,
arXiv:1902.09630); the confidence is learned as in Wu et al. 2019 (IoU-aware, arXiv:1912.05992). After stripping nothing is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import (
    box_convert,
    box_iou,
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)
from typing_extensions import override

from fgvc.config.knots import ever
from fgvc.errors import FgvcError
from fgvc.techniques.api import MAIN, Batch, Output, Technique
from fgvc.techniques.box_head.settings import BoxHeadSettings
from fgvc.techniques.boxes import inside
from fgvc.techniques.plan import Context, Plan

LOSSES = {"giou": generalized_box_iou_loss, "diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}
CELLS = 5  # a side of what the last layer reads: a mean over the whole map would forget the place
LEAST = 0.01  # least side of a predicted box, as a share of the crop's: a side of 0 has no aspect


class BoxHead(Technique):
    """Box head: (cx, cy, w, h) = sigmoid(W pool_5x5(relu(conv1x1(f)))) in shares of the crop; L = box (1 - CIoU)
    + confidence BCE(c, IoU), means over the samples that count."""

    source: ClassVar[str] = "CIoU, Zheng et al., AAAI 2020, arXiv:1911.08287"
    measures = ("iou",)

    def __init__(self, config: BoxHeadSettings) -> None:
        self.config = config
        self.weights = {"box": config.box, "confidence": config.confidence}

    @override
    def setup(self, plan: Plan) -> None:
        """Add the head. Raises FgvcError where the features are no map."""
        channels, *cells = plan.map_shape
        pooled = min(CELLS, cells[0]), min(CELLS, cells[1])
        layers = [nn.Conv2d(channels, self.config.hidden, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(pooled), nn.Flatten()]
        outputs = 5 if ever(self.config.confidence) else 4
        plan.add("box", nn.Sequential(*layers, nn.Linear(self.config.hidden * pooled[0] * pooled[1], outputs)))

    @override
    def draw(self, rng: np.random.Generator, batch: Batch) -> Tensor:
        """Compute (nothing is random) each object's box (B,4) float32 in its crop; NaN where too little of it is visible, or none
        is known.

        Here, since the second pass over the views of a step has no other hook with the batch.
        """
        if batch.boxes is None:
            raise FgvcError("techniques.box_head: this batch has no boxes")
        boxes, visible = in_crop(batch.boxes, batch.geometry, batch.x.shape[2:])
        return torch.where((visible >= self.config.visible)[:, None], boxes, torch.nan)

    @override
    def losses(self, outputs: Mapping[str, Output], ctx: Context) -> dict[str, Tensor]:
        """Compute `box` and `confidence`; measured: `iou`, the mean over the samples that count. Nothing where none does."""
        main = outputs[MAIN]
        rows = ctx.draw[:, 0].isfinite().nonzero()[:, 0]  # on the host: the device is not waited for
        if len(main.view.target) > 1 or not len(rows):
            return {}
        height, width = main.view.x.shape[2:]
        device = main.view.x.device
        raw = ctx.branches["box"](ctx.grid(main.features))[rows.to(device, non_blocking=True)].float()
        centres, sides = raw[:, :2].sigmoid(), LEAST + (1 - LEAST) * raw[:, 2:4].sigmoid()
        pixels = raw.new_tensor([width, height, width, height])
        predicted = box_convert(torch.cat([centres, sides], dim=1) * pixels, "cxcywh", "xyxy")
        boxes = ctx.draw.to(device, non_blocking=True)
        true = ctx.draw[rows].to(device, non_blocking=True)
        iou = box_iou(predicted.detach(), true).diagonal()
        ctx.show("box", inside(boxes[:, None], (height, width)))
        losses = {"box": LOSSES[self.config.loss](predicted, true, reduction="mean"), "iou": iou.mean()}
        if raw.shape[1] == 5:
            losses["confidence"] = F.binary_cross_entropy_with_logits(raw[:, 4], iou)
        return losses


def in_crop(boxes: Tensor, geometry: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Map boxes (B,4) from the originals into crops of `size` (height, width), by the matrices (B,2,3) crop -> original.

    Returns the boxes (B,4) float32, clipped to the crops, and the share (B,) of each box's area that lies in its crop, NaN where
    the box is empty or unknown. A turned box becomes the hull of its corners.
    """
    matrices, boxes = geometry.double(), boxes.double()
    corners = boxes[:, [[0, 1], [2, 1], [0, 3], [2, 3]]]
    back = torch.linalg.inv(matrices[:, :, :2])
    placed = torch.einsum("bij,bnj->bni", back, corners - matrices[:, None, :, 2])
    hull = torch.cat([placed.amin(1), placed.amax(1)], dim=1)
    height, width = size
    clipped = hull.clamp(min=0).minimum(hull.new_tensor([width, height, width, height]))
    return clipped.float(), _area(clipped) / _area(hull)


def _area(box: Tensor) -> Tensor:
    return (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
