"""Class names on sheets that are drawn without matplotlib."""

from __future__ import annotations

import pytest
from PIL import ImageFont

from fgvc.images import lettering


def test_names_that_the_font_lacks_become_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lettering, "FONTS", ("no such font.ttf",))
    names, font = lettering.writable(["sparrow", "麻雀", "Black-throated 2.5 %"])
    assert names == ["sparrow", "#1", "Black-throated 2.5 %"]
    assert isinstance(font, ImageFont.FreeTypeFont)


def test_the_first_font_that_has_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import font_manager

    own = font_manager.findfont("DejaVu Sans")  # which matplotlib brings along
    monkeypatch.setattr(lettering, "FONTS", ("no such font.ttf", own))
    assert lettering.writable(["Spatz Ärger", "воробей"])[0] == ["Spatz Ärger", "воробей"]
    assert lettering.writable(["麻雀"])[0] == ["#0"]
