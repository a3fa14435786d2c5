"""A font that can write class names: matplotlib's own has no Chinese, and draws boxes without saying so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

ADVICE = (
    "no font here can write some class names, which appear as numbers; install one, such as Debian's fonts-noto-cjk"
)


@cache
def font_for(characters: frozenset[str]) -> Path | None:
    """The first of the machine's fonts that has all the characters, matplotlib's own before others; None: there is none."""
    own = Path(font_manager.findfont("DejaVu Sans"))
    found = {Path(entry.fname) for entry in font_manager.fontManager.ttflist}
    others = sorted(
        path for path in found if not path.name.startswith("LastResort")
    )  # a box for every character there is
    return next((path for path in (own, *others) if _writes(path, characters)), None)


def writable(names: Sequence[str]) -> tuple[list[str], Path]:
    """The names as they can be written, and the font's file. Where no font has all the characters, names become numbers."""
    font = font_for(_characters(names))
    if font is not None:
        return list(names), font
    plain = Path(font_manager.findfont("DejaVu Sans"))
    return [name if _writes(plain, _characters([name])) else f"#{at}" for at, name in enumerate(names)], plain


def _characters(names: Iterable[str]) -> frozenset[str]:
    return frozenset(character for name in names for character in name if not character.isspace())


def _writes(path: Path, characters: frozenset[str]) -> bool:
    known = _glyphs(path)
    return all(ord(character) in known for character in characters)


@cache
def _glyphs(path: Path) -> frozenset[int]:
    try:
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()
