"""Localisation scores of maps: boxes around what exceeds a threshold, beside the object's; parts inside a fixed area.

MaxBoxAcc, its second version and GT-known Loc are those of Choe et al. (CVPR 2020, arXiv:2001.07437).

Boxes are half-open (`fgvc.images.preprocess.Box`), so that a single pixel has the area 1. (wsolevaluation takes OpenCV's
x + width for the last pixel's number and counts both ends in, so its boxes are a pixel wider and higher than what they go around:
its MaxBoxAcc is 1 to 3 points higher for the same maps. Its thresholds are 1000.)

A map that is flat or not finite says nothing: it has no box, its IoU is 0 and its GIoU, DIoU and CIoU are -1; and its highest
10 % are 10 % of every pixel, just as chance would have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou, complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from fgvc.models.class_maps import normalised

THRESHOLDS = np.arange(100) / 100  # of a map in [0,1]; a pixel counts where it is greater
OVERLAPS = (0.3, 0.5, 0.7)  # IoU from which a box is right, of MaxBoxAccV2
USUAL = OVERLAPS.index(0.5)  # of MaxBoxAcc, GT-known and Top-1 Loc
SHARES = (0.1, 0.2)  # of the picture's area, for parts

Boxes = list[NDArray[np.float64]]
"""For each threshold (M,4): the boxes around the components of one map above it, the largest component first."""


@dataclass(frozen=True, slots=True)
class MapBoxes:
    """Boxes of N maps at each of T thresholds, beside the N objects' boxes; all float64."""

    true: Tensor  # (N,4)
    boxes: Tensor  # (N,T,4): around the largest component; zeros where there is none
    largest: Tensor  # (N,T): IoU of that
    best: Tensor  # (N,T): IoU of whichever component has most: the object's box chooses, so it is optimistic


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Indices of thresholds, each the first of those at which most boxes are right."""

    largest: int  # by the box around the largest component at IoU 0.5
    best: tuple[int, ...]  # by whichever component has most, at each of OVERLAPS


@dataclass(frozen=True, slots=True)
class BoxScores:
    """Localisation scores: shares in [0,1] and means over `images`. The `max_` ones choose their threshold on these images."""

    images: int
    tau: float  # the chosen threshold, of gt_known_loc to ciou
    gt_known_loc: float  # IoU >= 0.5 of the largest component's box
    top1_loc: float  # and the predicted class is right; the map then is that of the predicted class, too
    iou: float
    giou: float
    diou: float
    ciou: float
    box_acc_v2: float  # as max_box_acc_v2, at the chosen thresholds
    max_box_acc: float  # gt_known_loc at its best threshold
    max_box_acc_v2: float  # mean over the three overlaps of each one's best threshold, whichever component has most
    max_box_acc_v2_30: float
    max_box_acc_v2_50: float
    max_box_acc_v2_70: float

    def numbers(self) -> dict[str, float]:
        return asdict(self)


def map_boxes(heat: NDArray[np.floating]) -> Boxes:
    """Boxes around the components of a map (H,W) in [0,1] at each threshold. Pixels that touch at a corner belong together; a
    component in the hole of another is one of its own, unlike contours."""
    boxes: Boxes = []
    for tau in THRESHOLDS:
        _, _, stats, _ = cv2.connectedComponentsWithStats((heat > tau).view(np.uint8), connectivity=8)
        left, top, width, height, pixels = stats[1:].T.astype(np.float64)  # the first is the background
        order = np.argsort(-pixels, kind="stable")
        boxes.append(np.stack([left, top, left + width, top + height], axis=1)[order])
    return boxes


def boxes_of_maps(maps: Tensor) -> list[Boxes]:
    """Boxes around the components of each of the maps (N,H,W), scaled to smallest 0 and largest 1 first."""
    return [map_boxes(heat) for heat in normalised(maps).cpu().numpy()]


def compare_boxes(boxes: Sequence[Boxes], true: Tensor) -> MapBoxes:
    """Compare the boxes of N maps with the N objects' (N,4)."""
    steps = len(THRESHOLDS)
    largest, best = torch.zeros(2, len(true), steps, dtype=torch.float64)
    largest_boxes = torch.zeros(len(true), steps, 4, dtype=torch.float64)
    for at, (levels, box) in enumerate(zip(boxes, true.double(), strict=True)):
        overlaps = box_iou(torch.from_numpy(np.concatenate(levels)), box[None])[:, 0]
        for step, (level, iou) in enumerate(zip(levels, overlaps.split([len(level) for level in levels]), strict=True)):
            if len(level):
                largest_boxes[at, step], largest[at, step], best[at, step] = torch.from_numpy(level[0]), iou[0], iou.max()
    return MapBoxes(true.double(), largest_boxes, largest, best)


