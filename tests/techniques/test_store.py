"""What is recalled in a new crop against a loop over pixels in float64, from the two matrices and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fgvc.techniques.cam_erasing.store import MapStore

SIZE, CELLS = (48, 64), (3, 4)  # pixels of a crop, cells of its map: 16 pixels each
SEEDS = st.integers(0, 2**32)


def bytes_like(seed: int, *shape: int) -> Tensor:
    """Maps of multiples of 1/255, none of them 0, which a byte holds exactly."""
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed)) / 255


def matrix(a: float, b: float, x: float, c: float, d: float, y: float) -> Tensor:
    return torch.tensor([[[a, b, x], [c, d, y]]])


def window(left: float, top: float, right: float, bottom: float, *, flip: bool = False) -> Tensor:
    """The matrix of a crop of SIZE that shows this part of the original, maybe flipped."""
    across, down = (right - left) / SIZE[1], (bottom - top) / SIZE[0]
    return matrix(-across if flip else across, 0, right if flip else left, 0, down, top)


def turned(degrees: float, scale: float, x: float, y: float) -> Tensor:
    cos, sin = math.cos(math.radians(degrees)) * scale, math.sin(math.radians(degrees)) * scale
    return matrix(cos, -sin, x, sin, cos, y)


WHOLE = window(0, 0, 640, 480)


def stored(geometry: Tensor, maps: Tensor, size: tuple[int, int] = SIZE) -> MapStore:
    store = MapStore(maps.shape[1:])
    store.record(torch.arange(len(maps)), geometry.expand(len(maps), 2, 3), maps, size)
    return store


def by_pixel(then: Tensor, now: Tensor, cells: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """In float64 for each of the recalled pixels: the value, whether the recorded crop holds it, and how many cells it is
    away from that crop's border (> 0 inside)."""
    (a, b, x), (c, d, y) = then[0].double().tolist()
    (e, f, u), (g, h, v) = now[0].double().tolist()
    down, across = size[0] // 4, size[1] // 4
    (rows, columns), values = cells.shape, cells.double()
    values_, depth = torch.zeros(2, down, across, dtype=torch.float64).unbind()
    for i in range(down):
        for j in range(across):
            px, py = (j + 0.5) * size[1] / across, (i + 0.5) * size[0] / down
            ox, oy = e * px + f * py + u, g * px + h * py + v  # in the original
            determinant = a * d - b * c
            qx, qy = (d * (ox - x) - b * (oy - y)) / determinant, (a * (oy - y) - c * (ox - x)) / determinant
            s, t = qx / SIZE[1] * columns, qy / SIZE[0] * rows  # in cells
            depth[i, j] = min(s, t, columns - s, rows - t)
            left, top = math.floor(s - 0.5), math.floor(t - 0.5)
            for k in (top, top + 1):
                for m in (left, left + 1):
                    weight = (1 - abs(s - 0.5 - m)) * (1 - abs(t - 0.5 - k))
                    values_[i, j] += weight * values[min(max(k, 0), rows - 1), min(max(m, 0), columns - 1)]
    return torch.where(depth > 0, values_, 0.0), depth > 0, depth


