"""Regions, boxes, crops and fills against small pictures worked out by hand and against sorted lists."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from fgvc.techniques.boxes import boxes_of_masks, crop, inside, moved
from fgvc.techniques.masks import enlarge, erase, select, shifted
from fgvc.techniques.settings import Fill, Region

SEEDS = st.integers(0, 2**32)
SIDES = st.integers(1, 40)
FILLS: tuple[Fill, ...] = ("zero", "mean", "random", "noise", "blur")
EMPTY = torch.zeros(4, 4)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ramp(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1)


def row(mask: Tensor) -> str:
    return "".join("#" if value else "." for value in mask.flatten().tolist())


@pytest.mark.parametrize(
    ("rule", "value", "area", "expected"),
    [  # of -1 0 1 2 3 4 5 6 10 8, mean 3.8, deviation 3.43
        ("share", 0.6, (0, 0.9), ".......###"),
        ("share", 0.55, (0, 0.9), ".......###"),
        ("share", 0.5, (0, 0.9), "......####"),
        ("share", 0.0, (0, 0.9), ".#########"),
        ("share", 0.0, (0, 0.35), ".......###"),
        ("share", 0.9, (0.35, 0.9), "......####"),  # 0.35 x 10 rounds to even
        ("share", 0.9, (0.2, 0.2), "........##"),
        ("quantile", 0.7, (0, 0.9), ".......###"),
        ("quantile", 0.9, (0, 0.9), "........#."),
        ("quantile", 0.0, (0, 0.9), ".#########"),
        ("mean+std", 1.0, (0, 0.9), "........##"),
        ("mean+std", 0.5, (0, 0.9), ".......###"),
        ("mean+std", 2.0, (0, 0.9), ".........."),
        ("share", 0.0, (0, 0.05), ".........."),  # not one pixel is allowed
    ],
)
def test_regions_by_hand(rule: str, value: float, area: tuple[float, float], expected: str) -> None:
    values = ramp(-1, 0, 1, 2, 3, 4, 5, 6, 10, 8)
    region = Region.model_validate({"rule": rule, "value": value, "area": area})
    assert row(select(values, (1, 10), region)) == expected
    assert row(select(values * 1e-4, (1, 10), region)) == expected, "whatever the scale"


def test_shares_can_be_drawn_for_each_sample() -> None:
    maps = ramp(1, 2, 3, 4).expand(3, 1, 4)
    region = Region(rule="share", value=0.1, area=(0, 0.99))
    masks = select(maps, (1, 4), region, values=torch.tensor([0.4, 0.6, 0.9]))
    assert [row(mask) for mask in masks] == [".###", "..##", "...#"]


@pytest.mark.parametrize("area", [(0.3, 0.2), (0, 0), (0, 1), (-0.1, 0.5), (0.2, 1.5)])
def test_an_area_of_nothing_or_all_is_refused(area: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="area"):
        Region(area=area)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int], Region]:
    """Maps of a few cells, signed or not, the picture's size, and any region."""
    h, w = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    maps = noise(draw(SEEDS), 3, h, w) * draw(st.sampled_from([1e-6, 1.0, 1e4]))
    least, most = sorted(draw(st.tuples(st.floats(0, 0.98), st.floats(0.01, 0.99))))
    region = Region.model_validate(
        {
            "rule": draw(st.sampled_from(["share", "quantile", "mean+std"])),
            "value": draw(st.floats(0, 1)),
            "area": (draw(st.sampled_from([0.0, least])), most),
        }
    )
    size = (draw(st.integers(h, 40)), draw(st.integers(w, 40)))
    return maps.relu() if draw(st.booleans()) else maps, size, region


