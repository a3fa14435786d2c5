"""Fonts that can write class names, found by Pillow alone, since servers, which draw too, don't install matplotlib."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

from fgvc.images.sheet import LETTERS

ADVICE = (
    "no font here can write some class names, which appear as numbers; install one, such as Debian's fonts-noto-cjk"
)
SUFFIXES = (".ttf", ".otf", ".ttc")
MISSING = "\U0010fffe"  # in no font: drawn as every character that a font lacks


def writable(names: Sequence[str]) -> tuple[list[str], ImageFont.FreeTypeFont]:
    """Return the names as a font can write them, and that font: the first with all characters. If there is none, names become
    numbers."""
    characters = frozenset(character for name in names for character in name if not character.isspace())
    font = font_for(characters)
    if font is not None:
        return list(names), font
    plain = next(fonts())
    return [name if _writes(plain, frozenset(name.split())) else f"#{at}" for at, name in enumerate(names)], plain


@cache
def font_for(characters: frozenset[str]) -> ImageFont.FreeTypeFont | None:
    """The first font that has all the characters, or None."""
    return next((font for font in fonts() if _writes(font, characters)), None)


def fonts() -> Iterator[ImageFont.FreeTypeFont]:
    """The machine's fonts: DejaVu Sans first, and last Pillow's own, which has English letters only."""
    for path in files():
        try:
            yield ImageFont.truetype(str(path), LETTERS)
        except OSError:
            continue
    font = ImageFont.load_default(LETTERS)
    assert isinstance(font, ImageFont.FreeTypeFont), "every wheel of Pillow has FreeType"
    yield font


@cache
def files() -> tuple[Path, ...]:
    """Font files: those in matplotlib's package, and in the folders that Pillow searches."""
    fonts = [path for folder in _folders() for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    lettered = [path for path in fonts if not path.name.startswith("LastResort")]  # a box for every character there is
    return tuple(sorted(lettered, key=lambda path: path.name != "DejaVuSans.ttf"))


def _folders() -> list[Path]:
    folders = []
    if (matplotlib := find_spec("matplotlib")) is not None and matplotlib.origin is not None:
        folders.append(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf")
    if sys.platform == "win32":
        folders.append(Path(os.environ.get("WINDIR", "C:/Windows")) / "fonts")
    elif sys.platform == "darwin":
        folders += [Path("/Library/Fonts"), Path("/System/Library/Fonts"), Path.home() / "Library/Fonts"]
    else:
        shares = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
        home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local/share")
        folders += [Path(share) / "fonts" for share in [home, *shares.split(":")] if share]
    return [folder for folder in folders if folder.is_dir()]


def _writes(font: ImageFont.FreeTypeFont, characters: frozenset[str]) -> bool:
    missing_glyph = bytes(font.getmask(MISSING))
    return all(bytes(font.getmask(character)) != missing_glyph for text in characters for character in text)
