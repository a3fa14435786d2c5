"""Contact sheets: pictures in rows, with titles above and captions below, by Pillow alone, since servers draw them too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fgvc.images.overlay import heat
from fgvc.io.files import replacing

GUTTER, LINE = 16, 15  # pixels: between tiles, and of a line of text
LETTERS = LINE - 4  # pixels: the size of a font that fits
FAST = 1  # compression of a PNG: a third of the default's time, a tenth larger
TILE = 256  # pixels of the longer side of a picture, which is enlarged or reduced to it
BAR = 12  # pixels: height of a legend's colours


@dataclass(frozen=True, slots=True)
class Cell:
    """A picture with a title above it and a caption below."""

    picture: Image.Image
    caption: str
    title: str = ""


def save_sheet(
    rows: Sequence[Sequence[Cell]],
    path: Path,
    *,
    font: ImageFont.FreeTypeFont,
    tile: int = TILE,
    legend: tuple[str, str] | None = None,
) -> Path:
    """Write a sheet of cells in columns of one width, texts broken into lines, in the format of the file's suffix.

    A title that all cells of a column have stands once, above it. `tile`: pixels of each picture's longer side. `legend`: what
    the two ends of the colours of maps mean, below the sheet. Raises FgvcError if it can't be written.
    """
    columns = max(len(row) for row in rows)
    heads = [_head([row[at] for row in rows if at < len(row)]) for at in range(columns)]
    top = max(len(_lines(head, font, tile)) for head in heads) if any(heads) else 0
    blocks = [[_Block.of(cell, font, tile, titled=not heads[at]) for at, cell in enumerate(row)] for row in rows]
    heights = [max(block.height for block in row) + GUTTER for row in blocks]
    size = (tile + GUTTER) * columns + GUTTER, GUTTER + LINE * top + sum(heights) + (LINE + BAR + GUTTER) * bool(legend)
    sheet = Image.new("RGB", size, "white")
    draw, lefts = ImageDraw.Draw(sheet), [GUTTER + at * (tile + GUTTER) for at in range(columns)]
    for head, left in zip(heads, lefts, strict=True):
        _write(draw, _lines(head, font, tile), (left, GUTTER), font)
    below = GUTTER + LINE * top
    for row, height in zip(blocks, heights, strict=True):
        for left, block in zip(lefts, row, strict=False):
            _write(draw, block.title, (left, below), font)
            under = below + LINE * len(block.title)
            sheet.paste(block.picture, (left, under))
            _write(draw, block.caption, (left, under + block.picture.height + 2), font)
        below += height
    if legend is not None:
        colours = heat(np.tile(np.linspace(0, 1, tile), (BAR, 1)))
        sheet.paste(Image.fromarray(colours), (GUTTER, below))
        draw.text((GUTTER, below + BAR), legend[0], fill="black", font=font)
        draw.text((GUTTER + tile - font.getlength(legend[1]), below + BAR), legend[1], fill="black", font=font)
    with replacing(path) as scratch:
        sheet.save(scratch, compress_level=FAST)
    return path


@dataclass(frozen=True, slots=True)
class _Block:
    """A cell as it is drawn."""

    picture: Image.Image
    title: list[str]
    caption: list[str]

    @classmethod
    def of(cls, cell: Cell, font: ImageFont.FreeTypeFont, tile: int, *, titled: bool) -> _Block:
        title = _lines(cell.title, font, tile) if titled and cell.title else []
        caption = _lines(cell.caption, font, tile) if cell.caption else []
        return cls(_scaled(cell.picture, tile), title, caption)

    @property
    def height(self) -> int:
        return self.picture.height + 2 + LINE * (len(self.title) + len(self.caption))


def _head(cells: Sequence[Cell]) -> str:
    """The title that all cells of a column share; empty where they have several."""
    titles = {cell.title for cell in cells}
    return titles.pop() if len(titles) == 1 else ""


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], place: tuple[int, int], font: ImageFont.FreeTypeFont) -> None:
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + number * LINE), line, fill="black", font=font)


def _scaled(picture: Image.Image, tile: int) -> Image.Image:
    """The picture with `tile` pixels on its longer side."""
    scale = tile / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture if scale == 1 else picture.resize((width, height), Image.Resampling.LANCZOS)


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