@settings(deadline=None)  # the first call in a process warms torch up
@given(cases())
def test_a_region_is_the_top_of_its_map_within_its_bounds(case: tuple[Tensor, tuple[int, int], Region]) -> None:
    """Against the sorted values: `rule` says how many, the floor raises it, the cap cuts it; equal values stay together."""
    maps, size, region = case
    masks = select(maps, size, region)
    assert masks.dtype == torch.bool
    assert masks.shape == (3, *size)
    count, (least, most) = size[0] * size[1], region.area
    for mask, fine in zip(masks, enlarge(maps, size), strict=True):
        values = np.sort(fine.flatten().double().numpy())[::-1]
        highest, area = values[0], int(mask.sum())
        assert area <= most * count + 1e-6, "never above the cap"
        if highest <= 0 or highest - values[-1] <= 1e-5 * highest:
            if highest <= 0:
                assert area == 0
            continue
        if 0 < area < count:
            assert fine[mask].min() > fine[~mask].max(), "nothing higher is left out"
        level = {
            "share": region.value * highest,
            "quantile": values[max(round((1 - region.value) * count), 1) - 1],
            "mean+std": values.mean() + region.value * values.std(),
        }[region.rule]
        slack = 1e-5 * np.abs(values).max()
        floor = max(round(least * count), 1) if least else 0
        cap = math.floor(most * count + 1e-6)
        if cap < count and values[cap] == values[max(cap - 1, 0)]:  # the cap falls among equal values: none of them
            cap = int((values > values[cap]).sum())
        assert area >= min(max(int((values >= level + slack).sum()), floor), cap)
        atop = int((values >= values[floor - 1]).sum()) if floor else 0
        assert area <= min(max(int((values >= level - slack).sum()), atop), cap)
        if cap and (floor or region.rule == "quantile" or (region.rule == "share" and region.value < 0.999)):
            assert area > 0, "never empty"


def test_a_plateau_larger_than_the_cap_selects_nothing() -> None:
    """Bilinear enlarging holds the maximum of a corner cell over a 36th of the picture."""
    maps = torch.zeros(1, 3, 3)
    maps[0, 0, 0] = 1
    assert not select(maps, (96, 96), Region(rule="share", value=0.6, area=(0.01, 0.02))).any()
    assert select(maps, (96, 96), Region(rule="share", value=0.6, area=(0.01, 0.04))).any()


@pytest.mark.parametrize("rule", ["share", "quantile", "mean+std"])
@pytest.mark.parametrize("least", [0.0, 0.2])
def test_maps_that_say_nothing_select_nothing(rule: str, least: float) -> None:
    good = noise(0, 4, 4).abs() + torch.eye(4)
    nan, inf, minus = good.clone(), good.clone(), good.clone()
    nan[1, 2], inf[0, 0], minus[3, 3] = torch.nan, torch.inf, -torch.inf
    nothing = [EMPTY, EMPTY + 3, EMPTY - 3, -good, EMPTY + torch.nan, nan, inf, minus]
    region = Region.model_validate({"rule": rule, "value": 0.5, "area": (least, 0.9)})
    masks = select(torch.stack([good, *nothing]), (9, 7), region)
    assert not masks[1:].any()
    assert torch.equal(masks[:1], select(good[None], (9, 7), region)), "the others know nothing of it"
    assert masks[0].any()


def test_the_input_of_select_stays() -> None:
    maps = noise(1, 2, 3, 3)
    maps[0, 0, 0] = torch.nan
    before = maps.clone()
    select(maps, (6, 6), Region())
    assert torch.equal(maps.nan_to_num(7), before.nan_to_num(7))


def test_enlarged_cells_stay_where_they_are() -> None:
    fine = enlarge(ramp(0, 4, 0), (2, 12))
    line = [0, 0, 0.5, 1.5, 2.5, 3.5, 3.5, 2.5, 1.5, 0.5, 0, 0]
    assert fine.tolist() == [[line, line]]


def test_boxes_by_hand() -> None:
    mask = torch.zeros(4, 10, 20, dtype=torch.bool)
    mask[0, 2:5, 6:7] = True
    mask[1, 0, 0] = mask[1, 9, 4] = True  # two parts: around both
    mask[2, 9, 19] = True
    tight = [[6, 2, 7, 5], [0, 0, 5, 10], [19, 9, 20, 10], [0, 0, 20, 10]]
    assert boxes_of_masks(mask).tolist() == tight
    assert boxes_of_masks(mask, 0.1).tolist() == [[4, 1, 9, 6], [0, 0, 7, 10], [17, 8, 20, 10], [0, 0, 20, 10]]
    assert boxes_of_masks(mask).dtype == torch.float32


