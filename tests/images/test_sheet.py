"""Captions fit their column, and nothing of them is lost; pictures fill their tiles, with gutters between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from fgvc.images.decode import decode
from fgvc.images.overlay import heat
from fgvc.images.sheet import BAR, GUTTER, LETTERS, LINE, Cell, _lines, save_sheet


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gradcam: 040.Olive_sided_Flycatcher 39.7 %", ["gradcam: ", "040.Olive_sided_", "Flycatcher 39.7 %"]),
        ("short", ["short"]),
        ("", [""]),
        ("x" * 40, None),
        ("麻雀" * 20, None),
        ("a " * 30, None),
    ],
)
def test_captions_are_broken_between_words_where_they_have_any(text: str, expected: list[str] | None) -> None:
    font = ImageFont.load_default(LETTERS)
    assert isinstance(font, ImageFont.FreeTypeFont)
    lines = _lines(text, font, 100)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    if expected is not None:
        assert lines == [line.rstrip() for line in expected]


def solid(width: int, height: int, colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def test_pictures_of_any_size_fill_tiles_with_gutters_between(tmp_path: Path) -> None:
    """Titles that a column shares stand above it, once; others above their own picture."""
    font, red, blue, green = ImageFont.load_default(LETTERS), (200, 0, 0), (0, 0, 200), (0, 160, 0)
    assert isinstance(font, ImageFont.FreeTypeFont)
    rows = [
        [Cell(solid(20, 10, red), "small", "original"), Cell(solid(300, 300, blue), "large", "one")],
        [Cell(solid(10, 20, red), "", "original"), Cell(solid(100, 100, green), "", "other")],
    ]
    sheet = np.asarray(decode(save_sheet(rows, tmp_path / "sheet.png", font=font, tile=100, legend=("no", "yes"))))
    top = GUTTER + LINE  # below the first column's title
    second = top + LINE + 100 + 2 + LINE + GUTTER  # of the first row: a title, the larger picture, a caption
    assert sheet.shape == (second + LINE + 100 + 2 + GUTTER + LINE + BAR + GUTTER, 2 * (100 + GUTTER) + GUTTER, 3)
    left, right = GUTTER, 2 * GUTTER + 100
    for y, x, height, width, colour in (
        (top, left, 50, 100, red),
        (top + LINE, right, 100, 100, blue),
        (second, left, 100, 50, red),
        (second + LINE, right, 100, 100, green),
    ):
        assert (sheet[y : y + height, x : x + width] == colour).all()
        assert (sheet[y : y + height, x - 1] == 255).all(), "a gutter"
    bar = sheet[second + LINE + 100 + 2 + GUTTER :][:BAR, left : left + 100]
    np.testing.assert_array_equal(bar, np.tile(heat(np.linspace(0, 1, 100)), (BAR, 1, 1)))
