"""Hand-made maps with known answers, counted pixel by pixel where that is another way to the same number."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fgvc.evaluation.localization import (
    OVERLAPS,
    THRESHOLDS,
    MapBoxes,
    Thresholds,
    accuracy,
    box_scores,
    boxes_of_maps,
    centre_map,
    choose_thresholds,
    compare_boxes,
    concatenate,
    highest_area,
    map_boxes,
    point_coverage,
)


def painted(*blocks: tuple[int, int, int, int, float], size: tuple[int, int] = (10, 10)) -> torch.Tensor:
    """(1,H,W): zeros with blocks left, top, right, bottom of a value, the later ones on top."""
    maps = torch.zeros(1, *size)
    for left, top, right, bottom, value in blocks:
        maps[0, top:bottom, left:right] = value
    return maps


def beside(maps: torch.Tensor, *true: tuple[float, float, float, float]) -> MapBoxes:
    return compare_boxes(boxes_of_maps(maps), torch.tensor(true, dtype=torch.float64))


def at(tau: float) -> int:
    return round(tau * 100)


def test_boxes_are_half_open() -> None:
    levels = map_boxes(painted((3, 2, 9, 6, 1.0))[0].numpy())
    for boxes in levels:  # every threshold from 0 to 0.99
        np.testing.assert_array_equal(boxes, [[3, 2, 9, 6]])
    pixel = beside(painted((7, 4, 8, 5, 1.0)), (7, 4, 8, 5))  # a pixel is 1 x 1, and itself
    assert (pixel.largest == 1).all()
    # Two pixels of which one is right: a half. Counting both ends in, as wsolevaluation does, says 4 / 6.
    pair = beside(painted((7, 4, 9, 5, 1.0)), (7, 4, 8, 5))
    assert (pair.largest == 0.5).all()


block = st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(1, 9), st.integers(1, 9)).map(
    lambda b: (b[0], b[1], min(10, b[0] + b[2]), min(10, b[1] + b[3]))
)


@settings(max_examples=80, deadline=None)
@given(block, block)
def test_iou_is_the_share_of_pixels_counted(map_box: tuple[int, int, int, int], true: tuple[int, int, int, int]) -> None:
    a, b = (painted((*box, 1.0))[0] > 0 for box in (map_box, true))
    counted = float((a & b).sum() / (a | b).sum())
    if a.all():  # flat: it says nothing
        counted = 0.0
    ious = beside(painted((*map_box, 1.0)), true)
    assert ious.largest[0, 50].item() == pytest.approx(counted, abs=1e-7)
    assert ious.best[0, 50].item() == pytest.approx(counted, abs=1e-7)


def flooded(mask: np.ndarray) -> list[tuple[int, int, int, int, int]]:
    """Pixels and box of every 8-connected component, by flooding; most pixels first."""
    cells = {(int(i), int(j)) for i, j in np.argwhere(mask)}
    components = []
    while cells:
        todo, component = [cells.pop()], []
        while todo:
            i, j = todo.pop()
            component.append((i, j))
            near = {(i + di, j + dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)} & cells
            cells -= near
            todo += near
        rows, columns = zip(*component, strict=True)
        components.append((-len(component), min(columns), min(rows), max(columns) + 1, max(rows) + 1))
    return sorted(components)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (7, 9), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])), st.sampled_from([0.0, 0.3, 0.7])
)
def test_components_equal_flooding(values: np.ndarray, tau: float) -> None:
    expected = flooded(values > tau)
    boxes = map_boxes(values)[at(tau)]
    assert sorted(map(tuple, boxes.tolist())) == sorted(box[1:] for box in expected)
    if expected:
        largest = {box[1:] for box in expected if box[0] == expected[0][0]}
        assert tuple(boxes[0]) in largest


def test_the_largest_component_and_the_best() -> None:
    """A large wrong blob and a small right one: only MaxBoxAccV2 may pick the right one."""
    ious = beside(painted((0, 0, 5, 5, 1.0), (7, 7, 9, 9, 1.0)), (7, 7, 9, 9))
    assert (ious.largest == 0).all()
    assert (ious.best == 1).all()
    scores = box_scores(ious, torch.tensor([True]), choose_thresholds(ious))
    assert (scores.max_box_acc, scores.max_box_acc_v2, scores.gt_known_loc, scores.top1_loc) == (0, 1, 0, 0)


def test_thresholds_by_hand() -> None:
    """A step map: 0.2 in 10 x 5, 0.5 in 5 x 4 of it, 1 in 2 x 2. The object has 5 x 4 pixels."""
    maps = painted((0, 0, 10, 5, 0.2), (2, 1, 7, 5, 0.5), (3, 2, 5, 4, 1.0))
    ious = beside(maps, (2, 1, 7, 5))
    curve = ious.largest[0]
    # Strictly greater: at 0.2 the outer step is out, at 0.5 the middle one; up to the rounding of the map's float32.
    np.testing.assert_allclose(curve[:20], 20 / 50)
    np.testing.assert_allclose(curve[21:50], 1)
    np.testing.assert_allclose(curve[50:], 4 / 20)
    assert accuracy(ious.largest, 0.3).tolist()[19] == 1
    assert accuracy(ious.largest, 0.5).tolist()[19] == 0
    assert choose_thresholds(ious).largest in (20, 21)
    assert choose_thresholds(ious).best == (0, choose_thresholds(ious).largest, choose_thresholds(ious).largest)


def two_images() -> MapBoxes:
    """The first is right (IoU 1) up to tau 0.39, then 4 / 16; the second 0.6 up to 0.69, then 0.4."""
    first = painted((0, 0, 4, 4, 0.395), (0, 0, 2, 2, 1.0))
    second = painted((0, 0, 10, 6, 0.695), (0, 0, 10, 4, 1.0))
    return beside(torch.cat([first, second]), (0, 0, 4, 4), (0, 0, 10, 10))


def test_scores_by_hand() -> None:
    ious = two_images()
    np.testing.assert_allclose(ious.largest[:, at(0.1)], [1, 0.6])
    np.testing.assert_allclose(ious.largest[:, at(0.5)], [0.25, 0.6])
    np.testing.assert_allclose(ious.largest[:, at(0.9)], [0.25, 0.4])
    np.testing.assert_array_equal(accuracy(ious.largest, 0.5)[[10, 50, 90]], [1, 0.5, 0])
    scores = box_scores(ious, torch.tensor([True, False]), choose_thresholds(ious))
    assert (scores.images, scores.tau) == (2, 0.0)
    assert (scores.gt_known_loc, scores.top1_loc) == (1, 0.5)
    assert (scores.max_box_acc, scores.max_box_acc_v2_30, scores.max_box_acc_v2_50, scores.max_box_acc_v2_70) == (
        1, 1, 1, 0.5,
    )  # fmt: skip
    assert scores.max_box_acc_v2 == scores.box_acc_v2 == pytest.approx(2.5 / 3)
    assert scores.iou == pytest.approx(0.8)


def test_thresholds_of_other_images_do_not_reach_the_maximum() -> None:
    scores = box_scores(two_images(), torch.tensor([True, True]), Thresholds(at(0.5), (at(0.5), at(0.5), at(0.9))))
    assert (scores.tau, scores.gt_known_loc, scores.top1_loc) == (0.5, 0.5, 0.5)
    assert scores.box_acc_v2 == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert scores.max_box_acc == 1
    assert scores.max_box_acc_v2 == pytest.approx(2.5 / 3)


def test_an_iou_of_exactly_the_overlap_is_right() -> None:
    """3, 5 and 7 pixels of 10 in a row."""
    for overlap in OVERLAPS:
        ious = beside(painted((0, 0, round(10 * overlap), 1, 1.0)), (0, 0, 10, 1))
        assert accuracy(ious.largest, overlap)[50] == 1


def test_giou_diou_and_ciou_by_their_formulas() -> None:
    """Disjoint boxes: 2 x 2 at the origin, and 4 x 2 at (4, 4)."""
    ious = beside(painted((0, 0, 2, 2, 1.0)), (4, 4, 8, 6))
    scores = box_scores(ious, torch.tensor([True]), choose_thresholds(ious))
    hull = 8 * 6
    centres, diagonal = (6 - 1) ** 2 + (5 - 1) ** 2, 8**2 + 6**2
    v = 4 / math.pi**2 * (math.atan(4 / 2) - math.atan(2 / 2)) ** 2
    assert scores.iou == 0
    assert scores.giou == pytest.approx(-(hull - 4 - 8) / hull, abs=1e-6)
    assert scores.diou == pytest.approx(-centres / diagonal, abs=1e-6)
    assert scores.ciou == pytest.approx(-centres / diagonal - v * v / (1 + v), abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.7, math.nan, math.inf])
def test_a_map_that_says_nothing_finds_nothing(value: float) -> None:
    maps = torch.full((1, 6, 8), value)
    ious = beside(maps, (0, 0, 8, 6))  # even where the object is the whole picture
    assert not ious.largest.any()
    assert not ious.best.any()
    scores = box_scores(ious, torch.tensor([True]), choose_thresholds(ious))
    assert (scores.gt_known_loc, scores.max_box_acc_v2, scores.iou) == (0, 0, 0)
    assert (scores.giou, scores.diou, scores.ciou) == (-1, -1, -1)
    np.testing.assert_allclose(highest_area(maps, 0.1), 0.1)


def test_one_pixel_that_is_not_finite_silences_the_map() -> None:
    maps = painted((3, 2, 9, 6, 1.0))
    maps[0, 0, 0] = math.nan
    assert not beside(maps, (3, 2, 9, 6)).largest.any()


def test_batches_are_joined_in_order() -> None:
    whole, other = two_images(), beside(painted((0, 0, 5, 5, 1.0)), (0, 0, 5, 5))
    both = concatenate([whole, other])
    assert both.boxes.shape == (3, len(THRESHOLDS), 4)
    assert torch.equal(both.largest[:2], whole.largest)
    assert torch.equal(both.true[2], other.true[0])


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 6, 7), elements=st.floats(0, 1, width=16)),
    st.sampled_from([0.1, 0.2, 0.5]),
    st.booleans(),
)  # width 16: values that the rounding of the normalisation keeps apart
def test_the_highest_area_is_exact_and_takes_no_lower_pixel(values: np.ndarray, share: float, coarse: bool) -> None:
    maps = torch.from_numpy(values.round(1) if coarse else values)
    weights = highest_area(maps, share)
    np.testing.assert_allclose(weights.sum((1, 2)), share * 42, rtol=1e-9)
    assert float(weights.min()) >= 0
    assert float(weights.max()) <= 1
    assert torch.equal(weights.flip(1, 2), highest_area(maps.flip(1, 2), share))  # no order among equals
    for one, weight in zip(maps, weights, strict=True):
        if one.max() - one.min() > 1e-3:
            if (weight == 1).any():
                assert one[weight == 1].min() >= one[weight < 1].max()
            if (weight == 0).any():
                assert one[weight > 0].min() > one[weight == 0].max()


def test_parts_by_hand() -> None:
    """Of 10 x 10 pixels ten are the highest 10 %; of the next twenty, equal ones, ten belong to the highest 20 %."""
    maps = painted((0, 1, 10, 3, 0.5), (0, 0, 10, 1, 1.0))
    nowhere = (math.nan, math.nan)
    points = torch.tensor([[(0.0, 0.0), (9.99, 0.99), (5.0, 1.0), (5, 2.9), (5, 3.0), (10, 0), (-0.01, 0), nowhere]])
    np.testing.assert_array_equal(point_coverage(maps, points, 0.1)[0], [1, 1, 0, 0, 0, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(point_coverage(maps, points, 0.2)[0], [1, 1, 0.5, 0.5, 0, np.nan, np.nan, np.nan])


def test_random_maps_cover_what_chance_does() -> None:
    """The uniform control is not measured but known; so it must be what maps of noise find."""
    rng = torch.Generator().manual_seed(0)
    points = 20 * torch.rand(400, 15, 2, generator=rng)
    coverage = point_coverage(torch.rand(400, 20, 20, generator=rng), points, 0.2)
    assert float(coverage.mean()) == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / 6000))


def test_the_centre_map_is_a_disc_in_the_middle() -> None:
    maps = centre_map((20, 40))
    assert torch.equal(maps, maps.flip(0))
    assert torch.equal(maps, maps.flip(1))
    disc = highest_area(maps[None], 0.2)[0]
    assert disc[9:11, 19:21].eq(1).all()
    assert disc[0].eq(0).all()
    rows, columns = disc.gt(0).any(1).sum(), disc.gt(0).any(0).sum()
    assert float(rows / 20) == pytest.approx(float(columns / 40), abs=0.1)  # as wide and high in shares of the sides
    assert float(rows / 20) == pytest.approx(2 * math.sqrt(0.2 / math.pi), abs=0.1)
