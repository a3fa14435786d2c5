"""A font that can write class names, found by Pillow alone: where servers draw there is no matplotlib to ask.

With matplotlib, `fgvc.evaluation.font` looks through all fonts of the machine; this knows a few by name.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import ImageFont

from fgvc.images.sheet import LETTERS

FONTS = (
    "DejaVuSans.ttf", "Arial.ttf", "Helvetica.ttc",
    "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "SourceHanSansSC-Regular.otf", "wqy-microhei.ttc",
    "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "msyh.ttc", "PingFang.ttc", "Arial Unicode.ttf",
)  # fmt: skip
NOWHERE = "\U0010fffe"  # no font has this one, and draws for it what it draws for all that it lacks


def writable(names: Sequence[str]) -> tuple[list[str], ImageFont.FreeTypeFont]:
    """The names as they can be written, and the font. Where no font has all the characters, names become numbers."""
    found = [font for name in FONTS if (font := _font(name)) is not None]
    plain = found[0] if found else _own()
    for font in found or [plain]:
        if all(_writes(font, name) for name in names):
            return list(names), font
    return [name if _writes(plain, name) else f"#{at}" for at, name in enumerate(names)], plain


def _font(name: str) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, LETTERS)  # searches the system's folders
    except OSError:
        return None


def _own() -> ImageFont.FreeTypeFont:
    """Pillow's, which has no letters but those of English."""
    font = ImageFont.load_default(LETTERS)
    assert isinstance(font, ImageFont.FreeTypeFont), "every wheel of Pillow has FreeType"
    return font


def _writes(font: ImageFont.FreeTypeFont, text: str) -> bool:
    lacking = bytes(font.getmask(NOWHERE))
    return all(bytes(font.getmask(character)) != lacking for character in set(text) if not character.isspace())