@settings(deadline=None)
@given(SIDES, SIDES, st.floats(0, 1), SEEDS)
def test_boxes_hold_their_mask_and_stay_in_the_picture(height: int, width: int, padding: float, seed: int) -> None:
    mask = torch.stack([noise(seed, height, width) > level for level in (-9, 1, 2, 9)])
    for (left, top, right, bottom), own in zip(boxes_of_masks(mask, padding).tolist(), mask, strict=True):
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        outside = own.clone()
        outside[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = False
        assert not outside.any()


@settings(deadline=None)
@given(SIDES, SIDES, SEEDS)
def test_the_crop_of_the_whole_picture_is_the_picture(height: int, width: int, seed: int) -> None:
    x = noise(seed, 2, 3, height, width)
    cropped = crop(x, torch.tensor([[0.0, 0.0, width, height]] * 2), (height, width), pixels=(height, width))
    torch.testing.assert_close(cropped, x, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(st.data())
def test_crops_on_whole_pixels_are_slices(data: st.DataObject) -> None:
    height, width, x = 12, 17, noise(data.draw(SEEDS), 3, 3, 12, 17)
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    corners = [(data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))) for _ in range(3)]
    box = torch.tensor([[left, top, left + w, top + h] for top, left in corners], dtype=torch.float32)
    crops = crop(x, box, (h, w), pixels=(height, width))
    for b, (top, left) in enumerate(corners):
        torch.testing.assert_close(crops[b], x[b, :, top : top + h, left : left + w], rtol=1e-4, atol=1e-4)


def wave(y: Tensor, x: Tensor) -> Tensor:
    """A smooth picture of places in pixels of a 20 x 32 one: (3, rows, columns)."""
    y, x = y[:, None], x[None, :]
    return torch.stack([torch.sin(0.2 * x + 0.1 * y), torch.cos(0.15 * y - 0.05 * x), 0.02 * x * y])


@pytest.mark.parametrize("finer", [1, 2, 2.5, 4])
def test_a_crop_shows_what_lies_in_its_box_at_any_resolution(finer: float) -> None:
    """Boxes are counted in 20 x 32 pixels, whatever the resolution of what is cropped."""
    centres = [(torch.arange(int(side * finer)) + 0.5) / finer for side in (20, 32)]
    box = torch.tensor([[4.0, 3.0, 28.0, 13.0], [10.5, 5.25, 14.5, 17.75]])
    crops = crop(wave(*centres).expand(2, -1, -1, -1), box, (24, 40), pixels=(20, 32))
    for b, (left, top, right, bottom) in enumerate(box.tolist()):
        y = top + (torch.arange(24) + 0.5) / 24 * (bottom - top)
        x = left + (torch.arange(40) + 0.5) / 40 * (right - left)
        torch.testing.assert_close(crops[b], wave(y, x), rtol=0, atol=0.01 / finer)


def test_pixels_inside_boxes_by_hand() -> None:
    box = torch.tensor([[[1, 0, 3, 2], [4, 1, 5, 3]], [[-5, 2, 2, 9], [3, 1, 3, 3]]])
    masks = inside(box, (3, 6))
    assert [row(line) for line in masks[0]] == [".##...", ".##.#.", "....#."]
    assert [row(line) for line in masks[1]] == ["......", "......", "##...."]
    assert masks.shape == (2, 3, 6)


@settings(deadline=None)
@given(SEEDS)
def test_the_inside_is_a_loop_over_pixels(seed: int) -> None:
    box = noise(seed, 2, 3, 4) * 6 + 4
    masks = inside(box, (7, 9))
    for b in range(2):
        for y in range(7):
            for x in range(9):
                hits = [le <= x < ri and to <= y < bo for le, to, ri, bo in box[b].tolist()]
                assert bool(masks[b, y, x]) == any(hits)


def test_moved_boxes_by_hand() -> None:
    box = torch.tensor([[2.0, 1.0, 6.0, 4.0]]).expand(4, 4)
    where = torch.tensor([[0, 0], [0.5, 0.5], [1, 1], [0, 0.25]])
    assert moved(box, where, (9, 20)).tolist() == [[0, 0, 4, 3], [8, 3, 12, 6], [16, 6, 20, 9], [4, 0, 8, 3]]


