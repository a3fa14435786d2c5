"""Contact sheets, pictures in rows with a caption below each, by Pillow alone, since servers draw them too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fgvc.io.files import replacing

MARGIN, LINE = 6, 15  # pixels
LETTERS = LINE - 4  # pixels: the size of a font that fits
FAST = 1  # compression of a PNG: a third of the default's time, a tenth larger
NARROWEST, LARGEST = 160, 256  # pixels: least width of a column, largest side of a picture


@dataclass(frozen=True, slots=True)
class Cell:
    """A picture and its caption."""

    picture: Image.Image
    caption: str


def save_sheet(rows: Sequence[Sequence[Cell]], path: Path, *, font: ImageFont.FreeTypeFont) -> Path:
    """Write a sheet of cells in columns of one width, captions broken into lines, in the format of the file's suffix.
    Raises FgvcError if it can't be written."""
    reduced = [[(_reduced(cell.picture), cell.caption) for cell in row] for row in rows]
    width = max(NARROWEST, *(picture.width for row in reduced for picture, _ in row))
    blocks = [[(picture, _lines(caption, font, width)) for picture, caption in row] for row in reduced]
    heights = [max(picture.height + LINE * len(lines) for picture, lines in row) + MARGIN for row in blocks]
    columns = max(len(row) for row in blocks)
    sheet = Image.new("RGB", ((width + MARGIN) * columns + MARGIN, sum(heights) + MARGIN), "white")
    draw, top = ImageDraw.Draw(sheet), MARGIN
    for block, height in zip(blocks, heights, strict=True):
        for column, (picture, lines) in enumerate(block):
            left = MARGIN + column * (width + MARGIN)
            sheet.paste(picture, (left, top))
            for number, line in enumerate(lines):
                draw.text((left, top + picture.height + number * LINE), line, fill="black", font=font)
        top += height
    with replacing(path) as scratch:
        sheet.save(scratch, compress_level=FAST)
    return path


def _reduced(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return small


def _lines(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels: after the last space, _ or - of a line, or anywhere if it has none, as
    Chinese."""
    lines = [""]
    for character in text:
        line = lines[-1]
        if line and font.getlength(line + character) > width:
            cut = max(line.rfind(mark) for mark in " _-") + 1 or len(line)
            lines[-1:] = [line[:cut].rstrip(), line[cut:]]
        lines[-1] += character
    return lines
