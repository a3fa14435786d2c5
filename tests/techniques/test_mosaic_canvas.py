"""Mosaics against loops over pixels, and areas that are exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgvc.techniques.mosaic.canvas import cells, in_cells, on_canvas, shares


def flat(values: list[float], size: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.full((1, 3, *size), float(value)) for value in values]


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.data())
def test_each_picture_has_its_cell_and_its_exact_share(height: int, width: int, data: st.DataObject) -> None:
    y, x = data.draw(st.integers(1, height - 1)), data.draw(st.integers(1, width - 1))
    at = [
        (data.draw(st.floats(0, 1, exclude_max=True)), data.draw(st.floats(0, 1, exclude_max=True))) for _ in range(4)
    ]
    image = in_cells(flat([1, 2, 3, 4], (height, width)), (y, x), at)[0, 0].round(decimals=4)
    assert image[0, 0] == 1
    assert image[0, -1] == 2
    assert image[-1, 0] == 3
    assert image[-1, -1] == 4
    for value, share in enumerate(shares((y, x), (height, width)), start=1):
        assert int((image == value).sum()) == round(share * height * width)
    assert sum(shares((y, x), (height, width))) == pytest.approx(1)


def test_a_cell_shows_a_window_of_the_whole_picture_reduced_to_cover_it() -> None:
    """Columns 0..7 of 8 in a cell 8 high and 4 wide: full height, so half of the columns, from the left or the right."""
    ramp = torch.arange(8.0).expand(1, 3, 8, 8).contiguous()
    left = in_cells([ramp] * 4, (8 - 1, 4), [(0.0, 0.0)] * 4)[0, 0]
    right = in_cells([ramp] * 4, (8 - 1, 4), [(0.0, 0.999)] * 4)[0, 0]
    assert left[0, :4].max() < 4 < right[0, :4].max()
    assert (left[0, :4].diff() > 0).all(), "the picture's own order"
    small = in_cells([ramp] * 4, (4, 4), [(0.5, 0.5)] * 4)[0, 0]
    torch.testing.assert_close(small[0, 1:3], torch.tensor([2.5, 4.5])), "half of the size: the mean of two columns"
    assert cells((1, 2), (4, 6)) == [(0, 0, 2, 1), (2, 0, 6, 1), (0, 1, 2, 4), (2, 1, 6, 4)]


@pytest.mark.parametrize("one", [True, False])
def test_a_canvas_is_a_window_on_four_pictures_that_meet(one: bool) -> None:
    """Against a loop: every pixel of the window is a place on the canvas, which lies in one picture or in none."""
    rng, size, count = torch.Generator().manual_seed(3), (10, 12), 3
    pictures = [torch.full((count, 3, *size), float(n + 1)) for n in range(4)]
    n = 1 if one else count
    middle = 0.5 + torch.rand(n, 2, generator=rng)
    scale = 0.5 + torch.rand(n, generator=rng)
    shift = 0.4 + 0.2 * torch.rand(n, 2, generator=rng)
    canvas, areas = on_canvas(pictures, middle, scale, shift)
    for b in range(count):
        m, s, t = (part[0 if one else b].tolist() for part in (middle, scale, shift))
        expected = torch.zeros(size)
        for i in range(size[0]):
            for j in range(size[1]):
                y = 1 + ((i + 0.5) / size[0] - t[0]) / s
                x = 1 + ((j + 0.5) / size[1] - t[1]) / s
                top, left = (m[0] - 1 if y < m[0] else m[0]), (m[1] - 1 if x < m[1] else m[1])
                if 0 <= y < 2 and 0 <= x < 2 and top <= y < top + 1 and left <= x < left + 1:
                    expected[i, j] = 1 + 2 * (y >= m[0]) + (x >= m[1])
        torch.testing.assert_close(canvas[b, 0], expected)
        counts = torch.stack([(expected == value).sum() for value in (1, 2, 3, 4)]).float()
        torch.testing.assert_close(areas[:, b], counts / counts.sum())


def test_at_scale_1_a_canvas_shows_the_pictures_pixel_for_pixel() -> None:
    pictures = [torch.rand(1, 3, 8, 8) for _ in range(4)]
    half = torch.tensor([[0.5, 0.5]])
    canvas, areas = on_canvas(pictures, torch.tensor([[1.0, 1.0]]), torch.ones(1), half)
    torch.testing.assert_close(canvas[:, :, :4, :4], pictures[0][:, :, 4:, 4:])
    torch.testing.assert_close(canvas[:, :, :4, 4:], pictures[1][:, :, 4:, :4])
    torch.testing.assert_close(canvas[:, :, 4:, :4], pictures[2][:, :, :4, 4:])
    torch.testing.assert_close(canvas[:, :, 4:, 4:], pictures[3][:, :, :4, :4])
    assert areas.flatten().tolist() == [0.25] * 4