def test_the_same_crop_recalls_the_map_enlarged() -> None:
    maps = bytes_like(0, 2, *CELLS)
    recalled = stored(WHOLE, maps).recall(torch.tensor([1, 0]), WHOLE.expand(2, 2, 3), SIZE)
    assert recalled.shape == (2, 12, 16)
    expected = F.interpolate(maps[[1, 0], None], (12, 16), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(recalled[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], rtol=0, atol=1e-5)


def test_the_same_crop_recalls_the_map_enlarged_up_to_its_border() -> None:
    maps = bytes_like(0, 2, *CELLS)
    recalled = stored(WHOLE, maps).recall(torch.arange(2), WHOLE.expand(2, 2, 3), SIZE)
    expected = F.interpolate(maps[:, None], (12, 16), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(recalled, expected, rtol=0, atol=1e-5)


@settings(deadline=None)  # the first call in a process warms torch up
@given(SEEDS)
def test_a_byte_is_all_that_is_lost(seed: int) -> None:
    maps = torch.rand(2, 12, 16, generator=torch.Generator().manual_seed(seed))
    recalled = stored(WHOLE, maps).recall(torch.arange(2), WHOLE.expand(2, 2, 3), SIZE)
    assert (recalled - maps).abs().max() <= 0.5 / 255 + 1e-5  # a pixel of what is recalled is a cell here


def test_a_flipped_crop_recalls_the_flipped_map() -> None:
    maps = bytes_like(1, 1, 12, 16)
    recalled = stored(WHOLE, maps).recall(torch.tensor([0]), window(0, 0, 640, 480, flip=True), SIZE)
    torch.testing.assert_close(recalled, maps.flip(2), rtol=0, atol=1e-5)
    recalled = stored(window(0, 0, 640, 480, flip=True), maps).recall(torch.tensor([0]), WHOLE, SIZE)
    torch.testing.assert_close(recalled, maps.flip(2), rtol=0, atol=1e-5)


def test_a_crop_that_is_shifted_by_whole_cells_recalls_a_slice_and_nothing_beyond() -> None:
    maps = bytes_like(2, 1, 12, 16)
    recalled = stored(WHOLE, maps).recall(torch.tensor([0]), window(120, -80, 760, 400), SIZE)  # 3 right, 2 up
    torch.testing.assert_close(recalled[:, 2:, :13], maps[:, :10, 3:], rtol=0, atol=1e-5)
    assert (recalled[:, :2] < 1e-5).all()
    assert (recalled[:, :, 13:] < 1e-5).all()


CROPS = [
    pytest.param(WHOLE, window(100, 50, 420, 290), SIZE, id="zoomed in"),
    pytest.param(window(100, 50, 420, 290), WHOLE, SIZE, id="zoomed out"),
    pytest.param(WHOLE, window(-200, 130, 330, 700, flip=True), SIZE, id="shifted and flipped"),
    pytest.param(WHOLE, window(33, 21, 540, 444), (100, 72), id="of another size"),
    pytest.param(turned(20, 8, 150, 10), turned(-35, 9, 10, 300), SIZE, id="both turned"),
]


@pytest.mark.parametrize(("then", "now", "size"), CROPS)
def test_any_crop_is_a_loop_over_pixels(then: Tensor, now: Tensor, size: tuple[int, int]) -> None:
    maps = bytes_like(3, 1, *CELLS)
    recalled = stored(then, maps).recall(torch.tensor([0]), now, size)[0].double()
    expected, _, depth = by_pixel(then, now, maps[0], size)
    assert recalled.shape == expected.shape
    sure = depth.abs() > 0.5
    assert sure.double().mean() > 0.2
    assert (sure & (depth > 0)).any()
    torch.testing.assert_close(recalled[sure], expected[sure], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("then", "now", "size"), CROPS)
def test_any_crop_is_a_loop_over_pixels_up_to_the_border(then: Tensor, now: Tensor, size: tuple[int, int]) -> None:
    maps = bytes_like(3, 1, *CELLS)
    recalled = stored(then, maps).recall(torch.tensor([0]), now, size)[0].double()
    expected, inside, depth = by_pixel(then, now, maps[0], size)
    clear = depth.abs() > 1e-3
    assert (recalled[clear & ~inside] == 0).all()
    torch.testing.assert_close(recalled[clear], expected[clear], rtol=0, atol=1e-4)


def test_a_crop_beside_the_recorded_one_recalls_nothing() -> None:
    store = stored(window(0, 0, 200, 150), bytes_like(4, 1, *CELLS))
    assert not store.recall(torch.tensor([0]), window(300, 0, 500, 150), SIZE).any()


def test_rows_that_were_never_recorded_recall_nothing() -> None:
    store = MapStore(CELLS)
    assert not store.recall(torch.tensor([0, 7]), WHOLE.expand(2, 2, 3), SIZE).any()
    maps = bytes_like(5, 2, *CELLS)
    store.record(torch.tensor([9, 4]), WHOLE.expand(2, 2, 3), maps, SIZE)
    rows = torch.tensor([4, 3, 1000, 9, 10, 0])
    recalled = store.recall(rows, WHOLE.expand(6, 2, 3), SIZE)
    assert recalled.flatten(1).any(1).tolist() == [True, False, False, True, False, False]
    assert torch.equal(recalled[[0]], store.recall(torch.tensor([4]), WHOLE, SIZE))
    assert recalled.min() >= 0
    assert recalled.max() <= 1


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5, unique=True), min_size=1, max_size=6))
def test_rows_come_in_any_order_and_the_last_record_counts(steps: list[list[int]]) -> None:
    store, expected = MapStore((2, 2)), {}
    for number, rows in enumerate(steps):
        maps = bytes_like(number, len(rows), 2, 2)
        store.record(torch.tensor(rows), window(0, number, 8, 8 + number).expand(len(rows), 2, 3), maps, (8, 8))
        expected |= {row: (own, number) for row, own in zip(rows, maps, strict=True)}
    at = torch.cat([window(0, number, 8, 8 + number) for _, number in expected.values()])
    recalled = store.recall(torch.tensor(list(expected)), at, (8, 8))
    torch.testing.assert_close(recalled, torch.stack([own for own, _ in expected.values()]), rtol=0, atol=1e-5)
    others = torch.tensor([row for row in range(50) if row not in expected])
    assert not store.recall(others, WHOLE.expand(len(others), 2, 3), (8, 8)).any()


def test_the_state_is_saved_and_loaded() -> None:
    store, other = stored(window(5, 6, 70, 80), bytes_like(6, 3, *CELLS)), MapStore(CELLS)
    before = store.recall(torch.arange(3), WHOLE.expand(3, 2, 3) / 8, SIZE)
    other.load_state_dict(store.state_dict())
    assert before.any()
    assert torch.equal(other.recall(torch.arange(3), WHOLE.expand(3, 2, 3) / 8, SIZE), before)
    assert all(isinstance(value, Tensor) for value in store.state_dict().values())
    other.record(torch.tensor([5]), WHOLE, bytes_like(7, 1, *CELLS), SIZE)  # and grows on
    assert torch.equal(other.recall(torch.arange(3), WHOLE.expand(3, 2, 3) / 8, SIZE), before)
    assert other.recall(torch.tensor([5]), WHOLE, SIZE).any()


def test_maps_of_another_size_are_brought_to_the_stores() -> None:
    """Twice as fine: every cell is the mean of its four."""
    fine = bytes_like(8, 1, 24, 32)
    store = MapStore((12, 16))
    store.record(torch.tensor([0]), WHOLE, fine, SIZE)
    recalled = store.recall(torch.tensor([0]), WHOLE, SIZE)
    expected = fine.unflatten(1, (12, 2)).unflatten(3, (16, 2)).mean((2, 4))
    assert (recalled - expected).abs().max() <= 0.5 / 255 + 1e-5


def test_nothing_of_the_caller_is_changed_or_kept() -> None:
    maps, geometry = bytes_like(9, 1, 12, 16), WHOLE.clone()
    before = maps.clone()
    store = stored(geometry, maps)
    assert torch.equal(geometry, WHOLE)
    assert torch.equal(maps, before)
    maps.zero_()
    geometry.zero_()
    torch.testing.assert_close(store.recall(torch.tensor([0]), WHOLE, SIZE), before, rtol=0, atol=1e-5)