@settings(deadline=None)
@given(SIDES, SIDES, SEEDS)
def test_moved_boxes_keep_their_sides_and_stay_inside(height: int, width: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    edges = torch.rand(50, 2, 2, generator=rng).sort(1).values * torch.tensor([width, height])
    box = edges.flatten(1)
    new = moved(box, torch.rand(50, 2, generator=rng), (height, width))
    torch.testing.assert_close(new[:, 2:] - new[:, :2], box[:, 2:] - box[:, :2], rtol=0, atol=1e-4)
    assert new.min() >= 0
    assert (new[:, 2] <= width + 1e-4).all()
    assert (new[:, 3] <= height + 1e-4).all()


def test_shifted_masks_by_hand() -> None:
    mask = torch.zeros(3, 4, 6, dtype=torch.bool)
    mask[:, 0, 0] = mask[:, 0, 5] = True
    moved = shifted(mask, torch.tensor([[0, 0], [0.5, 0.34], [0.99, 0.99]]))
    assert torch.equal(moved[0], mask[0])
    assert torch.nonzero(moved[1]).tolist() == [[2, 1], [2, 2]]
    assert torch.nonzero(moved[2]).tolist() == [[3, 4], [3, 5]]


@settings(deadline=None)
@given(SIDES, SIDES, SEEDS)
def test_shifted_masks_are_rolled(height: int, width: int, seed: int) -> None:
    mask, where = noise(seed, 4, height, width) > 0.5, torch.rand(4, 2, generator=torch.Generator().manual_seed(seed))
    moved = shifted(mask, where)
    assert moved.sum((1, 2)).tolist() == mask.sum((1, 2)).tolist()
    for b in range(4):
        down, across = int(where[b, 0] * height), int(where[b, 1] * width)
        assert torch.equal(moved[b], mask[b].roll((down, across), (0, 1)))


@pytest.mark.parametrize("fill", FILLS)
def test_erasing_changes_the_mask_alone(fill: Fill) -> None:
    x = noise(5, 3, 3, 24, 40) + torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)
    maps = noise(6, 3, 4, 5)
    mask, before = select(maps, (24, 40), Region(value=0.0, area=(0.2, 0.3))), x.clone()
    unchanged = mask.clone()
    erased = erase(x, mask, fill, seed=3)
    assert torch.equal(x, before), "not in place"
    assert torch.equal(mask, unchanged)
    channels = mask[:, None].expand_as(x)
    assert torch.equal(erased[~channels], x[~channels])
    assert (erased != x)[channels].float().mean() > 0.99
    assert erased.flatten(1).any(1).all(), "no picture is all zero"
    assert erased.dtype == x.dtype
    assert torch.equal(erase(x, mask, fill, seed=3), erased)
    assert torch.equal(erase(x, mask & False, fill), x)
    assert torch.equal(erase(x, mask, fill, seed=4), erased) == (fill not in ("random", "noise"))


def test_each_fill_is_its_definition() -> None:
    x = noise(7, 2, 3, 32, 64) * 2 + 5
    mask = torch.zeros(2, 32, 64, dtype=torch.bool)
    mask[0, 8:24, 16:48] = mask[1, :16] = True
    inner = {fill: erase(x, mask, fill, seed=1).double() for fill in FILLS}
    for b in range(2):
        for c in range(3):
            new = {fill: values[b, c][mask[b]] for fill, values in inner.items()}
            assert not new["zero"].any()
            torch.testing.assert_close(new["mean"], x[b, c].double().mean().expand_as(new["mean"]), rtol=1e-5, atol=0)
            assert new["random"].unique().numel() == 1
            assert new["noise"].unique().numel() > 0.9 * new["noise"].numel()
            assert abs(new["noise"].mean()) < 0.25
            assert 0.85 < new["noise"].std() < 1.15
            assert abs(new["blur"].mean() - 5) < 0.3
            assert new["blur"].std() < 0.4, "noise of deviation 2 is blurred away"
    assert inner["random"][:, :, 8, 16].unique().numel() == 6, "a colour for every picture"


def test_blur_keeps_what_is_smooth_and_its_borders() -> None:
    even, all_of_it = torch.full((1, 3, 33, 47), 2.5), torch.ones(1, 33, 47, dtype=torch.bool)
    torch.testing.assert_close(erase(even, all_of_it, "blur"), even)
    slope = torch.arange(47.0).expand(1, 3, 33, 47)
    torch.testing.assert_close(erase(slope, all_of_it, "blur")[..., 10:37], slope[..., 10:37])
    step = (slope > 23).float() * 8  # box 5, twice: three quarters of the way one pixel and a half off
    assert erase(step, all_of_it, "blur")[0, 0, 16, 15:32].diff().max() < 8 / 4


def test_a_part_of_a_map_is_measured_by_the_whole_one() -> None:
    quiet = torch.tensor([[[0.1, 0.2], [0.1, 0.1]]])
    assert select(quiet, (4, 4), Region(value=0.6)).any()
    assert not select(quiet, (4, 4), Region(value=0.6), maximum=1.0).any()
    assert select(quiet, (4, 4), Region(value=0.15), maximum=1.0).any()
