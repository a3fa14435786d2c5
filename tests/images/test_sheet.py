"""Captions fit their column, and nothing of them is lost."""

from __future__ import annotations

import pytest
from PIL import ImageFont

from fgvc.images.sheet import LETTERS, _lines


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