def concatenate(batches: Sequence[MapBoxes]) -> MapBoxes:
    """Concatenate several batches."""
    return MapBoxes(*(torch.cat([getattr(batch, field.name) for batch in batches]) for field in fields(MapBoxes)))


def accuracy(iou: Tensor, overlap: float) -> Tensor:
    """Share of the images whose IoU (N,T) is at least `overlap`, at each threshold (T,)."""
    return (iou >= overlap).double().mean(0)


def choose_thresholds(boxes: MapBoxes) -> Thresholds:
    """Choose the thresholds at which these images' boxes are right most often."""
    best = tuple(int(accuracy(boxes.best, overlap).argmax()) for overlap in OVERLAPS)
    return Thresholds(int(accuracy(boxes.largest, OVERLAPS[USUAL]).argmax()), best)


def box_scores(boxes: MapBoxes, right: Tensor, thresholds: Thresholds) -> BoxScores:
    """Score the boxes of N >= 1 images; `right` (N,) bool: whether each predicted class is right."""
    located = boxes.largest[:, thresholds.largest] >= OVERLAPS[USUAL]
    curves = [accuracy(boxes.best, overlap) for overlap in OVERLAPS]
    maxima = [float(curve.max()) for curve in curves]
    at_chosen = [float(curve[step]) for curve, step in zip(curves, thresholds.best, strict=True)]
    return BoxScores(
        images=len(right),
        tau=float(THRESHOLDS[thresholds.largest]),
        gt_known_loc=float(located.double().mean()),
        top1_loc=float((located & right).double().mean()),
        **_agreement(boxes.boxes[:, thresholds.largest], boxes.true, boxes.largest[:, thresholds.largest]),
        box_acc_v2=float(np.mean(at_chosen)),
        max_box_acc=float(accuracy(boxes.largest, OVERLAPS[USUAL]).max()),
        max_box_acc_v2=float(np.mean(maxima)),
        max_box_acc_v2_30=maxima[0],
        max_box_acc_v2_50=maxima[1],
        max_box_acc_v2_70=maxima[2],
    )


def _agreement(boxes: Tensor, true: Tensor, iou: Tensor) -> dict[str, float]:
    """Mean IoU and its kin over N pairs of boxes; where there is no box, the least value that an IoU and a GIoU can have."""
    present = boxes[:, 2] > boxes[:, 0]
    losses = {"giou": generalized_box_iou_loss, "diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}
    each = {name: torch.where(present, 1 - loss(boxes, true), -1.0) for name, loss in losses.items()}
    return {"iou": float(iou.mean()), **{name: float(values.mean()) for name, values in each.items()}}


def highest_area(maps: Tensor, share: float) -> Tensor:
    """Weights (N,H,W) float64 in [0,1] whose sum is exactly `share` of the pixels: 1 for the highest ones, and for those of equal
    value at the border the part of them that still has room, so that no order among equals decides."""
    flat = normalised(maps).flatten(1)
    area = share * flat.shape[1]
    level = flat.topk(int(np.ceil(area)), dim=1).values[:, -1:]
    above, tied = flat > level, flat == level
    room = (area - above.sum(1, keepdim=True, dtype=torch.float64)) / tied.sum(1, keepdim=True)
    return (above.double() + tied * room).view(maps.shape)


def point_coverage(maps: Tensor, points: Tensor, share: float) -> Tensor:
    """Share (N,P) float64 of each point (N,P,2), x and y in continuous pixels, in the map's highest `share`; NaN for
    points outside of the map and those that are NaN."""
    _, height, width = maps.shape
    x, y = points.floor().unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)  # never true of NaN
    column, row = (torch.where(inside, place, 0).long() for place in (x, y))
    weights = highest_area(maps, share)[torch.arange(len(maps))[:, None], row, column]
    return torch.where(inside, weights, torch.nan)


def centre_map(size: Sequence[int]) -> Tensor:
    """Map (H,W) float64 in [0,1] of no image: highest in the middle, falling with the distance in shares of the sides."""
    # Whole numbers first, so that both halves are equal to the last bit: equal values share what room there is.
    down, across = ((2 * torch.arange(side, dtype=torch.float64) + 1 - side) / (2 * side) for side in size)
    return 1 - torch.hypot(down[:, None], across[None]) / np.hypot(0.5, 0.5)
