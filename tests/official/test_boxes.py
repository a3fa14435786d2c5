"""MaxBoxAcc and MaxBoxAccV2 as wsolevaluation computes them, on maps that meet the thresholds exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fgvc.evaluation.localization import (
    OVERLAPS,
    THRESHOLDS,
    USUAL,
    Boxes,
    box_scores,
    choose_thresholds,
    compare_boxes,
    map_boxes,
)
from tests.official.conftest import Arrays

W, H = 28, 20


def boxes_of(a: Arrays) -> list[Boxes]:
    return [map_boxes(one) for one in a["maps"].numpy()]


def clipped(boxes: Tensor) -> Tensor:
    """x + width is taken for the last pixel's number there, within the map."""
    return torch.minimum(boxes, torch.tensor([W, H, W - 1, H - 1], dtype=boxes.dtype))


def inclusive_iou(boxes: Tensor, true: Tensor) -> Tensor:
    """(M,): both ends count."""
    inner = (torch.minimum(boxes[:, 2:], true[2:]) - torch.maximum(boxes[:, :2], true[:2]) + 1).clamp(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    return inner / (areas + (true[2:] - true[:2] + 1).prod() - inner)


def test_settings(official: Callable[[str], Arrays]) -> None:
    a = official("maxboxacc")
    torch.testing.assert_close(a["thresholds"], torch.from_numpy(THRESHOLDS), rtol=0, atol=1e-12)
    assert tuple(round(value / (100 if value > 1 else 1), 2) for value in a["overlaps"].tolist()) == OVERLAPS


def test_every_box_is_one_of_theirs_and_so_is_its_iou(official: Callable[[str], Arrays]) -> None:
    a = official("maxboxacc")
    best, largest = torch.zeros(2, 7, 100, dtype=torch.float64)
    extra = 0
    for at, levels in enumerate(boxes_of(a)):
        for step, level in enumerate(levels):
            count = int(a["boxes_all_count"][at, step])
            theirs = {tuple(box) for box in a["boxes_all"][at, step, :count].tolist()}
            if not len(level):
                continue
            ours = clipped(torch.from_numpy(level))
            assert {tuple(int(edge) for edge in box) for box in ours.tolist()} <= theirs
            extra += len(theirs) > len(level)
            iou = inclusive_iou(ours, a["true_boxes"][at].double())
            best[at, step], largest[at, step] = iou.max(), iou[0]
    assert extra == 80, "known: contours of holes count there"
    torch.testing.assert_close(best, a["iou_all"], rtol=0, atol=1e-6)
    assert int(((largest - a["iou_largest"]).abs() > 1e-6).sum()) == 5, (
        "known: the largest by contour area, not by pixels"
    )
    for name, iou in (("all", a["iou_all"]), ("largest", a["iou_largest"])):
        right = torch.stack([(iou >= overlap).sum(0) for overlap in OVERLAPS])
        assert torch.equal(right, a[f"right_{name}"])
        torch.testing.assert_close(right.amax(1) / 7, a[f"accuracy_{name}"].float(), rtol=0, atol=1e-6)
    for at, step in (a["boxes_all_count"] > 0).nonzero().tolist():
        assert a["boxes_largest"][at, step].tolist() in a["boxes_all"][at, step].tolist()


def test_known_the_scores_are_lower_by_half_open_boxes(official: Callable[[str], Arrays]) -> None:
    a = official("maxboxacc")
    beside = compare_boxes(boxes_of(a), a["true_boxes"])
    scores = box_scores(beside, torch.ones(7, dtype=torch.bool), choose_thresholds(beside))
    assert scores.max_box_acc == pytest.approx(a.number("max_box_acc")) == pytest.approx(4 / 7)
    assert scores.max_box_acc_v2 == pytest.approx(0.619, abs=5e-4)
    assert a.number("max_box_acc_v2") == pytest.approx(0.762, abs=5e-4)
    assert a.number("max_box_acc") == pytest.approx(float(a["accuracy_largest"][USUAL]))
    assert a.number("max_box_acc_v2") == pytest.approx(float(a["accuracy_all"].mean()))
