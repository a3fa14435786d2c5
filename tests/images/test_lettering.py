"""Class names on sheets that are drawn without matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import ImageFont

from fgvc.images import lettering


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    lettering.font_for.cache_clear()
    yield
    lettering.font_for.cache_clear()


def test_names_that_no_font_can_write_become_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    own = next(path for path in lettering.files() if path.name == "DejaVuSans.ttf")
    monkeypatch.setattr(lettering, "files", lambda: (own,))
    names, font = lettering.writable(["sparrow", "麻雀", "Spatz Ärger", "воробей", "Black-throated 2.5 %"])
    assert names == ["sparrow", "#1", "Spatz Ärger", "воробей", "Black-throated 2.5 %"]
    assert Path(str(font.path)).name == "DejaVuSans.ttf"


def test_without_a_font_file_the_font_is_pillows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(lettering, "files", lambda: (tmp_path / "broken.ttf", tmp_path / "gone.ttf"))
    names, font = lettering.writable(["sparrow", "麻雀"])
    assert names == ["sparrow", "#1"]
    assert isinstance(font, ImageFont.FreeTypeFont)


def test_a_font_that_draws_boxes_for_letters_is_not_used() -> None:
    """matplotlib brings a font that has a box for every character."""
    assert not any(path.name.startswith("LastResort") for path in lettering.files())
    assert not Path(str(lettering.writable(["麻雀"])[1].path)).name.startswith("LastResort")
